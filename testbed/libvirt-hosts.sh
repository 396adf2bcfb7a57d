#!/bin/bash
# Private libvirt "hosts" on one machine, without systemd: each has its own mount, network and
# host-name namespace, its own /etc/libvirt, /run/libvirt, /var/lib/libvirt, and a link 10.77.0.N.
#   libvirt-hosts.sh start DIR a b ...        start hosts (default: a b)
#   libvirt-hosts.sh exec DIR a virsh ...     run a command on host a (qemu:///system)
#   libvirt-hosts.sh enter DIR a              the words that run a command on host a, one a line
#   libvirt-hosts.sh uri DIR a                its libvirt URI, for a client outside
#   libvirt-hosts.sh kill DIR a               kill -9 of its libvirtd
#   libvirt-hosts.sh restart DIR a            start its libvirtd again
#   libvirt-hosts.sh stop DIR                 end everything it started
# Every host sees DIR/HOST/images as /srv/local and DIR/shared as /srv/shared.
set -eu
cmd=$1 dir=$(mkdir -p "$2" && cd "$2" && pwd); shift 2
ns() { echo "tb$(echo "$dir" | cksum | cut -c1-5)$1"; }
enter() { echo nsenter -t "$(cat "$dir/$1/ns.pid")" -m -n -u; }
answers() { for _ in $(seq 100); do "$0" exec "$dir" "$1" virsh -q list >/dev/null 2>&1 && return; sleep 0.2; done
  cat "$dir/$1/out" >&2; return 1; }
case $cmd in
start)
  [ $# -gt 0 ] || set -- a b
  mkdir -p "$dir/shared" /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /srv/local /srv/shared
  getent group libvirt-qemu >/dev/null || groupadd -r libvirt-qemu   # libvirtd will not start without
  id libvirt-qemu >/dev/null 2>&1 || useradd -r -M -g libvirt-qemu -s /usr/sbin/nologin libvirt-qemu
  br=$(ns br); ip link add "$br" type bridge; ip link set "$br" up; n=0
  for h in "$@"; do n=$((n + 1)); r=$dir/$h; s=$(ns "$h")
    mkdir -p "$r"/{etc,run,lib,log,cache,images}
    printf 'unix_sock_dir = "/run/libvirt"\nauth_unix_ro = "none"\nauth_unix_rw = "none"\nunix_sock_rw_perms = "0700"\nlog_outputs = "3:file:/var/log/libvirt/libvirtd.log"\nhost_uuid = "%s"\n' "$(cat /proc/sys/kernel/random/uuid)" > "$r/etc/libvirtd.conf"
    printf 'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nstdio_handler = "file"\nnamespaces = []\ncgroup_controllers = []\nremember_owner = 0\nmigration_host = "10.77.0.%s"\n' "$n" > "$r/etc/qemu.conf"
    ip netns add "$s"; ip link add "${s}0" type veth peer name eth0 netns "$s"; ip link set "${s}0" master "$br" up
    ip -n "$s" addr add "10.77.0.$n/24" dev eth0; ip -n "$s" link set eth0 up; ip -n "$s" link set lo up
    # A process that does nothing holds the namespaces, so that libvirtd may die.
    ip netns exec "$s" unshare -m -u bash -c "
      set -e; hostname host-$h
      mount --bind '$r/etc' /etc/libvirt; mount --bind '$r/run' /run/libvirt; mount --bind '$r/lib' /var/lib/libvirt
      mount --bind '$r/log' /var/log/libvirt; mount --bind '$r/cache' /var/cache/libvirt
      mount --bind '$r/images' /srv/local; mount --bind '$dir/shared' /srv/shared
      libvirtd -f /etc/libvirt/libvirtd.conf -p '$r/libvirtd.pid' &
      exec sleep infinity" > "$r/out" 2>&1 < /dev/null & echo $! > "$r/ns.pid"
  done
  for h in "$@"; do answers "$h"; done;;
exec) h=$1; shift; exec $(enter "$h") --wd="$PWD" "$@";;
enter) enter "$1" | tr ' ' '\n';;
uri) echo "qemu+unix:///system?socket=$dir/$1/run/libvirt-sock";;
kill) kill -9 "$(cat "$dir/$1/libvirtd.pid")";;
restart) r=$dir/$1; rm -f "$r/libvirtd.pid"
  $(enter "$1") bash -c "exec libvirtd -f /etc/libvirt/libvirtd.conf -p '$r/libvirtd.pid'" >> "$r/out" 2>&1 < /dev/null &
  answers "$1";;
stop)
  for f in "$dir"/*/ns.pid; do [ -e "$f" ] || continue; h=$(basename "$(dirname "$f")"); p=$(cat "$f"); s=$(ns "$h")
    for q in $(ip netns pids "$s" 2>/dev/null); do [ "$q" = "$p" ] || kill "$q" 2>/dev/null || true; done
    sleep 1; kill "$p" 2>/dev/null || true
    for _ in $(seq 50); do [ -z "$(ip netns pids "$s" 2>/dev/null)" ] && break; sleep 0.1; done
    for q in $(ip netns pids "$s" 2>/dev/null); do kill -9 "$q" 2>/dev/null || true; done
    ip netns del "$s" 2>/dev/null || true; rm -f "$f"; done
  ip link del "$(ns br)" 2>/dev/null || true;;
*) echo "see $0" >&2; exit 2;;
esac
