"""Training speed and memory of `lm_quick` on this machine's CPU, beside nanodo on the same shape, and what the probes cost.

    python benchmarks/train_cpu.py [--nanodo FOLDER] [--rounds 15]

FOLDER is a checkout of github.com/google-deepmind/nanodo (its model and attention run in a jitted AdamW step; needs nothing but flax and
optax). Steps are timed in turn, round by round, so that all see the same machine; the table gives the median and the middle half. Processor
time is that of all cores, and says more where other work shares them.
A step's memory is what its program takes, arguments, results and all in between; the peak is that of a process of its own that compiles
and takes three steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.configs.presets import preset
from plait.data.batch import Batch
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.train.mesh import make_mesh
from plait.train.optimizers import make_optimizer
from plait.train.probes.base import Probes
from plait.train.state import Blueprint, create_state
from plait.train.step import make_step

VOCAB = 4096
Stepper = Callable[[], Any]
"""Takes one training step and returns something to wait for."""


def batch(config: ExperimentConfig) -> Batch:
    """Random tokens in rows of one document: every variant sees the same."""
    shape = (config.data.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(1, VOCAB, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Batch(tokens, np.roll(tokens, -1, 1), np.ones(shape, np.int32), positions, np.ones(shape, np.float32))


@dataclasses.dataclass
class Variant:
    """What is measured."""

    run: Stepper
    num_params: int
    program_bytes: int


def compiled(step: Any, *args: Any) -> tuple[Any, int]:
    """A jitted step for these arguments, and the memory of its program."""
    program = step.lower(*args).compile()
    used = program.memory_analysis()
    taken = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return program, taken


def plait(config: ExperimentConfig, probes: str | None = None) -> Variant:
    """Our step, which looks as the probes of these names do."""
    config = dataclasses.replace(config, model=config.model.with_vocab(VOCAB))
    blueprint = Blueprint(config)
    tx = make_optimizer(config.optimizer, config.steps, blueprint.parameters())
    mesh = make_mesh(MeshConfig())
    state = jax.jit(lambda: create_state(blueprint, tx))()
    observer = None if probes is None else Probes(dataclasses.replace(config.probe, only=probes))
    rows = batch(config)
    step, size = compiled(jax.jit(make_step(blueprint, tx, mesh, observer), donate_argnums=0), state, rows)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, rows)
        return metrics["loss/train"]

    return Variant(run, blueprint.num_params, size)


def transformer() -> ExperimentConfig:
    """`lm_quick` with softmax attention only, and a channel mixer that brings it to nanodo's parameter count."""
    config = preset("lm_quick")
    model = dataclasses.replace(config.model, pattern="softmax", mixers={"softmax": SoftmaxConfig(num_heads=6, head_dim=32)})
    return dataclasses.replace(config, model=model)


def nanodo(folder: Path) -> Variant:
    """nanodo's decoder of the same width, depth, heads and channel-mixer parameters, in an AdamW step."""
    sys.path.insert(0, str(folder))
    from nanodo.model import DoConfig, TransformerDo

    config = preset("lm_quick")
    d, inner = config.model.d_model, config.model.channel_mixer.width(config.model.d_model)
    do = DoConfig(D=d, H=6, L=config.data.seq_len, N=config.model.num_layers, V=VOCAB, F=3 * inner // 2, fsdp_enabled=False)
    model, rows = TransformerDo(do), batch(config)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.95, weight_decay=0.1))
    params = model.init(jax.random.key(0), jnp.asarray(rows.tokens))["params"]
    state = (params, tx.init(params))

    def step(state: Any, rows: Batch) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, rows.tokens)
            return (optax.losses.softmax_cross_entropy_with_integer_labels(logits, rows.targets) * rows.loss_mask).mean()

        value, grads = jax.value_and_grad(loss)(state[0])
        updates, optimizer = tx.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), optimizer), value

    program, size = compiled(jax.jit(step, donate_argnums=0), state, rows)

    def run() -> Any:
        nonlocal state
        state, value = program(state, rows)
        return value

    return Variant(run, sum(p.size for p in jax.tree.leaves(params)), size)


PLAIN, PROBES = "plait lm_quick (hybrid)", {"default": "the default probes", "all": "all probes"}


def variants(folder: Path | None) -> dict[str, Callable[[], Variant]]:
    """What is measured."""
    quick = preset("lm_quick")
    out = {
        PLAIN: lambda: plait(quick),
        **{f"a step with {words}": functools.partial(plait, quick, only) for only, words in PROBES.items()},
        "plait softmax only": lambda: plait(transformer()),
    }
    if folder is not None:
        out["nanodo"] = lambda: nanodo(folder)
    return out


def main() -> None:
    """Prints the table; with `--one NAME` the peak memory of one variant in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanodo", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--one")
    args = parser.parse_args()
    if args.one:
        run = variants(args.nanodo)[args.one]().run
        for _ in range(3):
            jax.block_until_ready(run())
        print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
        return
    built = {name: make() for name, make in variants(args.nanodo).items()}
    clocks = {"time": time.perf_counter, "processor time": time.process_time}
    taken: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in built} for clock in clocks}
    for _ in range(args.rounds + 2):
        for name, variant in built.items():
            start = {clock: now() for clock, now in clocks.items()}
            jax.block_until_ready(variant.run())
            for clock, now in clocks.items():
                taken[clock][name].append(now() - start[clock])
    times = taken["time"]
    quick = preset("lm_quick")
    tokens = quick.data.batch_size * quick.data.seq_len
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {tokens} tokens a step, {args.rounds} rounds\n")
    titles = ("variant", "parameters", "step, median (middle half)", "tokens/s", "processor time", "memory of a step", "peak")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name, variant in built.items():
        low, mid, high = np.percentile(times[name][2:], [25, 50, 75])
        command = [sys.executable, __file__, "--one", name, *(["--nanodo", str(args.nanodo)] if args.nanodo else [])]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        print(
            f"| {name} | {variant.num_params / 1e6:.2f}M | {mid:.3f} s ({low:.3f}-{high:.3f}) | {tokens / mid:,.0f} | "
            f"{np.median(taken['processor time'][name][2:]):.3f} s | "
            f"{variant.program_bytes / 2**20:,.0f} MiB | {peak:,.0f} MiB |"
        )
    for clock, of in taken.items():
        for words in PROBES.values():
            ratio = np.asarray(of[f"a step with {words}"][2:]) / np.asarray(of[PLAIN][2:])
            low, mid, high = np.percentile(ratio, [25, 50, 75])
            print(
                f"\n{words}: {mid:.3f} ({low:.3f}-{high:.3f}) of the {clock} of a step without, round by round; "
                f"with --probe-every 50 {1 + (mid - 1) / 50:.4f}"
            )


if __name__ == "__main__":
    main()
