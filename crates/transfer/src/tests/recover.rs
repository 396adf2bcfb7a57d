//! Recover from end to end: equality, difference, damage, faults of the link, hostile servers.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

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

/// A point that knows the hashes of its blocks, even of those that cannot be read.
struct Point {
    device: MemoryDevice,
    hashes: Vec<Option<BlockHash>>,
    damaged: Vec<ByteRange>,
    /// Blocks that were decoded, in any order.
    decoded: Mutex<Vec<u64>>,
}

impl Point {
    fn new(bytes: Vec<u8>) -> Point {
        Point::damaged(bytes, Vec::new())
    }

    fn damaged(bytes: Vec<u8>, damaged: Vec<ByteRange>) -> Point {
        let hash = |block: &[u8]| block.iter().any(|&byte| byte != 0).then(|| hash_block(block));
        let hashes = padded(&bytes).chunks(BLOCK).map(hash).collect();
        Point { device: MemoryDevice::new(bytes), hashes, damaged, decoded: Mutex::default() }
    }

    fn decoded(&self) -> Vec<u64> {
        let mut decoded = self.decoded.lock().unwrap().clone();
        decoded.sort_unstable();
        decoded
    }
}

impl BlockDevice for Point {
    fn size(&self) -> u64 {
        self.device.size()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let asked = ByteRange { start: offset, end: offset + buf.len() as u64 };
        if let Some(hit) = self.damaged.iter().find_map(|range| range.intersect(&asked)) {
            return Err(DeviceError::Damaged {
                object: "point".to_owned(),
                offset: hit.start,
                length: hit.len(),
                reason: "test".to_owned(),
            });
        }
        self.device.read_at(offset, buf)
    }
    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.device.next_allocated(from)
    }
}

impl PointDisk for Point {
    fn read_hashed(&self, first: u64, buf: &mut [u8]) -> Result<Vec<BlockHash>, DeviceError> {
        let offset = first * BLOCK_BYTES;
        let length = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        self.read_at(offset, &mut buf[..length])?;
        buf[length..].fill(0);
        self.decoded.lock().unwrap().extend((first..).take(buf.len() / BLOCK));
        Ok(buf.chunks_exact(BLOCK).map(hash_block).collect())
    }

    fn is_equal(&self, block: u64, hash: Option<&BlockHash>) -> Result<bool, DeviceError> {
        Ok(self.hashes[block as usize].as_ref() == hash)
    }
}

type Ends = (Box<dyn Link<FromTarget, ToTarget>>, Arc<dyn Link<ToTarget, FromTarget>>);

/// Recovers over the links that `connect` gives; with `renew` each is served by a server that knows nothing
/// of those before.
fn recover_over(
    point: &Point,
    target: &dyn WritableDevice,
    fresh: bool,
    settings: DeliverySettings,
    renew: bool,
    mut connect: impl FnMut() -> Option<Ends> + Send,
) -> (Result<TargetReport, TargetError>, Result<DeliveryReport, DeliveryError>) {
    let (links_in, links) = unbounded::<Arc<dyn Link<ToTarget, FromTarget>>>();
    let begin = || Delivery::new(point, settings.clone(), &Silent, Steer::new());
    std::thread::scope(|scope| {
        let server = scope.spawn(move || {
            let mut delivery = begin();
            let mut result = None;
            for link in links {
                match delivery.serve(link) {
                    Ok(Delivered::Finished(report)) => result = Some(Ok(report)),
                    Ok(Delivered::Cut) => {}
                    Err(error) => {
                        result.get_or_insert(Err(error));
                    }
                }
                if renew {
                    delivery = begin();
                }
            }
            result.unwrap_or(Err(DeliveryError::Cancelled))
        });
        let target = {
            let mut dial = Dial(move || {
                let gone = || LinkError::Cut("server gone".to_owned());
                let (near, far) = connect().ok_or_else(gone)?;
                links_in.send(far).map_err(|_| gone())?;
                Ok(near)
            });
            let mut target = Target::new(target, TargetSettings { fresh }, Steer::new());
            // One read each, so that small disks take several announcements.
            target.announced_blocks = 1;
            target.run(&mut dial)
        };
        (target, server.join().unwrap())
    })
}

