"""Mixers side by side against Falcon-H1 of `transformers`, Hymba's equation by hand, and heads of one layer split in two."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden import generate_parallel as falcon
from plait.tests.models.test_oracles import GOLDEN, layer
from plait.tests.tolerances import assert_close

WIDTH, LENGTH = 16, 21
two_heads = SoftmaxConfig(num_heads=2, head_dim=8)
gla = GLAConfig(num_heads=2, expand_v=1.0)
AT = layout((9, 7), (LENGTH,), length=LENGTH)


def build(config, **options):
    module = config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH, **options))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        variable[...] += 0.1 * rng.normal(size=variable.shape).astype(np.float32)
    return module


@functools.cache
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, LENGTH, WIDTH)), jnp.float32)


def run(module, x):
    graph, state = nnx.split(module)
    return quick_jit(lambda state, x: nnx.merge(graph, state)(x, at=AT, carry={}).y)(state, x)


def heads(part, x):
    """Finished heads side by side, `[B, T, H * V]`, of a part that projects them."""

    def run(state, x):
        part = nnx.merge(graph, state)
        inputs, _ = part.project(x, at=AT, state=None)
        o = part.finish(part.attend(inputs, at=AT, state=None)[0], inputs, x)
        return o.reshape(*x.shape[:2], -1)

    graph, state = nnx.split(part)
    return np.asarray(quick_jit(run)(state, x), np.float64)


def rms(h, scale):
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale, np.float64)


def falcon_h1(arrays: falcon.Arrays) -> np.ndarray:
    """Its fixed multipliers of keys and of Mamba's projections are factors of the weights here."""
    w = lambda name: arrays[f"weights/{name}"]
    names, ends = ("z", "x", "B", "C", "dt"), np.cumsum([32, 32, 12, 12])
    weights = {f"parts.0.{n}.kernel": w(f"self_attn.{n}_proj.weight").T for n in "qkvo"}
    weights["parts.0.k.kernel"] = weights["parts.0.k.kernel"] * falcon.KEY_MULTIPLIER
    for n, kernel, factor in zip(names, np.split(w("mamba.in_proj.weight"), ends), falcon.SSM_MULTIPLIERS, strict=True):
        weights[f"parts.1.{n}.kernel"] = kernel.T * np.float32(factor)
    for name, axis, values in (("weight", 1, w("mamba.conv1d.weight")[:, 0].T), ("bias", 0, w("mamba.conv1d.bias"))):
        for n, part in zip(("x", "B", "C"), np.split(values, [32, 44], axis=axis), strict=True):
            weights[f"parts.1.{n}_conv.{name}"] = part
    weights |= {f"parts.1.{name}": w(f"mamba.{name}") for name in ("A_log", "dt_bias", "D")}
    weights |= {"parts.1.norm.scale": w("mamba.norm.weight"), "parts.1.o.kernel": w("mamba.out_proj.weight").T}
    config = ParallelConfig(
        parts=(
            SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=8),
            Mamba2Config(head_dim=8, state_dim=6, num_groups=2),
        ),
        join="sum",
        norm=None,
        in_multipliers=falcon.IN_MULTIPLIERS,
        out_multipliers=falcon.OUT_MULTIPLIERS,
    )
    return layer(config, weights, arrays["x"])


@pytest.mark.proves("parallel")
def test_falcon_h1_golden():
    with np.load(GOLDEN / "falcon_h1.npz") as golden:
        arrays = dict(golden)
    assert_close(falcon_h1(arrays), arrays["output"])


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="needs the oracle packages torch and transformers",
)
def test_falcon_h1_live():
    arrays = falcon.falcon_h1(seed=7)
    assert_close(falcon_h1(arrays), arrays["output"])


@pytest.mark.proves("parallel")
def test_hymba_by_hand():
    """`y = W_o (beta_1 norm(heads_1) + beta_2 norm(heads_2)) / 2` (2411.13676, equation 3)."""
    module = build(ParallelConfig(parts=(two_heads, gla), norm="heads", shared_output=True))
    normed = [rms(heads(part.inner, x()), part.norm.scale[...]) for part in module.parts]
    assert_close(run(module, x()), sum(normed) / 2 @ np.asarray(module.o.kernel[...], np.float64), dtype="float32")


@pytest.mark.proves("parallel")
def test_hydrahead_by_hand():
    """`y = W_o (norm(heads_1), norm(heads_2))`, W_o being the parts' projections one below the other."""
    module = build(ParallelConfig(parts=(two_heads, gla), join="sum", norm="heads"))
    normed = np.concatenate([rms(heads(part.inner, x()), part.norm.scale[...]) for part in module.parts], axis=-1)
    projection = np.concatenate([np.asarray(part.inner.o.kernel[...], np.float64) for part in module.parts])
    assert_close(run(module, x()), normed @ projection, dtype="float32")


@pytest.mark.proves("parallel")
def test_split_heads_of_one_kind_are_the_layer_that_was_split():
    split = build(ParallelConfig(parts=(two_heads, two_heads), join="sum", norm=None))
    whole = SoftmaxConfig(num_heads=4, head_dim=8).build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH))
    for name, axis in (("q", 1), ("k", 1), ("v", 1), ("o", 0)):
        kernels = [getattr(part, name).kernel[...] for part in split.parts]
        getattr(whole, name).kernel[...] = jnp.concatenate(kernels, axis=axis)
    assert_close(run(split, x()), run(whole, x()))


def test_a_shared_projection_is_the_only_one():
    apart, shared = (
        ParallelConfig(parts=(two_heads, MoHConfig(mixer=gla)), norm="heads", shared_output=s).num_params(WIDTH)
        for s in (False, True)
    )
    assert apart - shared == WIDTH * WIDTH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": (two_heads,)}, "parts has 1 mixers; it must have at least 2"),
        ({"in_multipliers": (1.0,)}, "in_multipliers has 1 numbers for 2 parts"),
        ({"shared_output": True}, "use norm='heads'"),
    ],
)
def test_what_is_no_layer_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**options)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ((two_heads, GLAConfig(num_heads=2, expand_v=2.0)), {"shared_output": True}, r"equally wide together, not \[16, 32\]"),
        ((two_heads, ParallelConfig(parts=(gla, gla))), {}, "parts.1=parallel has no heads"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(parts, options, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(parts=parts, norm="heads", **options).fit(WIDTH)
