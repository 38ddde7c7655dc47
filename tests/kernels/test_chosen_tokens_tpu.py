"""The TPU kernels for tokens that queries choose one by one, in Pallas' TPU interpreter, against the reference."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from plait.kernels import Mask, SelectedBlocks, Tokens
from plait.kernels.attention import pallas_tpu, reference
from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.reference import MASKED
from plait.kernels.attention.tpu.tokens import chosen_tokens, tables
from plait.kernels.target import target
from plait.kernels.tolerances import wave
from plait.tests.suites import usually
from plait.tests.tolerances import assert_tree_close, in_float64

BATCH = 2


class Case(NamedTuple):
    """One call."""

    length: int = 33
    heads: int = 8
    dims: tuple[int, int] = (24, 16)
    chosen: int = 20
    dtype: str = "float32"
    mask: Mask = Mask()
    packed: bool = False
    """Two documents after padding, with padding between two tokens of the second."""
    before: int = 0
    """Tokens of which there are keys only, before the queries' own."""
    parts: int = 1
    """Tables of gradients."""
    shared: int = 0
    """Tokens that neighbouring ones have in common."""
    chip: str = "v5e"
    stats: bool = True
    """Without, lse alone."""


CASES = {
    "float32": Case(),
    "packed-bfloat16": Case(packed=True, heads=16, dtype="bfloat16"),
    "wide-three-tables": Case(dims=(130, 128), parts=3),
    "window-beyond-the-queries": Case(mask=Mask(window_size=9), before=7, stats=False),
    "packed-two-tables-bfloat16": Case(length=50, packed=True, dims=(300, 257), chosen=40, parts=2, dtype="bfloat16"),
    "tables-that-share-bfloat16": Case(length=70, dims=(130, 128), chosen=40, parts=3, shared=8, dtype="bfloat16"),
    "one-product-bfloat16": Case(heads=128, dims=(130, 128), dtype="bfloat16", chip="v6e"),
    "one-product-without-rest": Case(heads=128, dims=(120, 100), stats=False, chip="v6e"),
    "all": Case(mask=Mask(causal=False), packed=True, dims=(128, 128), chosen=16, heads=24),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 32 tokens, of 16 for gradients."""
    monkeypatch.setattr(chosen_tokens, "CHUNK", 32)
    with target("v5e"), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


def _call(case: Case) -> AttentionCall:
    rng, length, num_keys = np.random.default_rng(0), case.length, case.length + case.before
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), case.dtype)
    ids = np.ones((BATCH, num_keys), np.int32)
    if case.packed:
        ids[0, :4], ids[1, 12:], ids[1, 20:22] = 0, 2, 0
    keys = Tokens(None, jnp.asarray(ids)).placed(BATCH, num_keys)
    queries = jax.tree.map(lambda x: x[:, case.before :], keys)
    indices = np.stack([rng.permutation(num_keys)[: case.chosen] for _ in range(BATCH * length)])
    indices[rng.random(indices.shape) < 0.1] = -1
    indices[:3] = -1
    selected = SelectedBlocks(
        indices=jnp.asarray(indices.reshape(BATCH, length, 1, -1), jnp.int32), block_size=1, num_blocks=num_keys
    )
    others: dict[str, Any] = {"kv_at": keys, "kv_in_order": True} if case.before else {}
    return AttentionCall.of(
        "attention",
        q=draw(BATCH, length, case.heads, case.dims[0]),
        k=draw(BATCH, num_keys, 1, case.dims[0]),
        value_dim=case.dims[1],
        mask=case.mask,
        at=queries if case.packed or case.before else None,
        selected=selected,
        return_stats=case.stats,
        return_lse=not case.stats,
        **others,
    )


def _results(attention: Any, call: AttentionCall) -> Any:
    """Outputs, rows and gradients of q and k, those of values among the latter."""

    def run(q: jax.Array, k: jax.Array) -> Any:
        o, stats = attention(call.replace(q=q, k=k, v=k[..., : call.v.shape[3]]))
        return o, jax.tree.map(lambda x: jnp.where(x > MASKED / 2, x, 0), stats)

    found, back = jax.vjp(run, call.q, call.k)
    return found, back(jax.tree.map(wave, found))


@pytest.mark.parametrize(
    "name",
    usually(
        CASES,
        "float32",
        "packed-bfloat16",
        "wide-three-tables",
        "tables-that-share-bfloat16",
        "one-product-bfloat16",
        "window-beyond-the-queries",
        newest=["packed-bfloat16"],
    ),
)
def test_kernel_matches_reference(name: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    call = _call(case)
    assert pallas_tpu.unsupported(call) is None
    if case.parts > 1:
        problem = chosen_tokens.tables_of(call).problem
        rows = -(-call.k.shape[1] // (8 * case.parts)) * 8 + case.shared
        least = replace(problem, sums=True, rows=rows)
        monkeypatch.setattr(chosen_tokens, "core_memory", lambda: (least.besides + least.bytes) * 8 // 7 + 8)
        problem, parts = chosen_tokens.tables_of(call).cut(gradients=True)
        assert parts >= case.parts and problem.rows - problem.stride >= case.shared
    with target(case.chip):
        assert chosen_tokens.tables_of(call).problem.deep == (case.chip == "v6e")
        got = jax.jit(partial(_results, pallas_tpu.attention))(call)
    exact = in_float64(partial(_results, reference.attention), call)
    plain = jax.jit(partial(_results, reference.attention))(call)
    assert_tree_close(got, exact, plain, dtype=case.dtype)


def test_the_largest_logit_has_a_gradient_however_near_0_it_is():
    """The backward pass makes products with the queries on the other side, which round otherwise."""
    call = _call(Case(heads=64, chosen=1, mask=Mask(causal=False)))

    @partial(jax.jit, static_argnums=0)
    def gradient(attention: Any, q: jax.Array) -> jax.Array:
        return jax.grad(lambda q: attention(call.replace(q=q))[1].max_logit.sum())(q)

    np.testing.assert_allclose(*(gradient(x.attention, call.q) for x in (pallas_tpu, reference)), rtol=1e-6)


@pytest.mark.parametrize("aligned", [False, True])
def test_each_chosen_token_is_brought_once(aligned: bool):
    """By a table that has it; and where tables share more than a chunk of a query's tokens, in as few chunks as of one table."""
    rng, tokens, count, chosen = np.random.default_rng(1), 4096, 64, 128
    rows = np.full((1, count, chosen), -1, np.int32)
    for query in range(count):
        seen = 512 * (query // 8 + 1)
        rows[0, query] = np.sort(rng.choice(seen, chosen, replace=False))
    rows[0, :8, :20] = -1
    sizes = {"heads": 8, "key_dim": 8, "value_dim": 8, "dtype": "float32", "chunk": 8, "rows": 2048, "stride": 1376}
    problem, parts = tables.Problem(scale=1.0, stats=False, sums=False, **sizes), 3
    keys, hidden = jnp.zeros((1, tokens, 8)), jnp.zeros((1, tokens), bool)
    cut = tables.cut_tables(problem, parts, jnp.asarray(rows), keys, hidden, aligned=aligned)
    each = [tables.Part(*(x[n] for x in cut)) for n in range(parts)]
    found: list[list[int]] = [[] for _ in range(count)]
    taken = 0
    for part in each:
        entries, bounds = (np.asarray(x).reshape(count, -1) for x in tables.listed(problem, rows, part, aligned=aligned))
        taken += (bounds[:, 1] - bounds[:, 0]).sum()
        for query, (lines, (low, high)) in enumerate(zip(entries, bounds, strict=True)):
            here = lines[low:high] // problem.pitch
            found[query] += [int(part.low) + row for row in here[here < problem.rows]]
    for query in range(count):
        assert found[query] == [row for row in rows[0, query] if row >= 0]
    assert taken == count * chosen - 8 * 16


def test_padding_of_memory_is_no_token():
    """A hidden row is one of those that a list names, and the same as none."""
    call = _call(CASES["packed-bfloat16"])
    others = call.replace(k=call.k.at[1, 20:22].set(1e4))
    run = jax.jit(partial(_results, pallas_tpu.attention))
    jax.tree.map(np.testing.assert_array_equal, run(call)[0], run(others)[0])


BAD = {
    "no channels of the keys": lambda call: call.replace(values_in_keys=False),
    "of 2 key heads": lambda call: call.replace(k=jnp.repeat(call.k, 2, 2), v=jnp.repeat(call.v, 2, 2)),
    "no multiple of 8": lambda call: call.replace(q=call.q[:, :, :4]),
    "no room for a table": lambda call: call.replace(q=jnp.repeat(call.q, 1024, 2)),
    "without a soft cap": lambda call: call.replace(logit_soft_cap=3.0),
}


@pytest.mark.parametrize("words", BAD)
def test_what_is_not_served_says_why(words: str):
    assert words in str(pallas_tpu.unsupported(BAD[words](_call(CASES["float32"]))))


def test_a_small_core_has_no_table():
    with target("v4"):
        assert "16 MiB holds too few" in str(pallas_tpu.unsupported(_call(CASES["float32"])))
