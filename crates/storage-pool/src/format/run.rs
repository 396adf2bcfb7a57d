//! Index runs (section 7): pages of sorted entries, a filter after each partition of pages, and a tail.
//!
//! Nothing here needs more memory than one partition's filter keys and the tail: a run is written and read as a stream.
//! Every part is under a keyed hash, so that nobody without the root key can make the pool believe that it holds a
//! chunk, or that it does not.
//!
//! Files of reference counts (section 7.1) are made of the same pages: see [`PagesOf`].

use model::{DomainId, PoolId};

use super::pack::PackKind;
use super::{FormatError, check_head, head, take, u16_at, u32_at, u64_at};
use crate::chunk::{ChunkId, LOCATION_END, PackId};

/// Bytes of the header.
pub const HEADER: usize = 64;
/// Bytes of the trailer.
pub const TRAILER: usize = 96;
/// Largest tail that is read: five million packs take 240 MB, 10^10 entries 430 MB.
const MAX_TAIL: u64 = 1 << 30;
/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Entries of a page.
pub const PAGE_ENTRIES: usize = 185;
/// Bytes of an entry.
const ENTRY: usize = 22;
/// Bytes of a page that its check covers: entries, the page's number, zeros.
const CHECKED: usize = PAGE - 16;
/// Pages of a partition: just under four million keys, so that a filter is built in 40 MB.
pub const PARTITION_PAGES: u64 = 21_600;
const PARTITION_ENTRIES: u64 = PARTITION_PAGES * PAGE_ENTRIES as u64;
/// Bits of a filter for each of its keys.
const BITS_A_KEY: u64 = 12;
/// Bits of a block of a filter.
const BLOCK_BITS: u64 = 256;
/// Packs that a run can name: positions have 24 bits.
pub const MAX_PACKS: usize = 1 << 24;

/// What the pages of a file say of chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PagesOf {
    /// Where they are: a run of the index.
    Places,
    /// How many references came and went: a file of counts. It has no filters, because it is only asked in order of ids, and
    /// more bytes in its tail.
    Counts,
}

impl PagesOf {
    fn magic(self) -> &'static [u8; 8] {
        match self {
            PagesOf::Places => b"STPRUN_1",
            PagesOf::Counts => b"STPCNT_1",
        }
    }

    fn end(self) -> &'static [u8; 8] {
        match self {
            PagesOf::Places => b"STPRUNE1",
            PagesOf::Counts => b"STPCNTE1",
        }
    }

    /// Bytes of the filter of a partition of so many keys.
    fn filter_bytes(self, keys: u64) -> u64 {
        match self {
            PagesOf::Places => filter_blocks(keys) * 32 + 16,
            PagesOf::Counts => 0,
        }
    }

    /// Where a partition begins.
    fn partition_at(self, partition: u64) -> u64 {
        let filter = self.filter_bytes(PARTITION_ENTRIES);
        HEADER as u64 + partition * (PARTITION_PAGES * PAGE as u64 + filter)
    }
}

/// A pack as a run names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunPack {
    /// The pack.
    pub pack: PackId,
    /// Its domain.
    pub domain: DomainId,
    /// What its chunks are.
    pub kind: PackKind,
    /// Key generation of its table.
    pub generation: u16,
    /// Bytes of its file.
    pub length: u64,
}

/// One chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RunEntry {
    /// The chunk.
    pub id: ChunkId,
    /// Position of its pack in the run's list; 24 bits.
    pub pack: u32,
    /// Where in the pack; 24 bits.
    pub location: u32,
}

/// First 8 bytes of an id, so that numbers sort as ids do.
pub fn prefix(id: &ChunkId) -> u64 {
    (u128::from_be_bytes(id.0) >> 64) as u64
}

/// What a filter knows of an id: its last 8 bytes. The first ones are much alike within a partition.
pub fn filter_key(id: &ChunkId) -> u64 {
    u128::from_be_bytes(id.0) as u64
}

/// Whether an id may be among the keys of a partition: a split-block Bloom filter. A key belongs to one block of eight
/// words, chosen by its high 24 bits, and has a bit in each, chosen by five of its low 40 bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    blocks: Vec<[u32; 8]>,
}

