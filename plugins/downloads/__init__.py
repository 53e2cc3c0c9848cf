"""How the shared parameters go down."""