fn recover(
    point: &Point,
    target: &dyn WritableDevice,
    fresh: bool,
    settings: DeliverySettings,
    road: Road,
    chaos: &Arc<Chaos>,
) -> Outcome {
    let connect = || Some(ends(road, chaos));
    let (target, delivered) = recover_over(point, target, fresh, settings, false, connect);
    Outcome { target, delivered, messages: chaos.messages.load(Ordering::SeqCst) }
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
                let point = Point::new(bytes.clone());
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

/// A target that says which blocks were read, and how often.
struct Watched {
    device: MemoryDevice,
    read: Mutex<Vec<u64>>,
    /// What the first block reads as once it was flushed, if it was written.
    spoiled: Option<u8>,
    written: Mutex<(bool, bool)>,
}

impl Watched {
    fn new(bytes: Vec<u8>, spoiled: Option<u8>) -> Watched {
        Watched {
            device: MemoryDevice::new(bytes),
            read: Mutex::default(),
            spoiled,
            written: Mutex::default(),
        }
    }

    fn read(&self) -> Vec<u64> {
        let mut read = self.read.lock().unwrap().clone();
        read.sort_unstable();
        read
    }
}

impl BlockDevice for Watched {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let first = offset / BLOCK_BYTES;
        self.read.lock().unwrap().extend((first..).take(buf.len().div_ceil(BLOCK)));
        self.device.read_at(offset, buf)?;
        if let (0, Some(spoiled), (true, true)) = (offset, self.spoiled, *self.written.lock().unwrap()) {
            buf[0] = spoiled;
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.device.next_allocated(from)
    }
}

impl WritableDevice for Watched {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        self.written.lock().unwrap().0 |= offset == 0;
        self.device.write_at(offset, buf)
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        self.device.write_zeros(range)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.written.lock().unwrap().1 = true;
        Ok(())
    }
}

/// A disk of these versions of blocks, 0 for zeros; the last block is only half on the disk.
fn versions(versions: &[u64]) -> Vec<u8> {
    let block = |(place, &version): (usize, &u64)| match version {
        0 => vec![0; BLOCK],
        version => NumberedDisk::block(place as u64, version),
    };
    let mut bytes: Vec<u8> = versions.iter().enumerate().flat_map(block).collect();
    bytes.truncate(bytes.len() - BLOCK / 2);
    bytes
}

/// Blocks where both hold the same, or zeros, or either, or something else, in runs short and long.
fn point_and_old(seed: u64, blocks: usize) -> (Vec<u64>, Vec<u64>) {
    let mut draw = Draw(seed);
    let (mut point, mut old) = (Vec::new(), Vec::new());
    while point.len() < blocks {
        let pair = [(0, 0), (1, 1), (0, 2), (1, 0), (1, 2)][draw.below(5) as usize];
        let most = [1, 3, 80][draw.below(3) as usize];
        for _ in 0..1 + draw.below(most) {
            point.push(pair.0);
            old.push(pair.1);
        }
    }
    point.truncate(blocks);
    old.truncate(blocks);
    (point, old)
}

