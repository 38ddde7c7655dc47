"""Recall against state: accuracy of each mixer on multi-query associative recall, beside the bytes of its decode state.

    python benchmarks/mqar.py --mixers softmax,gated_deltanet,gla,retnet,mamba2 --steps 2000

Zoology's smallest setting (arXiv 2312.04927): rows of 64 tokens with 4 pairs, 8,192 ids, two layers of one mixer without channel
mixers, one head where the mixer lets itself be told, learned positions for full attention only. Where the paper passes 64 times over
100,000 rows in batches of 512 with four learning rates, this takes `--steps` batches of new rows, with `--learning-rates`, and reports
the best. Writes a table and JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import optimizer
from plait.data.config import DataConfig
from plait.data.tasks.mqar import MQARTask
from plait.models.config import LMConfig
from plait.models.mixers.base import MIXERS, MixerConfig
from plait.models.positions.learned import LearnedConfig
from plait.train.loop import train
from plait.train.run_folder.lines import read_metrics, series

SOLVED = 0.99


def narrow(name: str, width: int, heads: int) -> MixerConfig:
    """The mixer at a small width: with `heads` heads where it has that option, the published defaults otherwise."""
    schema = MIXERS[name]
    fields = {field.name for field in dataclasses.fields(schema)}
    options = {"num_heads": heads} if "num_heads" in fields else {}
    if "head_dim" in fields:
        options["head_dim"] = width // heads
    if "positions" in fields and schema.kind == "full":
        options["positions"] = None
    return schema(**options)


def experiment(name: str, args: argparse.Namespace, learning_rate: float, out: Path) -> ExperimentConfig:
    """Two layers of a mixer on the task."""
    mixer = narrow(name, args.width, args.heads)
    model = LMConfig(
        d_model=args.width,
        num_layers=2,
        pattern=name,
        mixers={name: mixer},
        channel_mixer=None,
        positions=LearnedConfig(max_len=args.seq_len) if mixer.kind == "full" else None,
        tie_embeddings=True,
    )
    return ExperimentConfig(
        name="mqar",
        steps=args.steps,
        model=model,
        data=DataConfig(
            task=MQARTask(vocab_size=args.vocab_size, num_kv_pairs=args.pairs, val_rows=512),
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            seed=args.seed,
        ),
        optimizer=optimizer("adamw", learning_rate=learning_rate, warmup_steps=max(args.steps // 20, 1), weight_decay=0.1),
        mesh=MeshConfig(data=1),
        seed=args.seed,
        probe_every=None,
        eval_every=max(args.steps // 20, 1),
        checkpoint_every=None,
        log_every=max(args.steps // 10, 1),
        out=str(out),
    )


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """The best of the learning rates: accuracy, the first step at which it was solved, state and parameters."""
    best: dict[str, object] = {}
    for rate in map(float, args.learning_rates.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            config, begun = experiment(name, args, rate, Path(folder) / "run"), time.perf_counter()
            train(config)
            steps, accuracy = series(read_metrics(Path(folder) / "run"), "task/mqar/accuracy")
        solved = [int(step) for step, value in zip(steps, accuracy, strict=True) if value >= SOLVED]
        mixer = config.model.mixers[name]
        found = {
            "mixer": name,
            "accuracy": float(accuracy[-1]),
            "solved at step": solved[0] if solved else None,
            "state bytes": 2 * mixer.state_bytes(args.width, args.seq_len, "float32"),
            "learning rate": rate,
            "seconds": round(time.perf_counter() - begun, 1),
        }
        if not best or found["accuracy"] > best["accuracy"]:
            best = found
        if solved:
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default="softmax,gated_deltanet,deltanet,kda,gla,hgrn2,mamba2,retnet,linear,based")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rates", default="1e-2,3e-3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mqar.json"))
    args = parser.parse_args()
    results = []
    for name in args.mixers.split(","):
        results.append(measure(name, args))
        args.out.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "results": results}, indent=2))
        print(" | ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)


if __name__ == "__main__":
    main()
