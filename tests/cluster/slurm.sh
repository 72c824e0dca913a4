#!/usr/bin/env bash
# A real SLURM on this machine: slurmctld and some slurmd on the loopback address, each a node n1, n2, … with all cores.
#   slurm.sh up FOLDER [NODES=2]    start it; prints the file that SLURM_CONF has to name
#   slurm.sh down FOLDER            stop what `up` has started
# Run as root on Debian or Ubuntu; packages that are missing are installed. Nothing outside FOLDER is left behind but the nodes' names
# in /etc/hosts and, where there was none, munge's key.
set -euo pipefail
task=$1 folder=$(realpath -m "$2") nodes=${3:-2}

down() {
  for file in "$folder"/run/*.pid; do
    [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null
  done
  for _ in $(seq 100); do  # daemons remove their files when they have ended
    ls "$folder"/run/*.pid >/dev/null 2>&1 || break
    sleep 0.1
  done
  if [ -e "$folder/run/own-munge" ]; then kill "$(cat /run/munge/munged.pid)"; fi
  return 0
}

if [ "$task" = down ]; then down; exit 0; fi

if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
fi
mkdir -p "$folder"/{state,log,run,spool}
host=$(hostname -s)
getent hosts "$host" >/dev/null || echo "127.0.0.1 $host" >>/etc/hosts
for i in $(seq "$nodes"); do
  getent hosts "n$i" >/dev/null || echo "127.0.0.1 n$i" >>/etc/hosts
  mkdir -p "$folder/spool/n$i"
done

if ! munge -n >/dev/null 2>&1; then
  install -d -o munge -g munge -m 0700 /etc/munge /var/lib/munge /var/log/munge
  install -d -o munge -g munge -m 0755 /run/munge
  if [ ! -s /etc/munge/munge.key ]; then
    head -c 1024 /dev/urandom >/etc/munge/munge.key
    chown munge: /etc/munge/munge.key
    chmod 400 /etc/munge/munge.key
  fi
  runuser -u munge -- /usr/sbin/munged
  touch "$folder/run/own-munge"
fi
for _ in $(seq 50); do munge -n 2>/dev/null | unmunge >/dev/null 2>&1 && break; sleep 0.1; done

cores=$(nproc) memory=$(($(awk '/MemTotal/{print $2}' /proc/meminfo) / 1024 - 512))
port=$((20000 + RANDOM % 5000))
cat >"$folder/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,batch_sched_delay=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SwitchType=switch/none
ReturnToService=2
MailProg=/bin/true
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
SlurmdSpoolDir=$folder/spool/%n
SlurmdParameters=config_overrides
CONF
names=""
for i in $(seq "$nodes"); do
  echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$cores RealMemory=$memory State=UNKNOWN" >>"$folder/slurm.conf"
  names="$names,n$i"
done
echo "PartitionName=debug Nodes=${names#,} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4" >>"$folder/slurm.conf"

export SLURM_CONF=$folder/slurm.conf
/usr/sbin/slurmctld -c -f "$SLURM_CONF"
for i in $(seq "$nodes"); do /usr/sbin/slurmd -N "n$i" -f "$SLURM_CONF"; done
for _ in $(seq 150); do
  [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null | head -1)" = "$nodes" ] && break
  sleep 0.2
done
if [ "$(sinfo --noheader --states=idle --format=%D | head -1)" != "$nodes" ]; then
  sinfo >&2
  tail -n 20 "$folder"/log/*.log >&2
  down
  exit 1
fi
echo "$SLURM_CONF"
