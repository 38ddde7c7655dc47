"""Exact resume: whatever ends a run, going on from its newest whole checkpoint gives the undisturbed run bit for bit."""

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from plait.configs import codec
from plait.configs.components import registries
from plait.configs.experiment import ExperimentConfig
from plait.data.loader import DataIterator
from plait.launch import main
from plait.tests.suites import usually
from plait.tests.train.common import changed, different_arrays, hybrid, launch, write_corpus
from plait.train import run as runs
from plait.train.checkpoint import CheckpointError, Checkpoints
from plait.train.loop import train
from plait.train.run_folder import contents

STEPS, EVERY = 40, 8
CLOCKS = ("seconds", "time/", "throughput/")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ExperimentConfig:
    """A hybrid with Mixture-of-Head, trained BPE, packing, an average and probes."""
    folder = tmp_path_factory.mktemp("resume")
    return hybrid(
        {
            "steps": STEPS,
            "log_every": 2,
            "probe_every": 5,
            "eval_every": 10,
            "eval_batches": 1,
            "checkpoint_every": EVERY,
            "keep_last": 3,
            "optimizer.ema": 0.9,
            "data.source": str(write_corpus(folder / "text")),
            "data.tokenizer": "bpe",
            "data.vocab_size": 300,
            "data.cache_dir": str(folder / "cache"),
            "out": str(folder / "undisturbed"),
        }
    )


@pytest.fixture(scope="module")
def undisturbed(config, compile_cache) -> Path:
    train(config)
    return Path(config.folder)


@pytest.fixture(scope="module")
def light(config, tmp_path_factory) -> ExperimentConfig:
    """One Mixture-of-Head layer instead, for the many cases in which it is files that matter."""
    mixers = {name: mixer for name, mixer in config.model.mixers.items() if name.startswith("moh")}
    model = dataclasses.replace(config.model, pattern="moh+softmax", mixers=mixers, num_layers=1)
    return dataclasses.replace(config, model=model, out=str(tmp_path_factory.mktemp("light") / "undisturbed"))


@pytest.fixture(scope="module")
def light_undisturbed(light, compile_cache) -> Path:
    train(light)
    return Path(light.folder)


TAGS = {registry.tag for registry in registries.values()}


def flags(config: ExperimentConfig, out: Path) -> list[str]:
    """The command line that gives `config` from the preset lm_tiny, in another folder."""
    leaves = dict(_leaves(codec.encode(changed(config, {"out": str(out)}))))
    words = ["train", "lm_tiny"]
    for path, value in leaves.items():
        if path in ("name", "resume") or path.rpartition(".")[2] in TAGS:
            continue
        flag = "--" + path.replace("_", "-").replace("gated-deltanet", "gated_deltanet")
        if isinstance(value, bool):
            words.append(flag if value else "--" + _negated(flag[2:]))
        else:
            words += [flag, str(value)]
    return words


def _negated(path: str) -> str:
    *parents, name = path.split(".")
    return ".".join([*parents, f"no-{name}"])


def _leaves(tree, path=""):
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        yield from _leaves(value, name) if isinstance(value, dict) else [(name, value)]


def lines_of(path: Path) -> list[dict]:
    """The lines of a JSONL file without what tells the time."""
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(CLOCKS)} for line in path.read_text().splitlines()]


def assert_same_run(folder: Path, expected: Path) -> None:
    """Metrics, events, probes and the last state of two runs are equal bit for bit."""
    for name in ("metrics.jsonl", "events.jsonl"):
        assert lines_of(folder / name) == lines_of(expected / name), name
    probes = {p.name for p in (expected / "probes").glob("*.npz")}
    assert {p.name for p in (folder / "probes").glob("*.npz")} == probes and len(probes) > 3
    for name in probes:
        left, right = (np.load(io.BytesIO((run / "probes" / name).read_bytes())) for run in (folder, expected))
        assert different_arrays(dict(left), dict(right)) == [], name
    assert different_arrays(last_state(folder), last_state(expected)) == []


def last_state(folder: Path):
    config = dataclasses.replace(codec.load(ExperimentConfig, folder / "config.json"), out=str(folder))
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        step, state, extra = checkpoints.restore(runs.set_up(config).like)
    finally:
        checkpoints.close()
    assert step == config.steps
    return state, extra["data"], extra["watchers"], extra["tokens"]


