"""The indexer's divergence in plain JAX where attention tells its log-normalisers, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, SelectedBlocks, Tokens, attention, index_divergence
from plait.kernels.index_divergence import chunked
from plait.tests.kernels import cases
from plait.tests.tolerances import assert_close

LENGTH = 30
LEARNED = ("index_q", "index_k", "weights")
SHAPES = {"index_q": (3, 6), "index_k": (6,), "weights": (3,), "q": (4, 8), "k": (2, 8)}
AT = Tokens(None, jnp.asarray(np.repeat([[1, 2, 0, 2, 3], [0, 1, 2, 3, 0]], (11, 6, 2, 7, 4), axis=1), jnp.int32))


def inputs(dtype: str = "float32") -> dict[str, jax.Array]:
    rng = np.random.default_rng(5)
    return {name: jnp.asarray(rng.normal(size=(2, LENGTH, *shape)), dtype) for name, shape in SHAPES.items()}


def options(chosen: bool) -> dict[str, Any]:
    """Of packed rows with padding; tokens that are chosen, some of which are none, or all."""
    rng = np.random.default_rng(6)
    indices = np.stack([rng.permutation(LENGTH)[:9] for _ in range(2 * LENGTH)]).reshape(2, LENGTH, 1, 9)
    indices = np.where(rng.random(indices.shape) < 0.2, -1, indices)
    selected = SelectedBlocks(indices=jnp.asarray(indices, jnp.int32), block_size=1, num_blocks=LENGTH)
    return {"mask": Mask(), "at": AT, "scale": 0.7, "selected": selected if chosen else None}


def lse_of(x: dict[str, jax.Array], **named: Any) -> jax.Array:
    return attention(x["q"], x["k"], x["k"], return_lse=True, **named)[1]


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chosen", [True, False])
def test_attention_tells_its_normalisers(implementation: str, dtype: str, chosen: bool, monkeypatch: pytest.MonkeyPatch):
    """Rows and gradients are those of weights that are normalised here; no more than without passes through it to the attention."""
    monkeypatch.setattr(chunked, "BLOCK_SIZE", 8)
    named = options(chosen)

    def run(known: bool) -> Any:
        def rows(x: dict[str, jax.Array]) -> jax.Array:
            lse = lse_of(x, **named) if known else None
            return index_divergence(**x, lse=lse, implementation=implementation, **named)

        return cases.quick_jit(lambda x: cases.with_gradients(rows, x))(inputs(dtype))

    told, made = run(True), run(False)
    for (path, got), want in zip(jax.tree.leaves_with_path(told), jax.tree.leaves(made), strict=True):
        assert_close(got, want, dtype=dtype, err_msg=jax.tree_util.keystr(path))
    (gradients,) = told["gradient"]
    assert all(np.asarray(gradients[name]).any() == (name in LEARNED) for name in gradients)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("chosen", [True, False])
def test_what_is_told_is_what_weights_are_over(implementation: str, chosen: bool):
    """log 2 more halves them, of D = sum_s p_s log(p_s / w_s) leaving D / 2 - log 2 / 2."""
    x, named = inputs(), options(chosen)
    rows = lambda more: index_divergence(**x, lse=lse_of(x, **named) + more, implementation=implementation, **named)
    half, whole = rows(np.float32(np.log(2))), rows(np.float32(0))
    some = np.asarray(lse_of(x, **named))[..., 0] > -1e29
    assert some.any() and not some.all()
    assert_close(half, np.where(some, whole / 2 - np.log(2) / 2, 0))


@pytest.mark.parametrize(
    ("lse", "message"),
    [
        (jnp.zeros((2, 4, LENGTH)), r"index_divergence: lse.shape=\(2, 4, 30\) must be \[B, T, H\] of q = \(2, 30, 4\)"),
        (
            jnp.zeros((2, LENGTH, 4), jnp.bfloat16),
            "index_divergence: lse.dtype=bfloat16 must be float32; pass what attention returns",
        ),
        (jnp.zeros((2, LENGTH, 4), jnp.int32), "index_divergence: lse.dtype=int32 must be float32"),
    ],
)
def test_other_normalisers_are_refused(lse: jax.Array, message: str):
    with pytest.raises(ValueError, match=message):
        index_divergence(**inputs(), lse=lse, **options(True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"return_stats": True}, "attention: return_lse=True asks for lse alone, which return_stats=True gives among others"),
        ({"normalizer": "sigmoid", "sigmoid_bias": 0.0}, "attention: return_lse=True needs normalizer='softmax', not 'sigmoid'"),
    ],
)
def test_where_attention_has_none_to_tell(more: dict[str, Any], message: str):
    x = inputs()
    with pytest.raises(ValueError, match=message):
        lse_of(x, mask=Mask(), **more)
