#!/usr/bin/env bash
# A SLURM of N nodes on the hosts of hosts-up.sh: the controller on ctl, node1..nodeN; all files below DIR.
#
#   tests/cluster/slurm-up.sh DIR [N]        needs root and slurmctld slurmd slurm-client munge iproute2
#   DIR/on ctl sbatch ...                    partitions: main, and urgent, whose jobs push those of main back into the queue
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${1:?slurm-up.sh: which folder?}"
base=$(cd "$1" && pwd)
count=${2:-2}
"$here/slurm-down.sh" "$base"
trap 'tail -n 20 "$base"/log/* >&2; "$here/slurm-down.sh" "$base"' ERR
"$here/hosts-up.sh" "$base" "$count"

mkdir -p "$base/munge" "$base/log" "$base/spool/state"
chmod 755 "$base" "$base/munge"  # munged refuses a socket that others cannot reach
(umask 077 && head -c 512 /dev/urandom > "$base/munge/key")
munged --key-file="$base/munge/key" --socket="$base/munge/socket" --pid-file="$base/munge/pid" \
  --seed-file="$base/munge/seed" --log-file="$base/log/munged" < /dev/null > "$base/log/munged.out" 2>&1

# Short times, so that tests are short: KillWait is 30 s by default, cred_expire (the wait of a job that is queued again)
# 120 s, SlurmdTimeout (until a silent node counts as down) 300 s.
cat > "$base/slurm.conf" <<EOF
ClusterName=dist-train
SlurmctldHost=ctl
SlurmUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$base/munge/socket,cred_expire=5
StateSaveLocation=$base/spool/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/spool/slurmctld.pid
SlurmdPidFile=$base/spool/slurmd-%n.pid
SlurmctldLogFile=$base/log/slurmctld
SlurmdLogFile=$base/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SchedulerParameters=bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=${KILL_WAIT:-20}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-$count] CPUs=4 RealMemory=4096
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 MaxTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 MaxTime=60
EOF
"$base/on" ctl slurmctld < /dev/null > "$base/log/slurmctld.out" 2>&1
for ((i = 1; i <= count; i++)); do
  mkdir "$base/spool/node$i"
  "$base/on" "node$i" slurmd -N "node$i" < /dev/null > "$base/log/slurmd-node$i.out" 2>&1
done
for ((i = 0; i < 100; i++)); do
  [[ $("$base/on" ctl sinfo -h -N -p main -t idle -o %N 2> /dev/null | wc -l) == "$count" ]] && break
  sleep 0.1
done
((i < 100))
trap - ERR
