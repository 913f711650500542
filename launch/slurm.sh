#!/usr/bin/env bash
#SBATCH --job-name=clipkit
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Train on a SLURM cluster: one task a GPU; saves, requeues itself and goes on when its time is up or it is preempted.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: sbatch [SBATCH OPTIONS] launch/slurm.sh CONFIG [key=value ...]

Submit from the repository, or with `clipkit launch --on slurm`. SLURM starts the ranks, one a task, so ask for as many
tasks a node as it has GPUs:

  sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 launch/slurm.sh degla save_every=200_000
  sbatch --array=0-2 --gpus-per-node=1 launch/slurm.sh degla seed={array} out='runs/{name}_{seed}'

{array} is the number within a job array. Two minutes before the time limit (--signal=B:USR1@SECONDS for another moment),
or when it is preempted, the run finishes its step and saves; the job is queued again and goes on from there. After a
node was lost SLURM itself queues it again, and it goes on from its newest checkpoint (save_every).

Environment
  MASTER_ADDR, MASTER_PORT   where the ranks meet      (default: the job's first node, a port made from the job's number)
  CLIPKIT_LAUNCH             folder of this script   (default: launch/ where the job was submitted)
  PYTHON, OMP_NUM_THREADS    (default: the cores of a task)
TEXT
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
if [ $# -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then usage >&2; exit 2; fi
# SLURM runs a copy of this script from a folder of its own.
# shellcheck source=launch/common.sh
source "${CLIPKIT_LAUNCH:-${SLURM_SUBMIT_DIR:?}/launch}/common.sh"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
prepare 1
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

# Each task becomes the rank that SLURM says it is. A signal that comes before the run listens must not end it.
# shellcheck disable=SC2016
become_rank='trap "" USR1; export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'
srun --kill-on-bad-exit=1 bash -c "$become_rank" rank \
  "$PYTHON" -m clipkit train "${@//\{array\}/${SLURM_ARRAY_TASK_ID:-0}}" --resume &
ranks=$!
asked=
trap 'asked=1; kill -USR1 "$ranks" 2>/dev/null || true' USR1
trap ':' TERM # scancel tells the ranks itself; the script waits for them
code=0
while kill -0 "$ranks" 2>/dev/null; do # a signal ends wait, not the ranks
  wait "$ranks" && code=0 || code=$?
done

# Asked to stop, the first rank that has saved leaves with guard.requeue_code, and SLURM ends the others. A job that was
# cancelled, or failed by itself, is not brought back.
if [ -n "$asked" ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
