"""Other meshes, recomputation and micro-batches for the same model, batch and devices: estimated all, compiled the best."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from plait.configs.experiment import ExperimentConfig
from plait.configs.vocabulary import with_vocabulary
from plait.models import axes
from plait.train.mesh import make_mesh, mesh_axes, names_of, ways
from plait.train.pods.plan.compiled.hlo import Collective, Kind
from plait.train.pods.plan.exchanges import layer_collectives
from plait.train.pods.plan.flops import step_flops
from plait.train.pods.plan.memory import Memory, StateBytes, estimated_memory, saved_activations, state_bytes, used_params
from plait.train.pods.plan.roofline import Times, exchange_seconds, times
from plait.train.pods.plan.step_plan import Fix, Plan, check_batch, compile_plan, prepare
from plait.train.pods.plan.topology import Target, TargetError, describe_devices
from plait.train.program import Program
from plait.train.state import Blueprint

_REMAT: tuple[Literal["full", "dots"] | None, ...] = (None, "dots", "full")  # from the most memory to the least
_WIDTHS = (1, 2, 4, 8)  # of the tensor, context and expert axes
_LONG = 16_384  # tokens of a row from which on splitting it is tried, though the rows are enough for all devices
_MOST_PARTS = 16  # micro-batches
_PASSES = 3.0  # how often a step reads or writes each value that its forward pass makes


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to lay out a step."""

    config: ExperimentConfig
    overrides: str
    """The command line's, beside the preset."""
    memory: Memory
    times: Times | None
    plan: Plan | None = None
    """Where it was compiled."""
    failure: str | None = None
    """Why it could not be compiled."""

    @property
    def score(self) -> float:
        """Seconds to rank by: half-way between everything and nothing overlapped."""
        return math.inf if self.times is None else (self.times.bound + self.times.serial) / 2


def search(config: ExperimentConfig, target: Target, compile_best: int = 2) -> tuple[list[Candidate], int]:
    """The candidates that fit, the fastest first, and how many there were.

    The best `compile_best` by estimate are compiled; their numbers are then the compiler's and their rank follows.

    Raises:
        ValueError: the target has no chip data, or no layout fits the model and batch at all.
    """
    if target.chip is None:
        raise TargetError(f"target={target.name!r} has no peak to rank by; --search is for TPUs and GPUs")
    config = with_vocabulary(config)
    devices = describe_devices(target)
    blueprint = Blueprint(config)
    every = list(_candidates(config, target, devices, blueprint))
    if not every:
        raise ValueError(
            f"no mesh over the {target.num_devices} devices of {target.name} divides data.batch_size={config.data.batch_size} and the "
            "model; change the batch"
        )
    ranked = sorted((c for c in every if c.memory.fits), key=lambda c: c.score)
    compiled = [_compile(c, target, devices) for c in ranked[:compile_best]]
    ranked = sorted(compiled, key=lambda c: (not c.memory.fits, c.score)) + ranked[compile_best:]
    return ranked, len(every)


def find_fixes(step: Program, target: Target, memory: Memory, most: int = 3) -> list[Fix]:
    """Changes of recomputation, micro-batches and mesh that fit by estimate, the fastest first; the estimate is scaled to `memory`."""
    if target.chip is None:
        return []
    generation = target.generation
    state = state_bytes(step.like, step.config, step.mesh)
    guess = estimated_memory(step.config, step.mesh, state, step.blueprint, generation, memory.limit)
    scale = memory.temporaries / guess.temporaries if memory.compiled and guess.temporaries else 1.0
    devices = list(step.mesh.devices.flat)
    found = [c for c in _candidates(step.config, target, devices, step.blueprint, scale=max(scale, 1.0)) if c.memory.fits]
    ranked = sorted(found, key=lambda c: (_distance(step.config, c.config), c.score))
    return [Fix(c.overrides, c.memory) for c in ranked[:most]]


def _distance(old: ExperimentConfig, new: ExperimentConfig) -> int:
    """How many settings differ."""
    pairs = [(getattr(old.mesh, f.name), getattr(new.mesh, f.name)) for f in dataclasses.fields(old.mesh) if f.name != "data"]
    pairs += [(old.model.remat, new.model.remat), (old.optimizer.accumulate, new.optimizer.accumulate)]
    return sum(a != b for a, b in pairs)