def kill_at_random(words: list[str], out: Path, cache: Path, rng: random.Random) -> int:
    """Starts a run, kills it at a random moment after its first checkpoint, and returns the last step it had written."""
    process = launch(*words, cache=cache)
    try:
        deadline = time.monotonic() + 300
        while not any((out / "checkpoints").glob("[0-9]*/manifest.json")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    done = [record["step"] for record in map(json.loads, (out / "metrics.jsonl").read_bytes().split(b"\n")[:-1])]
    return max(done)


def stopped_at(config: ExperimentConfig, out: Path, step: int, monkeypatch) -> ExperimentConfig:
    """Trains in `out` in this process until `step`, ending as on SIGTERM, and gives the config that goes on."""
    config = changed(config, {"out": str(out)})
    with monkeypatch.context() as patch:
        patch.setattr(DataIterator, "__next__", terminating(step))
        result = train(config)
    assert (result.step, result.finished) == (step, False)
    return changed(config, {"resume": True})


def terminating(count: int):
    """Reads the next training batch, with a SIGTERM at the one of that number."""
    calls, read = iter(range(1, count + 1)), DataIterator.__next__

    def reading(iterator):
        if next(calls, None) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(iterator)

    return reading


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(11))
def test_killed_at_a_random_moment(seed, config, undisturbed, compile_cache, tmp_path):
    rng, out = random.Random(seed), tmp_path / "run"
    words = flags(config, out)
    step = kill_at_random(words, out, compile_cache, rng)
    process = launch(*words, "--resume", cache=compile_cache)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "goes on from step" in " ".join(output.split()), step
    assert_same_run(out, undisturbed)


def test_sigterm_saves_exits_0_and_goes_on(light, light_undisturbed, compile_cache, tmp_path):
    out = tmp_path / "run"
    words = flags(light, out)
    process = launch(*words, cache=compile_cache)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "SIGTERM: saving after this step" in output and "--resume goes on" in output
    step = max(int(p.name) for p in (out / "checkpoints").glob("[0-9]*"))
    assert step < STEPS and f"saved at step {step}" in output
    train(changed(light, {"name": "lm_tiny", "out": str(out), "resume": True}))
    assert_same_run(out, light_undisturbed)


