"""Muon against its equations in NumPy, against optax, and against PyTorch's; roles and splits that do not fit."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import Parameter, optimizer
from plait.models import axes
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.optimizers.golden import generate
from plait.train.mesh import make_mesh, sharding, spread
from plait.train.optimizers import make_optimizer
from plait.train.pods.plan.compiled.hlo import collectives

STEPS, RATE, ADAM_RATE, DECAY = 3, 0.02, 0.005, 0.1
OPTIONS = {
    "learning_rate": RATE,
    "adam_learning_rate": ADAM_RATE,
    "weight_decay": DECAY,
    "schedule": "constant",
    "warmup_steps": 0,
}
PARAMETERS = {
    p.name: p
    for p in (
        Parameter("plain", (16, 24), (axes.EMBED, axes.MLP), "matrix"),
        Parameter("tall", (32, 8), (axes.MLP, axes.EMBED), "matrix"),
        Parameter("stack", (3, 16, 24), (axes.LAYERS, axes.EMBED, axes.MLP), "matrix"),
        Parameter("heads", (2, 16, 24), (axes.LAYERS, axes.EMBED, axes.HEADS), "matrix", (-1, (6,) * 4)),
        Parameter("output", (24, 16), (axes.HEADS, axes.EMBED), "matrix", (-2, (6,) * 4)),
        Parameter("fused", (2, 16, 24), (axes.LAYERS, axes.EMBED, axes.HEADS), "matrix", (-1, (10, 4, 4, 6))),
        Parameter("experts", (4, 16, 24), (axes.EXPERTS, axes.EMBED, axes.MLP), "matrix"),
        Parameter("layers of experts", (2, 4, 8, 16), (axes.LAYERS, axes.EXPERTS, axes.MLP, axes.EMBED), "matrix"),
        *(Parameter(role, (16, 8), (axes.EMBED, None), role) for role in ("embedding", "head", "gate", "router")),
        *(Parameter(role, (2, 16), (None, axes.EMBED), role) for role in ("conv", "decay", "vector")),
    )
}
ZERO = "data 2 x fsdp 2 x tensor 2, ZeRO"  # divides one axis over two of the mesh
MESHES = {
    "one device": MeshConfig(data=1),
    "fsdp 4": MeshConfig(data=1, fsdp=4),
    "tensor 2": MeshConfig(data=1, tensor=2),
    "fsdp 4 x tensor 2": MeshConfig(data=1, fsdp=4, tensor=2),
    ZERO: MeshConfig(data=2, fsdp=2, tensor=2, zero=True),
    "data 2 x context 2 x tensor 2": MeshConfig(data=2, context=2, tensor=2),
    "expert 2 x fsdp 2 x tensor 2": MeshConfig(data=1, expert=2, fsdp=2, tensor=2),
}
APART = "heads apart, original scale"
VARIANTS = {
    "defaults": {},
    APART: {"per_head": True, "adjust": "original", "nesterov": False, "momentum": 0.8, "ns_steps": 3},
}


def some(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=p.shape).astype(np.float32) for name, p in PARAMETERS.items()}


def on_mesh(config: MeshConfig) -> dict[str, Parameter]:
    """The parameters as they lie on a mesh."""
    mesh = make_mesh(config, jax.devices()[: 1 if config == MESHES["one device"] else None])
    found = {}
    for name, p in PARAMETERS.items():
        layout = sharding(mesh, p.axes, p.shape, name)
        found[name] = dataclasses.replace(p, layout=spread(layout, p.axes, p.shape) if config.zero else layout)
    return found


def several_steps(config, parameters) -> dict[str, jax.Array]:
    """The parameters after `STEPS` updates."""
    tx = make_optimizer(dataclasses.replace(config, clip_norm=None), STEPS, parameters)
    place = {name: p.layout for name, p in parameters.items()}
    params = jax.device_put(some(0), place)
    state = tx.init(params)

    @quick_jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(1, STEPS + 1):
        params, state = step(params, state, jax.device_put(some(seed), place))
    return params


def newton_schulz(x: np.ndarray, steps: int) -> np.ndarray:
    """One matrix, as in Jordan's post."""
    x = x / np.linalg.norm(x)
    if flip := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = x.dtype.type(3.4445) * x + (x.dtype.type(-4.7750) * square + x.dtype.type(2.0315) * square @ square) @ x
    return x.T if flip else x


