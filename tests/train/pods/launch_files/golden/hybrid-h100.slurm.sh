#!/bin/bash
#SBATCH --job-name=hybrid-h100
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=2-00:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=hybrid-h100-%j.log
#
# hybrid-h100: h100: 8 hosts of 8 GPUs, 64 devices
# written by: python launch.py write-launch slurm hybrid_1b --name hybrid-h100 --mesh.fsdp 64 --data.source /shared/corpus --target h100:8x8 --run-folder /shared/runs/hybrid --setup 'source /shared/plait/bin/activate' --partition gpu --account lab --time 2-00:00:00
#
# check:      sbatch --test-only hybrid-h100.slurm.sh
# submit:     sbatch hybrid-h100.slurm.sh
# watch:      tail --follow=name --retry hybrid-h100-JOBID.host0.log
# state:      squeue --name hybrid-h100; sacct --duplicates --name hybrid-h100
# stop, save: scancel JOBID    (saves within the cluster's KillWait, 30 s by default; for longer:
#             scontrol update JobId=JOBID Requeue=0; scancel --signal=TERM JOBID)
# resume:     submit again; it goes on from the newest whole checkpoint in /shared/runs/hybrid

set -uo pipefail
trap : TERM  # the tasks get it too; they save, and this script goes on

export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7  # a task owns all GPUs of its host

srun --wait=120 --open-mode=append --output=hybrid-h100-%j.host%t.log --cpu-bind=none \
  bash -c 'source /shared/plait/bin/activate
if (( $? )); then exit 1; fi
exec plait train hybrid_1b --mesh.fsdp 64 --data.source /shared/corpus --out /shared/runs/hybrid --resume'
status=$?

again() {
  if [[ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" == RUNNING ]]; then  # else it was cancelled or is queued again
    echo "status $status: queued again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

case "$status" in
  0) echo 'done' ;;
  2) echo 'bad input: see hybrid-h100-'"$SLURM_JOB_ID"'.host*.log' ;;
  3) echo 'stopped by an event of the run, which is saved' ;;
  75) again ;;
  *)
    if (( ${SLURM_RESTART_COUNT:-0} < 100 )); then again; else echo "failed too often"; fi
    ;;
esac
exit "$status"
