//! Writing and reading packs (section 6).

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use environment::{Files, NewFile, ReadFile};
use model::{DomainId, PoolId};

use crate::chunk::{ChunkId, Location, PackId};
use crate::error::PoolError;
use crate::format::pack::{
    self, FRAME_HEADER, FrameHeader, HEADER, PackHeader, PackKind, TableEntry, Trailer,
};
use crate::format::parity::Layout;
use crate::format::{FormatError, short_hash};
use crate::frame;
use crate::keys::{DomainKeys, Keys, SealKey, frame_nonce, table_nonce};
use crate::parity::{self, Parity, ReadAt, Rebuilder};
use crate::rebuilt::Rebuilt;
use crate::sequence::{self, Unpublished};

/// A pack is finished when it has grown to this: large enough that its sync costs little, small enough that a cut
/// loses little and a rewrite moves little.
pub const PACK_BYTES: u64 = 32 << 20;

/// A pack being written.
pub struct PackWriter {
    files: Arc<dyn Files>,
    header: PackHeader,
    raw_header: [u8; HEADER],
    key: SealKey,
    file: Box<dyn NewFile>,
    length: u64,
    frames: u32,
    table: Vec<TableEntry>,
    /// Parity that it gets, in percent of its bytes.
    pub(crate) parity: u32,
}

/// A pack that is durable.
#[derive(Debug, Clone)]
pub struct FinishedPack {
    /// Its header.
    pub header: PackHeader,
    /// Bytes of its file.
    pub length: u64,
    /// Of these, bytes up to the end of its trailer; its parity is behind them.
    pub content: u64,
    /// Its chunks.
    pub table: Vec<TableEntry>,
    /// Sectors of header, table and trailer that were rebuilt from parity to read this.
    pub rebuilt: BTreeSet<u32>,
}

impl PackWriter {
    /// Begins a pack, under an id of [`crate::Pool::new_pack`]. It has no name until it is finished.
    pub fn begin(
        files: Arc<dyn Files>,
        pool: PoolId,
        keys: &DomainKeys,
        kind: PackKind,
        id: PackId,
    ) -> Result<PackWriter, PoolError> {
        let name = pack::name(id);
        let failed = |source| PoolError::io(files.display(&name), "create", source);
        let mut file = files.create(&name).map_err(failed)?;
        let generation = keys.generation();
        let header = PackHeader { kind, generation, pool, domain: keys.domain, pack: id };
        let raw_header = header.encode();
        file.append(&raw_header).map_err(failed)?;
        let key = keys.pack(generation, id)?;
        Ok(PackWriter {
            files,
            header,
            raw_header,
            key,
            file,
            length: HEADER as u64,
            frames: 0,
            table: Vec::new(),
            parity: 0,
        })
    }

    /// The pack's id.
    pub fn id(&self) -> PackId {
        self.header.pack
    }

