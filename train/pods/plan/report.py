"""A plan as tables on the screen, as a page and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.configs.files import write_atomically
from plait.train.pods.plan.compiled.durations import SOURCES
from plait.train.pods.plan.compiled.kernel_cycles import KernelCycles
from plait.train.pods.plan.decoding import decoding
from plait.train.pods.plan.memory import size_text
from plait.train.pods.plan.roofline import ASSUMPTIONS, Times
from plait.train.pods.plan.search import Candidate
from plait.train.pods.plan.step_plan import Plan
from plait.train.terminal.progress import format_seconds

Row = tuple[str, ...]
PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Section:
    """A table, or notes without one."""

    title: str
    columns: Row = ()
    rows: Sequence[Row] = ()
    notes: Sequence[str] = ()


def sections(plan: Plan) -> list[Section]:
    """Everything a plan says, in order."""
    return [
        _summary(plan),
        _memory(plan),
        _flops(plan),
        *_decoding(plan),
        _collectives(plan),
        _layer_exchange(plan),
        *_parts_of_rows(plan),
        _roofline(plan),
        *_time_of_layers(plan),
        _warnings(plan),
        _fixes(plan),
    ]


def headline(plan: Plan) -> str:
    """What the plan comes to, in a line."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    memory = plan.memory
    limit = "" if memory.limit is None else f" of {size_text(memory.limit)}"
    fits = f"{'fits' if plan.fits else 'DOES NOT FIT'}: {size_text(memory.total)}{limit} a device"
    speed = ""
    if (clock := plan.times) is not None:
        likely = clock.bound if clock.scheduled is None else clock.scheduled
        scheduled = "" if clock.scheduled is None else f", as scheduled {likely:.3g} s"
        speed = f"; a step at best {clock.bound:.3g} s{scheduled}, MFU {clock.mfu_in(likely):.0%}"
    return f"{plan.config.name} on {plan.target.name}{f' x {plan.target.slices}' if plan.target.slices > 1 else ''} ({mesh}) {fits}{speed}"


def _summary(plan: Plan) -> Section:
    config = plan.config
    rows = [
        ("devices", f"{plan.target.num_devices:,} of {plan.target.generation}"),
        ("mesh", ", ".join(f"{name} {size}" for name, size in plan.mesh.items())),
        (
            "batch",
            f"{config.data.batch_size:,} rows of {config.data.seq_len:,} tokens, {config.optimizer.accumulate} micro-batches",
        ),
        ("recomputation", f"model.remat={config.model.remat}"),
        ("kernels", "; ".join(f"{op}: {names}" for op, names in plan.kernels.items())),
        *_cycles(plan.cycles),
        (
            "planned in",
            f"{plan.total_seconds:.0f} s: lowering {plan.lower_seconds:.0f} s, compiling {plan.compile_seconds:.0f} s",
        ),
    ]
    return Section("Step", ("", ""), rows)


def _memory(plan: Plan) -> Section:
    memory = plan.memory
    parts = ["parameters", "optimizer", "batch", "temporaries", "program"]
    names = {"optimizer": "optimizer state", "temporaries": "activations, gradients, temporaries", "program": "program, padding"}
    rows = [(names.get(part, part), size_text(getattr(memory, part))) for part in parts]
    rows.append(("total", size_text(memory.total)))
    if memory.limit is not None:
        rows += [("limit", size_text(memory.limit)), ("headroom", size_text(memory.headroom or 0.0))]
    if memory.host:
        rows.append(("in the host's memory", size_text(memory.host)))
    notes = [] if memory.compiled else ["The compiler gave no account: an estimate."]
    if not plan.fits:
        notes.append(f"Does not fit. The largest part: {names.get(memory.largest, memory.largest)}.")
        if plan.refusal is not None:
            notes.append(f"The compiler: {plan.refusal.splitlines()[0]}")
        notes += [f"One of the largest arrays: {line}" for line in plan.largest]
        notes += [
            f"By estimate {size_text(size)} of {name}." for name, size in memory.estimate.items() if size > 0.02 * memory.total
        ]
    return Section("Memory of a device", ("part", ""), rows, notes)


