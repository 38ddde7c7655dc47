"""What a person says about the place where a run is to start: one class of options a kind of launch file."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import tyro

_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_IMAGE = re.compile(
    r"[a-z0-9]+([.-][a-z0-9]+)*(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_OWN_VARIABLES = ("PLAIT_", "JOB_COMPLETION_INDEX", "JOB_INDEX", "MEGASCALE_", "TPU_WORKER_")
Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def check_label(what: str, name: str, longest: int = 63) -> None:
    """Raises ValueError where `name` is no RFC 1123 label that starts with a letter, or is longer than `longest`."""
    if not re.fullmatch(_LABEL, name):
        raise ValueError(
            f"{what}={name!r} must be lower-case letters, digits and '-', beginning with a letter and not ending in '-' "
            "(RFC 1123); use for example 'hybrid-1b'"
        )
    if len(name) > longest:
        raise ValueError(f"{what}={name!r} has {len(name)} characters, of which there may be {longest}; use a shorter one")


def check_image(what: str, image: str) -> None:
    """Raises ValueError where `image` is no container image with a tag or a digest."""
    if not _IMAGE.fullmatch(image):
        raise ValueError(
            f"{what}={image!r} is no container image; use REGISTRY/NAME:TAG, as in us-docker.pkg.dev/project/repo/plait:1"
        )
    if "@" not in image and ":" not in image.rpartition("/")[2]:
        raise ValueError(
            f"{what}={image!r} must have a tag or a digest, so that every restart runs the same code; use {image}:TAG or {image}@sha256:..."
        )


def check_folder(what: str, folder: str) -> None:
    """Raises ValueError where `folder` is no absolute path."""
    if not folder.startswith("/") or "\n" in folder or "," in folder:
        raise ValueError(
            f"{what}={folder!r} must be an absolute path (without commas), the same on every host; use for example /runs/a"
        )


def check_words(what: str, *words: str | None) -> None:
    """Raises ValueError where a word is empty or holds white space: names of projects, zones, partitions."""
    for word in words:
        if word is not None and not re.fullmatch(r"[\w.:/@+#-]+", word):
            raise ValueError(f"{what}={word!r} must be one word of letters, digits and . _ - : / @ + #")


def check_positive(**numbers: int | None) -> None:
    """Raises ValueError where a number is below 1."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be at least 1")


