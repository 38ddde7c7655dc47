#!/bin/bash
#SBATCH --job-name=tiny-b200
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tiny-b200-%j.log
#
# tiny-b200: b200: 2 hosts of 8 GPUs, 16 devices
# written by: python launch.py write-launch slurm lm_tiny --data.batch-size 4096 --data.tokenizer bpe --data.vocab-size 512 --name tiny-b200 --model.pattern 'gated_deltanet*3,softmax' --model.num-layers 4 --cpus 96 --target b200:2x8 --run-folder /shared/runs/tiny --image 'nvcr.io#team/plait:0.1.0' --mount /shared/corpus --env 'NOTE=it'"'"'s $HOME' --env NCCL_DEBUG=INFO
#
# check:      sbatch --test-only tiny-b200.slurm.sh
# submit:     sbatch tiny-b200.slurm.sh
# watch:      tail --follow=name --retry tiny-b200-JOBID.host0.log
# state:      squeue --name tiny-b200; sacct --duplicates --name tiny-b200
# stop, save: scancel JOBID    (saves within the cluster's KillWait, 30 s by default; for longer:
#             scontrol update JobId=JOBID Requeue=0; scancel --signal=TERM JOBID)
# resume:     submit again; it goes on from the newest whole checkpoint in /shared/runs/tiny

set -uo pipefail
trap : TERM  # the tasks get it too; they save, and this script goes on

export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7  # a task owns all GPUs of its host
export NOTE='it'"'"'s $HOME'
export NCCL_DEBUG=INFO

srun --wait=120 --open-mode=append --output=tiny-b200-%j.host%t.log --cpus-per-task=96 '--container-image=nvcr.io#team/plait:0.1.0' --container-mounts=/shared/corpus:/shared/corpus,/shared/runs:/shared/runs \
  plait train lm_tiny --data.batch-size 4096 --data.tokenizer bpe --data.vocab-size 512 --model.pattern 'gated_deltanet*3,softmax' --model.num-layers 4 --out /shared/runs/tiny --resume
status=$?

again() {
  if [[ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" == RUNNING ]]; then  # else it was cancelled or is queued again
    echo "status $status: queued again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

case "$status" in
  0) echo 'done' ;;
  2) echo 'bad input: see tiny-b200-'"$SLURM_JOB_ID"'.host*.log' ;;
  3) echo 'stopped by an event of the run, which is saved' ;;
  75) again ;;
  *)
    if (( ${SLURM_RESTART_COUNT:-0} < 100 )); then again; else echo "failed too often"; fi
    ;;
esac
exit "$status"
