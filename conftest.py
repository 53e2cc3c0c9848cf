"""The rooms are collected by their import name, through fedtower/: by their bare names they refuse to be imported."""

collect_ignore = ["core", "plugins", "protos", "recsys"]