#[test]
fn a_recovery_by_difference_reads_and_moves_the_difference() {
    for seed in 0..24 {
        let blocks = [1, 17, 200, 333][seed as usize % 4];
        let (wanted, old) = point_and_old(seed, blocks);
        let size = |block: usize| if block + 1 == blocks { BLOCK / 2 } else { BLOCK } as u64;
        let sum = |which: &dyn Fn(u64, u64) -> bool| -> Vec<u64> {
            (0..blocks).filter(|&at| which(wanted[at], old[at])).map(|at| at as u64).collect()
        };
        let bytes_of = |of: &[u64]| of.iter().map(|&block| size(block as usize)).sum::<u64>();
        let differing = sum(&|point, old| point != 0 && point != old);
        let zeroed = sum(&|point, old| point == 0 && old != 0);
        let held = sum(&|_, old| old != 0);

        let bytes = versions(&wanted);
        let mut before = versions(&old);
        // A larger target's other bytes are its own.
        before.resize(before.len() + [0, 100, BLOCK][seed as usize % 3], 0x55);
        let rest = before[bytes.len()..].to_vec();
        let (point, target) = (Point::new(bytes.clone()), Watched::new(before, None));
        let road = [Road::Bytes, Road::Values][seed as usize % 2];
        let outcome = recover(&point, &target, false, DeliverySettings::default(), road, &calm());
        let (report, delivered) = (outcome.target.unwrap(), outcome.delivered.unwrap());
        assert!(target.device.to_vec() == [bytes, rest].concat(), "seed {seed}");
        assert!(report.verified && delivered.verified && delivered.lost.is_empty());
        assert_eq!(point.decoded(), differing, "seed {seed}");
        let figures = delivered.figures;
        assert_eq!(figures.bytes_read, differing.len() as u64 * BLOCK_BYTES);
        assert_eq!(figures.bytes_transferred, figures.bytes_read);
        assert_eq!(figures.bytes_announced, blocks as u64 * BLOCK_BYTES);
        assert_eq!(
            (report.bytes_written, report.bytes_zeroed, report.bytes_compared),
            (bytes_of(&differing), bytes_of(&zeroed), bytes_of(&held)),
            "seed {seed}"
        );
        // Once to compare, and once more what was written, where it is no hole now.
        let mut read = [held, differing].concat();
        read.sort_unstable();
        let tail = blocks as u64 - 1;
        let but_tail =
            |blocks: Vec<u64>| blocks.into_iter().filter(|&block| block != tail).collect::<Vec<_>>();
        assert_eq!(but_tail(target.read()), but_tail(read), "seed {seed}");
    }
}

#[test]
fn a_target_that_has_everything_costs_the_point_nothing() {
    let bytes = disk_bytes(6, SIZE);
    // Nothing of the point can be read, and nothing has to be.
    let all = ByteRange { start: 0, end: SIZE as u64 };
    let point = Point::damaged(bytes.clone(), vec![all]);
    let target = MemoryDevice::new(bytes.clone());
    let outcome = recover(&point, &target, false, DeliverySettings::default(), Road::Values, &calm());
    let (report, delivered) = (outcome.target.unwrap(), outcome.delivered.unwrap());
    assert_eq!((report.bytes_written, report.bytes_zeroed, delivered.figures.bytes_on_wire), (0, 0, 0));
    assert!(report.verified && delivered.lost.is_empty() && target.to_vec() == bytes);
}

#[test]
fn long_holes_on_both_sides_are_passed_over() {
    /// A disk of 64 TiB with little in it, which counts the questions.
    struct Vast(NumberedDisk, AtomicU64);
    impl BlockDevice for Vast {
        fn size(&self) -> u64 {
            self.0.size
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
            self.0.read_at(offset, buf)
        }
        fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.next_allocated(from)
        }
    }
    impl PointDisk for Vast {
        fn read_hashed(&self, first: u64, buf: &mut [u8]) -> Result<Vec<BlockHash>, DeviceError> {
            self.read_at(first * BLOCK_BYTES, buf)?;
            Ok(buf.chunks_exact(BLOCK).map(hash_block).collect())
        }
        fn is_equal(&self, block: u64, hash: Option<&BlockHash>) -> Result<bool, DeviceError> {
            self.1.fetch_add(1, Ordering::Relaxed);
            let held =
                self.0.blocks.get(&block).map(|&version| hash_block(&NumberedDisk::block(block, version)));
            Ok(held.as_ref() == hash)
        }
    }
    impl WritableDevice for Vast {
        fn write_at(&self, offset: u64, _buf: &[u8]) -> Result<(), DeviceError> {
            panic!("a write at {offset}");
        }
        fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
            panic!("zeros at {}", range.start);
        }
        fn flush(&self) -> Result<(), DeviceError> {
            Ok(())
        }
    }
    let vast = || {
        let blocks = [5, 6, 1 << 20, 1 << 29].map(|block| (block, 1)).into_iter().collect();
        Vast(NumberedDisk { size: 64 << 40, blocks, bytes_read: AtomicU64::new(0) }, AtomicU64::new(0))
    };
    let (point, target) = (vast(), vast());
    let (near, far) = pair::<FromTarget, ToTarget>(8);
    let mut near = Some(Box::new(near) as Box<dyn Link<_, _>>);
    let mut dial = Dial(move || near.take().ok_or(LinkError::Cut("once".to_owned())));
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            Target::new(&target, TargetSettings { fresh: false }, Steer::new()).run(&mut dial).unwrap()
        });
        let mut delivery = Delivery::new(&point, DeliverySettings::default(), &Silent, Steer::new());
        delivery.serve(Arc::new(far)).unwrap()
    });
    let Delivered::Finished(report) = report else { panic!("{report:?}") };
    assert!(report.verified);
    assert_eq!(report.figures.bytes_read + point.0.bytes_read.load(Ordering::Relaxed), 0);
    assert_eq!(target.0.bytes_read.load(Ordering::Relaxed), 4 * BLOCK_BYTES);
    let asked = point.1.load(Ordering::Relaxed);
    assert!(asked < 1000, "{asked} questions");
}

