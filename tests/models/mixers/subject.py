"""Mixers under test: each with its compiled functions, which every test of the contract reads."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.mesh import MeshConfig
from plait.configs.probe import ProbeConfig
from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.mixers.base import MIXERS, HeadMixer, Mixer, MixerConfig, WrapperConfig
from plait.models.mixers.moh import MoHConfig
from plait.tests.models.common import layout, left_padded, quick_jit
from plait.tests.models.mixers import cases
from plait.train import mesh as meshes
from plait.train.probes.base import Probes

WIDTH, LENGTH = 64, 72  # two chunks of the linear layers, the second one partly filled
PROMPTS, STEPS = (48, 13), 24  # prompt lengths, padded left to the longest, and tokens decoded after them
SEGMENTS = (20, 33, 12)  # documents of the packed row; the rest of it is padding
MESH = MeshConfig(data=1, fsdp=2, context=2, tensor=2)
PROBES = Probes(ProbeConfig(rows=64, sequences=4, first_k=3))  # all but a few rows
FAMILIES = ("softmax", "gla", "gated_deltanet")
"""A mixer of each family base: wrapped, reparametrised and with its options in the default suite, as the others are in the slow one."""

layout = functools.partial(layout, length=LENGTH)
WHOLE, PACKED = (LENGTH,), SEGMENTS
REAL = np.arange(LENGTH) < sum(SEGMENTS)


@dataclasses.dataclass(frozen=True)
class Case:
    """One mixer under test."""

    config: MixerConfig
    sigma_reparam: str | None = None
    causal: bool = True

    def build(self, compute_dtype: str = "float32") -> Mixer:
        """The module, new."""
        ctx = BuildContext(
            layer_index=1,
            num_layers=4,
            rngs=nnx.Rngs(0),
            seq_len=LENGTH,
            causal=self.causal,
            compute_dtype=jnp.dtype(compute_dtype),
            sigma_reparam=self.sigma_reparam,
        )
        return self.config.build(WIDTH, ctx)

    @functools.cache  # noqa: B019
    def graph(self, compute_dtype: str) -> nnx.GraphDef:
        """The module without its variables."""
        return nnx.split(nnx.eval_shape(lambda: self.build(compute_dtype)))[0]

    def variables(self) -> nnx.State:
        """Its variables, moved off their initial values so that zeros, ones and symmetries hide nothing."""
        variables = quick_jit(lambda: nnx.split(self.build())[1])()
        params, rest = nnx.split_state(jax.tree.map(np.asarray, variables), nnx.Param, ...)
        rng = np.random.default_rng(1)
        move = lambda a: jnp.asarray(a + (0.1 * np.std(a) + 0.02) * rng.normal(size=a.shape), jnp.float32)
        return nnx.merge_state(jax.tree.map(move, params), rest)


EXAMPLES = {name: config.example() for name, config in MIXERS.all().items() if "causal" in config.example().directions}
OPTIONS: dict[str, MixerConfig] = {
    name: config
    for module in pkgutil.iter_modules(cases.__path__, f"{cases.__name__}.")
    for name, config in importlib.import_module(module.name).CASES.items()
    if "causal" in config.directions
}


def _around() -> Iterator[tuple[str, Case, bool]]:
    """Each example under sigmaReparam and in a mixture of heads: name, case, and whether it is of a family base."""
    for name, config in EXAMPLES.items():
        for kind in ("spectral", "one"):
            yield f"{name}-{kind}", Case(config, kind), name in FAMILIES
        if not isinstance(config, WrapperConfig):
            yield f"moh+{name}", Case(MoHConfig(mixer=config)), name in FAMILIES


def _param(name: str, case: Case, usual: bool) -> Any:
    return pytest.param(case, id=name, marks=[] if usual else [pytest.mark.slow])


def case_params(*, thorough: bool = True) -> list[Any]:
    """The cases, slow ones marked: every example, its options and what goes around it, of bases of families only where not `thorough`."""
    family = lambda name: name.partition("-")[0] in FAMILIES
    return [
        *(_param(name, Case(config), thorough or family(name)) for name, config in EXAMPLES.items()),
        *(_param(name, Case(config), thorough and family(name)) for name, config in OPTIONS.items()),
        *(_param(name, case, of_family) for name, case, of_family in _around()),
    ]


class Program:
    """The compiled functions of a module's graph; cases that differ in values only share them."""

    def __init__(self, graph: nnx.GraphDef):
        self.graph = graph
        self.train, self.decode, self.look = quick_jit(self._train), quick_jit(self._decode), quick_jit(self._look)
        self.sharded = quick_jit(self._sharded)

    def mixer(self, variables: nnx.State) -> Mixer:
        return nnx.merge(self.graph, variables)

    def _train(self, variables, x, at, cotangent):
        """`y`, and the gradients of `y . cotangent` in the parameters and in `x`."""
        params, rest = nnx.split_state(variables, nnx.Param, ...)
        y, pull = jax.vjp(lambda params, x: self.mixer(nnx.merge_state(params, rest))(x, at=at, carry={}).y, params, x)
        return y, *pull(cotangent)

    def _decode(self, variables, prompts, at, x, positions):
        """`y` of prompts, and of steps after them and, in the rows that follow, after nothing; the states in between and at the end."""
        mixer = self.mixer(variables)
        y, _, prefilled = mixer.prefill(prompts, mixer.init_state(len(prompts), LENGTH), at=at, carry={})
        empty = mixer.init_state(len(x) - len(prompts), LENGTH)
        start = jax.tree.map(lambda *a: jnp.concatenate(a), prefilled, empty)

        def body(state, token):
            y, _, state = mixer.step(token[0][:, None], state, at=Tokens(positions=token[1][:, None]), carry={})
            return state, y[:, 0]

        last, stepped = jax.lax.scan(body, start, (x.swapaxes(0, 1), positions.swapaxes(0, 1)))
        return y, stepped.swapaxes(0, 1), start, last

    def _look(self, variables, x, at):
        """`y` and statistics of a probe step; implied attention of the rows looked at, values, head outputs where heads weigh values."""
        mixer = self.mixer(variables)
        mixed = mixer(x, at=at, carry={}, observer=PROBES)
        residual = mixed.y[PROBES.pick_sequences(len(x))]  # stands for the block's
        looks, heads = tuple(dataclasses.replace(look, residual=residual) for look in mixed.looks), None
        if isinstance(mixer, HeadMixer):
            inputs = looks[0].inputs
            mixes_whole = type(mixer).mix is HeadMixer.mix
            o = looks[0].o if mixes_whole else mixer.attend(inputs, at=at, state=None)[0]
            heads = looks[0].implied, inputs.v, o
        return mixed.y, PROBES.measure(looks), heads

    def _sharded(self, *args):
        with meshes.on_mesh(meshes.make_mesh(MESH)):
            return self._train(*args)


