"""The texts of one file, with an error that names the place for whatever cannot be read."""

from __future__ import annotations

import bz2
import contextlib
import difflib
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from plait.data.config import DataError
from plait.data.remote.tree import fetch
from plait.data.sources import megatron

_PIECE = 1 << 16
_BOM = b"\xef\xbb\xbf"


class Fields(NamedTuple):
    """The fields or columns of a document."""

    text: str
    prompt: str | None = None
    """None where documents have none."""


class Document(NamedTuple):
    """A text, and what stands before it and is given; or tokens that have been made of one."""

    text: str
    prompt: str = ""
    ids: np.ndarray | None = None
    """Integers [n], in which end tokens may stand between documents; the text is then empty."""


Span = tuple[int, int]
"""A part of a file that can be read alone: bytes of a `.jsonl`, row groups of a `.parquet`, sequences of an `.idx`."""


def ending(file: Path) -> str | None:
    """What a file is read as: `.txt`, `.jsonl.gz` and so on, a key of `READERS`; None for one that is not read."""
    name = file.name.lower()
    return next((known for known in READERS if name.endswith(known)), None)


def documents(file: Path, fields: Fields, span: Span | None = None) -> Iterator[Document]:
    """The documents of a file one by one, empty ones included; with a span, those that begin in it.

    Raises:
        DataError: it does not hold what its ending says.
        OSError: it cannot be read.
    """
    kind = ending(file) or ""
    fetch([file, file.with_suffix(".bin")] if kind == ".idx" else [file])
    return READERS[kind](file, fields) if span is None else _SPANNED[kind](file, fields, span)


def spans(file: Path, size: int) -> list[Span]:
    """Parts of about `size` bytes that can be read alone; empty for a file that is read as a whole.

    Raises:
        DataError: it does not hold what its ending says.
        OSError: it cannot be read.
    """
    kind, whole = ending(file), file.stat().st_size
    if kind in (".parquet", ".idx"):
        fetch([file])
    if kind == ".jsonl":
        return list(itertools.pairwise([*range(0, whole, size), whole])) if whole else []
    if kind == ".parquet":
        with _opened_parquet(file) as table:
            sizes = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
    elif kind == ".idx":
        sizes = megatron.document_bytes(file).tolist()
    else:
        return []
    edges, filled = [0], 0
    for number, one in enumerate(sizes):
        if filled and filled + one > size:
            edges.append(number)
            filled = 0
        filled += one
    return list(itertools.pairwise([*edges, len(sizes)])) if sizes else []


def _plain(
    read: Callable[[IO[bytes], Path, Fields], Iterator[Document]], unpack: Callable[[Path], Any] | None, suffix: str
) -> Reader:
    """The reader of a format of text, packed by `unpack` or not."""

    def packed(file: Path, fields: Fields) -> Iterator[Document]:
        if unpack is None:
            with file.open("rb") as stream:
                yield from read(stream, file, fields)
            return
        try:
            if not file.stat().st_size:
                raise EOFError("it has no bytes")
            with unpack(file) as stream:
                yield from read(stream, file, fields)
        except DataError:
            raise
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(
                f"{file} is not a whole {suffix} file: {short(str(error))}; write it again, or take it away"
            ) from None

    return packed


class _Streams(io.RawIOBase):
    """What is packed in the streams of a file, one after another to its end: the standard library's readers stop in silence at the
    first that they cannot read. Zeros may stand between streams."""

    def __init__(self, file: Path, new: Callable[[], Any]):
        self._packed, self._new = file.open("rb"), new
        self._stream = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")
                while not packed and (more := self._packed.read(_PIECE)):
                    packed = more.lstrip(b"\0")
                if not packed:
                    return 0
                self._stream = self._new()
            elif self._stream.needs_input and not (packed := self._packed.read(_PIECE)):
                raise EOFError("it ends in the middle")
            if found := self._stream.decompress(packed, len(buffer)):
                buffer[: len(found)] = found
                return len(found)

    def close(self) -> None:
        self._packed.close()
        super().close()


def _zstandard(file: Path) -> IO[bytes]:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))


