//! Parity of packs (section 6.1): a few sectors that rot are rebuilt from the rest of the pack.
//!
//! Refuses: writing to a pack that is there. What is rebuilt is in memory; the file stays as it is, and is told (INV-10).
//! Storing it again is [`mod@crate::repair`]'s.
//!
//! Invariants
//! - What is rebuilt is believed only if it fits its sector's hash, and then the frame's seal or hash like any other byte. (must)
//! - Whoever reads a sound pack reads no parity but its footer. (should)

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;

use environment::NewFile;

use crate::format::pack;
use crate::format::parity::{self, FOOTER, HASH, Layout, MAX_FILE, SECTOR, sector_hash};
use crate::format::short_hash;

const SECTOR_BYTES: usize = SECTOR as usize;

/// Reads exactly so many bytes at an offset of a pack file, with a name or not yet.
pub(crate) type ReadAt<'a> = dyn Fn(u64, &mut [u8]) -> io::Result<()> + 'a;

fn damaged(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

fn xor(into: &mut [u8], other: &[u8]) {
    for (into, other) in into.iter_mut().zip(other) {
        *into ^= other;
    }
}

/// Appends `percent` of parity to a pack of `content` bytes that ends with its trailer. Returns the bytes appended.
pub(crate) fn append(file: &mut dyn NewFile, content: u64, percent: u32) -> io::Result<u64> {
    let layout =
        Layout::new(content, percent).ok_or_else(|| damaged(format!("a pack of {content} bytes")))?;
    append_as(file, &layout)
}

/// [`append`] in a given layout: of the same content it makes the same bytes.
pub(crate) fn append_as(file: &mut dyn NewFile, layout: &Layout) -> io::Result<u64> {
    let (content, groups) = (layout.content, layout.groups as usize);
    let mut sums = vec![0u8; groups * SECTOR_BYTES];
    let mut hashes = Vec::with_capacity(layout.hashes() as usize);
    // The bytes come back from the page cache: frames are written one by one, and how many there will be shows at the end.
    let mut piece = vec![0u8; 256 * SECTOR_BYTES];
    let mut at = 0u64;
    let mut group = 0;
    while at < content {
        let length = (content - at).min(piece.len() as u64) as usize;
        piece[length..].fill(0);
        file.read_exact_at(at, &mut piece[..length])?;
        for sector in piece[..length.next_multiple_of(SECTOR_BYTES)].chunks(SECTOR_BYTES) {
            xor(&mut sums[group * SECTOR_BYTES..(group + 1) * SECTOR_BYTES], sector);
            hashes.extend_from_slice(&sector_hash(sector));
            group = (group + 1) % groups;
        }
        at += length as u64;
    }
    for sum in sums.chunks(SECTOR_BYTES) {
        hashes.extend_from_slice(&sector_hash(sum));
    }
    let footer = parity::encode(layout, &hashes);
    let zeros = [0u8; SECTOR_BYTES];
    file.append(&zeros[..(layout.first() - content) as usize])?;
    file.append(&footer)?;
    file.append(&hashes)?;
    let gap = layout.parity() - layout.first() - FOOTER as u64 - layout.hashes();
    file.append(&zeros[..gap as usize])?;
    file.append(&sums)?;
    file.append(&hashes)?;
    file.append(&footer)?;
    Ok(layout.file() - content)
}

/// Where the parity of a pack is, and the short hash of its hashes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub layout: Layout,
    expected: [u8; 16],
}

/// The parity of a pack file of `length` bytes, by whichever footer is right. `None`: it has none that could be found.
pub(crate) fn find(read: &ReadAt<'_>, length: u64) -> Option<Found> {
    if length < (2 * pack::HEADER + FOOTER) as u64 || length > MAX_FILE {
        return None;
    }
    let mut bytes = [0u8; FOOTER];
    if read(length - FOOTER as u64, &mut bytes).is_ok() {
        if let Ok((layout, expected)) = parity::decode(&bytes)
            && layout.file() == length
        {
            return Some(Found { layout, expected });
        }
        if pack::Trailer::decode(&bytes, length).is_ok() {
            return None;
        }
    }
    // The last footer is damaged or cut off; the first stands at a sector.
    let mut at = length / SECTOR * SECTOR;
    while at >= SECTOR {
        if length - at >= FOOTER as u64
            && read(at, &mut bytes).is_ok()
            && let Ok((layout, expected)) = parity::decode(&bytes)
            && layout.first() == at
        {
            return Some(Found { layout, expected });
        }
        at -= SECTOR;
    }
    None
}

/// What a pack can be rebuilt from.
pub(crate) struct Parity {
    layout: Layout,
    hashes: Vec<u8>,
}

impl Parity {
    /// The parity of a pack file, if it has any of which the hashes can be read.
    pub(crate) fn load(read: &ReadAt<'_>, length: u64) -> Option<Parity> {
        find(read, length).and_then(|found| Parity::of(read, found))
    }

    /// [`Parity::load`] of what was found.
    pub(crate) fn of(read: &ReadAt<'_>, Found { layout, expected }: Found) -> Option<Parity> {
        let mut hashes = vec![0u8; layout.hashes() as usize];
        let places = [layout.second(), layout.first() + FOOTER as u64];
        places
            .into_iter()
            .any(|at| read(at, &mut hashes).is_ok() && short_hash(&[&hashes]) == expected)
            .then_some(Parity { layout, hashes })
    }

    /// Where everything is.
    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    fn fits(&self, index: u64, sector: &[u8]) -> bool {
        let at = index as usize * HASH;
        self.hashes.get(at..at + HASH).is_some_and(|hash| hash == sector_hash(sector))
    }
}