program = functools.lru_cache(maxsize=4)(Program)

BEFORE = (0, 20, 63, 64, LENGTH - 1)
"""Tokens whose outputs are differentiated in a row of one document."""
BORDERS = (0, 19, 20, 52, 53, 64)
"""First and last tokens of the packed row's documents."""


class Rows:
    """One batch whose rows are the cases of the training contract: one compiled function runs it once.

    A row is an input, its documents, and the cotangent of its output.
    """

    def __init__(self) -> None:
        first, second = jax.random.normal(jax.random.key(2), (2, LENGTH, WIDTH))
        at_token = lambda t: np.eye(LENGTH)[t]
        starts = np.cumsum((0, *SEGMENTS[:-1]))
        alone = [np.roll(second, -start, axis=0) * (np.arange(LENGTH) < n)[:, None] for start, n in zip(starts, SEGMENTS)]
        self.first, self.second = first, second
        rows: dict[str, list[tuple]] = {
            "whole": [(first, WHOLE, at_token(t)) for t in BEFORE],
            "packed": [(second, PACKED, at_token(t)) for t in BORDERS],
            "alone": [(x, (n,), np.zeros(LENGTH)) for x, n in zip(alone, SEGMENTS)],
            "changed": [(np.where(REAL[:, None], second, 50.0), PACKED, REAL)],
            "padding": [(second, (), np.ones(LENGTH))],
            "short": [(second, (PROMPTS[1] + STEPS,), np.ones(LENGTH))],
            "again": [(first, WHOLE, np.ones(LENGTH))],
        }
        self.names = [name for name, found in rows.items() for _ in found]
        xs, documents, cotangents = zip(*[row for found in rows.values() for row in found])
        self.x, self.at = jnp.stack(xs).astype(jnp.float32), layout(*documents)
        self.cotangent = jnp.broadcast_to(jnp.stack(cotangents)[..., None], self.x.shape).astype(jnp.float32)

    def of(self, name: str, array: jax.Array) -> np.ndarray:
        """The rows of `array` that belong to a name."""
        return np.asarray(array)[[i for i, one in enumerate(self.names) if one == name]]


