#!/usr/bin/env bash
# Train with DeepSpeed's own launcher: this machine, or every host of a hostfile.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/deepspeed.sh [-n PROCESSES | -H HOSTFILE] CONFIG [key=value ...] [--resume]

Sets engine.kind=deepspeed; engine.zero_stage=1 or 2 is a setting like any other.

  launch/deepspeed.sh degla                                     every GPU here
  launch/deepspeed.sh -n 2 debug                                two CPU ranks
  launch/deepspeed.sh -H hosts degla engine.zero_stage=2        every host; started over ssh (needs pdsh)
  NODE_RANK=0 MASTER_ADDR=node1 launch/deepspeed.sh -H hosts degla
                                                                without ssh: the same line on each host, own NODE_RANK

A hostfile has one line a host, `node1 slots=8`. Repository, virtual environment, data and run folder must lie at the
same path on all of them. Variables for the other hosts' ranks go into a file .deepspeed_env (NAME=value) in the
working folder; only those of Python and NCCL are passed on by themselves. This launcher restarts nothing: start
again with --resume, or use torchrun.sh.

Environment: NODE_RANK, MASTER_ADDR, MASTER_PORT (default 29500), PYTHON, OMP_NUM_THREADS.
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

processes=$(accelerators)
where=()
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  -n) processes=${2:?"-n needs a number of processes"}; shift 2 ;;
  -H)
    where=(--hostfile "${2:?"-H needs a file"}" --force_multi)
    shift 2
    if [ -n "${NODE_RANK:-}" ]; then
      where+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?"with NODE_RANK, name the first host"}")
    elif [ -n "${MASTER_ADDR:-}" ]; then
      where+=(--master_addr "$MASTER_ADDR")
    fi
    ;;
esac
if [ $# -eq 0 ]; then usage >&2; exit 2; fi
if [ ${#where[@]} -eq 0 ]; then where=(--num_gpus "$processes"); fi
prepare "$processes"

exec "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --master_port "${MASTER_PORT:-29500}" \
  --no_local_rank --module clipkit train "$1" engine.kind=deepspeed "${@:2}"
