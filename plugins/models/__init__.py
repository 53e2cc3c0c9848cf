"""Models: what is predicted, and where each table and tower lives."""
