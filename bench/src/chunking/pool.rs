//! A pool that is only counted: chunks, frames and the map of one disk, under one scheme.

use std::collections::{BTreeMap, HashMap};

use crate::cpu_seconds;
use crate::encode::{Decoder, Early, Encoder, Frame, Level, stored};
use crate::workload::{BLOCK, Block, Version};

/// How a disk is cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cut {
    /// At multiples of so many bytes.
    Fixed(usize),
    /// Where the content says so; this long on average.
    Content(usize),
    /// Fixed blocks of 64 KiB. Of one that has changed in up to half of its 4 KiB pages, only the pages that differ from
    /// the block stored whole before (`chained`: from the day before, over what other days left).
    Pages { chained: bool },
    /// The same blocks; a changed one as a zstd frame with the block stored whole before as its dictionary.
    Patch,
}

/// Everything that a scheme decides.
#[derive(Debug, Clone, Copy)]
pub struct Scheme {
    pub cut: Cut,
    /// Most chunks of a frame.
    pub frame: usize,
    /// Whether a frame takes chunks that do not lie side by side on the disk.
    pub scattered: bool,
    pub level: Level,
    pub early: Early,
    /// Bytes of a dictionary trained on the first disk; 0 for none.
    pub dictionary: usize,
}

type Id = [u8; 16];

/// Frame, and piece in it.
type Place = (u32, u16);

/// What must be read for a chunk: where it is, or its base and what is laid over it.
#[derive(Clone)]
struct Found {
    parts: Vec<Place>,
    is_patch: bool,
}

/// A chunk costs this much besides its frame: an entry of the pack's table, of the map and of the index.
const TABLE: u64 = 20;
const MAP: u64 = 16;
pub const INDEX: u64 = 24;

#[derive(Debug, Default, Clone, Copy)]
pub struct Day {
    pub stored: u64,
    pub chunks: u64,
    pub cut_seconds: f64,
    pub hash_seconds: f64,
    pub encode_seconds: f64,
    pub plain: u64,
}

/// A piece that waits for its frame.
struct Waiting {
    place: u64,
    id: Option<Id>,
    plain: Vec<u8>,
}

pub struct Pool {
    scheme: Scheme,
    encoder: Encoder,
    dictionary: Vec<u8>,
    frames: Vec<Frame>,
    known: HashMap<Id, Found>,
    /// Chunks of the disk at hand, by their first byte.
    map: BTreeMap<u64, (u32, Id)>,
    /// Of each block, what was stored whole of it last.
    whole: HashMap<usize, (Block, Id)>,
    waiting: Vec<Waiting>,
    day: Day,
    keep: bool,
}

/// Random and sequential reading, in bytes decoded and seconds of a thread.
#[derive(Debug, Default, Clone, Copy)]
pub struct Reads {
    pub decoded_whole: f64,
    pub decoded_prefix: f64,
    pub whole_per_second: f64,
    pub prefix_per_second: f64,
    pub sequential: f64,
}

fn id_of(bytes: &[u8]) -> Id {
    let mut id = [0; 16];
    id.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    id
}

const PAGE: usize = 4096;

fn pages(old: &[u8], new: &[u8]) -> Vec<usize> {
    old.chunks(PAGE).zip(new.chunks(PAGE)).enumerate().filter(|(_, (a, b))| a != b).map(|(n, _)| n).collect()
}

impl Pool {
    pub fn new(scheme: Scheme, dictionary: Vec<u8>) -> Result<Pool, String> {
        Ok(Pool {
            scheme,
            encoder: Encoder::new(scheme.level, scheme.early, &dictionary)?,
            dictionary,
            frames: Vec::new(),
            known: HashMap::new(),
            map: BTreeMap::new(),
            whole: HashMap::new(),
            waiting: Vec::new(),
            day: Day::default(),
            keep: true,
        })
    }

    /// Another disk comes; chunks stay known. The bytes of frames are kept for reading only if `keep`.
    pub fn next_disk(&mut self, keep: bool) {
        self.map.clear();
        self.whole.clear();
        self.keep = keep;
        if !keep {
            self.frames.iter_mut().for_each(|frame| frame.sealed = Vec::new());
        }
    }

