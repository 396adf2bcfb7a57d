//! Dirty logs, built here from the specification without the code under test, and images of a killed `qemu-io`.

use std::sync::Arc;

use block_io::WritableDevice;
use block_io::{BlockDevice, MemoryFile};
use disk_image::vhdx::{CreateKind, Reader, Writer};
use disk_image::{ImageError, NoParents};

use crate::support::*;

const SECTOR: usize = 4096;
const GUID: [u8; 16] = [0x77; 16];
/// Bytes of [`unapplied`].
const FILE: u64 = 6 * MIB;

/// What an entry does to the file.
enum Update {
    Page(u64, Vec<u8>),
    Zeros(u64, u64),
}

/// One log entry by section 2.3.1.
struct Entry {
    sequence: u64,
    tail: u32,
    flushed: u64,
    last: u64,
    guid: [u8; 16],
    updates: Vec<Update>,
}

impl Entry {
    fn new(sequence: u64, tail: u32, updates: Vec<Update>) -> Entry {
        Entry { sequence, tail, flushed: FILE, last: FILE, guid: GUID, updates }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut head = vec![0; (64 + self.updates.len() * 32).div_ceil(SECTOR) * SECTOR];
        let mut data = Vec::new();
        for (index, update) in self.updates.iter().enumerate() {
            let mut descriptor = Vec::new();
            match update {
                Update::Page(offset, page) => {
                    assert_eq!(page.len(), SECTOR);
                    descriptor.extend_from_slice(b"desc");
                    descriptor.extend_from_slice(&page[SECTOR - 4..]);
                    descriptor.extend_from_slice(&page[..8]);
                    descriptor.extend_from_slice(&offset.to_le_bytes());
                    data.extend_from_slice(b"data");
                    data.extend_from_slice(&((self.sequence >> 32) as u32).to_le_bytes());
                    data.extend_from_slice(&page[8..SECTOR - 4]);
                    data.extend_from_slice(&(self.sequence as u32).to_le_bytes());
                }
                Update::Zeros(offset, length) => {
                    descriptor.extend_from_slice(b"zero");
                    descriptor.extend_from_slice(&[0; 4]);
                    descriptor.extend_from_slice(&length.to_le_bytes());
                    descriptor.extend_from_slice(&offset.to_le_bytes());
                }
            }
            descriptor.extend_from_slice(&self.sequence.to_le_bytes());
            put(&mut head, 64 + index as u64 * 32, &descriptor);
        }
        let length = head.len() + data.len();
        put(&mut head, 0, b"loge");
        put(&mut head, 8, &(length as u32).to_le_bytes());
        put(&mut head, 12, &self.tail.to_le_bytes());
        put(&mut head, 16, &self.sequence.to_le_bytes());
        put(&mut head, 24, &(self.updates.len() as u32).to_le_bytes());
        put(&mut head, 32, &self.guid);
        put(&mut head, 48, &self.flushed.to_le_bytes());
        put(&mut head, 56, &self.last.to_le_bytes());
        head.extend_from_slice(&data);
        reseal(&mut head, 0, length as u64);
        head
    }
}

/// Puts an entry into the ring of the log; gives where the next one goes.
fn place(file: &mut [u8], at: u32, entry: &Entry) -> u32 {
    let mut at = u64::from(at);
    for sector in entry.bytes().chunks(SECTOR) {
        put(file, LOG + at, sector);
        at = (at + SECTOR as u64) % MIB;
    }
    at as u32
}

/// Says in both headers that the log is in use.
fn mark(file: &mut [u8]) {
    for at in HEADERS {
        put(file, at + 48, &GUID);
        reseal(file, at, 4096);
    }
}

fn page_of(file: &[u8], at: u64) -> Vec<u8> {
    file[at as usize..at as usize + SECTOR].to_vec()
}

/// An image of two written blocks whose BAT page is only in the log, and what the disk holds.
fn unapplied() -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let content = [vec![5; MIB as usize], vec![6; MIB as usize], vec![0; 2 * MIB as usize]].concat();
    let mut file = image(options(4 * MIB, CreateKind::Dynamic), &[(0, &content)]);
    let bat = page_of(&file, BAT);
    put(&mut file, BAT, &[0; SECTOR]);
    assert_eq!(file.len() as u64, FILE);
    assert!(
        read_all(&open(&file).unwrap()).iter().all(|&byte| byte == 0),
        "without its log the disk is empty"
    );
    (file, bat, content)
}

