//! Recover from end to end: equality, difference, damage, faults of the link, hostile servers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block_io::{BlockDevice, DeviceError, MemoryDevice, WritableDevice};
use crossbeam_channel::unbounded;
use model::{BLOCK_BYTES, ByteRange, RangeSet};

use super::*;
use crate::message::{FromTarget, Run, ToTarget};

const SIZE: usize = 3 * (1 << 20) + 70_000;

struct Outcome {
    target: Result<TargetReport, TargetError>,
    delivered: Result<DeliveryReport, DeliveryError>,
    messages: u64,
}

/// A point whose blocks are hashed when they are read.
struct Point<'a>(&'a dyn BlockDevice);

impl BlockDevice for Point<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.0.read_at(offset, buf)
    }
    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.0.next_allocated(from)
    }
}

impl PointDisk for Point<'_> {
    fn read_hashed(&self, first: u64, buf: &mut [u8]) -> Result<Vec<BlockHash>, DeviceError> {
        let offset = first * BLOCK_BYTES;
        let length = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        self.read_at(offset, &mut buf[..length])?;
        buf[length..].fill(0);
        Ok(buf.chunks_exact(BLOCK).map(hash_block).collect())
    }
}

fn recover(
    point: &dyn BlockDevice,
    target: &dyn WritableDevice,
    fresh: bool,
    settings: DeliverySettings,
    road: Road,
    chaos: &Arc<Chaos>,
) -> Outcome {
    let (links_in, links) = unbounded::<Arc<dyn Link<ToTarget, FromTarget>>>();
    let point = Point(point);
    let mut delivery = Delivery::new(&point, settings, &Silent, Steer::new());
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let mut result = None;
            for link in links {
                match delivery.serve(link) {
                    Ok(Delivered::Finished(report)) => result = Some(Ok(report)),
                    Ok(Delivered::Cut) => {}
                    Err(error) => {
                        result.get_or_insert(Err(error));
                    }
                }
            }
            result.expect("an end")
        });
        let target = {
            let mut dial = Dial(move || {
                let (near, far) = ends(road, chaos);
                links_in.send(far).map_err(|_| LinkError::Cut("server gone".to_owned()))?;
                Ok(near)
            });
            Target::new(target, TargetSettings { fresh }, Steer::new()).run(&mut dial)
        };
        let delivered = server.join().unwrap();
        Outcome { target, delivered, messages: chaos.messages.load(Ordering::SeqCst) }
    })
}

fn calm() -> Arc<Chaos> {
    Chaos::new(|_| Act::Pass)
}

#[test]
fn a_recovered_disk_is_equal_fresh_or_not_packed_or_not() {
    for (seed, size) in [(1, SIZE), (2, 1), (3, BLOCK), (4, 2 << 20), (5, BLOCK + 1)] {
        for fresh in [true, false] {
            for compress in [None, Some(1)] {
                let bytes = disk_bytes(seed, size);
                let point = MemoryDevice::new(bytes.clone());
                let old = if fresh { vec![0; size] } else { disk_bytes(seed + 50, size) };
                let target = MemoryDevice::new(old);
                let settings = DeliverySettings { compress, ..DeliverySettings::default() };
                let outcome = recover(&point, &target, fresh, settings, Road::Bytes, &calm());
                let report = outcome.delivered.unwrap();
                assert!(outcome.target.unwrap().verified && report.verified);
                assert!(target.to_vec() == bytes, "seed {seed}, fresh {fresh}");
                assert!(report.lost.is_empty());
            }
        }
    }
}

#[test]
fn a_recovery_by_difference_moves_the_difference() {
    let bytes = disk_bytes(6, SIZE);
    let mut old = bytes.clone();
    old[0..10].fill(1);
    old[20 * BLOCK..22 * BLOCK].fill(0x77);
    let differing =
        [0, 20, 21].map(|block| block * BLOCK).map(|at| bytes[at..at + BLOCK].iter().any(|&b| b != 0));
    let expected = differing.iter().filter(|&&data| data).count() as u64;
    let target = MemoryDevice::new(old);
    let point = MemoryDevice::new(bytes.clone());
    let outcome = recover(&point, &target, false, DeliverySettings::default(), Road::Values, &calm());
    assert_eq!(outcome.delivered.unwrap().figures.bytes_transferred, expected * BLOCK_BYTES);
    assert!(target.to_vec() == bytes);
}

