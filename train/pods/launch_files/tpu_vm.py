"""A script around gcloud for Cloud TPU VMs: gets them, installs plait, starts the run as a service on every host, watches, stops, deletes.

A service of systemd starts the run again on each host until it is done, except after bad input. TPUs are asked for as a queued
resource, of one node a slice. Hosts find each other through the metadata server, so the command is the same on all.

Sources, Google Cloud's documentation: tpu/docs/queued-resources, tpu/docs/multislice-introduction, tpu/docs/managing-tpus-tpu-vm,
sdk/gcloud/reference/compute/tpus/queued-resources/create, storage/docs/cloud-storage-fuse/install; and systemd.service(5).
"""

from __future__ import annotations

import re
import shlex

from plait.train.pods.hosts.supervise import BAD_INPUT, ENDED
from plait.train.pods.launch_files.job import Job
from plait.train.pods.launch_files.options import TpuVmOptions, environment

SUFFIX = "tpu-vm.sh"
_PYTHON = "$HOME/plait-env/bin/python"


def render(options: TpuVmOptions, job: Job) -> str:
    """The script. Raises ValueError for machines that are no Cloud TPU VMs."""
    if job.machines.chip.platform != "tpu":
        raise ValueError(f"target={options.target!r} is no TPU; use 'write-launch slurm' or 'write-launch gke'")
    if job.machines.accelerator_type is None:
        raise ValueError(f"target={options.target!r}: {job.machines.chip.generation} comes with GKE only; use 'write-launch gke'")
    values = {
        "CREATE": shlex.join(_create(options, job)),
        "INSTALL": "\n".join(_install(options)),
        "START": "\n".join(_start(options, job)),
        "NODES": shlex.join(nodes(job)),
        "NAME": shlex.quote(job.name),
        "PROJECT": shlex.quote(options.project),
        "ZONE": shlex.quote(options.zone),
        "UNIT": shlex.quote(_unit(job)),
        "BAD_INPUT": str(BAD_INPUT),
        "ENDED": str(ENDED),
    }
    return "#!/bin/bash\n" + _header(options, job) + re.sub("@([A-Z_]+)@", lambda found: values[found[1]], _SCRIPT)


def nodes(job: Job) -> list[str]:
    """Names of the TPU nodes, one a slice."""
    return [job.name] if job.machines.slices == 1 else [f"{job.name}-{i}" for i in range(job.machines.slices)]


def _unit(job: Job) -> str:
    return f"plait-{job.name}"


def _create(options: TpuVmOptions, job: Job) -> list[str]:
    machines, generation = job.machines, job.machines.generation
    if machines.topology.count("x") == 1:  # rectangles of chips are asked for by their number
        shape = [f"--accelerator-type={machines.accelerator_type}"]
    else:
        shape = [f"--type={generation.accelerator_type}", f"--topology={machines.topology}"]
    if machines.slices > 1:
        names = [f"--node-count={machines.slices}", f"--node-prefix={job.name}"]
    else:
        names = [f"--node-id={job.name}"]
    words = ["queued-resources", "create", job.name, *names, *shape]
    words.append(f"--runtime-version={options.runtime_version or generation.runtime_version}")
    for flag in ("service_account", "network", "subnetwork"):
        if (value := getattr(options, flag)) is not None:
            words.append(f"--{flag.replace('_', '-')}={value}")
    return words + ["--spot"] * options.spot + ["--reserved"] * options.reserved


def _install(options: TpuVmOptions) -> list[str]:
    """What each host runs once: an environment with plait, and the folder that all hosts share."""
    mount = shlex.quote(options.mount)
    lines = [
        "set -eu",
        "python3 -m pip install --quiet --user uv",
        f'~/.local/bin/uv venv --quiet --allow-existing --python {shlex.quote(options.python)} "$HOME/plait-env"',
        f'~/.local/bin/uv pip install --quiet --python "{_PYTHON}" {shlex.quote(options.package)}',
        f"if mountpoint --quiet {mount}; then exit 0; fi",
        f"sudo mkdir -p {mount}",
        f'sudo chown "$(id -u):$(id -g)" {mount}',
    ]
    if options.nfs is not None:
        return [
            *lines,
            "sudo apt-get install --yes --quiet nfs-common",
            f"sudo mount -t nfs -o rw,hard {shlex.quote(options.nfs)} {mount}",
        ]
    return [
        *lines,
        "if ! command -v gcsfuse > /dev/null; then",
        "  key=/usr/share/keyrings/cloud.google.asc",
        '  curl --fail --silent https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" > /dev/null',
        '  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |',
        "    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null",
        "  sudo apt-get update --quiet",
        "  sudo apt-get install --yes --quiet gcsfuse",
        "fi",
        f"gcsfuse --implicit-dirs {shlex.quote(options.bucket or '')} {mount}",
    ]


