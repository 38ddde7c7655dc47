"""What parts of rows send each other by each way of exchange, on paper: bytes, sends, time and room, from the traced layers.

    python benchmarks/context_exchange.py [--target h100:8x8] [--rows 2048] [--rate 0.4]

Nothing is compiled. Rows of `--rows` times 1,024 tokens, one a step, are cut over all devices of the target, for two models of 16 layers of
2,048 channels (about 1B parameters): one of full attention, and one of linear attention. On such LASP-2 (arXiv 2502.07563) reports rows of
2,048K tokens on 64 GPUs; its abstract names neither the model nor the GPUs. Its three schemes are states gathered (LASP-2), states in a
ring (LASP), and keys and values in a ring, here beside linear layers, whose little work is left out of what could hide it: no layer of
ours does that, and what goes round is that of attention with as many heads. A step computes at `--rate` of the peak.

    python benchmarks/context_exchange.py --target v5e:4x4 --layer 8x128

compiles instead causal attention with that many heads of that width, forward and backward, over a row of 8,192 tokens for each device of a
TPU slice: its time as a plan schedules it, and the compiler's temporaries.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.configs.presets.hybrid import transformer_1b
from plait.kernels import Mask, Tokens, attention
from plait.kernels.context import Exchange
from plait.kernels.target import target as kernels_for
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.lightning import LightningConfig
from plait.train.mesh import make_mesh, on_mesh
from plait.train.pods.plan.compiled.hlo import Computations
from plait.train.pods.plan.compiled.overlap import schedule
from plait.train.pods.plan.compiled.traffic import Traffic
from plait.train.pods.plan.exchanges import Parts, exchanges
from plait.train.pods.plan.flops import step_flops
from plait.train.pods.plan.memory import size_text
from plait.train.pods.plan.topology import Target, describe_devices, parse_target


def model(name: str, length: int, devices: int) -> ExperimentConfig:
    """One row a step, cut over the devices."""
    config, heads = transformer_1b(), {"num_heads": 16, "head_dim": 128}
    mixers = {"softmax": SoftmaxConfig(**heads), "lightning": LightningConfig(**heads)}
    layers = dataclasses.replace(
        config.model, pattern=name, num_layers=16, d_model=2048, mixers={name: mixers[name]}, remat="full"
    )
    return dataclasses.replace(
        config,
        model=layers.with_vocab(32_000),
        data=dataclasses.replace(config.data, seq_len=length, batch_size=1),
        mesh=MeshConfig(data=1, context=devices),
    )


def compiled_layer(target: Target, devices: list[Any], heads: int, head_dim: int) -> None:
    """Prints what the compiler makes of one layer by each exchange that it allows."""
    mesh = make_mesh(MeshConfig(data=1, context=target.num_devices), devices)
    length = 8192 * target.num_devices
    place = NamedSharding(mesh, PartitionSpec(None, "context"))
    shape = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.bfloat16, sharding=place)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place)

    def layer(q: jax.Array, k: jax.Array, v: jax.Array, d_o: jax.Array, ids: jax.Array) -> Any:
        o, back = jax.vjp(lambda q, k, v: attention(q, k, v, mask=Mask(), at=Tokens(None, ids)), q, k, v)
        return o, back(d_o)

    print(
        "| exchange | ms as scheduled | kernels | other operations | exchange that nothing hides | temporaries |\n|---|---|---|---|---|---|"
    )
    for exchange in get_args(Exchange):
        with on_mesh(mesh, 1, exchange), kernels_for(target.generation):
            compiled = jax.jit(functools.partial(layer)).lower(shape, shape, shape, shape, ids).compile()
        run = schedule(Traffic(Computations(compiled.as_text() or "", mesh)), mesh, target)
        parts, stats = run.by_source(), cast(Any, compiled.memory_analysis())
        kernels, waits = parts.get("kernels", 0.0), sum(run.waits.values())
        times = " | ".join(f"{1e3 * x:.1f}" for x in (run.seconds, kernels, run.seconds - kernels - waits, waits))
        print(f"| {exchange} | {times} | {size_text(stats.temp_size_in_bytes)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100:8x8")
    parser.add_argument("--rows", type=int, default=2048, help="thousands (1,024) of tokens of a row")
    parser.add_argument("--rate", type=float, default=0.4, help="share of the peak at which a step computes")
    parser.add_argument("--layer", help="compile one layer of HEADSxWIDTH")
    args = parser.parse_args()
    target = parse_target(args.target)
    assert target.chip is not None
    jax.config.update("jax_platforms", "cpu")
    devices = describe_devices(target)
    if args.layer:
        heads, head_dim = map(int, args.layer.split("x"))
        compiled_layer(target, devices, heads, head_dim)
        return
    found: dict[str, dict[str, Parts]] = {}
    compute: dict[str, float] = {}
    print(
        "| layers | exchange | sends | full arrays | ms | not hidden | merging | room in a layer |\n|---|---|---|---|---|---|---|---|"
    )
    for name in ("softmax", "lightning"):
        config = model(name, 1024 * args.rows, target.num_devices)
        mesh = make_mesh(config.mesh, devices)
        found[name] = {one.exchange: one for one in exchanges(config, mesh, target)}
        compute[name] = step_flops(config, mesh.size).hardware / target.chip.flops / args.rate
        for one in found[name].values():
            times = " | ".join(f"{seconds * 1e3:,.0f}" for seconds in (one.seconds, one.exposed, one.merging))
            size = (
                "as gathered | | | | | |"
                if one.alike
                else f"{one.sends:,} | {size_text(one.bytes)} | {times} | {size_text(one.held)} |"
            )
            print(f"| {name} | {one.exchange} | {size}")
    linear, work = found["lightning"], compute["lightning"]
    steps = {
        "LASP-2": linear["gather"].exposed,
        "LASP": linear["ring"].exposed,
        "ring attention": found["softmax"]["ring"].seconds,
    }
    print(f"\nA step of the linear model computes {work * 1e3:,.0f} ms at {args.rate:.0%} of the peak, and waits:")
    for name, waits in steps.items():
        slower = (work + waits) / (work + steps["LASP-2"]) - 1
        print(f"  {name}: {waits * 1e3:,.0f} ms; LASP-2 has {slower:.1%} more tokens a second")


if __name__ == "__main__":
    main()
