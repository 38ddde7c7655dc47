"""A batch script for SLURM: one task a host with all its GPUs, queued again until the run is done.

srun tells each task who it is; plait reads that from SLURM_PROCID and SLURM_STEP_NODELIST. The time limit and preemption send SIGTERM to the
tasks, which save and end with a status of their own; the script then queues itself again, as it does after a failure, but not
after bad input, nor when the job was cancelled. A sweep is an array of such jobs, each of which takes runs until none is left.

Source: SLURM's pages for sbatch, srun and scontrol (slurm.schedmd.com/sbatch.html, srun.html, scontrol.html).
"""

from __future__ import annotations

import shlex

from plait.train.pods.hosts.supervise import BAD_INPUT, DONE, ENDED, FAILED, STOPPED
from plait.train.pods.launch_files.job import Job
from plait.train.pods.launch_files.options import SlurmOptions, environment
from plait.train.pods.plan.topology import GPUS_PER_HOST

SUFFIX = "slurm.sh"
_LEAVE_SECONDS = 120  # the hosts of a run end together; one that has not by then is ended


def render(options: SlurmOptions, job: Job) -> str:
    """The script. Raises ValueError for TPUs."""
    if job.machines.chip.platform != "gpu":
        raise ValueError(
            f"target={options.target!r} is a TPU, and SLURM files are for hosts of {GPUS_PER_HOST} GPUs, as in h100:8x8; "
            "use 'write-launch gke' or 'write-launch tpu-vm'"
        )
    return "\n".join([*_head(options, job), "", *_body(options, job), ""])


def _head(options: SlurmOptions, job: Job) -> list[str]:
    file, machines = shlex.quote(f"{job.name}.{SUFFIX}"), job.machines
    resumes = "it takes the runs that are left" if job.elements else "it goes on from the newest whole checkpoint"
    comments = [
        f"{job.name}: {job.describe()}",
        f"written by: {shlex.join(job.written_by)}",
        "",
        f"check:      sbatch --test-only {file}",
        f"submit:     sbatch {file}",
        f"watch:      tail --follow=name --retry {job.name}-JOBID{'_ELEMENT' if job.elements else ''}.host0.log",
        f"state:      squeue --name {job.name}; sacct --duplicates --name {job.name}",
        "stop, save: scancel JOBID    (saves within the cluster's KillWait, 30 s by default; for longer:",
        "            scontrol update JobId=JOBID Requeue=0; scancel --signal=TERM JOBID)",
        f"resume:     submit again; {resumes} in {options.run_folder}",
    ]
    directives = {
        "job-name": job.name,
        "array": f"0-{job.elements - 1}" if job.elements else None,
        "nodes": machines.hosts,
        "ntasks-per-node": 1,
        "gpus-per-node": machines.chips_per_host,
        "cpus-per-task": options.cpus,
        "exclusive": "",
        "mem": 0,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "time": options.time,
        "signal": f"TERM@{options.grace_seconds}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{job.name}-{_id(job)}.log",
    }
    lines = [
        f"#SBATCH --{name}" + (f"={value}" if value != "" else "") for name, value in directives.items() if value is not None
    ]
    return ["#!/bin/bash", *lines, "#", *(f"# {line}".rstrip() for line in comments)]


def _id(job: Job) -> str:
    """The part of names of logs by which SLURM tells jobs, and elements of an array, apart."""
    return "%A_%a" if job.elements else "%j"


def _body(options: SlurmOptions, job: Job) -> list[str]:
    command = job.command(options.entry, options.run_folder)
    # Without --kill-on-bad-exit: the first host that has saved would end the others, which save still.
    step = ["srun", f"--wait={_LEAVE_SECONDS}", "--open-mode=append", f"--output={job.name}-{_id(job)}.host%t.log"]
    step.append("--cpu-bind=none" if options.cpus is None else f"--cpus-per-task={options.cpus}")
    if options.image is not None:
        step.append(f"--container-image={options.image}")
        folders = dict.fromkeys([*options.mount, options.run_folder.rpartition("/")[0] or "/"])
        step.append("--container-mounts=" + ",".join(f"{folder}:{folder}" for folder in folders))
    if options.setup is not None:
        command = ["bash", "-c", f"{options.setup}\nif (( $? )); then exit 1; fi\nexec {shlex.join(command)}"]
    variables = [f"export {name}={shlex.quote(value)}" for name, value in environment(options.env).items()]
    gpus = ",".join(str(i) for i in range(job.machines.chips_per_host))
    # SLURM_JOB_ID of the last element is that of the whole array
    number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.elements else "$SLURM_JOB_ID"
    return [
        "set -uo pipefail",
        "trap : TERM  # the tasks get it too; they save, and this script goes on",
        "",
        *([] if job.elements else [f"export JAX_LOCAL_DEVICE_IDS={gpus}  # a task owns all GPUs of its host"]),
        *variables,
        "",
        shlex.join(step) + " \\",
        "  " + shlex.join(command),
        "status=$?",
        "",
        "again() {",
        f'  if [[ "$(squeue --noheader --jobs "{number}" --format %T)" == RUNNING ]]; then  # else it was cancelled or is queued again',
        '    echo "status $status: queued again"',
        f'    scontrol requeue "{number}"',
        "  fi",
        "}",
        "",
        'case "$status" in',
        f"  {DONE}) echo 'done' ;;",
        f"  {BAD_INPUT}) echo 'bad input: see {job.name}-'\"{number}\"'.host*.log' ;;",
        *([f"  {FAILED}) echo 'runs have failed: see results.csv in the folder of the sweep' ;;"] if job.elements else []),
        f"  {ENDED}) echo 'stopped by an event of the run, which is saved' ;;",
        f"  {STOPPED}) again ;;",
        "  *)",
        f'    if (( ${{SLURM_RESTART_COUNT:-0}} < {options.max_restarts} )); then again; else echo "failed too often"; fi',
        "    ;;",
        "esac",
        'exit "$status"',
    ]
