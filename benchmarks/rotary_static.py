"""What rotary positions cost an attention layer on TPU, by XLA's own estimates of all but the attention kernels, forward and backward.

    python benchmarks/rotary_static.py [--target v5e] [--head-dim 64]

Needs the extra `aot`. One row of 4,096 tokens, width 2,048: projections, positions, attention. "By halves" takes the two halves of a head
apart, as on other backends; "by a product" is what TPUs get.
"""

from __future__ import annotations

import argparse
import os

import tpu_static

LENGTH, WIDTH = 4096, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="v5e", choices=tpu_static.TOPOLOGY)
    parser.add_argument("--head-dim", type=int, default=64)
    args = parser.parse_args()
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from plait.kernels import Mask, attention
    from plait.kernels.chips import CHIPS
    from plait.kernels.target import not_on, target
    from plait.models.positions import rope

    topology = topologies.get_topology_desc(platform="tpu", topology_name=tpu_static.TOPOLOGY[args.target])
    where = SingleDeviceSharding(topology.devices[0])
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype, sharding=where)
    operands = shape(1, LENGTH, WIDTH), *[shape(WIDTH, WIDTH)] * 3, shape(1, LENGTH, dtype=jnp.int32)
    forms = {"none": not_on, "by halves": lambda _: "as elsewhere", "by a product": not_on}
    for name, chosen in forms.items():
        rope.not_on = chosen

        def loss(x, w_q, w_k, w_v, positions, name=name):
            q, k, v = ((x @ w).reshape(1, LENGTH, -1, args.head_dim) for w in (w_q, w_k, w_v))
            if name != "none":
                q, k = (rope.rotate(y, positions, 1e4) for y in (q, k))
            o = attention(q, k, v, mask=Mask(), implementation="pallas_tpu")
            return jnp.sum(o.reshape(x.shape).astype(jnp.float32) ** 2)

        with target(args.target):
            compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*operands).compile()
        cycles = tpu_static._fusions(compiled.as_text())
        print(
            f"{args.target}, head dim {args.head_dim}, {name:14} {cycles / CHIPS[args.target].clock * 1e6:8,.0f} us", flush=True
        )


if __name__ == "__main__":
    main()
