#!/usr/bin/env bash
# A throw-away SLURM on this host for the tests: two nodes, accounting, no systemd. Needs root and Debian's packages
#   apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server
#
#   cluster.sh check             can it run here? says what is missing
#   cluster.sh run COMMAND ...   starts it, runs the command with it, always stops it; the command's status
#   cluster.sh up FOLDER         starts it with everything it writes in FOLDER; then: export SLURM_CONF=FOLDER/slurm.conf
#   cluster.sh down FOLDER       stops it and removes FOLDER
set -euo pipefail
MARK="# octvideo's test cluster"
NODES=(octnode1 octnode2)

check() {
  local missing=()
  for program in slurmctld slurmd slurmdbd munged mariadbd mariadb-install-db; do
    command -v "$program" >/dev/null || missing+=("$program")
  done
  if ! grep -q '/sys/fs/cgroup' /proc/mounts; then
    echo "no test cluster: slurmd wants /sys/fs/cgroup to be mounted"
    return 1
  elif [ "$(id -u)" != 0 ]; then
    echo "no test cluster: it must be started by root (slurmd starts jobs as their users)"
    return 1
  elif [ "${#missing[@]}" != 0 ]; then
    echo "no test cluster: ${missing[*]} missing; apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server"
    return 1
  fi
}

until_true() { # seconds, command ...: wait for it
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || { echo "not so within the time: $*" >&2; return 1; }
    sleep 0.1
  done
}

free_ports() { # five in a row that nobody listens at
  local base
  for base in $(seq 26810 10 27800); do
    for port in $(seq "$base" $((base + 4))); do
      (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue 2
    done
    echo "$base" && return
  done
  echo "no free ports" >&2 && return 1
}

configure() { # folder, first port
  local folder=$1 port=$2 host node number=0
  host=$(hostname)
  cat > "$folder/slurm.conf" <<CONF
ClusterName=octvideo
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
ReturnToService=2
SlurmUser=root
SlurmdUser=root
# the nodes may have more processors than this host
SlurmdParameters=config_overrides
AuthType=auth/munge
CryptoType=crypto/munge
# cred_expire is also how long a requeued job waits before it may start again (120 s by default)
AuthInfo=socket=$folder/munge.sock,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$folder/munge.sock
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
# as on most clusters: a preempted job gets SIGCONT and SIGTERM, and GraceTime seconds
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
MinJobAge=600
CONF
  for node in "${NODES[@]}"; do
    number=$((number + 1))
    echo "NodeName=$node NodeAddr=127.0.0.1 NodeHostname=$host Port=$((port + 1 + number)) CPUs=4 RealMemory=2000"
  done >> "$folder/slurm.conf"
  local all
  all=$(IFS=,; echo "${NODES[*]}")
  cat >> "$folder/slurm.conf" <<CONF
PartitionName=low Nodes=$all Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=$all MaxTime=INFINITE State=UP PriorityTier=10
CONF
  echo "IgnoreSystemd=yes" > "$folder/cgroup.conf"
  cat > "$folder/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 4))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile=$folder/slurmdbd.log
PidFile=$folder/slurmdbd.pid
CONF
  chmod 600 "$folder/slurmdbd.conf"
}

database() { # folder, port
  local folder=$1 port=$2
  mkdir "$folder/db" && chown mysql "$folder/db"
  mariadb-install-db --user=mysql --datadir="$folder/db" --auth-root-authentication-method=normal --skip-test-db \
    > "$folder/install.log" 2>&1
  mariadbd --no-defaults --user=mysql --datadir="$folder/db" --socket="$folder/db/socket" --port="$port" \
    --bind-address=127.0.0.1 --pid-file="$folder/db/pid" --innodb-buffer-pool-size=64M \
    --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 > "$folder/mariadb.log" 2>&1 < /dev/null &
  until_true 60 mariadb -S "$folder/db/socket" -e 'select 1'
  mariadb -S "$folder/db/socket" -e "create database slurm_acct_db;
    create user slurm@'127.0.0.1' identified by 'slurm'; grant all on slurm_acct_db.* to slurm@'127.0.0.1';
    create user slurm@localhost identified by 'slurm'; grant all on slurm_acct_db.* to slurm@localhost"
}

idle() { [ "$(sinfo --noheader --partition low --states idle --format %D)" = "${#NODES[@]}" ]; }

up() {
  local folder=$1 port
  check
  mkdir -p "$folder/state" && chmod 755 "$folder" && port=$(free_ports)
  configure "$folder" "$port"
  export SLURM_CONF=$folder/slurm.conf
  forget_hosts
  echo "127.0.0.1 ${NODES[*]} $MARK" >> /etc/hosts # ranks reach rank 0 by the name of its node
  database "$folder" $((port + 4))
  (umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.sock" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
  slurmdbd
  until_true 60 sacctmgr --noheader show cluster
  sacctmgr --immediate add cluster octvideo > /dev/null
  slurmctld -i
  local node
  for node in "${NODES[@]}"; do
    slurmd -N "$node"
  done
  until_true 60 idle || { tail -n 20 "$folder"/*.log >&2; return 1; }
}

forget_hosts() { # in place: in containers the file itself is mounted
  local rest
  rest=$(grep -v "$MARK\$" /etc/hosts || true)
  [ "$rest" = "$(cat /etc/hosts)" ] || echo "$rest" > /etc/hosts
}

down() {
  local folder=$1 name pid
  export SLURM_CONF=$folder/slurm.conf
  if [ -s "$folder/slurmctld.pid" ]; then # jobs first, so that none outlives the cluster
    scancel --user root > /dev/null 2>&1 || true
    until_true 30 no_jobs || true
  fi
  for name in "${NODES[@]/#/slurmd.}" slurmctld slurmdbd munged db/pid; do
    pid=$(cat "$folder/${name%/pid}.pid" 2>/dev/null || cat "$folder/$name" 2>/dev/null || true)
    [ -z "$pid" ] && continue
    kill "$pid" 2>/dev/null || true
    until_true 20 not_running "$pid" || kill -9 "$pid" 2>/dev/null || true
  done
  forget_hosts
  rm -rf "$folder"
}

no_jobs() { [ -z "$(squeue --noheader)" ]; }
not_running() { ! kill -0 "$1" 2>/dev/null; }

run() {
  local status=0
  FOLDER=$(mktemp -d /tmp/octvideo-slurm.XXXXXX)
  trap 'down "$FOLDER"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  up "$FOLDER"
  OCTVIDEO_TEST_SLURM=$FOLDER "$@" || status=$?
  exit "$status"
}

case "${1:-}" in
  check) check ;;
  up) up "${2:?folder}" ;;
  down) down "${2:?folder}" ;;
  run) shift && run "$@" ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
