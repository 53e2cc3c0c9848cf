"""Version 1 of the wire: ``federation.proto``, and the code that `make protos` writes from it."""

if not __name__.startswith("fedtower."):
    raise ImportError(f"import fedtower.{__name__}, not {__name__}")
