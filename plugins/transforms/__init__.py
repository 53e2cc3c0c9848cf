"""Transforms: steps on updates, on the client, on arrival and on the total."""