def _compile(candidate: Candidate, target: Target, devices: list[Any]) -> Candidate:
    start = time.monotonic()
    try:
        plan = compile_plan(prepare(candidate.config, target, devices), target, start)
    except (ValueError, NotImplementedError) as error:
        return dataclasses.replace(candidate, times=None, failure=str(error))
    return dataclasses.replace(candidate, plan=plan, memory=plan.memory, times=plan.times or candidate.times)


def _candidates(
    config: ExperimentConfig, target: Target, devices: list[Any], blueprint: Blueprint, scale: float = 1.0
) -> Iterator[Candidate]:
    """Every combination that the model, batch and devices allow."""
    assert target.chip is not None
    for sizes in _meshes(config, target, has_experts=any(axes.EXPERTS in blueprint.axes(name) for name in blueprint.params)):
        exchange = config.mesh.context_exchange if sizes["context"] != 1 else "gather"
        mesh_config = dataclasses.replace(config.mesh, **sizes, context_exchange=exchange)  # type: ignore[arg-type]
        step: Program | None = None
        for remat, parts in itertools.product(_REMAT, _parts(config)):
            new = dataclasses.replace(
                config,
                mesh=mesh_config,
                model=dataclasses.replace(config.model, remat=remat),
                optimizer=dataclasses.replace(config.optimizer, accumulate=parts),
            )
            try:
                check_batch(new, target)
                step = Program.of(new, make_mesh(mesh_config, devices), blueprint) if step is None else step
                mesh = step.mesh
                state = state_bytes(step.like, new, mesh)
            except ValueError:
                continue
            memory = estimated_memory(new, mesh, state, blueprint, target.generation, target.chip.memory, scale)
            yield Candidate(new, _overrides(config, new), memory, _times(new, mesh, blueprint, target, step, state))


def _meshes(config: ExperimentConfig, target: Target, *, has_experts: bool) -> Iterator[dict[str, int | None]]:
    """Sizes of the axes to try; those of no interest here stay as configured."""
    few_rows = config.data.batch_size < target.num_devices or config.data.seq_len >= _LONG
    tried = {
        "tensor": _WIDTHS,
        "context": sorted({*_WIDTHS, config.mesh.context}) if few_rows or config.mesh.context > 1 else (1,),
        "expert": sorted({*_WIDTHS, config.mesh.expert}) if has_experts else (config.mesh.expert,),
    }
    fixed = math.prod(size for name, size in _integers(config.mesh).items() if name not in ("data", "fsdp", *tried))
    for widths in itertools.product(*tried.values()):
        rest, left = divmod(target.num_devices, fixed * math.prod(widths))
        if left:
            continue
        for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
            yield {**dict(zip(tried, widths)), "fsdp": fsdp, "data": None}


def _parts(config: ExperimentConfig) -> list[int]:
    return [n for n in range(1, _MOST_PARTS + 1) if config.data.batch_size % n == 0 and n & (n - 1) == 0]


def _integers(mesh: Any) -> dict[str, int]:
    values = {f.name: getattr(mesh, f.name) for f in dataclasses.fields(mesh)}
    return {name: v for name, v in values.items() if isinstance(v, int) and not isinstance(v, bool)}


def _overrides(old: ExperimentConfig, new: ExperimentConfig) -> str:
    """The mesh in full, and what else differs."""
    parts = [
        f"--mesh.{name} {size}" for name, size in _integers(new.mesh).items() if size != 1 or getattr(old.mesh, name) != size
    ]
    if {old.mesh.context_exchange, new.mesh.context_exchange} != {"gather"}:
        parts.append(f"--mesh.context-exchange {new.mesh.context_exchange}")
    if new.model.remat != old.model.remat:
        parts.append(f"--model.remat {new.model.remat}")
    if new.optimizer.accumulate != old.optimizer.accumulate:
        parts.append(f"--optimizer.accumulate {new.optimizer.accumulate}")
    return " ".join(parts) or "as it is"