/// Both ends have much to say, neither link nor window holds any of it.
#[test]
fn narrow_links_and_windows_do_not_stop_it() {
    let blocks = 20 * 16;
    let wanted: Vec<u64> = (0..blocks).map(|at| [1, 2, 0][at % 3]).collect();
    for old in [vec![1; blocks], vec![9; blocks], vec![0; blocks]] {
        for window_bytes in [1, 5 * BLOCK_BYTES, 32 << 20] {
            let (point, target) = (Point::new(versions(&wanted)), MemoryDevice::new(versions(&old)));
            let settings = DeliverySettings { window_bytes, ..DeliverySettings::default() };
            let connect = || {
                let (near, far) = pair::<FromTarget, ToTarget>(1);
                Some((Box::new(near) as Box<dyn Link<_, _>>, Arc::new(far) as Arc<dyn Link<_, _>>))
            };
            let (report, delivered) = recover_over(&point, &target, false, settings, false, connect);
            assert!(report.unwrap().verified && delivered.unwrap().verified);
            assert!(target.to_vec() == versions(&wanted));
        }
    }
}

#[test]
fn a_larger_target_is_fine_and_a_smaller_one_is_refused() {
    let bytes = disk_bytes(6, SIZE);
    let point = Point::new(bytes.clone());
    let larger = MemoryDevice::zeroed(SIZE + 300_000);
    recover(&point, &larger, true, DeliverySettings::default(), Road::Values, &calm()).target.unwrap();
    assert!(larger.to_vec()[..SIZE] == bytes && larger.to_vec()[SIZE..].iter().all(|&byte| byte == 0));
    let larger = MemoryDevice::new(vec![7; SIZE + 300_000]);
    recover(&point, &larger, false, DeliverySettings::default(), Road::Values, &calm()).target.unwrap();
    assert!(larger.to_vec()[..SIZE] == bytes && larger.to_vec()[SIZE..].iter().all(|&byte| byte == 7));
    let smaller = MemoryDevice::zeroed(SIZE - 1);
    let outcome = recover(&point, &smaller, true, DeliverySettings::default(), Road::Values, &calm());
    assert!(matches!(outcome.target, Err(TargetError::Refused(_))));
    assert!(matches!(outcome.delivered, Err(DeliveryError::TargetTooSmall { .. })));
}

