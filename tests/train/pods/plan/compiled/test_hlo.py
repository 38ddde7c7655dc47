"""The parser of collectives, on what the three compilers write."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from plait.train.pods.plan.compiled.hlo import Collective, Instruction, by_layer_kind, collectives, instructions


def _mesh(**sizes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))]).reshape(*sizes.values())
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


class _Described:
    """As much of a mesh as the parser reads, of any size."""

    def __init__(self, **sizes: int):
        self.shape = sizes


def _one(text: str, **sizes: int) -> Collective:
    (found,) = collectives(text, _Described(**sizes))  # type: ignore[arg-type]
    return found


def _program(*lines: str, entry: str = "main") -> str:
    return "\n".join(
        ["HloModule jit_step", "", f"ENTRY %{entry} (p: f32[4]) -> f32[4] {{", *(f"  {line}" for line in lines), "}"]
    )


def test_counts_bytes_and_axes_of_a_compiled_program():
    mesh = _mesh(data=2, fsdp=2, tensor=2)

    def on_device(x, w):
        def layer(x, w):
            w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)  # f32[16, 32]
            y = jax.lax.psum(jnp.tanh(x @ w), "tensor")  # f32[8, 32]
            return jax.lax.ppermute(y[:, :16], "data", [(0, 1), (1, 0)]), None

        x, _ = jax.lax.scan(layer, x, w)
        return jax.lax.psum_scatter(x, ("data", "fsdp"), scatter_dimension=0, tiled=True)

    step = jax.jit(
        jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P(None, "fsdp", None)), out_specs=P(("data", "fsdp")), check_vma=False)
    )
    text = step.lower(jnp.ones((8, 16)), jnp.ones((5, 16, 32))).compile().as_text()
    found = {(c.kind, c.axes): (c.count, c.bytes) for c in collectives(text, mesh)}
    assert found == {
        ("all-gather", ("fsdp",)): (5, 5 * 16 * 32 * 4),
        ("all-reduce", ("tensor",)): (5, 5 * 8 * 32 * 4),
        ("collective-permute", ("data",)): (5, 5 * 8 * 16 * 4),
        ("reduce-scatter", ("data", "fsdp")): (1, 8 * 16 * 4),
    }
    assert all(one.trips_known for one in instructions(text, mesh))


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'fsdp'}", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("replica_groups=mesh['a'=16] {'a':(2)4}", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_0'}", ("fsdp", "tensor")),
        ("replica_groups=mesh['a'=4,'b'=4], device_ids=(0,4,8,12,1,5,9,13,2,6,10,14,3,7,11,15) {'b'}", ("data", "fsdp")),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=[8,2]<=[16]", ("tensor",)),
        ("replica_groups=[1,16]<=[16]", ("data", "fsdp", "tensor")),
        ("replica_groups={{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", ("data",)),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
    ],
)
def test_groups_become_axes(groups: str, axes: tuple[str, ...]):
    text = _program(f"%g.1 = f32[64,8]{{1,0}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}")
    assert _one(text, data=2, fsdp=4, tensor=2) == Collective("all-gather", axes, 1, 64 * 8 * 4)


def test_permutes_get_their_axes_from_the_pairs():
    text = _program("%c = bf16[8]{0} collective-permute(%p), channel_id=1, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}")
    assert _one(text, context=2, tensor=2) == Collective("collective-permute", ("context",), 1, 16)


def test_a_group_of_one_is_no_collective():
    text = _program("%r = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0},{1}}, to_apply=%add")
    assert collectives(text, _Described(data=2)) == []  # type: ignore[arg-type]


def test_asynchronous_gpu_collectives_count_once_with_what_they_return():
    text = _program(
        "%all-gather-start.3 = ((bf16[8,32]{1,0}, bf16[2]{0}), (bf16[32,32]{1,0}, bf16[8]{0})) all-gather-start(%a, %b), channel_id=23, "
        "replica_groups=[1,4]<=[4], dimensions={0}",
        "%all-gather-done.3 = (bf16[32,32]{1,0}, bf16[8]{0}) all-gather-done(%all-gather-start.3)",
        "%reduce-scatter-start = ((bf16[4,256]{1,0}), bf16[4,64]{1,0}) reduce-scatter-start(%c), channel_id=380, "
        "replica_groups=[1,4]<=[4], dimensions={1}, to_apply=%add",
        "%reduce-scatter-done = bf16[4,64]{1,0} reduce-scatter-done(%reduce-scatter-start)",
    )
    found = collectives(text, _Described(fsdp=4))  # type: ignore[arg-type]
    assert found == [
        Collective("all-gather", ("fsdp",), 1, 2 * (32 * 32 + 8)),
        Collective("reduce-scatter", ("fsdp",), 1, 2 * 4 * 256),
    ]


def test_gpu_loops_say_their_trip_count():
    body = "\n".join(
        ["%body (p: f32[4]) -> f32[4] {", "  %r = f32[4]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add", "}"]
    )
    loop = '%w = f32[4] while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}'
    assert _one(body + "\n\n" + _program(loop), fsdp=4) == Collective("all-reduce", ("fsdp",), 12, 12 * 16)


TPU_LOOP = """HloModule jit_step

