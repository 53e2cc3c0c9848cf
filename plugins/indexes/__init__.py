"""Indexes: they find the items that suit a user vector."""
