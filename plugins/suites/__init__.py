"""Suites: benchmarks as data."""
