//! Swap partitions: what a guest moved out of its memory is of no use after a recovery, and changes all the time.
//!
//! A partition counts as swap if the partition table says so *and* it begins with the header that `mkswap` writes. The header is
//! kept, so that the guest takes the partition into use again. A guest that is hibernated has another header: then everything is
//! kept.
//!
//! Sources: UEFI 2.10 section 5 (GPT), the kernel's `include/linux/swap.h` (header) and `kernel/power/swap.c` (hibernation).

use std::sync::Arc;

use block_io::{BlockDevice, ByteRange, DeviceError, MaskedDevice};
use model::{BLOCK_BYTES, RangeSet};

use crate::{Changed, DiskDescription, FrozenDisk};

/// Type of a swap partition in an MBR.
const MBR_SWAP: u8 = 0x82;
/// The type in an MBR that says that there is a GPT.
const MBR_GPT: u8 = 0xee;
/// Type of a swap partition in a GPT, as it lies on the disk.
const GPT_SWAP: [u8; 16] =
    [0x6d, 0xfd, 0x57, 0x06, 0xab, 0xa4, 0xc4, 0x43, 0x84, 0xe5, 0x09, 0x33, 0xc8, 0x4b, 0x4f, 0x4f];
/// Most entries that a GPT is read for; 128 are usual.
const ENTRIES: u32 = 1024;
/// What `mkswap` writes at the end of the first page, and sizes of pages.
const SIGNATURE: &[u8; 10] = b"SWAPSPACE2";
const PAGES: [u64; 3] = [4096, 16 * 1024, 64 * 1024];

