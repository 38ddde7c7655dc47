"""`prepare`: the same shards from any number of workers, whatever is killed; clear errors before and after."""

import contextlib
import filecmp
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from plait.configs.command_line.cli import parse_experiment
from plait.data.config import DataConfig, DataError
from plait.data.loader import build_data
from plait.data.shards.pieces import cut
from plait.data.shards.prepared import write_prepared
from plait.data.shards.shard import make_shard, name_of, read_shard
from plait.data.sources.source import open_source
from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.launch import main
from plait.tests.data.conftest import make_texts
from plait.train.pods.hosts.supervise import LAUNCH
from plait.train.prepare.job import claim
from plait.train.prepare.pool import prepare
from plait.train.run_folder.contents import RunError
from plait.train.run_folder.owner import last_owner


@pytest.fixture
def lines(tmp_path):
    """Three files of 1.2 MB."""
    (tmp_path / "text").mkdir()
    for part in range(3):
        texts, path = make_texts(300)[100 * part : 100 * part + 100], tmp_path / "text" / f"{part}.jsonl"
        with path.open("w") as file:
            while file.tell() < 1_200_000:
                file.writelines(json.dumps({"text": f"{file.tell()} {text}"}) + "\n" for text in texts)
    return tmp_path / "text"


def alone(source, folder):
    """The shards made here one by one."""
    tokenizer = ByteTokenizer()
    tokenizer.save(folder / "tokenizer", tokenizer="byte")
    pieces = cut(open_source(str(source), "text"), 1 << 20, tokenizer.fingerprint)
    for number, piece in enumerate(pieces):
        make_shard(piece, tokenizer, folder / name_of(number))
    write_prepared(folder, str(source), tokenizer, [read_shard(folder / name_of(i)) for i in range(len(pieces))])
    return folder


@pytest.mark.parametrize(
    "options", [["--data.vocab-size", "300"], ["--data.tokenizer", "byte", "--data.vocab-size", "None"]], ids=["bpe", "byte"]
)
def test_the_command_that_is_shown_works_as_it_stands(lines, tmp_path, capsys, options):
    folder = tmp_path / "two words"
    assert (
        main(["prepare", "lm_quick", "--data.source", str(lines / "0.jsonl"), *options, "--out", str(folder), "--workers", "1"])
        == 0
    )
    shown = shlex.split(capsys.readouterr().out.split("train on it with")[1])
    assert shown[:3] == ["launch.py", "train", "lm_quick"]
    data = build_data(parse_experiment("lm_quick", shown[3:]).data, tmp_path / "run")
    assert data.vocab_size == (300 if options[0] == "--data.vocab-size" else 257)


def assert_same(one, other):
    files = [{path.relative_to(folder): path for path in Path(folder).rglob("*") if path.is_file()} for folder in (one, other)]
    names = set(files[0]) - {Path("job.json")}
    assert names == set(files[1]) - {Path("job.json")}
    assert all(filecmp.cmp(files[0][name], files[1][name], shallow=False) for name in names)


def test_shards_are_the_same_from_any_workers(lines, tmp_path, capsys):
    assert main(["prepare", "lm_tiny", "--data.source", str(lines), "--data.tokenizer", "byte", "--out", str(tmp_path / "two"),
                 "--workers", "2", "--shard-mib", "1"]) == 0  # fmt: skip
    assert "--data.source" in capsys.readouterr().out
    assert_same(alone(lines, tmp_path / "one"), tmp_path / "two")
    before = (tmp_path / "two" / "shard-00002" / "tokens.bin").stat()
    shutil.rmtree(tmp_path / "two" / "shard-00001")
    config = DataConfig(source=str(lines), tokenizer="byte")
    prepare(config, tmp_path / "two", workers=1, shard_mib=1)  # makes what is lacking alone
    assert (tmp_path / "two" / "shard-00002" / "tokens.bin").stat() == before
    assert_same(tmp_path / "one", tmp_path / "two")
    data = build_data(DataConfig(source=str(tmp_path / "two"), tokenizer="byte"), tmp_path / "run")
    assert data.facts["num_documents"] == prepare(config, tmp_path / "two", workers=1, shard_mib=1).num_documents
    assert not (tmp_path / "run" / "data").exists()  # a run only reads


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(lines, tmp_path):
    command = [*LAUNCH, "prepare", "lm_tiny", "--data.source", str(lines), "--data.tokenizer", "bpe"]
    command += ["--out", str(tmp_path / "two"), "--shard-mib", "1"]
    rng, unfinished = random.Random(0), 0
    for turn in range(5):
        process = subprocess.Popen([*command, "--workers", str(1 + turn % 2)])
        deadline = time.monotonic() + 60
        while not (living := making(tmp_path / "two")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        if turn % 2 and living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(living[0].pid, signal.SIGKILL)  # a worker, which the other follows
            time.sleep(rng.uniform(0, 2))
        process.kill()
        process.wait()
        unfinished += not (tmp_path / "two" / "prepared.json").exists()
    assert unfinished >= 3, "else nothing was killed in the middle"
    both = [subprocess.Popen(command) for _ in range(2)]  # as two machines
    assert [process.wait() for process in both] == [0, 0]
    once = [str(tmp_path / "one") if word == str(tmp_path / "two") else word for word in command]
    subprocess.run([*once, "--workers", "1"], check=True)
    assert_same(tmp_path / "one", tmp_path / "two")


def making(folder):
    """Who makes a shard now."""
    owners = [last_owner(claim(folder, name_of(number))) for number in range(6)]
    return [owner for owner in owners if owner is not None and not owner.left and not owner.dead]


def test_what_cannot_be_prepared_is_said(lines, tmp_path, capsys):
    config = DataConfig(source=str(lines), tokenizer="byte")
    with (lines / "1.jsonl").open("a") as file:
        file.write("no json\n")
    with pytest.raises(DataError, match=r"1 pieces cannot be read, all others are done:\n.*1\.jsonl.* is not JSON"):
        prepare(config, tmp_path / "out", workers=1, shard_mib=1)
    assert read_shard(tmp_path / "out" / name_of(0)) is not None and not (tmp_path / "out" / "prepared.json").exists()
    with pytest.raises(RunError, match=r"prepares something else: data\.text_field: \"text\" -> \"body\"; use the same options"):
        prepare(DataConfig(source=str(lines), tokenizer="byte", text_field="body"), tmp_path / "out", workers=1, shard_mib=1)
    command = ["prepare", "lm_tiny", "--out", str(tmp_path / "two")]
    assert (
        main([*command, "--data.sources.a.weight", "1"]) == 2
        and main([*command, "--data.task", "mqar", "--data.seq-len", "512"]) == 2
    )
    said = capsys.readouterr().err
    assert "prepare each with --data.source and the same --data.tokenizer" in said and "reads no text" in said
    with pytest.raises(RunError, match="has other files; give a new folder"):
        prepare(config, lines, workers=1, shard_mib=1)
