"""Promises of the recommender's kinds: datasets need numpy; models and runtimes need torch."""

from __future__ import annotations

import sys
from pkgutil import iter_modules

# A bare assertion says what it compared, in other people's tests and in `fedtower plugins check` as in ours.
if "pytest" in sys.modules:
    import pytest

    pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in iter_modules(__path__)))
