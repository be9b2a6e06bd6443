#!/usr/bin/env bash
# Do something bad to a host of `hosts-up.sh DIR`.
#
#   tests/cluster/hosts-fault.sh DIR nodeN cut|mend|power
#     cut    every packet is lost on the way, and nobody is told;  mend  packets pass again
#     power  all processes of the host are gone at once, and no last packet leaves it
set -euo pipefail
state=${1:?hosts-fault.sh: which folder?}/hosts host=${2:?which host?} fault=${3:?which fault?}
read -r switch _ < "$state/ctl.init"
read -r pid _ < "$state/$host.init"
port() { nsenter --target "$switch" --net -- ip link set "port${host#node}" "$@"; }
case $fault in
  cut) port nomaster ;;
  mend) port master switch ;;
  power) port nomaster && kill -KILL "$pid" ;;
  *) echo "hosts-fault.sh: $fault is not a fault; there are cut, mend, power" >&2; exit 2 ;;
esac
