"""Kernels that are estimated each by itself: what is asked, kept and believed; with libtpu, what its compiler says."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from plait.kernels import short_conv
from plait.kernels.target import target
from plait.train.pods.plan.compiled import kernel_cycles
from plait.train.pods.plan.compiled.durations import Durations
from plait.train.pods.plan.compiled.hlo import Computations
from plait.train.pods.plan.compiled.kernel_cycles import KernelCycles
from plait.train.pods.plan.compiled.traffic import Operation, Traffic
from plait.train.pods.plan.topology import describe_devices, parse_target

V5E = parse_target("v5e:2x2")
TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs the extra aot")
NAME = "jit(step)/transpose(jvp(short_conv_forward))/pallas_call"


@pytest.fixture(autouse=True)
def any_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cycles.importlib.metadata, "version", lambda _: "1")


def operations(*, flops: int = 1000, list_: str = "s32[2,512]{1,0}", code: str = '"body":"TUz",') -> dict[str, Operation]:
    """One kernel and what it reads."""
    config = f'{{"flag_configs":[],"custom_call_config":{{{code}"cost_estimate":{{"flops":"{flops}"}}}}}}'
    kernel = (
        "%conv.1 = (bf16[2,512,128]{2,1,0:T(8,128)(2,1)}, f32[2]{0}) custom-call(%x, %list), "
        f'custom_call_target="tpu_custom_call", metadata={{op_name="{NAME}"}}, backend_config={config}'
    )
    return {
        "x": Operation("x", "bf16[2,512,128]{2,1,0}", "parameter", (), "", False),
        "list": Operation("list", list_, "parameter", (), "", False),
        "conv.1": Operation(
            "conv.1", "(bf16[2,512,128]{2,1,0:T(8,128)(2,1)}, f32[2]{0})", "custom-call", ("x", "list"), kernel, True
        ),
    }


def of(cycles: KernelCycles, inside: dict[str, Operation]) -> int | None:
    return cycles.of(inside["conv.1"], inside)


def answering(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """The compiler's process runs this instead."""
    monkeypatch.setattr(kernel_cycles, "_COMMAND", [sys.executable, "-c", code])


def test_an_estimate_is_made_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    job = tmp_path / "job.json"
    answering(monkeypatch, f"import sys; open({str(job)!r}, 'w').write(sys.stdin.read()); print(1234)")
    first = KernelCycles(V5E, tmp_path / "kept")
    assert [of(first, operations()) for _ in range(2)] == [1234, 1234]
    assert first.described() == {"made": 1, "kept": 0, "unknown": {}}
    asked = json.loads(job.read_text())
    assert asked["target"] == "v5e:2x2"
    assert asked["operands"] == [["bfloat16", [2, 512, 128]], ["int32", [2, 512]]]
    assert asked["results"] == [["bfloat16", [2, 512, 128]], ["float32", [2]]]
    assert asked["config"]["body"] == "TUz"
    answering(monkeypatch, "raise AssertionError")
    second = KernelCycles(V5E, tmp_path / "kept")
    assert of(second, operations()) == 1234
    assert second.described() == {"made": 0, "kept": 1, "unknown": {}}
    (file,) = (tmp_path / "kept").iterdir()
    assert file.name.startswith("v5e-short_conv_forward-")
    other = KernelCycles(parse_target("v6e:2x2"), tmp_path / "kept")
    assert of(other, operations()) is None
    assert "does not compile" in other.unknown["short_conv_forward"]


def test_a_program_takes_what_is_estimated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    answering(monkeypatch, "print(3000)")
    inside = operations()
    durations = Durations(
        Traffic(Computations("HloModule jit_step\n\n", jax.make_mesh((1,), ("fsdp",)))), V5E.chip, KernelCycles(V5E, tmp_path)
    )
    assert durations.of(inside["conv.1"], inside) == (pytest.approx(3000 / 1.5e9), "exact")


@pytest.mark.parametrize(
    ("answer", "changed", "reason"),
    [
        ("import os; os.abort()", {}, "no estimate"),
        ("print('null')", {}, "no estimate"),
        ("print(9)", {"flops": 10**9}, "below its operations at the peak"),
        ("print(9)", {"list_": "s32[512]{0}"}, "control is read from memory"),
        ("print(9)", {"code": ""}, "does not hold its code"),
        ("raise ValueError('strange')", {}, "strange"),
    ],
)
def test_a_kernel_without_an_estimate_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, changed: dict, reason: str
):
    answering(monkeypatch, answer)
    cycles = KernelCycles(V5E, tmp_path)
    assert of(cycles, operations(**changed)) is None
    assert reason in cycles.unknown["short_conv_forward"]
    assert cycles.described()["made"] == 0


def test_gpus_have_no_estimates(tmp_path: Path):
    cycles = KernelCycles(parse_target("h100:1x4"), tmp_path)
    assert of(cycles, operations()) is None
    assert "h100" in cycles.unknown["short_conv_forward"]


@TPU
def test_libtpu_estimates_a_kernel_of_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.undo()
    where = SingleDeviceSharding(describe_devices(V5E)[0])
    array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16", sharding=where)
    found = []
    for length in (512, 1024):
        with target("v5e"):
            compiled = jax.jit(lambda x, w: short_conv(x, w)[0]).lower(array(1, length, 512), array(4, 512)).compile()
        program = Computations(compiled.as_text(), jax.make_mesh((1,), ("fsdp",)))
        inside = Traffic(program).operations(program.entry)
        (kernel,) = (one for one in inside.values() if one.opcode == "custom-call" and "tpu_custom_call" in one.line)
        cycles = KernelCycles(V5E, tmp_path)
        found.append(cycles.of(kernel, inside))
        assert cycles.described() == {"made": 1, "kept": 0, "unknown": {}}
    assert 1.2 * found[0] < found[1] < 2.5 * found[0]