impl Filter {
    /// The filter of `keys`.
    pub fn of(keys: &[u64]) -> Filter {
        let mut filter = Filter { blocks: vec![[0; 8]; filter_blocks(keys.len() as u64) as usize] };
        for &key in keys {
            let block = filter.block(key);
            if let Some(words) = filter.blocks.get_mut(block) {
                words.iter_mut().zip(bits(key)).for_each(|(word, bit)| *word |= bit);
            }
        }
        filter
    }

    fn block(&self, key: u64) -> usize {
        (((key >> 40) * self.blocks.len() as u64) >> 24) as usize
    }

    /// False if `key` is certainly none of its keys.
    pub fn may_hold(&self, key: u64) -> bool {
        let Some(words) = self.blocks.get(self.block(key)) else { return true };
        words.iter().zip(bits(key)).all(|(word, bit)| word & bit != 0)
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.blocks.len() * 32
    }
}

fn bits(key: u64) -> impl Iterator<Item = u32> {
    (0..8).map(move |word| 1u32 << ((key >> (5 * word)) & 31))
}

fn filter_blocks(keys: u64) -> u64 {
    (keys * BITS_A_KEY).div_ceil(BLOCK_BITS)
}

/// Check value of a partition's filter: bound to its run by the key, and to its place in it.
fn filter_check(key: &[u8; 32], partition: u64, bytes: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(bytes).update(b"filter").update(&partition.to_le_bytes());
    short(hasher.finalize())
}

fn short(hash: blake3::Hash) -> [u8; 16] {
    let mut short = [0u8; 16];
    short.copy_from_slice(&hash.as_bytes()[..16]);
    short
}

/// What header and trailer say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunEnds {
    of: PagesOf,
    /// The pool.
    pub pool: PoolId,
    /// Its number; equals the file name.
    pub number: u64,
    /// Entries in all pages.
    pub entries: u64,
    /// Number of the last record when it was written.
    pub witnessed: u64,
    packs: u32,
    superseded: u32,
    pages: u32,
    /// Bytes that the tail has besides.
    more: u64,
    tail_at: u64,
    tail_hash: [u8; 32],
    raw_header: [u8; HEADER],
}

/// Key generation of the file with this header, of which nothing is proved yet.
pub fn generation(of: PagesOf, header: &[u8; HEADER]) -> Result<u16, FormatError> {
    check_head(header, of.magic())?;
    u16_at(header, 12)
}

impl RunEnds {
    /// Header and trailer of a file of `length` bytes, under the run's key.
    pub fn decode(
        of: PagesOf,
        key: &[u8; 32],
        header: &[u8; HEADER],
        trailer: &[u8; TRAILER],
        length: u64,
    ) -> Result<RunEnds, FormatError> {
        check_head(header, of.magic())?;
        let at = length.saturating_sub(TRAILER as u64);
        if trailer[..8] != *of.end() {
            return Err(FormatError::at(at, "no trailer: the run is cut off or overwritten"));
        }
        let mut hasher = blake3::Hasher::new_keyed(key);
        hasher.update(header).update(&trailer[..80]);
        if short(hasher.finalize()) != trailer[80..] {
            return Err(FormatError::at(at, "header and trailer of the run do not fit their hash"));
        }
        let reserved = if of == PagesOf::Counts { 44 } else { 36 };
        if header[14..16] != [0; 2]
            || header[40..] != [0; 24]
            || trailer[reserved..48].iter().any(|&byte| byte != 0)
        {
            return Err(FormatError::at(12, "reserved bytes are not zero"));
        }
        let mut ends = RunEnds {
            of,
            pool: PoolId(take(header, 16)?),
            number: u64_at(header, 32)?,
            entries: u64_at(trailer, 8)?,
            packs: u32_at(trailer, 16)?,
            superseded: u32_at(trailer, 20)?,
            pages: u32_at(trailer, 24)?,
            witnessed: u64_at(trailer, 28)?,
            more: u64_at(trailer, 36)?,
            tail_at: 0,
            tail_hash: take(trailer, 48)?,
            raw_header: *header,
        };
        let tail = ends.tail_bytes();
        let expected = (u64::from(ends.pages) == ends.entries.div_ceil(PAGE_ENTRIES as u64))
            .then(|| ends.pages_end().saturating_add(tail));
        if expected != Some(at) || tail > MAX_TAIL {
            return Err(FormatError::at(
                at,
                format!("{} entries in {} pages in a file of {length} bytes", ends.entries, ends.pages),
            ));
        }
        ends.tail_at = at - tail;
        Ok(ends)
    }

