#!/bin/bash
# A disk for the guest of make-guest.sh: make-guest-disk.sh OUT.raw [SIZE_MB]
# One ext4 volume labelled testdata on a GPT partition, with some files: text, random bytes, zeros, a hole, many small ones.
# No root, no loop device.
set -eu
out=$1 size=${2:-512}; rm -f "$out"; truncate -s "${size}M" "$out"
w=$(mktemp -d); trap 'rm -rf "$w"' EXIT
root=$w/root; mkdir -p "$root"/{docs,many}
seq 1 100000 > "$root/docs/text"; head -c 8M /dev/urandom > "$root/docs/random"; head -c 4M /dev/zero > "$root/docs/zeros"
truncate -s 32M "$root/docs/hole"
for i in $(seq 200); do echo "file $i" > "$root/many/$i"; done
printf 'label: gpt\nstart=2048,size=%d,type=L\n' $(((size - 2) * 2048)) | sfdisk -q "$out"
truncate -s $((size - 2))M "$w/volume"; mkfs.ext4 -q -F -L testdata -d "$root" "$w/volume"
dd if="$w/volume" of="$out" bs=1M seek=1 conv=notrunc,sparse status=none
