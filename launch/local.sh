#!/usr/bin/env bash
# Train on this machine, one process a GPU (or N processes on the CPU).
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/local.sh [-n PROCESSES] CONFIG [key=value ...] [--resume]

Starts PROCESSES ranks of `clipkit train` on this machine; default: one a GPU, else one.
A run that dies is restarted RESTARTS times (default 0) and goes on from its newest checkpoint.

  launch/local.sh degla                                    every GPU here
  launch/local.sh -n 2 debug engine.kind=deepspeed         two CPU ranks, ZeRO-1

Environment: PYTHON, RESTARTS, OMP_NUM_THREADS (default: the cores shared out between the ranks).
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

processes=$(accelerators)
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  -n) processes=${2:?"-n needs a number of processes"}; shift 2 ;;
esac
if [ $# -eq 0 ]; then usage >&2; exit 2; fi
prepare "$processes"

exec "$PYTHON" -m clipkit.agent --standalone --nproc-per-node "$processes" \
  --max-restarts "${RESTARTS:-0}" -m clipkit train "$@"