fn read<const N: usize>(device: &dyn BlockDevice, at: u64) -> Result<Option<[u8; N]>, DeviceError> {
    let mut bytes = [0; N];
    if at.checked_add(N as u64).is_none_or(|end| end > device.size()) {
        return Ok(None);
    }
    device.read_at(at, &mut bytes)?;
    Ok(Some(bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> u64 {
    let four = bytes.get(at..at + 4).and_then(|part| part.try_into().ok());
    four.map_or(0, |four| u64::from(u32::from_le_bytes(four)))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes.get(at..at + 8).and_then(|part| part.try_into().ok());
    eight.map_or(0, u64::from_le_bytes)
}

/// Partitions that the table calls swap, as first and last sector.
fn swap_partitions(device: &dyn BlockDevice) -> Result<Vec<(u64, u64)>, DeviceError> {
    let sector = u64::from(device.logical_sector_size());
    let Some(mbr) = read::<512>(device, 0)? else { return Ok(Vec::new()) };
    if mbr[510..] != [0x55, 0xaa] {
        return Ok(Vec::new());
    }
    let entries: Vec<&[u8]> = mbr[446..510].chunks_exact(16).collect();
    if !entries.iter().any(|entry| entry[4] == MBR_GPT) {
        let swap = entries.into_iter().filter(|entry| entry[4] == MBR_SWAP && u32_at(entry, 12) > 0);
        return Ok(swap.map(|entry| (u32_at(entry, 8), u32_at(entry, 8) + u32_at(entry, 12) - 1)).collect());
    }
    let Some(header) = read::<92>(device, sector)? else { return Ok(Vec::new()) };
    let (table, count, size) = (u64_at(&header, 72), u32_at(&header, 80) as u32, u32_at(&header, 84));
    if header.get(..8) != Some(b"EFI PART") || !(128..=4096).contains(&size) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for number in 0..u64::from(count.min(ENTRIES)) {
        let place = table.checked_mul(sector).and_then(|table| table.checked_add(number * size));
        let Some(entry) = place.map(|at| read::<48>(device, at)).transpose()?.flatten() else { break };
        if entry[..16] == GPT_SWAP {
            found.push((u64_at(&entry, 32), u64_at(&entry, 40)));
        }
    }
    Ok(found)
}

/// What of a disk is the inside of swap partitions, in whole blocks.
fn inside(device: &dyn BlockDevice) -> Result<RangeSet, DeviceError> {
    let sector = u64::from(device.logical_sector_size());
    let mut ranges = Vec::new();
    for (first, last) in swap_partitions(device)? {
        let bounds =
            first.checked_mul(sector).zip(last.checked_add(1).and_then(|end| end.checked_mul(sector)));
        let Some((start, end)) = bounds.filter(|(start, end)| start < end && *end <= device.size()) else {
            continue;
        };
        let mut is_swap = false;
        for page in PAGES {
            let at = start.saturating_add(page - SIGNATURE.len() as u64);
            is_swap |= at < end && read::<10>(device, at)?.as_ref() == Some(SIGNATURE);
        }
        // The longest header is kept, and what shares a block with somebody else.
        let kept = start.saturating_add(64 * 1024).div_ceil(BLOCK_BYTES) * BLOCK_BYTES;
        let range = ByteRange { start: kept, end: end / BLOCK_BYTES * BLOCK_BYTES };
        if is_swap && range.start < range.end {
            ranges.push(range);
        }
    }
    Ok(ranges.into_iter().collect())
}

/// Name of the property that says what of a disk was left out of its point: `START-END,..`, in bytes.
pub(super) const LEFT_OUT: &str = "swap-left-out";

fn written(ranges: &RangeSet) -> String {
    let ranges = ranges.iter().map(|range| format!("{}-{}", range.start, range.end));
    ranges.collect::<Vec<_>>().join(",")
}

/// Nothing if it cannot be understood.
fn read_back(text: &str) -> Option<RangeSet> {
    if text.is_empty() {
        return Some(RangeSet::new());
    }
    let ranges = text.split(',').map(|range| {
        let (start, end) = range.split_once('-')?;
        let (start, end) = (start.parse().ok()?, end.parse().ok()?);
        (start < end).then_some(ByteRange { start, end })
    });
    ranges.collect::<Option<Vec<_>>>().map(RangeSet::from_ranges)
}

/// Leaves out the inside of a disk's swap partitions, unless they are kept; gives how many bytes that are. A table that cannot be read
/// hides nothing.
///
/// What the point of `since` left out and this one does not, and the other way round, is in the list: its content there is
/// another one, whether the guest wrote to it or not.
pub(super) fn leave_out(disk: &mut FrozenDisk, since: Option<&DiskDescription>, keep: bool) -> u64 {
    let swap = if keep { RangeSet::new() } else { inside(&*disk.device).unwrap_or_default() };
    disk.description.properties.insert(LEFT_OUT.to_owned(), written(&swap));
    // A point of before there was such a thing left out nothing.
    let before = since.and_then(|since| since.properties.get(LEFT_OUT)).map_or("", String::as_str);
    if let Changed::Listed { ranges, .. } = &mut disk.changed {
        match read_back(before) {
            Some(before) => {
                let other = before.difference(&swap).union(&swap.difference(&before));
                *ranges = ranges.difference(&swap).union(&other);
            }
            None => {
                disk.changed = Changed::Unknown {
                    because: "what the newest point left out of swap cannot be understood".to_owned(),
                };
            }
        }
    }
    if swap.is_empty() {
        return 0;
    }
    let bytes = swap.bytes();
    disk.device = Arc::new(MaskedDevice::new(disk.device.clone(), swap));
    bytes
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use block_io::MemoryDevice;

    const MIB: usize = 1 << 20;

    /// A disk with a swap partition of 4 MiB at 1 MiB, and data behind it.
    fn disk(gpt: bool, signature: &[u8; 10]) -> Vec<u8> {
        let mut bytes = vec![0x77; 8 * MIB];
        bytes[446..512].fill(0);
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        if gpt {
            bytes[450] = MBR_GPT;
            bytes[512..520].copy_from_slice(b"EFI PART");
            bytes[512 + 72..512 + 80].copy_from_slice(&2u64.to_le_bytes());
            bytes[512 + 80..512 + 84].copy_from_slice(&4u32.to_le_bytes());
            bytes[512 + 84..512 + 88].copy_from_slice(&128u32.to_le_bytes());
            bytes[1024..1024 + 512].fill(0);
            bytes[1152..1168].copy_from_slice(&GPT_SWAP);
            bytes[1152 + 32..1152 + 40].copy_from_slice(&2048u64.to_le_bytes());
            bytes[1152 + 40..1152 + 48].copy_from_slice(&(2048u64 + 8191).to_le_bytes());
        } else {
            bytes[450] = MBR_SWAP;
            bytes[454..458].copy_from_slice(&2048u32.to_le_bytes());
            bytes[458..462].copy_from_slice(&8192u32.to_le_bytes());
        }
        bytes[MIB + 4086..MIB + 4096].copy_from_slice(signature);
        bytes
    }

    #[test]
    fn the_inside_of_swap_is_left_out_and_its_header_kept() {
        for gpt in [false, true] {
            let found = inside(&MemoryDevice::new(disk(gpt, SIGNATURE))).unwrap();
            let expected = ByteRange { start: (MIB + 65536) as u64, end: 5 * MIB as u64 };
            assert_eq!(found, [expected].into_iter().collect());
        }
    }

    #[test]
    fn a_hibernated_guest_and_a_table_that_lies_hide_nothing() {
        for gpt in [false, true] {
            for other in [b"S1SUSPEND\0", b"LINHIB0001", b"SWAPSPACE1"] {
                assert!(inside(&MemoryDevice::new(disk(gpt, other))).unwrap().is_empty());
            }
            let mut cut = disk(gpt, SIGNATURE);
            cut.truncate(4 * MIB);
            assert!(inside(&MemoryDevice::new(cut)).unwrap().is_empty(), "it ends behind the disk");
        }
        for size in [0, 511, 512, 600, 4096] {
            let mut bytes = disk(true, SIGNATURE);
            bytes.truncate(size);
            assert!(inside(&MemoryDevice::new(bytes)).unwrap().is_empty());
        }
        let mut odd = disk(true, SIGNATURE);
        odd[512 + 72..512 + 80].fill(0xff);
        odd[512 + 80..512 + 84].fill(0xff);
        assert!(inside(&MemoryDevice::new(odd)).unwrap().is_empty());
        let mut odd = disk(true, SIGNATURE);
        odd[1152 + 32..1152 + 48].fill(0xff);
        assert!(inside(&MemoryDevice::new(odd)).unwrap().is_empty());
    }

    #[test]
    fn a_view_and_its_list_go_without_it() {
        let description = crate::DiskDescription {
            key: String::new(),
            file_name: String::new(),
            format: "raw".to_owned(),
            size: 8 * MIB as u64,
            sector: 512,
            chain: 1,
            tracked: true,
            properties: std::collections::BTreeMap::new(),
        };
        let all = ByteRange { start: 0, end: 8 * MIB as u64 };
        let mut frozen = FrozenDisk {
            description,
            device: Arc::new(MemoryDevice::new(disk(true, SIGNATURE))),
            changed: Changed::Listed { ranges: [all].into_iter().collect(), because: "all".to_owned() },
        };
        let left = leave_out(&mut frozen, None, false);
        assert_eq!(left, (4 * MIB - 65536) as u64);
        // The replica has it, so it is listed once to become zeros there.
        let listed = |frozen: &FrozenDisk| match &frozen.changed {
            Changed::Listed { ranges, .. } => ranges.bytes(),
            Changed::Unknown { because } => panic!("{because}"),
        };
        assert_eq!(listed(&frozen), 8 * MIB as u64);
        let again = |since: &crate::DiskDescription, keep| {
            let changed = Changed::Listed { ranges: RangeSet::new(), because: "nothing".to_owned() };
            let device = Arc::new(MemoryDevice::new(disk(true, SIGNATURE)));
            let mut next = FrozenDisk { description: since.clone(), device, changed };
            leave_out(&mut next, Some(since), keep);
            next
        };
        let next = again(&frozen.description, false);
        assert_eq!(listed(&next), 0, "left out then and now");
        // Kept from now on: it is another content than that of the point, though nobody wrote to it.
        let kept = again(&next.description, true);
        assert_eq!(listed(&kept), left);
        let mut odd = next.description;
        odd.properties.insert(LEFT_OUT.to_owned(), "9-3".to_owned());
        assert!(matches!(again(&odd, false).changed, Changed::Unknown { .. }));
        let mut seen = vec![1; 8 * MIB];
        frozen.device.read_at(0, &mut seen).unwrap();
        assert!(seen[MIB + 65536..5 * MIB].iter().all(|byte| *byte == 0));
        assert!(seen[5 * MIB..].iter().all(|byte| *byte == 0x77));
        assert_eq!(&seen[MIB + 4086..MIB + 4096], SIGNATURE);
    }
}
