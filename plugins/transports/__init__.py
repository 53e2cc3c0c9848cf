"""Transports: how a plan reaches a cohort and its updates come back."""
