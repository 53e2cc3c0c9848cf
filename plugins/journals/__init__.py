"""Journals: what has been accepted, durably."""