/// Reads a pack as it was, through its parity.
pub(crate) struct Rebuilder<'p> {
    parity: &'p Parity,
    read: &'p ReadAt<'p>,
    sectors: RefCell<BTreeSet<u32>>,
}

impl<'p> Rebuilder<'p> {
    /// Of the file that `read` gives.
    pub(crate) fn new(parity: &'p Parity, read: &'p ReadAt<'p>) -> Rebuilder<'p> {
        Rebuilder { parity, read, sectors: RefCell::default() }
    }

    /// The sectors that were rebuilt so far.
    pub(crate) fn sectors(self) -> BTreeSet<u32> {
        self.sectors.into_inner()
    }

    /// Fills `buf` with what the pack held at `at`: sectors that do not fit their hash are rebuilt.
    pub(crate) fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(buf.len() as u64).filter(|&end| end <= self.parity.layout.content);
        let Some(end) = end else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        let mut sector = [0u8; SECTOR_BYTES];
        let mut from = at;
        while from < end {
            let index = from / SECTOR;
            if !self.sector(index, &mut sector) {
                self.rebuild(index, &mut sector)?;
                self.sectors.borrow_mut().insert(index as u32);
            }
            let start = (from % SECTOR) as usize;
            let length = (SECTOR_BYTES - start).min((end - from) as usize);
            let to = (from - at) as usize;
            buf[to..to + length].copy_from_slice(&sector[start..start + length]);
            from += length as u64;
        }
        Ok(())
    }

    /// Reads a sector, of content or behind it one of parity; false if it is not what it was.
    fn sector(&self, index: u64, sector: &mut [u8; SECTOR_BYTES]) -> bool {
        let layout = &self.parity.layout;
        let (at, length) = match index.checked_sub(u64::from(layout.sectors)) {
            None => (index * SECTOR, (layout.content - index * SECTOR).min(SECTOR) as usize),
            Some(group) => (layout.parity() + group * SECTOR, SECTOR_BYTES),
        };
        sector[length..].fill(0);
        (self.read)(at, &mut sector[..length]).is_ok() && self.parity.fits(index, sector)
    }

    fn rebuild(&self, index: u64, out: &mut [u8; SECTOR_BYTES]) -> io::Result<()> {
        let layout = &self.parity.layout;
        let (sectors, groups) = (u64::from(layout.sectors), u64::from(layout.groups));
        let group = index % groups;
        let mut other = [0u8; SECTOR_BYTES];
        out.fill(0);
        let rest = (group..sectors).step_by(groups as usize).filter(|&other| other != index);
        for one in rest.chain([sectors + group]) {
            if !self.sector(one, &mut other) {
                let which = match one.checked_sub(sectors) {
                    None => format!("sector {one}"),
                    Some(_) => "the parity".to_owned(),
                };
                return Err(damaged(format!(
                    "bytes {}..{} are damaged, and cannot be rebuilt: {which} of the same group is damaged too",
                    index * SECTOR,
                    (index + 1) * SECTOR
                )));
            }
            xor(out, &other);
        }
        if !self.parity.fits(index, out) {
            return Err(damaged(format!("sector {index} was rebuilt and does not fit its hash")));
        }
        Ok(())
    }
}

/// Reads the parity of a pack file of `length` bytes against its hashes: what is damaged in it, by offset.
pub(crate) fn examine(read: &ReadAt<'_>, length: u64, known: Found) -> Vec<(u64, String)> {
    let Found { layout, expected } = known;
    let mut found = Vec::new();
    if layout.file() != length {
        let reason = format!("the file has {length} bytes, with its parity {} are expected", layout.file());
        found.push((length.min(layout.file()), reason));
    }
    let take = |at: u64, length: u64, found: &mut Vec<(u64, String)>| {
        let mut bytes = vec![0u8; length as usize];
        match read(at, &mut bytes) {
            Ok(()) => Some(bytes),
            Err(error) => {
                found.push((at, format!("parity: {error}")));
                None
            }
        }
    };
    for at in [layout.first(), layout.file() - FOOTER as u64] {
        if let Some(bytes) = take(at, FOOTER as u64, &mut found)
            && parity::decode(&bytes).ok() != Some((layout, expected))
        {
            found.push((at, "a footer of the parity is damaged; the other serves".to_owned()));
        }
    }
    let mut hashes = None;
    for at in [layout.first() + FOOTER as u64, layout.second()] {
        let Some(bytes) = take(at, layout.hashes(), &mut found) else { continue };
        if short_hash(&[&bytes]) == expected {
            hashes = Some(bytes);
        } else {
            found.push((at, "the hashes of the parity do not fit theirs".to_owned()));
        }
    }
    let behind = layout.first() + FOOTER as u64 + layout.hashes();
    for (at, end) in [(layout.content, layout.first()), (behind, layout.parity())] {
        if take(at, end - at, &mut found).is_some_and(|bytes| bytes.iter().any(|&byte| byte != 0)) {
            found.push((at, "padding of the parity is not zeros".to_owned()));
        }
    }
    let hashes = hashes.unwrap_or_default();
    for group in 0..u64::from(layout.groups) {
        let at = layout.parity() + group * SECTOR;
        let place = (u64::from(layout.sectors) + group) as usize * HASH;
        if let Some(bytes) = take(at, SECTOR, &mut found)
            && hashes.get(place..place + HASH).is_some_and(|hash| hash != sector_hash(&bytes))
        {
            found.push((at, "a sector of parity does not fit its hash".to_owned()));
        }
    }
    found
}
