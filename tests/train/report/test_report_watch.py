"""The live view: a page that follows runs, rests when nothing is new, and ends with them."""

import dataclasses
import json
import types

import pytest

from plait.train.commands import report as command
from plait.train.report import watch as module
from plait.train.report import write_report
from plait.train.report.watch import watch
from plait.train.run_folder import owner
from plait.train.run_folder.writer import MetricsWriter

RELOAD = '<meta http-equiv="refresh" content="5">'


class World:
    """Time that passes only in sleep, where `then` happens, a step of the script at each look; pages written are counted."""

    def __init__(self, monkeypatch, *then):
        self.now, self.then, self.pages, self.said = 0.0, list(then), [], []
        # not those of the module `time`, which threads that other tests left behind use as well
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(module, "write_report", self.write)

    def sleep(self, seconds):
        self.now += seconds
        if self.then:
            self.then.pop(0)()

    def write(self, runs, out, **options):
        path = write_report(runs, out, **options)
        self.pages.append(path.read_text())
        return path


def write(run, *steps, end=3):
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps({"steps": end}))
    with MetricsWriter(run, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, {"loss/train": 9.0 - step}, tokens=step, seconds=step)


def own(run, **changes):
    """The run belongs to this process, or to what `changes` says."""
    path = run / owner.OWNER / "00000001.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(owner.this_process(), **changes))))


def nothing():
    pass


def test_page_is_written_when_there_is_something_new_and_at_the_end(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write(run, 1)
    own(run)
    world = World(monkeypatch, nothing, nothing, lambda: write(run, 2), nothing, lambda: (write(run, 3), own(run, left=True)))
    watch([run], None, 5.0, world.said.append)
    assert len(world.pages) == 3 and world.now == 25
    assert [RELOAD in page for page in world.pages] == [True, True, False]
    assert all(page.count("<script>") == 1 and "sessionStorage" in page for page in world.pages), (
        "the last one keeps what was open too"
    )
    assert "over 2 steps" in world.pages[1] and "over 3 steps" in world.pages[2]
    assert len(world.said) == 1 and str(run / "report/index.html") in world.said[0]


def test_run_that_has_ended_is_shown_once(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write(run, 1, 2, 3)
    world = World(monkeypatch)
    watch([run], None, 5.0, world.said.append)
    assert len(world.pages) == 1 and world.now == 0 and "http-equiv" not in world.pages[0]


@pytest.mark.parametrize("gone", [{"left": True}, {"pid": 1 << 30}, {"machine": "another"}], ids=["stopped", "killed", "far"])
def test_run_without_its_last_step_is_watched_for_a_while(tmp_path, monkeypatch, gone):
    """A process on another machine is known by its renewals alone."""
    run = tmp_path / "run"
    write(run, 1)
    own(run, **gone)
    world = World(monkeypatch, lambda: own(run, **gone, beat=1))
    watch([run], None, 5.0, world.said.append)
    assert world.now == owner.DEAD_SECONDS + (5 if "machine" in gone else 0) and len(world.pages) == 2


def test_all_of_several_runs_are_waited_for(tmp_path, monkeypatch):
    runs = [tmp_path / "a", tmp_path / "b"]
    write(runs[0], 1, 2, 3)
    write(runs[1], 1)
    own(runs[1])
    world = World(monkeypatch, lambda: write(runs[1], 2), lambda: (write(runs[1], 3), own(runs[1], left=True)))
    watch(runs, None, 5.0, world.said.append)
    assert len(world.pages) == 3 and "2 runs compared" in world.pages[-1]


def test_run_that_compiles_is_waited_for(tmp_path, monkeypatch):
    run = tmp_path / "run"
    own(run)
    world = World(monkeypatch, nothing, lambda: write(run, 1), lambda: (write(run, 2, 3), own(run, left=True)))
    watch([run], None, 5.0, world.said.append)
    assert world.said[0] == "waiting for the first metrics" and len(world.pages) == 2


def test_what_is_half_written_is_left_out_and_damage_keeps_the_page(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write(run, 1, 2)
    own(run)

    def append(text):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(text)

    world = World(monkeypatch, lambda: append('{"step": 3, "lo'), lambda: append("\ndamage\n{}\n"), lambda: own(run, left=True))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3"):
        watch([run], None, 5.0, world.said.append)
    assert not world.then and len(world.pages) == 2 and "line 3 is unfinished" in world.pages[1]
    assert "over 2 steps" in (run / "report/index.html").read_text()


def test_interrupt_leaves_a_page_that_rests(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write(run, 1)
    own(run)

    def interrupt():
        raise KeyboardInterrupt

    world = World(monkeypatch, interrupt)
    watch([run], tmp_path / "out", 5.0, world.said.append)
    assert RELOAD in world.pages[0] and "http-equiv" not in (tmp_path / "out/index.html").read_text()


def test_page_that_takes_long_is_written_seldom(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write(run, 1)
    own(run)
    world = World(monkeypatch, lambda: (write(run, 2, 3), own(run, left=True)))
    quick = world.write
    monkeypatch.setattr(module, "write_report", lambda *a, **b: (setattr(world, "now", world.now + 10), quick(*a, **b))[1])
    watch([run], None, 5.0, world.said.append)
    assert world.now == 10 + 40 + 10


def test_folder_that_is_no_run_is_an_error_at_once(tmp_path, monkeypatch):
    world = World(monkeypatch)
    (tmp_path / "file").touch()
    for run, why in ((tmp_path / "missing", "does not exist"), (tmp_path, "is not a run"), (tmp_path / "file", "is no folder")):
        with pytest.raises(ValueError, match=why):
            watch([run], None, 5.0, world.said.append)
    assert world.now == 0


@pytest.mark.parametrize("options", [("--every", "5"), ("--watch", "--every", "0"), ("--watch", "--every", "nan")])
def test_time_without_sense_is_an_error(tmp_path, options):
    write(tmp_path / "run", 1)
    with pytest.raises(ValueError, match="every="):
        command.run([str(tmp_path / "run"), *options])
    assert not (tmp_path / "run/report").exists()


def test_command_watches(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    write(run, 1)
    own(run)
    world = World(monkeypatch, lambda: (write(run, 2, 3), own(run, left=True)))
    command.run([str(run), "--watch", "--every", "7"])
    assert world.now == 7 and len(world.pages) == 2
    assert (
        capsys.readouterr().out == f"report: {run}/report/index.html, looked at every 7 s until training ends (Ctrl-C ends it)\n"
    )
