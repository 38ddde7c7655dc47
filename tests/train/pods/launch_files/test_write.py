"""What `write-launch` writes, and what it refuses before it writes anything."""

import shlex

import pytest

from plait.launch import USAGE, main
from plait.tests.train.pods.launch_files.cases import CASES, GOLDEN, IMAGE
from plait.train.pods.launch_files import KINDS
from plait.train.pods.launch_files.job import Job, checked_experiment
from plait.train.pods.launch_files.machines import machines
from plait.train.pods.launch_files.options import check_image, check_label, environment


@pytest.mark.parametrize("name", CASES)
def test_file_is_the_golden_one(name, written):
    assert (written / name).read_text("utf-8") == (GOLDEN / name).read_text("utf-8"), (
        "it differs from the golden one; if that is meant, run `python -m plait.tests.train.pods.launch_files.cases`"
    )


@pytest.mark.parametrize("name", CASES)
def test_header_says_how_to_submit_watch_and_resume(name, written):
    comments = [line for line in (written / name).read_text("utf-8").splitlines() if line.startswith("# ")]
    assert shlex.split(comments[1].partition("written by: ")[2])[3:] == shlex.split(CASES[name])
    for word in ("submit:", "watch:", "state:", "stop, save:", "resume:"):
        assert any(line.startswith(f"# {word}") for line in comments)


