"""Our ops against implementations by others: committed golden numbers, and live where torch and fla-core are installed."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait import kernels
from plait.kernels import Mask
from plait.tests.kernels.cases import RECURRENCES, quick_jit
from plait.tests.kernels.golden import generate
from plait.tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden"


def _call(name: str, implementation: str, arguments: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    if name in RECURRENCES:
        arguments = dict(arguments)
        initial_state = arguments.pop("initial_state")
        return RECURRENCES[name].call(arguments, initial_state=initial_state, chunk_size=16, implementation=implementation)
    if name == "attention":
        return (kernels.attention(**arguments, mask=Mask(), implementation=implementation),)
    if name == "short_conv":
        return (kernels.short_conv(**arguments, implementation=implementation)[0],)
    return (kernels.cross_entropy(**arguments, chunk_size=8, implementation=implementation)[0],)


def _compare(name: str, implementation: str, arguments: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    fixed = {key: jnp.asarray(x) for key, x in arguments.items() if not np.issubdtype(x.dtype, np.floating)}
    varied = {key: jnp.asarray(x) for key, x in arguments.items() if key not in fixed}

    @quick_jit
    def run(varied):
        outputs, pullback = jax.vjp(lambda varied: _call(name, implementation, varied | fixed), varied)
        return outputs, pullback(tuple(jnp.asarray(generate.wave(x.shape)) for x in outputs))[0]

    outputs, gradients = run(varied)
    for i, output in enumerate(outputs):
        assert_close(output, expected[f"out{i}"], err_msg=f"output {i}")
    for key, gradient in gradients.items():
        assert_close(gradient, expected[f"d_{key}"], err_msg=f"gradient of {key}")


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", generate.ORACLES)
def test_golden(name: str, implementation: str):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        arrays = dict(golden)
    arguments = {key: arrays.pop(key) for key in generate.inputs(name)}
    _compare(name, implementation, arguments, arrays)


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("fla") is None,
    reason="needs the oracle packages torch and fla-core",
)
@pytest.mark.parametrize("name", generate.ORACLES)
def test_live(name: str):
    arguments = generate.inputs(name, seed=1, length=70)
    _compare(name, "chunked", arguments, generate.run(name, arguments))