    /// Bytes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of the parity that it would get now.
    pub(crate) fn parity_bytes(&self) -> u64 {
        let layout = Layout::new(self.length, self.parity).filter(|_| self.parity > 0);
        layout.map_or(0, |layout| layout.file() - layout.content)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), PoolError> {
        self.file.append(bytes).map_err(|source| {
            PoolError::io(self.files.display(&pack::name(self.header.pack)), "write", source)
        })?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Seals and appends a frame holding `ids`; `encoded` decodes to `decoded` bytes. Returns where each chunk is.
    pub fn put(
        &mut self,
        codec: u8,
        encoded: &[u8],
        decoded: u32,
        ids: &[ChunkId],
    ) -> Result<Vec<Location>, PoolError> {
        if ids.is_empty() || ids.len() > pack::MAX_CHUNKS || decoded > pack::MAX_DECODED {
            return Err(PoolError::Misuse(format!("a frame of {} chunks, {decoded} bytes", ids.len())));
        }
        let offset = self.length;
        if offset >= u64::from(crate::chunk::FRAMES_END)
            || encoded.len() > pack::MAX_STORED as usize - crate::keys::TAG
        {
            return Err(PoolError::Misuse(format!("a frame of {} bytes at byte {offset}", encoded.len())));
        }
        let mut header = FrameHeader {
            stored: (encoded.len() + crate::keys::TAG) as u32,
            codec,
            chunks: ids.len() as u8,
            decoded,
            hash: [0; 16],
        };
        let aad: [u8; 16] = super::format::take(&header.encode(), 0).unwrap_or_default();
        let mut bytes = Vec::with_capacity(FRAME_HEADER + encoded.len() + 32);
        bytes.extend_from_slice(encoded);
        self.key.seal(frame_nonce(offset), &aad, &mut bytes)?;
        header.hash = short_hash(&[&bytes]);
        self.append(&header.encode())?;
        bytes.resize((pack::frame_span(header.stored) as usize) - FRAME_HEADER, 0);
        self.append(&bytes)?;
        self.frames += 1;
        let mut places = Vec::with_capacity(ids.len());
        for (slot, &id) in ids.iter().enumerate() {
            let place = Location::new(self.header.pack, offset as u32, slot);
            self.table.push(TableEntry { id, location: place.at });
            places.push(place);
        }
        Ok(places)
    }

    /// Bytes of an appended frame, for a reader that cannot wait for the pack's name.
    pub fn read_frame(&self, location: Location) -> Result<(FrameHeader, Vec<u8>), PoolError> {
        let path = || self.files.display(&pack::name(self.header.pack));
        let read = |at: u64, buf: &mut [u8]| {
            self.file.read_exact_at(at, buf).map_err(|source| PoolError::io(path(), "read", source))
        };
        open_frame(&self.key, location.frame(), read).map_err(|failure| failure.in_file(path()))
    }

    /// Writes table and trailer and makes the pack durable.
    pub(crate) fn finish(mut self) -> Result<FinishedPack, Unpublished> {
        self.end().map_err(Unpublished::Failed)?;
        let content = self.length;
        if self.parity > 0 {
            self.length += parity::append(&mut *self.file, content, self.parity).map_err(|source| {
                let path = self.files.display(&pack::name(self.header.pack));
                Unpublished::Failed(PoolError::io(path, "write the parity of", source))
            })?;
        }
        sequence::publish_file(&*self.files, &pack::name(self.header.pack), self.file)?;
        Ok(FinishedPack {
            header: self.header,
            length: self.length,
            content,
            table: self.table,
            rebuilt: BTreeSet::new(),
        })
    }

    fn end(&mut self) -> Result<(), PoolError> {
        let table_offset = self.length;
        let mut table = pack::encode_table(&self.table);
        self.key.seal(table_nonce(table_offset), &self.raw_header, &mut table)?;
        let trailer = Trailer {
            table_offset,
            table_stored: table.len() as u32,
            chunks: self.table.len() as u32,
            frames: self.frames,
        };
        self.append(&table)?;
        self.append(&trailer.encode(&self.raw_header, &table))
    }
}

/// Why a frame cannot be had.
pub(crate) enum FrameFailure {
    Format(FormatError),
    Pool(PoolError),
}

impl FrameFailure {
    pub(crate) fn in_file(self, path: String) -> PoolError {
        match self {
            FrameFailure::Format(error) => error.in_file(path),
            FrameFailure::Pool(error) => error,
        }
    }
}

/// Reads, checks and unseals the frame at `offset`; gives the encoded bytes.
fn open_frame(
    key: &SealKey,
    offset: u32,
    read: impl Fn(u64, &mut [u8]) -> Result<(), PoolError>,
) -> Result<(FrameHeader, Vec<u8>), FrameFailure> {
    let at = u64::from(offset);
    let mut raw = [0u8; FRAME_HEADER];
    read(at, &mut raw).map_err(FrameFailure::Pool)?;
    let header = FrameHeader::decode(&raw, at).map_err(FrameFailure::Format)?;
    let mut bytes = vec![0u8; header.stored as usize];
    read(at + FRAME_HEADER as u64, &mut bytes).map_err(FrameFailure::Pool)?;
    // The tag proves more than the short hash does; the hash is for those without a key.
    let Some(plain) = key.open(frame_nonce(at), &raw[..16], &mut bytes) else {
        return Err(FrameFailure::Format(FormatError::at(
            at,
            "the seal of the frame does not fit its bytes",
        )));
    };
    let length = plain.len();
    bytes.truncate(length);
    Ok((header, bytes))
}

/// Frames decoded last, kept by a reader.
const CACHED_FRAMES: usize = 48;
/// Frames of a damaged pack that are asked of which key generation it is.
const PROBES: usize = 64;
/// Pack files kept open by a reader: a point that grew over a season lies in a hundred, and each opening proves a frame.
const OPEN_PACKS: usize = 256;

struct OpenPack {
    file: Box<dyn ReadFile>,
    key: SealKey,
    /// Of the key; of a pack of which no frame has proved it, the one that it claims.
    generation: u16,
    path: String,
    /// Read when a frame is damaged.
    parity: OnceLock<Parity>,
}

impl OpenPack {
    /// The pack's parity, if it has any. That it cannot be had is not remembered: one failed read is no damage.
    fn parity(&self) -> Option<&Parity> {
        if self.parity.get().is_none() {
            let length = self.file.len().ok()?;
            let loaded = Parity::load(&|at, buf| self.file.read_exact_at(at, buf), length)?;
            // Whoever was first is as right.
            let _ = self.parity.set(loaded);
        }
        self.parity.get()
    }

