#!/bin/bash
#SBATCH --job-name=ratio
#SBATCH --array=0-1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ratio-%A_%a.log
#
# ratio: 2 x h100: 1 host of 8 GPUs, 8 devices
# written by: python launch.py write-launch slurm --sweep ratio --preset lm_quick --workers 8 --target h100:1x8 --run-folder /shared/sweeps/ratio
#
# check:      sbatch --test-only ratio.slurm.sh
# submit:     sbatch ratio.slurm.sh
# watch:      tail --follow=name --retry ratio-JOBID_ELEMENT.host0.log
# state:      squeue --name ratio; sacct --duplicates --name ratio
# stop, save: scancel JOBID    (saves within the cluster's KillWait, 30 s by default; for longer:
#             scontrol update JobId=JOBID Requeue=0; scancel --signal=TERM JOBID)
# resume:     submit again; it takes the runs that are left in /shared/sweeps/ratio

set -uo pipefail
trap : TERM  # the tasks get it too; they save, and this script goes on


srun --wait=120 --open-mode=append --output=ratio-%A_%a.host%t.log --cpu-bind=none \
  plait sweep ratio --preset lm_quick --workers 8 --out /shared/sweeps/ratio
status=$?

again() {
  if [[ "$(squeue --noheader --jobs "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" --format %T)" == RUNNING ]]; then  # else it was cancelled or is queued again
    echo "status $status: queued again"
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  fi
}

case "$status" in
  0) echo 'done' ;;
  2) echo 'bad input: see ratio-'"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'.host*.log' ;;
  1) echo 'runs have failed: see results.csv in the folder of the sweep' ;;
  3) echo 'stopped by an event of the run, which is saved' ;;
  75) again ;;
  *)
    if (( ${SLURM_RESTART_COUNT:-0} < 100 )); then again; else echo "failed too often"; fi
    ;;
esac
exit "$status"
