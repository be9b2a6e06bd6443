#!/usr/bin/env bash
# Take the cluster of `slurm-up.sh DIR` away, its jobs and hosts with it. May be called at any time, also twice.
#
#   tests/cluster/slurm-down.sh DIR
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=${1:?slurm-down.sh: which folder?}
"$here/hosts-down.sh" "$base"  # the daemons and every job live on the hosts
read -r pid 2> /dev/null < "$base/munge/pid" && grep -qz "$base" "/proc/$pid/cmdline" && kill "$pid" &&
  for ((i = 0; i < 200; i++)); do [[ -d /proc/$pid ]] || break; sleep 0.02; done  # it writes into its folder until it has ended
rm -rf "$base/munge" "$base/spool" "$base/slurm.conf"