def environment(pairs: Iterable[str]) -> dict[str, str]:
    """Variables from `NAME=VALUE` pairs. Raises ValueError for other forms, names given twice, and names that the file sets itself."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name) or "\n" in value:
            raise ValueError(f"env={pair!r} must be NAME=VALUE on one line")
        if name.startswith(_OWN_VARIABLES):
            raise ValueError(f"env={pair!r}: {name} is set by the launch file or the cluster; leave it out")
        if name in found:
            raise ValueError(f"env={pair!r} is given twice; keep one")
        found[name] = value
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What every kind needs."""

    target: str
    """Machines, as in v5e:16x16 and v5p:8x8x8 (chips along each axis of a TPU slice), or h100:8x8 (hosts x 8 GPUs)."""
    slices: int = 1
    """TPU slices of that shape, joined by the data-centre network."""
    name: str | None = None
    """Of the job; the preset's name by default."""
    out: Path = Path("launch")
    """Folder on this machine that the file is written to."""
    overwrite: bool = False
    """Replace a file that is there."""
    env: Repeated = ()
    """NAME=VALUE of a variable of every process; may be given several times."""

    def __post_init__(self) -> None:
        if self.name is not None:
            check_label("name", self.name)
        environment(self.env)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeOptions(LaunchOptions):
    """A JobSet for Google Kubernetes Engine."""

    image: str
    """Container image that has plait installed, with a tag or a digest."""
    entry: str = "plait"
    """Command of the image that starts plait; `python launch.py` where it holds the source."""
    namespace: str = "default"
    """Kubernetes namespace."""
    claim: str | None = None
    """PersistentVolumeClaim (ReadWriteMany) that holds the run folders."""
    bucket: str | None = None
    """Cloud Storage bucket that holds them, mounted by Cloud Storage FUSE; in place of `claim`."""
    mount: str = "/runs"
    """Where the claim or bucket is mounted; the run folder is MOUNT/NAME."""
    service_account: str | None = None
    """Kubernetes service account of the pods; a bucket needs one that may read and write it."""
    machine_type: str | None = None
    """Machine of a host where a generation has several (H100: a3-megagpu-8g, a3-highgpu-8g)."""
    spot: bool = False
    """Run on spot nodes."""
    host_network: bool | None = None
    """Pods use their nodes' network; None: only where there are several slices, whose traffic crosses it."""
    queue: str | None = None
    """Kueue's LocalQueue to wait in."""
    priority_class: str | None = None
    """PriorityClass of the pods."""
    secret: Repeated = ()
    """Secret whose keys become variables, as one with WANDB_API_KEY; may be given several times."""
    max_restarts: int = 100
    """Restarts after failures; a stop by eviction is none."""
    grace_seconds: int = 300
    """Seconds between SIGTERM and SIGKILL, in which the run saves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_image("image", self.image)
        _check_entry(self.entry)
        check_label("namespace", self.namespace)
        if (self.claim is None) == (self.bucket is None):
            raise ValueError(
                f"claim={self.claim!r} and bucket={self.bucket!r}: give one of them, which every host sees, for the run folder"
            )
        if self.bucket is not None and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", self.bucket):
            raise ValueError(f"bucket={self.bucket!r} is no bucket's name; give it without gs:// and folders")
        for what in ("claim", "service_account", "queue", "priority_class"):
            if (value := getattr(self, what)) is not None:
                check_label(what, value)
        for secret in self.secret:
            check_label("secret", secret)
        check_folder("mount", self.mount)
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts={self.max_restarts} must be 0 or more")
        if self.grace_seconds < 60:
            raise ValueError(f"grace_seconds={self.grace_seconds} must be at least 60, in which the run saves")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions(LaunchOptions):
    """A batch script for SLURM; a task is a host with all its GPUs."""

    run_folder: str
    """Run folder as every host sees it, an absolute path."""
    entry: str = "plait"
    """Command that starts plait on the hosts."""
    setup: str | None = None
    """Shell command run on each host before it, as in `source /shared/plait/.venv/bin/activate`."""
    image: str | None = None
    """Container image, started by srun through Pyxis."""
    mount: Repeated = ()
    """Folder of the host that the container sees under the same path; may be given several times."""
    partition: str | None = None
    """Partition to submit to."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Feature that nodes must have."""
    time: str = "24:00:00"
    """Time limit of one start; the run saves before it and is queued again."""
    cpus: int | None = None
    """CPUs a host; None leaves all of its CPUs to the run, unbound."""
    max_restarts: int = 100
    """Restarts after failures; a stop by the time limit or preemption is none."""
    grace_seconds: int = 120
    """Seconds before the time limit at which the run is told to save."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder("run_folder", self.run_folder)
        _check_entry(self.entry)
        if self.image is not None:
            check_words("image", self.image)
        if self.mount and self.image is None:
            raise ValueError(f"mount={' '.join(self.mount)} is for a container; give --image as well, or leave it out")
        for folder in self.mount:
            check_folder("mount", folder)
        for what in ("partition", "account", "qos", "constraint"):
            check_words(what, getattr(self, what))
        if not re.fullmatch(r"(\d+-)?\d{1,2}(:\d{2}){1,2}|\d+", self.time):
            raise ValueError(f"time={self.time!r} must be MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
        check_positive(cpus=self.cpus)
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts={self.max_restarts} must be 0 or more")
        if not 60 <= self.grace_seconds <= 65535:
            raise ValueError(f"grace_seconds={self.grace_seconds} must be at least 60, in which the run saves, and at most 65535")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVmOptions(LaunchOptions):
    """A script around gcloud for Cloud TPU VMs."""

    project: str
    """Google Cloud project."""
    zone: str
    """Zone of the TPUs, as in us-east5-b."""
    package: str
    """What pip installs, at a version: `plait[tpu] @ git+https://HOST/plait@v0.1.0`, or a wheel's address."""
    bucket: str | None = None
    """Cloud Storage bucket that holds the run folders, mounted by Cloud Storage FUSE on every host."""
    nfs: str | None = None
    """SERVER:/PATH of a file share (Filestore) that holds them; in place of `bucket`."""
    mount: str = "/mnt/plait"
    """Where the bucket or share is mounted; the run folder is MOUNT/NAME."""
    python: str = "3.12"
    """Python that uv installs on the hosts."""
    runtime_version: str | None = None
    """Software of the TPU VMs; None is the one for JAX."""
    service_account: str | None = None
    """E-mail of the service account of the TPU VMs."""
    network: str | None = None
    """Network of the TPU VMs."""
    subnetwork: str | None = None
    """Its subnetwork."""
    spot: bool = False
    """Spot TPUs, which may be taken away; `watch` gets new ones."""
    reserved: bool = False
    """Use a reservation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("project", self.project)
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", self.zone):
            raise ValueError(f"zone={self.zone!r} must be a zone, as in us-east5-b")
        if not _is_one_version(self.package):
            raise ValueError(
                f"package={self.package!r} must name one version, so that every host and restart runs the same code; "
                "use 'plait[tpu] @ git+https://HOST/plait@TAG', a wheel's address, or NAME==VERSION"
            )
        if (self.nfs is None) == (self.bucket is None):
            raise ValueError(
                f"bucket={self.bucket!r} and nfs={self.nfs!r}: give one of them, which every host sees, for the run folder"
            )
        if self.nfs is not None and not re.fullmatch(r"[\w.-]+:/[\w./-]*", self.nfs):
            raise ValueError(f"nfs={self.nfs!r} must be SERVER:/PATH")
        check_folder("mount", self.mount)
        check_words("python", self.python)
        for what in ("bucket", "runtime_version", "service_account", "network", "subnetwork"):
            check_words(what, getattr(self, what))
        if self.spot and self.reserved:
            raise ValueError("spot=True and reserved=True exclude each other; give one")


def _is_one_version(requirement: str) -> bool:
    """Whether a pip requirement is NAME==VERSION, a wheel's address, or a repository's address at a revision."""
    if "\n" in requirement:
        return False
    address = requirement.rpartition("@ ")[2]
    if "://" not in address:
        return re.search(r"==\s*[\w.]+$", requirement) is not None
    last = address.rpartition("/")[2]
    return last.endswith(".whl") or re.search(r"@[\w.-]+$", last) is not None


def _check_entry(entry: str) -> None:
    try:
        words = shlex.split(entry)
    except ValueError as error:
        raise ValueError(f"entry={entry!r} is no command: {error}") from None
    if not words:
        raise ValueError(f"entry={entry!r} must be a command, as in 'plait' or 'python launch.py'")