    /// The encoded bytes of the frame at `offset`, by a way to read the file.
    fn frame(&self, offset: u32, read: &ReadAt<'_>) -> Result<(FrameHeader, Vec<u8>), PoolError> {
        let read = |at: u64, buf: &mut [u8]| {
            read(at, buf).map_err(|source| match source.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    FormatError::at(at, "the pack ends before this byte").in_file(self.path.clone())
                }
                std::io::ErrorKind::InvalidData => {
                    FormatError::at(at, source.to_string()).in_file(self.path.clone())
                }
                _ => PoolError::io(self.path.clone(), "read", source),
            })
        };
        open_frame(&self.key, offset, read).map_err(|failure| failure.in_file(self.path.clone()))
    }
}

/// A decoded frame.
pub struct DecodedFrame {
    content: Vec<u8>,
    spans: Vec<std::ops::Range<usize>>,
}

impl DecodedFrame {
    /// Whether so much of it is decoded that place `slot` is there, if the frame has it.
    fn has(&self, slot: usize) -> bool {
        self.spans.get(slot).is_none_or(|span| span.end <= self.content.len())
    }

    /// The chunk in place `slot`.
    pub fn chunk(&self, slot: usize) -> Option<&[u8]> {
        self.spans.get(slot).and_then(|span| self.content.get(span.clone()))
    }
}

/// Keeps the last few of something, dropping the least recently used.
struct Recent<K, V> {
    capacity: usize,
    turn: u64,
    held: HashMap<K, (u64, V)>,
}

impl<K: std::hash::Hash + Eq + Copy, V: Clone> Recent<K, V> {
    fn new(capacity: usize) -> Recent<K, V> {
        Recent { capacity, turn: 0, held: HashMap::new() }
    }

    fn get(&mut self, key: &K) -> Option<V> {
        self.turn += 1;
        let turn = self.turn;
        self.held.get_mut(key).map(|(used, value)| {
            *used = turn;
            value.clone()
        })
    }

    fn put(&mut self, key: K, value: V) {
        if self.held.len() >= self.capacity
            && let Some(oldest) = self.held.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key)
        {
            self.held.remove(&oldest);
        }
        self.turn += 1;
        self.held.insert(key, (self.turn, value));
    }
}

/// Reads chunks out of packs, with a few files open and a few frames decoded.
pub struct PackReader {
    files: Arc<dyn Files>,
    keys: Keys,
    open: Mutex<Recent<PackId, Arc<OpenPack>>>,
    frames: Mutex<Recent<(PackId, u32), Arc<DecodedFrame>>>,
    /// What was read by its parity.
    pub(crate) rebuilt: Rebuilt,
}

