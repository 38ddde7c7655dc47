"""Long multiplication: the published examples with their steps, all small products, and the score of each digit."""

import numpy as np
import pytest

from plait.data.batch import Batch
from plait.data.tasks.draws import Draws
from plait.data.tasks.multiplication import MultiplicationTask

SIGNS = dict(zip("0123456789*=+()#", range(16)))
PUBLISHED = [
    "9 1 7 3 * 9 4 3 3 = 1 7 4 3 3 + 0 6 7 8 4 1 ( 1 3 2 2 8 1 ) + 0 0 7 5 1 1 1 ( 1 3 9 7 9 2 1 ) + 0 0 0 7 5 1 1 1 # 1 3 9 4 5 4 2 1",
    "7 6 9 2 * 1 6 3 6 = 7 6 9 2 0 + 0 2 0 8 7 1 ( 7 8 9 0 8 1 ) + 0 0 1 0 9 8 0 ( 7 8 0 1 7 0 1 ) + 0 0 0 2 0 8 7 1 # 7 8 0 3 7 8 8 1",
]
"""Lines of the authors' files (2405.14838), with = for the bars behind the question and # for ####."""


class Given(Draws):
    """Draws that give these numbers below what was asked for."""

    def __init__(self, numbers):
        super().__init__(np.arange(len(numbers)))
        self.numbers = np.asarray(numbers)

    def integers(self, stop, count):
        assert self.numbers.shape[1] == count and (self.numbers < stop).all()
        return self.numbers


def whole(task, numbers):
    """Rows for these pairs of numbers, their last answer included."""
    least = 10 ** (task.num_digits - 1)
    tokens, targets = task.generate(Given(np.asarray(numbers) - least), task.num_tokens(task.num_digits))
    return np.concatenate([tokens, targets[:, -1:]], axis=1).tolist()


def test_published_examples_step_by_step():
    numbers = [[int(part.replace(" ", "")[::-1]) for part in line.split(" =")[0].split(" * ")] for line in PUBLISHED]
    assert whole(MultiplicationTask(steps="written"), numbers) == [[SIGNS[sign] for sign in line.split()] for line in PUBLISHED]


@pytest.mark.parametrize(("digits", "steps"), [(1, "none"), (1, "written"), (2, "none"), (2, "written"), (3, "written")])
def test_rows_say_what_is_true(digits, steps):
    """Read by Python as arithmetic."""
    least = 10 ** (digits - 1)
    rng = np.random.default_rng(0)
    numbers = np.r_[rng.integers(least, 10 * least, (200, 2)), [[least, least], [10 * least - 1, 10 * least - 1]]]
    names = "".join(SIGNS)
    for (first, second), row in zip(
        numbers.tolist(), whole(MultiplicationTask(num_digits=digits, steps=steps), numbers), strict=True
    ):
        question, told = "".join(names[i] for i in row).split("=")
        assert question == f"{str(first)[::-1]}*{str(second)[::-1]}"
        *work, product = told.split("#")
        assert int(product[::-1]) == first * second and len(product) == 2 * digits
        assert bool(work) == (steps == "written")
        running = 0
        for place, part in enumerate(work[0].split("+") if work else []):
            partial, _, said = part.partition("(")
            assert int(partial[::-1]) == first * int(str(second)[-1 - place]) * 10**place and len(partial) == digits + 1 + place
            running += int(partial[::-1])
            assert bool(said) == (0 < place < digits - 1)
            assert not said or (int(said[-2::-1]) == running and len(said) == digits + 2 + place)


def test_numbers_have_all_their_digits_and_any():
    """The first is never 0, so it is 1 to 9 in 1 of 9 each, and the others 0 to 9."""
    count = 20_000
    tokens, _ = MultiplicationTask(num_digits=2).generate(Draws(np.arange(count), "test"), 9)
    for place, law in ((0, [0.1] * 10), (1, [0, *[1 / 9] * 9]), (3, [0.1] * 10), (4, [0, *[1 / 9] * 9])):
        np.testing.assert_allclose(np.bincount(tokens[:, place], minlength=10) / count, law, atol=5 * np.sqrt(0.1 / count))


@pytest.mark.parametrize("steps", ["none", "written"])
def test_digits_are_scored_by_their_place(steps):
    task = MultiplicationTask(num_digits=2, steps=steps)
    length = task.num_tokens(2) + 1
    tokens, targets = task.generate(Draws(np.arange(3), "test"), length)
    mask = (targets >= 0).astype(np.float32)
    mask[2] = 0
    right = mask > 0
    right[0, length - 3] = False  # the third digit: behind the fourth the row has a token more
    scores = task.scores(Batch(tokens, targets, mask, mask, mask), mask, right)
    assert [scores[f"digit_{k}"] for k in range(4)] == [(2.0, 2.0), (2.0, 2.0), (1.0, 2.0), (2.0, 2.0)]
    assert scores["whole"] == (1.0, 2.0) and scores["accuracy"] == (mask.sum() - 1, mask.sum())
