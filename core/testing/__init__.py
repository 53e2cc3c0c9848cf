"""Promises: one test class for each kind of part. A plugin's whole test file can be a three-line subclass:

    from fedtower.core.testing.aggregator import AggregatorPromises

    class TestMedian(AggregatorPromises):
        make = Median

They need pytest and numpy. What they check are laws that hold for every part of the kind; a part that needs an
exemption is wrong, or the promise is.
"""

from __future__ import annotations

import sys
from pkgutil import iter_modules

# A bare assertion says what it compared, in other people's tests and in `fedtower plugins check` as in ours.
if "pytest" in sys.modules:
    import pytest

    pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in iter_modules(__path__)))
