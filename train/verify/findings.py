"""What a verification found, line by line: as a table, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Status = Literal["passed", "failed", "declined", "skipped"]
_STYLES = {"failed": "red", "declined": "yellow", "skipped": "dim", "passed": "green"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line."""

    part: str
    """The part of the verification."""
    what: str
    """What was tried."""
    op: str = ""
    """The op that it is about, if any."""
    by: str = ""
    """What computed it: an implementation, a peer, an axis of the mesh."""
    status: Status = "passed"
    detail: str = ""
    """In words and numbers: what was found, or why not."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The same for programs: seconds, relative errors, bytes a second and the like, by name."""


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """Those that failed."""
    return [finding for finding in findings if finding.status == "failed"]


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """What `json.dumps` takes."""
    return [asdict(finding) for finding in findings]


def show(findings: Sequence[Finding], console: Console) -> None:
    """A table a part."""
    for part in dict.fromkeys(finding.part for finding in findings):
        table = Table(title=part, title_justify="left", box=None, pad_edge=False)
        for name in ("what", "by", "", "found"):
            table.add_column(name, overflow="fold")
        for one in findings:
            if one.part == part:
                table.add_row(one.what, one.by, f"[{_STYLES[one.status]}]{one.status}", one.detail.replace("[", r"\["))
        console.print(table, markup=True)
        console.print()
