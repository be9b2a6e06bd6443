#!/usr/bin/env bash
# Take the object store of `swift-up.sh DIR` away, with all that is in it. May be called at any time, also twice.
#
#   tests/cluster/swift-down.sh DIR
set -uo pipefail
base=${1:?swift-down.sh: which folder?}
for file in "$base"/*.pid; do
  read -r pid 2> /dev/null < "$file" || continue
  # a number may have gone to another process since: the daemons name the folder or the file on their command line
  if grep -qz -e "$base" -e memcached "/proc/$pid/cmdline" 2> /dev/null; then kill -KILL -- "-$pid" 2> /dev/null; fi
done
rm -rf "$base"/{disk,log,backups,env} "$base"/*.{pid,conf,builder,ring.gz}
