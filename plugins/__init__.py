"""One file, or one folder, per idea; they do not know each other."""

if not __name__.startswith("fedtower."):
    raise ImportError(f"import fedtower.{__name__}, not {__name__}")