    fn tail_bytes(&self) -> u64 {
        let listed = u64::from(self.packs) * 48 + u64::from(self.superseded) * 8 + u64::from(self.pages) * 8;
        listed.saturating_add(if self.of == PagesOf::Counts { self.more } else { 0 })
    }

    /// Where the last filter ends. `pages` has 32 bits, so nothing here overflows.
    fn pages_end(&self) -> u64 {
        let full = self.entries / PARTITION_ENTRIES;
        let rest = self.entries % PARTITION_ENTRIES;
        let last = rest.div_ceil(PAGE_ENTRIES as u64) * PAGE as u64;
        self.of.partition_at(full) + last + if rest > 0 { self.of.filter_bytes(rest) } else { 0 }
    }

    /// Where the tail is, and its bytes.
    pub fn tail(&self) -> (u64, u64) {
        (self.tail_at, self.tail_bytes())
    }
}

/// All of a run but its pages and filters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunHead {
    /// Header and trailer.
    pub ends: RunEnds,
    /// The packs it covers.
    pub packs: Vec<RunPack>,
    /// Runs that it replaces; of a file of counts, those that it stands on.
    pub superseded: Vec<u64>,
    /// First 8 bytes of the first id of each page.
    pub fences: Vec<u64>,
    /// What the tail of a file of counts has besides.
    pub more: Vec<u8>,
}

impl RunHead {
    /// The tail in `bytes`.
    pub fn decode(key: &[u8; 32], ends: RunEnds, bytes: &[u8]) -> Result<RunHead, FormatError> {
        let mut hasher = blake3::Hasher::new_keyed(key);
        hasher.update(&ends.raw_header).update(bytes);
        if bytes.len() as u64 != ends.tail_bytes() || *hasher.finalize().as_bytes() != ends.tail_hash {
            return Err(FormatError::at(ends.tail_at, "the run's tail does not fit its hash"));
        }
        let mut head = RunHead {
            ends,
            packs: Vec::with_capacity(ends.packs as usize),
            superseded: Vec::with_capacity(ends.superseded as usize),
            fences: Vec::with_capacity(ends.pages as usize),
            more: Vec::new(),
        };
        let mut at = 0;
        for _ in 0..ends.packs {
            let kind = PackKind::of(u16_at(bytes, at + 32)?)
                .ok_or_else(|| FormatError::at(ends.tail_at + at as u64, "unknown kind of pack"))?;
            head.packs.push(RunPack {
                pack: PackId(take(bytes, at)?),
                domain: DomainId(take(bytes, at + 16)?),
                kind,
                generation: u16_at(bytes, at + 34)?,
                length: u64_at(bytes, at + 40)?,
            });
            at += 48;
        }
        for _ in 0..ends.superseded {
            head.superseded.push(u64_at(bytes, at)?);
            at += 8;
        }
        for _ in 0..ends.pages {
            head.fences.push(u64_at(bytes, at)?);
            at += 8;
        }
        head.more.extend_from_slice(bytes.get(at..).unwrap_or_default());
        Ok(head)
    }

    /// Pages.
    pub fn pages(&self) -> u64 {
        self.fences.len() as u64
    }

    /// Partitions.
    pub fn partitions(&self) -> u64 {
        self.pages().div_ceil(PARTITION_PAGES)
    }

    /// Where page `page` stands.
    pub fn page_at(&self, page: u64) -> u64 {
        self.ends.of.partition_at(page / PARTITION_PAGES) + page % PARTITION_PAGES * PAGE as u64
    }

    /// Pages that stand one after another from page `from` on, at most `most`.
    pub fn pages_together(&self, from: u64, most: u64) -> u64 {
        let end = (from / PARTITION_PAGES + 1) * PARTITION_PAGES;
        end.min(self.pages()).saturating_sub(from).min(most)
    }

    fn partition_keys(&self, partition: u64) -> u64 {
        self.ends.entries.saturating_sub(partition * PARTITION_ENTRIES).min(PARTITION_ENTRIES)
    }

    /// Whether there are filters.
    pub fn has_filters(&self) -> bool {
        self.ends.of == PagesOf::Places
    }

    /// Where the filter of a partition stands, and its bytes, check included.
    pub fn filter_at(&self, partition: u64) -> (u64, u64) {
        let keys = self.partition_keys(partition);
        let pages = keys.div_ceil(PAGE_ENTRIES as u64);
        (self.ends.of.partition_at(partition) + pages * PAGE as u64, self.ends.of.filter_bytes(keys))
    }

