"""Data sets: each loads a population of clients with their events."""