    /// Stores what a day changed.
    pub fn store(&mut self, version: &Version, before: Option<&Version>) -> Result<Day, String> {
        self.day = Day { plain: (version.changed.len() * BLOCK) as u64, ..Day::default() };
        match self.scheme.cut {
            Cut::Fixed(bytes) if bytes <= BLOCK => {
                for &index in &version.changed {
                    let Some(block) = &version.blocks[index] else { continue };
                    for (n, part) in block.chunks(bytes).enumerate() {
                        self.chunk((index * BLOCK + n * bytes) as u64, part)?;
                    }
                }
            }
            Cut::Fixed(bytes) => {
                let many = bytes / BLOCK;
                let mut groups: Vec<usize> = version.changed.iter().map(|index| index / many).collect();
                groups.dedup();
                for group in groups {
                    let joined = join(
                        &version.blocks[group * many..][..many.min(version.blocks.len() - group * many)],
                    );
                    self.chunk((group * bytes) as u64, &joined)?;
                }
            }
            Cut::Content(average) => self.store_content(version, before, average)?,
            Cut::Pages { .. } | Cut::Patch => self.store_changes(version, before)?,
        }
        self.flush()?;
        Ok(self.day)
    }

    /// Runs of content, cut at multiples of 64 MiB so that they need little memory; those that are as they were give the
    /// chunks that they gave, and are passed over.
    fn store_content(
        &mut self,
        version: &Version,
        before: Option<&Version>,
        average: usize,
    ) -> Result<(), String> {
        const MOST: usize = (64 << 20) / BLOCK;
        let blocks = &version.blocks;
        let mut first = 0;
        while first < blocks.len() {
            if blocks[first].is_none() {
                first += 1;
                continue;
            }
            let mut end = first + 1;
            while end < blocks.len() && blocks[end].is_some() && end % MOST != 0 {
                end += 1;
            }
            let is_edge = |old: &Version, index: usize| old.blocks.get(index).is_none_or(Option::is_none);
            let same = before.is_some_and(|old| {
                let touched = version.changed.partition_point(|&index| index < first);
                version.changed.get(touched).is_none_or(|&index| index >= end)
                    && (first % MOST == 0 || is_edge(old, first - 1))
                    && (end % MOST == 0 || is_edge(old, end))
            });
            if !same {
                let joined = join(&blocks[first..end]);
                let start = (first * BLOCK) as u64;
                let old: Vec<u64> =
                    self.map.range(start..(end * BLOCK) as u64).map(|(place, _)| *place).collect();
                for place in old {
                    self.map.remove(&place);
                }
                let began = cpu_seconds();
                let cuts: Vec<_> =
                    fastcdc::v2020::FastCDC::new(&joined, average / 4, average, average * 4).collect();
                self.day.cut_seconds += cpu_seconds() - began;
                for cut in cuts {
                    self.chunk(start + cut.offset as u64, &joined[cut.offset..cut.offset + cut.length])?;
                }
            }
            first = end;
        }
        Ok(())
    }