    /// The filter of a partition.
    pub fn decode_filter(&self, key: &[u8; 32], partition: u64, bytes: &[u8]) -> Result<Filter, FormatError> {
        let (at, length) = self.filter_at(partition);
        let (content, check) = bytes.split_at_checked(bytes.len().saturating_sub(16)).unwrap_or_default();
        if bytes.len() as u64 != length || filter_check(key, partition, content) != *check {
            return Err(FormatError::at(at, "the filter does not fit its hash"));
        }
        let (blocks, _) = content.as_chunks::<32>();
        let block = |bytes: &[u8; 32]| {
            let mut words = [0u32; 8];
            let (parts, _) = bytes.as_chunks::<4>();
            words.iter_mut().zip(parts).for_each(|(word, part)| *word = u32::from_le_bytes(*part));
            words
        };
        Ok(Filter { blocks: blocks.iter().map(block).collect() })
    }

    /// Page `page` in `bytes`, checked.
    pub fn decode_page<'b>(
        &self,
        key: &[u8; 32],
        page: u64,
        bytes: &'b [u8; PAGE],
    ) -> Result<Page<'b>, FormatError> {
        let wrong = |reason| FormatError::at(self.page_at(page), reason);
        if short(blake3::keyed_hash(key, &bytes[..CHECKED])) != bytes[CHECKED..] {
            return Err(wrong("the page does not fit its hash"));
        }
        if u64_at(bytes, PAGE_ENTRIES * ENTRY)? != page {
            return Err(wrong("the page is another one of this run"));
        }
        let present = self.ends.entries.saturating_sub(page * PAGE_ENTRIES as u64);
        Ok(Page { bytes, present: present.min(PAGE_ENTRIES as u64) as usize })
    }
}

/// A checked page.
pub struct Page<'b> {
    bytes: &'b [u8; PAGE],
    present: usize,
}

impl Page<'_> {
    /// Entries.
    pub fn len(&self) -> usize {
        self.present
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.present == 0
    }

    /// Entry `at`.
    pub fn entry(&self, at: usize) -> Option<RunEntry> {
        if at >= self.present {
            return None;
        }
        let raw = self.bytes.get(at * ENTRY..)?.first_chunk::<ENTRY>()?;
        Some(RunEntry {
            id: ChunkId(*raw.first_chunk()?),
            pack: u32::from_le_bytes([raw[16], raw[17], raw[18], 0]),
            location: u32::from_le_bytes([raw[19], raw[20], raw[21], 0]),
        })
    }

    /// Position of the first entry whose id is not below `id`.
    pub fn position(&self, id: &ChunkId) -> usize {
        let (mut from, mut to) = (0, self.present);
        while from < to {
            let middle = from.midpoint(to);
            let is_below =
                self.bytes.get(middle * ENTRY..middle * ENTRY + 16).is_some_and(|at| *at < id.0[..]);
            if is_below { from = middle + 1 } else { to = middle }
        }
        from
    }
}

/// A run being written, as bytes for the end of a file: [`RunWriter::push`] entries in order, [`RunWriter::take`] what
/// is ready now and then, and [`RunWriter::finish`].
pub struct RunWriter {
    of: PagesOf,
    key: [u8; 32],
    header: [u8; HEADER],
    ready: Vec<u8>,
    page: Vec<u8>,
    entries: u64,
    fences: Vec<u64>,
    keys: Vec<u64>,
}

impl RunWriter {
    /// Begins run `number`; `key` is of key generation `generation`.
    pub fn new(of: PagesOf, key: [u8; 32], generation: u16, pool: PoolId, number: u64) -> RunWriter {
        let mut header = [0u8; HEADER];
        header[..12].copy_from_slice(&head(of.magic()));
        header[12..14].copy_from_slice(&generation.to_le_bytes());
        header[16..32].copy_from_slice(&pool.0);
        header[32..40].copy_from_slice(&number.to_le_bytes());
        RunWriter {
            of,
            key,
            header,
            ready: header.to_vec(),
            page: Vec::with_capacity(PAGE),
            entries: 0,
            fences: Vec::new(),
            keys: Vec::new(),
        }
    }

