//! A device of which some bytes are not to be seen.

use model::RangeSet;

use crate::{BlockDevice, ByteRange, DeviceError};

/// `below` with zeros in the place of some ranges, which are never read.
pub struct MaskedDevice<D> {
    below: D,
    masked: RangeSet,
}

impl<D: BlockDevice> MaskedDevice<D> {
    /// `below` without `masked`.
    pub fn new(below: D, masked: RangeSet) -> MaskedDevice<D> {
        MaskedDevice { below, masked }
    }

    /// The masked range that ends behind `offset` first.
    fn mask_at(&self, offset: u64) -> Option<ByteRange> {
        let ranges = self.masked.as_slice();
        ranges.get(ranges.partition_point(|range| range.end <= offset)).copied()
    }
}

impl<D: BlockDevice> BlockDevice for MaskedDevice<D> {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn logical_sector_size(&self) -> u32 {
        self.below.logical_sector_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size())?;
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let mask = self.mask_at(at).filter(|mask| mask.start < end);
            let (next, is_masked) = match mask {
                Some(mask) if mask.start <= at => (mask.end.min(end), true),
                Some(mask) => (mask.start, false),
                None => (end, false),
            };
            let part = &mut buf[(at - offset) as usize..(next - offset) as usize];
            match is_masked {
                true => part.fill(0),
                false => self.below.read_at(at, part)?,
            }
            at = next;
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        let mut from = from;
        loop {
            let Some(found) = self.below.next_allocated(from)? else { return Ok(None) };
            match self.mask_at(found.start) {
                Some(mask) if mask.start <= found.start => from = mask.end,
                Some(mask) => {
                    return Ok(Some(ByteRange { start: found.start, end: found.end.min(mask.start) }));
                }
                None => return Ok(Some(found)),
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{MemoryDevice, conformance};

    fn masks(size: u64) -> Vec<RangeSet> {
        let set = |ranges: &[(u64, u64)]| -> RangeSet {
            ranges
                .iter()
                .map(|&(start, end)| ByteRange { start, end: end.min(size) })
                .filter(|r| r.start < r.end)
                .collect()
        };
        vec![
            set(&[]),
            set(&[(0, 512)]),
            set(&[(512, 1024), (4096, 1 << 20)]),
            set(&[(0, u64::MAX)]),
            set(&[(100, 131_100)]),
        ]
    }

    #[test]
    fn it_is_the_device_below_with_zeros() {
        for content in conformance::contents() {
            for masked in masks(content.len() as u64) {
                let mut expected = content.clone();
                for range in masked.iter() {
                    expected[range.start as usize..range.end as usize].fill(0);
                }
                let device = MaskedDevice::new(MemoryDevice::new(content.clone()), masked);
                conformance::examine(&device, &expected);
            }
        }
    }
}