ROWS = Rows()


class Subject:
    """A case, its variables, and what its compiled functions gave."""

    def __init__(self, case: Case):
        self.case, self.config = case, case.config
        self.program = program(case.graph("float32"))

    @functools.cached_property
    def variables(self) -> nnx.State:
        return self.case.variables()

    @functools.cached_property
    def mixer(self) -> Mixer:
        return self.program.mixer(self.variables)

    @functools.cached_property
    def trained(self) -> tuple[np.ndarray, nnx.State, np.ndarray]:
        """`y`, and the gradients in the parameters and in `x`, of `ROWS`."""
        y, params, x = self.program.train(self.variables, ROWS.x, ROWS.at, ROWS.cotangent)
        return np.asarray(y), params, np.asarray(x)

    def y(self, name: str) -> np.ndarray:
        """Outputs of the rows of a name."""
        return ROWS.of(name, self.trained[0])

    def reached(self, name: str) -> np.ndarray:
        """Which tokens `[rows, T]` of the rows of a name the differentiated outputs depend on."""
        return (ROWS.of(name, self.trained[2]) != 0).any(-1)

    @functools.cached_property
    def decoded(self) -> tuple:
        """See `Program._decode`: two left-padded prompts and what follows them, and the first row from its first token on."""
        at, index = left_padded(*PROMPTS)
        rows = jnp.stack([ROWS.first, ROWS.second])
        prompts = jnp.take_along_axis(rows, index[..., None], axis=1)
        positions = np.asarray([*PROMPTS, 0])[:, None] + np.arange(LENGTH)[None]
        x = jnp.take_along_axis(jnp.stack([*rows, ROWS.first]), np.minimum(positions, LENGTH - 1)[..., None], axis=1)
        return jax.tree.map(np.asarray, self.program.decode(self.variables, prompts, at, x, jnp.asarray(positions, jnp.int32)))

    @functools.cached_property
    def looked(self) -> tuple:
        """See `Program._look`: the packed row, and one of padding."""
        return self.look(ROWS.second, SEGMENTS, ())

    def look(self, x: jax.Array, *documents: tuple[int, ...]) -> tuple:
        """A probe step of rows of equal input."""
        x = jnp.broadcast_to(x, (len(documents), *x.shape))
        return jax.tree.map(np.asarray, self.program.look(self.variables, x, layout(*documents)))

    @functools.cache  # noqa: B019
    def abstract(self, dtype: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, tuple]:
        """Shapes in a compute dtype: of the output, of a step's, and of the decode state when empty, after a prompt and after a step.

        Those of float32 are of what was run: rows of the prefilled and the empty state are one array, which the steps go on with.
        """
        if dtype == "float32":
            _, stepped, start, last = self.decoded
            shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
            return jax.tree.map(shape, (self.trained[0][:, :5], stepped[:, :1], (start, start, last)))

        def shapes(variables, x):
            mixer = nnx.merge(self.case.graph(dtype), variables)
            at = Tokens(None, *(a[:3, :5] for a in (ROWS.at.segment_ids, ROWS.at.positions)))
            empty = mixer.init_state(3, LENGTH)
            _, _, filled = mixer.prefill(x, empty, at=at, carry={})
            one = Tokens(positions=jnp.full((3, 1), 5))
            y, _, stepped = mixer.step(x[:, :1], filled, at=one, carry={})
            return mixer(x, at=at, carry={}).y, y, (empty, filled, stepped)

        return jax.eval_shape(shapes, self.variables, jax.ShapeDtypeStruct((3, 5, WIDTH), dtype))
