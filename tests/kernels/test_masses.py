"""Masses from a row's log-normaliser against the dense attention matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import DistanceBias, Mask, PowerMask, Tokens, attention, attention_rows, column_mass, first_masses
from plait.kernels.attention import masses
from plait.tests.kernels import cases
from plait.tests.tolerances import assert_close

LENGTH = 70
MASKS = (Mask(), Mask(window_size=9, num_sink_tokens=2), PowerMask(block_size=8))


def _inputs() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((cases.BATCH, LENGTH, h, 8)), jnp.float32) for h in (4, 2, 2))


@pytest.mark.parametrize(
    ("mask", "layout", "soft_cap"),
    [
        *((mask, layout, None) for mask in MASKS for layout in (None, "several")),
        (MASKS[1], "several", 1.5),
        (MASKS[0], "left", 1.5),
    ],
    ids=str,
)
def test_masses_follow_the_attention_matrix(
    mask: Mask, layout: str | None, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(masses, "MAX_TILE", 20 * LENGTH)
    (q, k, v), sinks = _inputs(), jnp.asarray([0.5, -1.0, 2.0, 0.0])
    ids = None if layout is None else cases.segments(LENGTH, layout)
    bias = DistanceBias(jnp.asarray([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0], [-1.0, 1.0]]), jnp.asarray([0.1, 0.0, 0.4, 1.0]), (2,))
    options = {"mask": mask, "at": Tokens(None, ids), "logit_soft_cap": soft_cap, "bias": bias if soft_cap else None}

    @cases.quick_jit
    def run(q, k, v):
        _, stats = attention(q, k, v, sinks=sinks, return_stats=True, implementation="reference", **options)
        dense = attention_rows(q, k, jnp.arange(LENGTH), sinks=sinks, **options)  # [B, H, T, S]
        return stats, dense, first_masses(q, k, stats.lse, first_k=3, **options), column_mass(q, k, stats.lse, **options)

    stats, dense, first, columns = run(q, k, v)
    ids = np.ones((cases.BATCH, LENGTH), int) if ids is None else np.asarray(ids)
    expected = np.zeros(first.shape)
    for b, row in enumerate(ids):
        for segment in set(row.tolist()) - {0}:
            tokens = np.flatnonzero(row == segment)
            for p, j in enumerate(tokens[:3]):
                expected[b, tokens, :, p] = np.asarray(dense)[b, :, tokens, j]
    assert_close(first, expected)
    assert_close(first[..., 0], stats.first_mass)
    assert_close(columns, np.asarray(dense).sum(2).swapaxes(1, 2))


def test_first_masses_with_shuffled_keys():
    (q, k, v), order = _inputs(), np.random.default_rng(1).permutation(LENGTH)
    keys = Tokens(None, jnp.ones((cases.BATCH, LENGTH), int), jnp.asarray(order[None].repeat(cases.BATCH, 0)))
    _, stats = attention(q, k, v, mask=Mask(), return_stats=True)
    whole = first_masses(q, k, stats.lse, mask=Mask())
    assert_close(first_masses(q, k[:, order], stats.lse, mask=Mask(), kv_at=keys), whole)


def test_bad_arguments_are_refused():
    q, k, _ = _inputs()
    with pytest.raises(ValueError, match="first_k=0 must be at least 1"):
        first_masses(q, k, q[..., 0], mask=Mask(), first_k=0)
    with pytest.raises(ValueError, match=r"column_mass: lse.shape=\(2, 70, 2\) must be"):
        column_mass(q, k, k[..., 0], mask=Mask())