    fn store_changes(&mut self, version: &Version, before: Option<&Version>) -> Result<(), String> {
        for &index in &version.changed {
            let Some(block) = &version.blocks[index] else { continue };
            let place = (index * BLOCK) as u64;
            let began = cpu_seconds();
            let id = id_of(block);
            self.day.hash_seconds += cpu_seconds() - began;
            self.map.insert(place, (BLOCK as u32, id));
            if self.known.contains_key(&id) {
                continue;
            }
            let chained = self.scheme.cut == Cut::Pages { chained: true };
            let base = if chained {
                before
                    .and_then(|old| old.blocks.get(index).cloned().flatten())
                    .map(|old| (id_of(&old), old))
                    .filter(|(id, _)| self.known.contains_key(id))
                    .map(|(id, old)| (old, id))
            } else {
                self.whole.get(&index).cloned()
            };
            let Some((base, base_id)) = base else {
                self.whole.insert(index, (block.clone(), id));
                self.chunk(place, block)?;
                continue;
            };
            let began = cpu_seconds();
            let different = pages(&base, block);
            let few = different.len() <= BLOCK / PAGE / 2;
            self.day.cut_seconds += cpu_seconds() - began;
            let patch = self.scheme.cut == Cut::Patch && different.len() < BLOCK / PAGE;
            if !few && !patch {
                self.whole.insert(index, (block.clone(), id));
                self.chunk(place, block)?;
                continue;
            }
            // The base's frame must be there before what refers to it.
            if self.known.get(&base_id).is_some_and(|found| found.parts.is_empty()) {
                self.flush()?;
            }
            let mut parts = self.known.get(&base_id).map(|found| found.parts.clone()).unwrap_or_default();
            if patch {
                let began = cpu_seconds();
                let frame = self.encoder.patch(&base, block)?;
                self.day.encode_seconds += cpu_seconds() - began;
                parts.push((self.frames.len() as u32, 0));
                self.known.insert(id, Found { parts, is_patch: true });
                self.day.chunks += 1;
                self.day.stored += stored(frame.sealed.len()) + TABLE + 2 * MAP;
                self.push(frame);
                continue;
            }
            self.known.insert(id, Found { parts, is_patch: false });
            let mut plain = Vec::with_capacity(different.len() * PAGE);
            different.iter().for_each(|&n| plain.extend_from_slice(&block[n * PAGE..(n + 1) * PAGE]));
            // Its name, and two bytes that say which pages these are.
            self.day.stored += MAP + 2;
            self.wait(Waiting { place, id: Some(id), plain })?;
        }
        Ok(())
    }

    fn chunk(&mut self, place: u64, plain: &[u8]) -> Result<(), String> {
        if plain.iter().all(|&byte| byte == 0) {
            self.map.remove(&place);
            return Ok(());
        }
        let began = cpu_seconds();
        let id = id_of(plain);
        self.day.hash_seconds += cpu_seconds() - began;
        self.map.insert(place, (plain.len() as u32, id));
        if self.known.contains_key(&id) {
            return Ok(());
        }
        self.known.insert(id, Found { parts: Vec::new(), is_patch: false });
        self.wait(Waiting { place, id: Some(id), plain: plain.to_vec() })
    }

