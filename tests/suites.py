"""Which cases of a test are in the default suite, and which on the newest JAX too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def usually(values: Iterable[Any], *kept: Any, newest: Iterable[Any] = ()) -> list[Any]:
    """The values as parameters, of which those `kept` are in the default suite and the others in the slow one.

    Those `newest` are among the kept ones that `make newest` runs too. A plain tuple has a value for each of several names. Raises
    ValueError where one to keep is none of the values, or one of the newest not kept.
    """
    values, newest = list(values), list(newest)
    if unknown := [one for one in kept if one not in values] + [one for one in newest if one not in kept]:
        raise ValueError(f"{unknown} are none of {values}, or not kept")
    each = lambda value: value if type(value) is tuple else (value,)
    marks = lambda value: [pytest.mark.slow] * (value not in kept) + [pytest.mark.newest] * (value in newest)
    return [pytest.param(*each(value), marks=marks(value)) for value in values]
