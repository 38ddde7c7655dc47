"""Plans: targets, rooflines, memory against a real run, what is odd in a layout, and the command."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from plait.configs.mesh import MeshConfig
from plait.configs.vocabulary import with_vocabulary
from plait.kernels.chips import CHIPS, GIB
from plait.kernels.context import Exchange
from plait.launch import main
from plait.models.mixers.sparse.nsa import NSAConfig
from plait.tests.train.common import hybrid, random_batch, tiny
from plait.train.mesh import batch_sharding, make_mesh
from plait.train.pods.plan import report
from plait.train.pods.plan.compiled.compiling import (
    Outcome,
    compile_step,
    largest_allocations,
    required_temporaries,
    standard_error,
)
from plait.train.pods.plan.compiled.findings import find_oddities
from plait.train.pods.plan.compiled.hlo import Instruction
from plait.train.pods.plan.flops import layer_flops, step_flops
from plait.train.pods.plan.memory import estimated_memory, state_bytes
from plait.train.pods.plan.planning import make_plan
from plait.train.pods.plan.report import headline, sections, whole_run
from plait.train.pods.plan.roofline import Route, route, times
from plait.train.pods.plan.search import estimated_collectives
from plait.train.pods.plan.step_plan import check_batch
from plait.train.pods.plan.topology import Target, TargetError, describe_devices, parse_target
from plait.train.program import Program
from plait.train.state import abstract_state, create_state

WIDE = {"mesh.data": None, "mesh.fsdp": 4, "mesh.tensor": 2, "data.batch_size": 8, "data.seq_len": 32}


@pytest.mark.parametrize(
    ("text", "shape", "devices"),
    [
        ("v5e:16x16", (16, 16), 256),
        ("v5p:4x8x8", (4, 8, 8), 256),
        ("v5p:16x16x16", (16, 16, 16), 4096),
        ("v4:2x2x1", (2, 2, 1), 4),
        ("tpu7x:2x2x1", (2, 2, 1), 8),
        ("h100:8x8", (8, 8), 64),
        ("h100x64", (8, 8), 64),
        ("H200x4", (1, 4), 4),
        ("b200:128x8", (128, 8), 1024),
        ("cpu:8", (8,), 8),
    ],
)
def test_targets(text: str, shape: tuple[int, ...], devices: int):
    target = parse_target(text)
    assert (target.shape, target.num_devices) == (shape, devices)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v9:2x2", "is unknown"),
        ("v6:16x16", "did you mean v6e"),
        ("a100:1x8", "h100"),
        ("v5e:3x5", "is no slice of a v5e pod"),
        ("v5e:32x32", "is no slice"),
        ("v5p:4x8", "is no slice"),
        ("v5p:64x64x64", "is no slice"),
        ("v5e", "must be v5e:SHAPE"),
        ("h100x12", "multiple of 8"),
        ("h100:2x2x2", "HOSTSxGPUS"),
        ("h100:99999999999x8", "at most 16384 hosts"),
        ("cpu:2x4", "cpu:DEVICES"),
        ("cpu:9999", "at most 256"),
        ("cpu:0", "at least one device"),
    ],
)
def test_unknown_targets_list_the_known_ones(text: str, said: str):
    with pytest.raises(TargetError, match=said):
        parse_target(text)


def test_slices_are_for_tpus():
    assert parse_target("v5e:16x16", 4).num_devices == 1024
    with pytest.raises(TargetError, match="more hosts"):
        parse_target("h100:8x8", 2)
    with pytest.raises(TargetError, match="slices=0"):
        parse_target("v5e:16x16", 0)


def test_more_cpu_devices_than_there_are_is_an_error():
    assert jax.device_count() == 8
    with pytest.raises(TargetError, match="xla_force_host_platform_device_count=256"):
        describe_devices(parse_target("cpu:256"))


@pytest.mark.skipif(jax.__version_info__ >= (0, 11, 2), reason="for a JAX that cannot compile for GPUs ahead of time")
def test_gpus_need_a_newer_jax():
    with pytest.raises(TargetError, match=r"needs JAX 0\.11\.2"):
        describe_devices(parse_target("h100:1x8"))


def _torus_mesh(shape: tuple[int, int], names: tuple[str, str], grid: tuple[int, int]) -> Any:
    chips = [SimpleNamespace(coords=(i, j, 0), slice_index=0) for i in range(grid[0]) for j in range(grid[1])]
    devices = np.empty(len(chips), object)
    devices[:] = chips
    return SimpleNamespace(shape=dict(zip(names, shape)), devices=devices.reshape(shape))


def test_routes_follow_the_torus():
    target = parse_target("v5e:16x16")
    mesh = _torus_mesh((16, 16), ("data", "fsdp"), (16, 16))
    link = CHIPS["v5e"].link
    assert route(mesh, ("fsdp",), target).link == 2 * link  # a ring
    assert route(mesh, ("data", "fsdp"), target).link == 4 * link
    part = parse_target("v5e:4x4")
    assert route(_torus_mesh((4, 4), ("data", "fsdp"), (4, 4)), ("fsdp",), part).link == link  # a line


def test_routes_between_gpu_hosts_use_the_network():
    devices = np.array([SimpleNamespace(process_index=i // 8) for i in range(64)], object).reshape(8, 8)
    mesh: Any = SimpleNamespace(shape={"data": 8, "fsdp": 8}, devices=devices)
    inside, across = (route(mesh, (axis,), parse_target("h100:8x8")) for axis in ("fsdp", "data"))
    assert (inside.inner, inside.outer) == (8, 1)
    assert (across.inner, across.outer) == (1, 8)
    assert inside.seconds("all-gather", 8e9) == pytest.approx(7e9 / 450e9)
    assert across.seconds("all-reduce", 8e9) == pytest.approx(14e9 / 50e9)


def test_seconds_of_a_group_over_both():
    both = Route(inner=8, outer=4, link=400e9, network=50e9, hop=400e9)
    assert both.seconds("all-gather", 32e9) == pytest.approx(max(28e9 / 400e9, 24e9 / 400e9))


def test_the_bound_is_the_slowest_part():
    clock = times(CHIPS["v5e"], hardware_flops=197e12, model_flops=98.5e12, traffic=819e9 / 2, exchange=0.25)
    assert (clock.compute, clock.memory, clock.bound, clock.serial) == (1.0, 0.5, 1.0, 1.75)
    assert (clock.limited_by, clock.mfu) == ("compute", 0.5)


def test_a_whole_run_in_time_and_hours_of_devices():
    clock = times(CHIPS["v5e"], hardware_flops=197e12, model_flops=0, traffic=2 * 819e9, exchange=1)
    config = tiny({"steps": 36_000, "data.batch_size": 512, "data.seq_len": 2048})
    said = whole_run(config, 256, clock)  # 2 s a step at the bound and 4 s in turn
    assert said.startswith(
        "All 36,000 steps, of 37.7B tokens: 20h 00m with all of it overlapped to 1d 16h with nothing, 5,120 to 10,240 "
    )


@pytest.mark.parametrize("remat", [None, "dots", "full"])
def test_flops_add_up(remat: str | None):
    config = with_vocabulary(hybrid({"model.remat": remat}))
    rows = {row.name: row for row in layer_flops(config)}
    assert sum(row.forward for row in rows.values()) == pytest.approx(config.model.flops(16))
    assert rows["channel mixers"].recomputed == (rows["channel mixers"].forward if remat == "full" else 0)
    assert rows["gated_deltanet"].recomputed == {
        None: 0, "dots": rows["gated_deltanet"].mixing, "full": rows["gated_deltanet"].forward,
    }[remat]  # fmt: skip
    assert step_flops(config, 8).model == pytest.approx(3 * config.model.flops(16) * 4 * 16 / 8)


def test_products_with_weights_are_not_mixing():
    """NSA compresses by a network that runs once in `stride` tokens."""
    config = with_vocabulary(tiny({"model.pattern": "nsa", "model.mixers": {"nsa": NSAConfig(num_heads=2, head_dim=8)}}))
    row, mixer = layer_flops(config)[0], config.model.mixers["nsa"]
    each = mixer.between_flops(config.model.d_model, config.data.seq_len)
    assert row.mixing == pytest.approx(row.count * each) and row.mixing > 0 and row.products > 0
    assert row.forward == pytest.approx(row.count * mixer.flops(config.model.d_model, config.data.seq_len))


def test_a_batch_that_does_not_divide_names_one_that_does():
    config = with_vocabulary(tiny({"mesh.data": None, "data.batch_size": 96, "data.seq_len": 64}))
    with pytest.raises(ValueError, match=r"--data.batch-size 256, .*--mesh.context 8"):
        check_batch(config, parse_target("v5e:16x16"))
    check_batch(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, context=8)), parse_target("v5e:16x16"))


def test_abstract_state_is_that_of_a_run():
    config = with_vocabulary(hybrid({"optimizer.ema": 0.9}))
    step = Program.of(config, make_mesh(config.mesh, jax.devices()[:1]))
    made = jax.eval_shape(lambda: create_state(step.blueprint, step.tx))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract_state(step.blueprint, step.tx), made)
    assert all(jax.tree.leaves(same))


def test_memory_is_that_of_a_real_run():
    config = tiny(WIDE | {"optimizer.ema": 0.9})
    plan = make_plan(config, parse_target("cpu:8"))
    config = with_vocabulary(config)
    mesh = make_mesh(config.mesh)
    step = Program.of(config, mesh)
    state = jax.tree.map(lambda a, s: jax.device_put(np.zeros(a.shape, a.dtype), s), step.like, step.shardings)
    rows = batch_sharding(mesh, 8, 32, 1)
    batch = jax.device_put(random_batch(8, 32), rows)
    device = mesh.devices.flat[0]
    arrays = jax.tree.leaves((state, batch))
    live = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards if shard.device == device)
    memory = plan.memory
    assert memory.parameters + memory.optimizer + memory.batch == pytest.approx(live, rel=0.01)
    stats: Any = step.lower().compile().memory_analysis()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert memory.total == pytest.approx(total, rel=0.1)
    assert plan.fits
    assert plan.collectives
    assert headline(plan).startswith("tiny on cpu:8 (fsdp 4 x tensor 2) fits")
    assert all(part.title for part in sections(plan))


def test_estimates_grow_with_what_is_kept():
    config = with_vocabulary(hybrid(WIDE | {"model.num_layers": 4}))
    totals = []
    for remat in ("full", "dots", None):
        new = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        step = Program.of(new, make_mesh(new.mesh))
        state = state_bytes(step.like, new, step.mesh)
        totals.append(estimated_memory(new, step.mesh, state, step.blueprint, None, None))
    assert totals[0].temporaries < totals[1].temporaries < totals[2].temporaries
    assert all(not memory.compiled and memory.fits for memory in totals)


@pytest.mark.parametrize(
    ("target", "reduction"), [("v5e:2x4", "all-reduce"), ("v5e:4x4", "reduce-scatter"), ("h100x8", "reduce-scatter")]
)
def test_estimated_exchange_of_fsdp(target: str, reduction: str):
    config = with_vocabulary(tiny({"mesh.data": 1, "mesh.fsdp": 8, "data.batch_size": 8}))
    step = Program.of(config, make_mesh(config.mesh))
    gather, reduce = estimated_collectives(config, step.mesh, step, parse_target(target))
    params: Any = step.like.params
    split = {name for name in params if "fsdp" in str(step.shardings.params[name].spec)}
    size = sum(4 * params[name].size for name in split)
    assert (gather.kind, gather.axes, gather.bytes) == ("all-gather", ("fsdp",), 2 * size)
    assert (reduce.kind, reduce.axes, reduce.bytes) == (reduction, ("fsdp",), size)


def _oddities(config: Any, *found: Instruction, said: tuple[str, ...] = ()) -> list[str]:
    return find_oddities(Program.of(config, make_mesh(config.mesh)), found, said)


def test_oddities():
    config = with_vocabulary(hybrid(WIDE | {"model.d_model": 256, "model.num_layers": 4, "model.compute_dtype": "bfloat16"}))
    embedding = (config.model.vocab_size, config.model.d_model)
    one = lambda kind, axes, shape, dtype="bf16": Instruction(kind, axes, ((dtype, shape),), 99, True, "jit(step)/dot")
    assert _oddities(config, one("all-gather", ("fsdp",), (256, 12)), one("all-reduce", ("fsdp",), (8, 32, 256))) == []
    (message,) = _oddities(config, one("all-reduce", ("fsdp",), (256, embedding[0] // 2)))
    assert "all-reduced over fsdp" in message
    (message,) = _oddities(config, one("all-gather", ("fsdp", "tensor"), embedding))
    assert "whole parameters gathered" in message
    assert "embedding" in message
    (message,) = _oddities(
        config, one("all-gather", ("fsdp",), (2, 256, 12), "bf16"), one("all-gather", ("fsdp",), (2, 256, 8192))
    )
    assert "all layers gathered at once" in message or "MiB" in message
    (message,) = _oddities(config, one("collective-permute", ("tensor",), (1024, 1024)))
    assert "collective-permutes" in message
    assert _oddities(config, one("collective-permute", ("context",), (1024, 1024))) == []
    line = "W1 x.cc:1] [SPMD] Involuntary full rematerialization. The compiler cannot go from A to B. As the last resort"
    (message,) = _oddities(config, said=(line, line))
    assert message.endswith("The compiler cannot go from A to B")
    loop = dataclasses.replace(one("all-gather", ("fsdp",), (3,)), trips_known=False)
    assert _oddities(config, loop) == ["1 collectives are in loops of unknown length and count once"]


REFUSAL = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.30G of 15.75G hbm. Exceeded hbm capacity by 4.55G.

Largest program allocations in hbm:

  1. Size: 2.75G
     Operator: op_name="jit(step)/jvp()/dot_general" source_file="x.py"
     Shape: bf16[24,4096,5632]{2,1,0:T(8,128)(2,1)}
     ==========================

  2. Size: 1.00G
     Shape: f32[12,4096]{1,0}
"""


