"""The round, and the nouns it is made of; it knows arrays, and no tensor library, model, network or plugin."""

if not __name__.startswith("fedtower."):
    raise ImportError(f"import fedtower.{__name__}, not {__name__}")
