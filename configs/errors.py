"""Which errors are bad input. Needs nothing but the standard library."""

from __future__ import annotations

import dis

_PACKAGE = __name__.partition(".")[0]


def is_bad_input(error: ValueError, module: str = _PACKAGE) -> bool:
    """Whether it is of a class of this package, or a `raise` of this package or of `module` raised it.

    A ValueError that a library raises, or Python itself in our code, is a fault of the program.
    """
    if _is_ours(type(error).__module__):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    raiser = trace.tb_frame.f_globals.get("__name__", "")
    return raised and (_is_ours(raiser) or raiser == module)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE
