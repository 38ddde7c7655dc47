"""Text from a model: the same tokens by steps as by full passes, and every way of drawing at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from plait.configs.mesh import MeshConfig
from plait.data.landmarks import Landmarks
from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.kernels import Tokens
from plait.launch import main
from plait.tests.models.common import quick_jit
from plait.tests.train.common import hybrid, program_of, random_batch, tiny
from plait.train.loop import train
from plait.train.mesh import on_mesh
from plait.train.scoring.generate import Sampling, generate_text, generate_tokens
from plait.train.step import make_step

VOCAB = 100  # of the tokenizer; the embedding has 128 rows
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def model(compile_cache):
    """A hybrid trained for a few steps on random tokens, so that its guesses differ from place to place."""
    setup = program_of(hybrid({"steps": 30, "optimizer.learning_rate": 0.03}), VOCAB)
    step, state = quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, None)), setup.fresh()
    for seed in range(12):
        state, _ = step(state, random_batch(vocab=VOCAB, seed=seed % 2))
    return setup.blueprint.build(state.params, state.buffers)


def continued(model, prompts, num_tokens=8, **sampling):
    options = Sampling(**{k: v for k, v in sampling.items() if k != "seed"})
    return generate_tokens(
        model, prompts, num_tokens=num_tokens, vocab_size=VOCAB, sampling=options, seed=sampling.get("seed", 0)
    )


@pytest.fixture(scope="module")
def greedy(model):
    return continued(model, PROMPTS, temperature=0)


def test_greedy_by_steps_is_the_likeliest_by_full_passes(model, greedy):
    @quick_jit
    def last_logits(tokens, length):
        return model(Tokens(tokens))[0][0, length - 1]

    for prompt, continuation in zip(PROMPTS, greedy.tolist(), strict=True):
        text = list(prompt)
        for token in continuation:
            padded = jnp.asarray([text + [0] * (24 - len(text))], jnp.int32)  # causal: what follows is not seen
            logits = np.asarray(last_logits(padded, len(text)))[:VOCAB]
            assert token == logits.argmax(), f"after {text}: {token} has {logits[token]}, {logits.argmax()} has {logits.max()}"
            text.append(token)
    assert len({tuple(row) for row in greedy.tolist()}) > 1, "the prompts should not all lead to one text"


def test_landmarks_stand_in_prompts_and_continuations_and_are_not_returned(model):
    landmarks = Landmarks(3, VOCAB)
    found = generate_tokens(model, PROMPTS, num_tokens=7, vocab_size=VOCAB, sampling=Sampling(temperature=0), landmarks=landmarks)
    assert found.shape == (3, 7) and found.max() < VOCAB

    @quick_jit
    def likeliest(tokens):
        return jnp.argmax(model(Tokens(tokens))[0][0, :, :VOCAB], axis=-1)

    for prompt, row in zip(PROMPTS, found.tolist(), strict=True):
        whole = landmarks.into_text([*prompt, *row])
        guesses = np.asarray(likeliest(jnp.asarray([whole + [0] * (32 - len(whole))], jnp.int32)))
        told = [(token, guess) for token, guess in zip(whole[1:], guesses.tolist()) if token != VOCAB]
        assert all(token == guess for token, guess in told[-7:])


def test_prompts_of_different_lengths_go_on_as_they_do_alone(model, greedy):
    for prompt, row in zip(PROMPTS, greedy, strict=True):  # of one shape, so compiled once
        np.testing.assert_array_equal(continued(model, [prompt], temperature=0)[0], row)


def placed(model, **mesh):
    """`model` over eight devices, and their mesh."""
    setup = program_of(hybrid({"mesh": MeshConfig(**mesh)}), VOCAB, devices=8)
    params, buffers = jax.device_put(setup.blueprint.split(model), setup.blueprint.shardings(setup.mesh))
    return setup.blueprint.build(params, buffers), setup.mesh


def test_decode_state_is_divided_over_rows_and_heads(model):
    over, mesh = placed(model, data=2, fsdp=2, tensor=2)
    tokens = jnp.ones((4, 64), jnp.int32)

    @quick_jit
    def prefilled(model):
        with on_mesh(mesh):
            return model.prefill(Tokens(tokens), model.init_state(4, 72))[1]

    _, _, (delta, cache) = prefilled(over)
    rows, whole = ("data", "fsdp"), None
    for name, array, spec in [
        ("memory", delta.mixer.memory, P(rows, "tensor", whole, whole)),
        ("convolution", delta.mixer.convs["v_conv"], P(rows, whole, "tensor")),
        ("keys", cache.mixer.entries["k"], P(rows, whole, "tensor", whole)),
        ("values", cache.mixer.entries["v"], P(rows, whole, "tensor", whole)),
    ]:
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), f"{name}: {array.sharding}"


def test_greedy_on_a_mesh_is_greedy_alone(model, greedy):
    over, mesh = placed(model, data=1, fsdp=2, context=2, tensor=2)
    found = generate_tokens(over, PROMPTS, num_tokens=8, vocab_size=VOCAB, sampling=Sampling(temperature=0), mesh=mesh)
    np.testing.assert_array_equal(found, greedy)


SAME_AS_GREEDY = {
    "top_k 1": {"top_k": 1},
    "top_p tiny": {"top_p": 1e-6},
    "cold": {"temperature": 1e-4},
    "both": {"top_k": 5, "top_p": 1e-6},
}


@pytest.mark.parametrize("sampling", SAME_AS_GREEDY.values(), ids=SAME_AS_GREEDY)
def test_one_choice_left_is_greedy(sampling):
    logits = jax.random.normal(jax.random.key(1), (64, 50))
    for seed in range(5):
        drawn = Sampling(**sampling).draw(logits, jax.random.key(seed))
        np.testing.assert_array_equal(drawn, logits.argmax(-1))


def draws(probabilities, count=4000, **sampling):
    """Shares of `count` draws from one distribution."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (count, len(probabilities)))
    drawn = np.asarray(Sampling(**sampling).draw(logits, jax.random.key(0)))
    return np.bincount(drawn, minlength=len(probabilities)) / count