    /// Adds an entry; they ascend. False if it does not fit the format.
    #[must_use]
    pub fn push(&mut self, entry: &RunEntry) -> bool {
        if entry.pack as usize >= MAX_PACKS || entry.location >= LOCATION_END {
            return false;
        }
        if self.page.is_empty() {
            self.fences.push(prefix(&entry.id));
        }
        self.page.extend_from_slice(&entry.id.0);
        self.page.extend_from_slice(&entry.pack.to_le_bytes()[..3]);
        self.page.extend_from_slice(&entry.location.to_le_bytes()[..3]);
        if self.of == PagesOf::Places {
            self.keys.push(filter_key(&entry.id));
        }
        self.entries += 1;
        if self.page.len() == PAGE_ENTRIES * ENTRY {
            self.end_page();
            if self.entries.is_multiple_of(PARTITION_ENTRIES) {
                self.end_partition();
            }
        }
        true
    }

    fn end_page(&mut self) {
        if self.page.is_empty() {
            return;
        }
        let number = self.fences.len() as u64 - 1;
        self.page.resize(PAGE_ENTRIES * ENTRY, 0);
        self.page.extend_from_slice(&number.to_le_bytes());
        self.page.resize(CHECKED, 0);
        let check = short(blake3::keyed_hash(&self.key, &self.page));
        self.ready.extend_from_slice(&self.page);
        self.ready.extend_from_slice(&check);
        self.page.clear();
    }

    fn end_partition(&mut self) {
        if self.keys.is_empty() {
            return;
        }
        let partition = (self.fences.len() as u64 - 1) / PARTITION_PAGES;
        let begin = self.ready.len();
        for block in &Filter::of(&self.keys).blocks {
            block.iter().for_each(|word| self.ready.extend_from_slice(&word.to_le_bytes()));
        }
        let check = filter_check(&self.key, partition, &self.ready[begin..]);
        self.ready.extend_from_slice(&check);
        self.keys.clear();
    }

    /// Bytes that can be taken.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Gives the bytes so far to `write` and forgets them.
    pub fn take<E>(&mut self, write: impl FnOnce(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let written = write(&self.ready);
        self.ready.clear();
        written
    }

    /// Ends the run; the last bytes are ready then. `witnessed` is the number of the last record; `more` is for files of
    /// counts.
    pub fn finish(&mut self, packs: &[RunPack], superseded: &[u64], witnessed: u64, more: &[u8]) {
        self.end_page();
        self.end_partition();
        let begin = self.ready.len();
        for pack in packs {
            self.ready.extend_from_slice(&pack.pack.0);
            self.ready.extend_from_slice(&pack.domain.0);
            self.ready.extend_from_slice(&(pack.kind as u16).to_le_bytes());
            self.ready.extend_from_slice(&pack.generation.to_le_bytes());
            self.ready.extend_from_slice(&[0; 4]);
            self.ready.extend_from_slice(&pack.length.to_le_bytes());
        }
        superseded.iter().for_each(|number| self.ready.extend_from_slice(&number.to_le_bytes()));
        self.fences.iter().for_each(|fence| self.ready.extend_from_slice(&fence.to_le_bytes()));
        self.ready.extend_from_slice(more);
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&self.header).update(&self.ready[begin..]);
        let tail_hash = hasher.finalize();
        let mut trailer = [0u8; TRAILER];
        trailer[..8].copy_from_slice(self.of.end());
        trailer[8..16].copy_from_slice(&self.entries.to_le_bytes());
        trailer[16..20].copy_from_slice(&(packs.len() as u32).to_le_bytes());
        trailer[20..24].copy_from_slice(&(superseded.len() as u32).to_le_bytes());
        trailer[24..28].copy_from_slice(&(self.fences.len() as u32).to_le_bytes());
        trailer[28..36].copy_from_slice(&witnessed.to_le_bytes());
        trailer[36..44].copy_from_slice(&(more.len() as u64).to_le_bytes());
        trailer[48..80].copy_from_slice(tail_hash.as_bytes());
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&self.header).update(&trailer[..80]);
        trailer[80..].copy_from_slice(&short(hasher.finalize()));
        self.ready.extend_from_slice(&trailer);
    }
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

/// Name of the file of counts `number` in the pool's folder.
pub fn counts_name(number: u64) -> String {
    format!("index/{number:016x}.counts")
}

/// Number of a file of counts by the last part of its name.
pub fn counts_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".counts")?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}
