//! Index runs (section 7).

use model::{DomainId, PoolId};

use super::pack::PackKind;
use super::{FormatError, check_head, head, take, u16_at, u32_at, u64_at};
use crate::chunk::{ChunkId, PackId};

const MAGIC: &[u8; 8] = b"STPRUN_1";
const FIXED: usize = 64;
/// Largest head that is read: a million packs take 48 MB, 10^10 entries 470 MB.
const MAX_HEAD: u64 = 1 << 30;
/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Entries of a page.
pub const PAGE_ENTRIES: usize = 170;

/// A pack as a run names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunPack {
    /// The pack.
    pub pack: PackId,
    /// Its domain.
    pub domain: DomainId,
    /// What its chunks are.
    pub kind: PackKind,
    /// Bytes of its file.
    pub length: u64,
}

/// One chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RunEntry {
    /// The chunk.
    pub id: ChunkId,
    /// Position of its pack in the run's list.
    pub pack: u32,
    /// Where in the pack.
    pub location: u32,
}

/// All of a run but its pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunHead {
    /// The pool.
    pub pool: PoolId,
    /// Its number; equals the file name.
    pub number: u64,
    /// Entries in all pages.
    pub entries: u64,
    /// The packs it covers.
    pub packs: Vec<RunPack>,
    /// Runs that it replaces.
    pub superseded: Vec<u64>,
    /// Number of the last record when it was written.
    pub witnessed: u64,
    /// First 8 bytes of the first id of each page.
    pub fences: Vec<u64>,
    /// Where the pages begin.
    pub pages_at: u64,
}

/// First 8 bytes of an id, so that numbers sort as ids do.
pub fn prefix(id: &ChunkId) -> u64 {
    let mut first = [0u8; 8];
    first.copy_from_slice(&id.0[..8]);
    u64::from_be_bytes(first)
}

/// Check value of a page: bound to its run by the key, and to its place in it.
fn page_check(key: &[u8; 32], index: u64, bytes: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&index.to_le_bytes()).update(bytes);
    let mut check = [0u8; 16];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    check
}

