"""The TPU kernels of the indexer's divergence over chosen tokens, in Pallas' TPU interpreter, against the reference."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from plait.kernels import Mask, SelectedBlocks, Tokens
from plait.kernels.attention import pallas_tpu as attention
from plait.kernels.index_divergence import pallas_tpu, reference
from plait.kernels.index_divergence.call import DivergenceCall
from plait.kernels.target import target
from plait.kernels.tolerances import wave
from plait.tests.suites import usually
from plait.tests.tolerances import assert_tree_close, in_float64

BATCH = 2


class Case(NamedTuple):
    """One call."""

    length: int = 33
    heads: int = 8
    dim: int = 24
    index: tuple[int, int] = (8, 20)
    """Heads and channels of the indexer."""
    chosen: int = 12
    dtype: str = "float32"
    mask: Mask = Mask()
    packed: bool = False
    """Two documents after padding, with padding between two tokens of the second."""
    before: int = 0
    """Tokens of which there are keys only, before the queries' own."""
    parts: int = 1
    """Tables of the attention's keys, and at least so many of the indexer's."""


CASES = {
    "float32": Case(),
    "packed-bfloat16": Case(packed=True, heads=16, index=(16, 128), dtype="bfloat16"),
    "chunks-three-tables": Case(before=7, chosen=20, dim=130, parts=3),
    "window-beyond-the-queries": Case(mask=Mask(window_size=9), before=7, index=(24, 130)),
    "packed-two-tables-bfloat16": Case(length=34, packed=True, dim=300, chosen=20, parts=2, dtype="bfloat16"),
    "all": Case(mask=Mask(causal=False), packed=True, dim=128, chosen=16, heads=24),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 16 tokens."""
    monkeypatch.setattr(pallas_tpu, "CHUNK", 16)
    monkeypatch.setattr(pallas_tpu, "LANES", 16)
    with target("v5e"), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


def _call(case: Case) -> DivergenceCall:
    rng, length, num_keys = np.random.default_rng(0), case.length, case.length + case.before
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), case.dtype)
    ids = np.ones((BATCH, num_keys), np.int32)
    if case.packed:
        ids[0, :4], ids[1, 8:], ids[1, 13:15] = 0, 2, 0
    keys = Tokens(None, jnp.asarray(ids)).placed(BATCH, num_keys)
    indices = np.stack([rng.permutation(num_keys)[: case.chosen] for _ in range(BATCH * length)])
    indices[rng.random(indices.shape) < 0.1] = -1
    indices[:3] = -1
    selected = SelectedBlocks(
        indices=jnp.asarray(indices.reshape(BATCH, length, 1, -1), jnp.int32), block_size=1, num_blocks=num_keys
    )
    heads, width = case.index
    return DivergenceCall(
        index_q=draw(BATCH, length, heads, width),
        index_k=draw(BATCH, num_keys, width),
        weights=0.2 * draw(BATCH, length, heads).astype(jnp.float32),
        q=draw(BATCH, length, case.heads, case.dim),
        k=draw(BATCH, num_keys, 1, case.dim),
        at=jax.tree.map(lambda x: x[:, case.before :], keys),
        kv_at=keys,
        selected=selected,
        mask=case.mask,
        scale=case.dim**-0.5,
    )


def _results(divergence: Any, call: DivergenceCall) -> Any:
    """Rows, and gradients of all that is learned."""
    learned = {name: getattr(call, name) for name in ("index_q", "index_k", "weights")}
    rows, back = jax.vjp(lambda learned: divergence(call.replace(**learned)), learned)
    return rows, back(wave(rows))


@pytest.mark.parametrize("name", usually(CASES, "float32", "packed-bfloat16", "chunks-three-tables", newest=["packed-bfloat16"]))
def test_kernel_matches_reference(name: str, monkeypatch: pytest.MonkeyPatch):
    case, call = CASES[name], _call(CASES[name])
    assert pallas_tpu.unsupported(call) is None
    _cut(case, monkeypatch)
    got = jax.jit(partial(_results, pallas_tpu.index_divergence))(call)
    exact = in_float64(partial(_results, reference.index_divergence), call)
    plain = jax.jit(partial(_results, reference.index_divergence))(call)
    assert_tree_close(got, exact, plain, dtype=case.dtype)


def _cut(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into as many tables as the case has."""
    if case.parts > 1:
        some = -(-(case.length + case.before) // case.parts) + 7 & -8
        monkeypatch.setattr(pallas_tpu.Tables, "room", lambda self, *, gradients: some)


@pytest.mark.parametrize("name", usually(CASES, "packed-bfloat16", "chunks-three-tables", newest=["packed-bfloat16"]))
def test_where_attention_tells_its_normalisers_none_are_made(name: str, monkeypatch: pytest.MonkeyPatch):
    """Those of attention's kernel; the reference makes its own."""
    case, call = CASES[name], _call(CASES[name])
    _cut(case, monkeypatch)
    _, stats = jax.jit(attention.attention)(pallas_tpu._attention(call).replace(return_lse=True))
    told = call.replace(lse=stats.lse)
    kernels = {known: str(jax.make_jaxpr(pallas_tpu.index_divergence)(x)) for known, x in ((True, told), (False, call))}
    assert all("mean_weights" in text for text in kernels.values())
    assert ["chosen_tokens_forward" in kernels[known] for known in (True, False)] == [False, True]
    got = jax.jit(partial(_results, pallas_tpu.index_divergence))(told)
    exact = in_float64(partial(_results, reference.index_divergence), call)
    plain = jax.jit(partial(_results, reference.index_divergence))(call)
    assert_tree_close(got, exact, plain, dtype=case.dtype)


BAD = {
    "no tokens are selected one by one": lambda call: call.replace(selected=None),
    "4 heads of the indexer": lambda call: call.replace(index_q=call.index_q[:, :, :4], weights=call.weights[:, :, :4]),
    "of 2 key heads": lambda call: call.replace(k=jnp.repeat(call.k, 2, 2)),
}


@pytest.mark.parametrize("words", BAD)
def test_what_is_not_served_says_why(words: str):
    assert words in str(pallas_tpu.unsupported(BAD[words](_call(CASES["float32"]))))
