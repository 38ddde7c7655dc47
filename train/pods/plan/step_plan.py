"""What one training step of a config takes on a target, compiled."""

from __future__ import annotations

import dataclasses
import logging
import math
import time

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.kernels import chosen
from plait.models import axes
from plait.train.mesh import axis_sizes, make_mesh, mesh_axes
from plait.train.pods.plan.compiled.compiling import Outcome, compile_step, largest_allocations, required_temporaries
from plait.train.pods.plan.compiled.findings import find_oddities
from plait.train.pods.plan.compiled.hlo import Collective, Computations, by_kind, by_layer_kind
from plait.train.pods.plan.compiled.kernel_cycles import KernelCycles
from plait.train.pods.plan.compiled.overlap import schedule
from plait.train.pods.plan.compiled.traffic import Traffic
from plait.train.pods.plan.exchanges import Parts, exchanges
from plait.train.pods.plan.flops import LayerFlops, StepFlops, layer_flops, step_flops
from plait.train.pods.plan.memory import Memory, StateBytes, compiled_memory, estimated_memory, state_bytes
from plait.train.pods.plan.roofline import Times, exchange_seconds, route, times
from plait.train.pods.plan.topology import Target
from plait.train.program import Program

log = logging.getLogger("plait")


@dataclasses.dataclass(frozen=True)
class Fix:
    """A change of the config that makes a step fit."""

    overrides: str
    """As given on the command line."""
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of `config` on `target`."""

    config: ExperimentConfig
    target: Target
    mesh: dict[str, int]
    memory: Memory
    flops: StepFlops
    layers: list[LayerFlops]
    collectives: list[Collective]
    seconds: list[float]
    """Of each entry of `collectives`; empty where the target has no chip data."""
    waits: list[float]
    """Those of the seconds with nothing scheduled beside them."""
    layer_exchange: dict[tuple[str, tuple[str, ...]], tuple[int, float]]
    """Count and bytes of collectives by kind of layer and mesh axes."""
    exchanges: list[Parts]
    """The ways in which parts of rows may meet, by estimate, the best first; empty where rows are whole, or without chip data."""
    routes: dict[str, str]
    """By mesh axes: how their devices are joined."""
    traffic: float | None
    """Bytes of memory traffic; None without a compiled program."""
    times: Times | None
    warnings: list[str]
    refusal: str | None
    """What the compiler said to a step that does not fit."""
    largest: list[str]
    """The largest arrays then."""
    fixes: list[Fix]
    """Changes that make it fit, the cheapest first, by estimate."""
    kernels: dict[str, str]
    cycles: KernelCycles | None
    """How those of each kernel are known; None where nobody asked."""
    lower_seconds: float
    compile_seconds: float
    total_seconds: float

    @property
    def fits(self) -> bool:
        return self.refusal is None and self.memory.fits

    @property
    def intensity(self) -> float | None:
        """Operations for each byte of memory traffic."""
        return self.flops.hardware / self.traffic if self.traffic else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices, at the bound."""
        return self.config.data.batch_size * self.config.data.seq_len / self.times.bound if self.times else None