fn under(plan: impl Fn(u64) -> Act + Send + Sync + 'static, fresh: bool, road: Road) -> u64 {
    let bytes = disk_bytes(12, SIZE);
    let point = Point::new(bytes.clone());
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

/// The agent's process ends somewhere, and another goes on with what it finds.
#[test]
fn a_recovery_goes_on_in_another_process_with_what_is_missing() {
    let wanted: Vec<u64> = (0..100).map(|at| [1, 0, 2][at % 3]).collect();
    let bytes = versions(&wanted);
    for fresh in [true, false] {
        for cut in (0..40).step_by(3) {
            let point = Point::new(bytes.clone());
            let target = MemoryDevice::new(if fresh { vec![0; bytes.len()] } else { versions(&[9; 100]) });
            let settings = DeliverySettings { window_bytes: 1, ..DeliverySettings::default() };
            let chaos = Chaos::new(move |n| if n == cut { Act::Cut } else { Act::Pass });
            let mut first = true;
            let connect = || std::mem::take(&mut first).then(|| ends(Road::Values, &chaos));
            let (failed, _) = recover_over(&point, &target, fresh, settings.clone(), false, connect);
            let Err(TargetError::Link(_)) = failed else { continue };
            let missing = |(block, (found, wanted)): (usize, (&[u8], &[u8]))| {
                (found != wanted && wanted.iter().any(|&byte| byte != 0)).then_some(block as u64)
            };
            let pairs = target.to_vec();
            let pairs = pairs.chunks(BLOCK).zip(bytes.chunks(BLOCK));
            let missing: Vec<u64> = pairs.enumerate().filter_map(missing).collect();
            let point = Point::new(bytes.clone());
            let outcome = recover(&point, &target, false, settings, Road::Values, &calm());
            assert!(outcome.target.unwrap().verified && target.to_vec() == bytes);
            assert_eq!(point.decoded(), missing, "fresh {fresh}, cut {cut}");
        }
    }
}

/// The server's process ends anywhere, the agent's does not.
#[test]
fn a_server_that_begins_again_gives_the_same_disk() {
    let wanted: Vec<u64> = (0..60).map(|at| [1, 0, 2][at % 3]).collect();
    let bytes = versions(&wanted);
    for fresh in [true, false] {
        for cut in (0..80).step_by(3) {
            let point = Point::new(bytes.clone());
            let old = if fresh { vec![0; bytes.len()] } else { versions(&[1; 60]) };
            // The first block reads otherwise once it is on the disk: what was written is never believed
            // before.
            for spoiled in [None, Some(0x66)] {
                let target = Watched::new([vec![!old[0]], old[1..].to_vec()].concat(), spoiled);
                if fresh {
                    target.device.write_at(0, &[0]).unwrap();
                }
                let settings = DeliverySettings { window_bytes: 1, ..DeliverySettings::default() };
                let chaos = Chaos::new(move |n| if n == cut { Act::Cut } else { Act::Pass });
                let connect = || Some(ends(Road::Values, &chaos));
                let (report, _) = recover_over(&point, &target, fresh, settings, true, connect);
                if spoiled.is_some() {
                    assert!(matches!(report, Err(TargetError::NotVerified)), "cut {cut}: {report:?}");
                    continue;
                }
                assert!(report.unwrap().verified);
                assert!(target.device.to_vec() == bytes, "fresh {fresh}, cut {cut}");
            }
        }
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
    let point = Point::damaged(bytes.clone(), hurt.collect());
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
    // What the target has is not lost, whatever became of it in the pool.
    let mut old = bytes.clone();
    old[4 * BLOCK] ^= 1;
    old[9 * BLOCK] ^= 1;
    let target = MemoryDevice::new(old);
    let settings = DeliverySettings { accept_damage: true, ..DeliverySettings::default() };
    let outcome = recover(&point, &target, false, settings, Road::Values, &calm());
    assert!(outcome.target.unwrap().verified);
    let lost = ByteRange { start: 4 * BLOCK_BYTES, end: 5 * BLOCK_BYTES };
    assert_eq!(outcome.delivered.unwrap().lost, RangeSet::from_ranges(vec![lost]));
    let mut expected = bytes;
    expected[4 * BLOCK..5 * BLOCK].fill(0);
    assert!(target.to_vec() == expected);
}

/// A target whose writes go wrong without an error, and which cannot be read in places.
struct Lying(MemoryDevice, Option<u64>);

impl BlockDevice for Lying {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        if self.1.is_some_and(|from| offset + buf.len() as u64 > from) {
            return Err(DeviceError::ReadOnly { object: "test".to_owned() });
        }
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
    let point = Point::new(bytes);
    let target = Lying(MemoryDevice::zeroed(SIZE), None);
    let outcome = recover(&point, &target, true, DeliverySettings::default(), Road::Values, &calm());
    assert!(matches!(outcome.target, Err(TargetError::NotVerified)));
    assert!(matches!(outcome.delivered, Err(DeliveryError::Agent(_))));
    let unproved = DeliverySettings { verify: false, ..DeliverySettings::default() };
    let outcome = recover(&point, &target, true, unproved, Road::Values, &calm());
    assert!(!outcome.target.unwrap().verified && !outcome.delivered.unwrap().verified);
    // The same where only that block was written.
    let outcome = recover(&point, &target, false, DeliverySettings::default(), Road::Values, &calm());
    assert!(matches!(outcome.target, Err(TargetError::NotVerified)));
}

#[test]
fn a_target_that_cannot_be_read_ends_the_recovery() {
    let point = Point::new(disk_bytes(17, SIZE));
    let target = Lying(MemoryDevice::new(disk_bytes(18, SIZE)), Some(20 * BLOCK_BYTES));
    let outcome = recover(&point, &target, false, DeliverySettings::default(), Road::Values, &calm());
    assert!(matches!(outcome.target, Err(TargetError::Device(_))), "{:?}", outcome.target);
    assert!(outcome.delivered.is_err());
}

#[test]
fn a_target_believes_no_server() {
    /// Says late what it holds.
    struct Slow(MemoryDevice);
    impl BlockDevice for Slow {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
            self.0.read_at(offset, buf)
        }
        fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
            std::thread::sleep(Duration::from_millis(200));
            self.0.next_allocated(from)
        }
    }
    impl WritableDevice for Slow {
        fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
            self.0.write_at(offset, buf)
        }
        fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
            self.0.write_zeros(range)
        }
        fn flush(&self) -> Result<(), DeviceError> {
            Ok(())
        }
    }
    let block = || NumberedDisk::block(1, 1);
    let hash = hash_block(&block());
    let begin = || ToTarget::Begin { size: 4 * BLOCK_BYTES, from: 0 };
    let frame = |after, first, bytes: Vec<u8>| ToTarget::Frame {
        after,
        first,
        hashes: vec![hash],
        payload: Payload::unproved(Codec::Plain, bytes.into(), 1),
    };
    let end = ToTarget::End { digest: [0; 32], verify: true, sync: true };
    let keep = |after, end| ToTarget::Keep { after, end };
    let zeros = |after, first, blocks| ToTarget::Zeros { after, first, blocks };
    let none = ToTarget::Frame {
        after: 0,
        first: 0,
        hashes: vec![],
        payload: Payload::unproved(Codec::Plain, block().into(), 1),
    };
    let cases: Vec<(&str, bool, Vec<ToTarget>)> = vec![
        ("larger than the target", true, vec![ToTarget::Begin { size: 1 << 30, from: 0 }]),
        ("from nowhere", true, vec![ToTarget::Begin { size: 1, from: 1 }]),
        ("wrong bytes", true, vec![begin(), frame(0, 0, vec![1; BLOCK])]),
        ("behind the end", true, vec![begin(), frame(0, 4, block())]),
        ("far behind", true, vec![begin(), frame(0, u64::MAX, block())]),
        ("no blocks", true, vec![begin(), none]),
        ("not announced", false, vec![begin(), frame(0, 0, block())]),
        ("kept and not announced", false, vec![begin(), keep(0, 1)]),
        ("zeros behind the end", true, vec![begin(), zeros(0, 0, 5)]),
        ("zeros without end", true, vec![begin(), zeros(0, 1, u64::MAX)]),
        ("keeps what is behind the end", true, vec![begin(), keep(0, 5)]),
        ("keeps nothing", true, vec![begin(), keep(0, 0)]),
        ("backwards", true, vec![begin(), keep(0, 3), zeros(3, 2, 2)]),
        ("another whole", true, vec![begin(), frame(0, 0, block()), keep(1, 4), end]),
        ("closed too early", true, vec![begin(), ToTarget::Closed]),
    ];
    for (name, fresh, messages) in cases {
        let device = Slow(MemoryDevice::zeroed(4 * BLOCK));
        let (near, far) = pair::<FromTarget, ToTarget>(100);
        for message in messages {
            far.send(ToTarget::decode(message.encode()).unwrap()).unwrap();
        }
        let mut near = Some(Box::new(near) as Box<dyn Link<_, _>>);
        let mut dial = Dial(move || near.take().ok_or(LinkError::Cut("once".to_owned())));
        let result = Target::new(&device, TargetSettings { fresh }, Steer::new()).run(&mut dial);
        let refused = matches!(result, Err(TargetError::ProtocolBroken(_) | TargetError::NotVerified));
        assert!(refused, "{name}: {result:?}");
        assert!(name == "another whole" || device.0.to_vec().iter().all(|&byte| byte == 0), "{name}");
    }
}

