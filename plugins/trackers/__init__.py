"""Trackers: where a run's figures go besides the terminal."""
