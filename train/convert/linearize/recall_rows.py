"""Rows that ask for what lies far back: keys in pieces of a text, or those of the task that a run was trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask
from plait.train.convert.sample import pieces
from plait.train.convert.weights import ConvertError
from plait.train.run import Trained

CUE, ANSWER = 4, 8
"""First tokens of a key, which come again at the end of a row, and those after them, which the model is then to say."""
_SIZE = CUE + ANSWER
_MOST_KEYS = 10

Rows = tuple[np.ndarray, np.ndarray]
"""Ids, and whether what comes after each is asked for, `[R, T]`."""


def recalling(trained: Trained, rows: int, text: np.ndarray | None, seed: int) -> Callable[[int], Rows]:
    """Makes so many rows, as long as the run's, by number.

    Args:
        text: ids, into pieces of which keys are put; None for rows of the run's own task.

    Raises:
        ConvertError: they have no place for a key, or the text too few different tokens, or there is neither a text nor such a task.
    """
    data = trained.program.config.data
    task = data.task
    if text is None:
        if not isinstance(task, GeneratedTask):
            raise ConvertError(f"by=gates asks for keys in a text, as data.task={task.name} asks for none; give --text FILE")

        def of_task(number: int) -> Rows:
            draws = Draws(np.arange(number * rows, (number + 1) * rows), task.name, seed, "gates")
            ids, targets = task.generate(draws, data.seq_len)
            return ids.astype(np.int32), targets != NOT_ASKED

        return of_task
    start = trained.tokenizer.bos_id if data.document_start and trained.tokenizer is not None else None
    own, length = np.unique(text), data.seq_len - (start is not None)
    keys = min(_MOST_KEYS, length // (4 * _SIZE))
    if not keys:
        raise ConvertError(
            f"the run's rows of {data.seq_len} tokens have no place for a key of {_SIZE}, itself again, and as much text; import or train with "
            f"rows of {4 * _SIZE + 1} or more"
        )
    if len(own) < _SIZE:
        raise ConvertError(f"text has {len(own)} different tokens, and a key has {_SIZE}; give more text")

    def of_text(number: int) -> Rows:
        rng = np.random.default_rng((seed, number))
        hays = pieces(rng, (rows, length - 2 * keys * _SIZE), 0, text)
        ids = np.stack([_with_keys(rng, hay, own, keys) for hay in hays])
        asked = np.zeros_like(ids, bool)
        asked[:, -keys * _SIZE :] = np.tile(np.arange(_SIZE) >= CUE, keys)
        if start is not None:
            ids = np.concatenate([np.full((rows, 1), start, np.int32), ids], axis=1)
            asked = np.concatenate([np.zeros((rows, 1), bool), asked], axis=1)
        return ids, np.roll(asked, -1, axis=1)  # where a token is said, not where it stands

    return of_text


def _with_keys(rng: np.random.Generator, hay: np.ndarray, own: np.ndarray, count: int) -> np.ndarray:
    """A piece of text with keys in it, and the same keys in another order after it. Source: DuoAttention (arXiv 2410.10819), whose
    keys are words that a question names; here a key begins with what is asked, so that no instruction needs to be understood."""
    keys = np.stack([rng.choice(own, _SIZE, replace=False) for _ in range(count)]).astype(np.int32)
    places = np.sort(rng.integers(0, len(hay) + 1, count))
    return np.concatenate([np.insert(hay, np.repeat(places, _SIZE), keys.ravel()), keys[rng.permutation(count)].ravel()])
