# shellcheck shell=bash
# What every launcher sets; sourced, not run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  if [ -x "$root/.venv/bin/python" ]; then PYTHON="$root/.venv/bin/python"; fi
fi

# accelerators: number of GPUs on this machine, 1 where there is none (one CPU process)
accelerators() {
  local count=0
  if command -v nvidia-smi >/dev/null; then count=$(nvidia-smi --list-gpus 2>/dev/null | wc -l); fi
  echo $((count > 0 ? count : 1))
}

# prepare RANKS: the environment of RANKS processes on this machine
prepare() {
  local cores
  cores=$(getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
  # A restarted rank must not read dead ranks' addresses from the agent's store.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # DeepSpeed and torch find ninja and friends beside the interpreter.
  PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"
  export PATH PYTHON
}
