"""Attacks: what some clients of a simulation do to the model of all the others."""
