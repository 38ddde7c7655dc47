"""Values that files could take for their own words: each is in the file as it was given, or refused before anything is written."""

import re
import shlex
import subprocess

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from plait.configs.command_line.words import flag
from plait.tests.train.pods.launch_files.cases import IMAGE
from plait.train.pods import launch_files
from plait.train.pods.launch_files import gke

COMMANDS = {
    "gke": f"gke lm_tiny --data.batch-size 16 --target v5e:4x4 {IMAGE} --claim runs",
    "slurm": "slurm lm_tiny --data.batch-size 16 --target h100:2x8 --run-folder /runs/a --image nvcr.io#team/plait:1",
    "tpu-vm": "tpu-vm lm_tiny --data.batch-size 16 --target v5e:4x4 --project p --zone us-east5-b --package plait==0.1.0 --nfs h:/runs",
}
AROUND = {
    "env": "NOTE={}",
    "mount": "/m/{}",
    "run-folder": "/runs/{}",
    "package": "plait @ https://example.com/{}.whl",
    "nfs": "h:/{}",
    "setup": "source {}",
    "data.source": "{}",
}
"""What an option asks to stand around a value, so that others are as free as they can be."""
NOT_LINES = {
    "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b",
    "next line": "a\x85b: c",
    "line feed": "a\nb: c",
    "carriage return": "a\rb",
    "NUL": "a\0b",
    "escape": "a\x1b[31mb",
    "tab": "a\tb",
    "delete": "a\x7fb",
    "half a surrogate": "a\udc80b",
    "byte order mark": "\ufeffa",
    "no character": "a\uffffb",
}
LINES = {
    **{f"mark {mark}": mark for mark in "'\"\\`$!&*|>%@{}[]()<>#;:,?~"},
    **{
        f"word {word}": word
        for word in ("no", "y", "on", "null", "1e3", "0x1f", "0o7", "1:30", ".inf", "2026-01-01", "<<", "---")
    },
    **{f"dash {word}": word for word in ("-", "-x", "--overwrite", "--out=/tmp/x")},
    "quotes": "it's \"a\" 'b'",
    "command": "$(touch broken)",
    "back quotes": "`touch broken`",
    "variable": "$HOME ${HOME} $$(HOME) $$",
    "next command": "a; touch broken && touch broken",
    "comment": "a #b",
    "mapping": "a: b",
    "end of a document": "... ",
    "end of the remote script": "REMOTE",
    "place in the script": "@ZONE@",
    "backslash at the end": "a\\",
    "directive": "#SBATCH --nodes=9",
    "other letters": "naïve 日本 🙂 \u202e",
    "long": "a" * 3000,
    "too long": "a" * 5000,
}


def options_of(kind):
    names = [name.replace("_", "-") for name in launch_files.KINDS[kind].options.__dataclass_fields__]
    return [name for name in names if name not in ("out", "overwrite", "spot", "reserved", "host-network")] + ["data.source"]


def prepared(kind, option, value):
    """What the command makes of a value, or the message that it refuses it with."""
    words = shlex.split(COMMANDS[kind])
    replaced = {"bucket": "--claim" if kind == "gke" else "--nfs"}.get(option)
    if replaced in words:
        del words[words.index(replaced) : words.index(replaced) + 2]
    try:
        return launch_files.prepare([*words, f"--{option}={value}"]), ""
    except ValueError as error:
        return None, str(error)


def strings(tree):
    """Every text in YAML's data, as Kubernetes reads it: of two dollar signs it leaves one."""
    if isinstance(tree, dict):
        return [text for key, value in tree.items() for text in [key, *strings(value)]]
    if isinstance(tree, list):
        return [text for value in tree for text in strings(value)]
    return [tree.replace("$$", "$")] if isinstance(tree, str) else []


def shell_words(text, folder):
    """The words of the commands of a script that hold values, as bash reads them."""
    heads = (
        "export NOTE",
        "readonly NAME",
        "~/.local/bin/uv",
        "sudo systemd-run",
        "sudo mkdir",
        "sudo mount",
        "gcsfuse --",
        "tpus q",
        "    tpus q",
    )
    lines = [line for line in re.sub(r" \\\n", " ", text).split("\n") if line.startswith(heads)]
    if step := re.search(r"^srun .*?(?=^status=)", text, re.DOTALL | re.MULTILINE):
        lines.append(step[0])
    script = "\n".join(["p() { printf '%s\\0' \"$@\"; }", *(f"p {line}" for line in lines)])
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, check=True, env={"HOME": "/home/me"})
    assert not done.stderr
    return done.stdout.decode().split("\0")


