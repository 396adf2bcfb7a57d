//! Random work against a model, with reopening and with the power cut at any step.

use std::sync::Arc;

use block_io::{ByteRange, GrowableFile, MemoryFile, WritableDevice, conformance};
use disk_image::vhdx::{CreateKind, Reader, Writer};
use proptest::prelude::*;

use crate::support::*;

const SIZE: u64 = 5 * MIB + 1536;

#[derive(Debug, Clone)]
enum Act {
    Write { at: u64, length: u64, byte: u8 },
    Zero { at: u64, length: u64 },
    Flush,
    Reopen,
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let edge = prop_oneof![0..SIZE, (0..6u64).prop_map(|block| block * MIB), Just(MIB - 512)];
    let length = prop_oneof![1..5000u64, Just(512u64), Just(MIB), 1..3 * MIB];
    (edge, length).prop_map(|(at, length)| (at, length.min(SIZE - at)))
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        5 => (range(), any::<u8>()).prop_map(|((at, length), byte)| Act::Write { at, length, byte }),
        2 => range().prop_map(|(at, length)| Act::Zero { at, length }),
        1 => Just(Act::Flush),
        1 => Just(Act::Reopen),
    ];
    prop::collection::vec(act, 1..14)
}

#[derive(Debug, Clone, Copy)]
enum What {
    Fixed,
    Dynamic,
    Child,
}

fn what() -> impl Strategy<Value = What> {
    prop_oneof![Just(What::Fixed), Just(What::Dynamic), Just(What::Child)]
}

/// A parent with data at the ends of blocks, and its content.
fn base() -> (Folder, Vec<u8>) {
    let folder = Folder::default();
    let mut content = vec![0; SIZE as usize];
    content[1000..9000].fill(0xB1);
    content[MIB as usize - 700..3 * MIB as usize + 700].fill(0xB2);
    folder.add("base.vhdx", image(options(SIZE, CreateKind::Dynamic), &[(0, &content)]));
    (folder, content)
}

fn start(what: What, file: Arc<dyn GrowableFile>) -> (Writer, Folder, Vec<u8>) {
    let (folder, content) = base();
    let kind = match what {
        What::Child => {
            let parent = Arc::new(folder.reader("base.vhdx").unwrap());
            let writer = Writer::create_child(file, parent, child_options(10, "base.vhdx")).unwrap();
            return (writer, folder, content);
        }
        What::Fixed => CreateKind::Fixed,
        What::Dynamic => CreateKind::Dynamic,
    };
    (Writer::create(file, options(SIZE, kind)).unwrap(), folder, vec![0; SIZE as usize])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn random_work_equals_the_model(what in what(), acts in acts()) {
        let file = Arc::new(MemoryFile::default());
        let (mut writer, folder, mut model) = start(what, file.clone());
        for act in acts {
            match act {
                Act::Write { at, length, byte } => {
                    let bytes: Vec<u8> = (0..length).map(|n| byte.wrapping_add((n >> 9) as u8)).collect();
                    writer.write_at(at, &bytes).unwrap();
                    put(&mut model, at, &bytes);
                }
                Act::Zero { at, length } => {
                    writer.write_zeros(ByteRange { start: at, end: at + length }).unwrap();
                    put(&mut model, at, &vec![0; length as usize]);
                }
                Act::Flush => {
                    writer.flush().unwrap();
                    let reader = Reader::open(device(&file.to_vec()), &folder).unwrap();
                    prop_assert!(read_all(&reader) == model, "a reader sees what was flushed");
                }
                Act::Reopen => {
                    writer.flush().unwrap();
                    drop(writer);
                    writer = Writer::open(file.clone(), &folder).unwrap();
                }
            }
            prop_assert!(read_all(&writer) == model);
        }
        conformance::examine(&writer, &model);
        writer.flush().unwrap();
        conformance::examine(&Reader::open(device(&file.to_vec()), &folder).unwrap(), &model);
    }
}

/// The bytes that each sector may show after a crash: as of the last flush, and everything written since.
struct Allowed {
    flushed: Vec<u8>,
    /// First sector, sectors, byte.
    since: Vec<(u64, u64, u8)>,
}