#[test]
fn one_entry_is_replayed_and_the_file_stays_as_it_is() {
    let (mut file, bat, content) = unapplied();
    let entry = Entry::new(1, 0, vec![Update::Page(BAT, bat)]);
    place(&mut file, 0, &entry);
    mark(&mut file);
    let below = Arc::new(block_io::MemoryDevice::new(file.clone()));
    let reader = Reader::open(below.clone(), &NoParents).unwrap();
    assert!(reader.info().log_replayed);
    block_io::conformance::examine(&reader, &content);
    assert!(below.to_vec() == file, "a reader never writes");
    // A writer replays into the file; then the image is clean.
    let memory = Arc::new(MemoryFile::new(file));
    let writer = Writer::open(memory.clone(), &NoParents).unwrap();
    block_io::conformance::examine(&writer, &content);
    let reader = open(&memory.to_vec()).unwrap();
    assert!(!reader.info().log_replayed);
    assert_ne!(reader.info().file_write_guid, id(1));
    assert_eq!(reader.info().data_write_guid, id(2), "a replay does not change the disk");
    assert!(read_all(&reader) == content);
}

#[test]
fn a_sequence_is_replayed_in_order_from_its_tail() {
    let (mut file, bat, content) = unapplied();
    let mut first = bat.clone();
    put(&mut first, 0, &[0; 8]);
    let next = place(&mut file, 8192, &Entry::new(41, 8192, vec![Update::Page(BAT, first)]));
    let zeros = Update::Zeros(BAT, 8192);
    let next = place(&mut file, next, &Entry::new(42, 8192, vec![zeros]));
    place(&mut file, next, &Entry::new(43, 8192, vec![Update::Page(BAT, bat)]));
    mark(&mut file);
    assert!(read_all(&open(&file).unwrap()) == content);
}

#[test]
fn what_lies_before_the_tail_is_not_replayed() {
    let (mut file, bat, content) = unapplied();
    let wrong = Update::Zeros(METADATA, 65_536);
    let next = place(&mut file, 0, &Entry::new(7, 0, vec![wrong]));
    place(&mut file, next, &Entry::new(8, next, vec![Update::Page(BAT, bat)]));
    mark(&mut file);
    assert!(read_all(&open(&file).unwrap()) == content);
}

#[test]
fn the_ring_wraps_within_and_between_entries() {
    let (mut file, bat, content) = unapplied();
    let tail = (MIB - 4096) as u32;
    let next = place(&mut file, tail, &Entry::new(1, tail, vec![Update::Zeros(BAT, 4096)]));
    assert_eq!(next, 0);
    place(&mut file, next, &Entry::new(2, tail, vec![Update::Page(BAT, bat.clone())]));
    mark(&mut file);
    assert!(read_all(&open(&file).unwrap()) == content);

    let (mut file, _, _) = unapplied();
    let next = place(&mut file, tail, &Entry::new(1, tail, vec![Update::Page(BAT, bat)]));
    assert_eq!(next, 4096);
    mark(&mut file);
    assert!(read_all(&open(&file).unwrap()) == content);
}

#[test]
fn the_newest_of_several_sequences_wins_and_torn_heads_are_left_out() {
    let (mut file, bat, content) = unapplied();
    place(&mut file, 0, &Entry::new(3, 0, vec![Update::Zeros(METADATA, 4096)]));
    let next = place(&mut file, 65_536, &Entry::new(9, 65_536, vec![Update::Page(BAT, bat)]));
    let torn = next;
    place(&mut file, torn, &Entry::new(10, 65_536, vec![Update::Page(BAT, vec![0; SECTOR])]));
    put(&mut file, LOG + u64::from(torn) + 4096 + 100, b"torn");
    let foreign = Entry { guid: [0x11; 16], ..Entry::new(99, 131_072, vec![Update::Zeros(BAT, 4096)]) };
    place(&mut file, 131_072, &foreign);
    mark(&mut file);
    assert!(read_all(&open(&file).unwrap()) == content);
}

#[test]
fn many_descriptors_and_a_file_that_had_not_grown_yet() {
    let (mut file, bat, content) = unapplied();
    let mut updates: Vec<Update> = (1..200).map(|n| Update::Zeros(BAT + n * 4096, 4096)).collect();
    updates.push(Update::Page(BAT, bat));
    // The second block was the last of the file; its payload is zeros that never reached the disk.
    let full = FILE;
    file.truncate(full as usize - MIB as usize);
    let entry = Entry { flushed: full - MIB, last: full, ..Entry::new(1, 0, updates) };
    place(&mut file, 0, &entry);
    mark(&mut file);
    let mut expected = content;
    expected[MIB as usize..2 * MIB as usize].fill(0);
    assert!(read_all(&open(&file).unwrap()) == expected);
    let memory = Arc::new(MemoryFile::new(file));
    let writer = Writer::open(memory.clone(), &NoParents).unwrap();
    assert!(read_all(&writer) == expected);
    assert_eq!(memory.to_vec().len() as u64, full);
}

