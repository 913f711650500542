#!/usr/bin/env bash
# Train on several machines: run the same line on each of them.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: NNODES=N MASTER_ADDR=HOST launch/torchrun.sh CONFIG [key=value ...] [--resume]

Run the same line on every node: torchrun's c10d rendezvous at MASTER_ADDR gives out the ranks. A rank that dies ends
the round; the nodes meet again up to RESTARTS times and go on from the newest checkpoint, so the run folder
must lie on a file system that all nodes see.

  NNODES=2 MASTER_ADDR=node1 launch/torchrun.sh degla engine.kind=deepspeed

Environment
  NNODES        number of nodes, or a range MIN:MAX for a run that may go on with fewer     (default 1)
  MASTER_ADDR   host name of one of the nodes, which must be up for the whole run           (default localhost)
  MASTER_PORT   a free port there                                                           (default 29400)
  JOB_ID        the same on every node, different for every job that shares MASTER_ADDR     (default clipkit)
  NPROC         ranks on this node                                                          (default one a GPU)
  NODE_RANK     0 on MASTER_ADDR, another number elsewhere; only where a node does not know the name it is called by
  JOIN_S        seconds to wait for MASTER_ADDR and for enough nodes                        (default 600)
  LAST_CALL_S   seconds to wait for more nodes than MIN, when that many are there           (default 30)
  RESTARTS      rounds after the first                                                      (default 3)
  PYTHON, OMP_NUM_THREADS
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
if [ $# -eq 0 ]; then usage >&2; exit 2; fi
processes=${NPROC:-$(accelerators)}
prepare "$processes"
meeting="join_timeout=${JOIN_S:-600},read_timeout=${JOIN_S:-600}"
if [ -n "${LAST_CALL_S:-}" ]; then meeting+=",last_call_timeout=$LAST_CALL_S"; fi
if [ -n "${NODE_RANK:-}" ]; then meeting+=",is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)"; fi

exec "$PYTHON" -m clipkit.agent \
  --nnodes "${NNODES:-1}" --nproc-per-node "$processes" \
  --rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29400}" --rdzv-id "${JOB_ID:-clipkit}" \
  --rdzv-conf "$meeting" \
  --max-restarts "${RESTARTS:-3}" -m clipkit train "$@"
