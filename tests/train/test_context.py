"""A step with the tokens of each row cut over devices: the statistics of one device, and no more sent than is said."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from plait.configs.mesh import MeshConfig
from plait.configs.probe import ProbeConfig
from plait.kernels import Tokens
from plait.kernels.context import Exchange
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.tests.kernels import cases
from plait.tests.kernels.test_context import compiled_text, mesh_of
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close, assert_statistics_close
from plait.tests.train.common import changed, hybrid, program_of, random_batch
from plait.train.mesh import batch_sharding
from plait.train.pods.plan.compiled.hlo import Instruction, instructions
from plait.train.probes.base import Probes
from plait.train.program import Program
from plait.train.step import make_step

LENGTH = 64
PATTERN = "gated_deltanet,moh+softmax,softmax/local,gla"


def plaited(context: int, length: int = LENGTH, exchange: Exchange = "gather"):
    """Delta rule, Mixture-of-Head, window and vector decay, one layer each, on rows of `length` tokens cut `context` times."""
    mixers = {
        **{name: config for name, config in hybrid().model.mixers.items() if name in PATTERN},
        "softmax/local": SoftmaxConfig(num_heads=2, head_dim=8, window_size=8),
        "gla": GLAConfig(num_heads=2),
    }
    model = dataclasses.replace(hybrid().model, pattern=PATTERN, num_layers=4, mixers=mixers)
    config = dataclasses.replace(hybrid(), model=model)
    return changed(config, {"mesh": MeshConfig(data=1, context=context, context_exchange=exchange), "data.seq_len": length})


def probed_step(context: int, exchange: Exchange = "gather"):
    """Metrics of a step with statistics."""
    setup = program_of(plaited(context, exchange=exchange), devices=context)
    step = quick_jit(
        make_step(setup.blueprint, setup.tx, setup.mesh, Probes(ProbeConfig(rows=8))), out_shardings=(setup.shardings, None)
    )
    rows = batch_sharding(setup.mesh, 4, LENGTH, 1)
    return step(setup.fresh(), jax.device_put(random_batch(4, LENGTH), rows))


@pytest.fixture(scope="module")
def alone(compile_cache):
    return probed_step(1)


SLOW = pytest.mark.slow
CUTS = [
    pytest.param(2, "gather", marks=SLOW),
    (2, "all_to_all"),
    (4, "gather"),
    (4, "ring"),
    pytest.param(8, "gather", marks=SLOW),
]


@pytest.mark.parametrize(("context", "exchange"), CUTS)
def test_metrics_and_every_statistic_are_those_of_one_device(context, exchange, alone):
    (state, metrics), (reference, wanted) = probed_step(context, exchange), alone
    for name in ("loss/train", "loss/balance/moh", "grad/norm"):
        assert_close(metrics[name], wanted[name], err_msg=name)
    compared = 0
    for layer, (got, want) in enumerate(zip(metrics["statistics"], wanted["statistics"], strict=True)):
        assert got.keys() == want.keys()
        for name in want:
            compared += 1
            assert_statistics_close(got[name], want[name], err_msg=f"layer {layer} {name}")
    assert compared > 40
    for name, param in state.params.items():
        assert_close(param, reference.params[name], err_msg=name)


def sent(
    length: int, observer: Probes | None = None, context: int = 4, exchange: Exchange = "gather"
) -> dict[str, list[Instruction]]:
    """What the compiled step sends along `context`, by the op that sends it."""
    config = plaited(context, length, exchange)
    config = dataclasses.replace(config, model=config.model.with_vocab(64))
    mesh = program_of(config, devices=context).mesh
    found: dict[str, list[Instruction]] = {}
    for one in instructions(Program.of(config, mesh).lower(observer).compile().as_text(), mesh):
        assert one.axes == ("context",)
        scope = re.search(r"(?:context|attention)_(\w+)", one.op)
        found.setdefault(scope[1] if scope else "others", []).append(one)
    return found


@pytest.fixture(scope="module")
def short(compile_cache):
    return sent(512)


def test_a_linear_layer_gathers_its_states_once(short):
    """Forward one all-gather of states, backward one reduce-scatter of their gradients."""
    for op in ("delta_rule", "decay"):
        kinds = sorted(one.kind for one in short[op])
        assert kinds == ["all-gather", "reduce-scatter"], op
    d, k, v = 2, 4, 8  # heads, key and value dims of the delta rule layer
    gather = next(one for one in short["delta_rule"] if one.kind == "all-gather")
    assert gather.bytes == 4 * 4 * d * (k * v + k * k + 4) * 4  # parts, rows, heads, B, A and the halves of two ids, float32


def test_a_window_and_a_convolution_fetch_neighbours_only(short):
    for op in ("attention", "short_conv"):
        of_tokens = {one.kind for one in short[op] if one.kind != "all-reduce"}  # those are of the filters' gradients
        assert of_tokens == {"collective-permute"}, op


def test_what_linear_layers_and_windows_send_does_not_depend_on_the_length(short):
    long = sent(2048)
    for op in ("delta_rule", "decay", "attention", "short_conv", "others"):
        assert sorted((one.kind, one.bytes) for one in short[op]) == sorted((one.kind, one.bytes) for one in long[op]), op
    total = lambda found: sum(one.bytes for one in found["routed_attention"])
    assert total(long) == 4 * total(short)  # keys and values of all tokens


@pytest.mark.slow
def test_heads_are_dealt_out_and_no_keys_gathered():
    found = sent(512, context=2, exchange="all_to_all")["routed_attention"]
    assert {one.kind for one in found if one.bytes > 512 * 16} == {"all-to-all"}


@pytest.mark.slow
def test_statistics_send_little(short):
    """A probing step sends no token's activations for linear layers; attention's weights need the keys of the looked-at rows (`masses`)."""
    probed = sent(512, Probes(ProbeConfig()))
    largest = max(one.bytes for op in ("implied", "delta_rule", "decay", "others") for one in probed[op])
    assert largest < 4 * 512 * 16 * 4 / 4, "a quarter of one residual stream"


def test_linear_layers_from_32k_to_512k_tokens():
    """The bytes of one delta rule layer, forward and backward."""
    found = []
    for length in (2**15, 2**19):
        shapes = {
            "q": (1, length, 2, 8),
            "k": (1, length, 2, 8),
            "v": (1, length, 2, 8),
            "g": (1, length, 2),
            "beta": (1, length, 2),
        }
        inputs = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
        ids = jax.ShapeDtypeStruct((1, length), np.int32)

        def gradient(inputs, ids=ids):
            named = {name: x for name, x in inputs.items() if name != "ids"}
            return jax.grad(lambda x: cases.RECURRENCES["gated_deltanet"].call(x, at=Tokens(segment_ids=inputs["ids"]))[0].sum())(
                named
            )

        text = compiled_text(gradient, inputs | {"ids": ids}, 8)
        found.append([(one.kind, one.bytes) for one in instructions(text, mesh_of(context=8))])
    assert found[0] == found[1]
    assert sorted(kind for kind, _ in found[0]) == ["all-gather", "reduce-scatter"]
