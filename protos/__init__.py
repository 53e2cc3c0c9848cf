"""The wire format, versioned; it needs protobuf and grpc only."""

if not __name__.startswith("fedtower."):
    raise ImportError(f"import fedtower.{__name__}, not {__name__}")
