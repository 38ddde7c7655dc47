"""Heads that are left out: the same as a model whose projection has zeros for them, in stacked layers, parts and mixtures."""

import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Tokens
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.base_conv import BaseConvConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.convert.reshapes import LENGTH, make_run, model_of
from plait.train.inspection.heads import InspectError, Masking, check_maskable, drawn, maskable, named_heads
from plait.train.inspection.looking import looking
from plait.train.probes.pictures import Pictures
from plait.train.run import opened

IDS = np.random.default_rng(0).integers(0, 257, (2, LENGTH)).astype(np.int32)
SOFTMAX = SoftmaxConfig(num_heads=6, head_dim=4)
GLA = GLAConfig(num_heads=2, expand_k=0.6, expand_v=0.6)


def hidden(trained, *heads):
    """What the head of the model reads without some heads."""
    found, _ = looking(trained, Pictures(), lambda model, hidden: hidden)(
        Tokens(jnp.asarray(IDS)), Masking("", heads).kept(trained.program.config.model)
    )
    return np.asarray(found)


def plain(trained, params):
    build = trained.program.blueprint.build
    run = quick_jit(lambda params, buffers: build(params, buffers).hidden(Tokens(jnp.asarray(IDS)))[0])
    return np.asarray(run(params, trained.buffers))


def test_a_head_left_out_is_one_whose_rows_of_the_projection_are_zero(tmp_path):
    trained = opened(make_run(tmp_path / "run", model_of()))
    (path,) = (path for path in trained.params if path.endswith("mixer.o.kernel"))
    kernel = np.array(trained.params[path])  # [L, H * V, D]
    kernel[1, 8:12] = 0
    kernel[2, 20:24] = 0
    masked = hidden(trained, (1, 2), (2, 5))
    assert_close(masked, plain(trained, {**trained.params, path: jnp.asarray(kernel)}))
    assert np.abs(masked - plain(trained, trained.params)).max() > 0.01
    assert_close(hidden(trained), plain(trained, trained.params))


def test_heads_of_parallel_parts_are_counted_one_part_after_another(tmp_path):
    mixers = {"parallel": ParallelConfig(parts=(SOFTMAX, GLA))}
    trained = opened(make_run(tmp_path / "run", model_of(pattern="parallel", mixers=mixers, num_layers=1)))
    assert maskable(trained.program.config.model) == [(0, head) for head in range(8)]
    paths = sorted(path for path in trained.params if path.endswith("o.kernel"))
    assert len(paths) == 2
    kernels = [np.array(trained.params[path]) for path in paths]
    kernels[0][..., 4:8, :] = 0
    width = kernels[1].shape[-2] // 2
    kernels[1][..., :width, :] = 0
    changed = {path: jnp.asarray(kernel) for path, kernel in zip(paths, kernels, strict=True)}
    assert_close(hidden(trained, (0, 1), (0, 6)), plain(trained, {**trained.params, **changed}))


def test_what_has_no_heads_of_its_own_is_refused():
    model = model_of(pattern="base_conv,softmax", mixers={"base_conv": BaseConvConfig(), "softmax": SOFTMAX}, num_layers=2)
    assert maskable(model) == [(1, head) for head in range(6)]
    with pytest.raises(
        InspectError, match=r"mask_heads='0.0': layer 0 \(base_conv\) has no heads before .*; use heads of layers 1"
    ):
        check_maskable("mask_heads", "0.0", [(0, 0)], model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3.0", "heads='3.0': 3.0 is in layer 3, and the layers are 0 to 2"),
        ("1.6", r"1.6 is head 6, and layer 1 \(softmax\) has the heads 0 to 5"),
        ("1", "'1' is no head; write LAYER.HEAD, both from 0"),
        ("1.-1", "'1.-1' is no head"),
        (" , ", "names no head"),
    ],
)
def test_heads_that_are_not_there(text, message):
    with pytest.raises(InspectError, match=message):
        named_heads("heads", text, model_of())


def test_heads_are_named_once_and_drawn_by_seed():
    assert named_heads("heads", "1.5, 0.0,1.5", model_of()) == ((1, 5), (0, 0))
    every = maskable(model_of())
    one, again, other = (drawn(np.random.default_rng(seed), every, 4) for seed in (0, 0, 1))
    assert one == again != other and len(set(one)) == 4 and set(one) <= set(every)
