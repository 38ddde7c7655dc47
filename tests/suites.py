"""Which cases of a test are in the default suite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def usually(values: Iterable[Any], *kept: Any) -> list[Any]:
    """The values as parameters, of which those `kept` are in the default suite and the others in the slow one.

    A tuple has a value for each of several names. Raises ValueError where one to keep is none of them.
    """
    values = list(values)
    if unknown := [one for one in kept if one not in values]:
        raise ValueError(f"{unknown} are none of {values}")
    each = lambda value: value if isinstance(value, tuple) else (value,)
    return [pytest.param(*each(value), marks=() if value in kept else pytest.mark.slow) for value in values]
