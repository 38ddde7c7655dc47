"""Which host a process is: flags, then PLAIT_ variables, then what SLURM, Kubernetes or a TPU tells."""

import http.server
import threading

import pytest

from plait.launch import main
from plait.train.pods.hosts.host import Host, HostsError, HostsOptions, find_host, host_options

SLURM = {"SLURM_JOB_ID": "70000", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc"}
GIVEN = {"PLAIT_COORDINATOR": "b:2", "PLAIT_HOST_COUNT": "3", "PLAIT_HOST_INDEX": "2"}
SET = {"JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "slice", "JOB_COMPLETION_INDEX": "1", "PLAIT_HOST_COUNT": "4"}

FOUND = {
    "nothing": ({}, {}, None),
    "flags": ({"coordinator": "a:1", "count": 2, "index": 1}, {}, Host("a:1", 2, 1)),
    "an address without its port": ({"coordinator": "a", "count": 2, "index": 1}, {}, Host("a:8476", 2, 1)),
    "an IPv6 address": ({"coordinator": "[::1]:99", "count": 2, "index": 1}, {}, Host("[::1]:99", 2, 1)),
    "one host": ({"coordinator": "a:1", "count": 1, "index": 0}, {}, None),
    "variables": ({}, GIVEN, Host("b:2", 3, 2)),
    "a flag before a variable": (
        {"index": 0},
        {"PLAIT_COORDINATOR": "b:2", "PLAIT_HOST_COUNT": "3", "PLAIT_HOST_INDEX": "2"},
        Host("b:2", 3, 0),
    ),
    "slurm": ({}, {**SLURM, "SLURM_STEP_NODELIST": "node[007-009,012],x"}, Host("node007:61808", 8, 3)),
    "slurm, two names": ({}, {**SLURM, "SLURM_STEP_NODELIST": "gpu-a,gpu-b"}, Host("gpu-a:61808", 8, 3)),
    "slurm, one task": ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n"}, None),
    "a SLURM batch script, which is no step": ({}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
    "slurm, not asked": ({"detect": "none"}, {**SLURM, "SLURM_STEP_NODELIST": "n[1-2]"}, None),
    "a job set": ({}, SET, Host("run-slice-0-0.run:8476", 4, 1)),
    "a job set of slices": ({}, {**SET, "JOB_INDEX": "1", "PLAIT_HOSTS_PER_SLICE": "2"}, Host("run-slice-0-0.run:8476", 4, 3)),
    "a job set that names its coordinator": ({}, {**SET, "PLAIT_COORDINATOR": "c.run"}, Host("c.run:8476", 4, 1)),
    "an indexed job of something else": ({}, {"JOB_COMPLETION_INDEX": "1"}, None),
    "GKE": ({}, GKE, Host("w-0.svc:8476", 2, 1)),
    "GKE, one worker": ({}, {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    "GKE, the second slice": (
        {},
        {**GKE, "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "m:99"},
        Host("m:8476", 4, 3),
    ),
}


@pytest.mark.parametrize(("options", "environ", "expected"), FOUND.values(), ids=FOUND)
def test_found(options, environ, expected):
    assert find_host(HostsOptions(**options), environ) == expected


WRONG = {
    "no count": ({"coordinator": "a:1", "index": 0}, {}, r"hosts\.count must be known.*PLAIT_HOST_COUNT"),
    "no coordinator, no index": ({"count": 2}, {}, r"hosts\.coordinator and hosts\.index must be known"),
    "index too large": ({"coordinator": "a:1", "count": 2, "index": 2}, {}, r"hosts\.index=2 must be from 0 to 1"),
    "no address": ({"coordinator": "a b", "count": 2, "index": 0}, {}, r"hosts\.coordinator='a b:8476' must be HOST:PORT"),
    "a variable that is no number": ({}, {"PLAIT_HOST_COUNT": "two"}, "PLAIT_HOST_COUNT='two' must be a whole number"),
    "slurm asked for outside": ({"detect": "slurm"}, {}, "hosts.detect=slurm finds nothing here; start with srun"),
    "kubernetes asked for outside": ({"detect": "kubernetes"}, {}, "use an Indexed Job"),
    "a job set without a count": (
        {"detect": "kubernetes"},
        {"JOB_COMPLETION_INDEX": "1"},
        r"hosts\.coordinator and hosts\.count",
    ),
    "slices without their size": ({}, {**SET, "JOB_INDEX": "1"}, "JOB_INDEX=1 needs PLAIT_HOSTS_PER_SLICE"),
    "no such detection": ({}, {"PLAIT_HOSTS": "pbs"}, "PLAIT_HOSTS='pbs' must be one of auto, none, slurm, kubernetes, tpu"),
}


@pytest.mark.parametrize(("options", "environ", "message"), WRONG.values(), ids=WRONG)
def test_wrong(options, environ, message):
    with pytest.raises(HostsError, match=message):
        find_host(HostsOptions(**options), environ)


OUT_OF_RANGE = [{"count": 0}, {"index": -1}, {"local": 0}, {"connect_seconds": 0.0}, {"step_seconds": 0.0}, {"restarts": -1}]


@pytest.mark.parametrize("options", OUT_OF_RANGE, ids=lambda o: next(iter(o)))
def test_options_out_of_range_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(HostsError, match=rf"hosts\.{name}={value} must be"):
        HostsOptions(**options)


def test_hosts_here_choose_the_rest_themselves():
    with pytest.raises(HostsError, match=r"hosts\.local=2 chooses hosts\.count itself"):
        HostsOptions(local=2, count=2)


def test_options_are_taken_out_of_the_command_line():
    args = ["lm_tiny", "--steps", "3", "--hosts.count", "2", "--hosts.connect-seconds=9", "--out", "a"]
    assert host_options(args) == (HostsOptions(count=2, connect_seconds=9.0), ["lm_tiny", "--steps", "3", "--out", "a"])


def test_a_bad_option_ends_the_command_with_status_2(capsys):
    assert main(["train", "lm_tiny", "--hosts.count", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: hosts.count=0 must be a whole number from 1")


def test_a_tpu_vm_asks_its_metadata_server():
    answers = {"worker-network-endpoints": "a:b:10.0.0.1,a:b:10.0.0.2,a:b:10.0.0.3", "agent-worker-number": "2"}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = answers.get(self.path.rsplit("/", 1)[1])
            self.send_response(200 if text and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_address[1]}"}
        assert find_host(HostsOptions(detect="tpu"), environ) == Host("10.0.0.1:8476", 3, 2)
        answers.clear()
        with pytest.raises(HostsError, match=r"hosts\.detect=tpu finds nothing here"):
            find_host(HostsOptions(detect="tpu"), environ)
        server.shutdown()
