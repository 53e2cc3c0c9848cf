"""The rooms are collected by their import name, through fedtower/: as bare top-level folders they refuse to be imported."""

collect_ignore = ["core", "plugins", "protos", "recsys"]