def orthogonal(x: np.ndarray, config, split) -> np.ndarray:
    """One matrix, or its parts each by itself, scaled."""
    if split is not None and config.per_head:
        axis, sizes = split
        parts = np.split(x, np.cumsum(sizes)[:-1], axis)
        return np.concatenate([orthogonal(part, config, None) for part in parts], axis)
    n, m = x.shape
    scale = 0.2 * max(n, m) ** 0.5 if config.adjust == "match_rms_adamw" else max(1, m / n) ** 0.5
    return x.dtype.type(scale) * newton_schulz(x, config.ns_steps)


def by_hand(config, dtype) -> dict[str, np.ndarray]:
    """The matrices after `STEPS` updates."""
    found = {}
    for name, parameter in PARAMETERS.items():
        if parameter.role != "matrix":
            continue
        w = some(0)[name].astype(dtype)
        momentum = np.zeros_like(w)
        for seed in range(1, STEPS + 1):
            g = some(seed)[name].astype(dtype)
            momentum = dtype(config.momentum) * momentum + g
            look = g + dtype(config.momentum) * momentum if config.nesterov else momentum
            update = np.empty_like(w)
            for index in itertools.product(*map(range, w.shape[:-2])):
                update[index] = orthogonal(look[index], config, parameter.split)
            w = w - dtype(config.learning_rate) * (update + dtype(config.weight_decay) * w)
        found[name] = w
    return found


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [*(("defaults", mesh) for mesh in MESHES), *((APART, mesh) for mesh in ("one device", "fsdp 4 x tensor 2", ZERO))],
)
def test_steps_are_those_worked_by_hand_in_float64(variant, mesh):
    config = optimizer("muon", **OPTIONS, **VARIANTS[variant])
    found = several_steps(config, on_mesh(MESHES[mesh]))
    exact, plain, start = by_hand(config, np.float64), by_hand(config, np.float32), some(0)
    for name, want in exact.items():
        assert_close(found[name] - start[name], want - start[name], plain=plain[name] - start[name], err_msg=name)


@pytest.mark.parametrize("mesh", ["one device", "fsdp 4 x tensor 2"])
def test_what_is_no_matrix_by_role_is_moved_by_adamw(mesh):
    config = optimizer("muon", **OPTIONS)
    found = several_steps(config, on_mesh(MESHES[mesh]))
    adamw = optimizer("adamw", learning_rate=ADAM_RATE, weight_decay=DECAY, schedule="constant", warmup_steps=0)
    expected = several_steps(adamw, on_mesh(MESHES["one device"]))
    others = [name for name, p in PARAMETERS.items() if p.role != "matrix"]
    assert len(others) == 7
    for name in others:
        assert_close(found[name], expected[name], err_msg=name)


def test_plain_momentum_is_that_of_optax():
    """optax corrects the bias of its average, which Newton-Schulz takes out again, but for Nesterov's momentum."""
    config = optimizer("muon", **{**OPTIONS, "adam_learning_rate": None}, nesterov=False, adjust="original", clip_norm=None)
    only = {name: PARAMETERS[name] for name in ("plain", "tall")}
    ours = make_optimizer(config, STEPS, only)
    theirs = optax.contrib.muon(RATE, beta=0.95, nesterov=False, weight_decay=DECAY)
    params = {name: some(0)[name] for name in only}
    states = [ours.init(params), theirs.init(params)]
    for seed in range(1, STEPS + 1):
        grads = {name: some(seed)[name] for name in only}
        (found, states[0]), (expected, states[1]) = (
            tx.update(grads, state, params) for tx, state in zip((ours, theirs), states, strict=True)
        )
        for name in only:
            assert_close(found[name], expected[name], err_msg=name)


GOLDEN = Path(generate.__file__).with_name("muon.npz")
LIVE = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra oracle")