def test_a_refusal_tells_the_largest_arrays():
    assert largest_allocations(REFUSAL) == ["2.75G bf16[24,4096,5632] jit(step)/jvp()/dot_general", "1.00G f32[12,4096]"]
    assert required_temporaries(REFUSAL, GIB) == pytest.approx(19.30 * GIB)
    short = "RESOURCE_EXHAUSTED: Ran out, the total memory required for HLO temporaries (71.21G) exceeds available HBM (15.75G)."
    assert required_temporaries(short, GIB) == pytest.approx(71.21 * GIB)
    assert required_temporaries("RESOURCE_EXHAUSTED", GIB) is None


@pytest.mark.parametrize("exchange", ["gather", "all_to_all"])
def test_what_does_not_fit_gets_changes_that_do(exchange: Exchange, monkeypatch: pytest.MonkeyPatch):
    """The compiler's part is played; targets, estimates and changes are real."""
    from plait.train.pods.plan import planning, step_plan

    target = Target("v5e:2x4", "v5e", (2, 4))
    limit = 3e6
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=limit))
    coords = [(i, j, 0) for i in range(2) for j in range(4)]
    monkeypatch.setattr(planning, "describe_devices", lambda target: list(jax.devices()))
    monkeypatch.setattr(step_plan, "compile_step", lambda *_: Outcome(None, REFUSAL.replace("20.30G", "8.00M"), (), 1.0, 1.0))
    monkeypatch.setattr("plait.train.pods.plan.search.exchange_seconds", lambda found, *_: [0.0 for _ in found])
    monkeypatch.setattr(step_plan, "exchanges", lambda *_: [])
    monkeypatch.setattr("plait.kernels.target.current", lambda: None)
    assert len(coords) == len(jax.devices())
    mesh = MeshConfig(context=2 if exchange == "all_to_all" else 1, context_exchange=exchange)
    plan = make_plan(tiny({"mesh": mesh, "data.batch_size": 64, "data.seq_len": 128}), target)
    assert not plan.fits
    assert plan.memory.largest == "temporaries"
    assert plan.fixes
    assert all(fix.memory.total <= limit for fix in plan.fixes)
    for fix in plan.fixes:
        told = dict(re.findall(r"--mesh\.(\S+) (\w+)", fix.overrides))
        alone = int(told.get("context", 1)) == 1
        assert told.get("context-exchange", "gather") == ("gather" if alone else exchange)
        assert ("context-exchange" in told) == (exchange == "all_to_all"), "the command has the other one"
    assert "DOES NOT FIT" in headline(plan)