def _start(options: TpuVmOptions, job: Job) -> list[str]:
    """What each host runs to start, or start again."""
    properties = {
        "Restart": "on-failure",
        "RestartSec": 15,
        "RestartPreventExitStatus": f"{BAD_INPUT} {ENDED}",
        "StartLimitIntervalSec": 0,
        "RemainAfterExit": "yes",
        "KillMode": "mixed",
        "TimeoutStopSec": 300,
    }
    variables = {"PLAIT_HOSTS": "tpu"} | environment(options.env)
    words = ["sudo", "systemd-run", f"--unit={_unit(job)}", "--collect"]
    words += [f"--property={name}={value}" for name, value in properties.items()]
    words += [f"--setenv={name}={value}" for name, value in variables.items()]
    command = [word.replace("$", "$$") for word in job.command("plait", run_folder(options, job))[1:]]  # systemd expands $NAME
    return [
        "set -eu",
        f"sudo systemctl stop {_unit(job)} 2> /dev/null || true",
        f"sudo systemctl reset-failed {_unit(job)} 2> /dev/null || true",
        f'{shlex.join(words)} --uid="$(id -u)" --gid="$(id -g)" --working-directory="$HOME" \\',
        f'  "$HOME/plait-env/bin/plait" {shlex.join(command)}',
    ]


def run_folder(options: TpuVmOptions, job: Job) -> str:
    """The run folder as the hosts see it."""
    return f"{options.mount.rstrip('/')}/{job.name}"


def _header(options: TpuVmOptions, job: Job) -> str:
    file = f"./{job.name}.{SUFFIX}"
    lines = [
        f"{job.name}: {job.machines.describe()}, as {job.machines.accelerator_type} in {options.zone}",
        f"written by: {shlex.join(job.written_by)}",
        "",
        f"submit:     bash {file} run      (create, install, start, watch)",
        f"watch:      bash {file} logs     (of the first host)",
        f"state:      bash {file} status",
        f"stop, save: bash {file} stop",
        f"resume:     bash {file} start    (goes on from the newest whole checkpoint in {run_folder(options, job)})",
        f"delete:     bash {file} delete   (the TPUs; the run folder stays)",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


_SCRIPT = """\
set -euo pipefail

readonly NAME=@NAME@ PROJECT=@PROJECT@ ZONE=@ZONE@ UNIT=@UNIT@
readonly NODES=(@NODES@)

tpus() {
  gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

on_all() { # a command on every host, all at once; fails where one does
  local node job failed=0 jobs=()
  for node in "${NODES[@]}"; do
    tpus tpu-vm ssh "$node" --worker=all --command="$1" &
    jobs+=("$!")
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return "$failed"
}

on_first() {
  tpus tpu-vm ssh "${NODES[0]}" --worker=0 --command="$1"
}

state() { # of the queued resource: ACTIVE once all TPUs are there
  local answer
  if answer="$(tpus queued-resources describe "$NAME" --format='value(state.state)' 2> /dev/null)"; then
    echo "$answer"
    return
  fi
  answer="$(tpus queued-resources describe "$NAME" 2>&1 > /dev/null || true)"
  case "$answer" in
    *NOT_FOUND* | *"not found"*) echo ABSENT ;;
    *) echo UNKNOWN; echo "$answer" >&2 ;;
  esac
}

create() {
  if [[ "$(state)" == ABSENT ]]; then
    tpus @CREATE@
  fi
  local now
  while now="$(state)" && [[ "$now" != ACTIVE ]]; do
    case "$now" in
      FAILED | SUSPENDED | SUSPENDING | ABSENT) echo "queued resource $NAME is $now" >&2; return 1 ;;
    esac
    echo "queued resource $NAME is $now"
    sleep 30
  done
}

install() {
  on_all "$(cat << 'REMOTE'
@INSTALL@
REMOTE
  )"
}

start() {
  on_all "$(cat << 'REMOTE'
@START@
REMOTE
  )"
}

delete() {
  tpus queued-resources delete "$NAME" --force
}

services() { # a word a host: running, auto-restart, exited (done), failed (bad input), dead (a host was started anew)
  on_all "systemctl show --property=SubState --value $UNIT" 2> /dev/null || true
}

watch() { # until the run is done; TPUs that were taken away are asked for again
  local now
  while true; do
    now="$(state)"
    case "$now" in
      ACTIVE)
        now="$(services)"
        case "$now" in
          *failed*) echo "the services ended: exit status @BAD_INPUT@ is bad input, @ENDED@ a stop by an event; see logs" >&2; return 1 ;;
          *dead*) echo "a host was started anew"; { install && start; } || echo "not yet; trying again" ;;
          *start* | *running* | *stop*) ;;
          *exited*) echo "done"; return 0 ;;
        esac
        ;;
      FAILED | SUSPENDED | ABSENT)
        echo "queued resource $NAME is $now: asking for new TPUs"
        [[ "$now" == ABSENT ]] || delete || true
        { create && install && start; } || echo "not yet; trying again"
        ;;
    esac
    sleep 60
  done
}

case "${1:-}" in
  create | install | start | watch | delete) "$1" ;;
  run) create; install; start; watch ;;
  status) echo "queued resource: $(state)"; on_all "systemctl status --no-pager --lines=3 $UNIT || true" ;;
  logs) on_first "sudo journalctl --unit=$UNIT --lines=200 --follow" ;;
  stop) on_all "sudo systemctl stop $UNIT" ;;
  *) echo "usage: bash $0 run|create|install|start|watch|status|logs|stop|delete" >&2; exit 2 ;;
esac
"""
