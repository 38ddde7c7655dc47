"""What a person says about the place where a run is to start: one class of options a kind of launch file."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import tyro

from plait.configs.domains import Counted, Line, Name, Whole, check_leaves

_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_IMAGE = re.compile(
    r"[a-z0-9]+([.-][a-z0-9]+)*(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
_OWN_VARIABLES = ("PLAIT_", "JOB_COMPLETION_INDEX", "JOB_INDEX", "MEGASCALE_", "TPU_WORKER_")
Repeated = Annotated[tuple[Line, ...], tyro.conf.UseAppendAction]


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
    """Raises ValueError where `folder` is no absolute path, or has marks that part the folders of a container."""
    if not folder.startswith("/") or "," in folder or ":" in folder:
        raise ValueError(
            f"{what}={folder!r} must be an absolute path (without commas and colons), the same on every host; use for example /runs/a"
        )


def check_words(what: str, *words: str | None) -> None:
    """Raises ValueError where a name of a project, a zone or a partition is none."""
    for word in words:
        if word is not None and not re.fullmatch(r"[\w./@+][\w.:/@+#-]*", word, re.ASCII):
            raise ValueError(
                f"{what}={word!r} must be one word of letters, digits and . _ - : / @ + # that does not begin with - : #; use another name"
            )


def environment(pairs: Iterable[str]) -> dict[str, str]:
    """Variables from `NAME=VALUE` pairs. Raises ValueError for other forms, names given twice, and names that the file sets itself."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(
                f"env={pair!r} must be NAME=VALUE, the name of letters, digits and _; use for example NCCL_DEBUG=INFO"
            )
        if name.startswith(_OWN_VARIABLES):
            raise ValueError(f"env={pair!r}: {name} is set by the launch file or the cluster; leave it out")
        if name in found:
            raise ValueError(f"env={pair!r} is given twice; keep one")
        found[name] = value
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What every kind needs."""

    target: Name
    """Machines, as in v5e:16x16 and v5p:8x8x8 (chips along each axis of a TPU slice), or h100:8x8 (hosts x 8 GPUs)."""
    slices: Annotated[int, Whole(1, 256)] = 1
    """TPU slices of that shape, joined by the data-centre network."""
    name: Name | None = None
    """Of the job; the preset's name by default."""
    out: Path = Path("launch")
    """Folder on this machine that the file is written to."""
    overwrite: bool = False
    """Replace a file that is there."""
    env: Repeated = ()
    """NAME=VALUE of a variable of every process; may be given several times."""

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.name is not None:
            check_label("name", self.name)
        environment(self.env)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(LaunchOptions):
    """What kinds have that can start a sweep."""

    sweep: Line | None = None
    """Study, preset or folder of a sweep, in place of the preset of one run; then come its lists of values and --workers."""
    elements: Annotated[int, Whole(1, 10_000)] | None = None
    """With `sweep`: hosts that share its runs; None takes as many as there are runs for their workers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.elements is not None and self.sweep is None:
            raise ValueError(f"elements={self.elements} is of a sweep; give --sweep NAME as well, or leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeOptions(SweepOptions):
    """A JobSet for Google Kubernetes Engine."""

    image: Line
    """Container image that has plait installed, with a tag or a digest."""
    entry: Line = "plait"
    """Command of the image that starts plait; `python launch.py` where it holds the source."""
    namespace: Name = "default"
    """Kubernetes namespace."""
    claim: Name | None = None
    """PersistentVolumeClaim (ReadWriteMany) that holds the run folders."""
    bucket: Line | None = None
    """Cloud Storage bucket that holds them, mounted by Cloud Storage FUSE; in place of `claim`."""
    mount: Line = "/runs"
    """Where the claim or bucket is mounted; the run folder is MOUNT/NAME."""
    service_account: Line | None = None
    """Kubernetes service account of the pods; a bucket needs one that may read and write it."""
    machine_type: Name | None = None
    """Machine of a host where a generation has several (H100: a3-megagpu-8g, a3-highgpu-8g)."""
    spot: bool = False
    """Run on spot nodes."""
    host_network: bool | None = None
    """Pods use their nodes' network; None: only where there are several slices, whose traffic crosses it."""
    queue: Name | None = None
    """Kueue's LocalQueue to wait in."""
    priority_class: Name | None = None
    """PriorityClass of the pods."""
    secret: Repeated = ()
    """Secret whose keys become variables, as one with WANDB_API_KEY; may be given several times."""
    max_restarts: Counted = 100
    """Restarts after failures; a stop by eviction is none."""
    grace_seconds: Annotated[int, Whole(60, 86400)] = 300
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions(SweepOptions):
    """A batch script for SLURM; a task is a host with all its GPUs."""

    run_folder: Line
    """Run folder as every host sees it, an absolute path."""
    entry: Line = "plait"
    """Command that starts plait on the hosts."""
    setup: Line | None = None
    """Shell command run on each host before it, as in `source /shared/plait/.venv/bin/activate`."""
    image: Line | None = None
    """Container image, started by srun through Pyxis."""
    mount: Repeated = ()
    """Folder of the host that the container sees under the same path; may be given several times."""
    partition: Line | None = None
    """Partition to submit to."""
    account: Line | None = None
    """Account to charge."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Feature that nodes must have."""
    time: Name = "24:00:00"
    """Time limit of one start; the run saves before it and is queued again."""
    cpus: Annotated[int, Whole(1, 4096)] | None = None
    """CPUs a host; None leaves all of its CPUs to the run, unbound."""
    max_restarts: Counted = 100
    """Restarts after failures; a stop by the time limit or preemption is none."""
    grace_seconds: Annotated[int, Whole(60, 65535)] = 120
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
        if not re.fullmatch(r"(\d+-)?\d{1,2}(:\d{2}){1,2}|\d+", self.time, re.ASCII):
            raise ValueError(f"time={self.time!r} must be MINUTES, HH:MM:SS or DAYS-HH:MM:SS; use for example 24:00:00")
        if self.setup is not None:
            _check_shell("setup", self.setup, "as in 'source /shared/plait/.venv/bin/activate'", comments=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVmOptions(LaunchOptions):
    """A script around gcloud for Cloud TPU VMs."""

    project: Line
    """Google Cloud project."""
    zone: Name
    """Zone of the TPUs, as in us-east5-b."""
    package: Line
    """What pip installs, at a version: `plait[tpu] @ git+https://HOST/plait@v0.1.0`, or a wheel's address."""
    bucket: Line | None = None
    """Cloud Storage bucket that holds the run folders, mounted by Cloud Storage FUSE on every host."""
    nfs: Line | None = None
    """SERVER:/PATH of a file share (Filestore) that holds them; in place of `bucket`."""
    mount: Line = "/mnt/plait"
    """Where the bucket or share is mounted; the run folder is MOUNT/NAME."""
    python: Name = "3.12"
    """Python that uv installs on the hosts."""
    runtime_version: Name | None = None
    """Software of the TPU VMs; None is the one for JAX."""
    service_account: Line | None = None
    """E-mail of the service account of the TPU VMs."""
    network: Line | None = None
    """Network of the TPU VMs."""
    subnetwork: Line | None = None
    """Its subnetwork."""
    spot: bool = False
    """Spot TPUs, which may be taken away; `watch` gets new ones."""
    reserved: bool = False
    """Use a reservation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("project", self.project)
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", self.zone, re.ASCII):
            raise ValueError(f"zone={self.zone!r} must be a zone; use for example us-east5-b")
        if not _is_one_version(self.package):
            raise ValueError(
                f"package={self.package!r} must name one version, so that every host and restart runs the same code; "
                "use 'plait[tpu] @ git+https://HOST/plait@TAG', a wheel's address, or NAME==VERSION"
            )
        if (self.nfs is None) == (self.bucket is None):
            raise ValueError(
                f"bucket={self.bucket!r} and nfs={self.nfs!r}: give one of them, which every host sees, for the run folder"
            )
        if self.nfs is not None and not re.fullmatch(r"\w[\w.-]*:/[\w./-]*", self.nfs, re.ASCII):
            raise ValueError(f"nfs={self.nfs!r} must be SERVER:/PATH; use for example 10.0.0.2:/runs")
        check_folder("mount", self.mount)
        check_words("python", self.python)
        for what in ("bucket", "runtime_version", "service_account", "network", "subnetwork"):
            check_words(what, getattr(self, what))
        if self.spot and self.reserved:
            raise ValueError("spot=True and reserved=True exclude each other; give one")


def _is_one_version(requirement: str) -> bool:
    """Whether a pip requirement is NAME==VERSION, a wheel's address, or a repository's address at a revision."""
    if requirement.startswith("-"):
        return False
    address = requirement.rpartition("@ ")[2]
    if "://" not in address:
        return re.search(r"==\s*[\w.]+$", requirement) is not None
    last = address.rpartition("/")[2]
    return last.endswith(".whl") or re.search(r"@[\w.-]+$", last) is not None


def _check_entry(entry: str) -> None:
    words = _check_shell("entry", entry, "as in 'plait' or 'python launch.py'")
    if words[0].startswith("-"):
        raise ValueError(f"entry={entry!r} must begin with a command, not an option; use for example 'plait'")


def _check_shell(what: str, text: str, example: str, *, comments: bool = False) -> list[str]:
    """The words of a shell command, without its comment. Raises ValueError where there are none, or a quote is open."""
    try:
        words = shlex.split(text, comments)
    except ValueError as error:
        raise ValueError(f"{what}={text!r} is no command: {error}; use a whole one, {example}") from None
    if not words:
        raise ValueError(f"{what}={text!r} must be a command; use one, {example}")
    return words
