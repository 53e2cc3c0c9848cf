"""Runtimes: what executes a client's local training."""
