"""`launch.py plan`: plans, shows and saves."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
from rich.console import Console

from plait.configs.experiment import ExperimentConfig
from plait.configs.files import first_new
from plait.train.pods.plan.planning import make_plan
from plait.train.pods.plan.report import PLAN, headline, search_json, search_section, sections, show, to_json, write
from plait.train.pods.plan.search import search as find_layouts
from plait.train.pods.plan.step_plan import Plan, check_batch
from plait.train.pods.plan.topology import TargetError, parse_target
from plait.train.whole_rows import whole_rows

log = logging.getLogger("plait")


def run_plan(
    config: ExperimentConfig,
    target: str,
    *,
    slices: int,
    search: int | None,
    exact: bool = False,
    out: Path | None,
    console: Console,
) -> Plan | None:
    """Plans `config` for the machine named `target`; returns the plan, in a search the best compiled one.

    Args:
        slices: of a TPU pod.
        search: layouts to compile in a search for others; None for no search.
        exact: each kernel has an estimate of its own, made where none is kept.
        out: folder to write; None takes plans/PRESET-TARGET. One that holds a plan when this one is made stays, and PRESET-TARGET-2 and so
            on follow it.

    Raises:
        ValueError: the target is unknown, what is asked for does not fit together, or `out` holds a plan; nothing was compiled.
    """
    machine = parse_target(target, slices)
    if search is not None and machine.chip is None:
        raise TargetError(f"target={target!r} has no peak to rank by; --search is for TPUs and GPUs")
    if search is not None and exact:
        raise ValueError("--exact estimates the kernels of one layout; leave out --search")
    if out is not None:
        _check_new(out)
    if machine.chip is not None:
        jax.config.update("jax_platforms", "cpu")  # what is described is not at hand, and what is at hand is not asked
    for notice in whole_rows(config):
        log.info("%s", notice)
    plan: Plan | None
    if search is None:
        check_batch(config, machine)
        plan = make_plan(config, machine, exact=exact)
        parts, data, title = sections(plan), to_json(plan), headline(plan)
    else:
        found, tried = find_layouts(config, machine, search)
        best = next((c.plan for c in found if c.plan is not None and c.plan.fits), None)
        plan = best
        parts = [search_section(found, tried), *(sections(best) if best else ())]
        title = headline(best) if best else f"{config.name} on {machine.name}: {len(found)} layouts fit by estimate"
        data = {"layouts": search_json(found), **(to_json(best) if best else {})}
    usual = Path("plans") / f"{config.name}-{machine.label()}"
    folder = first_new(out or usual, lambda folder: write(folder, parts, title, data), folder=True)
    show(console, parts)
    console.print(title, markup=False, highlight=False, style="bold")
    console.print(f"plan: {folder / 'plan.md'}", markup=False, highlight=False)
    return plan


def _check_new(out: Path) -> None:
    """Raises ValueError where a plan cannot be written."""
    if (out / PLAN).exists():
        raise ValueError(f"out={str(out)!r} already holds a plan; use another --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; give a folder")
