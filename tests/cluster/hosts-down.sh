#!/usr/bin/env bash
# Take the hosts of `hosts-up.sh DIR` away, whatever runs on them. May be called at any time, also twice.
#
#   tests/cluster/hosts-down.sh DIR
set -uo pipefail
state=${1:?hosts-down.sh: which folder?}/hosts
for file in "$state"/*.init; do
  [[ -e $file ]] || continue
  read -r pid born < "$file"
  # a pid alone might be somebody else's by now
  [[ $(cut -d' ' -f22 "/proc/$pid/stat" 2>/dev/null) == "$born" ]] && kill -KILL "$pid"
  for ((i = 0; i < 200; i++)); do [[ -d /proc/$pid ]] || break; sleep 0.02; done
done
rm -rf "$state" "${state%/hosts}/on"