impl PackReader {
    /// A reader of the packs in `files`.
    pub fn new(files: Arc<dyn Files>, keys: Keys) -> PackReader {
        PackReader {
            files,
            keys,
            open: Mutex::new(Recent::new(OPEN_PACKS)),
            frames: Mutex::new(Recent::new(CACHED_FRAMES)),
            rebuilt: Rebuilt::default(),
        }
    }

    /// The pack, for whoever reads the frame at `frame` of it.
    fn open(&self, pack: PackId, domain: DomainId, frame: u32) -> Result<Arc<OpenPack>, PoolError> {
        if let Some(found) = self.open.lock().unwrap_or_else(PoisonError::into_inner).get(&pack) {
            return Ok(found);
        }
        let name = pack::name(pack);
        let path = self.files.display(&name);
        let file = self.files.open(&name).map_err(|source| PoolError::io(path.clone(), "open", source))?;
        let (key, generation, is_proved) = self.key_of(&*file, pack, domain, [frame])?;
        let opened = Arc::new(OpenPack { file, key, generation, path, parity: OnceLock::new() });
        // Of what no frame has proved, the next frame is asked again.
        if is_proved {
            self.open.lock().unwrap_or_else(PoisonError::into_inner).put(pack, opened.clone());
        }
        Ok(opened)
    }

    /// Key of a pack with such frames, as far as its file tells it; see [`PackReader::key_of`].
    pub fn seal_key(
        &self,
        pack: PackId,
        domain: DomainId,
        frames: impl IntoIterator<Item = u32>,
    ) -> Result<SealKey, PoolError> {
        let name = pack::name(pack);
        let file = self.files.open(&name);
        let file = file.map_err(|source| PoolError::io(self.files.display(&name), "open", source))?;
        Ok(self.key_of(&*file, pack, domain, frames)?.0)
    }