def check(kind, option, value, folder):
    """`value` is refused by its path and with a fix, or the file holds it and nothing else has changed."""
    made, refused = prepared(kind, option, value)
    if made is None:
        typed = option.replace("-", "_")
        assert typed in refused or "as it becomes part of a line" in refused, refused
        assert option == "target" or ("\n" not in refused and re.search(r"; |: give", refused)), (
            refused
        )  # it lists the known ones
        return
    options, job, text = made
    assert text.splitlines() == text.split("\n")[:-1], "no other line ends"
    if kind == "gke":
        header, _, body = text.partition("apiVersion:")
        assert all(line.startswith("#") for line in header.splitlines())
        read = yaml.safe_load(text)
        assert read == gke.jobset(options, job)
        for node in nodes(yaml.compose("apiVersion:" + body)):
            assert node.style or node.tag != "tag:yaml.org,2002:str" or re.fullmatch(r"[A-Za-z/][\w./-]+", node.value, re.ASCII)
        found = strings(read)
    else:
        subprocess.run(["bash", "-n"], input=text.encode(), check=True, capture_output=True)
        directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
        assert len({line.split("=")[0] for line in directives}) == len(directives) and "#SBATCH" not in "".join(directives[1:])[
            8:
        ].replace("#SBATCH --", "")
        found = shell_words(text, folder)
        if kind == "tpu-vm":  # systemd leaves one of two dollar signs in what follows the program
            end = next(i for i, word in enumerate(found) if word.endswith("plait-env/bin/plait"))
            found = found[:end] + [word.replace("$$", "$") for word in found[end:]]
        found += directives + ([f"{job.machines.topology}"] if option == "target" else [])
    kept = shlex.split(value) if option == "entry" else [value.partition("=")[2] if option == "env" else value]
    assert all(any(part in one for one in found) for part in kept), (option, value, found)
    assert not list(folder.iterdir()), "nothing was run"


def nodes(node):
    """The scalars among the values of a YAML document."""
    if isinstance(node, yaml.MappingNode):
        return [one for _, value in node.value for one in nodes(value)]
    return [one for item in node.value for one in nodes(item)] if isinstance(node, yaml.SequenceNode) else [node]


@pytest.fixture(autouse=True)
def _without_the_experiment(monkeypatch):
    monkeypatch.setattr(launch_files, "checked_experiment", lambda *_: None)
    monkeypatch.setattr(launch_files, "paths_of", lambda _: ())


@pytest.mark.parametrize("kind", COMMANDS)
def test_what_is_no_line_is_refused_in_every_option(kind):
    for option in options_of(kind):
        for value in NOT_LINES.values():
            for around in ("{}", AROUND.get(option, "{}")):
                made, refused = prepared(kind, option, around.format(value))
                assert made is None and "\n" not in refused and ("as it becomes part of a line" in refused), (
                    option,
                    value,
                    refused,
                )


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_mark_in_every_option_is_kept_or_refused(kind, tmp_path):
    for option in options_of(kind):
        for value in LINES.values():
            for around in {"{}", AROUND.get(option, "{}")}:
                check(kind, option, around.format(value), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
def test_any_text_in_any_option_is_kept_or_refused(kind, tmp_path):
    @settings(
        max_examples=1500,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(option=st.sampled_from(options_of(kind)), value=st.text(max_size=20), bare=st.booleans())
    def run(option, value, bare):
        check(kind, option, (value if bare else AROUND.get(option, "{}").format(value)), tmp_path)

    run()


def test_a_comment_behind_a_setup_ends_with_it(tmp_path):
    """The command is still run, and a setup that fails is a failure."""
    for setup, printed, status in (("true # note", "train", 0), ("false", "", 1)):
        (_, _, text), _ = prepared("slurm", "setup", setup)
        command = re.search(r"bash -c '(.*?)'\nstatus=", text, re.DOTALL)
        done = subprocess.run(
            ["bash", "-c", command[1].replace("exec plait", "exec echo")],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == status and done.stdout.startswith(printed)


def test_flags_of_overrides():
    assert flag("data.source") == "--data.source"