def _flops(plan: Plan) -> Section:
    total = sum(row.forward for row in plan.layers)
    rows = [
        (row.name, str(row.count), _mega(row.products), _mega(row.mixing), f"{row.forward / total:.1%}", _mega(row.recomputed))
        for row in plan.layers
    ]
    rows.append(("total", "", _mega(sum(r.products for r in plan.layers)), _mega(sum(r.mixing for r in plan.layers)), "100%",
                 _mega(sum(r.recomputed for r in plan.layers))))  # fmt: skip
    extra = plan.flops.hardware / plan.flops.model - 1
    notes = [
        f"A step: {plan.flops.model / 1e12:.3g} TFLOP of the model a device (three times the forward pass), {plan.flops.hardware / 1e12:.3g} "
        f"with what is computed again{' and the idle ticks of the pipeline' if plan.config.mesh.pipeline > 1 else ''} (+{extra:.0%})."
    ]
    if plan.intensity is not None and plan.traffic is not None and plan.target.chip is not None:
        ridge = plan.target.chip.flops / plan.target.chip.memory_bandwidth
        notes.append(
            f"Arithmetic intensity: {plan.intensity:.0f} FLOP a byte of {size_text(plan.traffic)} of memory traffic; the chip's own "
            f"ratio is {ridge:.0f}."
        )
    columns = ("layers", "count", "products", "mixing", "share", "computed again")
    return Section("Forward operations a token, MFLOP", columns, rows, notes)


def _decoding(plan: Plan) -> list[Section]:
    if not plan.config.model.causal:
        return []
    chip, rows = plan.target.chip, []
    for one in decoding(plan.config.model):
        least = "-" if chip is None else f"{one.seconds(chip) * 1e3:.3g}"
        rows.append((f"{one.context:,}", size_text(one.state), size_text(one.growing), f"{one.flops / 1e9:,.3g}", least))
    notes = [
        "One sequence: its caches and states, of which caches grow. The least time is that of one device reading weights and state, or "
        "of its operations; a bound, not a measurement."
    ]
    columns = ("tokens before", "state", "of it caches", "GFLOP", "least ms")
    return [Section("Decoding a token", columns, rows, notes)]


def _collectives(plan: Plan) -> Section:
    rows = []
    for i, one in enumerate(plan.collectives):
        seconds = (f"{plan.seconds[i] * 1e3:.2f}", f"{plan.waits[i] * 1e3:.2f}") if plan.seconds else ("-", "-")
        rows.append((one.kind, " x ".join(one.axes), f"{one.count:,}", size_text(one.bytes), *seconds))
    notes = [f"Over {name}: {text}." for name, text in plan.routes.items() if text]
    if plan.refusal is None and not rows:
        notes.append("None.")
    return Section("Collectives of a device in a step", ("kind", "axes", "count", "full arrays", "ms", "not hidden"), rows, notes)


def _layer_exchange(plan: Plan) -> Section:
    rows = [
        (layer, " x ".join(axes), f"{count:,}", size_text(size)) for (layer, axes), (count, size) in plan.layer_exchange.items()
    ]
    notes = ["A collective that the compiler made of several counts for one of them."] if rows else ["None."]
    return Section("The same by kind of layer", ("layers", "axes", "count", "full arrays"), rows, notes)


def _parts_of_rows(plan: Plan) -> list[Section]:
    if not plan.exchanges:
        return []
    taken, best = plan.config.mesh.context_exchange, plan.exchanges[0]
    rows: list[Row] = []
    for one in plan.exchanges:
        name = one.exchange + (", as planned" if one.exchange == taken else "")
        if one.alike:
            rows.append((name, "as gathered", "", "", "", "", ""))
            continue
        times = (f"{seconds * 1e3:.1f}" for seconds in (one.seconds, one.exposed, one.merging))
        rows.append((name, f"{one.sends:,}", size_text(one.bytes), *times, size_text(one.held)))
    notes = [
        f"By estimate the best is mesh.context_exchange={best.exchange}{', as planned' if best.exchange == taken else ''}: "
        f"{best.waited * 1e3:.3g} ms of a step, not hidden or merging parts.",
        "Read from the traced layers, not compiled: what the layout calls for. What goes round is taken to be hidden by the attention to a "
        "part, at the peak, as far as that lasts, and the rest by nothing; merging parts is memory traffic at the peak; the time it takes to "
        "begin a send is not known and not counted.",
    ]
    columns = ("exchange", "sends", "full arrays", "ms", "not hidden", "merging", "room in a layer")
    return [Section("Ways for parts of rows to meet, by estimate", columns, rows, notes)]


def _roofline(plan: Plan) -> Section:
    if plan.times is None or plan.target.chip is None:
        return Section("Time", notes=["No time without a compiled program and the chip's data."])
    clock, chip = plan.times, plan.target.chip
    rows = [
        ("operations", f"{clock.compute * 1e3:.1f}", f"{chip.flops / 1e12:.0f} TFLOP/s"),
        ("memory traffic", f"{clock.memory * 1e3:.1f}", f"{chip.memory_bandwidth / 1e9:.0f} GB/s"),
        (
            "exchange",
            f"{clock.exchange * 1e3:.1f}",
            f"links of {chip.link / 1e9:.0f} GB/s, network {chip.network / 1e9:.3g} GB/s",
        ),
        ("bound, all overlapped", f"{clock.bound * 1e3:.1f}", f"limited by {clock.limited_by}; MFU at most {clock.mfu:.1%}"),
        *_scheduled(clock),
        ("nothing overlapped", f"{clock.serial * 1e3:.1f}", f"MFU {clock.mfu_in(clock.serial):.1%}"),
    ]
    notes = [
        f"At the bound {plan.tokens_per_second:,.0f} tokens a second in all.",
        whole_run(plan.config, plan.target.num_devices, clock),
        "A bound, not a measurement. Assumptions:",
        *ASSUMPTIONS,
        f"chip: {chip.source}",
    ]
    return Section("Least time of a step, ms", ("", "ms", ""), rows, notes)