def _txt(stream: IO[bytes], file: Path, fields: Fields) -> Iterator[Document]:
    raw = stream.read().removeprefix(_BOM)
    if (at := raw.find(b"\0")) >= 0:
        raise DataError(f"{file} is not text: NUL byte at offset {at}; convert it to UTF-8 text, or take the file away")
    if fields.prompt is not None:
        raise DataError(
            f"{file} has no fields, and data.prompt_field={fields.prompt!r} names one; leave it out, or give .jsonl, .json or .parquet"
        )
    yield Document(_decode(raw, str(file)))


def _jsonl_span(file: Path, fields: Fields, span: Span) -> Iterator[Document]:
    with file.open("rb") as stream:
        if span[0]:
            stream.seek(span[0] - 1)
            stream.readline()  # the end of a line that begins before

        def lines() -> Iterator[bytes]:
            at = stream.tell()
            while at < span[1] and (line := stream.readline()):
                at += len(line)
                yield line

        yield from _jsonl(lines(), file, fields, stream.tell())


def _jsonl(lines: Iterable[bytes], file: Path, fields: Fields, offset: int = 0) -> Iterator[Document]:
    first = offset
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}" + (f" after byte {first}" if first else "")
        raw = line.removeprefix(_BOM) if number == 1 and not first else line
        if raw.strip():
            value = _parse(_decode(raw, where, offset + len(line) - len(raw)), where, "put one JSON object a line")
            yield _document(value, fields, where)
        offset += len(line)


def _json(stream: IO[bytes], file: Path, fields: Fields) -> Iterator[Document]:
    """An array of objects, one object, or, as many data sets call it, one object a line."""
    first = stream.readline()
    try:
        by_line = isinstance(json.loads(first.removeprefix(_BOM)), dict)
    except (ValueError, RecursionError):
        by_line = False
    if by_line:
        yield from _jsonl(itertools.chain([first], stream), file, fields)
        return
    raw = (first + stream.read()).removeprefix(_BOM)
    if not raw.strip():
        return
    value = _parse(_decode(raw, str(file)), str(file), "give an array of objects, one object, or one object a line")
    for number, record in enumerate(value) if isinstance(value, list) else [(0, value)]:
        yield _document(record, fields, f"{file}, record {number}")


def _parse(text: str, where: str, fix: str) -> Any:
    try:
        return json.loads(text)  # of any program: what it holds beside the text is not looked at
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where} is not JSON: {what}: {short(text)}; {fix}") from None


