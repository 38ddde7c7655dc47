"""What a store holds at each moment of a push, who owns it, and what is brought from there; without training."""

import contextlib
import json
import random
import shutil
import threading
from pathlib import Path

import pytest

from plait.data.remote.address import Address, AddressError
from plait.data.remote.store import Store, StoreError, StoreLost
from plait.data.remote.tree import fetched, local
from plait.tests.s3_server import slow
from plait.train.remote import ownership
from plait.train.remote.mirror import Mirror
from plait.train.remote.ownership import Ownership
from plait.train.remote.parts import whole_steps
from plait.train.remote.pulling import pull
from plait.train.remote.reading import give_back, run_here
from plait.train.run_folder import contents, owner, seal
from plait.train.run_folder.owner import FolderInUse, FolderLost
from plait.train.terminal.results import keep

RUN = Address("s3", "bucket/run")


def save(folder: Path, step: int, *, content: bytes = b"") -> None:
    """A checkpoint as the trainer leaves one, and the lines up to it."""
    contents.mark(folder)
    (folder / contents.CONFIG).write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {at}}}\n' for at in range(1, step + 1)))
    new = folder / "checkpoints" / str(step)
    for name in ("state/_METADATA", "state/manifest.ocdbt", "extra/metadata", f"state/d/{random.random()}"):
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_bytes(f"{step} {name}".encode() + content)
    manifest = {path.relative_to(new).as_posix(): seal._digest(path) for path in new.rglob("*") if path.is_file()}
    (new / seal.MANIFEST).write_text(json.dumps(manifest))


def problems(objects: dict[str, bytes], folder: Path) -> list[str]:
    """Why the run in the store could not go on from one of the checkpoints that are whole by their names."""
    there = {key.removeprefix("bucket/").removeprefix("run/"): data for key, data in objects.items() if key.startswith("run/")}
    steps, found = whole_steps(there), []
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in there.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for step in steps:
        last = max((json.loads(line)["step"] for line in there.get("metrics.jsonl", b"").splitlines()), default=0)
        found += [f"{step}: lines up to {last}"] if last < step else []
        if (damage := seal.damage(folder / "checkpoints" / str(step))) is not None:
            found.append(f"{step} {damage}")
    if "metrics.jsonl" in there and not {"config.json", "checkpoints/README.txt"} <= there.keys():
        found.append("metrics without config or mark")
    return found


def test_store_holds_a_whole_run_after_every_request(s3, tmp_path):
    run, found, counts = tmp_path / "run", [], []
    run.mkdir()

    def seen(objects):
        found.extend(problems(objects, tmp_path / "seen"))
        counts.append(len(whole_steps(key.removeprefix("run/") for key in objects)))

    s3.seen = seen
    mirror = Mirror(Store(RUN, "out"), run)
    save(run, 4)
    (run / "probes").mkdir()
    (run / "probes/step_00000006.npz").write_bytes(b"6")
    mirror.push()
    first = len(counts)
    save(run, 8)
    shutil.rmtree(run / "checkpoints/4")
    mirror.push()
    save(run, 12)
    mirror.push()
    (run / "checkpoints/12").rename(run / "checkpoints/rewound-12")  # back to 8, and on to another 12
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {at}}}\n' for at in range(1, 9)))
    (run / "probes/step_00000006.npz").unlink()
    mirror.push()
    assert whole_steps(s3.under("run")) == [8] and "probes/step_00000006.npz" not in s3.under("run")
    save(run, 12, content=b"another")
    mirror.push()
    s3.objects["run/notes.txt"] = b"of somebody else"
    shutil.rmtree(run / "checkpoints/8")
    mirror.push()
    assert found == [] and min(counts[first - 1 :]) > 0
    assert whole_steps(s3.under("run")) == [12] and "notes.txt" in s3.under("run")
    assert mirror.left() == [] and len([key for key in s3.objects if "/12/state/d/" in key]) == 1


def test_checkpoint_that_is_gone_here_while_it_is_pushed_stays_until_a_newer_one_is_there(s3, tmp_path):
    """A run that saves faster than it is pushed, and keeps one checkpoint."""
    run, counts = tmp_path / "run", []
    mirror = Mirror(Store(RUN, "out"), run)
    save(run, 4)
    mirror.push()
    save(run, 8)
    shutil.rmtree(run / "checkpoints/4")

    def seen(objects):
        counts.append(len(whole_steps(key.removeprefix("run/") for key in objects)))
        if "run/checkpoints/8/manifest.json" in objects and (run / "checkpoints/8").exists():
            save(run, 12)
            shutil.rmtree(run / "checkpoints/8")

    s3.seen = seen
    mirror.push()
    assert whole_steps(s3.under("run")) == [8]
    mirror.push()
    assert whole_steps(s3.under("run")) == [12] and min(counts) > 0


