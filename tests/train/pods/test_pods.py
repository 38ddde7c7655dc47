"""Real processes on loopback: what one host trains, several train; whatever ends them, any number of hosts goes on."""

import dataclasses
import itertools
import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.tests.tolerances import assert_close
from plait.tests.train.common import different_arrays, tree_arrays, write_corpus
from plait.tests.train.pods.pod import SMALL, Pod, checkpoints_of, statuses
from plait.train import run as runs
from plait.train.checkpoint import Checkpoints

STEPS = 12
CLOCKS = ("seconds", "time/", "throughput/")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A run's command line without its folder."""
    folder = tmp_path_factory.mktemp("pods")
    source = write_corpus(folder / "text")
    # The gradient's rounding must not be blown up by Adam's division, since other meshes are compared.
    return [*SMALL, "--data.source", source, "--data.cache-dir", folder / "cache", "--steps", STEPS, "--optimizer.eps", "1e-3"]


@pytest.fixture(scope="module")
def undisturbed(words, compile_cache, tmp_path_factory):
    """Two hosts of one device each, never stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    results = Pod(2, *words, "--out", out, cache=compile_cache).finish()
    assert statuses(results) == [0, 0], results
    return out


def lines_of(out: Path) -> list[dict]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def last_state(out: Path):
    """The last checkpoint, read here on one device."""
    config = codec.load(ExperimentConfig, out / "config.json")
    setup = runs.set_up(dataclasses.replace(config, out=str(out), mesh=MeshConfig(data=1)))
    checkpoints = Checkpoints(out / "checkpoints", read_only=True)
    try:
        step, state, extra = checkpoints.restore(setup.like)
    finally:
        checkpoints.close()
    assert step == config.steps
    return state, extra["data"], extra["tokens"]


def assert_same(out: Path, expected: Path) -> None:
    """Bit for bit, clocks apart."""
    assert lines_of(out) == lines_of(expected)
    assert different_arrays(last_state(out), last_state(expected)) == []


def assert_like(out: Path, expected: Path) -> None:
    """Within the tolerance rule: another order of summation."""
    left, right = lines_of(out), lines_of(expected)
    assert [line.keys() for line in left] == [line.keys() for line in right]
    for name in {name for line in right for name in line}:
        values = [np.array([line[name] for line in lines if name in line]) for lines in (left, right)]
        assert_close(values[0], values[1], dtype="float32", err_msg=name)
    (state, *rest), (wanted, *others) = last_state(out), last_state(expected)
    assert rest == others
    arrays, exact = tree_arrays(state.params), tree_arrays(wanted.params)
    for name, array in arrays.items():
        assert_close(array, exact[name], err_msg=name)


def test_two_hosts_train_as_one_with_two_devices(words, undisturbed, compile_cache, tmp_path):
    results = Pod(1, *words, "--out", tmp_path / "run", devices=2, cache=compile_cache).finish()
    assert statuses(results) == [0], results
    assert_like(tmp_path / "run", undisturbed)
    facts = json.loads((undisturbed / "environment.json").read_text())
    assert (facts["processes"], facts["devices"]["count"], facts["mesh"]["data"]) == (2, 2, 2)
    assert (undisturbed / "report" / "index.html").exists() and (undisturbed / "probes" / "attention.npz").exists()
    spread = [
        line for line in map(json.loads, (undisturbed / "metrics.jsonl").read_text().splitlines()) if "time/slowest_host" in line
    ]
    assert len(spread) == STEPS - 1 and all(line["time/slowest_host"] in (0, 1) for line in spread)


LOOKING = [
    *("--model.num-layers", "2", "--model.qk-clip.threshold", "2", "--optimizer.accumulate", "2", "--model.remat", "full"),
    *("--model.attention-loss.entropy-floor", "1", "--model.attention-loss.floor", "0.9"),
    *("--model.attention-loss.head-balance", "1", "--model.attention-loss.head-diversity", "0.1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "pipeline", "context"])
def test_layers_that_look_at_themselves_do_so_on_two_hosts(mesh, words, compile_cache, tmp_path):
    """QK-clip and the losses on attention."""
    words = [
        *words,
        *LOOKING,
        "--mesh.data",
        "2" if mesh == "data" else "1",
        *([] if mesh == "data" else [f"--mesh.{mesh}", "2"]),
    ]
    for name, hosts in (("two", 2), ("one", 1)):
        results = Pod(hosts, *words, "--out", tmp_path / name, devices=2 // hosts, cache=compile_cache).finish()
        assert statuses(results) == [0] * hosts, results
    assert_like(tmp_path / "two", tmp_path / "one")
    first = lines_of(tmp_path / "two")[0]
    assert first["optimizer/clipped_heads"] > 0 and all(
        f"loss/attention/{name}" in first for name in ("entropy_floor", "head_balance")
    )


@pytest.mark.slow
def test_one_killed_ends_both_within_a_minute_and_both_go_on(words, undisturbed, compile_cache, tmp_path):
    out = tmp_path / "run"
    pod = Pod(2, *words, "--out", out, cache=compile_cache)
    pod.until(lambda: checkpoints_of(out))
    killed = pod.kill(1)
    results = pod.finish()
    assert time.monotonic() - killed < 60 and statuses(results) == [1, 1], results
    assert "host 1 of 2" in results[1][1] and "killed by SIGKILL" in results[1][1] and "--resume goes on" in results[0][1]
    results = Pod(2, *words, "--out", out, "--resume", cache=compile_cache).finish()
    assert statuses(results) == [0, 0] and "goes on from step" in results[0][1], results
    assert_same(out, undisturbed)


@pytest.mark.slow
def test_sigterm_on_one_host_saves_both_at_one_step_and_one_process_goes_on(words, undisturbed, compile_cache, tmp_path):
    out = tmp_path / "run"
    words = [*words, "--steps", 4000, "--out", out]
    pod = Pod(2, *words, cache=compile_cache)
    pod.until(lambda: checkpoints_of(out))
    pod.processes[1].send_signal(signal.SIGTERM)
    results = pod.finish()
    assert statuses(results) == [75, 75], results
    step = checkpoints_of(out)[-1]
    assert all(f"stopped and saved at step {step}; --resume goes on" in text for _, text in results), results
    assert step < 4000 and lines_of(out)[-1]["step"] == step


BAD = {
    "options": ([], [["--seed", "0"], ["--seed", "1"]], "the hosts disagree: seed is 0 on host 0, 1 on host 1"),
    "an option that one does not have": ([], [[], ["--no-such-option", "1"]], "host 1 of 2: its options cannot be read"),
    "the mesh": (["--mesh.data", "1", "--mesh.tensor", "3"], [], "mesh.tensor=3 must multiply to the 2 devices"),
    "the batch": (["--data.batch-size", "5"], [], "data.batch_size=5"),
    "data of one": ([], [[], ["--data.cache-dir", "/proc/no"]], "host 1 of 2: /proc/no cannot hold the tokenised corpus"),
}


def bad_input(case: str, words, cache: Path, out: Path) -> None:
    common, own, message = BAD[case]
    pod = Pod(2, *words, *common, "--out", out, own=own, cache=cache)
    results = pod.finish(90)
    assert statuses(results) == [2, 2] and all(message in text for _, text in results), results
    assert "Traceback" not in results[0][1] + results[1][1] and not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("case", [case if case == "options" else pytest.param(case, marks=pytest.mark.slow) for case in BAD])
def test_bad_input_ends_every_host_with_status_2(case, words, compile_cache, tmp_path):
    bad_input(case, words, compile_cache, tmp_path / "run")


SPREAD = {
    "tensor over two hosts": (2, 1, ["--mesh.tensor", 2]),
    "context over two hosts": (2, 1, ["--mesh.context", 2]),
    "fsdp over two hosts": (2, 1, ["--mesh.fsdp", 2]),
    "tensor over four hosts and rows in pairs": (4, 1, ["--mesh.data", 2, "--mesh.tensor", 2]),
    "context over four hosts and rows in pairs": (4, 1, ["--mesh.fsdp", 2, "--mesh.context", 2]),
    "two hosts of two devices, all four axes but one": (2, 2, ["--mesh.data", 2, "--mesh.tensor", 2]),
    "two hosts of two devices, context inside": (2, 2, ["--mesh.context", 2, "--mesh.data", 2]),
    "one host": (1, 2, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SPREAD)
def test_the_same_batches_on_any_mesh_over_hosts(case, words, undisturbed, compile_cache, tmp_path):
    hosts, devices, mesh = SPREAD[case]
    results = Pod(hosts, *words, *mesh, "--out", tmp_path / "run", devices=devices, cache=compile_cache).finish()
    assert statuses(results) == [0] * hosts, results
    assert_like(tmp_path / "run", undisturbed)


KILLS = 5
SEEDS = 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_at_random_again_and_again(seed, words, undisturbed, compile_cache, tmp_path):
    """`KILLS` kills: a run that outlives some begins anew for the others. Even seeds stay on two hosts and end bit for bit as the
    undisturbed run; odd ones go on with other hosts and meshes each time."""
    rng, kills, out = random.Random(seed), 0, tmp_path / "run-0"
    for attempt in itertools.count(1):
        hosts, devices, mesh = (2, 1, []) if seed % 2 == 0 else rng.choice([(2, 1, []), *SPREAD.values()])
        before = checkpoints_of(out)
        pod = Pod(hosts, *words, *mesh, "--out", out, "--resume", devices=devices, cache=compile_cache)
        killed = kill_at_random(pod, rng.randrange(hosts), out, before, rng, alone=hosts == 1) if kills < KILLS else None
        results = pod.finish(kill=killed is not None and hosts == 1)
        assert not [*(out / "checkpoints").glob("damaged-*")], results
        assert max(checkpoints_of(out), default=0) >= max(before, default=0), "a checkpoint was lost"
        if killed is not None:
            kills += 1
            ended = checkpoints_of(out)[-1:] == [STEPS]  # another host may have been done already
            if hosts > 1:
                assert time.monotonic() - killed < 60 and (ended or statuses(results) == [1] * hosts), results
        else:
            assert statuses(results) == [0] * hosts, results
            (assert_same if seed % 2 == 0 else assert_like)(out, undisturbed)
            if kills >= KILLS:
                return
            out = tmp_path / f"run-{attempt}"


def kill_at_random(pod: Pod, victim: int, out: Path, before: list[int], rng: random.Random, *, alone: bool) -> float | None:
    """Kills (or, one time in ten, stops) a training process at any time up to shortly after its first checkpoint; None when too late."""
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0, 8))
    else:
        deadline = time.monotonic() + 120
        while checkpoints_of(out) == before and all(p.poll() is None for p in pod.processes) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.5))
    if alone:
        if pod.processes[0].poll() is not None:
            return None
        pod.processes[0].send_signal(signal.SIGKILL)
        return time.monotonic()
    try:
        return pod.kill(victim, signal.SIGSTOP if rng.random() < 0.1 else signal.SIGKILL)
    except (OSError, ValueError):  # not begun, or at an end already
        return None
