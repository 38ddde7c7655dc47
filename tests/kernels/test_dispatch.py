"""Choosing an implementation, and the errors of the ops' public functions."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import pytest

from plait import kernels
from plait.kernels import Mask, Tokens, dispatch, gpu
from plait.kernels.call import OPTION, Call
from plait.kernels.target import target

pytestmark = pytest.mark.newest


@dataclasses.dataclass(frozen=True)
class DemoCall(Call):
    """One number."""

    x: int = dataclasses.field(metadata=OPTION)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> dispatch.Op:
    monkeypatch.setattr(dispatch, "_ops", {})
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    fast = dispatch.Implementation(lambda call: call.x + 1, lambda call: "x is negative" if call.x < 0 else None)
    return dispatch.Op("demo", fast=fast, plain=dispatch.Implementation(lambda call: call.x + 2))


def test_auto_takes_the_first_that_supports_and_logs_once(op: dispatch.Op, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, logger="plait"):
        assert [op("auto", DemoCall(x)) for x in (1, 1, -1)] == [2, 2, 1]
    laptop = "kernels: plain JAX; there are none for the backend cpu (--verbose says more)"
    assert caplog.messages == [laptop, "demo: chose fast", "demo: chose plain; not fast because x is negative"]
    assert dispatch.chosen() == {"demo": "fast, plain"}
    assert dispatch.registered() == {"demo": ("fast", "plain")}


def test_kernels_of_other_backends_are_details(op: dispatch.Op, caplog: pytest.LogCaptureFixture):
    """One line for all that a CPU lacks; on an accelerator a line an op, with what could have run there."""
    tpu = dispatch.Implementation(None, lambda call: dispatch.not_on("tpu") or "x is large", platform="tpu")
    gpu = dispatch.Implementation(None, lambda call: dispatch.not_on("gpu"), platform="gpu")
    ops = [dispatch.Op(name, tpu=tpu, gpu=gpu, plain=op.implementations["plain"]) for name in ("one", "two")]
    with caplog.at_level(logging.INFO, logger="plait"):
        for each in ops:
            each("auto", DemoCall(1))
        assert [message.partition(":")[0] for message in caplog.messages] == ["kernels"]
        with target("v5e"):
            ops[0]("auto", DemoCall(1))
    assert caplog.messages[1:] == ["one: chose plain; not tpu because x is large"]


def test_an_old_installation_on_its_accelerator_is_a_warning(op: dispatch.Op, caplog: pytest.LogCaptureFixture, monkeypatch):
    """Where the call itself is in the way it is not."""
    monkeypatch.setattr(gpu, "MIN_JAX", (99, 0, 0))
    kernel = dispatch.Implementation(None, lambda call: gpu.unavailable(), platform="gpu")
    other = dispatch.Implementation(None, lambda call: dispatch.not_on("gpu") or "x is large", platform="gpu")
    with caplog.at_level(logging.INFO, logger="plait"), target("h100"):
        dispatch.Op("one", gpu=kernel, plain=op.implementations["plain"])("auto", DemoCall(1))
        dispatch.Op("two", gpu=other, plain=op.implementations["plain"])("auto", DemoCall(1))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "not gpu because it needs JAX >= 99.0.0 and this is" in caplog.messages[0] and "plait[cuda]" in caplog.messages[0]


def test_named_is_taken_or_refused(op: dispatch.Op):
    assert op("plain", DemoCall(1)) == 3
    with pytest.raises(NotImplementedError, match="demo: implementation='fast' does not support this call: x is negative"):
        op("fast", DemoCall(-1))
    with pytest.raises(ValueError, match="implementation='slow' is unknown; use one of auto, fast, plain"):
        op("slow", DemoCall(1))


def test_exceptions_propagate():
    broken = dispatch.Op(
        "broken", first=dispatch.Implementation(lambda call: 1 / 0), second=dispatch.Implementation(lambda call: 1)
    )
    dispatch._ops.pop("broken")
    with pytest.raises(ZeroDivisionError):
        broken("auto", DemoCall(1))


SELECTED = kernels.SelectedBlocks(indices=jnp.ones((2, 5, 2, 2), jnp.int32), block_size=3, num_blocks=2)
QK, V, G, STATE = jnp.zeros((2, 6, 2, 8)), jnp.zeros((2, 6, 4, 3)), jnp.zeros((2, 6, 4)), jnp.zeros((2, 4, 8, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.decay(QK[0], QK, V, G), "decay: q.shape=(6, 2, 8) must be [B, T, Hqk, K]"),
        (lambda: kernels.decay(QK, QK[:, :5], V, G), "k.shape=(2, 5, 2, 8) must be [B, T, Hqk, K] as q = (2, 6, 2, 8)"),
        (lambda: kernels.decay(QK, QK, V[:, :, :3], G), "heads=2 must divide the number of v heads=3; use one of [1, 3]"),
        (
            lambda: kernels.decay(QK, QK, V, G[:, :, :2]),
            "g.shape=(2, 6, 2) must be [B, T, Hv] = (2, 6, 4) or [B, T, Hv, K] = (2, 6, 4, 8)",
        ),
        (lambda: kernels.delta_rule(QK, QK, V, G, G[:, :, :2]), "beta.shape=(2, 6, 2) must be [B, T, Hv] = (2, 6, 4)"),
        (lambda: kernels.delta_rule(QK, QK, V, None, G, initial_state=STATE[:, :2]), "initial_state.shape=(2, 2, 8, 3) must be"),
        (lambda: kernels.decay(QK, QK, V, G + 0.5), "decay: g holds 0.5; a log decay must be at most 0"),
        (lambda: kernels.decay(QK.astype(int), QK, V, G), "q.dtype=int32 must be a floating-point type"),
        (lambda: kernels.attention(QK, QK, QK.astype(bool), mask=Mask()), "v.dtype=bool must be a floating-point type"),
        (
            lambda: kernels.attention(QK, QK, QK, mask=Mask(), selected=SELECTED),
            "selected.indices.shape=(2, 5, 2, 2) must be [B, T, Hs, N] with B and T of q = (2, 6, 2, 2)",
        ),
        (
            lambda: kernels.routed_attention(QK, QK, QK, QK[..., 0], mask=Mask()),
            "routed_attention: active.dtype=float32 must be bool",
        ),
        (lambda: kernels.delta_rule(QK, QK, V, None, G, chunk_size=48), "chunk_size=48 must be a power of two"),
        (
            lambda: kernels.decay(QK, QK, V, G, at=Tokens(None, jnp.ones((2, 5), int))),
            "segment_ids.shape=(2, 5) must be [B, T]",
        ),
        (
            lambda: kernels.decay(QK, QK, V, G, at=Tokens(None, jnp.ones((2, 6)))),
            "segment_ids.dtype=float32 must be an integer",
        ),
        (
            lambda: kernels.decay(QK, QK, V, G, at=Tokens(None, jnp.asarray([[1, 1, 2, 0, 1, 1]] * 2))),
            "segment_ids[0] holds runs [1, 2, 1]",
        ),
        (lambda: kernels.attention(QK, QK[:, :4], QK[:, :4], mask=Mask()), "k has S=4 tokens and q has T=6"),
        (lambda: kernels.attention(V, V[:, :, :3], V[:, :, :3], mask=Mask()), "must divide the number of q heads=4"),
        (lambda: kernels.attention(QK, QK, QK, mask=Mask(), sinks=jnp.zeros(3)), "sinks.shape=(3,) must be [H] = (2,)"),
        (lambda: kernels.attention(QK, QK, QK, mask=Mask(), normalizer="sigmoid"), "sigmoid_bias=None with normalizer='sigmoid'"),
        (lambda: kernels.attention(QK, QK, QK, mask=Mask(), normalizer="relu"), "normalizer='relu' is unknown"),
        (lambda: kernels.attention(QK, QK, QK, mask=Mask(), scale=QK[0, 0]), "must be a number; multiply q by an array instead"),
        (lambda: kernels.decay(QK, QK, V, G, scale=QK[0, 0]), "must be a number; multiply q by an array instead"),
        (
            lambda: kernels.attention(QK, QK, QK, mask=Mask(), normalizer="sigmoid", sigmoid_bias=jnp.zeros(3)),
            "sigmoid_bias.shape=(3,) must be a number or [H] = (2,)",
        ),
        (lambda: kernels.attention(QK, QK, QK, mask=Mask(), logit_soft_cap=-1.0), "logit_soft_cap=-1.0 must be above 0"),
        (
            lambda: kernels.attention(QK, QK, QK, mask=Mask(), bias=kernels.LowRankBias(QK[:, :, :1], QK[:, :5])),
            "bias.k.shape=(2, 5, 2, 8) must be [B or 1, S, Hkv or 1, R] = (2 or 1, 6, 2 or 1, 8)",
        ),
        (
            lambda: kernels.attention(QK, QK, QK, mask=Mask(), bias=kernels.DistanceBias(jnp.ones((2, 3)), edges=(1,))),
            "bias.table.shape=(2, 3) must be [H, edges + 1] = (2, 2)",
        ),
        (
            lambda: kernels.attention(QK, QK, QK, mask=Mask(), bias=kernels.DistanceBias(jnp.ones((2, 3)), edges=(4, 1))),
            "bias.edges=(4, 1) must ascend",
        ),
        (lambda: kernels.attention(QK, QK, QK, mask=Mask(), bias=kernels.DistanceBias()), "neither a table nor slopes"),
        (
            lambda: kernels.routed_attention(QK, QK, QK, QK[..., 0] > 0, mask=Mask(), sinks=QK[..., 0]),
            "sinks.shape=(2, 6, 2) must be [H]; attend with all heads",
        ),
        (
            lambda: kernels.attention_rows(QK, QK, QK[0, 0, 0], mask=Mask(), scale=0.0, bias=kernels.LowRankBias(QK, QK)),
            "scale=0",
        ),
        (
            lambda: kernels.attention(QK, QK, QK, mask=Mask(), implementation="cuda"),
            "use one of auto, pallas_tpu, pallas_gpu, chunked, reference",
        ),
        (lambda: kernels.short_conv(G, jnp.zeros((4, 5))), "weight.shape=(4, 5) must be [W, D] with D of x = (4, 4)"),
        (lambda: kernels.short_conv(G, jnp.zeros((4, 4)), activation="relu"), "activation='relu' is unknown"),
        (
            lambda: kernels.cross_entropy(G, jnp.zeros((4, 9)), jnp.zeros((2, 5), int)),
            "targets.shape=(2, 5) must be [B, T] = (2, 6)",
        ),
        (
            lambda: kernels.cross_entropy(G, jnp.zeros((4, 9)), jnp.zeros((2, 6), int), logit_soft_cap=0.0),
            "logit_soft_cap=0.0 must be",
        ),
    ],
)
def test_public_functions_reject(call, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_traced_segment_ids_are_not_read():
    jax.eval_shape(lambda ids: kernels.decay(QK, QK, V, G, at=Tokens(None, ids)), jnp.asarray([[1, 2, 1, 1, 1, 1]] * 2))