%all-reduce-scatter.1 (param: bf16[64,8]) -> bf16[16,8] {
  %param = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.5 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%param), channel_id=7, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = bf16[16,8]{1,0} dynamic-slice(%all-reduce.5, %zero), dynamic_slice_sizes={16,8}
}

%async_collective_fusion.1 (param.1: bf16[16,8]) -> bf16[64,8] {
  ROOT %all-gather.1 = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%param.1), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
}

%async_collective_fusion.2 (param.2: bf16[16,8]) -> bf16[64,8] {
  ROOT %all-gather.2 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%param.2), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
}

%cond (c: (s32[], f32[4])) -> pred[] {
  %other = s32[]{:T(128)} constant(99)
  %limit = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f1 = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %f2 = bf16[64,8]{1,0} fusion(%f1), kind=kCustom, calls=%async_collective_fusion.2
  %f3 = bf16[16,8]{1,0} fusion(%f2), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body
}
"""


def test_tpu_fusions_share_a_channel_and_loops_compare_with_a_constant():
    assert collectives(TPU_LOOP, _Described(fsdp=4)) == [  # type: ignore[arg-type]
        Collective("all-gather", ("fsdp",), 6, 6 * 64 * 8 * 2),
        Collective("reduce-scatter", ("fsdp",), 6, 6 * 64 * 8 * 2),
    ]


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    text = TPU_LOOP.replace("ROOT %lt = pred[]{:T(512)} compare(%i, %limit)", "ROOT %lt = pred[]{:T(512)} compare(%i, %j)")
    found = instructions(text, _Described(fsdp=4))  # type: ignore[arg-type]
    assert [(one.times, one.trips_known) for one in found] == [(1, False)] * 2


def test_collectives_by_kind_of_layer():
    def one(op: str, times: int, axes: tuple[str, ...] = ("fsdp",)) -> Instruction:
        return Instruction("all-gather", axes, (("f32", (4,)),), times, True, op)

    found = by_layer_kind([
        one("jit(step)/jvp()/while/body/layer_gated_deltanet/dot_general", 6),
        one("jit(step)/transpose(jvp(layer_gated_deltanet))/dot_general", 2),
        one("jit(step)/layer_softmax.local/context_attention/ppermute", 1, ("context",)),
        one("jit(step)/take", 1),
        one("", 2),
    ])  # fmt: skip
    assert found == {
        ("gated_deltanet", ("fsdp",)): (8, 128.0),
        ("softmax/local", ("context",)): (1, 16.0),
        ("others", ("fsdp",)): (1, 16.0),
        ("unnamed", ("fsdp",)): (2, 32.0),
    }


def test_what_crosses_tpu_slices_is_sent_by_the_hosts():
    text = _program(
        "%send = (bf16[24,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%g, %after-all), channel_id=6, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
        '%recv = (bf16[24,8,128]{2,1,0}, u32[], token[]) recv(%after-all), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}',
    )
    devices = np.empty(8, object)
    devices[:] = [SimpleNamespace(slice_index=i // 4) for i in range(8)]
    mesh: Any = SimpleNamespace(shape={"data": 2, "fsdp": 4}, devices=devices.reshape(2, 4))
    assert collectives(text, mesh) == [Collective("all-reduce", ("data",), 1, 24 * 8 * 128 * 2)]
