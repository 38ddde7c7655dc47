"""What commands print, wherever it goes, and which errors they end with."""

import functools
import io
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from plait.configs import listing
from plait.configs.components import at
from plait.configs.errors import is_bad_input
from plait.data.sources.source import open_source
from plait.launch import main
from plait.tests.train.common import ROOT
from plait.train.scoring.generate import Sampling
from plait.train.terminal import console
from plait.train.terminal.status import exit_status

TABLES = ["presets", "mixers", "optimizers", "tasks", "probes"]


FAULTS = {
    "NumPy": lambda: np.zeros(3).reshape(2),
    "the standard library": functools.partial(json.loads, "{"),
    "Python itself": lambda: int("three"),
    "a character that cannot be written": lambda: "é".encode("ascii"),
}


OURS = {
    "an error of ours": lambda: open_source("nowhere", "text"),
    "a plain one that we raise": lambda: Sampling(top_k=0),
}


@pytest.mark.parametrize("bad", OURS.values(), ids=OURS)
def test_what_we_raise_is_bad_input(bad, capsys):
    assert exit_status(bad) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_a_library_raises_is_not(fault, capsys):
    for command in (fault, lambda: at("model", fault)):
        with pytest.raises(ValueError) as raised:
            exit_status(command)
        assert not is_bad_input(raised.value)
        assert "no bad input but a fault" in raised.value.__notes__[-1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")])
def test_too_little_memory_is_one_line_and_status_1(error, capsys):
    def command():
        raise error

    assert exit_status(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: not enough memory") and said.count("\n") == 1


def test_other_runtime_errors_keep_their_traceback():
    def command():
        raise RuntimeError("INTERNAL: a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        exit_status(command)


def test_library_error_of_a_process_has_its_traceback_and_status_1():
    code = (
        "import sys; from plait.launch import main; from plait.configs import listing; import json; "
        "listing.TABLES['kernels'] = lambda: json.loads('{'); sys.exit(main(['list', 'kernels']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and "JSONDecodeError" in done.stderr and "Please report it" in done.stderr and not done.stdout


@pytest.mark.parametrize("what", TABLES)
def test_lists_into_a_file_cut_nothing(what, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["list", what]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed and "│ │" not in printed.replace("  ", " ")
    _, rows = listing.component_rows(what.removesuffix("s")) if what != "presets" else ([], [])
    for component, cells in rows:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"│ {component.name} ")]
        assert all(" ".join(cell.split()) in " ".join(line.split()) for cell in cells)


def test_narrow_terminal_breaks_no_name(monkeypatch):
    out = io.StringIO()
    narrow = console._Results(file=out, width=40, force_terminal=True, markup=False)
    narrow.print(listing.component_table("mixer"))
    assert "gated_deltanet" in out.getvalue()


def test_terminal_is_shown_control_characters_and_not_sent_them(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console.write_text("tab\tnew\n\x1b[2J\x07\r\x9b é")
    assert capsys.readouterr().out == "tab\tnew\n\\x1b[2J\\x07\\x0d\\x9b é\n"


PRINTS = """
from plait.launch import main; main([])
from plait.train.terminal.console import *
show_text("na\\xefve \\u65e5"); console.print("\\xe9"); notes.print("\\u2013")
"""


@pytest.mark.parametrize(
    "settings", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_streams_of_few_characters_take_all(settings):
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, check=False, cwd=ROOT, env={**os.environ, **settings}
    )
    assert done.returncode == 0, done.stderr
    assert b"na" in done.stdout


def test_closed_streams_are_nowhere(tmp_path):
    """Neither an error, nor a file of the run under their number."""
    code = f"{PRINTS}\nopen('made', 'w').write('whole'); print('lost'); import os; os.write(1, b'lost')"
    command = ["sh", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, check=False, cwd=tmp_path, env={**os.environ}).returncode == 0
    assert (tmp_path / "made").read_text() == "whole"


def test_log_lines_are_whole_and_on_standard_error(capsys):
    handler = console.Lines()
    for level, text in ((logging.INFO, "x" * 300 + " :x: [bold]"), (logging.WARNING, "careful")):
        handler.emit(logging.LogRecord("plait", level, __file__, 1, text, None, None))
    printed = capsys.readouterr()
    assert printed.err == "x" * 300 + " :x: [bold]\nwarning: careful\n" and printed.out == ""


def test_a_narrow_terminal_gets_what_fits_and_names_say_the_rest(capsys, monkeypatch):
    monkeypatch.setattr(type(console.console), "is_terminal", True)
    monkeypatch.setattr(type(console.console), "width", 80)
    monkeypatch.setattr(listing, "BRIEF", {"optimizer": ("what it is",)})
    assert main(["list", "optimizers"]) == 0
    shown = capsys.readouterr()
    assert "muon" in shown.out and "2502.16982" not in shown.out
    assert "list optimizers NAME" in shown.err
    assert main(["list", "optimizers", "muon", "sgd"]) == 0
    records = capsys.readouterr().out
    assert "2502.16982" in records and "SGDW" in records and "adamw" not in records
    assert main(["list", "optimizers", "moun"]) == 2
    assert "'moun' is not registered" in capsys.readouterr().err
    assert main(["list", "kernels", "gla"]) == 2
    assert "takes no names" in capsys.readouterr().err