    fn wait(&mut self, waiting: Waiting) -> Result<(), String> {
        let adjacent =
            self.waiting.last().is_some_and(|last| last.place + last.plain.len() as u64 == waiting.place);
        // Pages of a block are no chunk: a frame takes as many bytes of them as it takes of blocks.
        let is_full = match self.scheme.cut {
            Cut::Pages { .. } => {
                let held: usize = self.waiting.iter().map(|waiting| waiting.plain.len()).sum();
                held + waiting.plain.len() > self.scheme.frame * BLOCK || self.waiting.len() >= 16
            }
            _ => self.waiting.len() == self.scheme.frame,
        };
        if !self.waiting.is_empty() && (is_full || !(adjacent || self.scheme.scattered)) {
            self.flush()?;
        }
        self.waiting.push(waiting);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), String> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let number = self.frames.len() as u32;
        let mut plain = Vec::new();
        let mut lengths = Vec::new();
        for (slot, waiting) in std::mem::take(&mut self.waiting).into_iter().enumerate() {
            if let Some(found) = waiting.id.and_then(|id| self.known.get_mut(&id)) {
                found.parts.push((number, slot as u16));
            }
            lengths.push(waiting.plain.len() as u32);
            plain.extend_from_slice(&waiting.plain);
        }
        self.day.chunks += lengths.len() as u64;
        self.day.stored += lengths.len() as u64 * (TABLE + MAP);
        let began = cpu_seconds();
        let frame = self.encoder.frame(plain, lengths)?;
        self.day.encode_seconds += cpu_seconds() - began;
        self.day.stored += stored(frame.sealed.len());
        self.push(frame);
        Ok(())
    }

    fn push(&mut self, mut frame: Frame) {
        if !self.keep {
            frame.sealed = Vec::new();
        }
        self.frames.push(frame);
    }

    /// Reads `version`, the last day that was stored, at 2,000 random pages and then from one end to the other.
    pub fn read(&self, version: &Version) -> Result<Reads, String> {
        const MANY: usize = 2000;
        let held: Vec<usize> =
            (0..version.blocks.len()).filter(|&index| version.blocks[index].is_some()).collect();
        let mut random = 1u64;
        let mut places = Vec::with_capacity(MANY);
        while places.len() < MANY {
            // Numerical Recipes' generator: any spread over the disk does.
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let index = held[(random >> 33) as usize % held.len()];
            let page = (random >> 20) as usize % (BLOCK / PAGE);
            places.push((index * BLOCK + page * PAGE) as u64);
        }
        let mut decoder = Decoder::new(&self.dictionary)?;
        let mut reads = Reads::default();
        for prefix in [false, true] {
            let mut decoded = 0;
            let began = cpu_seconds();
            for &place in &places {
                let Some((start, (length, id))) = self.map.range(..=place).next_back() else { continue };
                if place < start + u64::from(*length) {
                    decoded += self.read_chunk(&mut decoder, id, *length as usize, prefix, &mut None)?;
                }
            }
            let rate = MANY as f64 / (cpu_seconds() - began);
            let each = decoded as f64 / MANY as f64;
            if prefix {
                (reads.decoded_prefix, reads.prefix_per_second) = (each, rate);
            } else {
                (reads.decoded_whole, reads.whole_per_second) = (each, rate);
            }
        }
        let began = cpu_seconds();
        let mut bytes = 0u64;
        let mut last = None;
        for (length, id) in self.map.values() {
            self.read_chunk(&mut decoder, id, *length as usize, false, &mut last)?;
            bytes += u64::from(*length);
        }
        reads.sequential = bytes as f64 / (cpu_seconds() - began) / 1e6;
        Ok(reads)
    }

    /// Reads one chunk and proves it; `last` is the frame that is still decoded. Returns the bytes decoded.
    fn read_chunk(
        &self,
        decoder: &mut Decoder,
        id: &Id,
        length: usize,
        prefix: bool,
        last: &mut Option<(u32, Vec<u8>)>,
    ) -> Result<usize, String> {
        let found = self.known.get(id).ok_or("a chunk is not known")?;
        let mut decoded = 0;
        let mut block: Vec<u8> = Vec::new();
        for (n, &(number, slot)) in found.parts.iter().enumerate() {
            let frame = &self.frames[number as usize];
            let lengths = || frame.lengths.iter().map(|&length| length as usize);
            let start: usize = lengths().take(usize::from(slot)).sum();
            let end = start + frame.lengths[usize::from(slot)] as usize;
            if n > 0 && found.is_patch {
                block = decoder.patched(&block, frame)?;
                decoded += block.len();
                continue;
            }
            let part = match last {
                Some((held, plain)) if *held == number => plain[start..end].to_vec(),
                _ => {
                    let wanted = if prefix { end } else { lengths().sum() };
                    let plain = decoder.open(frame, wanted)?;
                    decoded += wanted;
                    let part = plain[start..end].to_vec();
                    if n == 0 {
                        *last = Some((number, plain));
                    }
                    part
                }
            };
            if n == 0 {
                block = part;
            } else {
                // Where each page goes costs nothing that could be measured.
                block[..part.len()].copy_from_slice(&part);
            }
        }
        let hash = id_of(&block);
        if found.parts.len() == 1 || found.is_patch {
            if hash != *id || block.len() != length {
                return Err("a chunk came back as something else".to_owned());
            }
        } else {
            std::hint::black_box(hash);
        }
        if !prefix && last.is_none() {
            std::hint::black_box(&block);
        }
        Ok(decoded)
    }

    pub fn chunks(&self) -> u64 {
        self.known.len() as u64
    }
}

fn join(blocks: &[Option<Block>]) -> Vec<u8> {
    let mut joined = Vec::with_capacity(blocks.len() * BLOCK);
    for block in blocks {
        match block {
            Some(block) => joined.extend_from_slice(block),
            None => joined.resize(joined.len() + BLOCK, 0),
        }
    }
    joined
}
