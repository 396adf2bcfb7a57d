//! Reading whole packs: every stored byte once and in order, against the hashes that need no key, and where somebody has
//! the keys, each frame's chunks against their ids (section 6).
//!
//! Refuses: believing a length or an offset in a file that it does not fit into.
//!
//! Invariants
//! - A byte is read once; only around damage it is read again. (should)
//! - Memory is a few MiB, whatever the pack's length says. (should)

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use block_io::Pace;
use environment::{Files, ReadFile};
use model::PoolId;

use crate::chunk::PackId;
use crate::error::PoolError;
use crate::format::pack::{self, FRAME_HEADER, FrameHeader, HEADER, PackHeader, Trailer};
use crate::format::short_hash;

/// So much is read at once.
const PIECE: usize = 1 << 20;
/// Where a read failed, the next attempt is behind so many bytes: what disks lose, they lose in such units.
const SECTOR: u64 = 4096;

/// What reading a pack found.
#[derive(Debug, Default)]
pub(crate) struct PackExamination {
    /// Damaged frames and other damage: offset and reason. A reason at offset 0 or past the frames is not a frame's.
    pub damaged: Vec<(u64, String)>,
    /// Offsets of damaged frames.
    pub frames: BTreeSet<u32>,
    /// Offsets of the frames that were met, damaged or not.
    pub met: BTreeSet<u32>,
    /// Bytes of the file.
    pub length: u64,
}

/// What somebody with the keys says to the frame at an offset: header, its raw first half, its sealed bytes, which may be
/// opened in place. `None`: no more is known of it than its hash.
pub(crate) type Prove<'p> = dyn FnMut(u32, &FrameHeader, &[u8], &mut [u8]) -> Option<Result<(), String>> + 'p;

/// How packs are read.
#[derive(Clone, Copy, Default)]
pub(crate) struct Reading<'r> {
    /// Whether every frame is proved by who has the keys, not only those that do not fit their hash.
    pub proves_all: bool,
    /// Whether the bytes are not wanted again soon.
    pub drops_cache: bool,
    /// How fast.
    pub pace: Option<&'r dyn Pace>,
}

/// A file that is read forwards, in large pieces.
struct Forward<'f> {
    file: &'f dyn ReadFile,
    pace: Option<&'f dyn Pace>,
    end: u64,
    start: u64,
    held: Vec<u8>,
}

impl Forward<'_> {
    /// `length` bytes at `at`.
    fn get(&mut self, at: u64, length: usize) -> io::Result<&mut [u8]> {
        let is_held = at >= self.start && at + length as u64 <= self.start + self.held.len() as u64;
        if !is_held {
            self.fill(at, length)?;
        }
        let from = (at - self.start) as usize;
        self.held.get_mut(from..from + length).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn fill(&mut self, at: u64, length: usize) -> io::Result<()> {
        let kept = match usize::try_from(at.wrapping_sub(self.start)) {
            Ok(from) if at >= self.start && from < self.held.len() => {
                self.held.copy_within(from.., 0);
                self.held.len() - from
            }
            _ => 0,
        };
        self.start = at;
        self.held.truncate(kept);
        let left = self.end.saturating_sub(at + kept as u64);
        let wanted = PIECE.max(length - kept).min(usize::try_from(left).unwrap_or(usize::MAX));
        self.held.resize(kept + wanted, 0);
        if let Some(pace) = self.pace {
            pace.wait(wanted as u64);
        }
        let Err(error) = self.file.read_exact_at(at + kept as u64, &mut self.held[kept..]) else {
            return Ok(());
        };
        // Something in this piece cannot be read; what is wanted perhaps can.
        let needed = (length - kept).min(wanted);
        self.held.truncate(kept + needed);
        let again = self.file.read_exact_at(at + kept as u64, &mut self.held[kept..]);
        if again.is_err() {
            self.held.clear();
            return Err(error);
        }
        Ok(())
    }
}