#[test]
fn a_larger_target_is_fine_and_a_smaller_one_is_refused() {
    let bytes = disk_bytes(6, SIZE);
    let point = MemoryDevice::new(bytes.clone());
    let larger = MemoryDevice::zeroed(SIZE + 300_000);
    recover(&point, &larger, true, DeliverySettings::default(), Road::Values, &calm()).target.unwrap();
    assert!(larger.to_vec()[..SIZE] == bytes && larger.to_vec()[SIZE..].iter().all(|&byte| byte == 0));
    let smaller = MemoryDevice::zeroed(SIZE - 1);
    let outcome = recover(&point, &smaller, true, DeliverySettings::default(), Road::Values, &calm());
    assert!(matches!(outcome.target, Err(TargetError::Refused(_))));
    assert!(matches!(outcome.delivered, Err(DeliveryError::TargetTooSmall { .. })));
}

fn under(plan: impl Fn(u64) -> Act + Send + Sync + 'static, fresh: bool, road: Road) -> u64 {
    let bytes = disk_bytes(12, SIZE);
    let point = MemoryDevice::new(bytes.clone());
    let target = MemoryDevice::new(if fresh { vec![0; SIZE] } else { disk_bytes(13, SIZE) });
    let settings = DeliverySettings { window_bytes: 1 << 20, ..DeliverySettings::default() };
    let chaos = Chaos::new(plan);
    let outcome = recover(&point, &target, fresh, settings, road, &chaos);
    outcome.target.unwrap();
    assert!(target.to_vec() == bytes);
    if let Ok(report) = outcome.delivered {
        assert!(report.figures.bytes_transferred_again <= 64 << 20);
    }
    outcome.messages
}

#[test]
fn a_cut_a_repeat_or_a_swap_at_any_message_gives_the_same_disk() {
    for fresh in [true, false] {
        let messages = under(|_| Act::Pass, fresh, Road::Values);
        for act in [Act::Cut, Act::CutAfter, Act::Twice, Act::Late] {
            for at in 0..messages {
                let road = if at % 4 == 0 { Road::Bytes } else { Road::Values };
                under(move |n| if n == at { act } else { Act::Pass }, fresh, road);
            }
        }
    }
}

#[test]
fn many_faults_in_one_recovery_give_the_same_disk() {
    for seed in 0..30 {
        let plan = move |n: u64| match Draw(seed * 1_000_003 + n).below(40) {
            0 => Act::Cut,
            1 => Act::CutAfter,
            2..=8 => Act::Twice,
            9 | 10 => Act::Late,
            _ => Act::Pass,
        };
        under(plan, seed % 2 == 0, Road::Values);
    }
}

/// A point with damaged ranges.
struct Damaged(MemoryDevice, Vec<ByteRange>);

impl BlockDevice for Damaged {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let asked = ByteRange { start: offset, end: offset + buf.len() as u64 };
        if let Some(hit) = self.1.iter().find_map(|range| range.intersect(&asked)) {
            return Err(DeviceError::Damaged {
                object: "point".to_owned(),
                offset: hit.start,
                length: hit.len(),
                reason: "test".to_owned(),
            });
        }
        self.0.read_at(offset, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        Ok((from < self.size()).then(|| ByteRange { start: from, end: self.size() }))
    }
}

#[test]
fn damage_fails_or_is_skipped_and_listed_exactly() {
    let mut bytes = disk_bytes(15, SIZE);
    bytes.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    let last = SIZE / BLOCK;
    let blocks = [3, 4, 17, last];
    let ranges: RangeSet = blocks
        .iter()
        .map(|&block| ByteRange {
            start: (block * BLOCK) as u64,
            end: ((block + 1) * BLOCK).min(SIZE) as u64,
        })
        .collect();
    // Only a few bytes of each are damaged; the block is what is stored and lost.
    let hurt = ranges.iter().flat_map(|range| {
        (range.start..range.end).step_by(BLOCK).map(|start| ByteRange { start: start + 7, end: start + 9 })
    });
    let point = Damaged(MemoryDevice::new(bytes.clone()), hurt.collect());
    for fresh in [true, false] {
        let target = MemoryDevice::new(vec![if fresh { 0 } else { 9 }; SIZE]);
        let outcome = recover(&point, &target, fresh, DeliverySettings::default(), Road::Values, &calm());
        let Err(DeliveryError::Device(DeviceError::Damaged { offset, length, .. })) = outcome.delivered
        else {
            panic!("{:?}", outcome.delivered);
        };
        assert_eq!((offset, length), (3 * BLOCK_BYTES, BLOCK_BYTES));
        assert!(matches!(outcome.target, Err(TargetError::Refused(_))));

        let settings = DeliverySettings { accept_damage: true, ..DeliverySettings::default() };
        let outcome = recover(&point, &target, fresh, settings, Road::Values, &calm());
        outcome.target.unwrap();
        assert_eq!(outcome.delivered.unwrap().lost, ranges);
        let mut expected = bytes.clone();
        for range in ranges.iter() {
            expected[range.start as usize..range.end as usize].fill(0);
        }
        assert!(target.to_vec() == expected, "fresh {fresh}");
    }
}

