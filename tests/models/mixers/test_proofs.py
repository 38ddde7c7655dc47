"""Every mixer has a test that its equations are its source's."""

import ast
from pathlib import Path

from plait.models.mixers.base import MIXERS, MixerConfig


def proven() -> set[str]:
    """The names in the `proves` marks of the tests in this folder and beside it."""
    found = set()
    for file in Path(__file__).parents[1].rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.proves":
                found |= {ast.literal_eval(argument) for argument in node.args}
    return found


def test_every_mixer_has_a_proof_and_says_which():
    mixers = MIXERS.all()
    assert set(mixers) <= proven()
    assert [name for name, config in mixers.items() if config.proof == MixerConfig.proof] == []