#[test]
fn a_server_believes_no_target() {
    let wanted: Vec<u64> = (0..200).map(|at| 1 + at % 2).collect();
    let hello = |next| FromTarget::Hello { size: 200 * BLOCK_BYTES, next, fresh: false };
    let data = |first, count: u64| Run::Data { first, hashes: vec![BlockHash([7; 32]); count as usize] };
    let zeros = |first, blocks| Run::Zeros { first, blocks };
    let tell = |runs| FromTarget::Announce { runs };
    let cases: Vec<(&str, Vec<FromTarget>)> = vec![
        ("has more than there is", vec![hello(201)]),
        ("nothing", vec![hello(0), tell(vec![])]),
        ("no blocks", vec![hello(0), tell(vec![zeros(0, 0), data(0, 1)])]),
        ("behind the end", vec![hello(0), tell(vec![zeros(0, 201)])]),
        ("without end", vec![hello(0), tell(vec![zeros(0, u64::MAX)])]),
        ("beyond all numbers", vec![hello(0), tell(vec![data(0, 1), zeros(1, u64::MAX)])]),
        ("with a gap", vec![hello(0), tell(vec![data(0, 1), data(2, 1)])]),
        ("twice in one", vec![hello(0), tell(vec![data(0, 2), data(1, 2)])]),
        ("the same and more", vec![hello(0), tell(vec![data(0, 2)]), tell(vec![data(1, 2)])]),
        ("written before it was sent", vec![hello(0), FromTarget::Written { next: 1 }]),
        ("done before the end", vec![hello(0), FromTarget::Done { digest: [0; 32] }]),
    ];
    let serve = |messages: Vec<FromTarget>, steer: Steer, answer: &dyn Fn(ToTarget) -> Option<FromTarget>| {
        let point = Point::new(versions(&wanted));
        let mut delivery = Delivery::new(&point, DeliverySettings::default(), &Silent, steer);
        let (near, far) = pair::<FromTarget, ToTarget>(1000);
        for message in messages {
            near.send(FromTarget::decode(message.encode()).unwrap()).unwrap();
        }
        std::thread::scope(|scope| {
            let server = scope.spawn(move || delivery.serve(Arc::new(far)));
            while let Ok(message) = near.receive() {
                if let Some(answer) = answer(message) {
                    near.send(answer).unwrap();
                }
            }
            server.join().unwrap()
        })
    };
    for (name, messages) in cases {
        let result = serve(messages, Steer::new(), &|_| None);
        assert!(matches!(result, Err(DeliveryError::ProtocolBroken(_))), "{name}: {result:?}");
    }
    // Out of order is a fault of the link.
    let result = serve(vec![hello(0), tell(vec![data(1, 1)])], Steer::new(), &|_| None);
    assert_eq!(result.unwrap(), Delivered::Cut);
    // Nobody holds more than its share of the server's memory.
    let paused = Steer::new();
    paused.pause();
    let flood = (0..200).map(|block| tell(vec![data(block, 1)]));
    let result = serve([hello(0)].into_iter().chain(flood).collect(), paused, &|_| None);
    assert!(matches!(result, Err(DeliveryError::ProtocolBroken(_))), "{result:?}");
    // Who claims to have what he has not is left with it, and cannot give the digest of the whole.
    let hashes = Point::new(versions(&wanted)).hashes.into_iter().flatten().collect();
    let claim = vec![hello(0), tell(vec![Run::Data { first: 0, hashes }])];
    let result = serve(claim, Steer::new(), &|message| match message {
        ToTarget::Frame { .. } | ToTarget::Zeros { .. } => panic!("{message:?}"),
        ToTarget::End { .. } => Some(FromTarget::Done { digest: [7; 32] }),
        _ => None,
    });
    assert!(matches!(result, Err(DeliveryError::NotVerified)), "{result:?}");
}