def test_command_writes_a_plan_and_keeps_the_old_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog):
    out = tmp_path / "plan"
    args = [
        "plan",
        "lm_tiny",
        "--target",
        "cpu:2",
        "--out",
        str(out),
        "--exact",
        "--model.pattern",
        "softmax",
        "--model.num-layers",
        "1",
    ]
    assert main(args) == 0
    assert re.search(r"compiling a step of [\d,]+ parameters for cpu:2$", caplog.text, re.M), "which takes a while"
    saved = json.loads((out / "plan.json").read_text())
    assert saved["fits"] and saved["mesh"]["data"] == 2
    assert math.isclose(
        saved["memory"]["total"], sum(saved["memory"][k] for k in ("parameters", "optimizer", "batch", "temporaries", "program"))
    )
    assert "## Collectives of a device in a step" in (out / "plan.md").read_text()
    assert "| cycles of kernels | 0 estimated now, 0 known from before" in (out / "plan.md").read_text()
    assert saved["kernel_cycles"] == {"made": 0, "kept": 0, "unknown": {}}
    assert main(args) == 2
    assert "already holds a plan" in capsys.readouterr().err
    before = (out / "plan.json").read_bytes()
    with pytest.raises(FileExistsError):  # as another command may have made it since this one looked
        report.write(out, (), "another", {})
    assert (out / "plan.json").read_bytes() == before and "another" not in (out / "plan.md").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "needs a preset first"),
        (["lm_tiny"], "needs a --target"),
        (["lm_tiny", "--target", "v7:2x2"], "known targets"),
        (["lm_tinny", "--target", "cpu:8"], "did you mean 'lm_tiny'"),
        (["lm_tiny", "--target", "cpu:8", "--search"], "no peak to rank by"),
        (["lm_tiny", "--target", "v5e:2x2", "--search", "--exact"], "leave out --search"),
        (["lm_tiny", "--target", "cpu:8", "--data.batch-size", "12"], "--data.batch-size 16"),
        (["lm_tiny", "--target", "cpu:8", "--mesh.tensor", "3"], "mesh.tensor=3"),
        (["lm_tiny", "--target", "cpu:256", "--mesh.tensor", "3"], "must multiply to the 256 devices"),  # which are not there
        (["lm_tiny", "--target", "v5e:2x2", "--data.tokenizer", "some/tokenizer.json"], "--model.vocab-size"),
    ],
)
def test_bad_input_ends_before_a_compile(args: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plait.train.pods.plan.step_plan.compile_step", lambda *_: pytest.fail("compiled"))
    assert main(["plan", *args]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_standard_error_of_other_languages_is_kept(capfd: pytest.CaptureFixture[str]):
    with standard_error() as said:
        os.write(2, b"from C++\n")
    assert said == ["from C++"]
    with pytest.raises(KeyError), standard_error():
        os.write(2, b"before the end\n")
        raise KeyError
    assert "before the end" in capfd.readouterr().err


def test_compile_step_catches_want_of_memory_only():
    class Lowered:
        def compile(self):
            raise self.error

    class Step:
        def lower(self, generation):
            return Lowered()

    Lowered.error = jax.errors.JaxRuntimeError(REFUSAL)  # type: ignore[attr-defined]
    outcome = compile_step(Step(), None)  # type: ignore[arg-type]
    assert (outcome.compiled, outcome.refusal) == (None, REFUSAL)
    Lowered.error = jax.errors.JaxRuntimeError("INTERNAL: no")  # type: ignore[attr-defined]
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_step(Step(), None)  # type: ignore[arg-type]
