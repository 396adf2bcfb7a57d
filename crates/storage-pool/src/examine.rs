//! Reading whole packs: every stored byte once and in order, against the hashes that need no key, and where somebody has
//! the keys, each frame's chunks against their ids (section 6).
//!
//! Refuses: believing a length or an offset in a file that it does not fit into.
//!
//! Invariants
//! - A byte is read once; only around damage it is read again, and a damaged pack with parity once more as it was. (should)
//! - Memory is a few MiB, whatever the pack's length says. (should)

use std::collections::BTreeSet;
use std::io;

use block_io::Pace;
use environment::Files;
use model::PoolId;

use crate::chunk::PackId;
use crate::error::PoolError;
use crate::format::pack::{self, FRAME_HEADER, FrameHeader, HEADER, PackHeader, Trailer};
use crate::format::short_hash;
use crate::parity::{self, Parity, ReadAt, Rebuilder};

/// So much is read at once.
const PIECE: usize = 1 << 20;
/// Where a read failed, the next attempt is behind so many bytes: what disks lose, they lose in such units.
const SECTOR: u64 = 4096;

/// What reading a pack found.
#[derive(Debug, Default)]
pub(crate) struct PackExamination {
    /// Damaged frames and other damage: offset and reason. A reason at offset 0 or past the frames is not a frame's.
    pub damaged: Vec<(u64, String)>,
    /// Offsets of damaged frames that cannot be had.
    pub frames: BTreeSet<u32>,
    /// Offsets of damaged frames that parity gives.
    pub rebuilt: BTreeSet<u32>,
    /// Sectors that were rebuilt from parity.
    pub sectors: BTreeSet<u32>,
    /// Whether the pack has parity, and with it everything but the parity can be had as it was.
    pub is_whole: bool,
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
    read: &'f ReadAt<'f>,
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
        let Err(error) = (self.read)(at + kept as u64, &mut self.held[kept..]) else {
            return Ok(());
        };
        // Something in this piece cannot be read; what is wanted perhaps can.
        let needed = (length - kept).min(wanted);
        self.held.truncate(kept + needed);
        let again = (self.read)(at + kept as u64, &mut self.held[kept..]);
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
    prove: Option<&mut Prove<'_>>,
) -> Result<PackExamination, PoolError> {
    let name = pack::name(id);
    let path = files.display(&name);
    let io = |source| PoolError::io(path.clone(), "read", source);
    let file = files.open(&name).map_err(io)?;
    let length = file.len().map_err(io)?;
    let found = examine_bytes(&|at, buf| file.read_exact_at(at, buf), length, (pool, id), reading, prove);
    if reading.drops_cache {
        file.drop_cached(0, length);
    }
    Ok(found)
}

/// [`examine`] for the pack of `length` bytes that `read` gives. If anything is damaged and there is parity, the pack is
/// examined once more as it is read by that: only what fits its hash then, and what `prove` says yes to, can be had.
pub(crate) fn examine_bytes(
    read: &ReadAt<'_>,
    length: u64,
    ids: (PoolId, PackId),
    reading: Reading<'_>,
    mut prove: Option<&mut Prove<'_>>,
) -> PackExamination {
    let Some(known) = parity::find(read, length) else {
        return examine_content(read, length, ids, reading, prove);
    };
    let content = known.layout.content;
    let mut found = examine_content(read, content, ids, reading, prove.as_deref_mut());
    found.length = length;
    if let Some(pace) = reading.pace {
        pace.wait(length.saturating_sub(content));
    }
    found.is_whole = found.damaged.is_empty();
    found.damaged.extend(parity::examine(read, length, known));
    if found.is_whole {
        return found;
    }
    let Some(parity) = Parity::of(read, known) else { return found };
    let rebuilder = Rebuilder::new(&parity, read);
    let as_it_was = |at: u64, buf: &mut [u8]| rebuilder.read_at(at, buf);
    let again = examine_content(&as_it_was, content, ids, reading, prove);
    // A frame may be right as it is stored and lie in a sector that is lost otherwise: what either way gives, can be had.
    let good: BTreeSet<u32> = found.met.difference(&found.frames).copied().collect();
    found.rebuilt = again.met.difference(&again.frames).filter(|at| !good.contains(at)).copied().collect();
    found.frames.extend(again.frames);
    found.frames.retain(|at| !good.contains(at) && !found.rebuilt.contains(at));
    found.met.extend(again.met);
    found.is_whole = again.damaged.is_empty();
    let more = again.damaged.into_iter().map(|(at, reason)| (at, format!("with its parity: {reason}")));
    found.damaged.extend(more);
    found.sectors = rebuilder.sectors();
    if let Some(first) = found.sectors.first() {
        let reason = match found.sectors.len() {
            1 => "1 sector was rebuilt from parity".to_owned(),
            several => format!("{several} sectors were rebuilt from parity"),
        };
        found.damaged.push((u64::from(*first) * SECTOR, reason));
    }
    found
}

/// The pack that ends at `length`, parity left out.
fn examine_content(
    read: &ReadAt<'_>,
    length: u64,
    (pool, id): (PoolId, PackId),
    reading: Reading<'_>,
    mut prove: Option<&mut Prove<'_>>,
) -> PackExamination {
    let mut found = PackExamination { length, ..PackExamination::default() };
    let mut raw = [0u8; HEADER];
    let mut end = [0u8; HEADER];
    if length < 2 * HEADER as u64 {
        found.damaged.push((0, "the pack is cut off".to_owned()));
        return found;
    }
    match read(0, &mut raw) {
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
    let trailer = match read(trailer_at, &mut end) {
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
        let wrong = match read(trailer.table_offset, &mut table) {
            Err(error) => Some(format!("table: {error}")),
            Ok(()) => (!Trailer::check(&end, &raw, &table))
                .then(|| "header, table and trailer do not fit their hash".to_owned()),
        };
        found.damaged.extend(wrong.map(|reason| (trailer.table_offset, reason)));
    }
    let mut forward = Forward { read, pace: reading.pace, end: frames_end, start: 0, held: Vec::new() };
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
    found
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
