"""The transport ``grpc``: a federation whose clients are elsewhere."""
