"""Mega against its authors' cell and moving average, and what is particular to it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.linear.mega import MegaConfig, in_blocks
from plait.models.mixers.linear.mega_chunk import MegaChunkConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden.generate import LENGTH, WIDTH, Arrays
from plait.tests.models.golden.generate_scan import MEGA
from plait.tests.models.mixers.linear.test_scan_oracles import assert_agrees, golden, layer, named
from plait.tests.tolerances import assert_close

SIZES = {"attention_dim": MEGA["attention_dim"], "expand": MEGA["hidden"] / WIDTH, "state_dim": MEGA["state_dim"]}
CELLS = {
    "mega": MegaConfig(**SIZES),
    "mega_laplace": MegaConfig(**SIZES, weights="laplace", bias="simple", max_distance=LENGTH),
    "mega_chunk": MegaChunkConfig(**SIZES, bias="simple", chunk_size=MEGA["chunk_size"]),
    "mega_both": MegaConfig(**SIZES, bias="simple", max_distance=LENGTH),
    "mega_chunk_both": MegaChunkConfig(**SIZES, weights="laplace", bias="simple", chunk_size=MEGA["chunk_size"]),
    "mega_chunk_laplace": MegaChunkConfig(**SIZES, weights="laplace", chunk_size=MEGA["chunk_size"]),
}


def weights(arrays: Arrays) -> Arrays:
    """Ours, from one projection there for u, z, r and h, and a table of both directions for the simple bias."""
    w = named(arrays)
    sizes = np.cumsum([WIDTH, MEGA["attention_dim"], MEGA["hidden"]])
    split = {kind: dict(zip("uzrh", np.split(w(f"mx_proj.{kind}"), sizes), strict=True)) for kind in ("weight", "bias")}
    for kind, found in split.items():
        found |= {"v": w(f"v_proj.{kind}"), "o": w(f"h_proj.{kind}")}
    ours = {f"{name}.kernel": kernel.T for name, kernel in split["weight"].items()}
    ours |= {f"{name}.bias": bias for name, bias in split["bias"].items()}
    average = {n: w(f"move.{theirs}")[..., 0] for n, theirs in (("p", "delta"), ("a", "alpha"), ("b", "beta"))}
    for name, both in (average | {"c": w("move.gamma")}).items():
        ours |= {f"{end}.{name}": both[i : i + WIDTH].T for end, i in (("average", 0), ("later", WIDTH)) if i < len(both)}
    ours |= {"w": w("move.omega"), "scale": w("gamma"), "shift": w("beta")}
    if "weights/rel_pos_bias.alpha" in arrays:
        return ours | {"bias": np.concatenate([w("rel_pos_bias.alpha"), w("rel_pos_bias.beta")])}
    table = w("rel_pos_bias.rel_pos_bias")
    return ours | {"bias": (table if "later.p" in ours else table[: len(table) // 2 + 1])[::-1]}


@pytest.mark.proves("mega", "mega_chunk")
@pytest.mark.parametrize("name", CELLS)
def test_cell_is_the_authors(name: str):
    arrays = golden(name)
    assert_agrees(layer(CELLS[name], weights(arrays), arrays, causal="both" not in name), arrays)


def mixer(config: MegaConfig, causal: bool = True):
    return config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH, causal=causal))


def test_average_is_a_convolution_with_its_kernel():
    """The kernel of the paper, written out: sum_n c b p / sqrt(n) (1 - p a)^t."""
    mega, x = mixer(MegaConfig(**SIZES)), np.random.default_rng(0).standard_normal((1, 40, WIDTH))
    average, _ = jax.jit(lambda x: mega.moving_average(x, None, at=layout((40,), length=40)))(jnp.asarray(x, jnp.float32))
    parts = (mega.average.p, mega.average.a, mega.average.b, mega.average.c)
    p, a, b, c, w = (np.asarray(param[...], np.float64) for param in (*parts, mega.w))
    p, a = 1 / (1 + np.exp(-p)), 1 / (1 + np.exp(-a))
    powers = (1 - p * a)[None] ** np.arange(40)[:, None, None]
    kernel = (powers * c * b * p).sum(1) / MEGA["state_dim"] ** 0.5  # [T, D]
    y = np.stack([(kernel[: t + 1][::-1] * x[0, : t + 1]).sum(0) for t in range(40)]) + w * x[0]
    assert_close(average[0], y / (1 + np.exp(-y)))


def test_values_come_from_the_input_and_not_from_its_average():
    """A value of a token does not depend on the tokens before it; its query and key do."""
    mega, at = mixer(MegaConfig(**SIZES)), layout((9,), length=9)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, WIDTH)), jnp.float32)
    one, other = (mega.project(y, at=at, state=None)[0] for y in (x, x.at[:, :4].set(0.0)))
    np.testing.assert_array_equal(one.v[:, 4:], other.v[:, 4:])
    assert (np.asarray(one.q[:, 4:]) != np.asarray(other.q[:, 4:])).any()


def test_laplace_logits_are_divided_by_the_keys_that_are_seen():
    """Two documents and padding: a first token has one key, whatever stands before it."""
    config = MegaConfig(**SIZES, weights="laplace", bias="simple")
    mega, at = mixer(config), layout((5, 4), length=11)
    q, k = np.random.default_rng(0).standard_normal((2, 1, 11, SIZES["attention_dim"]))
    found = np.asarray(mega.weights(*(mega.side(i, jnp.asarray(x[:, :, None], jnp.float32), at) for i, x in enumerate((q, k)))))[
        0
    ]
    table, erf = np.asarray(mega.bias[...], np.float64), np.vectorize(math.erf)
    for start, size in ((0, 5), (5, 4)):
        for i in range(start, start + size):
            keys = range(start, i + 1)
            logits = np.array([q[0, i] @ k[0, j] / len(keys) + table[i - j] for j in keys])
            assert_close(found[i, keys], 0.5 * (1 + erf((logits - 0.5**0.5) * (2 * np.pi) ** 0.5)), dtype="float32")
            assert not np.delete(found[i], keys).any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [None, 24])
def test_blocks_are_one_matrix(monkeypatch: pytest.MonkeyPatch, chunk: int | None, causal: bool):
    """Blocks of queries that do not divide the length, chunks that no block begins with, documents and padding."""
    monkeypatch.setattr("plait.models.mixers.linear.mega.BLOCK", 16)
    config = (
        MegaConfig(**SIZES, weights="laplace") if chunk is None else MegaChunkConfig(**SIZES, weights="laplace", chunk_size=chunk)
    )
    mega, at = mixer(config, causal), layout((25, 55), (90,), length=90)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 90, WIDTH)), jnp.float32)

    @quick_jit
    def both(x):
        inputs, _ = mega.project(x, at=at, state=None)
        whole = jnp.einsum("bhts,bshv->bthv", mega.implied(inputs, jnp.arange(90), at=at), inputs.v)
        return in_blocks(mega.weights, *mega.sides(inputs, at), inputs.v, config.chunk, causal), whole

    assert_close(*both(x))


def test_information_crosses_chunks_by_the_average_alone():
    """Chunks are counted from a document's first token, and no weight crosses their borders."""
    mega, at = mixer(MegaChunkConfig(**SIZES, chunk_size=4)), layout((6, 5), length=12)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 12, WIDTH)), jnp.float32)
    inputs, _ = mega.project(x, at=at, state=None)
    seen = np.asarray(mega.implied(inputs, jnp.arange(12), at=at))[0, 0] > 0
    chunks = [(0, 4), (4, 6), (6, 10), (10, 11)]
    expected = np.zeros((12, 12), bool)
    for start, stop in chunks:
        expected[start:stop, start:stop] = np.tri(stop - start, dtype=bool)
    np.testing.assert_array_equal(seen, expected)


def test_an_odd_dimension_cannot_be_rotated():
    with pytest.raises(ValueError, match=r"attention_dim=5 must be even where bias='rotary' .* use 6, or bias='simple'"):
        MegaConfig(attention_dim=5).fit(WIDTH)
    MegaConfig(attention_dim=5, bias="simple").fit(WIDTH)
