"""A command line parted between some options and the rest. Needs nothing but the standard library."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence


def split_options(options: type, args: Sequence[str], prefix: str = "") -> tuple[list[str], list[str]]:
    """The words of `args` that are options of the dataclass `options`, with their values, and all others, each in their order.

    Args:
        prefix: what their names begin with, as `hosts.`. Every name that begins so is taken, known or not, and `--help` is left to
            the others; without one it is taken.
    """
    hints = typing.get_type_hints(options)
    names = {field.name.replace("_", "-"): hints[field.name] for field in dataclasses.fields(options)}
    flags = {f"--{prefix}{name}" for name in names}
    switches = {f"--{prefix}{no}{name}" for name, hint in names.items() if hint is bool for no in ("", "no-")}
    if not prefix:
        switches |= {"-h", "--help"}
    mine: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in switches:
            mine.append(word)
        elif flag in flags or (prefix and flag.startswith(f"--{prefix}")):
            mine.append(word)
            if "=" not in word and (value := next(words, None)) is not None:
                mine.append(value)
        else:
            rest.append(word)
    return mine, rest
