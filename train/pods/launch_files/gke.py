"""A JobSet for Google Kubernetes Engine: one pod a host, one child Job a TPU slice; every restart goes on from the newest checkpoint.

Exit statuses decide what happens to a pod (Kubernetes' podFailurePolicy): bad input ends the JobSet; a run that was told to stop and has
saved is started again without counting; any other failure restarts all hosts, `max_restarts` times. A sweep is an Indexed Job, each pod
of which takes runs until none is left.

Sources: JobSet's API (jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2) and its page on TPU slices (docs/tasks/tpu_multislice); Google's pages
kubernetes-engine/docs/how-to/tpu-multislice, how-to/cloud-storage-fuse-csi-driver-ephemeral and concepts/plan-tpus.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml

from plait.train.pods.hosts.host import PORT
from plait.train.pods.hosts.supervise import BAD_INPUT, ENDED, FAILED, STOPPED
from plait.train.pods.launch_files.job import Job
from plait.train.pods.launch_files.options import GkeOptions, environment

SUFFIX = "gke.yaml"
_CONTAINER = "plait"
_ADDED_TO_NAMES = "-abcde"  # by Kubernetes, to each pod's
_NODES_COME_WITHIN = 3600  # seconds: a pod waits so long for those whose nodes are still made or repaired


def render(options: GkeOptions, job: Job) -> str:
    """The manifest with its commands on top. Raises ValueError where names of pods would be too long."""
    manifest = indexed_job(options, job) if job.elements else jobset(options, job)
    return _header(options, job) + yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that is no plain word, since readers differ in what else they take for text: `1e3`, `y`, `0o7`."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9./_-]+", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def _literal(text: str) -> str:
    """A word or value in which Kubernetes expands nothing: there, `$(NAME)` is a variable and `$$` a dollar sign."""
    return text.replace("$", "$$")


def jobset(options: GkeOptions, job: Job) -> dict[str, Any]:
    """The JobSet as plain data."""
    machines, group = job.machines, _group(job)
    longest = f"{job.name}-{group}-{machines.slices - 1}-{machines.hosts_per_slice - 1}{_ADDED_TO_NAMES}"
    if len(longest) > 63:
        raise ValueError(
            f"name={job.name!r} makes names of pods of {len(longest)} characters ({longest}), of which there may be 63; "
            f"use at most {63 - (len(longest) - len(job.name))} characters"
        )
    labels, metadata = _labels(job), _metadata(options, job)
    if _is_pool(job):  # two slices share no node pool
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    template = {
        "parallelism": machines.hosts_per_slice,
        "completions": machines.hosts_per_slice,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _exit(BAD_INPUT, ENDED)},
                {"action": "Ignore", "onExitCodes": _exit(STOPPED)},
            ]
        },
        "template": {"metadata": _pod_metadata(options, labels), "spec": _pod(options, job)},
    }
    failure_policy = {
        "maxRestarts": options.max_restarts,
        "rules": [{"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
            "failurePolicy": failure_policy,
            "replicatedJobs": [{"name": group, "replicas": machines.slices, "template": {"spec": template}}],
        },
    }


def indexed_job(options: GkeOptions, job: Job) -> dict[str, Any]:
    """The Job of a sweep as plain data: a pod that has failed runs left is not started again, one that died is."""
    longest = f"{job.name}-{job.elements - 1}{_ADDED_TO_NAMES}"
    if len(longest) > 63:
        raise ValueError(
            f"name={job.name!r} makes names of pods of {len(longest)} characters, of which there may be 63; use a shorter one"
        )
    rules = [
        {"action": "FailJob", "onExitCodes": _exit(BAD_INPUT)},
        {"action": "FailIndex", "onExitCodes": _exit(FAILED)},
        {"action": "Ignore", "onExitCodes": _exit(STOPPED)},
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(options, job),
        "spec": {
            "parallelism": job.elements,
            "completions": job.elements,
            "completionMode": "Indexed",
            "backoffLimitPerIndex": options.max_restarts,
            "podFailurePolicy": {"rules": rules},
            "template": {"metadata": _pod_metadata(options, _labels(job)), "spec": _pod(options, job)},
        },
    }


def _labels(job: Job) -> dict[str, str]:
    return {"app.kubernetes.io/name": "plait", "app.kubernetes.io/instance": job.name}


def _metadata(options: GkeOptions, job: Job) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": job.name, "namespace": options.namespace, "labels": _labels(job)}
    if options.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = options.queue
    return metadata


def _group(job: Job) -> str:
    """Name of the replicated job."""
    return "slice" if job.machines.chip.platform == "tpu" else "hosts"


def _is_pool(job: Job) -> bool:
    """Whether a slice is a node pool of its own."""
    return job.machines.chip.platform == "tpu" and job.machines.hosts_per_slice > 1


def _exit(*statuses: int) -> dict[str, Any]:
    return {"containerName": _CONTAINER, "operator": "In", "values": list(statuses)}


def _pod_metadata(options: GkeOptions, labels: dict[str, str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"labels": dict(labels)}
    if options.bucket is not None:
        metadata["annotations"] = {"gke-gcsfuse/volumes": "true"}
    return metadata


def _host_network(options: GkeOptions, job: Job) -> bool:
    return job.machines.slices > 1 if options.host_network is None else options.host_network


def _pod(options: GkeOptions, job: Job) -> dict[str, Any]:
    machines = job.machines
    tpu = machines.chip.platform == "tpu"
    accelerator, _ = machines.node(options.machine_type)
    resource = "google.com/tpu" if tpu else "nvidia.com/gpu"
    selector = {"cloud.google.com/gke-tpu-accelerator" if tpu else "cloud.google.com/gke-accelerator": accelerator}
    if tpu:
        selector["cloud.google.com/gke-tpu-topology"] = machines.topology
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_seconds,
        "nodeSelector": selector,
        "tolerations": tolerations,
    }
    if options.service_account is not None:
        pod["serviceAccountName"] = options.service_account
    if options.priority_class is not None:
        pod["priorityClassName"] = options.priority_class
    if _host_network(options, job):
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    amount = {resource: machines.chips_per_host}
    volumes, mounts = _volumes(options, job)
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": options.image,
        "command": _command(options, job),
        "env": _environment(options, job),
    }
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in options.secret]
    container |= {
        "ports": [{"containerPort": PORT}],
        "resources": {"requests": dict(amount), "limits": dict(amount)},
        "volumeMounts": mounts,
    }
    return {**pod, "containers": [container], "volumes": volumes}


def run_folder(options: GkeOptions, job: Job) -> str:
    """The run folder as the pods see it."""
    return f"{options.mount.rstrip('/')}/{job.name}"


def _command(options: GkeOptions, job: Job) -> list[str]:
    command = [_literal(word) for word in job.command(options.entry, run_folder(options, job))]
    waits = any(word.startswith("--hosts.connect") for word in command) or job.machines.hosts == 1
    return command if waits else [*command, "--hosts.connect-seconds", str(_NODES_COME_WITHIN)]


def _environment(options: GkeOptions, job: Job) -> list[dict[str, Any]]:
    """What tells a host who it is; Kubernetes adds JOB_COMPLETION_INDEX, and GKE what TPUs need."""
    if job.elements:
        return [{"name": name, "value": _literal(value)} for name, value in environment(options.env).items()]
    machines = job.machines
    own = {
        "PLAIT_HOSTS": "kubernetes",
        "PLAIT_COORDINATOR": f"{job.name}-{_group(job)}-0-0.{job.name}:{PORT}",
        "PLAIT_HOST_COUNT": str(machines.hosts),
        "PLAIT_HOSTS_PER_SLICE": str(machines.hosts_per_slice),
    }
    slice_index = {
        "name": "JOB_INDEX",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}},
    }
    return [*({"name": name, "value": _literal(value)} for name, value in (own | environment(options.env)).items()), slice_index]


def _volumes(options: GkeOptions, job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if options.claim is not None:
        runs: dict[str, Any] = {"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}}
    else:
        attributes = {"bucketName": options.bucket, "mountOptions": "implicit-dirs"}
        if _host_network(options, job):
            attributes["hostNetworkPodKSA"] = "true"
        runs = {"name": "runs", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    volumes, mounts = [runs], [{"name": "runs", "mountPath": options.mount}]
    if job.machines.chip.platform == "gpu":  # NCCL shares memory between a host's GPUs
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    return volumes, mounts


def _header(options: GkeOptions, job: Job) -> str:
    machines, file = job.machines, f"{job.name}.{SUFFIX}"
    accelerator, machine_type = machines.node(options.machine_type)
    pool = f"nodes of {machine_type} ({accelerator})"
    if _is_pool(job):
        pool += f", one node pool of {machines.hosts_per_slice} with topology {machines.topology} for each slice"
    kubectl = f"kubectl --namespace {options.namespace}"
    kind = "job" if job.elements else "jobset"
    resumes = "it takes the runs that are left" if job.elements else "it goes on from the newest whole checkpoint"
    first = (
        f"job-name={job.name}"
        if job.elements
        else f"jobset.sigs.k8s.io/jobset-name={job.name},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    )
    lines = [
        f"{job.name}: {job.describe()}; needs {pool}",
        f"written by: {shlex.join(job.written_by)}",
        "",
        f"submit:     kubectl apply --filename {shlex.quote(file)}",
        f"watch:      {kubectl} logs --follow --selector {first}",
        f"state:      {kubectl} describe {kind} {job.name}",
        f"stop, save: {kubectl} delete {kind} {job.name}",
        f"resume:     submit again; {resumes} in {run_folder(options, job)}",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