/// Reads a pack file frame by frame and compares every stored byte with its hash.
pub(crate) fn examine(
    files: &dyn Files,
    pool: PoolId,
    id: PackId,
    reading: Reading<'_>,
    mut prove: Option<&mut Prove<'_>>,
) -> Result<PackExamination, PoolError> {
    let name = pack::name(id);
    let path = files.display(&name);
    let io = |source| PoolError::io(path.clone(), "read", source);
    let file = files.open(&name).map_err(io)?;
    let length = file.len().map_err(io)?;
    let mut found = PackExamination { length, ..PackExamination::default() };
    let mut raw = [0u8; HEADER];
    let mut end = [0u8; HEADER];
    if length < 2 * HEADER as u64 {
        found.damaged.push((0, "the pack is cut off".to_owned()));
        return Ok(found);
    }
    match file.read_exact_at(0, &mut raw) {
        Err(error) => found.damaged.push((0, format!("header: {error}"))),
        Ok(()) => match PackHeader::decode(&raw) {
            Ok(header) if header.pack == id && header.pool == pool => {}
            Ok(header) => {
                found.damaged.push((16, format!("is pack {} of pool {}", header.pack, header.pool)))
            }
            Err(error) => found.damaged.push((0, format!("header: {error:?}"))),
        },
    }
    let trailer_at = length - HEADER as u64;
    let trailer = match file.read_exact_at(trailer_at, &mut end) {
        Err(error) => Err(error.to_string()),
        Ok(()) => Trailer::decode(&end, length).map_err(|error| format!("{error:?}")),
    };
    let frames_end = match &trailer {
        Ok(trailer) => trailer.table_offset,
        Err(reason) => {
            found.damaged.push((trailer_at, format!("trailer: {reason}")));
            trailer_at
        }
    };
    if let Ok(trailer) = &trailer {
        let mut table = vec![0u8; trailer.table_stored as usize];
        let wrong = match file.read_exact_at(trailer.table_offset, &mut table) {
            Err(error) => Some(format!("table: {error}")),
            Ok(()) => (!Trailer::check(&end, &raw, &table))
                .then(|| "header, table and trailer do not fit their hash".to_owned()),
        };
        found.damaged.extend(wrong.map(|reason| (trailer.table_offset, reason)));
    }
    let mut forward =
        Forward { file: file.as_ref(), pace: reading.pace, end: frames_end, start: 0, held: Vec::new() };
    let mut at = HEADER as u64;
    let mut frames = 0u32;
    while at + FRAME_HEADER as u64 <= frames_end {
        let header = match forward.get(at, FRAME_HEADER) {
            Ok(raw) => FrameHeader::decode(raw, at).map_err(|_| "a frame's header is damaged".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        let header = match header {
            Ok(header) if at + pack::frame_span(header.stored) <= frames_end => header,
            _ if trailer.is_err() => {
                // Without a trailer the table's bytes look like this too: the end of the frames is not known.
                break;
            }
            other => {
                let reason = other.err().unwrap_or_else(|| "a frame's header is damaged".to_owned());
                found.damaged.push((at, reason));
                found.frames.insert(at as u32);
                found.met.insert(at as u32);
                frames += 1;
                // Frames begin at multiples of 64 with their magic: find the next one whose bytes fit their hash.
                at = next_frame(&mut forward, at + pack::ALIGN, frames_end).unwrap_or(frames_end);
                continue;
            }
        };
        let span = pack::frame_span(header.stored);
        found.met.insert(at as u32);
        frames += 1;
        match forward.get(at, span as usize) {
            Err(error) => {
                found.damaged.push((at, error.to_string()));
                found.frames.insert(at as u32);
            }
            Ok(bytes) => {
                let (head, body) = bytes.split_at_mut(FRAME_HEADER);
                let (stored, padding) = body.split_at_mut(header.stored as usize);
                let fits = short_hash(&[stored]) == header.hash && padding.iter().all(|&byte| byte == 0);
                let proved = match &mut prove {
                    Some(prove) if !fits || reading.proves_all => {
                        prove(at as u32, &header, &head[..16], stored)
                    }
                    _ => None,
                };
                if !fits {
                    found.damaged.push((at, "a frame's bytes do not fit their hash".to_owned()));
                }
                let is_right = match &proved {
                    Some(proved) => proved.is_ok(),
                    None => fits,
                };
                match proved {
                    // Rot in its padding or in the hash for those without a key: told, and costs nobody anything.
                    Some(Ok(())) => {}
                    Some(Err(reason)) => {
                        if fits {
                            found.damaged.push((at, reason));
                        }
                        found.frames.insert(at as u32);
                    }
                    None if fits => {}
                    None => {
                        found.frames.insert(at as u32);
                    }
                }
                if !is_right {
                    // Its length may be wrong too, and what was opened in place is no longer what the file says.
                    forward.held.clear();
                    at = next_frame(&mut forward, at + pack::ALIGN, frames_end).unwrap_or(frames_end);
                    continue;
                }
            }
        }
        at += span;
    }
    if let Ok(trailer) = &trailer
        && (at != frames_end || frames != trailer.frames)
        && found.frames.is_empty()
    {
        found.damaged.push((at, format!("{frames} frames found, the trailer says {}", trailer.frames)));
    }
    if reading.drops_cache {
        file.drop_cached(0, length);
    }
    Ok(found)
}

fn next_frame(forward: &mut Forward<'_>, from: u64, end: u64) -> Option<u64> {
    let mut at = from;
    while at + FRAME_HEADER as u64 <= end {
        let Ok(raw) = forward.get(at, FRAME_HEADER) else {
            at = (at + 1).next_multiple_of(SECTOR);
            continue;
        };
        if let Ok(header) = FrameHeader::decode(raw, at)
            && at + pack::frame_span(header.stored) <= end
            && let Ok(frame) = forward.get(at, FRAME_HEADER + header.stored as usize)
            && short_hash(&[&frame[FRAME_HEADER..]]) == header.hash
        {
            return Some(at);
        }
        at += pack::ALIGN;
    }
    None
}

/// Calls `work` for every item on up to `threads` threads, each with a `begin()` of its own, and `seen` with the results in
/// the order of the items; where `seen` says false, no further one begins. Returns whether all were seen.
pub(crate) fn in_order<T: Sync, S, R: Send>(
    items: &[T],
    threads: usize,
    begin: impl Fn() -> S + Sync,
    work: impl Fn(&T, &mut S) -> R + Sync,
    mut seen: impl FnMut(&T, R) -> bool,
) -> Result<bool, PoolError> {
    let threads = threads.min(items.len());
    if threads <= 1 {
        let mut own = begin();
        return Ok(items.iter().all(|item| seen(item, work(item, &mut own))));
    }
    let next = AtomicUsize::new(0);
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next, begin, work) = (sender.clone(), &next, &begin, &work);
            scope.spawn(move || {
                let mut own = begin();
                loop {
                    let position = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(position) else { return };
                    if sender.send((position, work(item, &mut own))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut early = BTreeMap::new();
        for (position, item) in items.iter().enumerate() {
            let result = loop {
                if let Some(result) = early.remove(&position) {
                    break result;
                }
                match receiver.recv() {
                    Ok((other, result)) => early.insert(other, result),
                    Err(_) => return Err(PoolError::Misuse("a thread of verify ended early".to_owned())),
                };
            };
            if !seen(item, result) {
                next.store(items.len(), Ordering::Relaxed);
                return Ok(false);
            }
        }
        Ok(true)
    })
}
