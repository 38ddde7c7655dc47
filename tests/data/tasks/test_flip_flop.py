"""Flip-flop strings: the published law, reads of the last write, and glitches counted."""

import numpy as np
import pytest

from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.tasks.draws import Draws
from plait.data.tasks.flip_flop import IGNORE, READ, WRITE, FlipFlopTask
from plait.data.tasks.generated import NOT_ASKED


@pytest.mark.parametrize("ignore", [0.1, 0.8, 0.98])
def test_every_read_is_of_the_last_write(ignore):
    for row, asked in zip(*(x.tolist() for x in FlipFlopTask(ignore=ignore).generate(Draws(np.arange(50), "test"), 64))):
        assert row[0] == WRITE and row[-2] == READ
        for instruction, bit, target, after in zip(row[::2], row[1::2], asked[::2], asked[1::2]):
            assert bit in (3, 4) and after == NOT_ASKED
            if instruction == WRITE:
                memory = bit
            assert target == (memory if instruction == READ else NOT_ASKED)
            assert instruction != READ or bit == memory


@pytest.mark.parametrize("ignore", [0.1, 0.8, 0.98])
def test_instructions_bits_and_gaps_follow_the_published_law(ignore):
    """Instructions between the first and the last are independent, so the distance from the last read to its write is geometric."""
    tokens, _ = FlipFlopTask(ignore=ignore).generate(Draws(np.arange(20_000), "test"), 64)
    instructions, bits = tokens[:, ::2], tokens[:, 1::2] - 3
    write = (1 - ignore) / 2
    assert_share = lambda found, p: np.testing.assert_allclose(found.mean(), p, atol=5 * np.sqrt(p * (1 - p) / found.size))
    for instruction, p in ((IGNORE, ignore), (WRITE, write), (READ, write)):
        assert_share(instructions[:, 1:-1] == instruction, p)
    for instruction in (IGNORE, WRITE):
        assert_share(bits[instructions == instruction], 0.5)
    gap = 1 + np.argmax(instructions[:, -2::-1] == WRITE, axis=1)
    for distance in (1, 2, 5):
        assert_share(gap == distance, (1 - write) ** (distance - 1) * write)


def test_glitches_are_the_reads_that_are_wrong():
    mask = np.asarray([[1, 0, 1, 0, 1, 0, 1, 0]], np.float32)
    batch = Batch(*(np.zeros((1, 8), np.int32) for _ in range(4)), mask)
    right = np.asarray([[1, 0, 1, 0, 0, 0, 1, 0]], bool)
    assert FlipFlopTask().scores(batch, np.zeros((1, 8)), right) == {"accuracy": (3.0, 4.0), "glitch_rate": (1.0, 4.0)}


@pytest.mark.parametrize(("seq_len", "use"), [(63, 64), (2, 4)])
def test_rows_that_are_no_pairs_are_refused(seq_len, use):
    with pytest.raises(ValueError, match=rf"data\.task\.ignore=0\.8 needs rows of pairs.*use data\.seq_len={use}$"):
        DataConfig(task=FlipFlopTask(), seq_len=seq_len)
