#!/bin/bash
# tiny-v6e: 2 slices of v6e 4x4: 8 hosts of 4 chips, 32 devices, as v6e-16 in us-east5-b
# written by: python launch.py write-launch tpu-vm lm_tiny --data.batch-size 4096 --data.tokenizer bpe --data.vocab-size 512 --name tiny-v6e --model.pattern 'gated_deltanet*3,softmax' --model.num-layers 4 --target v6e:4x4 --slices 2 --project lab --zone us-east5-b --package 'plait[tpu] @ https://example.com/plait-0.1.0-py3-none-any.whl' --nfs 10.0.0.2:/runs --spot --network training --env 'NOTE=it'"'"'s $HOME'
#
# submit:     bash ./tiny-v6e.tpu-vm.sh run      (create, install, start, watch)
# watch:      bash ./tiny-v6e.tpu-vm.sh logs     (of the first host)
# state:      bash ./tiny-v6e.tpu-vm.sh status
# stop, save: bash ./tiny-v6e.tpu-vm.sh stop
# resume:     bash ./tiny-v6e.tpu-vm.sh start    (goes on from the newest whole checkpoint in /mnt/plait/tiny-v6e)
# delete:     bash ./tiny-v6e.tpu-vm.sh delete   (the TPUs; the run folder stays)
set -euo pipefail

readonly NAME=tiny-v6e PROJECT=lab ZONE=us-east5-b UNIT=plait-tiny-v6e
readonly NODES=(tiny-v6e-0 tiny-v6e-1)

tpus() {
  gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

on_all() { # a command on every host, all at once; fails where one does
  local node job failed=0 jobs=()
  for node in "${NODES[@]}"; do
    tpus tpu-vm ssh "$node" --worker=all --command="$1" &
    jobs+=("$!")
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return "$failed"
}

on_first() {
  tpus tpu-vm ssh "${NODES[0]}" --worker=0 --command="$1"
}

state() { # of the queued resource: ACTIVE once all TPUs are there
  local answer
  if answer="$(tpus queued-resources describe "$NAME" --format='value(state.state)' 2> /dev/null)"; then
    echo "$answer"
    return
  fi
  answer="$(tpus queued-resources describe "$NAME" 2>&1 > /dev/null || true)"
  case "$answer" in
    *NOT_FOUND* | *"not found"*) echo ABSENT ;;
    *) echo UNKNOWN; echo "$answer" >&2 ;;
  esac
}

create() {
  if [[ "$(state)" == ABSENT ]]; then
    tpus queued-resources create tiny-v6e --node-count=2 --node-prefix=tiny-v6e --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --network=training --spot
  fi
  local now
  while now="$(state)" && [[ "$now" != ACTIVE ]]; do
    case "$now" in
      FAILED | SUSPENDED | SUSPENDING | ABSENT) echo "queued resource $NAME is $now" >&2; return 1 ;;
    esac
    echo "queued resource $NAME is $now"
    sleep 30
  done
}

install() {
  on_all "$(cat << 'REMOTE'
set -eu
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 "$HOME/plait-env"
~/.local/bin/uv pip install --quiet --python "$HOME/plait-env/bin/python" 'plait[tpu] @ https://example.com/plait-0.1.0-py3-none-any.whl'
if mountpoint --quiet /mnt/plait; then exit 0; fi
sudo mkdir -p /mnt/plait
sudo chown "$(id -u):$(id -g)" /mnt/plait
sudo apt-get install --yes --quiet nfs-common
sudo mount -t nfs -o rw,hard 10.0.0.2:/runs /mnt/plait
REMOTE
  )"
}

start() {
  on_all "$(cat << 'REMOTE'
set -eu
sudo systemctl stop plait-tiny-v6e 2> /dev/null || true
sudo systemctl reset-failed plait-tiny-v6e 2> /dev/null || true
sudo systemd-run --unit=plait-tiny-v6e --collect --property=Restart=on-failure --property=RestartSec=15 '--property=RestartPreventExitStatus=2 3' --property=StartLimitIntervalSec=0 --property=RemainAfterExit=yes --property=KillMode=mixed --property=TimeoutStopSec=300 --setenv=PLAIT_HOSTS=tpu '--setenv=NOTE=it'"'"'s $HOME' --uid="$(id -u)" --gid="$(id -g)" --working-directory="$HOME" \
  "$HOME/plait-env/bin/plait" train lm_tiny --data.batch-size 4096 --data.tokenizer bpe --data.vocab-size 512 --model.pattern 'gated_deltanet*3,softmax' --model.num-layers 4 --out /mnt/plait/tiny-v6e --resume
REMOTE
  )"
}

delete() {
  tpus queued-resources delete "$NAME" --force
}

services() { # a word a host: running, auto-restart, exited (done), failed (bad input), dead (a host was started anew)
  on_all "systemctl show --property=SubState --value $UNIT" 2> /dev/null || true
}

watch() { # until the run is done; TPUs that were taken away are asked for again
  local now
  while true; do
    now="$(state)"
    case "$now" in
      ACTIVE)
        now="$(services)"
        case "$now" in
          *failed*) echo "the services ended: exit status 2 is bad input, 3 a stop by an event; see logs" >&2; return 1 ;;
          *dead*) echo "a host was started anew"; { install && start; } || echo "not yet; trying again" ;;
          *start* | *running* | *stop*) ;;
          *exited*) echo "done"; return 0 ;;
        esac
        ;;
      FAILED | SUSPENDED | ABSENT)
        echo "queued resource $NAME is $now: asking for new TPUs"
        [[ "$now" == ABSENT ]] || delete || true
        { create && install && start; } || echo "not yet; trying again"
        ;;
    esac
    sleep 60
  done
}

case "${1:-}" in
  create | install | start | watch | delete) "$1" ;;
  run) create; install; start; watch ;;
  status) echo "queued resource: $(state)"; on_all "systemctl status --no-pager --lines=3 $UNIT || true" ;;
  logs) on_first "sudo journalctl --unit=$UNIT --lines=200 --follow" ;;
  stop) on_all "sudo systemctl stop $UNIT" ;;
  *) echo "usage: bash $0 run|create|install|start|watch|status|logs|stop|delete" >&2; exit 2 ;;
esac
