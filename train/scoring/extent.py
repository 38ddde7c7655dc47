"""On how much a run validates, as its `environment.json` holds it and as pages say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.data.loader import Data


def measured(data: Data, asked: int | None) -> dict[str, int]:
    """Held-out batches that a validation reads and how many there are, its rows, and their length in tokens; `asked` is `eval_batches`."""
    every = len(data.val)
    batches = every if asked is None else min(asked, every)
    rows = min(batches * data.config.batch_size, data.num_val_rows)
    return {"batches": batches, "of": every, "rows": rows, "row_tokens": data.config.seq_len}


def words(environment: Mapping[str, Any]) -> str | None:
    """What `measured` was, for people; None where the run holds no such record or nothing is held out."""
    found = environment.get("validation")
    if not isinstance(found, Mapping):
        return None
    values = [one for name in ("batches", "of", "rows", "row_tokens") if isinstance(one := found.get(name), int) and one > 0]
    if len(values) < 4:
        return None
    batches, of, rows, length = values
    part = f"all {of:,} batches" if batches == of else f"{batches:,} of {of:,} batches"
    return f"{rows * length:,} tokens ({part}, {rows:,} rows of {length:,})"
