#!/bin/bash
# Build the tiny test guest: make-guest.sh OUTDIR
#   vmlinuz    Debian cloud kernel (bzImage)
#   vmlinux    the same kernel unpacked (ELF, boots by PVH: saves the unpacking under TCG)
#   initrd     busybox + virtio/AHCI/IDE/ext4/vfat modules + qemu-ga, boots by itself from RAM
# The guest mounts the ext4 volume labelled testdata on /data, starts qemu-ga on virtio-serial
# (port org.qemu.guest_agent.0), checks what its load left there, and prints GUEST-READY on ttyS0. Kernel arguments:
#   data=DEVICE or LABEL=x  what to mount on /data    load=KiB  write and sync that much there several times a second
# The load checks itself: file load.N holds KiB of random bytes and load.N.sum their sum, written and synced in turn, and
# seq says which N is complete. After a boot GUEST-CHECK tells "ok SEQ" or what is wrong: every file up to seq must be whole,
# the one behind it may be missing or half written.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd); w=$(mktemp -d); trap 'rm -rf "$w"' EXIT
cd "$w"; chmod 755 .
k=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/{print $2; exit}')
apt-get -qq -o APT::Sandbox::User=root download "$k" qemu-guest-agent 
for d in *.deb; do dpkg-deb -x "$d" deb; done
v=$(ls deb/lib/modules); depmod -b deb "$v"
cp "deb/boot/vmlinuz-$v" "$out/vmlinuz"

# unpack the bzImage: find the lz4 (legacy) or xz or zstd payload
python3 - "$out/vmlinuz" "$out/vmlinux" <<'PY'
import sys, subprocess
d = open(sys.argv[1], 'rb').read()
for magic, cmd in ((b'\x02!L\x18', ['lz4', '-dcq']), (b'\x28\xb5\x2f\xfd', ['zstd', '-dcq']), (b'\xfd7zXZ\0', ['xz', '-dcq'])):
    i = d.find(magic)
    while i >= 0:
        p = subprocess.run(cmd, input=d[i:], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        if p[:4] == b'\x7fELF':
            open(sys.argv[2], 'wb').write(p); sys.exit(0)
        i = d.find(magic, i + 1)
sys.exit('no kernel payload found')
PY

r=root; mkdir -p $r/{bin,sbin,etc,proc,sys,dev,run,tmp,data,mnt,lib64,usr/lib,var/run,var/log,root,lib/modules}
cp /bin/busybox $r/bin/busybox
for a in $(/bin/busybox --list); do [ -e $r/bin/$a ] || ln -s busybox $r/bin/$a; done
ln -s ../bin/busybox $r/sbin/init; ln -s ../bin/busybox $r/sbin/modprobe
cp deb/usr/sbin/qemu-ga $r/bin/
libs() { ldd "$1" | awk '/=> \//{print $3} $1 ~ /^\/lib/{print $1}'; }
need=$(libs $r/bin/qemu-ga)
for l in $need; do mkdir -p "$r$(dirname "$l")"; cp -L "$l" "$r$l"; done
mods="virtio_pci virtio_blk virtio_scsi sd_mod virtio_console virtio_net ext4 vfat nls_utf8 nls_ascii nls_cp437 ahci ata_piix"
for m in $mods; do modprobe -d deb -S "$v" --show-depends "$m" 2>/dev/null || true; done |
  awk '$1=="insmod" && !s[$2]++{print $2}' > mods
mkdir -p $r/lib/modules/$v
while read -r f; do b=${f##*/}; cp "$f" "$r/lib/modules/$v/$b"; echo "$b"; done < mods > $r/lib/modules/order
echo "$v" > $r/lib/modules/version

cat > $r/init <<'INIT'
#!/bin/sh
export PATH=/bin:/sbin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /run
mkdir -p /dev/pts; mount -t devpts pts /dev/pts
ln -sf /run /var/run
arg() { sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" /proc/cmdline; }  # value of one kernel argument
v=$(cat /lib/modules/version)
for m in $(cat /lib/modules/order); do insmod /lib/modules/$v/$m 2>/dev/null; done
d=$(arg data); i=0
for c in ${d:-LABEL=testdata /dev/vda /dev/sda}; do
  case $c in *=*) c=$(findfs $c 2>/dev/null);; esac
  [ -b "$c" ] && mount -t ext4 $c /data 2>/dev/null && echo "GUEST-DATA $c" && break; done
hostname testguest; ip link set lo up 2>/dev/null
mkdir -p /dev/virtio-ports
for p in /sys/class/virtio-ports/*; do [ -e $p/name ] && ln -sf /dev/${p##*/} /dev/virtio-ports/$(cat $p/name); done
[ -e /dev/virtio-ports/org.qemu.guest_agent.0 ] && qemu-ga -d -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -f /run/qga.pid -t /run -l /var/log/qga.log
check() {
  [ -e /data/seq ] || { echo "GUEST-CHECK none"; return; }
  s=$(cat /data/seq); n=$((s > 40 ? s - 40 : 0))
  while [ $n -le $s ]; do
    f=/data/load.$((n % 64))
    [ "$(sha256sum < $f)" = "$(cat $f.sum)" ] || { echo "GUEST-CHECK wrong: $f of seq $s"; return; }
    n=$((n + 1))
  done
  echo "GUEST-CHECK ok $s"
}
check
l=$(arg load)
if [ -n "$l" ] && grep -q ' /data ' /proc/mounts; then
  ( n=0; [ -e /data/seq ] && n=$(($(cat /data/seq) + 1))
    while :; do
      f=/data/load.$((n % 64))
      rm -f $f.sum; dd if=/dev/urandom of=$f bs=1024 count=$l conv=fsync 2>/dev/null
      sha256sum < $f > $f.sum; sync
      echo $n > /data/seq.new; sync; mv /data/seq.new /data/seq; sync
      n=$((n + 1)); sleep 0.1
    done ) &
fi
echo "GUEST-READY $(cut -d' ' -f1 /proc/uptime)"
exec setsid sh -c 'exec sh </dev/ttyS0 >/dev/ttyS0 2>&1'
INIT
chmod +x $r/init
(cd $r && find . -print0 | cpio -0 -o -H newc --quiet) | lz4 -l -9 -q -c > "$out/initrd"
ls -l "$out"/{vmlinuz,vmlinux,initrd}
