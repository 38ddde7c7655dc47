"""What the hosts of a run tell each other before and beside the computation, so that all go on or all stop with the same message.

Texts go through the coordination service of `jax.distributed`, which needs no device: a mesh that cannot be built is no reason not to
hear of it. Every host must make the same calls in the same order. With one host each call is its own answer and costs nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from plait.configs.errors import is_bad_input
from plait.configs.files import parse_json
from plait.train.pods.hosts import heartbeat
from plait.train.pods.hosts.host import Host, HostsError
from plait.train.pods.hosts.supervise import FAILED, ORDERLY
from plait.train.program_cache import is_usual

HEARTBEAT_SECONDS = 10
"""Silence after which the coordinator counts a process as dead and ends the others."""
_FOREVER = 7 * 24 * 3_600_000  # milliseconds: a dead host ends the wait, a slow one (that reads a corpus) does not
_calls = itertools.count()


@contextlib.contextmanager
def joined(host: Host, seconds: float) -> Iterator[Callable[[int], int]]:
    """Joins the other hosts; must come before anything asks JAX for its devices. The process is aborted when they do not all come.

    Gives the function that leaves with an exit status: with an orderly one once every host does, so that none takes the end of another
    for its death; with any other, or on an error that nobody caught, at once and without a word to them.
    """
    if is_usual():  # host 0 alone writes there: one host would read what the others compile, which on GPUs is done together
        jax.config.update("jax_enable_compilation_cache", False)
    with heartbeat.phase("connect"):
        jax.distributed.initialize(
            host.coordinator,
            host.count,
            host.index,
            cluster_detection_method="deactivate",
            initialization_timeout=max(int(seconds), 1),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=60,
        )
    try:
        yield _leave
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in ORDERLY:
            _leave(error.code)
            raise
        traceback.print_exc()
        _leave(FAILED)


def _leave(status: int) -> int:
    if status in ORDERLY:
        jax.distributed.shutdown()
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def index() -> int:
    """This host's number."""
    return _state().process_id


def count() -> int:
    """The number of hosts."""
    return _state().num_processes


def first() -> bool:
    """Whether this host writes the files that a run has once."""
    return index() == 0


def gather(text: str) -> list[str]:
    """On host 0 the texts of all hosts in order; an empty list on the others."""
    if count() == 1:
        return [text]
    client, call = _state().client, next(_calls)
    client.key_value_set(f"plait/{call}/{index()}", text)
    return [client.blocking_key_value_get(f"plait/{call}/{i}", _FOREVER) for i in range(count())] if first() else []


def broadcast(text: str) -> str:
    """The text that host 0 gives."""
    if count() == 1:
        return text
    client, call = _state().client, next(_calls)
    if first():
        client.key_value_set(f"plait/{call}", text)
        return text
    return client.blocking_key_value_get(f"plait/{call}", _FOREVER)


@contextlib.contextmanager
def together(stage: str) -> Iterator[None]:
    """A part of the set-up that every host does: an error of any of them is raised on all, saying whose it is.

    Raises:
        ValueError: some host's input is bad.
        OSError: no host's input is bad, but some host failed.
    """
    with heartbeat.phase(stage):
        if count() == 1:
            yield
            return
        error: Exception | SystemExit | None = None
        try:
            yield
        except (ValueError, OSError) as raised:
            if isinstance(raised, ValueError) and not is_bad_input(raised):
                raise
            error = raised
        except SystemExit as raised:
            if not raised.code:
                raise
            error = raised
        text = "" if error is None else f"{'failed' if isinstance(error, OSError) else 'input'}:{_message(error)}"
        with heartbeat.phase("wait") if stage == "data" else contextlib.nullcontext():
            reports = gather(text)
            verdict = broadcast(_verdict(reports) if first() else "")
        if not verdict:
            return
        kind, _, message = verdict.partition(":")
        if error is not None and _message(error) == message:
            raise error
        raise (OSError if kind == "failed" else HostsError)(message) from error


def decide(stage: str, function: Callable[[], Any]) -> Any:
    """What `function` gives on host 0 (JSON), on every host."""
    value = None
    with together(stage):
        if first():
            value = function()
    if count() == 1:
        return value
    return parse_json(broadcast(json.dumps(value)))


def post(name: str, text: str) -> None:
    """Leaves a text under `name` for host 0, which may `collect` it; waits for nobody."""
    _state().client.key_value_set(f"plait/{name}/{index()}", text)


def collect(name: str) -> dict[int, str]:
    """What the hosts have posted under `name` so far, which is then removed."""
    client = _state().client
    found = client.key_value_dir_get(f"plait/{name}/")
    client.key_value_delete(f"plait/{name}/")
    return {int(key.rsplit("/", 1)[1]): text for key, text in found}


def any_of(problem: str | None) -> str | None:
    """The problem of the first host that has one."""
    if count() == 1:
        return problem
    found = [(i, text) for i, text in enumerate(gather(problem or "")) if text]
    return broadcast(f"{found[0][1]} (host {found[0][0]})" if found else "") or None


def agree(stage: str, facts: Mapping[str, Any]) -> None:
    """Raises HostsError on every host, naming each fact and its values, unless all hosts have the same ones."""
    with heartbeat.phase(stage):
        if count() == 1:
            return
        every = [parse_json(text) for text in gather(json.dumps({name: str(value) for name, value in facts.items()}))]
        names = dict.fromkeys(name for one in every for name in one)
        differing = []
        for name in names:
            hosts = _by_text([one.get(name, "absent") for one in every])
            if len(hosts) > 1:
                differing.append(f"{name} is {', '.join(f'{value} on {_names(which)}' for value, which in hosts.items())}")
        problem = broadcast("; ".join(differing))
        if problem:
            raise HostsError(f"the hosts disagree: {problem}; start every host with the same command, code and data")


def _state() -> Any:
    from jax._src import distributed

    return distributed.global_state


def _message(error: Exception | SystemExit) -> str:
    return "its options cannot be read, see its output" if isinstance(error, SystemExit) else str(error)


def _verdict(reports: list[str]) -> str:
    """Empty where no host has an error; the one error that all have; or each with its hosts."""
    bad = {text: which for text, which in _by_text(reports).items() if text}
    if not bad:
        return ""
    if len(bad) == 1 and len(next(iter(bad.values()))) == len(reports):
        return next(iter(bad))
    kind = "input" if any(text.startswith("input:") for text in bad) else "failed"
    return f"{kind}:" + "; ".join(f"{_names(which)} of {len(reports)}: {text.partition(':')[2]}" for text, which in bad.items())


def _by_text(texts: list[str]) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        hosts[text].append(i)
    return hosts


def _names(which: list[int]) -> str:
    shown = ", ".join(map(str, which[:8])) + (f" and {len(which) - 8} more" if len(which) > 8 else "")
    return f"host{'s' if len(which) > 1 else ''} {shown}"