def test_checkpoint_whose_removal_failed_is_removed_in_the_next_round(s3, tmp_path):
    run = tmp_path / "run"
    mirror = Mirror(Store(RUN, "out", patience=0.1), run)
    save(run, 4)
    mirror.push()
    save(run, 8)
    shutil.rmtree(run / "checkpoints/4")
    s3.fault = lambda method, key: "500" if method in ("POST", "DELETE") and "checkpoints/4" in key else None
    with pytest.raises(StoreLost):
        mirror.push()
    assert whole_steps(s3.under("run")) == [4, 8]
    s3.fault = lambda method, key: None
    mirror.push()
    assert {key.split("/")[2] for key in s3.objects if "checkpoints/" in key} == {"8", "README.txt"}


def test_push_cut_off_anywhere_goes_on_from_the_store(s3, tmp_path):
    save(tmp_path / "run", 4)
    store = Store(RUN, "out", patience=0.2)
    Mirror(store, tmp_path / "run").push()
    whole = dict(s3.objects)
    save(tmp_path / "run", 8)
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    for requests in range(0, 12, 2):
        s3.objects, left = dict(whole), [requests]

        def fault(method, key, left=left):
            left[0] -= method != "GET"
            return "drop" if left[0] < 0 else None

        s3.fault = fault
        cut = Mirror(store, tmp_path / "run")
        cut._steps = {4: whole["run/checkpoints/4/manifest.json"]}
        with contextlib.suppress(StoreLost):
            cut.push()
        s3.fault = lambda method, key: None
        assert problems(s3.objects, tmp_path / "seen") == []
        new = tmp_path / f"new-{requests}"
        pulled = pull(store, new)
        assert pulled.steps and seal.damage(new / "checkpoints" / str(max(pulled.steps))) is None
        on = Mirror(store, new)
        on.known(pulled)
        if 8 not in pulled.steps:
            save(new, 8, content=b"made again")
        shutil.rmtree(new / "checkpoints/4", ignore_errors=True)
        on.push()
        assert problems(s3.objects, tmp_path / "seen") == [] and whole_steps(s3.under("run")) == [8]


def test_store_that_fails_now_and_then_loses_nothing_and_one_that_is_gone_is_named(s3, tmp_path, monkeypatch):
    rng = random.Random(1)
    s3.fault = lambda method, key: rng.choice(["500", "drop", "lost", "short", None, None, None, None])
    store = Store(RUN, "out", patience=30)
    large = bytes(rng.randrange(256) for _ in range(1000)) * 100
    monkeypatch.setattr("plait.data.remote.store._PART", 30_000)
    monkeypatch.setattr("plait.data.remote.store._LARGE", 50_000)
    (tmp_path / "a").write_bytes(large)
    store.upload("a", tmp_path / "a")
    assert s3.objects["run/a"] == large
    store.fetch("a", tmp_path / "b", store.objects("a")["a"])
    assert (tmp_path / "b").read_bytes() == large
    s3.fault = slow(0.05)
    assert store.read("a") == large and store.read("none") is None
    save(tmp_path / "run", 4)
    with (
        s3.gone(),
        pytest.raises(StoreLost, match=r"Not pushed: .*config.json.* all of it is in .*run.*--resume on this machine"),
    ):
        Mirror(store, tmp_path / "run").finish(0.5)
    assert list(s3.under("run")) == ["a"] and seal.damage(tmp_path / "run/checkpoints/4") is None
    s3.fault = lambda method, key: None
    begun = threading.Timer(0.7, setattr, (s3, "fault", s3.fault))
    s3.fault = lambda method, key: "drop"
    begun.start()
    Mirror(store, tmp_path / "run").finish(20)
    assert whole_steps(s3.under("run")) == [4]