def check_batch(config: ExperimentConfig, target: Target) -> None:
    """Raises ValueError where the axes do not multiply to the devices, or the batch does not divide over those that share it, with the
    changes that help. No device is described, so that none that is missing is told first."""
    axis_sizes(config.mesh, target.num_devices)
    batch, parts = config.data.batch_size, config.optimizer.accumulate
    others = other_axes(config.mesh)
    split = math.prod(others.values())
    if config.mesh.data is not None:
        return
    shares = target.num_devices // split
    if (batch // parts) % shares == 0:
        return
    more = -(-batch // (shares * parts)) * shares * parts
    context = target.num_devices // math.gcd(target.num_devices, batch // parts) * config.mesh.context // split
    raise ValueError(
        f"data.batch_size={batch} / optimizer.accumulate={parts} must be a multiple of the {shares} devices of {target.name} that share "
        f"its rows; use --data.batch-size {more}, or let several devices share a row: --mesh.context {max(context, 2 * config.mesh.context)}"
    )


def other_axes(mesh: MeshConfig) -> dict[str, int]:
    """The mesh axes that do not split the rows of a batch, with their sizes."""
    batch = mesh_axes(axes.BATCH)
    sizes = {field.name: getattr(mesh, field.name) for field in dataclasses.fields(mesh) if field.name not in batch}
    return {name: size for name, size in sizes.items() if isinstance(size, int) and not isinstance(size, bool)}


def prepare(config: ExperimentConfig, target: Target, devices: list) -> Program:
    """The step of `config` (vocabulary settled) on the devices of `target`. Raises ValueError where they do not fit."""
    check_batch(config, target)
    return Program.of(config, make_mesh(config.mesh, devices))


def compile_plan(step: Program, target: Target, start: float | None = None, cycles: KernelCycles | None = None) -> Plan:
    """The plan of a described step, compiled; without a look for changes. `cycles` estimates its kernels, each by itself."""
    start = time.monotonic() if start is None else start
    generation = None if target.chip is None else target.generation
    log.info("compiling a step of %s for %s", step.blueprint.describe(), target.name)
    outcome = compile_step(step, generation)
    state = state_bytes(step.like, step.config, step.mesh)
    limit = target.chip.memory if target.chip else None
    flops = step_flops(step.config, step.mesh.size)
    found: list[Collective] = []
    seconds: list[float] = []
    waiting: list[float] = []
    warnings: list[str] = []
    layers: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
    routes: dict[str, str] = {}
    traffic, clock = None, None
    if outcome.compiled is not None:
        memory = compiled_memory(outcome.compiled, state, limit)
        text = outcome.compiled.as_text() or ""
        program = Computations(text, step.mesh)
        single = list(program.collectives())
        found = by_kind(single)
        layers = by_layer_kind(single)
        warnings = find_oddities(step, single, outcome.rematerialized)
        if target.chip is not None:
            moved = Traffic(program)
            traffic = moved.total()
            seconds = exchange_seconds(found, step.mesh, target)
            scheduled = schedule(moved, step.mesh, target, cycles)
            waiting = [scheduled.waits.get((one.kind, one.axes), 0.0) for one in found]
            clock = times(
                target.chip,
                hardware_flops=flops.hardware,
                model_flops=flops.model,
                traffic=traffic,
                exchange=sum(seconds),
                schedule=scheduled,
            )
            routes = {
                " x ".join(names): route(step.mesh, names, target).describe() for names in dict.fromkeys(c.axes for c in found)
            }
    else:
        memory = _refused_memory(outcome, step, state, generation, limit)
    return Plan(
        config=step.config,
        target=target,
        mesh=dict(step.mesh.shape),
        memory=memory,
        flops=flops,
        layers=layer_flops(step.config),
        collectives=found,
        layer_exchange=layers,
        seconds=seconds,
        exchanges=exchanges(step.config, step.mesh, target) if target.chip is not None else [],
        waits=waiting,
        routes=routes,
        traffic=traffic,
        times=clock,
        warnings=warnings,
        refusal=outcome.refusal,
        largest=largest_allocations(outcome.refusal) if outcome.refusal else [],
        fixes=[],
        kernels=chosen(),
        cycles=cycles,
        lower_seconds=outcome.lower_seconds,
        compile_seconds=outcome.compile_seconds,
        total_seconds=time.monotonic() - start,
    )


def _refused_memory(outcome: Outcome, step: Program, state: StateBytes, generation: str | None, limit: float | None) -> Memory:
    """What the compiler asked for where it says so, else the estimate."""
    memory = estimated_memory(step.config, step.mesh, state, step.blueprint, generation, limit)
    temporaries = required_temporaries(outcome.refusal or "", state.total)
    return memory if temporaries is None else dataclasses.replace(memory, temporaries=temporaries, compiled=True)
