#!/usr/bin/env bash
# What the tests of hosts and clusters need beside Python, from Debian's packages, for root. Never fails: what is not there is
# said, and those tests skip.
set -uo pipefail

needed="slurmctld slurmd sbatch ip nsenter"
missing=""
for program in $needed; do
  command -v "$program" > /dev/null || missing+=" $program"
done
if [ -z "$missing" ]; then exit 0; fi

say() { echo "tests/launch: no$missing here and $1: those tests will skip"; exit 0; }

[ "$(id -u)" = 0 ] || say "not root, who alone may install them"
command -v apt-get > /dev/null || say "no apt-get to install them"
log=$(mktemp)
packages=(slurmctld slurmd slurm-client munge iproute2 util-linux)
export DEBIAN_FRONTEND=noninteractive
if ! timeout 180 bash -c 'apt-get update && apt-get install --yes --no-install-recommends "$@"' - "${packages[@]}" \
  > "$log" 2>&1 < /dev/null; then
  tail -n 3 "$log" >&2
  say "apt-get could not install them"
fi
