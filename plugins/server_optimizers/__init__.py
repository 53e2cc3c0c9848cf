"""Server optimisers: the total of a round to new parameters."""
