#!/usr/bin/env bash
# Separate hosts on this machine: ctl and node1..nodeN, each with its own network, name, processes and /dev/shm.
#
#   tests/cluster/hosts-up.sh DIR [N]        needs root and iproute2; DIR/on HOST COMMAND... runs a command there
#
# They share the disk. A bridge inside ctl joins them; this machine's own network and /etc stay as they are.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${1:?hosts-up.sh: which folder?}"
base=$(cd "$1" && pwd)
count=${2:-2}
"$here/hosts-down.sh" "$base"
mkdir -p "$base/hosts"
trap '"$here/hosts-down.sh" "$base"' ERR

echo "127.0.0.1 localhost" > "$base/hosts/table"
for ((i = 0; i <= count; i++)); do
  if ((i)); then name=node$i; else name=ctl; fi
  echo "10.91.7.$((i + 1)) $name" >> "$base/hosts/table"
done
: > "$base/hosts/no-name-server"  # an unreachable one costs ten seconds a look-up

for name in $(awk 'NR > 1 {print $2}' "$base/hosts/table"); do
  # the first process of a host: when it dies, the host and all on it are gone at once, as in a power cut
  setsid unshare --fork --kill-child --pid --mount-proc --net --uts --ipc bash -c '
    set -e
    hostname "$1"
    mount --bind "$2/table" /etc/hosts
    mount --bind "$2/no-name-server" /etc/resolv.conf
    mount -t tmpfs shm /dev/shm
    ip link set lo up
    touch "$2/$1.up"
    while true; do sleep 3600 & wait $!; done' init "$name" "$base/hosts" < /dev/null > "$base/hosts/$name.log" 2>&1 &
  parent=$!
  for ((i = 0; i < 250; i++)); do [[ -e $base/hosts/$name.up ]] && break; sleep 0.02; done
  [[ -e $base/hosts/$name.up ]] || { cat "$base/hosts/$name.log" >&2; false; }
  pid=$parent
  until [[ $(readlink "/proc/$pid/exe") == *bash ]]; do pid=$(cut -d' ' -f1 "/proc/$pid/task/$pid/children"); done
  echo "$pid $(cut -d' ' -f22 "/proc/$pid/stat")" > "$base/hosts/$name.init"
done

cat > "$base/on" <<EOF
#!/usr/bin/env bash
# on HOST COMMAND...: run it on that host, in this folder; it dies with this process.
read -r pid _ < "$base/hosts/\$1.init"
[[ ! -f $base/slurm.conf ]] || export SLURM_CONF=$base/slurm.conf
exec nsenter --target "\$pid" --net --uts --ipc --pid --mount --wd="\$PWD" -- setpriv --pdeathsig KILL "\${@:2}"
EOF
chmod +x "$base/on"

inside() { read -r pid _ < "$base/hosts/$1.init"; nsenter --target "$pid" --net -- "${@:2}"; }
inside ctl ip link add switch type bridge forward_delay 0
inside ctl ip link set switch up
inside ctl ip address add 10.91.7.1/24 dev switch
for ((i = 1; i <= count; i++)); do
  read -r pid _ < "$base/hosts/node$i.init"
  inside ctl ip link add "port$i" type veth peer name eth0 netns "$pid"
  inside ctl ip link set "port$i" master switch up
  inside "node$i" ip address add "10.91.7.$((i + 1))/24" dev eth0
  inside "node$i" ip link set eth0 up
done
trap - ERR
