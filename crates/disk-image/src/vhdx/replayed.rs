//! The image file as it is once its log has been replayed (2.3.3), without a write to it.
//!
//! Not `block_io::OverlayDevice`: a replay can make the file longer, and one zero descriptor of 32 bytes can name
//! terabytes, which here cost one entry of a map.

use std::collections::BTreeMap;

use block_io::{BlockDevice, ByteRange, DeviceError};

enum Content {
    Zeros,
    Bytes(Box<[u8]>),
}

/// A file seen through the writes of its log.
pub(crate) struct Replayed<D> {
    below: D,
    size: u64,
    /// By first byte, not overlapping: last byte + 1 and content. Bytes always have the length of their range.
    extents: BTreeMap<u64, (u64, Content)>,
}

impl<D: BlockDevice> Replayed<D> {
    /// Nothing is replayed yet.
    pub(crate) fn new(below: D) -> Replayed<D> {
        Replayed { size: below.size(), below, extents: BTreeMap::new() }
    }

    /// The file below.
    pub(crate) fn into_below(self) -> D {
        self.below
    }

    /// Makes the file at least this long.
    pub(crate) fn extend(&mut self, size: u64) {
        self.size = self.size.max(size);
    }

    /// Puts `bytes` at `offset`.
    pub(crate) fn put(&mut self, offset: u64, bytes: Box<[u8]>) {
        self.clear(offset, offset + bytes.len() as u64);
        self.extents.insert(offset, (offset + bytes.len() as u64, Content::Bytes(bytes)));
    }

    /// Puts zeros.
    pub(crate) fn zero(&mut self, range: ByteRange) {
        self.clear(range.start, range.end);
        self.extents.insert(range.start, (range.end, Content::Zeros));
    }

    /// All writes in the order of the file; `None` stands for zeros.
    pub(crate) fn extents(&self) -> impl Iterator<Item = (ByteRange, Option<&[u8]>)> {
        self.extents.iter().map(|(&start, (end, content))| {
            let bytes = match content {
                Content::Zeros => None,
                Content::Bytes(bytes) => Some(&bytes[..]),
            };
            (ByteRange { start, end: *end }, bytes)
        })
    }

    /// Cuts `start..end` out of what is there.
    fn clear(&mut self, start: u64, end: u64) {
        let touched: Vec<u64> = self
            .extents
            .range(..end)
            .rev()
            .take_while(|(_, (extent_end, _))| *extent_end > start)
            .map(|(&at, _)| at)
            .collect();
        for at in touched {
            let Some((extent_end, content)) = self.extents.remove(&at) else { continue };
            let part = |from: u64, to: u64| match &content {
                Content::Zeros => Content::Zeros,
                Content::Bytes(bytes) => {
                    Content::Bytes(bytes[(from - at) as usize..(to - at) as usize].into())
                }
            };
            if at < start {
                self.extents.insert(at, (start, part(at, start)));
            }
            if extent_end > end {
                self.extents.insert(end, (extent_end, part(end, extent_end)));
            }
        }
    }
}

impl<D: BlockDevice> BlockDevice for Replayed<D> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size)?;
        let end = offset + buf.len() as u64;
        let there = self.below.size().clamp(offset, end) - offset;
        let (inside, beyond) = buf.split_at_mut(there as usize);
        if !inside.is_empty() {
            self.below.read_at(offset, inside)?;
        }
        beyond.fill(0);
        let first = self.extents.range(..=offset).next_back().map_or(offset, |(&at, _)| at);
        for (&at, (extent_end, content)) in self.extents.range(first..end) {
            let (from, to) = (at.max(offset), (*extent_end).min(end));
            if from >= to {
                continue;
            }
            let target = &mut buf[(from - offset) as usize..(to - offset) as usize];
            match content {
                Content::Zeros => target.fill(0),
                Content::Bytes(bytes) => {
                    target.copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize])
                }
            }
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        if from >= self.size {
            return Ok(None);
        }
        let below = self.below.next_allocated(from)?;
        let first = self.extents.range(..=from).next_back().map_or(from, |(&at, _)| at);
        let replayed = self
            .extents
            .range(first..)
            .find(|(_, (end, content))| *end > from && matches!(content, Content::Bytes(_)))
            .map(|(&at, (end, _))| ByteRange { start: at.max(from), end: *end });
        Ok(match (below, replayed) {
            (Some(below), Some(replayed)) if replayed.start < below.start => Some(replayed),
            (None, replayed) => replayed,
            (below, _) => below,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use block_io::{MemoryDevice, conformance};

    use super::*;

    #[test]
    fn later_writes_win_and_the_file_grows() {
        let mut model = vec![9u8; 64 << 10];
        let mut replayed = Replayed::new(MemoryDevice::new(model.clone()));
        replayed.extend(128 << 10);
        model.resize(128 << 10, 0);
        let mut state = 1u64;
        for turn in 0..300u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(turn | 1);
            let start = (state >> 40) % 31 * 4096;
            let end = (start + 4096 * (1 + (state >> 20) % 4)).min(128 << 10);
            if state >> 63 == 0 {
                replayed.zero(ByteRange { start, end });
                model[start as usize..end as usize].fill(0);
            } else {
                let bytes = vec![turn as u8; (end - start) as usize];
                model[start as usize..end as usize].copy_from_slice(&bytes);
                replayed.put(start, bytes.into());
            }
            if turn % 20 == 0 {
                conformance::examine(&replayed, &model);
            }
        }
        conformance::examine(&replayed, &model);
    }
}