CHANCES = np.array([0.1, 0.4, 0.2, 0.3])
SHARES = {
    "plain": ({"temperature": 1.0}, CHANCES),
    "top_k 2": ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    "top_k beyond the vocabulary": ({"temperature": 1.0, "top_k": 99}, CHANCES),
    "top_p keeps the token that crosses the share": ({"temperature": 1.0, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
    "top_p 1": ({"temperature": 1.0, "top_p": 1.0}, CHANCES),
    "top_p after top_k": ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    "temperature": ({"temperature": 0.5}, CHANCES**2 / (CHANCES**2).sum()),
    "hot": ({"temperature": 1e6}, np.full(4, 0.25)),
}


@pytest.mark.parametrize(("sampling", "expected"), SHARES.values(), ids=SHARES)
def test_shares_drawn(sampling, expected):
    found = draws(CHANCES, **sampling)
    assert np.abs(found - expected).max() < 4 * 0.5 / np.sqrt(4000)
    assert (found[np.asarray(expected) == 0] == 0).all()


def test_hot_draws_never_take_a_row_that_is_no_token(model):
    drawn = continued(model, [[1]] * 16, num_tokens=64, temperature=1e6)
    assert drawn.min() >= 0 and drawn.max() < VOCAB and len(np.unique(drawn)) > VOCAB // 2


def test_seed_decides_the_draws(model):
    one, two, other = (continued(model, PROMPTS, seed=seed, temperature=1.0) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be a finite number of at least 0"),
        ({"temperature": 1e-40}, "temperature=1e-40 must be 0 or at least 1e-06"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": float("inf")}, "temperature=inf must be a finite number"),
        ({"top_k": 0}, "top_k=0 must be a whole number from 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be a finite number above 0"),
        ({"top_p": 1.1}, "top_p=1.1 must be a finite number above 0"),
    ],
    ids=str,
)
def test_illegal_sampling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("prompts", "count", "message"), [([], 3, "prompt is empty"), ([[1], []], 3, "prompt is empty"), ([[1]], 0, "num_tokens=0")]
)
def test_nothing_to_go_on_from_is_refused(prompts, count, message):
    with pytest.raises(ValueError, match=message):
        generate_tokens(None, prompts, num_tokens=count, vocab_size=VOCAB, sampling=Sampling())


def test_text_ends_at_end_of_text(monkeypatch):
    rows = np.array([[104, 105, 256, 33, 256], [72, 105, 33, 33, 33]])
    seen = {}
    monkeypatch.setattr(
        "plait.train.scoring.generate.generate_tokens", lambda model, prompts, **options: seen.update(prompts=prompts) or rows
    )
    options = {"num_tokens": 5, "sampling": Sampling()}
    texts = generate_text(None, ByteTokenizer(), ["a", ""], document_start=True, **options)
    assert texts == ["hi", "Hi!!!"] and seen["prompts"] == [[256, 97], [256]]
    generate_text(None, ByteTokenizer(), ["a", "é"], document_start=False, **options)
    assert seen["prompts"] == [[97], [195, 169]]


def test_generate_command(compile_cache, corpus, tmp_path, capfdbinary):
    """The prompt comes back byte for byte, with nothing before it; what is not the text goes to standard error."""
    out = tmp_path / "run"
    train(tiny({"data.source": str(corpus), "out": str(out), "steps": 3, "optimizer.warmup_steps": 1, "data.val_fraction": 0.0}))
    capfdbinary.readouterr()

    def said(*words):
        assert main(["generate", str(out), "--num-tokens", "12", *words]) == 0
        return capfdbinary.readouterr().out

    prompt = "[law]\tis :x: :100:\r\x1b[2J [bold]é[/bold]\n"
    first = said("--prompt", prompt)
    assert first.startswith(prompt.encode()) and first == said("--prompt", prompt)
    assert said("--temperature", "0") == said("--temperature", "0", "--seed", "5")
    for words, message in (
        (["--num-tokens", "0"], b"num_tokens=0 must be a whole number from 1"),
        (["--prompt", "\udcff"], b"is not UTF-8; give text"),
    ):
        assert main(["generate", str(out), *words]) == 2
        assert message in capfdbinary.readouterr().err
