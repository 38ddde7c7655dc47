"""Likelihoods and answers of a hybrid whatever the lengths and the batch, against one full pass for each text."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from plait.configs.mesh import MeshConfig
from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.kernels import Tokens
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import hybrid, program_of, tiny
from plait.train.harness.answers import Answers, Wanted
from plait.train.harness.likelihoods import Likelihoods
from plait.train.harness.shapes import Shapes
from plait.train.run import Trained
from plait.train.scoring.generate import Sampling, generate_tokens

LONGEST = 40


@pytest.fixture(scope="module")
def trained(compile_cache):
    """Every parameter is moved off its initial value, so that the likeliest tokens differ from place to place."""
    return trained_of(hybrid())


def trained_of(config) -> Trained:
    program = program_of(config, ByteTokenizer.vocab_size)
    rng = np.random.default_rng(0)
    params, buffers = (
        {name: rng.normal(size=a.shape, scale=0.3).astype(a.dtype) for name, a in arrays.items()}
        for arrays in program.blueprint.shapes()
    )
    return Trained(program, ByteTokenizer(), 8, params, buffers, {})


def shapes_of(trained, rows=4) -> Shapes:
    """As many rows at once."""
    return Shapes.of(trained.program.config, trained.program.mesh, LONGEST, rows * LONGEST)


@pytest.fixture(scope="module")
def scorer(trained):
    return Likelihoods(trained, shapes_of(trained))


@pytest.fixture(scope="module")
def logits_of(trained):
    model = trained.program.blueprint.build(trained.params, trained.buffers)
    run = quick_jit(lambda model, ids: model(Tokens(ids=ids))[0])

    def logits(ids) -> np.ndarray:
        """Of one text alone, in one shape: what follows it is not seen."""
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(run(model, jnp.asarray(padded)), np.float64)[0, : len(ids)]

    return logits


def by_hand(pair, logits_of) -> tuple[float, bool]:
    given, follows = pair
    whole = [*given, *follows][-LONGEST - 1 :]
    logits = logits_of(whole[:-1])[-len(follows) :]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logs[np.arange(len(follows)), follows].sum(), bool((logits.argmax(-1) == follows).all())


PROMPTS = [[5, 9, 2], [7], list(range(1, 31)), [5, 9, 2]]


def pairs(logits_of) -> list[tuple[list[int], list[int]]]:
    """Of many lengths, one longer than a row; some of the same context, one twice, one greedy."""
    rng = np.random.default_rng(0)
    some = lambda length: rng.integers(0, 257, length).tolist()
    found = [(some(1 + 5 * n), some(1 + n % 4)) for n in range(8)] + [(some(70), some(3)), (some(1), some(LONGEST))]
    shared = some(9)
    found += [(shared, some(1)) for _ in range(4)] + [found[0]]
    likeliest = int(logits_of(shared)[-1].argmax())
    return [*found, (shared, [likeliest])]


def test_as_one_pass_for_each_text(scorer, logits_of):
    asked = pairs(logits_of)
    told: list[int] = []
    ours = scorer(asked, told.append)
    exact = [by_hand(pair, logits_of) for pair in asked]
    assert_close(np.float32([one.log for one in ours]), np.float32([log for log, _ in exact]))
    assert [one.greedy for one in ours] == [greedy for _, greedy in exact]
    assert ours[-1].greedy and not ours[0].greedy
    assert told == [4, 8, 12, 16]


def test_choices_of_one_token_share_their_context(scorer, logits_of):
    """The context of each question is read once, but where its choices do not fit into what is scored at once."""
    rng = np.random.default_rng(1)
    asked = [(context, [int(choice)]) for context in rng.integers(0, 257, (3, 7)).tolist() for choice in rng.integers(0, 257, 6)]
    ours = scorer(asked)
    assert_close(np.float32([one.log for one in ours]), np.float32([by_hand(pair, logits_of)[0] for pair in asked]))
    assert [len(chunk.texts) for chunk in scorer._chunks(asked)] == [3, 1]


def test_few_shapes():
    """Rows of 1, 1.5, 2, 3, ... times the shortest; batches of powers of two, that a mesh divides."""
    program = program_of(hybrid({"mesh": MeshConfig(data=2, context=2), "data.seq_len": 2048}), devices=4)
    shapes = Shapes.of(program.config, program.mesh, 2048, 4096)
    assert sorted({shapes.width(n) for n in range(1, 2049)}) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(shapes.width(n) >= n for n in range(1, 2049))
    assert [shapes.rows(64, left) for left in (1, 2, 3, 5, 99, 10_000)] == [2, 2, 4, 8, 64, 64]
    assert shapes.rows(2048, 10) == shapes.rows(1536, 10) == 2
    assert dataclasses.replace(shapes, longest=100).width(97) == 100
    with pytest.raises(ValueError, match=r"max_length=2046 must be a multiple of 2 x mesh\.context=2.*use 2044"):
        Shapes.of(program.config, program.mesh, 2046, 4096)


def test_parts_that_cannot_be_scored_are_refused(scorer):
    for pair, message in (
        (([], [1]), "nothing is given"),
        (([1], []), "nothing follows"),
        (([1], [1] * 41), "max_length=40 must be at least the 41 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer([([1], [2]), pair])


PROMPTS = [[5, 9, 2], [7], list(range(1, 31)), [5, 9, 2]]


@pytest.fixture(scope="module")
def plain(compile_cache):
    """What decodes by other means is that of `generate`, which has its own tests."""
    return trained_of(tiny({"model.num_layers": 1}))


@pytest.fixture(scope="module")
def answers(plain):
    return Answers(plain, shapes_of(plain))


def test_answers_are_those_of_generate(plain, answers):
    """Whatever stands beside a prompt; a prompt without room for its answer loses its first tokens."""
    tokenizer, model = ByteTokenizer(), plain.program.blueprint.build(plain.params, plain.buffers)
    wanted = [Wanted.of({"max_gen_toks": 20, "until": until}) for until in ("", "", "", "a")]
    cut = [prompt[-(LONGEST - 20) :] for prompt in PROMPTS]
    ids = generate_tokens(model, cut, num_tokens=20, vocab_size=257, sampling=Sampling(temperature=0)).tolist()
    whole = [tokenizer.decode(row[: row.index(256) if 256 in row else None]) for row in ids]
    assert answers(PROMPTS, wanted) == [*whole[:3], whole[3].split("a")[0]]


def test_writing_stops_when_every_answer_has_ended(answers, monkeypatch):
    """And the end is no part of the answer."""
    monkeypatch.setattr("plait.train.harness.answers._AT_ONCE", 4)
    whole = answers(PROMPTS[:2], [Wanted.of({"max_gen_toks": 20})] * 2)
    until = [text[1:3] for text in whole]
    steps: list[int] = []
    go_on = answers._go_on
    monkeypatch.setattr(answers, "_go_on", lambda *args, **more: (steps.append(1), go_on(*args, **more))[1])
    cut = answers(PROMPTS[:2], [Wanted.of({"max_gen_toks": 20, "until": until})] * 2)
    for text, one in zip(whole, cut):
        assert one == text[: min(place for end in until if (place := text.find(end)) >= 0)]
    assert 0 < len(steps) < 5


def test_draws_follow_the_seed_and_differ_between_rows(answers):
    drawn = [Wanted.of({"max_gen_toks": 20, "temperature": 1.0})] * 5  # more than a batch has
    one, again, other = (answers([PROMPTS[0]] * 5, drawn, seed=seed) for seed in (0, 0, 1))
    assert one == again != other and len(set(one)) == 5


def test_answers_longer_than_a_row_are_refused(answers):
    with pytest.raises(ValueError, match=r"max_length=40 must be more than the max_gen_toks=40 tokens.*--max-gen-tokens 20"):
        answers([[1]], [Wanted.of({"max_gen_toks": 40})])
