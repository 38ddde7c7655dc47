"""A window of a text token by token: what is read for it, that what comes before is one token, and windows that are none."""

import numpy as np
import pytest

from plait.tests.tolerances import assert_close
from plait.tests.train.convert.reshapes import make_run, model_of
from plait.train.inspection.heads import InspectError
from plait.train.inspection.looking import num_heads
from plait.train.inspection.tokens import token_by_token
from plait.train.inspection.window import window_of
from plait.train.run import opened

TEXT = np.frombuffer(b"The state of the union, and the state of the text.", np.uint8).astype(np.int32)


def test_a_window_is_read_after_what_is_before_it():
    assert window_of(None, TEXT, 16, 256).ids.tolist() == [256, *TEXT[:15]]
    assert window_of(None, TEXT, 200, 256).ids.tolist() == [256, *TEXT], "padding is no token"
    assert window_of(None, np.resize(TEXT, 100), 200, None).ids.tolist() == np.resize(TEXT, 64).tolist()
    later = window_of("20:25", TEXT, 16, 256)
    assert later.ids.tolist() == [256, *TEXT[10:25]] and later.before == 11 and "20 to 24" in later.words
    last = window_of("40:50", TEXT, 512, None)
    assert last.ids.tolist() == TEXT.tolist() and (last.before, last.name) == (40, "…40")
    alone = window_of("5:20", TEXT, 16, 256)
    assert alone.ids.tolist() == [256, *TEXT[5:20]] and alone.before == 0, "the start token alone is no other than itself"
    assert window_of("20:36", TEXT, 16, None).before == 0


@pytest.mark.parametrize(
    "asked, message",
    [
        ("5", "tokens='5' is no window of the text; write FIRST:END"),
        ("-3:4", "is no window"),
        ("٣:4", "is no window"),
        ("7:7", "must begin before it ends, and end within the text's 50 tokens; use 0:50"),
        ("40:51", "must begin before it ends, and end within the text's 50 tokens; use 0:50"),
        ("0:16", "has 16 tokens, and a row of 16 holds 15; give a larger --length or a shorter window, as 0:15"),
    ],
)
def test_what_is_no_window(asked, message):
    with pytest.raises(InspectError) as error:
        window_of(asked, TEXT, 16, 256)
    assert message in str(error.value)
    with pytest.raises(InspectError, match="at most 64 are shown or a shorter window, as 0:64"):
        window_of("0:65", np.resize(TEXT, 100), 128, None)


def test_what_is_before_a_window_is_one_token(tmp_path):
    trained = opened(make_run(tmp_path / "run", model_of()))
    kept = [np.ones(count, bool) for count in num_heads(trained.program.config.model)]
    every, part = (
        token_by_token(trained, window, list(map(str, window.ids[window.before :])))(kept)
        for window in (window_of(asked, TEXT, 16, 256) for asked in ("0:12", "5:12"))
    )
    assert (every.before, part.before, part.names[0], len(part.names)) == (0, 6, "…6", 8)
    assert_close(part.losses[1:], every.losses[6:])
    assert_close(part.largest, np.concatenate([every.largest[:, :6].max(1, keepdims=True), every.largest[:, 6:]], axis=1))
    assert_close(part.maps[:, :, 1:, 1:], every.maps[:, :, 6:, 6:])
    assert_close(part.maps[:, :, 1:, 0], every.maps[:, :, 6:, :6].sum(-1))
    assert_close(np.float32(part.received[:, 1:-1]), every.received[:, 6:-1])
    whole, lumped = every.made_of, part.made_of
    assert_close(np.float32(lumped["rollout"]), np.append(whole["rollout"][:6].sum(), whole["rollout"][6:]))
    assert_close(np.float32(lumped["flow"].sum()), np.float32(1))
