#!/usr/bin/env bash
# Train on this machine, one process a GPU or several on the CPU.
#
#   launch/local.sh --cpu 2 recipes/digits-alexnet.yaml [--run runs/NAME] [--resume] [--SECTION.KEY VALUE ...]
#   launch/local.sh --gpus all recipes/X.yaml           or --gpus N
#
# DRY_RUN=1 prints what would run. The exit code is that of the first rank that failed.
set -euo pipefail

usage() {
  echo "launch/local.sh: $1" >&2
  echo "  Use: launch/local.sh --cpu N | --gpus N|all  RECIPE.yaml [--SECTION.KEY VALUE ...]" >&2
  exit 2
}

[[ $# -ge 3 ]] || usage "found $# words, expected at least a device, a number and a recipe."
device=$1 count=$2 recipe=$3
shift 3
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -f $recipe ]] || usage "there is no recipe $recipe."
if [[ -n ${PYTHON:-} ]]; then
  python=$(command -v "$PYTHON") || usage "PYTHON is $PYTHON, which is no program."
else
  python=$project/.venv/bin/python
  [[ -x $python ]] || python=$(command -v python3) || usage "no Python found; make one with: make install"
fi

case $device in
  --cpu) export ACCELERATE_USE_CPU=true ;;  # without it, ranks on the CPU would each train alone
  --gpus)
    export ACCELERATE_USE_CPU=false
    if [[ $count == all ]]; then
      count=$("$python" -c 'import torch; print(torch.cuda.device_count())')
      [[ $count != 0 ]] || usage "--gpus all, and PyTorch sees no GPU on this machine. Use --cpu N."
    fi ;;
  *) usage "the first word is $device; expected --cpu or --gpus." ;;
esac
[[ $count =~ ^[1-9][0-9]*$ ]] || usage "$device $count is not a number of processes."

command=("$python" -m dist_train.train --config "$recipe" "$@")
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
if [[ -n ${DRY_RUN:-} ]]; then
  echo "$count x ACCELERATE_USE_CPU=$ACCELERATE_USE_CPU ${command[*]}"
  exit 0
fi
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
[[ $count != 1 ]] || exec "${command[@]}"

export MASTER_ADDR=127.0.0.1 WORLD_SIZE=$count LOCAL_WORLD_SIZE=$count
MASTER_PORT=${LOCAL_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export MASTER_PORT

ranks=()
# shellcheck disable=SC2317  # called by the traps
signal_ranks() { kill "-$1" "${ranks[@]}" 2>/dev/null || true; }
trap 'signal_ranks TERM' TERM INT HUP  # ranks save at a step boundary and end by themselves
trap 'signal_ranks USR1' USR1
trap 'signal_ranks KILL' EXIT
for ((rank = 0; rank < count; rank++)); do
  # a terminal that goes away sends HUP to all: the ranks leave that to the trap above, which asks them to save
  (trap '' HUP; RANK=$rank LOCAL_RANK=$rank exec "${command[@]}") &
  ranks+=($!)
done

# A rank that fails alone leaves the others waiting for it: they get GRACE_S seconds to notice and to speak.
code=0 deadline=
while ((${#ranks[@]})); do
  alive=()
  for pid in "${ranks[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
      continue
    fi
    rc=0
    wait "$pid" || rc=$?
    ((code)) || code=$rc
    if ((code == 86 && rc && rc != 85)); then  # 86 says that another rank was lost: this one, by its own code
      code=$rc
    fi
    # 85 says that the run was asked to stop: the others may still be writing what it was
    if ((rc && rc != 85)) && [[ -z $deadline ]]; then
      code=$rc deadline=$((SECONDS + ${GRACE_S:-60}))
    fi
  done
  ranks=("${alive[@]}")
  [[ -z $deadline ]] || ((SECONDS < deadline)) || signal_ranks KILL
  sleep 0.2 &
  wait $! || true  # unlike a plain sleep, a signal ends it at once
done
exit "$code"