    /// Key of a pack. Its header says of which generation; a header that is damaged or names none that is known does not
    /// keep the frames of the pack from being read, as they stand for themselves: the first one tells, or one of `frames`, as
    /// the first may lie in what is damaged too. Also gives the key's generation, and whether a frame proved it.
    fn key_of(
        &self,
        file: &dyn ReadFile,
        pack: PackId,
        domain: DomainId,
        frames: impl IntoIterator<Item = u32>,
    ) -> Result<(SealKey, u16, bool), PoolError> {
        let keys = self.keys.domain(domain);
        let generations: Vec<u16> = self.keys.roots().into_keys().collect();
        if let [only] = generations[..] {
            return Ok((keys.pack(only, pack)?, only, true));
        }
        let header = |read: &ReadAt<'_>| {
            let mut raw = [0u8; HEADER];
            read(0, &mut raw).ok().and_then(|()| PackHeader::decode(&raw).ok())
        };
        let as_stored = |at: u64, buf: &mut [u8]| file.read_exact_at(at, buf);
        let header = header(&as_stored).or_else(|| {
            let parity = Parity::load(&as_stored, file.len().ok()?)?;
            let rebuilder = Rebuilder::new(&parity, &as_stored);
            header(&|at, buf| rebuilder.read_at(at, buf))
        });
        let stated = header.map(|header| header.generation).filter(|generation| self.keys.knows(*generation));
        let read = |at: u64, buf: &mut [u8]| {
            file.read_exact_at(at, buf).map_err(|source| PoolError::io(String::new(), "read", source))
        };
        for frame in [HEADER as u32].into_iter().chain(frames.into_iter().take(PROBES)) {
            for generation in stated.iter().chain(generations.iter().rev()) {
                let key = keys.pack(*generation, pack)?;
                if open_frame(&key, frame, read).is_ok() {
                    return Ok((key, *generation, true));
                }
            }
        }
        let claimed = stated.unwrap_or_else(|| self.keys.generation());
        Ok((keys.pack(claimed, pack)?, claimed, false))
    }

    /// The encoded bytes of the frame at `location`; what is damaged is rebuilt from the pack's parity, if it has any.
    pub fn encoded(&self, location: Location, domain: DomainId) -> Result<(FrameHeader, Vec<u8>), PoolError> {
        let pack = self.open(location.pack, domain, location.frame())?;
        let frame = location.frame();
        let as_stored = |at: u64, buf: &mut [u8]| pack.file.read_exact_at(at, buf);
        let error = match pack.frame(frame, &as_stored) {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        let Some(parity) = pack.parity() else { return Err(error) };
        let rebuilder = Rebuilder::new(parity, &as_stored);
        match pack.frame(frame, &|at, buf| rebuilder.read_at(at, buf)) {
            Ok(found) => {
                self.rebuilt.note(location.pack, rebuilder.sectors());
                Ok(found)
            }
            Err(PoolError::Damaged { path, offset, reason }) => {
                let reason = match error {
                    PoolError::Damaged { reason: before, .. } if before != reason => {
                        format!("{before}; with its parity: {reason}")
                    }
                    _ => reason,
                };
                Err(PoolError::Damaged { path, offset, reason })
            }
            Err(_) => Err(error),
        }
    }

    /// The decoded frame at `location`, from the cache where it is. Its chunks are not compared with their ids yet. If not
    /// `whole` is wanted, what stands behind the chunk may be missing.
    pub fn decoded(
        &self,
        location: Location,
        domain: DomainId,
        kind: PackKind,
        whole: bool,
    ) -> Result<Arc<DecodedFrame>, PoolError> {
        let key = (location.pack, location.frame());
        let mut wanted = match kind {
            PackKind::Blocks if !whole => Some((location.slot() + 1) * frame::BLOCK),
            _ => None,
        };
        if let Some(found) = self.frames.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            if found.has(location.slot()) {
                return Ok(found);
            }
            // Its start was not enough: more of it is likely to be asked for.
            wanted = None;
        }
        let (header, encoded) = self.encoded(location, domain)?;
        let path = || self.files.display(&pack::name(location.pack));
        let damaged = |reason: String| FormatError::at(u64::from(location.frame()), reason).in_file(path());
        let length = header.decoded as usize;
        let content = match wanted {
            Some(wanted) => frame::decode_start(header.codec, &encoded, length, wanted),
            None => frame::decode(header.codec, &encoded, length),
        };
        let content = content.map_err(damaged)?;
        let spans = frame::spans(kind, usize::from(header.chunks), &content, length)
            .map_err(|error| error.in_file(path()))?;
        let decoded = Arc::new(DecodedFrame { content, spans });
        self.frames.lock().unwrap_or_else(PoisonError::into_inner).put(key, decoded.clone());
        Ok(decoded)
    }

    /// Tells storage that these bytes of a pack will be read. A pack that cannot be opened is told to whoever reads it.
    pub fn will_read(&self, pack: PackId, domain: DomainId, bytes: std::ops::Range<u32>) {
        if let Ok(pack) = self.open(pack, domain, bytes.start) {
            pack.file.will_read(u64::from(bytes.start), u64::from(bytes.end - bytes.start));
        }
    }

    /// The key generation under which the frame at `location` is sealed, if it is there and fits its seal, which covers its
    /// header too: proof without decoding. What only parity can give is none: a second rotten sector could take it away.
    pub fn sealed_under(&self, location: Location, domain: DomainId) -> Option<u16> {
        let pack = self.open(location.pack, domain, location.frame()).ok()?;
        pack.frame(location.frame(), &|at, buf| pack.file.read_exact_at(at, buf)).ok()?;
        Some(pack.generation)
    }

    /// Whether the frame at `location` can be had, if need be by its parity.
    pub(crate) fn is_there(&self, location: Location, domain: DomainId) -> bool {
        self.encoded(location, domain).is_ok()
    }

    /// Forgets what is open and decoded of a pack that goes away.
    pub fn forget(&self, pack: PackId) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).held.remove(&pack);
        self.frames.lock().unwrap_or_else(PoisonError::into_inner).held.retain(|key, _| key.0 != pack);
    }
}