@contextlib.contextmanager
def _opened_parquet(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.stat().st_size:
        raise DataError(f"{file} is empty, which no parquet file is; write it again, or take it away")
    try:
        with pq.ParquetFile(file) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a whole parquet file: {short(str(error))}; write it again, or take it away") from None


def _parquet(file: Path, fields: Fields, span: Span | None = None) -> Iterator[Document]:
    with _opened_parquet(file) as table:
        wanted = _wanted_columns(table.schema_arrow.names, file, fields)
        groups = None if span is None else list(range(*span))
        row = sum(table.metadata.row_group(i).num_rows for i in range(span[0])) if span else 0
        yield from _rows(table.iter_batches(batch_size=256, row_groups=groups, columns=wanted), wanted, file, row)


def _arrow(file: Path, fields: Fields) -> Iterator[Document]:
    """An Arrow file or stream (as data sets keep them)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as raw:
            try:
                opened: Any = pa.ipc.open_file(raw)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            except pa.ArrowInvalid:
                raw.seek(0)
                opened = batches = pa.ipc.open_stream(raw)
            wanted = _wanted_columns(opened.schema.names, file, fields)
            yield from _rows(batches, wanted, file, 0)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a whole Arrow file: {short(str(error))}; write it again, or take it away") from None


def _wanted_columns(names: list[str], file: Path, fields: Fields) -> list[str]:
    wanted = [name for name in fields if name is not None]
    for name in wanted:
        if name not in names:
            raise _missing(name, names, str(file), "column", fields)
    return wanted


def _rows(batches: Iterable[Any], wanted: list[str], file: Path, row: int) -> Iterator[Document]:
    for batch in batches:
        for values in zip(*(batch.column(name) for name in wanted), strict=True):
            where = f"{file}, row {row}"
            yield _made([_value(value, where) for value in values], wanted, where)
            row += 1


def _megatron(file: Path, fields: Fields, span: Span | None = None) -> Iterator[Document]:
    if fields.prompt is not None:
        raise DataError(f"{file} has no fields, and data.prompt_field={fields.prompt!r} names one; leave it out")
    for ids in megatron.documents(file, span):
        yield Document("", ids=ids)


def _value(value: Any, where: str) -> object:
    try:
        if hasattr(value, "values") and value.is_valid and hasattr(value.values, "to_numpy"):  # a list: not number by number
            return value.values.to_numpy(zero_copy_only=False)
        return value.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where) from None


def _decode(raw: bytes, where: str, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where, offset) from None


def _not_utf8(error: UnicodeDecodeError, where: str, offset: int = 0) -> DataError:
    return DataError(
        f"{where} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start}; "
        "convert it with `iconv -f <its encoding> -t utf-8`, or take it away"
    )


def _document(record: object, fields: Fields, where: str) -> Document:
    if not isinstance(record, dict):
        raise DataError(
            f"{where} is {type(record).__name__}, not an object: {short(repr(record))}; give objects with the text in a field"
        )
    wanted = [name for name in fields if name is not None]
    for name in wanted:
        if name not in record:
            raise _missing(name, list(record), where, "field", fields)
    return _made([record[name] for name in wanted], wanted, where)


def _made(values: Sequence[object], names: Sequence[str], where: str) -> Document:
    """The document of these fields: a text, or the ids of one."""
    ids = _ids(values[0])
    if ids is None:
        texts = [_text(value, name, where) for value, name in zip(values, names, strict=True)]
        return Document(texts[0], texts[1] if len(texts) > 1 else "")
    if len(values) > 1:
        raise DataError(f"{where}: {names[0]!r} holds ids, which have no prompt; leave data.prompt_field out")
    return Document("", ids=ids)


def _ids(value: object) -> np.ndarray | None:
    """A list of whole numbers as an array; None for anything else."""
    if isinstance(value, list) and all(type(one) is int and abs(one) < 1 << 62 for one in value):
        return np.array(value, np.int64)
    return value if isinstance(value, np.ndarray) and value.dtype.kind in "iu" else None


def _missing(name: str, names: list[str], where: str, kind: str, fields: Fields) -> DataError:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:8]
    what = "text" if name == fields.text else "prompt"
    return DataError(
        f"{where} has no {kind} {name!r}; set data.{what}_field to the one with the {what} ({', '.join(near) or 'none there'})"
    )


def _text(value: object, text_field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {text_field!r} is {short(repr(value))}, not a string or a list of ids; take it away, or set data.text_field to the text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {text_field!r} has half a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}, "
            "which is not Unicode text; repair or take away this record"
        ) from None
    return value


def short(text: str, limit: int = 80) -> str:
    """The beginning of a text, on one line."""
    text = text.strip().replace("\n", " ")
    return text if len(text) <= limit else text[:limit] + "..."


Reader = Callable[[Path, Fields], Iterator[Document]]
_PLAIN: dict[str, Callable[..., Iterator[Document]]] = {".txt": _txt, ".jsonl": _jsonl, ".json": _json}
_PACKED: dict[str, Callable[[Path], Any] | None] = {
    "": None,
    ".gz": gzip.open,
    ".bz2": lambda file: io.BufferedReader(_Streams(file, bz2.BZ2Decompressor)),
    ".xz": lambda file: io.BufferedReader(_Streams(file, lzma.LZMADecompressor)),
    ".zst": _zstandard,
}
_TABLES: dict[str, Reader] = {".parquet": _parquet, ".arrow": _arrow, ".idx": _megatron}
READERS: dict[str, Reader] = {
    **{kind + packed: _plain(read, unpack, packed) for kind, read in _PLAIN.items() for packed, unpack in _PACKED.items()},
    **_TABLES,
}
"""By ending of a file's name."""
_SPANNED: dict[str, Callable[[Path, Fields, Span], Iterator[Document]]] = {
    ".jsonl": _jsonl_span,
    ".parquet": _parquet,
    ".idx": _megatron,
}
FORMATS = f"{', '.join((*_PLAIN, *_TABLES))}, the first three also with {', '.join(filter(None, _PACKED))}"
"""The endings in words."""
