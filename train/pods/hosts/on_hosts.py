"""A command in one process, or in one of several hosts' processes. Needs no JAX where it only supervises others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from plait.train.pods.hosts import heartbeat
from plait.train.pods.hosts.host import HostsOptions, find_host, host_options
from plait.train.pods.hosts.supervise import supervise
from plait.train.terminal.status import exit_status


def on_hosts(name: str, args: Sequence[str], work: Callable[[Sequence[str], bool], int], *, resumes: bool) -> int:
    """The exit status of `launch.py NAME ARGS`: `work` is done here, or in a process of its own that is watched, with the others' hosts.

    Args:
        args: with `--hosts.*` options among them.
        work: what the command does with the other arguments; is told whether it is watched.
        resumes: whether it goes on with `--resume` after a failure, or begins anew.
    """
    options, rest = host_options(args)
    supervised = heartbeat.VARIABLE in os.environ
    if not supervised and options.local:
        return supervise([name, *args], None, options, resumes=resumes)
    host = find_host(HostsOptions() if options.local else options)
    if host is not None and not supervised:
        return supervise([name, *args], host, options, resumes=resumes)
    heartbeat.start()
    if host is None:
        return work(rest, supervised)
    from plait.train.pods.hosts import together

    with together.joined(host, options.connect_seconds) as leave:
        return leave(exit_status(lambda: work(rest, supervised)))
