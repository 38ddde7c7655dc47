"""Scripts for SLURM and TPU VMs: clean, and run with stand-ins for the schedulers' programs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plait.configs.command_line.cli import parse_experiment
from plait.tests.train.pods.launch_files.cases import SCRIPTS

# Long options of sbatch, SLURM 22.05 to 25.05 (slurm.schedmd.com/sbatch.html).
SBATCH = re.findall(
    r"\S+",
    """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container container-id contiguous
core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude exclusive export
export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold
ignore-pbs input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice
no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output overcommit
oversubscribe parsable partition power prefer priority profile propagate qos quiet reboot requeue reservation segment signal sockets-per-node
spread-job stepmgr switches test-only thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid usage use-min-nodes verbose
wait wait-all-nodes wckey wrap
""",
)


def remote_parts(script: str) -> list[str]:
    return re.findall(r"<< 'REMOTE'\n(.*?)^REMOTE$", script, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_clean(name, written, tmp_path):
    script = written / name
    parts = [script]
    for number, text in enumerate(remote_parts(script.read_text("utf-8"))):
        parts.append(tmp_path / f"{number}.sh")
        parts[-1].write_text("#!/bin/bash\n" + text)
    assert len(parts) == (3 if "tpu-vm" in name else 1)
    assert os.access(script, os.X_OK)
    for part in parts:
        subprocess.run(["bash", "-n", part], check=True)
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("needs shellcheck (extra `test`)")
    # SC2016: a dollar sign in a quoted value, which is meant.
    found = subprocess.run([shellcheck, "--exclude=SC2016", *parts], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "slurm" in name])
def test_sbatch_options_exist_and_stand_first(name, written):
    lines = (written / name).read_text("utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    assert directives and all(lines.index(line) < first for line in directives), "sbatch reads no option after the first command"
    options = {}
    for line in directives:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        assert match and match[1] in SBATCH, line
        options[match[1]] = match[2]
    assert len(options) == len(directives)
    assert options["ntasks-per-node"] == "1" and options["gpus-per-node"] == "8" and "requeue" in options
    assert re.fullmatch(r"TERM@\d{2,5}", options["signal"]) and int(options["signal"][5:]) >= 60


def fake(folder: Path, **programs: str) -> dict[str, str]:
    """An environment whose PATH begins with these shell programs."""
    folder.mkdir(exist_ok=True)
    for name, body in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(folder)}


@pytest.mark.parametrize(
    ("status", "state", "restarts", "queued"),
    [
        (0, "RUNNING", 0, False),
        (2, "RUNNING", 0, False),
        (75, "RUNNING", 500, True),
        (75, "COMPLETING", 0, False),
        (1, "RUNNING", 99, True),
        (1, "RUNNING", 100, False),
        (137, "RUNNING", 0, True),
        (143, "COMPLETING", 0, False),
    ],
)
def test_batch_script_is_queued_again_when_it_should(status, state, restarts, queued, written, tmp_path):
    env = fake(
        tmp_path / "bin",
        srun=f'printf "%s\\n" "$JAX_LOCAL_DEVICE_IDS" "$@" > "$OUT/args"; exit {status}',
        squeue=f"echo {state}",
        scontrol='echo "$@" > "$OUT/queued"',
    )
    env |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", written / "tiny-b200.slurm.sh"], env=env, cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode == status
    assert (tmp_path / "bin/queued").exists() == queued
    if queued:
        assert (tmp_path / "bin/queued").read_text() == "requeue 7\n"
    devices, *args = (tmp_path / "bin/args").read_text().splitlines()
    assert devices == "0,1,2,3,4,5,6,7"
    assert "--kill-on-bad-exit" not in " ".join(args), "it would end hosts that are still saving"
    assert "--cpus-per-task=96" in args and "--container-mounts=/shared/corpus:/shared/corpus,/shared/runs:/shared/runs" in args
    at = args.index("plait")
    config = parse_experiment(args[at + 2], args[at + 3 :])
    assert config.resume and config.folder == "/shared/runs/tiny" and config.model.pattern == "gated_deltanet*3,softmax"


@pytest.mark.parametrize(("status", "queued"), [(0, False), (1, False), (2, False), (75, True), (137, True)])
def test_elements_of_a_sweep_are_queued_again_unless_runs_have_failed(status, queued, written, tmp_path):
    env = fake(
        tmp_path / "bin",
        srun=f'printf "%s\\n" "${{JAX_LOCAL_DEVICE_IDS-none}}" "$@" > "$OUT/args"; exit {status}',
        squeue='[[ "$*" == *"--jobs 5_1 "* ]] || echo PENDING; echo RUNNING',  # the array's number tells of all elements
        scontrol='echo "$@" > "$OUT/queued"',
    )
    env |= {"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}
    script = written / "ratio.slurm.sh"
    assert "#SBATCH --array=0-1\n" in script.read_text(), "fifteen runs, eight at a time"
    done = subprocess.run(["bash", script], env=env, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == status and (tmp_path / "bin/queued").exists() == queued
    assert not queued or (tmp_path / "bin/queued").read_text() == "requeue 5_1\n"
    assert ("runs have failed" in done.stdout) == (status == 1)
    devices, *args = (tmp_path / "bin/args").read_text().splitlines()
    assert devices == "none", "workers share them out"
    assert args[args.index("plait") :] == [
        *("plait", "sweep", "ratio", "--preset", "lm_quick", "--workers", "8", "--out", "/shared/sweeps/ratio")
    ]


def test_batch_script_outlives_sigterm(written, tmp_path):
    """The tasks are told to save; the script waits for them and queues itself again."""
    env = fake(
        tmp_path / "bin",
        srun='kill -TERM "$PPID"; sleep 0.2; exit 75',
        squeue="echo RUNNING",
        scontrol='echo "$@" > "$OUT/queued"',
    )
    done = subprocess.run(
        ["bash", written / "hybrid-h100.slurm.sh"],
        env=env | {"SLURM_JOB_ID": "7"},
        cwd=tmp_path,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 75 and (tmp_path / "bin/queued").exists()


GCLOUD = r"""
echo "$*" | head -n 1 >> "$OUT/calls"
case "$*" in
  *"queued-resources describe"*) cat "$OUT/state" 2> /dev/null || { echo NOT_FOUND >&2; exit 1; } ;;
  *"queued-resources create"*) echo ACTIVE > "$OUT/state" ;;
  *"queued-resources delete"*) rm "$OUT/state" ;;
  *"tpu-vm ssh"*) for word in "$@"; do if [[ "$word" == --command=* ]]; then bash -c "${word#--command=}" || exit; fi; done ;;