/// Header and table of a pack file, checked against their hash and seal; rebuilt from its parity where that is needed.
pub fn read_table(files: &dyn Files, keys: &Keys, id: PackId) -> Result<FinishedPack, PoolError> {
    let name = pack::name(id);
    let path = files.display(&name);
    let io = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::UnexpectedEof => FormatError::at(0, "the pack is cut off").in_file(path.clone()),
        _ => PoolError::io(path.clone(), "read", source),
    };
    let file = files.open(&name).map_err(io)?;
    let length = file.len().map_err(io)?;
    let as_stored = |at: u64, buf: &mut [u8]| file.read_exact_at(at, buf);
    // A pack without parity is read as if there were no such thing.
    let error = match table_in(&as_stored, (length, length), &path, keys, id) {
        Ok(found) => return Ok(found),
        Err(error) => error,
    };
    let Some(known) = parity::find(&as_stored, length) else { return Err(error) };
    let content = known.layout.content;
    let error = match table_in(&as_stored, (content, length), &path, keys, id) {
        Ok(found) => return Ok(found),
        Err(error) => error,
    };
    let Some(parity) = Parity::of(&as_stored, known) else { return Err(error) };
    let rebuilder = Rebuilder::new(&parity, &as_stored);
    let again = table_in(&|at, buf| rebuilder.read_at(at, buf), (content, length), &path, keys, id);
    match again {
        Ok(found) => Ok(FinishedPack { rebuilt: rebuilder.sectors(), ..found }),
        Err(_) => Err(error),
    }
}

/// Header and table of a pack that ends at `content` of the `length` bytes of its file.
fn table_in(
    read: &ReadAt<'_>,
    (content, length): (u64, u64),
    path: &str,
    keys: &Keys,
    id: PackId,
) -> Result<FinishedPack, PoolError> {
    let io = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            FormatError::at(0, "the pack is cut off").in_file(path.to_owned())
        }
        _ => PoolError::io(path.to_owned(), "read", source),
    };
    let format = |error: FormatError| error.in_file(path.to_owned());
    let mut raw = [0u8; HEADER];
    read(0, &mut raw).map_err(io)?;
    let header = PackHeader::decode(&raw).map_err(format)?;
    if header.pack != id || header.pool != keys.pool() {
        return Err(format(FormatError::at(16, format!("is pack {} of pool {}", header.pack, header.pool))));
    }
    let mut end = [0u8; HEADER];
    read(content.saturating_sub(HEADER as u64), &mut end).map_err(io)?;
    let trailer = Trailer::decode(&end, content).map_err(format)?;
    let mut table = vec![0u8; trailer.table_stored as usize];
    read(trailer.table_offset, &mut table).map_err(io)?;
    if !Trailer::check(&end, &raw, &table) {
        return Err(format(FormatError::at(
            trailer.table_offset,
            "header, table and trailer do not fit their hash",
        )));
    }
    let key = keys.domain(header.domain).pack(header.generation, id)?;
    let plain = key
        .open(table_nonce(trailer.table_offset), &raw, &mut table)
        .ok_or_else(|| format(FormatError::at(trailer.table_offset, "the seal of the table does not fit")))?;
    let table = pack::decode_table(plain).map_err(format)?;
    Ok(FinishedPack { header, length, content, table, rebuilt: BTreeSet::new() })
}

/// The share that each chunk of a pack has in the stored bytes of its frame, by location.
pub(crate) fn shares(pack: &FinishedPack) -> HashMap<u32, u64> {
    let frame = |entry: &TableEntry| Location { pack: pack.header.pack, at: entry.location }.frame();
    // In order of location, as in the file; the table stands behind the last frame, and parity behind the trailer.
    let mut places: Vec<&TableEntry> = pack.table.iter().collect();
    places.sort_unstable_by_key(|entry| entry.location);
    let table = pack::table_bytes(pack.table.len()) + HEADER as u64;
    let mut shares = HashMap::with_capacity(places.len());
    let mut end = pack.content.saturating_sub(table);
    for chunks in places.chunk_by(|one, next| frame(one) == frame(next)).rev() {
        let start = chunks.first().map_or(0, |entry| u64::from(frame(entry)));
        let bytes = end.saturating_sub(start);
        let (share, mut rest) = (bytes / chunks.len() as u64, bytes % chunks.len() as u64);
        for entry in chunks {
            shares.insert(entry.location, share + u64::from(rest > 0));
            rest = rest.saturating_sub(1);
        }
        end = start;
    }
    shares
}