/// Whole sectors of one byte each, so that a sector tells which write it comes from.
fn crash_once(what: What, seed: u64) {
    let mut numbers = Numbers(seed);
    let file = Arc::new(JournalFile::default());
    let (writer, folder, content) = start(what, file.clone());
    let mut model: Vec<u8> = content.chunks(512).map(|sector| sector[0]).collect();
    // The base holds sectors that are not of one byte; they are told apart by their first.
    let sectors = model.len() as u64;
    let first_step = file.steps();
    let mut history: Vec<(usize, Allowed)> =
        vec![(first_step, Allowed { flushed: model.clone(), since: Vec::new() })];
    for turn in 0..12u64 {
        let at = numbers.next(sectors);
        let length = match numbers.next(4) {
            0 => 2048.min(sectors - at),
            1 => 1,
            _ => 1 + numbers.next((sectors - at).min(3000)),
        };
        let byte = if numbers.next(3) == 0 { 0 } else { (turn * 16) as u8 | 1 };
        if byte == 0 {
            let range = ByteRange { start: at * 512, end: (at + length) * 512 };
            history.last_mut().unwrap().1.since.push((at, length, 0));
            writer.write_zeros(range).unwrap();
        } else {
            history.last_mut().unwrap().1.since.push((at, length, byte));
            writer.write_at(at * 512, &vec![byte; length as usize * 512]).unwrap();
        }
        model[at as usize..(at + length) as usize].fill(byte);
        if numbers.next(3) == 0 {
            writer.flush().unwrap();
            history.push((file.steps(), Allowed { flushed: model.clone(), since: Vec::new() }));
        }
    }
    writer.flush().unwrap();
    history.push((file.steps(), Allowed { flushed: model.clone(), since: Vec::new() }));
    for _ in 0..10 {
        let stop = first_step + numbers.next((file.steps() - first_step + 1) as u64) as usize;
        let bias = 1 + numbers.next(9);
        let bytes = file.after_crash(stop, || numbers.next(10) < bias);
        let (_, allowed) = history.iter().rev().find(|(step, _)| *step <= stop).unwrap();
        let check = |seen: &[u8], who: &str| {
            for (sector, content) in seen.chunks(512).enumerate() {
                let byte = content[0];
                let index = sector as u64;
                let fine = byte == allowed.flushed[sector]
                    || allowed
                        .since
                        .iter()
                        .any(|(at, length, b)| *b == byte && (*at..*at + *length).contains(&index));
                assert!(fine, "{what:?} seed {seed} stop {stop}: {who} shows {byte} in sector {sector}");
            }
        };
        let reader = Reader::open(device(&bytes), &folder)
            .unwrap_or_else(|error| panic!("{what:?} seed {seed} stop {stop}: {error}"));
        let seen = read_all(&reader);
        check(&seen, "a reader");
        // A writer that goes on sees the same, replays, and what it writes then is as good as ever.
        let again = Arc::new(MemoryFile::new(bytes));
        let writer = Writer::open(again.clone(), &folder).unwrap();
        assert!(read_all(&writer) == seen, "{what:?} seed {seed} stop {stop}: reader and writer differ");
        let mut expected = seen;
        for _ in 0..3 {
            let at = numbers.next(sectors) * 512;
            writer.write_at(at, &[0xEE; 512]).unwrap();
            put(&mut expected, at, &[0xEE; 512]);
        }
        writer.flush().unwrap();
        let reader = Reader::open(device(&again.to_vec()), &folder).unwrap();
        assert!(!reader.info().log_replayed);
        assert!(read_all(&reader) == expected, "{what:?} seed {seed} stop {stop}: after going on");
    }
}

#[test]
fn a_crash_at_any_step_keeps_what_was_flushed() {
    for seed in 0..12 {
        for what in [What::Fixed, What::Dynamic, What::Child] {
            crash_once(what, seed);
        }
    }
}

/// Many small changes far apart: more BAT pages than one log entry holds.
#[test]
fn more_changes_than_the_log_holds_are_written_in_turns() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wide.vhdx");
    let size = 1 << 40;
    let file = Arc::new(block_io::DiskFile::create(&path).unwrap());
    let writer = Writer::create(file.clone(), options(size, CreateKind::Dynamic)).unwrap();
    // One BAT page describes 512 blocks of 1 MiB.
    for page in 0..600u64 {
        writer.write_at(page * 512 * MIB, &page.to_le_bytes()).unwrap();
    }
    writer.flush().unwrap();
    let below = Arc::new(block_io::FileDevice::open(&path).unwrap());
    let reader = Reader::open(below, &disk_image::NoParents).unwrap();
    for page in 0..600u64 {
        let mut bytes = [0; 8];
        block_io::BlockDevice::read_at(&reader, page * 512 * MIB, &mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), page);
    }
}

/// A failed flush is final: later writes and flushes say so.
#[test]
fn nothing_is_believed_after_a_failed_flush() {
    struct Failing(MemoryFile, std::sync::atomic::AtomicBool);
    impl GrowableFile for Failing {
        fn len(&self) -> Result<u64, block_io::DeviceError> {
            self.0.len()
        }
        fn set_len(&self, length: u64) -> Result<(), block_io::DeviceError> {
            self.0.set_len(length)
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), block_io::DeviceError> {
            self.0.read_at(offset, buf)
        }
        fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), block_io::DeviceError> {
            self.0.write_at(offset, buf)
        }
        fn punch(&self, range: ByteRange) -> Result<(), block_io::DeviceError> {
            self.0.punch(range)
        }
        fn flush(&self) -> Result<(), block_io::DeviceError> {
            if !self.1.swap(false, std::sync::atomic::Ordering::Relaxed) {
                return Ok(());
            }
            Err(block_io::DeviceError::Io {
                object: "test".to_owned(),
                action: "flush",
                offset: 0,
                length: 0,
                source: std::io::Error::other("disk gone"),
            })
        }
    }
    let file = Arc::new(Failing(MemoryFile::default(), false.into()));
    let writer = Writer::create(file.clone(), options(SIZE, CreateKind::Dynamic)).unwrap();
    writer.write_at(0, b"x").unwrap();
    file.1.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(writer.flush().is_err());
    assert!(writer.flush().is_err());
    assert!(writer.write_at(0, b"y").is_err());
}
