"""A store of this process for each test, and a cache of this machine that is empty."""

from collections.abc import Iterator

import pytest

from plait.tests.s3_server import S3Server


@pytest.fixture
def s3(monkeypatch, tmp_path) -> Iterator[S3Server]:
    """A server that clients of this process and those it starts are told of."""
    pytest.importorskip("s3fs", reason="the extra `remote` is not installed")
    from plait.data.remote import store, tree

    server = S3Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tree, "_FRESH_SECONDS", 0.0)
    monkeypatch.setattr(store, "_LONGEST_REST", 0.5)
    yield server
    server.close()
