#!/usr/bin/env bash
# Two-node Slurm cluster on one machine, for tests. Requires Linux, root and Debian's packages
# slurmctld slurmd slurm-client munge. Writes to FOLDER only and does not affect a real cluster.
#
#   tests/slurm/cluster.sh start FOLDER     then use it with SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/cluster.sh stop FOLDER
#
# Each node is a slurmd with its own host name and address, so that code that works on a single
# machine only fails here as well. Each node has two fake GPUs, which Slurm allocates.
set -euo pipefail

(($# == 2)) || { echo "usage: cluster.sh start|stop FOLDER" >&2 && exit 2; }
mkdir -p "$2"
home=$(cd "$2" && pwd)
tag=$(printf '%s' "$home" | cksum | cut -d ' ' -f 1)
bridge=sl$((tag % 100000000))
network=10.$((tag % 200 + 20)).$((tag / 256 % 250))
key=$home/munge
longest=$((107 - 40)) # a socket path has at most 107 characters, with /node1/spool/node1_JOB.STEP
if ((${#home} > longest)); then
    echo "FOLDER must have at most $longest characters because it contains sockets, got $home" >&2
    exit 2
fi
export SLURM_CONF=$home/slurm.conf

settings() {
    cat <<END
ClusterName=test
SlurmctldHost=$(hostname)($network.1)
SlurmctldPort=$((20000 + tag % 5000))
SlurmUser=root
AuthInfo=socket=$key/socket,cred_expire=10
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/%n/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/%n/slurmd.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=1,sched_min_interval=100000,bf_interval=1
MinJobAge=3600
KillWait=10
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
NodeName=node1 NodeAddr=$network.11 CPUs=4 RealMemory=4000 Gres=gpu:h100:2
NodeName=node2 NodeAddr=$network.12 CPUs=4 RealMemory=4000 Gres=gpu:h100:2
PartitionName=test Nodes=node1,node2 Default=YES OverSubscribe=NO MaxTime=60
END
}

# Create the cluster's own key and start the munge daemon with it.
start_munge() {
    mkdir -p "$key"
    chmod 700 "$key"
    head -c 128 /dev/urandom >"$key/key"
    chmod 600 "$key/key"
    munged --force --socket "$key/socket" --key-file "$key/key" --pid-file "$home/munged.pid" \
        --log-file "$home/munged.log" --seed-file "$key/seed"
}

# Start a node with its own host name, address and /etc/hosts; the file system is shared.
start_node() {
    local number=$1 process
    mkdir -p "$home/node$number/spool"
    # shellcheck disable=SC2016
    unshare --net --uts --mount bash -c '
        mount --bind "$1" /etc/hosts
        hostname "node$2"
        for _ in $(seq 100); do ip link show eth0 >/dev/null 2>&1 && break || sleep 0.05; done
        ip link set lo up
        ip addr add "$3.1$2/24" dev eth0
        ip link set eth0 up
        exec slurmd -D -N "node$2"
    ' node "$home/hosts" "$number" "$network" >"$home/node$number/out" 2>&1 &
    process=$!
    echo "$process" >"$home/node$number.pid"
    for _ in $(seq 100); do # wait until it has its own network namespace
        [[ $(readlink "/proc/$process/ns/net") == "$(readlink /proc/self/ns/net)" ]] || break
        sleep 0.05
    done
    ip link add "$bridge.$number" type veth peer name eth0 netns "$process"
    ip link set "$bridge.$number" master "$bridge" up
}

start() {
    local number
    mkdir -p "$home/state"
    settings >"$SLURM_CONF"
    touch "$home/gpu0" "$home/gpu1"
    printf 'NodeName=node[1-2] Name=gpu Type=h100 File=%s/gpu[0-1]\n' "$home" >"$home/gres.conf"
    for number in 0 1; do
        rm "$home/gpu$number" && mknod "$home/gpu$number" c 1 3
    done
    printf '127.0.0.1 localhost\n%s.1 %s\n%s.11 node1\n%s.12 node2\n' \
        "$network" "$(hostname)" "$network" "$network" >"$home/hosts"
    ip link add "$bridge" type bridge
    ip addr add "$network.1/24" dev "$bridge"
    ip link set "$bridge" up
    start_munge
    slurmctld
    start_node 1
    start_node 2
    for _ in $(seq 200); do
        if [[ $(sinfo -h -t idle -o %D 2>/dev/null) == 2 ]]; then
            return
        fi
        sleep 0.1
    done
    echo "the nodes did not become idle:" >&2
    tail -n 5 "$home"/*.log "$home"/node?/{out,slurmd.log} >&2 || true
    stop
    return 1
}

stop() {
    local file process
    scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 100); do # running jobs would outlive the daemons
        [[ $(squeue -h 2>/dev/null) ]] || break
        sleep 0.2
    done
    for file in "$home"/node?.pid "$home"/{slurmctld,munged}.pid; do
        process=$(cat "$file" 2>/dev/null) || continue
        kill "$process" 2>/dev/null || continue
        for _ in $(seq 100); do # wait until the daemons have saved their state
            [[ $(readlink "/proc/$process/exe") ]] || break
            sleep 0.1
        done
    done
    ip link del "$bridge" 2>/dev/null || true
}

"$1"