TO_GKE = f"--target v5e:4x4 {IMAGE} --claim runs"
TO_SLURM = "--target h100:2x8 --run-folder /runs/a"
TO_SWEEP = "--target h100:1x8 --run-folder /runs/a"
TO_TPU = "--target v5e:4x4 --project p --zone us-east5-b --package plait==0.1.0 --bucket b-1"
BAD = {
    "no kind": ("", "needs one of gke, slurm, tpu-vm"),
    "unknown kind": ("k8s lm_tiny", "needs one of gke, slurm, tpu-vm first, not k8s"),
    "no preset": (f"gke {TO_GKE}", "needs a preset"),
    "unknown preset": (f"gke lm_tinny {TO_GKE}", "preset 'lm_tinny' does not exist; did you mean"),
    "option misspelt": (f"gke lm_tiny {TO_GKE} --namespce a", "did you mean --namespace?"),
    "override misspelt": (f"gke lm_tiny {TO_GKE} --model.d-modl 64", "d-model"),
    "missing option": (f"gke lm_tiny --target v5e:4x4 {IMAGE}", "give one of them"),
    "both folders": (f"gke lm_tiny {TO_GKE} --bucket b-1", "give one of them"),
    "run folder of train": (f"slurm lm_tiny {TO_SLURM} --resume", "--resume cannot be given"),
    "hosts of train": (f"gke lm_tiny {TO_GKE} --hosts.count 4", "--hosts.count cannot be given to a launch file"),
    "mesh": (f"gke lm_tiny {TO_GKE} --mesh.fsdp 3 --data.batch-size 48", "must multiply to the 16 devices"),
    "mesh smaller": (f"gke lm_tiny {TO_GKE} --mesh.data 8", "leave mesh.data=None"),
    "batch": (f"gke lm_tiny {TO_GKE} --data.batch-size 24", "use a batch of 16 rows"),
    "slices": (f"gke lm_tiny {TO_GKE} --slices 2 --mesh.fsdp 32 --data.batch-size 32", "must be a multiple of the 2 slices"),
    "model": (f"gke lm_tiny {TO_GKE} --mesh.fsdp 16 --data.batch-size 16 --model.d-model 40", "which mesh fsdp=16 must divide"),
    "name": (f"gke lm_tiny --data.batch-size 16 {TO_GKE} --name Tiny_1", "RFC 1123"),
    "long name": (f"gke lm_tiny --data.batch-size 16 {TO_GKE} --name {'a' * 55}", "use at most 47 characters"),
    "namespace": (f"gke lm_tiny {TO_GKE} --namespace a.b", "namespace='a.b' must be lower-case"),
    "image": ("gke lm_tiny --target v5e:4x4 --claim runs --image Plait:1", "image='Plait:1' is no container image"),
    "image without tag": ("gke lm_tiny --target v5e:4x4 --claim runs --image plait", "must have a tag or a digest"),
    "machine type": (f"gke lm_tiny --data.batch-size 16 {TO_GKE} --machine-type a3-megagpu-8g", "use ct5lp-hightpu-4t"),
    "environment": (f"gke lm_tiny {TO_GKE} --env A", "must be NAME=VALUE"),
    "own environment": (f"gke lm_tiny {TO_GKE} --env PLAIT_HOST_COUNT=3", "is set by the launch file"),
    "two lines": (f"gke lm_tiny {TO_GKE} --model.pattern 'softmax\nkubectl delete'", "must be on one line"),
    "grace": (f"gke lm_tiny {TO_GKE} --grace-seconds 5", "grace_seconds=5 must be a whole number from 60"),
    "relative folder": ("slurm lm_tiny --target h100:2x8 --run-folder runs/a", "must be an absolute path"),
    "sweep and preset": (f"slurm lm_tiny --sweep ratio {TO_SLURM}", "sweep='ratio' says what is trained, and so does 'lm_tiny'"),
    "sweep of no name": (f"slurm --sweep ration {TO_SWEEP}", "did you mean 'ratio'?"),
    "sweep over hosts": (f"slurm --sweep ratio {TO_SLURM}", "a run of a sweep is trained by one host"),
    "sweep with a folder": (f"slurm --sweep ratio --dry-run {TO_SWEEP}", "--dry-run cannot be given to a launch file"),
    "sweep with a bad row": (f"slurm --sweep lm_tiny --seed 0,x {TO_SWEEP}", "row 2: seed=x: seed='x' must be"),
    "elements of no sweep": (f"slurm lm_tiny {TO_SWEEP} --elements 2", "elements=2 is of a sweep"),
    "TPU on SLURM": ("slurm lm_tiny --data.batch-size 16 --target v5e:4x4 --run-folder /runs/a", "use 'write-launch gke'"),
    "time": (f"slurm lm_tiny {TO_SLURM} --time tomorrow", "time='tomorrow' must be"),
    "GPU as TPU VM": (f"tpu-vm lm_tiny --data.batch-size 16 {TO_TPU} --target h100:2x8", "is no TPU"),
    "TPU7x as TPU VM": (f"tpu-vm lm_tiny --data.batch-size 32 {TO_TPU} --target tpu7x:2x2x4", "comes with GKE only"),
    "package": (f"tpu-vm lm_tiny {TO_TPU} --package plait", "must name one version"),
    "zone": (f"tpu-vm lm_tiny {TO_TPU} --zone us-east5", "must be a zone"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_an_error_and_writes_nothing(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    try:
        status = main(["write-launch", *shlex.split(words)])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in " ".join("".join(capsys.readouterr()).split())
    assert not any(tmp_path.iterdir())


def test_file_is_not_overwritten(tmp_path, capsys):
    words = ["write-launch", *shlex.split(f"slurm lm_tiny --data.batch-size 16 {TO_SLURM}"), "--out", str(tmp_path / "a")]
    assert main(words) == 0
    file = tmp_path / "a" / "lm-tiny.slurm.sh"
    before = file.read_text()
    assert main([*words, "--time", "1:00:00"]) == 2
    assert "lm-tiny.slurm.sh is there already; use --overwrite" in capsys.readouterr().err
    assert file.read_text() == before
    assert main([*words, "--time", "1:00:00", "--overwrite"]) == 0
    assert "--time=1:00:00" in file.read_text()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["lm-tiny.slurm.sh"]
    assert main([*words[:-1], str(file)]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err


CONTAINER = f"{TO_SLURM} --image nvcr.io#team/plait:1"
DOUBTS = {
    "a name": (f"gke lm_tiny {TO_GKE}", None),
    "an address": (f"gke lm_tiny {TO_GKE} --data.source gs://b-1/tokens", None),
    "a task without text": (f"gke lm_tiny {TO_GKE} --data.source web --data.task mqar", None),
    "a relative path": (
        f"tpu-vm lm_tiny {TO_TPU} --data.source web",
        "data.source='web' is a relative path, which each host looks for",
    ),
    "of a mixture": (
        f"slurm lm_tiny {TO_SLURM} --data.sources.web.source web --data.sources.talk.source sotu",
        "data.sources.web.source='web' is a relative path",
    ),
    "in the bucket": (f"tpu-vm lm_tiny {TO_TPU} --data.source /mnt/plait/web", None),
    "outside of the bucket": (
        f"tpu-vm lm_tiny {TO_TPU} --data.source /home/me/web",
        "data.source='/home/me/web' is outside of mount='/mnt/plait', which all hosts share; put it there, give an address, or",
    ),
    "outside of the claim": (
        f"gke lm_tiny {TO_GKE} --init-from /home/me/run",
        "init_from='/home/me/run' is outside of mount='/runs'",
    ),
    "there": (f"slurm lm_tiny {TO_SLURM} --data.source HERE", None),
    "a pattern that matches": (f"slurm lm_tiny {TO_SLURM} --data.source 'HERE/**/*.txt'", None),
    "not there": (
        f"slurm lm_tiny {TO_SLURM} --data.source HERE/no",
        "no' is not on this machine; see that every host finds it there",
    ),
    "a tokenizer": (
        f"slurm lm_tiny {TO_SLURM} --data.vocab-size None --model.vocab-size 300 --data.tokenizer /nowhere/tokenizer.json",
        "data.tokenizer='/nowhere/tokenizer.json' is not on this machine",
    ),
    "not in the container": (
        f"slurm lm_tiny {CONTAINER} --data.source HERE",
        "is in no folder that the container sees; give one that holds it with --mount",
    ),
    "in the container": (f"slurm lm_tiny {CONTAINER} --data.source HERE --mount HERE", None),
    "of a sweep": (f"slurm --sweep lm_tiny --seed 0,1 {TO_SWEEP} --data.source HERE/no", "is not on this machine"),
}


@pytest.mark.parametrize(("words", "doubt"), DOUBTS.values(), ids=DOUBTS)
def test_paths_that_the_hosts_may_not_find_are_said_and_written(words, doubt, tmp_path, monkeypatch, caplog):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    words = shlex.split(words.replace("HERE", str(tmp_path / "corpus")))
    assert main(["write-launch", *words, *([] if "--sweep" in words else ["--data.batch-size", "16"])]) == 0
    assert len(list((tmp_path / "launch").iterdir())) == 1
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told == [] if doubt is None else len(told) == 1 and doubt in told[0]


def test_overrides_of_the_supervisor_pass_through(tmp_path):
    found = machines("h100:2x8")
    checked_experiment("lm_tiny", ["--data.batch-size", "16", "--hosts.step-seconds", "120"], found)
    job = Job(name="a", machines=found, preset="lm_tiny", overrides=("--hosts.step-seconds", "120"), written_by=())
    assert "--hosts.step-seconds" in job.command("plait", "/runs/a")


def test_one_host_is_supervised_too():
    """Else SIGTERM would end it with 0, which schedulers take for done."""
    for target, alone in {"h100:1x8": True, "v6e:2x4": True, "h100:2x8": False}.items():
        command = Job(name="a", machines=machines(target), preset="lm_tiny", overrides=(), written_by=()).command(
            "plait", "/runs/a"
        )
        assert (command[-2:] == ["--hosts.local", "1"]) == alone


@pytest.mark.parametrize("name", ["a", "hybrid-1b", "a" * 63])
def test_labels(name):
    check_label("name", name)


@pytest.mark.parametrize("name", ["", "1a", "-a", "a-", "a_b", "A", "a" * 64, "a\n"])
def test_no_labels(name):
    with pytest.raises(ValueError, match="name="):
        check_label("name", name)


@pytest.mark.parametrize("image", ["plait:1", "localhost:5000/a/plait:v1.2", f"gcr.io/p/plait@sha256:{'0' * 64}", "a/b_c/d:1"])
def test_images(image):
    check_image("image", image)


def test_environment_keeps_values():
    assert environment(["A=b=c", "B="]) == {"A": "b=c", "B": ""}
    with pytest.raises(ValueError, match="given twice"):
        environment(["A=1", "A=2"])


def test_usage_names_every_kind():
    assert "write-launch " + "|".join(KINDS) in USAGE
