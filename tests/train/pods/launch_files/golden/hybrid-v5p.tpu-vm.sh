#!/bin/bash
# hybrid-v5p: v5p 4x8x8: 64 hosts of 4 chips, 256 devices, as v5p-512 in us-east5-a
# written by: python launch.py write-launch tpu-vm hybrid_1b --name hybrid-v5p --mesh.fsdp 256 --target v5p:4x8x8 --project lab --zone us-east5-a --package 'plait[tpu] @ git+https://example.com/plait@v0.1.0' --bucket runs-bucket --reserved
#
# submit:     bash ./hybrid-v5p.tpu-vm.sh run      (create, install, start, watch)
# watch:      bash ./hybrid-v5p.tpu-vm.sh logs     (of the first host)
# state:      bash ./hybrid-v5p.tpu-vm.sh status
# stop, save: bash ./hybrid-v5p.tpu-vm.sh stop
# resume:     bash ./hybrid-v5p.tpu-vm.sh start    (goes on from the newest whole checkpoint in /mnt/plait/hybrid-v5p)
# delete:     bash ./hybrid-v5p.tpu-vm.sh delete   (the TPUs; the run folder stays)
set -euo pipefail

readonly NAME=hybrid-v5p PROJECT=lab ZONE=us-east5-a UNIT=plait-hybrid-v5p
readonly NODES=(hybrid-v5p)

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
    tpus queued-resources create hybrid-v5p --node-id=hybrid-v5p --type=v5p --topology=4x8x8 --runtime-version=v2-alpha-tpuv5 --reserved
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
~/.local/bin/uv pip install --quiet --python "$HOME/plait-env/bin/python" 'plait[tpu] @ git+https://example.com/plait@v0.1.0'
if mountpoint --quiet /mnt/plait; then exit 0; fi
sudo mkdir -p /mnt/plait
sudo chown "$(id -u):$(id -g)" /mnt/plait
if ! command -v gcsfuse > /dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl --fail --silent https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get update --quiet
  sudo apt-get install --yes --quiet gcsfuse
fi
gcsfuse --implicit-dirs runs-bucket /mnt/plait
REMOTE
  )"
}

start() {
  on_all "$(cat << 'REMOTE'
set -eu
sudo systemctl stop plait-hybrid-v5p 2> /dev/null || true
sudo systemctl reset-failed plait-hybrid-v5p 2> /dev/null || true
sudo systemd-run --unit=plait-hybrid-v5p --collect --property=Restart=on-failure --property=RestartSec=15 '--property=RestartPreventExitStatus=2 3' --property=StartLimitIntervalSec=0 --property=RemainAfterExit=yes --property=KillMode=mixed --property=TimeoutStopSec=300 --setenv=PLAIT_HOSTS=tpu --uid="$(id -u)" --gid="$(id -g)" --working-directory="$HOME" \
  "$HOME/plait-env/bin/plait" train hybrid_1b --mesh.fsdp 256 --out /mnt/plait/hybrid-v5p --resume
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
