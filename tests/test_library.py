"""docs/library.md: every example runs as it stands and is short; the names listed there are those that there are."""

import importlib
import re
from pathlib import Path

import pytest

from plait import kernels

TEXT = (Path(__file__).parents[1] / "docs" / "library.md").read_text("utf-8")
EXAMPLES = dict(zip(re.findall(r"^## (.+)$", TEXT, re.M), re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)))
NAMES = {
    module: names.split() for module, names in re.findall(r"^\| `(plait[\w.]+)` \| (.+) \|$", TEXT.replace("` `", " "), re.M)
}


@pytest.mark.parametrize(
    "title", [one if one != "A trained run" else pytest.param(one, marks=pytest.mark.slow) for one in EXAMPLES]
)
def test_example_runs_and_is_short(title, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = EXAMPLES[title]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    exec(compile(code, f"library.md: {title}", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_there(module):
    found = importlib.import_module(module)
    for name in (name.strip("`") for name in NAMES[module]):
        assert hasattr(found, name), name


def test_every_name_of_the_kernels_is_listed():
    assert sorted(name.strip("`") for name in NAMES["plait.kernels"]) == sorted(kernels.__all__)