def _cycles(cycles: KernelCycles | None) -> list[tuple[str, str]]:
    if cycles is None:
        return []
    rows = [("cycles of kernels", f"{len(cycles.made)} estimated now, {len(cycles.kept)} known from before, in {cycles.folder}")]
    return rows + [("", f"{name} by the share of its kind: {reason}") for name, reason in cycles.unknown.items()]


def _scheduled(clock: Times) -> list[Row]:
    if clock.schedule is None:
        return []
    seconds, parts = clock.schedule.seconds, clock.schedule.by_source()
    rows = [("as scheduled", f"{seconds * 1e3:.1f}", f"MFU {clock.mfu_in(seconds):.1%}")]
    rows += [("", f"{parts[source] * 1e3:.1f}", f"of it {text}") for source, text in SOURCES.items() if parts.get(source)]
    return [*rows, ("", f"{sum(clock.schedule.waits.values()) * 1e3:.1f}", "of it exchange that nothing hides")]


def _time_of_layers(plan: Plan) -> list[Section]:
    schedule = plan.times and plan.times.schedule
    if not schedule:
        return []
    sources = {source: text for source, text in SOURCES.items() if source != "exact" or plan.cycles is not None}
    rows = [
        (
            layer,
            *(f"{schedule.work.get((layer, source), 0.0) * 1e3:.1f}" for source in sources),
            f"{seconds / schedule.seconds:.1%}",
        )
        for layer, seconds in schedule.by_layer().items()
    ]
    rows.append(("waiting", *[""] * len(sources), f"{sum(schedule.waits.values()) / schedule.seconds:.1%}"))
    return [Section("Time as scheduled by kind of layer, ms", ("layers", *sources.values(), "share"), rows)]


def whole_run(config: ExperimentConfig, num_devices: int, clock: Times) -> str:
    """What all steps of a run come to, in time and hours of devices."""
    least, most = (config.steps * seconds for seconds in (clock.bound, clock.scheduled or clock.serial))
    tokens = config.steps * config.data.batch_size * config.data.seq_len
    hours = (seconds * num_devices / 3600 for seconds in (least, most))
    said = " to ".join(f"{one:,.0f}" if one >= 100 else f"{one:.2g}" for one in hours)
    return (
        f"All {config.steps:,} steps, of {tokens / 1e9:,.3g}B tokens: {format_seconds(least)} with all of it overlapped to "
        f"{format_seconds(most)} {'with nothing' if clock.scheduled is None else 'as scheduled'}, {said} device-hours; validation, "
        "checkpoints and restarts come on top."
    )


def _warnings(plan: Plan) -> Section:
    return Section(
        "Worth a look",
        notes=plan.warnings or ["Nothing unusual was compiled." if plan.refusal is None else "Nothing was compiled."],
    )


def _fixes(plan: Plan) -> Section:
    if plan.fits:
        return Section("Changes", notes=["It fits as it is; --search ranks other layouts."])
    if not plan.fixes:
        return Section(
            "Changes", notes=["No mesh, recomputation or micro-batch of this model and batch fits: take more or larger devices."]
        )
    rows = [(fix.overrides, size_text(fix.memory.total), size_text(fix.memory.headroom or 0.0)) for fix in plan.fixes]
    return Section(
        "What would fit, by estimate",
        ("change", "memory", "headroom"),
        rows,
        ["Plan again with one of them to have it compiled."],
    )


def search_section(found: Sequence[Candidate], tried: int, most: int = 10) -> Section:
    """The best layouts of a search."""
    rows = []
    for rank, one in enumerate(found[:most], 1):
        clock = one.times
        rows.append((
            str(rank), one.overrides, "compiled" if one.plan else ("failed" if one.failure else "estimate"),
            size_text(one.memory.total) + ("" if one.memory.fits else " does not fit"),
            f"{clock.bound * 1e3:.0f}" if clock else "-", f"{clock.serial * 1e3:.0f}" if clock else "-", f"{clock.mfu:.0%}" if clock else "-",
        ))  # fmt: skip
    compiled = sum(c.plan is not None for c in found)
    notes = [f"{tried:,} layouts estimated, {len(found):,} fit, {compiled} compiled. Ranked by the mean of the two times."]
    notes += [f"Could not be compiled: {c.overrides}: {c.failure}" for c in found if c.failure]
    return Section("Layouts", ("", "overrides", "numbers", "memory", "bound ms", "serial ms", "MFU"), rows, notes)


