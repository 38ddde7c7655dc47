"""A server of this process that speaks S3 to one bucket, and on request fails, waits, cuts replies off or is gone.

It knows what the clients of fsspec ask for: objects put, read in ranges, looked at and removed, lists, uploads in parts, and objects that
may be put only where there is none.
"""

import contextlib
import hashlib
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.sax.saxutils import escape

BUCKET = "bucket"
_NAMES = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'

Fault = Callable[[str, str], str | None]
"""Of a method and a key: `500`, `drop` (the connection, before anything is done), `lost` (done, and the reply lost), `short` (half the body) or
None; it may wait."""


class S3Server:
    """Objects in memory, by their keys."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.fault: Fault = lambda method, key: None
        self.log: list[tuple[str, str]] = []
        """What was done, in order: method and key."""
        self.seen: Callable[[dict[str, bytes]], None] = lambda objects: None
        """Is shown the objects after each change."""
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        self._server = _Quiet(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.s3 = self  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What clients are told."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def under(self, folder: str) -> dict[str, bytes]:
        """The objects in a folder, by their names there."""
        with self.lock:
            return {key.removeprefix(f"{folder}/"): data for key, data in self.objects.items() if key.startswith(f"{folder}/")}

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """Answers nobody inside."""
        before, self.fault = self.fault, lambda method, key: "drop"
        try:
            yield
        finally:
            self.fault = before

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown()
        self._server.server_close()


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that were killed are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_PUT = do_DELETE = do_POST = do_GET

    def _answer(self) -> None:
        s3: S3Server = self.server.s3  # type: ignore[attr-defined]
        url = urllib.parse.urlsplit(self.path)
        bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self._body()
        fault = s3.fault(self.command, key or query.get("prefix", ""))
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "500":
            return self._error(500, "InternalError")
        if bucket != BUCKET:
            return self._error(404, "NoSuchBucket", "The specified bucket does not exist")
        with s3.lock:
            reply = self._done(s3, key, query, body)
            s3.log.append((self.command, key))
            if self.command in ("PUT", "DELETE", "POST") and key:
                s3.seen(s3.objects)
        if fault == "lost":
            self.close_connection = True
            return
        self._send(*reply, short=fault == "short")

    def _done(self, s3: S3Server, key: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        objects = s3.objects
        if not key:
            return self._list(objects, query)
        if self.command == "PUT" and "partNumber" in query:
            s3.uploads[query["uploadId"]][int(query["partNumber"])] = body
            return 200, b"", {"ETag": _etag(body)}
        if self.command == "POST" and "uploads" in query:
            number = uuid.uuid4().hex
            s3.uploads[number] = {}
            return (
                200,
                f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId></InitiateMultipartUploadResult>".encode(),
                {},
            )
        if self.command == "POST" and "uploadId" in query:
            parts = s3.uploads.pop(query["uploadId"])
            objects[key] = b"".join(parts[number] for number in sorted(parts))
            found = f"<CompleteMultipartUploadResult><ETag>{_etag(objects[key])}</ETag></CompleteMultipartUploadResult>"
            return 200, found.encode(), {}
        if self.command == "PUT":
            if self.headers.get("If-None-Match") == "*" and key in objects:
                return _failure(412, "PreconditionFailed")
            objects[key] = body
            return 200, b"", {"ETag": _etag(body)}
        if self.command == "DELETE":
            objects.pop(key, None)
            return 204, b"", {}
        if key not in objects:
            return _failure(404, "NoSuchKey")
        data, headers = objects[key], {"ETag": _etag(objects[key]), "Last-Modified": "Sun, 01 Mar 2026 12:00:00 GMT"}
        if (span := self.headers.get("Range")) is not None:
            first, _, last = span.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1 if last else len(data), len(data))
            return 206, data[begin:end], {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        return 200, data, headers

    @staticmethod
    def _list(objects: dict[str, bytes], query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys = sorted(key for key in objects if key.startswith(prefix))
        folders = {}
        if delimiter:
            inside = {key: key[len(prefix) :].partition(delimiter) for key in keys}
            folders = {prefix + part[0] + delimiter: None for part in inside.values() if part[1]}
            keys = [key for key in keys if not inside[key][1]]
        limit = int(query.get("max-keys", 1000))
        text = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(objects[key])}</Size><ETag>{escape(_etag(objects[key]))}</ETag>"
            "<LastModified>2026-03-01T12:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for key in keys[:limit]
        ) + "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        head = f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys[:limit])}</KeyCount><IsTruncated>false</IsTruncated>"
        return 200, f"<ListBucketResult {_NAMES}>{head}{text}</ListBucketResult>".encode(), {}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            data = b"".join(parts)
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        content = b""
        while size := int(data.partition(b"\r\n")[0].split(b";")[0], 16):
            data = data.partition(b"\r\n")[2]
            content, data = content + data[:size], data[size + 2 :]
        return content

    def _error(self, status: int, code: str, message: str = "") -> None:
        self._send(*_failure(status, code, message))

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, short: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if short else body)
        if short:
            self.close_connection = True


def slow(seconds: float) -> Fault:
    """Every reply comes late."""

    def fault(method: str, key: str) -> str | None:
        time.sleep(seconds)
        return None

    return fault


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _failure(status: int, code: str, message: str = "") -> tuple[int, bytes, dict[str, str]]:
    return status, f"<Error><Code>{code}</Code><Message>{message or code}</Message></Error>".encode(), {}
