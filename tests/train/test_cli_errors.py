"""Input that cannot be trained on: status 2, one clear message, and a folder in which the next try works."""

import json
import re

import pytest

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.launch import main
from plait.train import run as runs

SHORT = "--model.pattern softmax --steps 3 --optimizer.warmup-steps 1 --mesh.data 1 --probe-every None --eval-every None"


def empty(folder):
    (folder / "a.txt").write_text("")
    return ["holds no text"]


def binary(folder):
    (folder / "a.txt").write_bytes(b"abc\0def")
    return ["a.txt is not text: NUL byte at offset 3"]


def latin(folder):
    (folder / "a.txt").write_bytes("naïve".encode("latin-1"))
    return ["a.txt is not UTF-8: byte 0xef at offset 2", "iconv"]


def no_files(folder):
    (folder / "a.pdf").write_bytes(b"x")
    return ["has no files that are read; it has .pdf (1); use .txt"]


def cut_parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "a.parquet"
    pq.write_table(pa.table({"text": ["word " * 500] * 50}), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return ["a.parquet is not a whole parquet file"]


def broken_lines(folder):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    return ["a.jsonl, line 2 is not JSON"]


def other_field(folder):
    (folder / "a.jsonl").write_text('{"texts": "fine"}\n')
    return ["has no field 'text'", "data.text_field", "texts"]


def shorter_than_a_row(folder):
    (folder / "a.txt").write_text("few words")
    return ["data.seq_len=64 is more than the", "use more text, or data.seq_len="]


CORPORA = [empty, binary, latin, no_files, cut_parquet, broken_lines, other_field, shorter_than_a_row]
FLAGS = {
    "batch that the mesh does not divide": ("--mesh.data 8 --data.batch-size 6", "must be a multiple of mesh data=8"),
    "mesh that is not the devices": (
        "--mesh.data None --mesh.fsdp 3",
        "leave mesh.data=None to fill them. JAX sees 8",
    ),
    "width that the mesh does not divide": ("--mesh.data 1 --mesh.fsdp 8 --model.d-model 36", "which mesh fsdp=8 must divide"),
    "vocabulary smaller than the tokenizer's": (
        "--model.vocab-size 100",
        "model.vocab_size=100 is smaller than the data's 257",
    ),
    "vocabulary size of a byte tokenizer": ("--data.vocab-size 300", "data.vocab_size=300"),
    "vocabulary too small for bytes": (
        "--data.tokenizer bpe --data.vocab-size 100",
        "data.vocab_size=100 must hold the 256 bytes",
    ),
    "tokenizer that is not there": ("--data.tokenizer /nowhere", "data.tokenizer='/nowhere' is no tokenizer.json"),
    "corpus that is not there": ("--data.source sotuu", "did you mean 'sotu'?"),
    "wandb that is not installed": ("--wandb project", "wandb"),
}


def status_and_error(capsys, *words):
    try:
        status = main(list(words))
    except SystemExit as error:
        status = error.code
    return status, "".join(capsys.readouterr())


@pytest.fixture
def good(corpus, tmp_path):
    """Words of a command that works, and its run folder."""
    return ["train", "lm_tiny", *SHORT.split(), "--data.source", str(corpus), "--out", str(tmp_path / "run")], tmp_path / "run"


def assert_next_try_begins(words, capsys):
    """The folder is as free as a new one: the good command would start there without --resume, whatever its tokenizer."""
    from plait.configs.command_line.cli import parse_experiment

    for tokenizer in ([], ["--data.tokenizer", "bpe", "--data.vocab-size", "280"]):
        config = parse_experiment(words[1], [*words[2:], *tokenizer])
        with runs.claimed(config) as (going_on, _):
            assert going_on is False
            runs.set_up(config)


@pytest.mark.parametrize("write", CORPORA, ids=lambda f: f.__name__)
def test_corpus_that_cannot_be_read(write, good, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    words, _ = good
    folder = tmp_path / "text"
    folder.mkdir()
    hints = write(folder)
    status, printed = status_and_error(capsys, *words, "--data.source", str(folder))
    assert status == 2 and "Traceback" not in printed
    assert all(hint in printed for hint in hints), printed
    assert_next_try_begins(words, capsys)


@pytest.mark.parametrize(("flags", "hint"), FLAGS.values(), ids=FLAGS)
def test_option_that_does_not_fit(flags, hint, good, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    words, _ = good
    status, printed = status_and_error(capsys, *words, *flags.split())
    assert status == 2 and hint in printed and "Traceback" not in printed, printed
    assert_next_try_begins(words, capsys)


@pytest.mark.parametrize("flags", ["--model.vocab-size 10", "--model.vocab-size 200 --data.tokenizer bpe --data.vocab-size 300"])
def test_a_vocabulary_that_holds_no_bytes_is_refused_before_the_data_is_read(flags, good, capsys):
    words, out = good
    status, printed = status_and_error(capsys, *words, *flags.split())
    assert status == 2 and "is smaller than the data's 257; leave it None or raise it" in printed
    assert not out.exists()


def test_out_that_is_a_file(good, capsys):
    words, out = good
    out.write_text("mine")
    status, printed = status_and_error(capsys, *words)
    assert status == 2 and "is a file; give a folder" in printed and out.read_text() == "mine"


def test_folder_of_something_else_keeps_its_files(good, capsys):
    """A folder that is no run is used, and what lay in it stays."""
    words, out = good
    (out / "tokenizer").mkdir(parents=True)
    (out / "tokenizer" / "mine.txt").write_text("mine")
    assert_next_try_begins([*words[:-2], "--out", str(out)], capsys)
    assert (out / "tokenizer" / "mine.txt").read_text() == "mine"


def test_broken_config_of_a_run_is_named(good, capsys):
    words, out = good
    out.mkdir()
    (out / "config.json").write_text('{"name": "lm_tiny", ')
    for command in ([*words, "--resume"], ["eval", str(out)], ["generate", str(out)]):
        status, printed = status_and_error(capsys, *command)
        assert status == 2 and re.search(r"config\.json is not JSON", printed) and "Traceback" not in printed


def test_run_without_a_checkpoint_is_named(good, capsys):
    from plait.configs.command_line.cli import parse_experiment

    words, out = good
    out.mkdir()
    codec.save(parse_experiment(words[1], words[2:]), out / "config.json")
    for command in ("eval", "generate"):
        status, printed = status_and_error(capsys, command, str(out))
        assert status == 2 and "has no checkpoint yet" in printed
    assert not (out / "checkpoints").exists(), "reading makes nothing"


def test_config_with_a_field_of_another_version_is_named(good, capsys):
    from plait.configs.command_line.cli import parse_experiment

    words, out = good
    out.mkdir()
    tree = codec.encode(parse_experiment(words[1], words[2:]))
    (out / "config.json").write_text(json.dumps({**tree, "stepz": 3}))
    status, printed = status_and_error(capsys, "eval", str(out))
    assert status == 2 and "config.stepz is not a field of ExperimentConfig; did you mean 'steps'?" in printed
    with pytest.raises(codec.ConfigError):
        codec.load(ExperimentConfig, out / "config.json")
