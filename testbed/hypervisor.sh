#!/bin/bash
# Installs QEMU, libvirt and what builds a guest, on Debian as root. Looks first; costs nothing where all is there.
# Where qemu-utils came from the backports suite, the rest of QEMU must come from there too (an older qemu-system breaks it):
# the suite is added, beside the first Debian source, if it is not there.
set -eu
have() { command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ]; }
is() { dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null | grep -q ^ii; }
plain="libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients iproute2 busybox-static cpio kmod lz4 xz-utils zstd
  e2fsprogs fdisk python3"
missing=; for p in $plain; do is "$p" || missing="$missing $p"; done
[ -z "$missing" ] && have qemu-system-x86_64 && exit 0
sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
apt() { $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 "$@"; }
apt update
if ! have qemu-system-x86_64; then
  s=
  case $(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null || true) in *~bpo*)
    . /etc/os-release; s=/$VERSION_CODENAME-backports
    if [ "$(apt-cache madison qemu-system-x86 | grep -c "${s#/}")" = 0 ]; then
      f=/etc/apt/sources.list.d/backports
      if [ -f /etc/apt/sources.list.d/debian.sources ]; then
        awk 'BEGIN{RS=""} NR==1' /etc/apt/sources.list.d/debian.sources | sed "s/^Suites:.*/Suites: ${s#/}/" | $sudo tee $f.sources >/dev/null
      else
        awk -v s="${s#/}" '$1=="deb"{for(i=1;i<=NF;i++) if($i=="'"$VERSION_CODENAME"'") $i=s; print; exit}' /etc/apt/sources.list | $sudo tee $f.list >/dev/null
      fi
      apt update
    fi;;
  esac
  apt install --yes --no-install-recommends "qemu-utils" "qemu-system-x86$s" "qemu-system-common$s" "qemu-system-data$s" "seabios$s" >/dev/null
fi
# shellcheck disable=SC2086
apt install --yes --no-install-recommends $plain >/dev/null
