"""The TPU kernel of block selection in Pallas' TPU interpreter, with race detection, and through the compiler, against the reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from plait.kernels import Tokens
from plait.kernels.target import target
from plait.kernels.topk_blocks import chunked, pallas_tpu, reference, tokens_tpu
from plait.kernels.topk_blocks.call import TopkCall
from plait.tests.kernels import cases
from plait.tests.kernels.attention_calls import run_checked
from plait.tests.kernels.choices import Case, call_of
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close, in_float64

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


CASES = {
    "softmax": Case(),
    "runs": Case(heads=(6, 1), runs=(4, 8), length=700, segments="long"),
    "runs-bfloat16": Case(runs=(4, 4), dtype="bfloat16", segments="left"),
    "sums": Case(scale=None, length=130),
    "indexer": Case(heads=(20, 1), scale=None, weights=True, length=140),
    "one-document": Case(heads=(2, 2), runs=(2, 8), segments=None, length=1100, dim=8),
}


@pytest.mark.parametrize("name", usually(CASES, "runs", "runs-bfloat16", "indexer", newest=("runs-bfloat16",)))
def test_scores_match_reference(name: str):
    call, arrays = call_of(CASES[name])
    got = run_checked(lambda arrays: pallas_tpu.scores(call(arrays)), arrays)
    plain = cases.quick_jit(lambda arrays: reference.scores(call(arrays)))
    assert_close(got, in_float64(plain, arrays), plain=plain(arrays), dtype=CASES[name].dtype)
    assert np.asarray(got).any()


@pytest.mark.parametrize("name", usually(CASES, "softmax", newest=("softmax",)))
def test_selection_is_that_of_the_reference(name: str, monkeypatch: pytest.MonkeyPatch):
    """In runs of queries; whole numbers, of which no sum is rounded."""
    monkeypatch.setattr(chunked, "MAX_SCORES", 1 << 14)
    call, arrays = call_of(CASES[name]._replace(scale=None, dtype="float32"))
    arrays = {key: jnp.round(x) for key, x in arrays.items()}
    found = run_checked(lambda arrays: pallas_tpu.topk_blocks(call(arrays)), arrays)
    expected = np.asarray(reference.topk_blocks(call(arrays)))
    assert (np.sort(found, axis=-1) == np.sort(expected, axis=-1)).all()


TOKENS = {
    "several": Case(heads=(20, 1), scale=None, weights=True, length=140),
    "two-groups": Case(heads=(4, 2), scale=None, weights=True, length=200, segments="left"),
    "one-document": Case(heads=(2, 1), scale=None, weights=True, length=600, segments=None, dim=8, dtype="bfloat16"),
}


@pytest.mark.parametrize("top_k", [5, 130])
@pytest.mark.parametrize("name", usually(TOKENS, "several", "one-document", newest=("several",)))
def test_tokens_are_those_of_the_reference(name: str, top_k: int):
    """Whole numbers, so that there are many ties and no sum is rounded."""
    call, arrays = call_of(TOKENS[name])
    arrays = {key: jnp.round(x) for key, x in arrays.items()}
    choose = lambda arrays: call(arrays).replace(top_k=min(top_k, arrays["q"].shape[1] - 1))
    with target("v5e"):
        assert tokens_tpu.unsupported(choose(arrays)) is None
        found = np.asarray(run_checked(lambda arrays: tokens_tpu.topk_tokens(choose(arrays)), arrays))
    expected = np.asarray(reference.topk_blocks(choose(arrays)))
    there = (found >= 0).sum(-1, keepdims=True)
    assert (np.diff(found, axis=-1)[np.arange(found.shape[-1] - 1) < there - 1] > 0).all(), "in order"
    assert (np.sort(found, axis=-1) == np.sort(expected, axis=-1)).all()


def test_words_are_in_the_order_of_numbers():
    x = jnp.asarray([-np.inf, -3e38, -1.5, -1e-37, -0.0, 0.0, 1e-37, 2.0, np.inf], jnp.float32)
    words = np.asarray(tokens_tpu.in_order(x))
    assert (np.sign(np.diff(words)) == np.sign(np.diff(np.asarray(x)))).all() and words.min() > tokens_tpu.NEVER


def test_unsupported_says_why():
    def reason(**fields: Any) -> str | None:
        call, arrays = call_of(CASES["softmax"])
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()} | fields.pop("arrays", {})
        with target("v5e"):
            return pallas_tpu.unsupported(call(shapes).replace(**fields))

    assert reason() is None
    assert "chooses by itself" in str(reason(by_group=False))
    assert "1 queries" in str(reason(arrays={"q": jax.ShapeDtypeStruct((2, 1, 4, 16), jnp.float32)}))
    wide = {"q": jax.ShapeDtypeStruct((2, 300, 128, 256), jnp.float32)}
    assert "64 heads of 256 channels" in str(reason(arrays=wide))


def topology_arrays(generation: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What makes shapes, of bfloat16, on a device that is described."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'plait[aot]'")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    return lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


@pytest.mark.parametrize(
    ("generation", "length", "kind"),
    [
        ("v5e", 4096, "runs"),
        *(
            pytest.param(name, n, kind, marks=pytest.mark.slow)
            for name in TOPOLOGIES
            for n in (32768, 131072)
            for kind in ("runs", "indexer")
        ),
    ],
)
def test_kernel_compiles(generation: str, length: int, kind: str, monkeypatch: pytest.MonkeyPatch):
    """NSA's scores of runs, and those of DSA's indexer for the queries that are worked off at a time."""
    array = topology_arrays(generation, monkeypatch)
    numbers = lambda n: array(1, n, dtype=jnp.int32)
    heads, queries, blocks, options = 16, length, length // 16, {"block_size": 64, "scale": 0.1, "stride": 16, "span": 32}
    if kind == "indexer":
        heads, queries, blocks, options = 64, chunked.MAX_SCORES // length, length, {"block_size": 1, "scale": None}
        options["weights"] = array(1, queries, heads)
    fields = {"top_k": 16, "num_local": 0, "num_first": 0, "by_group": True, "num_blocks": length} | options
    at, blocks_at = (Tokens(None, numbers(n), numbers(n)) for n in (queries, blocks))
    call = TopkCall(q=array(1, queries, heads, 128), blocks=array(1, blocks, 1, 128), at=at, blocks_at=blocks_at, **fields)
    with target(generation):
        assert pallas_tpu.unsupported(call) is None
        assert "group_scores" in jax.jit(pallas_tpu.scores).lower(call).compile().as_text()


@pytest.mark.parametrize(
    ("generation", "length"),
    [
        ("v5e", 4096),
        *(pytest.param(name, 65536, marks=pytest.mark.slow) for name in TOPOLOGIES),
        *(pytest.param(name, 131072, marks=pytest.mark.slow) for name in ("v5e", "v6e")),
    ],
)
def test_choice_of_tokens_compiles(generation: str, length: int, monkeypatch: pytest.MonkeyPatch):
    """64 heads of DSA's indexer, 2,048 tokens."""
    array = topology_arrays(generation, monkeypatch)
    numbers = lambda n: array(1, n, dtype=jnp.int32)
    fields = {"top_k": 2048, "block_size": 1, "num_local": 0, "num_first": 0, "by_group": True, "scale": None}
    call = TopkCall(
        q=array(1, 4096, 64, 128),
        blocks=array(1, length, 1, 128),
        weights=array(1, 4096, 64, dtype=jnp.float32),
        at=Tokens(None, numbers(4096), numbers(4096)),
        blocks_at=Tokens(None, numbers(length), numbers(length)),
        num_blocks=length,
        stride=None,
        span=None,
        **fields,
    )
    with target(generation):
        assert tokens_tpu.unsupported(call) is None
        assert "topk_tokens" in jax.jit(pallas_tpu.topk_blocks).lower(call).compile().as_text()
