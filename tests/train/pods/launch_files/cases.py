"""Launch files of several kinds and machines: the commands, and the golden files that they give.

`python -m plait.tests.train.pods.launch_files.cases` writes the golden files again; read the difference before you commit it.
"""

import os
import shlex
import tempfile
from pathlib import Path

from plait.train.pods import launch_files

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
IMAGE = "--image us-docker.pkg.dev/project/repo/plait:0.1.0"
TINY = "lm_tiny --data.batch-size 4096 --data.tokenizer bpe --data.vocab-size 512"
CASES = {
    "hybrid-v5e.gke.yaml": "gke hybrid_1b --name hybrid-v5e --mesh.fsdp 256 --data.batch-size 512 --data.source /runs/corpus "
    f"--target v5e:16x16 --slices 2 {IMAGE} --bucket runs-bucket --service-account trainer --env JAX_LOG_COMPILES=1",
    "tiny-v6e.gke.yaml": f"gke {TINY} --name tiny-v6e --target v6e:2x4 {IMAGE} --claim runs --spot --priority-class low",
    "tiny-h100.gke.yaml": f"gke {TINY} --name tiny-h100 --target h100:16x8 {IMAGE} --claim runs --queue research --secret wandb "
    "--namespace team-a --machine-type a3-highgpu-8g --entry 'python launch.py'",
    "hybrid-h100.slurm.sh": "slurm hybrid_1b --name hybrid-h100 --mesh.fsdp 64 --data.source /shared/corpus --target h100:8x8 "
    "--run-folder /shared/runs/hybrid --setup 'source /shared/plait/bin/activate' --partition gpu --account lab --time 2-00:00:00",
    "tiny-b200.slurm.sh": f"slurm {TINY} --name tiny-b200 --model.pattern 'gated_deltanet*3,softmax' --model.num-layers 4 --cpus 96 "
    "--target b200:2x8 --run-folder /shared/runs/tiny --image nvcr.io#team/plait:0.1.0 --mount /shared/corpus "
    '--env NOTE="it\'s $HOME" --env NCCL_DEBUG=INFO',
    "ratio.slurm.sh": "slurm --sweep ratio --preset lm_quick --workers 8 --target h100:1x8 --run-folder /shared/sweeps/ratio",
    "rates.gke.yaml": "gke --sweep lm_tiny --optimizer.learning-rate 1e-3,3e-3 --seed 0,1,2 --workers 4 --name rates --target v6e:2x2 "
    f"{IMAGE} --claim runs --queue research --elements 3",
    "hybrid-v5p.tpu-vm.sh": "tpu-vm hybrid_1b --name hybrid-v5p --mesh.fsdp 256 --target v5p:4x8x8 --project lab --zone us-east5-a "
    "--package 'plait[tpu] @ git+https://example.com/plait@v0.1.0' --bucket runs-bucket --reserved",
    "tiny-v6e.tpu-vm.sh": f"tpu-vm {TINY} --name tiny-v6e --model.pattern 'gated_deltanet*3,softmax' --model.num-layers 4 "
    "--target v6e:4x4 --slices 2 --project lab --zone us-east5-b --package 'plait[tpu] @ https://example.com/plait-0.1.0-py3-none-any.whl' "
    '--nfs 10.0.0.2:/runs --spot --network training --env NOTE="it\'s $HOME"',
}
GKE = [name for name in CASES if name.endswith("yaml") and "--sweep" not in CASES[name]]
SCRIPTS = [name for name in CASES if name.endswith("sh")]


def write_all(folder: Path) -> Path:
    """The file of every case, as the command writes it from `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        for args in CASES.values():
            launch_files.write_launch(shlex.split(args))
    finally:
        os.chdir(before)
    return folder / "launch"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for path in write_all(Path(name)).iterdir():
            (GOLDEN / path.name).write_text(path.read_text("utf-8"), "utf-8")
