"""JobSets: the golden ones, valid for the server, and right about hosts, slices and restarts."""

import json

import pytest
import yaml

from plait.tests.train.pods.launch_files.cases import GKE, HERE


def strict(schema):
    """The schema as a server reads it that refuses unknown fields (kubectl's strict validation)."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema and "additionalProperties" not in schema else {}
    return {key: strict(value) for key, value in schema.items()} | closed


@pytest.mark.parametrize("name", GKE)
def test_jobset_is_valid(name, written):
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema (extra `test`)")
    schema = strict(json.loads((HERE / "jobset_schema.json").read_text("utf-8")))
    manifest = yaml.safe_load((written / name).read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(manifest)
    wrong = json.loads(json.dumps(manifest))
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 2
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(wrong)), "the check sees no unknown field"


def pod_of(manifest):
    (group,) = manifest["spec"]["replicatedJobs"]
    return group, group["template"]["spec"], group["template"]["spec"]["template"]["spec"]


def test_jobset_is_one_pod_a_host_and_one_job_a_slice(written):
    manifest = yaml.safe_load((written / "hybrid-v5e.gke.yaml").read_text("utf-8"))
    group, job, pod = pod_of(manifest)
    assert group["replicas"] == 2 and job["parallelism"] == job["completions"] == 64 and job["completionMode"] == "Indexed"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["hostNetwork"] is True and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in manifest["metadata"]["annotations"]


def test_jobset_restarts_after_failures_and_not_after_bad_input(written):
    manifest = yaml.safe_load((written / "tiny-h100.gke.yaml").read_text("utf-8"))
    _, job, pod = pod_of(manifest)
    found = {tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in job["podFailurePolicy"]["rules"]}
    assert found == {(2, 3): "FailJob", (75,): "Ignore"} and job["backoffLimit"] == 0
    assert {rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"]} == {pod["containers"][0]["name"]}
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]


@pytest.mark.parametrize("name", GKE)
def test_jobset_tells_each_host_who_it_is(name, written):
    hosts = pytest.importorskip("plait.train.pods.hosts.host", reason="needs plait.train.pods.hosts")
    manifest = yaml.safe_load((written / name).read_text("utf-8"))
    group, job, pod = pod_of(manifest)
    own = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"] if "value" in entry}
    count = group["replicas"] * job["completions"]
    seen = []
    for slice_index in range(group["replicas"]):
        for index in range(job["completions"]):
            host = hosts.find_host(
                hosts.HostsOptions(), own | {"JOB_INDEX": str(slice_index), "JOB_COMPLETION_INDEX": str(index)}
            )
            if count == 1:
                assert host is None
            else:
                first = f"{manifest['metadata']['name']}-{group['name']}-0-0.{manifest['spec']['network']['subdomain']}:8476"
                assert (host.coordinator, host.count) == (first, count)
                seen.append(host.index)
    assert count == 1 or sorted(seen) == list(range(count))
    given, rest = hosts.host_options(pod["containers"][0]["command"])
    assert given.connect_seconds == (300 if count == 1 else 3600) and "--resume" in rest


def test_a_sweep_is_an_indexed_job_whose_pods_run_the_same_line(written):
    manifest = yaml.safe_load((written / "rates.gke.yaml").read_text("utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    job = manifest["spec"]
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema (extra `test`)")
    schema = json.loads((HERE / "jobset_schema.json").read_text("utf-8"))
    for name in ("spec", "replicatedJobs", "items", "template", "spec"):
        schema = schema["items"] if name == "items" else schema["properties"][name]
    jsonschema.Draft202012Validator(strict(schema)).validate(job)
    assert job["parallelism"] == job["completions"] == 3 and job["completionMode"] == "Indexed"
    found = {tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in job["podFailurePolicy"]["rules"]}
    assert found == {(2,): "FailJob", (1,): "FailIndex", (75,): "Ignore"} and job["backoffLimitPerIndex"] == 100
    (container,) = job["template"]["spec"]["containers"]
    words = ["plait", "sweep", "lm_tiny", "--optimizer.learning-rate", "1e-3,3e-3", "--seed", "0,1,2", "--workers", "4"]
    assert container["command"] == [*words, "--out", "/runs/rates"]
    assert container["env"] == [], "each host is on its own"
