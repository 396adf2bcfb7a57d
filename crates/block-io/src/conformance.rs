//! The public examination that every [`BlockDevice`] must pass, ours or not.
//!
//! ```
//! block_io::conformance::all(|content| block_io::MemoryDevice::new(content.to_vec()));
//! ```

use crate::{BlockDevice, ByteRange, DeviceError, WritableDevice};

/// Contents that devices get wrong: empty, one sector, sparse, odd tail, dense.
pub fn contents() -> Vec<Vec<u8>> {
    let mut sparse = vec![0u8; 3 << 20];
    for (index, at) in [0usize, 65_536 - 512, 131_072, 1 << 20, (3 << 20) - 512].into_iter().enumerate() {
        sparse[at..at + 512].fill(index as u8 + 1);
    }
    let dense: Vec<u8> = (0..(1usize << 20) + 512)
        .map(|at| (at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()[5] | 1)
        .collect();
    vec![vec![0u8; 512], vec![7u8; 512], vec![0u8; 1 << 20], sparse, dense]
}

/// Runs every check on a device made by `build` for each of [`contents`]. `build` must give a device that holds
/// exactly the bytes it is given. Panics with what differs: it is made for tests.
pub fn all<D: BlockDevice>(build: impl Fn(&[u8]) -> D) {
    for content in contents() {
        let device = build(&content);
        examine(&device, &content);
    }
}

/// Every reading check on one device that should hold `content`.
pub fn examine(device: &dyn BlockDevice, content: &[u8]) {
    let size = content.len() as u64;
    assert_eq!(device.size(), size, "size");
    assert!(matches!(device.logical_sector_size(), 512 | 4096), "logical sector size");

    let mut all = vec![0xAAu8; content.len()];
    device.read_at(0, &mut all).expect("reading all");
    assert!(
        all == content,
        "content differs first at byte {:?}",
        all.iter().zip(content).position(|(a, b)| a != b)
    );

    for (offset, length) in [(0u64, 1usize), (1, 511), (511, 2), (size / 2, 512), (size - 1, 1), (size, 0)] {
        let length = length.min((size - offset) as usize);
        let mut part = vec![0xAAu8; length];
        device.read_at(offset, &mut part).expect("reading a part");
        assert_eq!(part, content[offset as usize..offset as usize + length], "bytes {offset}..+{length}");
    }

    for (offset, length) in [(size, 1usize), (size - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2)] {
        let mut part = vec![0u8; length];
        let error = device.read_at(offset, &mut part).expect_err("a read past the end must fail");
        assert!(matches!(error, DeviceError::OutOfBounds { .. }), "{error}");
    }

    let ranges: Vec<ByteRange> = crate::Allocated::new(device, ByteRange { start: 0, end: size })
        .map(|range| range.expect("allocated ranges"))
        .collect();
    let mut last = 0;
    for (index, range) in ranges.iter().enumerate() {
        assert!(range.start < range.end && range.end <= size, "range {range:?} of {size}");
        assert!(index == 0 || range.start > last, "ranges touch or go back at {range:?}");
        assert!(
            content[last as usize..range.start as usize].iter().all(|&byte| byte == 0),
            "data left out before {range:?}"
        );
        last = range.end;
    }
    assert!(content[last as usize..].iter().all(|&byte| byte == 0), "data left out after {last}");
    assert!(device.next_allocated(size).expect("at the end").is_none(), "nothing is allocated at the end");
}

/// Every writing check on a device of `size` bytes that `build` gives, all zeros.
pub fn writes<D: WritableDevice>(size: u64, build: impl Fn() -> D) {
    let device = build();
    let mut expected = vec![0u8; size as usize];
    let sector = u64::from(device.logical_sector_size());
    for (turn, (offset, length)) in [
        (0, sector),
        (sector, 3 * sector),
        (size / 2 / sector * sector, 65_536),
        (size - sector, sector),
        (0, size / 3 / sector * sector),
    ]
    .into_iter()
    .enumerate()
    {
        let length = length.min(size - offset);
        let bytes: Vec<u8> = (0..length).map(|at| (at as u8).wrapping_add(turn as u8) | 1).collect();
        device.write_at(offset, &bytes).expect("writing");
        expected[offset as usize..(offset + length) as usize].copy_from_slice(&bytes);
        examine(&device, &expected);
    }
    let hole = ByteRange { start: size / 4 / sector * sector, end: size / 2 / sector * sector };
    device.write_zeros(hole).expect("writing zeros");
    expected[hole.start as usize..hole.end as usize].fill(0);
    examine(&device, &expected);
    assert!(
        matches!(device.write_at(size, &[1]), Err(DeviceError::OutOfBounds { .. })),
        "a write past the end must fail"
    );
    device.flush().expect("flush");
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use crate::*;

    #[test]
    fn memory_device() {
        conformance::all(|content| MemoryDevice::new(content.to_vec()));
        conformance::writes(1 << 20, || MemoryDevice::zeroed(1 << 20));
    }

    #[test]
    fn file_device() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let next = AtomicU64::new(0);
        let name = || folder.path().join(next.fetch_add(1, Ordering::Relaxed).to_string());
        conformance::all(|content| {
            let path = name();
            std::fs::write(&path, content).expect("writing the file");
            FileDevice::open(&path).expect("opening the file")
        });
        conformance::writes(1 << 20, || FileDevice::create(&name(), 1 << 20).expect("creating the file"));
    }

    #[test]
    fn overlay_device_leaves_what_is_below() {
        conformance::all(|content| OverlayDevice::new(MemoryDevice::new(content.to_vec())));
        conformance::all(|content| {
            let overlay = OverlayDevice::new(MemoryDevice::zeroed(content.len()));
            overlay.write_at(0, content).expect("writing");
            overlay
        });
        let below = Arc::new(MemoryDevice::zeroed(1 << 20));
        conformance::writes(1 << 20, || OverlayDevice::new(below.clone()));
        assert_eq!(below.to_vec(), vec![0; 1 << 20]);
    }

    #[test]
    fn slice_device() {
        conformance::all(|content| {
            let mut around = vec![0xEE; 1536];
            around.extend_from_slice(content);
            around.extend_from_slice(&[0xEE; 512]);
            let end = 1536 + content.len() as u64;
            SliceDevice::new(MemoryDevice::new(around), ByteRange { start: 1536, end }).expect("slicing")
        });
        assert!(SliceDevice::new(MemoryDevice::zeroed(512), ByteRange { start: 0, end: 513 }).is_err());
    }

    struct Counter(AtomicU64);
    impl Pace for Counter {
        fn wait(&self, bytes: u64) {
            self.0.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    #[test]
    fn throttled_device_waits_for_every_byte() {
        let pace = Arc::new(Counter(AtomicU64::new(0)));
        conformance::all(|content| ThrottledDevice::new(MemoryDevice::new(content.to_vec()), pace.clone()));
        let before = pace.0.load(Ordering::Relaxed);
        let device = ThrottledDevice::new(MemoryDevice::zeroed(4096), pace.clone());
        device.read_at(0, &mut [0; 1024]).expect("reading");
        device.write_at(0, &[0; 100]).expect("writing");
        assert_eq!(pace.0.load(Ordering::Relaxed) - before, 1124);
    }

    #[test]
    fn faulty_device_fails_only_where_told() {
        conformance::all(|content| FaultyDevice::new(MemoryDevice::new(content.to_vec())));
        let device = FaultyDevice::new(MemoryDevice::zeroed(8192));
        device.add(ByteRange { start: 4096, end: 4608 }, Fault::ReadFails);
        device.add(ByteRange { start: 0, end: 1 }, Fault::BitsFlip);
        device.add(ByteRange { start: 512, end: 1024 }, Fault::WriteFails);
        assert!(device.read_at(4000, &mut [0; 200]).is_err());
        assert!(device.write_at(0, &[1; 1024]).is_err());
        let mut two = [0; 2];
        device.read_at(0, &mut two).expect("reading");
        assert_eq!(two, [1, 0]);
    }
}
