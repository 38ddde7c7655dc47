"""JSON is read strictly, whoever wrote it."""

import pytest

from plait.configs import codec
from plait.configs.components import ConfigError
from plait.configs.files import DEEPEST, parse_json, read_json

BROKEN = {
    "no number of JSON": (b'{"a": NaN}', "NaN is not a number"),
    "too large a number": (b'{"a": 1e999}', "too large"),
    "too many digits": (b"1" * 5000, "5000 digits"),
    "a name twice": (b'{"a": 1, "a": 2}', "'a' stands twice"),
    "nested too deep for Python": (b"[" * 100_000, "nested more than"),
    "nested too deep for readers": (b"[" * (DEEPEST + 2) + b"]" * (DEEPEST + 2), "nested more than"),
    "no UTF-8": (b'"\xff"', "utf-8"),
    "nothing": (b"", "Expecting value"),
    "cut": (b'{"a": [1', "Expecting"),
    "two values": (b"{} {}", "Extra data"),
}


@pytest.mark.parametrize("text, says", BROKEN.values(), ids=BROKEN.keys())
def test_json_that_is_none_is_refused_with_the_reason_and_the_file(text, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        parse_json(text)
    (file := tmp_path / "side.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"side\.json is not JSON.*{says}.*; restore the file"):
        read_json(file)
    with pytest.raises(ConfigError, match=says):
        codec.load(dict[str, float], file)


def test_json_as_deep_as_allowed_is_read():
    assert parse_json(b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1)) is not None


def test_a_folder_in_place_of_the_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        codec.load(dict[str, float], tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["null", "[]", '{"a": "b"}', '{"a": {}}', "3", '{"a": 1' + "0" * 399 + "}"])
def test_json_of_another_shape_is_refused_with_where(text, tmp_path):
    (file := tmp_path / "side.json").write_text(text)
    with pytest.raises(ConfigError, match=r"side\.json: side.*must be"):
        codec.load(dict[str, float], file)
