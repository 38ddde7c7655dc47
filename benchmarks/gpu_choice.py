"""Bytes that choosing in sparse attention moves through a GPU's memory, beside plain JAX, counted from programs compiled ahead of time.

    python benchmarks/gpu_choice.py [--seq-lens 4096,32768,131072] [--generation h100] [--list]

No GPU, no measurement; needs the extra `aot` on a JAX that has the kernels. Bytes are counted as in `gpu_bytes.py`, slices as what is
read of them. NSA: 16 heads of 128 channels choose 16 blocks of 64 together, by a softmax over runs of 32 that begin every 16. DSA: an
indexer of 64 heads of 128 channels chooses 2,048 tokens. B = 1, bfloat16, one document. What a sort reads and writes again inside is not
counted, nor what one launch of a kernel reads twice (the queries, for each chunk of what is scored), which is taken to come out of the
cache. `--list` prints launches and passes, those of a name together.
"""

from __future__ import annotations

import argparse
import collections
import os
from typing import Any

from plait.benchmarks.gpu_bytes import traffic

FORMS = {"pallas_gpu": "kernels", "chunked": "plain JAX"}


def compiled(kind: str, length: int, implementation: str, generation: str = "h100", dtype: str = "bfloat16") -> Any:
    """The compiled choice of `kind`, "NSA" or "DSA", by `plait.kernels.topk_blocks`."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from plait.kernels import Tokens, topk_blocks
    from plait.kernels.target import target
    from plait.train.pods.plan.gpu_descriptions import GPU_DESCRIPTIONS

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=generation, topology="1x1x1", target_config=GPU_DESCRIPTIONS[generation]
    )
    where = SingleDeviceSharding(topology.devices[0])
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((1, *shape), dtype, sharding=where)
    heads, scored, weights = 16, length // 16, None
    options = {"top_k": 16, "block_size": 64, "num_local": 2, "num_first": 1, "scale": 128**-0.5, "stride": 16, "span": 32}
    if kind == "DSA":
        heads, scored, weights = 64, length, array(length, 64, dtype="float32")
        options = {"top_k": min(2048, length), "block_size": 1, "num_local": 0}
    at, blocks_at = (Tokens(None, *[array(n, dtype=jnp.int32)] * 2) for n in (length, scored))

    def choose(q: Any, blocks: Any, weights: Any, at: Tokens, blocks_at: Tokens) -> Any:
        named = {"at": at, "blocks_at": blocks_at, "weights": weights, "num_blocks": length // options["block_size"]}
        return topk_blocks(q, blocks, by_group=True, implementation=implementation, **named, **options).indices

    with target(generation):
        return jax.jit(choose).lower(array(length, heads, 128), array(scored, 1, 128), weights, at, blocks_at).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-lens", default="4096,32768,131072")
    parser.add_argument("--generation", default="h100")
    parser.add_argument("--list", action="store_true", help="launches and passes")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(f"{args.generation}, B=1: GB as compiled")
    print("| choice | T | form | launches | GB | XLA passes | GB | GB in all | MB held |\n|---|---|---|---|---|---|---|---|---|")
    for kind in ("NSA", "DSA"):
        for length in map(int, args.seq_lens.split(",")):
            for implementation, form in FORMS.items():
                program = compiled(kind, length, implementation, args.generation)
                found = traffic(program.as_text(), slices=True)
                parts = [[x.num_bytes / 1e9 for x in found if x.kernel == kernel] for kernel in (True, False)]
                cells = [f"{len(part):,} | {sum(part):,.2f}" for part in parts]
                held = program.memory_analysis().temp_size_in_bytes / 1e6
                total = sum(map(sum, parts))
                print(f"| {kind} | {length:,} | {form} | {' | '.join(cells)} | {total:,.2f} | {held:,.0f} |", flush=True)
                by_name: collections.Counter[tuple[str, bool]] = collections.Counter()
                for x in found if args.list else ():
                    by_name[x.name, x.kernel] += x.num_bytes
                for (name, kernel), num_bytes in by_name.most_common():
                    print(f"    {num_bytes / 1e9:10.3f} {'kernel' if kernel else 'XLA':6} {name}")


if __name__ == "__main__":
    main()