esac
"""


def gcloud(tmp_path: Path, **more: str) -> dict[str, str]:
    programs = {
        "gcloud": GCLOUD,
        "sudo": 'exec "$@"',
        "systemctl": "[[ $1 != show ]] || echo exited",
        "sleep": ":",
        "python3": ":",
        "curl": "exit 1",
    }
    programs |= {"mountpoint": "exit 0", "systemd_run": r'printf "%s\n" "$@" > "$OUT/unit"; echo >> "$OUT/started"'} | more
    home = tmp_path / "home"
    uv = home / ".local/bin/uv"
    uv.parent.mkdir(parents=True, exist_ok=True)
    uv.write_text('#!/bin/bash\nprintf "%s\\n" "$@" >> "$OUT/uv"\n')
    uv.chmod(0o755)
    return {**fake(tmp_path / "bin", **programs), "HOME": str(home)}


@pytest.mark.parametrize(
    ("name", "nodes", "shape"),
    [
        (
            "hybrid-v5p.tpu-vm.sh",
            ["hybrid-v5p"],
            "--node-id=hybrid-v5p --type=v5p --topology=4x8x8 --runtime-version=v2-alpha-tpuv5",
        ),
        ("tiny-v6e.tpu-vm.sh", ["tiny-v6e-0", "tiny-v6e-1"], "--node-count=2 --node-prefix=tiny-v6e --accelerator-type=v6e-16"),
    ],
)
def test_tpu_script_creates_installs_starts_watches_and_deletes(name, nodes, shape, written, tmp_path):
    env = gcloud(tmp_path)
    done = subprocess.run(["bash", written / name, "run"], env=env, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr
    calls = (tmp_path / "bin/calls").read_text().splitlines()
    (create,) = [call for call in calls if "create" in call]
    assert shape in create and "--project=lab" in create
    for node in nodes:
        assert sum(f"tpu-vm ssh {node} --worker=all" in call for call in calls) == 3, (
            "install, start and one look, on every host of every slice"
        )
    assert any(re.fullmatch(r"plait\[tpu\] @ \S+", line) for line in (tmp_path / "bin/uv").read_text().splitlines())
    unit = (tmp_path / "bin/unit").read_text().splitlines()
    assert {"--property=Restart=on-failure", "--property=RestartPreventExitStatus=2 3"} <= set(unit)
    at = next(i for i, word in enumerate(unit) if word.endswith("/plait"))
    config = parse_experiment(unit[at + 2], unit[at + 3 :])
    assert config.resume and config.folder == f"/mnt/plait/{name.split('.')[0]}"
    if "v6e" in name:
        assert "--setenv=NOTE=it's $HOME" in unit and config.model.pattern == "gated_deltanet*3,softmax"
    subprocess.run(["bash", written / name, "delete"], env=env, check=True, capture_output=True)
    assert not (tmp_path / "bin/state").exists()


def test_tpu_script_ends_after_bad_input(written, tmp_path):
    env = gcloud(tmp_path, systemctl="[[ $1 != show ]] || echo failed")
    done = subprocess.run(
        ["bash", written / "hybrid-v5p.tpu-vm.sh", "run"], env=env, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "2 is bad input" in done.stderr


@pytest.mark.parametrize(
    ("first", "created"), [("echo SUSPENDED > $OUT/state", 2), ("echo dead", 1), ("echo auto-restart", 1), ("exit 255", 1)]
)
def test_tpu_script_goes_on_until_the_run_is_done(first, created, written, tmp_path):
    """Taken TPUs are asked for again, hosts started anew start the run again, and what is only out of reach is left alone."""
    env = gcloud(
        tmp_path,
        systemctl=f'[[ $1 == show ]] || exit 0; [[ -f "$OUT/seen" ]] && echo exited || {{ touch "$OUT/seen"; {first}; }}',
    )
    done = subprocess.run(
        ["bash", written / "hybrid-v5p.tpu-vm.sh", "run"], env=env, check=False, capture_output=True, text=True, timeout=60
    )
    calls = (tmp_path / "bin/calls").read_text()
    assert done.returncode == 0, done.stderr
    assert calls.count("queued-resources create") == created and calls.count("queued-resources delete") == created - 1
    assert len((tmp_path / "bin/started").read_text().splitlines()) == (2 if created == 2 or "dead" in first else 1)