/// A target whose writes go wrong without an error.
struct Lying(MemoryDevice);

impl BlockDevice for Lying {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.0.read_at(offset, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.0.next_allocated(from)
    }
}

impl WritableDevice for Lying {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        let mut bytes = buf.to_vec();
        bytes[0] ^= u8::from(offset == 0);
        self.0.write_at(offset, &bytes)
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        self.0.write_zeros(range)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[test]
fn a_target_that_keeps_other_bytes_is_caught_by_reading_back() {
    let mut bytes = disk_bytes(16, SIZE);
    bytes[0] = 5;
    let point = MemoryDevice::new(bytes);
    let target = Lying(MemoryDevice::zeroed(SIZE));
    let outcome = recover(&point, &target, true, DeliverySettings::default(), Road::Values, &calm());
    assert!(matches!(outcome.target, Err(TargetError::NotVerified)));
    assert!(matches!(outcome.delivered, Err(DeliveryError::Agent(_))));
    let unproved = DeliverySettings { verify: false, ..DeliverySettings::default() };
    let outcome = recover(&point, &target, true, unproved, Road::Values, &calm());
    assert!(!outcome.target.unwrap().verified && !outcome.delivered.unwrap().verified);
}

#[test]
fn a_target_believes_no_server() {
    let block = || NumberedDisk::block(1, 1);
    let hash = hash_block(&block());
    let begin = |hashes_first| ToTarget::Begin { size: 4 * BLOCK_BYTES, from: 0, hashes_first };
    let frame = |after, first, bytes: Vec<u8>| ToTarget::Frame {
        after,
        first,
        hashes: vec![hash],
        payload: Payload::unproved(Codec::Plain, bytes.into(), 1),
    };
    let end = ToTarget::End { digest: [0; 32], verify: true, sync: true };
    let data = |first| ToTarget::Announce { runs: vec![Run::Data { first, hashes: vec![hash] }] };
    let zeros = |blocks| ToTarget::Announce { runs: vec![Run::Zeros { first: 0, blocks }] };
    let cases: Vec<(&str, bool, Vec<ToTarget>)> = vec![
        (
            "larger than the target",
            true,
            vec![ToTarget::Begin { size: 1 << 30, from: 0, hashes_first: false }],
        ),
        ("from nowhere", true, vec![ToTarget::Begin { size: 1, from: 1, hashes_first: false }]),
        ("no hashes over content", false, vec![begin(false)]),
        ("wrong bytes", true, vec![begin(false), frame(0, 0, vec![1; BLOCK])]),
        ("behind the end", true, vec![begin(false), frame(0, 4, block())]),
        ("far behind", true, vec![begin(false), frame(0, u64::MAX, block())]),
        ("unasked", false, vec![begin(true), frame(0, 0, block())]),
        ("another block", false, vec![begin(true), data(0), frame(0, 1, block())]),
        ("zeros behind the end", false, vec![begin(true), zeros(5)]),
        ("zeros without end", false, vec![begin(true), zeros(u64::MAX)]),
        ("nothing", false, vec![begin(true), ToTarget::Announce { runs: vec![] }]),
        ("hashes for a fresh one", true, vec![begin(false), data(0)]),
        ("another whole", true, vec![begin(false), frame(0, 0, block()), end]),
        ("closed too early", true, vec![begin(false), ToTarget::Closed]),
    ];
    for (name, fresh, messages) in cases {
        let device = MemoryDevice::zeroed(4 * BLOCK);
        let (near, far) = pair::<FromTarget, ToTarget>(100);
        for message in messages {
            far.send(ToTarget::decode(message.encode()).unwrap()).unwrap();
        }
        let mut near = Some(Box::new(near) as Box<dyn Link<_, _>>);
        let mut dial = Dial(move || near.take().ok_or(LinkError::Cut("once".to_owned())));
        let result = Target::new(&device, TargetSettings { fresh }, Steer::new()).run(&mut dial);
        let refused = matches!(result, Err(TargetError::ProtocolBroken(_) | TargetError::NotVerified));
        assert!(refused, "{name}: {result:?}");
        assert!(name == "another whole" || device.to_vec().iter().all(|&byte| byte == 0), "{name}");
    }
}
