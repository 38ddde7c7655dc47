"""The report on an inspection: the page of `report`, of one step and by layer, with the text token by token."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from plait.configs import codec
from plait.train.inspection.inspecting import RESULTS, Found, Inspection
from plait.train.inspection.needles import STATISTIC, TITLES
from plait.train.probes.collect import describe_layers
from plait.train.report import Markup, Section, page, write_page
from plait.train.report.panels import attention, maps, tokens
from plait.train.report.panels.depth import by_depth
from plait.train.report.run import Attention, Run, derived_events, quantity
from plait.train.report.standing_out import standing_out
from plait.train.report.style import RC
from plait.train.run_folder.probe_files import ProbeSeries


def write_inspection(found: Inspection, out: Path) -> Path:
    """The path of the new `index.html` in `out`."""
    runs = [_run(found, one, place, out) for place, one in enumerate(found.models)]
    with matplotlib.rc_context(RC):
        sections = _sections(found, runs)
    config = found.trained.program.config
    told = {
        "preset": config.name,
        "pattern": config.model.pattern,
        "step": f"{found.trained.step:,}",
        "parameters": quantity(found.trained.program.blueprint.num_params),
        "text": found.options.text.name,
        "tokens read": f"{found.read:,}",
        "loss": f"{found.models[0].loss:.3f}",
    }
    head = page.titled("plait inspection", found.run.name, told) + page.strip(runs[:1])
    made = f"from the checkpoint and the text; all numbers are in {RESULTS}"
    return write_page(out, f"plait inspection: {found.run.name}", head, sections, made)


def _run(found: Inspection, one: Found, place: int, out: Path) -> Run:
    """What a model does, as a run of one probe step."""
    config, step = found.trained.program.config, found.trained.step
    series = {name: values[None] for name, values in one.statistics.items()}
    probes = ProbeSeries(np.asarray([step]), series, describe_layers(config.model), found.options.probe.first_k)
    return Run(
        path=out,
        name=one.masking.name,
        config=codec.encode(config),
        environment={},
        records=[{"step": step, "loss/val": one.loss}],
        events=derived_events(probes),
        probes=probes,
        attention=Attention(one.tokens.maps, one.tokens.names, step),
        notes=[],
        beside={STATISTIC.name: STATISTIC},
        place=place,
    )


def _sections(found: Inspection, runs: list[Run]) -> list[Section]:
    first = [one.tokens for one in found.models]
    names = [run.name for run in runs]
    declared = [one for one in runs[0].statistics.values() if one.panel is not None]
    there = [one for one in declared if any(run.by_head(one.name) is not None for run in runs)]
    sections = dict.fromkeys(one.panel.section for one in there if one.panel is not None)
    by_layer: list[Section] = [
        Section(
            title, title, [by_depth(page.anchor(title), runs, [one for one in there if one.panel and one.panel.section == title])]
        )
        for title in sections
    ]
    final = maps.final(runs, there)
    pictures = [attention.pictures(index, run, found.heads) for index, run in enumerate(runs)]
    return [
        Section("Summary", "What the model does on the text", [Markup(_summary(found))]),
        Section(
            "Tokens",
            "Token by token",
            [Markup(page.lead(_shown(found)))]
            + [draw(names, first, found.window.told) for draw in (tokens.received, tokens.sizes, tokens.made_of)],
        ),
        Section(
            "Pictures",
            "Attention pictures",
            [Markup(page.lead(_shown(found)))]
            + [
                item
                for index, run in enumerate(runs)
                for item in ([Markup(page.heading(run))] if len(runs) > 1 else []) + [pictures[index]]
            ]
            + [Markup(_losses(found))],
        ),
        *by_layer,
        Section("Heads", "Every head", [] if final is None else [final]),
        Section("Events", "What stands out", [Markup(standing_out(runs)) or "Nothing that is watched is out of its bounds."]),
        Section("Definitions", "Definitions", [Markup(page.definitions(runs[:1]))]),
        Section("Settings", "Settings", [Markup(page.sources(runs[:1]))]),
    ]


def _summary(found: Inspection) -> str:
    """Each model's loss and recall in a table, and the sentences that say what they are of."""
    rows = [
        [
            one.masking.name,
            ", ".join(f"{layer}.{head}" for layer, head in one.masking.heads) or "–",
            f"{one.loss:.4f}",
            *one.recall.cells,
        ]
        for one in found.models
    ]
    head = ["model", "heads left out", "loss (nats/token)", *TITLES]
    needle = found.options.needle
    text = (
        f"Read: {found.part} tokens of {found.options.text.name}, in rows of {found.length}. Needles: {found.needles} of "
        f"{needle.cue + needle.answer} tokens drawn from the text's own, in prompts of {found.prompt_length} tokens; after its first "
        f"{needle.cue} the model is to say the other {needle.answer}."
    )
    return page.lead(text) + page.table(head, rows, numbers=range(2, len(head)))


def _shown(found: Inspection) -> str:
    window = found.window
    return f"Of {window.words}" + (
        f", read after {window.before} before them, which stand as one, {window.name}." if window.before else "."
    )


def _losses(found: Inspection) -> str:
    """The tokens that are shown, with their loss, folded."""
    head = ["token", *(f"loss, {one.masking.name}" for one in found.models)]
    losses = [one.tokens.losses for one in found.models]
    rows = [
        [attention.shown(name, 24), *("–" if np.isnan(loss[i]) else f"{loss[i]:.3f}" for loss in losses)]
        for i, name in enumerate(found.models[0].tokens.names)
    ]
    told = page.table(head, rows, numbers=range(1, len(head)))
    return f"<details><summary>The text, token by token, with the loss of each</summary>{told}</details>"
