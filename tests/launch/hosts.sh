#!/usr/bin/env bash
# Hosts on this machine, for root: network namespaces with an address, a name and a cable each.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: HOSTS=FOLDER tests/launch/hosts.sh up NAME... | on NAME COMMAND... | down

  up NAME...        make hosts of these names on one network; nothing else is reached from there
  on NAME COMMAND   run a command on a host: own network, host name and /etc/hosts, the same files
  down              kill what runs on them, and take them away

FOLDER keeps the table of names. Host names must be free on this machine (ip netns list).
TEXT
}

if [ $# -eq 0 ] || [ -z "${HOSTS:-}" ]; then usage >&2; exit 2; fi
command=$1; shift
hub=hub-$(basename "$HOSTS")

case "$command" in
  up)
    mkdir -p "$HOSTS"
    printf '127.0.0.1 localhost\n' > "$HOSTS/hosts"
    ip netns add "$hub"
    ip -n "$hub" link add bridge0 type bridge
    ip -n "$hub" link set bridge0 up
    number=0
    for name in "$@"; do
      number=$((number + 1))
      ip netns add "$name"
      ip link add "cable$number" netns "$hub" type veth peer name eth0 netns "$name"
      ip -n "$hub" link set "cable$number" master bridge0 up
      ip -n "$name" addr add "10.77.0.$number/24" dev eth0
      ip -n "$name" link set eth0 up
      ip -n "$name" link set lo up
      printf '10.77.0.%s %s\n' "$number" "$name" >> "$HOSTS/hosts"
    done
    ;;
  on)
    # Not `ip netns exec`, which would hide the machine's control groups.
    # shellcheck disable=SC2016
    become='hostname "$1"; mount --bind "$0/hosts" /etc/hosts; shift; exec "$@"'
    exec nsenter --net="/run/netns/$1" unshare --uts --mount -- bash -c "$become" "$HOSTS" "$@"
    ;;
  down)
    while read -r _ name; do
      if [ "$name" = localhost ]; then continue; fi
      ip netns pids "$name" 2>/dev/null | xargs --no-run-if-empty kill -9 || true
      ip netns delete "$name" || true
    done < "$HOSTS/hosts"
    ip netns delete "$hub" || true
    ;;
  *) usage >&2; exit 2 ;;
esac