def _times(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, blueprint: Blueprint, target: Target, step: Program, state: StateBytes
) -> Times:
    """The roofline from estimated memory traffic and exchange."""
    assert target.chip is not None
    flops = step_flops(config, mesh.size)
    width = ways(mesh, axes.MLP)
    rows = config.data.batch_size / ways(mesh, axes.BATCH) / ways(mesh, axes.LENGTH)
    every = saved_activations(
        dataclasses.replace(config, model=dataclasses.replace(config.model, remat=None)), blueprint, target.generation
    )
    again = {None: 0.0, "dots": 0.5, "full": 1.0}[config.model.remat]
    itemsize = jnp.dtype(config.model.compute_dtype).itemsize
    weights = itemsize * used_params(blueprint, mesh) * (3 + again) * config.optimizer.accumulate
    update = 2 * (state.parameters + state.optimizer) + state.parameters  # read and written, and the gradients read
    traffic = rows * (every.whole + every.divided / width) * (_PASSES + again) + weights + update
    found = estimated_collectives(config, mesh, step, target)
    return times(
        target.chip,
        hardware_flops=flops.hardware,
        model_flops=flops.model,
        traffic=traffic,
        exchange=sum(exchange_seconds(found, mesh, target)),
    )


def estimated_collectives(config: ExperimentConfig, mesh: jax.sharding.Mesh, step: Program, target: Target) -> list[Collective]:
    """What a step exchanges if the compiler does what the layout calls for and no more.

    Where parameters lie over all chips of a TPU slice, gradients are all-reduced, as TPUs do.
    """
    experts = set(mesh_axes(axes.EXPERTS))
    batch = set(mesh_axes(axes.BATCH))
    itemsize = jnp.dtype(config.model.compute_dtype).itemsize
    parts, model = config.optimizer.accumulate, config.model
    state: Any = step.like.params
    gathered, kept = [0.0, 0.0], [0.0, 0.0]  # bytes that are gathered over batch axes, and that are not; of experts second
    over: set[str] = set()
    for array in state.values():
        split = {a for part in array.sharding.spec for a in names_of(part) if mesh.shape[a] > 1}
        shared = split & batch - experts
        size = itemsize * array.size / math.prod(mesh.shape[a] for a in split - shared)
        over |= shared
        (gathered if shared else kept)[bool(split & experts)] += size
    order = lambda names: tuple(a for a in mesh.shape if a in names and mesh.shape[a] > 1)
    found = []
    if over:
        found.append(Collective("all-gather", order(over), 2 * parts, 2 * parts * sum(gathered)))
        all_chips = math.prod(mesh.shape[a] for a in over) == target.num_devices // target.slices
        on_tpu = target.chip is not None and target.chip.platform == "tpu"
        reduction: Kind = "all-reduce" if on_tpu and all_chips else "reduce-scatter"
        found.append(Collective(reduction, order(over), parts, parts * sum(gathered)))
    shares = math.prod(mesh.shape[a] for a in over)
    for sizes, alike in zip(zip(gathered, kept), (batch, batch - experts)):
        rest = order(alike - over | set(mesh_axes(axes.LENGTH)))
        if rest and any(sizes):
            found.append(Collective("all-reduce", rest, parts, parts * (sizes[0] / shares + sizes[1])))
    rows = config.data.batch_size / ways(mesh, axes.BATCH)
    if width := order(mesh_axes(axes.MLP)):
        count = model.num_layers * (6 if model.remat == "full" else 4)
        size = rows * config.data.seq_len / ways(mesh, axes.LENGTH) * model.d_model * itemsize
        found.append(Collective("all-reduce", width, count * parts, count * size))
    if (sent := order(experts)) and gathered[1] + kept[1]:
        count = model.num_layers * (3 if model.remat == "full" else 2) * parts
        size = rows * ways(mesh, axes.EXPERTS) * config.data.seq_len / ways(mesh, axes.LENGTH) * model.d_model * itemsize / parts
        found += [Collective(kind, sent, count, count * size) for kind in ("all-gather", "reduce-scatter")]
    if ways(mesh, axes.LENGTH) > 1:
        found += layer_collectives(config, mesh, target, config.mesh.context_exchange)
    return found
