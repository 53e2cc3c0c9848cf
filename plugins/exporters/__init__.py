"""Exporters: traced graphs as files that a device's engine reads."""
