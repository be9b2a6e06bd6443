#!/usr/bin/env bash
# An object store that speaks S3: OpenStack Swift from Debian's packages, on loopback, one copy of everything.
#
#   tests/cluster/swift-up.sh DIR        then: source DIR/env; take it away with swift-down.sh DIR
#
# Signatures are checked, so wrong keys are refused as they are elsewhere. Needs root, a file system with extended attributes,
# and: swift-proxy swift-account swift-container swift-object memcached.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${1:?swift-up.sh: which folder?}"
base=$(cd "$1" && pwd)
"$here/swift-down.sh" "$base"
mkdir -p "$base"/{disk/one,log}
trap 'cat "$base"/log/* >&2; "$here/swift-down.sh" "$base"' ERR

ports=$(python3 -c '
import socket
probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
print(*(probe.getsockname()[1] for probe in probes))')
read -r proxy account container object cache <<< "$ports"

settings() {  # what all four daemons are told: SERVER PORT
  cat << END
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = $2
user = $(id -un)
workers = 0
swift_dir = $base
devices = $base/disk
mount_check = false
log_udp_host = 127.0.0.1
log_udp_port = 9
END
}

start() {  # NAME COMMAND...: in a session of its own, so that swift-down.sh ends it with all its children
  local name=$1
  shift
  setsid "$@" > "$base/log/$name" 2>&1 < /dev/null &
  echo $! > "$base/$name.pid"
}

start memcached memcached -u "$(id -un)" -l 127.0.0.1 -p "$cache" -U 0 -m 16
for server in account container object; do
  ring=$base/$server.builder
  {
    swift-ring-builder "$ring" create 2 1 1  # 4 partitions, 1 copy
    swift-ring-builder "$ring" add "r1z1-127.0.0.1:${!server}/one" 1
    swift-ring-builder "$ring" rebalance
  } > "$base/log/$server-ring"
  settings "$server" "${!server}" > "$base/$server.conf"
  cat >> "$base/$server.conf" << END
[pipeline:main]
pipeline = $server-server
[app:$server-server]
use = egg:swift#$server
END
  start "$server" "swift-$server-server" "$base/$server.conf" -v
done

{
  settings proxy "$proxy"
  echo '[pipeline:main]'
  echo 'pipeline = catch_errors gatekeeper cache s3api tempauth copy slo dlo proxy-server'
  printf '[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n'
  for filter in catch_errors gatekeeper copy slo dlo; do printf '[filter:%s]\nuse = egg:swift#%s\n' $filter $filter; done
  printf '[filter:cache]\nuse = egg:swift#memcache\nmemcache_servers = 127.0.0.1:%s\n' "$cache"
  printf '[filter:s3api]\nuse = egg:swift#s3api\nlocation = us-east-1\ns3_acl = false\n'
  printf '[filter:tempauth]\nuse = egg:swift#tempauth\nuser_tests_reader = secret .admin\n'
} > "$base/proxy.conf"
start proxy swift-proxy-server "$base/proxy.conf" -v

for port in $ports; do
  for _ in $(seq 200); do
    (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null && break
    sleep 0.1
  done
  (exec 3<> "/dev/tcp/127.0.0.1/$port")
done
cat > "$base/env" << END
export AWS_ENDPOINT_URL=http://127.0.0.1:$proxy AWS_REGION=us-east-1
export AWS_ACCESS_KEY_ID=tests:reader AWS_SECRET_ACCESS_KEY=secret
END
