"""Promises of the recommender's kinds: datasets need numpy; models and runtimes need torch."""