/// A whole run under its key. `entries` must ascend.
pub fn encode(
    key: &[u8; 32],
    pool: PoolId,
    number: u64,
    witnessed: u64,
    packs: &[RunPack],
    superseded: &[u64],
    entries: &[RunEntry],
) -> Vec<u8> {
    let pages = entries.len().div_ceil(PAGE_ENTRIES);
    let mut bytes = head(MAGIC);
    bytes.extend_from_slice(&(packs.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&pool.0);
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&(superseded.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&(pages as u32).to_le_bytes());
    bytes.extend_from_slice(&witnessed.to_le_bytes());
    for pack in packs {
        bytes.extend_from_slice(&pack.pack.0);
        bytes.extend_from_slice(&pack.domain.0);
        bytes.extend_from_slice(&(pack.kind as u16).to_le_bytes());
        bytes.extend_from_slice(&[0; 6]);
        bytes.extend_from_slice(&pack.length.to_le_bytes());
    }
    for number in superseded {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    for page in entries.chunks(PAGE_ENTRIES) {
        bytes.extend_from_slice(&prefix(&page[0].id).to_le_bytes());
    }
    let hash = blake3::keyed_hash(key, &bytes);
    bytes.extend_from_slice(hash.as_bytes());
    for (index, page) in entries.chunks(PAGE_ENTRIES).enumerate() {
        let begin = bytes.len();
        for entry in page {
            bytes.extend_from_slice(&entry.id.0);
            bytes.extend_from_slice(&entry.pack.to_le_bytes());
            bytes.extend_from_slice(&entry.location.to_le_bytes());
        }
        bytes.resize(begin + PAGE - 16, 0);
        let check = page_check(key, index as u64, &bytes[begin..]);
        bytes.extend_from_slice(&check);
    }
    bytes
}

/// How many bytes the head has, from its first 64.
pub fn head_length(bytes: &[u8]) -> Result<u64, FormatError> {
    check_head(bytes, MAGIC)?;
    let (packs, superseded, pages) = (u32_at(bytes, 12)?, u32_at(bytes, 48)?, u32_at(bytes, 52)?);
    let length = FIXED as u64 + u64::from(packs) * 48 + u64::from(superseded) * 8 + u64::from(pages) * 8 + 32;
    if length > MAX_HEAD {
        return Err(FormatError::at(12, format!("a head of {length} bytes, at most {MAX_HEAD} are read")));
    }
    Ok(length)
}

/// The head in `bytes`, which has exactly [`head_length`] bytes, of a file of `length` bytes.
pub fn decode_head(key: &[u8; 32], bytes: &[u8], length: u64) -> Result<RunHead, FormatError> {
    let expected = head_length(bytes)?;
    if bytes.len() as u64 != expected {
        return Err(FormatError::at(12, "the run is shorter than its head"));
    }
    let end = bytes.len() - 32;
    if blake3::keyed_hash(key, &bytes[..end]) != take::<32>(bytes, end)? {
        return Err(FormatError::at(0, "the run's head does not match its hash"));
    }
    let (packs, superseded, pages) = (u32_at(bytes, 12)?, u32_at(bytes, 48)?, u32_at(bytes, 52)?);
    let entries = u64_at(bytes, 40)?;
    if u64::from(pages) != entries.div_ceil(PAGE_ENTRIES as u64)
        || length != expected + u64::from(pages) * PAGE as u64
    {
        return Err(FormatError::at(
            40,
            format!("{entries} entries in {pages} pages in a file of {length} bytes"),
        ));
    }
    let mut head = RunHead {
        pool: PoolId(take(bytes, 16)?),
        number: u64_at(bytes, 32)?,
        entries,
        packs: Vec::with_capacity(packs as usize),
        superseded: Vec::with_capacity(superseded as usize),
        witnessed: u64_at(bytes, 56)?,
        fences: Vec::with_capacity(pages as usize),
        pages_at: expected,
    };
    let mut at = FIXED;
    for _ in 0..packs {
        let kind = PackKind::of(u16_at(bytes, at + 32)?)
            .ok_or_else(|| FormatError::at(at as u64, "unknown kind of pack"))?;
        head.packs.push(RunPack {
            pack: PackId(take(bytes, at)?),
            domain: DomainId(take(bytes, at + 16)?),
            kind,
            length: u64_at(bytes, at + 40)?,
        });
        at += 48;
    }
    for _ in 0..superseded {
        head.superseded.push(u64_at(bytes, at)?);
        at += 8;
    }
    for _ in 0..pages {
        head.fences.push(u64_at(bytes, at)?);
        at += 8;
    }
    Ok(head)
}

/// The entries of page `index`.
pub fn decode_page(
    key: &[u8; 32],
    head: &RunHead,
    index: u64,
    bytes: &[u8; PAGE],
) -> Result<Vec<RunEntry>, FormatError> {
    let at = head.pages_at + index * PAGE as u64;
    if bytes[PAGE - 16..] != page_check(key, index, &bytes[..PAGE - 16]) {
        return Err(FormatError::at(at, "the page does not match its hash"));
    }
    let present = (head.entries - index * PAGE_ENTRIES as u64).min(PAGE_ENTRIES as u64) as usize;
    (0..present)
        .map(|entry| {
            let at = entry * 24;
            let found = RunEntry {
                id: ChunkId(take(bytes, at)?),
                pack: u32_at(bytes, at + 16)?,
                location: u32_at(bytes, at + 20)?,
            };
            if found.pack as usize >= head.packs.len() {
                return Err(FormatError::at(at as u64, "an entry names a pack outside the run's list"));
            }
            Ok(found)
        })
        .collect()
}

/// Name of run `number` in the pool's folder.
pub fn name(number: u64) -> String {
    format!("index/{number:016x}.run")
}

/// Number of a run by the last part of its name.
pub fn number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".run")?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}