def test_run_in_a_store_has_one_owner(s3, monkeypatch):
    monkeypatch.setattr(ownership, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(ownership, "DEAD_SECONDS", 0.2)
    store = Store(RUN, "out")
    first = Ownership(store)
    with pytest.raises(FolderInUse, match="out='s3://bucket/run' is in use: process"):
        Ownership(store)
    first.assure()
    monkeypatch.setattr(owner, "_machine", lambda: "another")  # from where its process cannot be looked up, and it is silent
    second = Ownership(store)
    with pytest.raises(FolderLost, match="now belongs to process"):
        first._renew()
        first.check()
    second.leave(trace=True)
    third = Ownership(store)
    assert list(s3.under("run/owner")) == ["00000003.json"]
    third.leave(trace=False)
    first.leave(trace=True)


def test_files_of_a_store_are_fetched_when_read_and_again_when_changed(s3, tmp_path):
    s3.objects |= {"web/a.txt": b"aa", "web/b/c.txt": b"ccc", "web/x": b""}
    root = local("s3://bucket/web", "data.source")
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()) == ["a.txt", "b/c.txt", "x"]
    assert (root / "b/c.txt").stat().st_size == 3 and ("GET", "web/b/c.txt") not in s3.log
    before = (root / "b/c.txt").stat().st_mtime_ns
    assert fetched(root / "b/c.txt").read_bytes() == b"ccc" and (root / "b/c.txt").stat().st_mtime_ns == before
    count = s3.log.count(("GET", "web/b/c.txt"))
    s3.objects["web/a.txt"] = b"bb"
    del s3.objects["web/x"]
    local("s3://bucket/web", "data.source")
    fetched(root / "b/c.txt")
    assert (
        s3.log.count(("GET", "web/b/c.txt")) == count
        and fetched(root / "a.txt").read_bytes() == b"bb"
        and not (root / "x").exists()
    )
    assert local("s3://bucket/web/a.txt", "data.source").read_bytes() == b"bb"
    s3.objects["web/b/c.txt"] = b"ddd"
    local("s3://bucket/web/b", "data.source")
    s3.objects["web/b/c.txt"] = b"eeee"  # between listing and reading
    with pytest.raises(FileNotFoundError, match="has changed while it was read"):
        fetched(root / "b/c.txt")
    with pytest.raises(StoreError, match="nothing is there"):
        local("s3://bucket/none", "data.source")


def test_run_is_read_through_a_folder_of_this_machine(s3, tmp_path):
    save(tmp_path / "run", 4)
    save(tmp_path / "run", 8)
    Mirror(Store(RUN, "out"), tmp_path / "run").push()
    here = run_here(Path("s3://bucket/run"))
    assert [path.name for path in (here / "checkpoints").iterdir() if path.is_dir()] == ["8"]
    assert seal.damage(here / "checkpoints/8") is None and len((here / "metrics.jsonl").read_text().splitlines()) == 8
    (here / "eval_8.json").write_text("{}")
    give_back(here / "eval_8.json")
    assert s3.objects["run/eval_8.json"] == b"{}"
    (here / "eval_8.json").unlink()  # as on another machine that opened the run before
    keep({"step": 8}, {"batches": 1}, None, here / "eval_8.json")
    assert s3.objects["run/eval_8.json"] == b"{}" and json.loads(s3.objects["run/eval_8_2.json"])["asked"] == {"batches": 1}
    assert run_here("s3://bucket/run/checkpoints/4", "branch") == here / "checkpoints/4"
    assert seal.damage(here / "checkpoints/4") is None and (here / "eval_8.json").exists()
    with pytest.raises(StoreError, match="no whole checkpoint of step 5; it has 4, 8"):
        run_here("s3://bucket/run", step=5)


def test_damaged_checkpoint_of_a_store_is_left_and_the_one_before_taken(s3, tmp_path):
    save(tmp_path / "run", 4)
    save(tmp_path / "run", 8)
    store = Store(RUN, "out")
    Mirror(store, tmp_path / "run").push()
    s3.objects["run/checkpoints/8/extra/metadata"] = b"other"
    assert sorted(pull(store, tmp_path / "new").steps) == [4]
    assert [path.name for path in (tmp_path / "new/checkpoints").iterdir() if path.is_dir()] == ["4"]
    assert s3.objects["run/checkpoints/8/extra/metadata"] == b"other"
    s3.objects["run/checkpoints/4/extra/metadata"] = b"other"
    with pytest.raises(StoreError, match="all are damaged"):
        pull(store, tmp_path / "newer")


def test_addresses_are_told_from_paths():
    forms = {"runs/a": None, "s3:/b/k/": "s3://b/k", "gs://b//k": "gs://b/k", "C:/x": None, "s3:x": None}
    assert {text: (None if (found := Address.of(text)) is None else str(found)) for text in forms} == forms
    for text in ("ftp://b/k", "s3://b/../k"):
        with pytest.raises(AddressError):
            Address.of(text)
