"""Needles: how prompts are made, which tokens a head copies, and that recall is of the model's likeliest tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Tokens
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.convert.reshapes import make_run, model_of
from plait.tests.train.probes.test_probes import look_at
from plait.train.inspection.heads import InspectError, Masking
from plait.train.inspection.looking import looking
from plait.train.inspection.needles import Copying, NeedleConfig, Needles, Recall, needles_of, recalling
from plait.train.run import opened

TEXT = np.random.default_rng(0).integers(30, 90, 400)
BOS = 257


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return opened(make_run(tmp_path_factory.mktemp("needles") / "run", model_of()))


def made(trained, start=BOS, **options):
    return needles_of(trained, TEXT, NeedleConfig(prompts=5, cue=2, answer=4, **options), 40, start, seed=3)


@pytest.mark.parametrize("start", [None, BOS])
def test_a_prompt_is_text_with_a_needle_that_comes_again_at_its_end(trained, start):
    needles = made(trained, start)
    first = int(start is not None)
    assert needles.ids.shape == (5, 40) and (first == 0 or (needles.ids[:, 0] == BOS).all())
    text = TEXT.tobytes()
    for row, begin in zip(needles.ids, needles.starts, strict=True):
        needle = row[begin : begin + 6]
        assert (row[-6:] == needle).all() and len(set(needle.tolist())) == 6 and set(needle.tolist()) <= set(TEXT.tolist())
        hay = np.concatenate([row[first:begin], row[begin + 6 : -6]]).astype(TEXT.dtype)
        assert hay.tobytes() in text, "what is around the needle is a piece of the text"
    hay = 40 - first - 12
    assert_close(np.float32(needles.starts - first), np.floor((np.arange(5) + 0.5) * (hay + 1) / 5).astype(np.float32))
    assert needles.rows.tolist() == [35, 36, 37, 38], "the places from which the last four tokens are said"


def test_needles_of_a_seed_are_the_same(trained):
    assert (made(trained).ids == made(trained).ids).all()


def test_a_head_copies_where_its_largest_weight_is_on_the_next_token_in_the_needle():
    ids = np.array([[9, 1, 2, 3, 4, 3, 9, 1, 2, 3, 4]])
    needles = Needles(ids, np.array([1]), size=4, answer=2)  # at 1 to 4; said from 8 and 9: the tokens 3 and 4
    rows = jnp.asarray(needles.rows)
    look = lambda *places: dataclasses.replace(look_at(np.eye(11)[[[*range(8), *places, 10]]][None], [[11]]), rows=rows)
    hits = lambda *places: np.asarray(Copying(needles).measure((look(*places),))["hits"])[0, 0]
    assert hits(3, 4) == 1
    assert hits(5, 4) == 0.5, "the token that comes next, but outside of the needle"
    assert hits(2, 3) == 0, "in the needle, but other tokens"
    assert hits(0, 4) == 0.5
    soft = look(3, 4)
    soft.mixer.attention[0, 0, 8, :3] = 0.3  # three times as much elsewhere, the largest still there
    soft.mixer.attention[0, 0, 9, 4] = -1  # by size
    assert np.asarray(Copying(needles).measure((soft,))["hits"])[0, 0] == 1


def test_recall_is_of_the_likeliest_tokens_and_scores_are_of_prompts_that_are_recalled(trained):
    """Three of five answers are made what the model says, greedily, and of a fourth the first half."""
    needles, program = made(trained), trained.program
    build = program.blueprint.build
    logits = quick_jit(lambda params, buffers, ids: build(params, buffers)(Tokens(ids))[0][:, 35:39])
    said = lambda: np.asarray(logits(trained.params, trained.buffers, jnp.asarray(needles.ids))).argmax(-1)
    needles.ids[:, 36:] = 256  # what the model never says
    for place in range(4):
        needles.ids[: 3 + (place < 2), 36 + place] = said()[: 3 + (place < 2), place]
    right = said() == needles.ids[:, 36:]
    recall = recalling(trained, needles)(Masking("all").kept(program.config.model))
    assert right[:3].all() and right[3, :2].all() and not right[3:, 2:].all()
    assert (recall.tokens, recall.whole) == (right.mean(), right.all(1).mean())
    copying = looking(trained, Copying(needles))(Tokens(jnp.asarray(needles.ids)))[1]
    counted = right.mean(1) > 0.5
    for score, layer in zip(recall.scores, copying, strict=True):
        assert_close(np.float32(score), np.asarray(layer["hits"])[:, counted].mean(1))


def test_where_nothing_is_recalled_there_are_no_scores(trained):
    needles = made(trained)
    needles.ids[:, 36:] = 256
    recall = recalling(trained, needles)(Masking("all").kept(trained.program.config.model))
    assert recall.tokens == 0 and all(np.isnan(score).all() for score in recall.scores)
    assert recall.best([(0, 0)], 1) == () and recall.found is None and recall.cells[-1] == "–"


def test_the_best_heads_are_those_with_the_highest_scores_above_nothing():
    recall = Recall(0.9, 0.5, [np.array([0.2, 0.0, np.nan]), np.array([0.1, 0.9, 0.2])])
    every = [(layer, head) for layer in range(2) for head in range(3)]
    assert recall.best(every, 3) == ((1, 1), (0, 0), (1, 2)) and len(recall.best(every, 6)) == 4 and recall.found == 4
    assert recall.best(every[:3], 2) == ((0, 0),)


@pytest.mark.parametrize(
    ("options", "length", "text", "message"),
    [
        ({"cue": 10, "answer": 10}, 40, TEXT, "needle.length=40, as many as a row has, must leave a piece of text"),
        ({}, 200, TEXT[:3], "text has 3 different tokens, and a needle has needle.cue"),
    ],
)
def test_needles_that_cannot_be_made(trained, options, length, text, message):
    with pytest.raises(InspectError, match=message):
        needles_of(trained, text, NeedleConfig(**options), length, BOS, 0)