@pytest.mark.slow
def test_a_terminal_that_is_gone_ends_nothing_unsaved(light, light_undisturbed, compile_cache, tmp_path):
    """First nobody reads what is printed any more, as under `| head`, then SIGHUP comes."""
    out = tmp_path / "run"
    process = launch(*flags(light, out), cache=compile_cache)
    process.stdout.close()
    while not any((out / "checkpoints").glob("[0-9]*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGHUP)
    assert process.wait(300) == 0
    step = max(int(p.name) for p in (out / "checkpoints").glob("[0-9]*"))
    assert step >= lines_of(out / "metrics.jsonl")[-1]["step"] and step >= EVERY
    if step < STEPS:  # it may have been done already
        train(changed(light, {"name": "lm_tiny", "out": str(out), "resume": True}))
    assert_same_run(out, light_undisturbed)


@pytest.mark.slow
def test_stopped_twice_and_resumed_twice(light, light_undisturbed, tmp_path, monkeypatch):
    again = stopped_at(light, tmp_path / "run", 3, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(DataIterator, "__next__", terminating(10))
        assert train(again).step == 13
    train(again)
    assert_same_run(tmp_path / "run", light_undisturbed)


@pytest.mark.slow
def test_stopped_with_singular_vectors(light, compile_cache, tmp_path, monkeypatch):
    reparametrised = changed(light, {"model.sigma_reparam": "spectral", "out": str(tmp_path / "undisturbed")})
    train(reparametrised)
    train(stopped_at(reparametrised, tmp_path / "run", 11, monkeypatch))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_stopped_before_the_first_step_begins_anew(light, light_undisturbed, tmp_path):
    """A run killed before its first checkpoint holds only its config and what it logged; --resume starts it."""
    out = tmp_path / "run"
    contents.mark(out)
    codec.save(changed(light, {"out": str(out)}), out / "config.json")
    logged = '{"step": 2, "tokens": 1, "seconds": 1.0}\n{"step": 4, "tok'
    (out / "metrics.jsonl").write_text(logged)
    train(changed(light, {"out": str(out), "resume": True}))
    assert_same_run(out, light_undisturbed)
    assert (out / "unsaved-1" / "metrics.jsonl").read_text() == logged, "nothing is deleted without a checkpoint"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {"cut in half": truncate, "one file lost": Path.unlink, "one bit flipped": flip_a_bit}


@pytest.fixture(scope="module")
def stopped(light, light_undisturbed, tmp_path_factory) -> tuple[ExperimentConfig, Path]:
    """A run that stopped at step 19 with checkpoints of 8, 16 and 19; copy it before going on."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(light, out, 19, patch)
    return light, out


def copied(stopped: tuple[ExperimentConfig, Path], tmp_path: Path) -> tuple[ExperimentConfig, Path]:
    config, folder = stopped
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    return changed(config, {"out": str(out), "resume": True}), out


def largest_file(checkpoint: Path) -> Path:
    return max((p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json"), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", usually(DAMAGE.values(), DAMAGE["cut in half"]), ids=DAMAGE)
def test_damaged_checkpoint_is_set_aside_and_the_one_before_used(damage, stopped, light_undisturbed, tmp_path, caplog):
    config, out = copied(stopped, tmp_path)
    caplog.set_level("WARNING", logger="plait")
    damage(largest_file(out / "checkpoints" / "19"))
    train(config)
    assert "checkpoint 19" in caplog.text and "going back to the one before" in caplog.text
    assert (out / "checkpoints" / "damaged-19").is_dir()
    assert_same_run(out, light_undisturbed)


def test_two_damaged_checkpoints_then_a_whole_one(stopped, light_undisturbed, tmp_path):
    config, out = copied(stopped, tmp_path)
    for step in ("19", "16"):
        truncate(largest_file(out / "checkpoints" / step))
    train(config)
    assert {p.name for p in (out / "checkpoints").glob("damaged-*")} == {"damaged-16", "damaged-19"}
    assert_same_run(out, light_undisturbed)


def test_half_written_checkpoint_folder_is_ignored(stopped, light_undisturbed, tmp_path):
    config, out = copied(stopped, tmp_path)
    shutil.copytree(out / "checkpoints" / "19", out / "checkpoints" / "24.orbax-checkpoint-tmp-1")
    train(config)
    assert_same_run(out, light_undisturbed)


def test_all_checkpoints_damaged_is_one_clear_error(stopped, tmp_path, capsys):
    config, out = copied(stopped, tmp_path)
    for step in ("8", "16", "19"):
        truncate(largest_file(out / "checkpoints" / step))
    with pytest.raises(CheckpointError) as error:
        train(config)
    message = str(error.value)
    assert "no whole checkpoint" in message and all(f"checkpoint {step}" in message for step in (8, 16, 19))
    assert "is damaged: state/" in message and "bytes of CRC" in message
    assert len(list((out / "checkpoints").glob("damaged-*"))) == 3, "nothing is deleted"


REFUSED = {
    "no --resume": ({"resume": False}, "already holds a run; use --resume"),
    "another learning rate": ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate: 0.01 -> 0.5"),
    "another model": ({"model.d_model": 32}, "model.d_model: 16 -> 32"),
    "another mixer option": (
        {"model.mixers.moh+softmax.top_k": 1},
        r"model.mixers.moh\+softmax.top_k: null -> 1",
    ),
    "another data seed": ({"data.seed": 5}, "data.seed: 0 -> 5"),
    "another length, under a cosine": ({"steps": 80}, "steps=80 gives another learning rate than steps=40 from step 3 on"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_run_folder_refuses_what_is_not_its_run(changes, message, stopped, tmp_path, capsys):
    config, out = copied(stopped, tmp_path)
    before = sorted(p.name for p in (out / "checkpoints").iterdir())
    with pytest.raises(runs.RunError, match=message):
        train(changed(config, changes))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == before


def test_refusal_lists_every_changed_field(stopped, tmp_path):
    config, _ = copied(stopped, tmp_path)
    with pytest.raises(runs.RunError) as error:
        train(changed(config, {"seed": 1, "optimizer.b1": 0.5, "probe_every": None}))
    assert all(line in str(error.value) for line in ("seed: 0 -> 1", "optimizer.b1: 0.9 -> 0.5", "probe_every: 5 -> null"))


def test_fields_that_do_not_change_the_numbers_may_change(stopped, tmp_path):
    config, _ = copied(stopped, tmp_path)
    assert runs.claim(changed(config, {"log_every": 7, "keep_last": 9, "keep_best": 0, "checkpoint_every": 3, "mesh.data": None}))


def test_other_text_under_the_same_path_is_refused(stopped, tmp_path):
    """The text changed between the sessions: neither its tokenizer nor its rows are those of the run."""
    config, _out = copied(stopped, tmp_path)
    text = Path(config.data.source)
    kept = {file: (file.read_bytes(), file.stat()) for file in text.iterdir()}
    try:
        (text / "0.txt").write_text("entirely other words " * 200)
        with pytest.raises(ValueError, match=r"trained on other text|belongs to other data"):
            train(config)
    finally:
        for file, (content, stat) in kept.items():
            file.write_bytes(content)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_tokenizer_of_another_corpus_is_refused(stopped, tmp_path):
    config, out = copied(stopped, tmp_path)
    other = write_corpus(tmp_path / "other", seed=7)
    first = changed(config, {"data.source": str(other), "out": str(tmp_path / "second"), "resume": False, "steps": 3})
    runs.set_up(first)  # trains the other corpus' tokenizer
    shutil.rmtree(out / "tokenizer")
    shutil.copytree(tmp_path / "second" / "tokenizer", out / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer"):
        train(config)


def test_checkpoint_of_another_model_is_named(stopped, tmp_path):
    config, out = copied(stopped, tmp_path)
    other = changed(config, {"model.d_model": 24})
    codec.save(other, out / "config.json")
    with pytest.raises(CheckpointError, match=r"is of another model: \S+ is \(.*\) there and \(.*\) here; use the config"):
        train(other)
    assert not list((out / "checkpoints").glob("damaged-*")), "it is whole; it is only not ours"


def test_command_line_refuses_a_used_folder_with_status_2(stopped, tmp_path, capsys):
    config, out = copied(stopped, tmp_path)
    assert main(flags(config, out)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "use --resume to go on with it" in error and "Traceback" not in error
