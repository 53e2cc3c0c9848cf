"""The recommender: a client's history, tables, towers, training, evaluation and reports."""

if not __name__.startswith("fedtower."):
    raise ImportError(f"import fedtower.{__name__}, not {__name__}")
