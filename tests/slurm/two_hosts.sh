#!/usr/bin/env bash
# A real Slurm with two emulated hosts, n1 and n2, from Debian's packages and without systemd:
#
#   two_hosts.sh PACKAGES PROJECT SHARED       as root; says "ready" when both hosts are idle, and lasts until it is killed
#
# PACKAGES: a folder for the downloaded packages (3.5 MB). PROJECT and SHARED: folders that controller and hosts have at the
# same paths. Each host has its own network, processes, /tmp and /dev/shm; all other files are the machine's, and changes to
# them lie in memory and are gone at the end. GPUs are made up (character devices), so that CUDA_VISIBLE_DEVICES is set.
set -euo pipefail
packages=$(readlink -f "$1") project=$(readlink -f "$2") shared=$(readlink -f "$3")
export packages project shared
if ! ls "$packages"/slurmctld_*.deb >/dev/null 2>&1; then
  apt-get update -qq
  (cd "$packages" && apt-get download -qq slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libmunge2 \
    libhwloc15 liblua5.1-0 2>/dev/null)
fi
exec unshare --mount --pid --net --uts --ipc --fork --mount-proc --kill-child --propagation private bash -c '
set -eu
hostname ctl; ip link set lo up; ip link add br0 type bridge; ip addr add 10.77.0.1/24 dev br0; ip link set br0 up
mkdir -p /mnt/two_hosts; mount -t tmpfs -o size=4g t /mnt/two_hosts; cd /mnt/two_hosts; mkdir upper work root kept_project kept_shared
R=/mnt/two_hosts/root
mount --bind "$project" kept_project; mount --bind "$shared" kept_shared
mount -t overlay o -o lowerdir=/,upperdir=upper,workdir=work $R
mkdir $R/packages $R/kept_project $R/kept_shared; cp "$packages"/*.deb $R/packages/
mount --bind kept_project $R/kept_project; mount --bind kept_shared $R/kept_shared
mount -t proc p $R/proc; mount --bind /dev $R/dev; mount --bind /sys $R/sys; mount -t tmpfs t $R/run
printf "#!/bin/sh\nexit 101\n" > $R/usr/sbin/policy-rc.d; chmod +x $R/usr/sbin/policy-rc.d # no service starts by itself
printf "127.0.0.1 localhost\n10.77.0.1 ctl\n10.77.0.2 n1\n10.77.0.3 n2\n" > $R/etc/hosts
cat > $R/own_memory.sh <<"O"
mount -t tmpfs t /dev/shm; mount -t tmpfs t /tmp; chmod 1777 /tmp
mkdir -p "$project" "$shared"; mount --bind /kept_project "$project"; mount --bind /kept_shared "$shared"
O
cat > $R/host.sh <<"N"
hostname n$1; mount -t proc p /proc; . /own_memory.sh
ip link set lo up; until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
ip addr add 10.77.0.$(($1 + 1))/24 dev eth0; ip link set eth0 up
exec slurmd -N n$1 -D
N
cat > $R/controller.sh <<"C"
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
. /own_memory.sh
dpkg -i --force-depends /packages/*.deb > /run/dpkg.log 2>&1 || tail -5 /run/dpkg.log
mkdir -p /run/munge /var/lib/munge /var/log/munge /etc/munge /etc/slurm /var/spool/slurmctld /var/spool/slurmd/n1 /var/spool/slurmd/n2 /var/log/slurm /opt/gpu
[ -f /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 2>/dev/null
chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge; chmod 400 /etc/munge/munge.key; chmod 755 /run/munge
runuser -u munge -- munged; sleep 0.5
cat > /etc/slurm/slurm.conf <<"S"
ClusterName=test
SlurmctldHost=ctl
SlurmUser=root
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation=/var/spool/slurmctld
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdSpoolDir=/var/spool/slurmd/%n
SlurmdPidFile=/run/slurmd-%n.pid
SlurmdLogFile=/var/log/slurm/slurmd-%n.log
NodeName=n[1-2] CPUs=4 RealMemory=8000 Gres=gpu:4
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=90 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
S
for i in 0 1 2 3; do mknod /opt/gpu/nvidia$i c 1 3; done; echo "NodeName=n[1-2] Name=gpu File=/opt/gpu/nvidia[0-3]" > /etc/slurm/gres.conf
echo CgroupPlugin=cgroup/v1 > /etc/slurm/cgroup.conf # slurmd loads the plugin even where it is not used
slurmctld
for i in 1 2; do
  unshare -n -p -u -m --fork --kill-child bash /host.sh $i > /var/log/slurm/host$i.out 2>&1 & p=$!
  sleep 0.7; c=$(pgrep -P $p | head -1); ip link add p$i type veth peer name eth0 netns ${c:-$p}; ip link set p$i master br0 up
done
for i in $(seq 60); do [ "$(sinfo -h -N -t idle -o %N | sort -u | wc -l)" -ge 2 ] && echo ready && exec sleep infinity; sleep 0.5; done
echo "the hosts did not come up"; sinfo; tail -20 /var/log/slurm/*
C
exec chroot $R /bin/bash /controller.sh'
