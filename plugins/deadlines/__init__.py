"""How long a round may take."""