def show(console: Console, parts: Sequence[Section]) -> None:
    """Prints sections."""
    for part in parts:
        if part.rows:
            table = Table(title=part.title, title_justify="left")
            for column in part.columns:
                table.add_column(column, overflow="fold")
            for row in part.rows:
                table.add_row(*row)
            console.print(table)
        else:
            console.print(part.title, style="italic")
        for note in part.notes:
            console.print(f"  {note}", markup=False, highlight=False)


def write(folder: Path, parts: Sequence[Section], title: str, data: dict[str, Any]) -> None:
    """Writes `plan.json` and `plan.md`. Raises FileExistsError where the folder holds a plan."""
    write_atomically(folder / PLAN, json.dumps(data, indent=2) + "\n", new=True)
    write_atomically(folder / "plan.md", _markdown(title, parts))


def to_json(plan: Plan) -> dict[str, Any]:
    """Every number of a plan."""
    clock, memory = plan.times, plan.memory
    return {
        "preset": plan.config.name,
        "target": {"name": plan.target.name, "generation": plan.target.generation, "slices": plan.target.slices,
                   "devices": plan.target.num_devices, "chip": dataclasses.asdict(plan.target.chip) if plan.target.chip else None},
        "mesh": plan.mesh,
        "fits": plan.fits,
        "memory": {**dataclasses.asdict(memory), "total": memory.total, "headroom": memory.headroom},
        "flops": {**dataclasses.asdict(plan.flops), "layers": [dataclasses.asdict(row) for row in plan.layers]},
        "decoding": [dataclasses.asdict(one) for one in decoding(plan.config.model)] if plan.config.model.causal else [],
        "traffic": plan.traffic,
        "intensity": plan.intensity,
        "collectives": [
            {**dataclasses.asdict(c), "seconds": seconds, "not_hidden": waits}
            for c, seconds, waits in itertools.zip_longest(plan.collectives, plan.seconds, plan.waits)
        ],
        "layer_exchange": [
            {"layers": layers, "axes": axes, "count": count, "bytes": size}
            for (layers, axes), (count, size) in plan.layer_exchange.items()
        ],
        "context_exchanges": [dataclasses.asdict(one) for one in plan.exchanges],
        "times": _times(clock),
        "assumptions": list(ASSUMPTIONS),
        "warnings": plan.warnings,
        "refusal": plan.refusal,
        "fixes": [{"overrides": fix.overrides, "memory": dataclasses.asdict(fix.memory)} for fix in plan.fixes],
        "kernels": plan.kernels,
        "kernel_cycles": plan.cycles and plan.cycles.described(),
        "seconds": {"lower": plan.lower_seconds, "compile": plan.compile_seconds, "total": plan.total_seconds},
        "config": codec.encode(plan.config),
    }  # fmt: skip


def _times(clock: Times | None) -> dict[str, Any] | None:
    """Seconds of a step, those of the schedule by what is known of them."""
    if clock is None:
        return None
    names = ("compute", "memory", "exchange", "model_flops", "peak", "bound", "scheduled", "serial", "mfu", "limited_by")
    plan = clock.schedule
    parts: dict[str, float] | None = None if plan is None else {**plan.by_source(), "waiting": sum(plan.waits.values())}
    layers = None if plan is None else plan.by_layer()
    return {name: getattr(clock, name) for name in names} | {"schedule": parts, "layers": layers}


def search_json(found: Sequence[Candidate]) -> list[dict[str, Any]]:
    """The candidates of a search."""
    return [
        {
            "overrides": c.overrides,
            "compiled": c.plan is not None,
            "failure": c.failure,
            "memory": dataclasses.asdict(c.memory),
            "bound": c.times.bound if c.times else None,
            "serial": c.times.serial if c.times else None,
        }
        for c in found
    ]


def _markdown(title: str, parts: Sequence[Section]) -> str:
    lines = [f"# {title}", ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        if part.rows:
            lines += ["| " + " | ".join(part.columns) + " |", "|" + "---|" * len(part.columns)]
            lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in part.rows] + [""]
        lines += [f"- {note}" for note in part.notes] + ([""] if part.notes else [])
    return "\n".join(lines)


def _mega(value: float) -> str:
    return f"{value / 1e6:,.3g}" if 0 < value < 1e8 else f"{value / 1e6:,.0f}" if value else "-"