@pytest.mark.parametrize("source", ["committed", pytest.param("live", marks=LIVE)])
@pytest.mark.parametrize("case", generate.CASES)
def test_steps_are_those_of_pytorch(case, source):
    arrays = dict(np.load(GOLDEN)) if source == "committed" else generate.arrays()
    options = dict(generate.CASES[case])
    config = optimizer("muon", adjust=options.pop("adjust_lr_fn"), learning_rate=options.pop("lr"), **options,
                       schedule="constant", warmup_steps=0, clip_norm=None)  # fmt: skip
    # PyTorch's matrices are [out, in].
    names = list(generate.SHAPES)
    parameters = {n: Parameter(n, generate.SHAPES[n][::-1], (axes.EMBED, axes.MLP), "matrix") for n in names}
    tx = make_optimizer(config, generate.STEPS, parameters)
    params = {n: arrays[f"{n}/start"].T for n in names}
    state = tx.init(params)
    for step in range(generate.STEPS):
        updates, state = tx.update({n: arrays[f"{n}/gradient{step}"].T for n in names}, state, params)
        params = optax.apply_updates(params, updates)
    for n in names:
        start = arrays[f"{n}/start"].T
        assert_close(params[n] - start, arrays[f"{case}/{n}/end"].T - start, err_msg=n)


def test_no_device_gathers_all_matrices_of_a_stack():
    """Each mesh axis that divides the matrices exchanges them by all-to-all, a share for each device; copies share the work."""
    layers, n, m = 16, 32, 64
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    names = (axes.LAYERS, axes.EMBED, axes.MLP)
    layout = sharding(mesh, names, (layers, n, m), "stack")
    parameters = {"stack": Parameter("stack", (layers, n, m), names, "matrix", layout=layout)}
    tx = make_optimizer(optimizer("muon", **OPTIONS, clip_norm=None), 1, parameters)
    array = {"stack": jax.ShapeDtypeStruct((layers, n, m), np.float32, sharding=layout)}
    state = jax.eval_shape(tx.init, array)
    compiled = jax.jit(tx.update, out_shardings=({"stack": layout}, None)).lower(array, state, array).compile()
    found = {(c.kind, c.axes): c.bytes for c in collectives(compiled.as_text(), mesh)}
    share = 4 * layers * n * m / 4  # of a device, which its copy along `data` has too
    assert found == {
        ("all-to-all", ("fsdp",)): 2 * share,
        ("all-to-all", ("tensor",)): 2 * share,
        ("all-gather", ("data",)): share,
    }


BAD = {
    "vector": (
        Parameter("a.scale", (16,), (None,), "matrix"),
        "parameter a.scale has role='matrix' and shape (16,); optimizer muon needs",
    ),
    "experts' vector": (
        Parameter("a.scale", (2, 4, 16), (axes.LAYERS, axes.EXPERTS, None), "matrix"),
        "role='matrix' and shape (16,); optimizer muon",
    ),
    "stacked vector": (
        Parameter("a.scale", (4, 16), (axes.LAYERS, None), "matrix"),
        "role='matrix' and shape (16,); optimizer muon",
    ),
    "sizes": (
        Parameter("a.kernel", (8, 16), (axes.EMBED, axes.HEADS), "matrix", (-1, (8, 4))),
        "parameter a.kernel has split=(-1, (8, 4)) and shape (8, 16); the axis must be -1 or -2 and the sizes positive and add up",
    ),
    "axis": (
        Parameter("a.kernel", (2, 8, 16), (axes.LAYERS, axes.EMBED, axes.HEADS), "matrix", (-3, (1, 1))),
        "has split=(-3, (1, 1))",
    ),
}


@pytest.mark.parametrize(("parameter", "message"), BAD.values(), ids=BAD)
def test_role_or_split_that_does_not_fit_is_refused(parameter, message):
    with pytest.raises(ValueError) as error:
        make_optimizer(optimizer("muon"), 1, {parameter.name: parameter})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", float("nan")),
        ("adam_learning_rate", 0.0),
        ("adam_learning_rate", float("inf")),
        ("momentum", 1.0),
        ("ns_steps", 0),
        ("adam_b1", 1.0),
        ("adam_b2", -0.1),
        ("adam_eps", 0.0),
    ],
)
def test_bad_value_is_refused_by_its_path(field, value):
    with pytest.raises(ValueError, match=f"optimizer.{field}={value} must be"):
        optimizer("muon", **{field: value})
