"""What every change need not try again: more of the same, once a week (see `weekly` in pyproject.toml)."""
from collections.abc import Iterable
from typing import Any

import pytest


def mostly(params: Iterable[Any], now: Iterable[Any]) -> list[Any]:
    """Parameters for `parametrize`: those in `now` at every change, the others once a week. What is in `now` and not among them is an error."""
    params, now = list(params), list(now)
    assert all(p in params for p in now), "what is to be tried at every change is not among them"
    return [p if p in now else pytest.param(*(p if isinstance(p, tuple) else (p,)), marks=pytest.mark.weekly) for p in params]
