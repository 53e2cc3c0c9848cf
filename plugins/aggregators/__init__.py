"""Aggregators: many updates to one."""
