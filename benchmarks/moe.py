"""A mixture of experts beside the dense channel mixer of the same active operations.

python benchmarks/moe.py [--rounds 9] [--experts 8] [--top-k 2]     # training steps of lm_quick on this machine, timed in turn
python benchmarks/moe.py --target v5e:2x2                           # what a compiler says of the layer's operations (extra `aot`)
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.configs.presets import preset
from plait.data.batch import Batch
from plait.kernels import Tokens
from plait.kernels.target import target
from plait.models.build import BuildContext
from plait.models.channel_mixers.base import ChannelMixerConfig
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.channel_mixers.moe import MoEConfig
from plait.train.mesh import make_mesh
from plait.train.pods.plan.topology import describe_devices, parse_target
from plait.train.program import Program

VOCAB = 4096


def variants(experts: int, top_k: int, width: int) -> dict[str, ChannelMixerConfig]:
    """Two whose tokens meet the same weights, but for the router's, and one whose tokens meet the weights of all experts."""
    return {
        "dense": GatedMLPConfig(hidden_dim=width),
        f"{experts} experts, top-{top_k}": MoEConfig(num_experts=experts, top_k=top_k, hidden_dim=width // top_k),
        "dense, as wide as all experts": GatedMLPConfig(hidden_dim=experts * width // top_k),
    }


def stepper(mixer: ChannelMixerConfig) -> tuple[Callable[[], Any], Program]:
    """Takes one step of `lm_quick` with this channel mixer on random tokens."""
    base: ExperimentConfig = preset("lm_quick")
    model = dataclasses.replace(base.model, channel_mixer=mixer).with_vocab(VOCAB)
    config = dataclasses.replace(base, model=model, mesh=MeshConfig(data=1))
    program = Program.of(config, make_mesh(config.mesh, jax.devices()[:1]))
    compiled, state, shape = program.lower().compile(), program.fresh(), program.layout.shape
    tokens = np.random.default_rng(0).integers(1, VOCAB, shape).astype(np.int32)
    positions, ones = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape), np.ones(shape, np.int32)
    batch = program.layout.place(Batch(tokens, np.roll(tokens, -1, 1), ones, positions, ones.astype(np.float32)))

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics["loss/train"]

    return run, program


def time_steps(mixers: dict[str, ChannelMixerConfig], rounds: int) -> None:
    """Prints the table of times."""
    built = {name: stepper(mixer) for name, mixer in mixers.items()}
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(rounds + 2):
        for name, (run, _) in built.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    dense = np.median(times["dense"][2:])
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {rounds} rounds\n")
    print("| channel mixer | parameters | forward MFLOP a token | step, median (middle half) | of dense |\n|---|---|---|---|---|")
    for name, (_, program) in built.items():
        low, mid, high = np.percentile(times[name][2:], [25, 50, 75])
        flops, size = program.config.model.flops(program.config.data.seq_len) / 1e6, program.blueprint.num_params / 1e6
        print(f"| {name} | {size:.2f}M | {flops:.2f} | {mid:.3f} s ({low:.3f}-{high:.3f}) | {mid / dense:.2f} |")


def compile_layers(mixers: dict[str, ChannelMixerConfig], name: str, d_model: int, tokens: int = 8192) -> None:
    """Prints what a compiler counts of one layer in bfloat16, forward and with gradients, over what the config says."""
    where = parse_target(name)
    device = SingleDeviceSharding(describe_devices(where)[0])
    print(f"{name}, JAX {jax.__version__}, width {d_model}, {tokens} tokens, operations over `flops`\n")
    print("| channel mixer | MFLOP a token | forward | with gradients, over 3 | temporaries |\n|---|---|---|---|---|")
    for label, mixer in mixers.items():
        with target(where.generation):
            forward, backward = (program.compile() for program in lowered(mixer, d_model, tokens, device))
        flops = mixer.flops(d_model) * tokens
        one, both = (program.cost_analysis()["flops"] / flops for program in (forward, backward))
        size = backward.memory_analysis().temp_size_in_bytes / 2**20
        print(f"| {label} | {mixer.flops(d_model) / 1e6:.2f} | {one:.3f} | {both / 3:.3f} | {size:,.0f} MiB |")


def lowered(mixer: ChannelMixerConfig, d_model: int, tokens: int, device: Any) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """A layer's forward pass and its gradients, for a described device."""
    dtype = jnp.dtype("bfloat16")
    build = lambda: mixer.build(d_model, BuildContext(rngs=nnx.Rngs(0), seq_len=tokens, compute_dtype=dtype))
    graph, variables = nnx.split(nnx.eval_shape(build))
    forward = lambda variables, x: nnx.merge(graph, variables)(x, at=Tokens()).y
    loss = lambda variables, x: jnp.square(forward(variables, x).astype(jnp.float32)).sum()
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device)
    args = jax.tree.map(place, (variables, jax.ShapeDtypeStruct((1, tokens, d_model), dtype)))
    return jax.jit(forward).lower(*args), jax.jit(jax.grad(loss, (0, 1))).lower(*args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--target")
    args = parser.parse_args()
    if args.target:
        compile_layers(variants(args.experts, args.top_k, 2048), args.target, 768)
    else:
        time_steps(variants(args.experts, args.top_k, 512), args.rounds)


if __name__ == "__main__":
    main()