fn reason(file: &[u8], wanted: &str) {
    match refused(file) {
        ImageError::Damaged { structure, reason, .. } => {
            assert!(format!("{structure}: {reason}").contains(wanted), "{structure}: {reason}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn logs_that_cannot_be_replayed_are_refused() {
    let (mut file, bat, _) = unapplied();
    mark(&mut file);
    reason(&file, "no valid sequence");

    let good = Entry::new(1, 0, vec![Update::Page(BAT, bat.clone())]);
    place(&mut file, 0, &good);
    assert!(open(&file).is_ok());
    for (what, at) in [
        ("checksum", 4u64),
        ("length", 8),
        ("tail", 13),
        ("sequence", 16),
        ("descriptor count", 24),
        ("log guid", 32),
        ("descriptor signature", 64),
        ("descriptor offset", 80),
        ("descriptor sequence", 88),
        ("data signature", 4096),
        ("data", 5000),
        ("data sequence", 8188),
    ] {
        let mut wrong = file.clone();
        wrong[(LOG + at) as usize] ^= 1;
        assert!(matches!(refused(&wrong), ImageError::Damaged { structure: "log", .. }), "{what}");
        if at > 8 && !(4096..8188).contains(&at) {
            // The same with a right checksum: the fields are checked, not only the sum.
            reseal(&mut wrong, LOG, 8192);
            if at == 80 {
                continue;
            }
            assert!(open(&wrong).is_err(), "{what} with a right checksum");
        }
    }

    let mut short = file.clone();
    place(&mut short, 0, &Entry { flushed: 100 * MIB, last: 100 * MIB, ..Entry::new(1, 0, vec![]) });
    reason(&short, "cut off");
    let mut vast = file.clone();
    place(&mut vast, 0, &Entry { last: 1 << 60, ..Entry::new(1, 0, vec![]) });
    reason(&vast, "it says the file has");
    for (offset, length) in [(65_536, 4096), (LOG, 4096), (0, 1 << 20), (1 << 62, 4096)] {
        let mut inward = file.clone();
        place(&mut inward, 0, &Entry::new(1, 0, vec![Update::Zeros(offset, length)]));
        reason(&inward, "an entry writes to");
    }
    let mut version = file.clone();
    for at in HEADERS {
        put(&mut version, at + 64, &1u16.to_le_bytes());
        reseal(&mut version, at, 4096);
    }
    assert!(matches!(refused(&version), ImageError::Unsupported { .. }));
    // With nothing to replay, an unknown log version does not matter.
    for at in HEADERS {
        put(&mut version, at + 48, &[0; 16]);
        reseal(&mut version, at, 4096);
    }
    assert!(open(&version).is_ok());
}

#[test]
fn a_log_full_of_long_entries_ends_soon() {
    let (mut file, _, _) = unapplied();
    mark(&mut file);
    let hostile = Entry::new(1, 0, vec![]).bytes();
    for at in (0..MIB).step_by(SECTOR) {
        put(&mut file, LOG + at, &hostile);
        put(&mut file, LOG + at + 8, &(MIB as u32).to_le_bytes());
    }
    reason(&file, "overlap each other");
    // Valid entries of one sector that never form a sequence.
    for at in (0..MIB).step_by(SECTOR) {
        let entry = Entry { tail: 4096, ..Entry::new(1 + at / 4096, 0, vec![]) };
        let mut bytes = entry.bytes();
        let tail = if at == 4096 { 8192u32 } else { 0 };
        put(&mut bytes, 12, &tail.to_le_bytes());
        put(&mut bytes, 16, &(at / 2048 + 5).to_le_bytes());
        let length = bytes.len() as u64;
        reseal(&mut bytes, 0, length);
        put(&mut file, LOG + at, &bytes);
    }
    let _ = open(&file);
}

#[test]
fn a_log_longer_than_the_limit_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.vhdx");
    let (mut file, _, _) = unapplied();
    for at in HEADERS {
        put(&mut file, at + 48, &GUID);
        put(&mut file, at + 68, &(3u32 << 30).to_le_bytes());
        put(&mut file, at + 72, &(16 * MIB).to_le_bytes());
        reseal(&mut file, at, 4096);
    }
    std::fs::write(&path, &file).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4 << 30).unwrap();
    let below: Arc<dyn BlockDevice> = Arc::new(block_io::FileDevice::open(&path).unwrap());
    assert!(matches!(Reader::open(below, &NoParents), Err(ImageError::Unsupported { .. })));
}

/// The log that our own writer leaves when it stops in the middle of a flush is one that the rules above accept.
#[test]
fn our_own_log_is_replayed_after_every_step_of_a_flush() {
    let file = Arc::new(JournalFile::default());
    let writer = Writer::create(file.clone(), options(8 * MIB, CreateKind::Dynamic)).unwrap();
    let before = file.steps();
    let content = vec![0x3C; 5 * MIB as usize];
    writer.write_at(0, &content).unwrap();
    writer.flush().unwrap();
    let mut replayed = 0;
    for stop in before..=file.steps() {
        let reader = open(&file.after_crash(stop, || true)).unwrap();
        replayed += u32::from(reader.info().log_replayed);
        let seen = read_all(&reader);
        let whole = seen[..content.len()] == content;
        assert!(whole || seen.iter().all(|&byte| byte == 0), "all or nothing at step {stop}");
    }
    assert!(replayed > 2, "{replayed}");
}
