"""Promises: one test class for each kind of part. A plugin's whole test file can be a three-line subclass:

    from fedtower.core.testing.aggregator import AggregatorPromises

    class TestMedian(AggregatorPromises):
        make = Median

They need pytest and numpy. What they check are laws that hold for every part of the kind; a part that needs an
exemption is wrong, or the promise is.
"""
