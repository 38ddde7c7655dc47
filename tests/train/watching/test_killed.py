"""Between what is decided about a spike and what is done: a run that is killed anywhere, nothing being saved, and resumed does it alike."""

import pytest

from plait.configs.event import EventConfig
from plait.data.loader import DataIterator
from plait.tests.train.common import changed, different_arrays
from plait.tests.train.test_resume import last_state, lines_of
from plait.tests.train.watching.test_spikes import BAD, spiked  # noqa: F401
from plait.train.loop import train

LOWER = EventConfig(action="lower_rate", factor=0.5)
ACTING = {
    "lower": {"event": {"spike_skipped": LOWER}},
    "rewind": {"spike.action": "rewind", "event": {"rewind": LOWER}},
    "clip": {"model.qk_clip.threshold": 1e-3, "event": {"spike_skipped": EventConfig(action="checkpoint")}},
}


class Killed(BaseException):
    """Nothing that the loop takes in."""


def killing(at):
    taking, left = DataIterator.__next__, [at]

    def take(iterator):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return taking(iterator)

    return take


@pytest.mark.slow
@pytest.mark.parametrize("acting", ACTING)
def test_a_run_that_was_killed_does_the_same(acting, spiked, compile_cache, tmp_path, monkeypatch):  # noqa: F811
    changes = {**ACTING[acting], "steps": 20}
    train(spiked(tmp_path / "whole", BAD, **changes))
    whole = last_state(tmp_path / "whole")
    # before the step is read, before what was decided is done, and after the checkpoint that follows
    for at in (BAD + 1, BAD + 2, BAD + 4):
        config = spiked(tmp_path / f"run{at}", BAD, **changes)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(DataIterator, "__next__", killing(at))
            train(config)
        train(changed(config, {"resume": True}))
        assert different_arrays(last_state(tmp_path / f"run{at}"), whole) == [], at
        for name in ("metrics.jsonl", "events.jsonl"):
            assert lines_of(tmp_path / f"run{at}" / name) == lines_of(tmp_path / "whole" / name), (at, name)
