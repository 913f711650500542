#!/usr/bin/env bash
# What some tests need beside Python, from Debian's packages, for root. Never fails: what is not there is said, and those
# tests skip.
set -uo pipefail
export DEBIAN_FRONTEND=noninteractive

# want TESTS "PROGRAM ..." PACKAGE ...
want() {
  local tests=$1 missing="" log program
  for program in $2; do
    command -v "$program" > /dev/null || missing+=" $program"
  done
  shift 2
  [ -n "$missing" ] || return 0
  log=$(mktemp)
  if [ "$(id -u)" != 0 ]; then
    echo "$tests: no$missing here and not root, who alone may install them: those tests will skip"
  elif ! command -v apt-get > /dev/null; then
    echo "$tests: no$missing here and no apt-get to install them: those tests will skip"
  elif ! timeout 180 bash -c 'apt-get update && apt-get install --yes --no-install-recommends "$@"' - "$@" \
    > "$log" 2>&1 < /dev/null; then
    tail -n 3 "$log" >&2
    echo "$tests: no$missing here and apt-get could not install them: those tests will skip"
  fi
  rm -f "$log"
}

want "hosts and clusters" "slurmctld slurmd sbatch ip nsenter" \
  slurmctld slurmd slurm-client munge iproute2 util-linux
want "the report in a browser" chromium chromium
