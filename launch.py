"""The command line: `python launch.py COMMAND ...`. Exit status 0: done; 1: a run failed; 2: bad input."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence

from plait.train.program_cache import keep_programs
from plait.train.terminal.console import Lines, prepare_streams
from plait.train.terminal.status import exit_status

USAGE = """usage: launch.py [--verbose] COMMAND ...

  train PRESET [--steps 2000] [--model.pattern "gla*3,softmax"] [--out runs/a] [--resume]   (train PRESET --help lists every option)
        [--init-from RUN]                                     (the weights of a run; without PRESET its model too: docs/fine-tuning.md)
        [--branch RUN/checkpoints/STEP --out NEW --steps N]   (goes on from there as another run: docs/reliability.md#longer-runs-and-branches)
        [--hosts.local 2 | --hosts.coordinator HOST:PORT --hosts.count N --hosts.index I]                  on many hosts: docs/reliability.md
  sweep NAME|PRESET [--optimizer.learning-rate 1e-3,3e-3] [--seed 0,1,2] [--seeds 3] [--out sweeps/lr] [--workers 2] [--dry-run | --status]
        [any option of train, with several values]                              (many runs, any number of workers: docs/sweeps.md)
  prepare PRESET --out tokens/web [--workers 64] [--shard-mib 128] [any data option of train]     (tokens for many runs: docs/data.md#prepare)
  plan PRESET --target v5p:4x8x8 [--slices N] [--search [--compile 2]] [--out plans/a] [any option of train]
  verify [--only agreement,speed] [--ops attention] [--out FOLDER] [any option of train]      (the devices at hand, tried: docs/verify.md)
  eval RUN [--tasks ppl,mqar] [--step N] [--mqar.num-kv-pairs 16] [--data.source other.txt] [--out FILE]
  eval RUN --lm-eval TASK[,TASK] [--include-path FOLDER] [--limit 100] [--chat]    (lm-evaluation-harness: docs/lm-eval.md)
  generate RUN [--prompt "..."] [--num-tokens 200] [--temperature 0.8] [--top-k 40] [--top-p 0.9]
  report RUN [RUN ...] [--out FOLDER] [--watch [--every 30]]
  report SWEEP [--by KEY[,KEY]] [--metric loss/val] [--baseline KEY=VALUE] [--better higher] [--out FOLDER]    (of a sweep: docs/sweeps.md)
  inspect RUN|CHECKPOINT --text FILE [--probe.only all] [--heads 3.1,12.0] [--mask-heads retrieval|random|3.1,12.0 --mask-count 12]
        [--rows 4 --length 512 --needle.prompts 16]                     (probes, tokens, needles of a text: docs/inspection.md)
  write-launch gke|slurm|tpu-vm PRESET [train options] --target v5e:16x16 [--slices 2] [--out FOLDER]   (write-launch gke --help lists the rest)
  convert inspect DIR | convert import DIR RUN | convert export RUN DIR                                   (published models: docs/conversion.md)
  convert reshape RUN NEW KIND [--text FILE] [options of the kind]              (another model of a trained one: docs/conversion.md#reshape)
  convert linearize RUN NEW --pattern "lolcats*3,softmax" [options of train]    (softmax attention made linear: docs/conversion.md#linearise)
  list presets|sweeps|mixers|channel-mixers|positions|optimizers|tasks|probes|kernels|model-types|reshapes [NAME ...]

Results are written to standard output, all else to standard error. --verbose before COMMAND says more, such as why no other kernel ran.
--version says which plait, jax and flax these are.
"""


COMMANDS = {
    "train": "train",
    "sweep": "sweep",
    "prepare": "prepare",
    "plan": "plan",
    "verify": "verify",
    "eval": "evaluate",
    "generate": "generate",
    "report": "report",
    "inspect": "inspect_run",
    "write-launch": "write_launch",
    "list": "list_names",
    "convert": "convert",
}
"""The module of `plait.train.commands` whose `run` each is; imported when it is asked for."""
_VERBOSE = "PLAIT_VERBOSE"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_streams()
    if argv[:1] == ["--verbose"]:
        del argv[0]
        os.environ[_VERBOSE] = "1"  # for the processes that a command starts too
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Lines()])
    logging.getLogger("plait").setLevel(logging.DEBUG if os.environ.get(_VERBOSE) else logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's running commentary
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("plait", "jax", "flax")))
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: {name!r} is not a command; {hint} ('launch.py --help' says more)", file=sys.stderr)
        return 2
    keep_programs()
    return exit_status(lambda: importlib.import_module(f"plait.train.commands.{COMMANDS[name]}").run(rest))


if __name__ == "__main__":
    sys.exit(main())
