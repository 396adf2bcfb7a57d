//! Writing a recovery point: chunks into packs, maps, and the one record that makes it all count (section 9.1).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::{BLOCK_BYTES, Cause, Consistency, DatasourceId, DomainId, JobId, RecoveryPointId, Timestamp};

use crate::chunk::{ChunkId, ChunkKind, Location, PackId};
use crate::error::PoolError;
use crate::examine::{self, Reading};
use crate::format::node::levels;
use crate::format::pack::{self, PackKind};
use crate::format::payload::{self, Kind};
use crate::frame::{self, BLOCK};
use crate::keys::DomainKeys;
use crate::map::{MapEditor, MapReader, MapRoot, NodeSink, NodeSource};
use crate::packs::PackWriter;
use crate::pass::Pass;
use crate::places::Proof;
use crate::pool::{Pool, PoolNodes};
use crate::state::{Point, State};

/// Nodes put into one frame.
const NODES_A_FRAME: usize = 16;
/// Chunks of this job that are held in memory before they are written into a run.
const HELD_ENTRIES: usize = 400_000;

struct Inner {
    blocks: Option<PackWriter>,
    nodes: Option<PackWriter>,
    /// Chunks of the two packs that are not finished.
    current: HashMap<ChunkId, Location>,
    /// Nodes not in a frame yet.
    waiting: Vec<(ChunkId, Vec<u8>)>,
    /// Packs of this job that are durable.
    finished: HashSet<PackId>,
    /// Older packs of which chunks are shared that prove themselves.
    shared: HashSet<PackId>,
    entries: usize,
    /// Frames of earlier jobs whose bytes this job has proved (INV-9).
    proved: HashSet<(PackId, u32)>,
    figures: IngestFigures,
}

/// What an ingest did to the pool. Bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IngestFigures {
    /// Files written: packs.
    pub stored: u64,
    /// Blocks that were stored because nothing like them was there, before compression.
    pub new_blocks: u64,
    /// Blocks that arrived and were there already, before compression.
    pub duplicate_blocks: u64,
}

/// One job's way into the pool. Everything it stored without a commit is garbage that a later job may use.
pub struct Ingest {
    shared: Arc<Shared>,
}

struct Shared {
    pool: Arc<Pool>,
    keys: Arc<DomainKeys>,
    inner: Mutex<Inner>,
    /// Told to a reclaim beside this job: when it began, and the packs that it makes and shares.
    pass: Pass,
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nodes as a job sees them: its own unfinished ones and the pool's.
#[derive(Clone)]
pub struct JobNodes(Arc<Shared>);

impl JobNodes {
    /// What the job stored so far.
    pub fn figures(&self) -> IngestFigures {
        self.0.inner().figures
    }
}

impl NodeSource for JobNodes {
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, PoolError> {
        {
            let inner = self.0.inner();
            if let Some((_, bytes)) = inner.waiting.iter().find(|(waiting, _)| waiting == id) {
                return Ok(bytes.clone());
            }
            if let (Some(place), Some(writer)) = (inner.current.get(id), &inner.nodes)
                && place.pack == writer.id()
            {
                let (header, encoded) = writer.read_frame(*place)?;
                let lost = |reason: String| PoolError::ChunkLost { chunk: id.to_string(), reason };
                let content = frame::decode(header.codec, &encoded, header.decoded as usize).map_err(lost)?;
                let spans =
                    frame::spans(PackKind::Nodes, usize::from(header.chunks), &content, content.len())
                        .map_err(|error| lost(format!("{error:?}")))?;
                return spans
                    .get(place.slot())
                    .map(|span| content[span.clone()].to_vec())
                    .ok_or_else(|| lost("not in its frame".to_owned()));
            }
        }
        let read = PoolNodes { pool: self.0.pool.clone(), keys: self.0.keys.clone() }.node(id);
        if let Err(PoolError::ChunkLost { .. }) = &read {
            record_lost(&self.0, id)?;
        }
        read
    }
}

/// Records that no copy of a node can be had, so that the next job does not build upon it: a map that nobody knows to be
/// damaged would fail every job of its machine.
fn record_lost(shared: &Shared, id: &ChunkId) -> Result<(), PoolError> {
    for place in shared.pool.find(id)? {
        if !shared.pool.state().is_healthy(place.pack, place.frame()) {
            continue;
        }
        let record = crate::format::payload::Damage {
            pack: place.pack.0.to_vec(),
            frames: vec![place.frame()],
            reason: "a backup could not read a map node in it".to_owned(),
        };
        shared.pool.append(Kind::Damage, &record)?;
    }
    Ok(())
}

impl NodeSink for JobNodes {
    fn put_node(&mut self, bytes: Vec<u8>) -> Result<ChunkId, PoolError> {
        let id = self.0.keys.chunk_id(ChunkKind::Node, blake3::hash(&bytes).as_bytes());
        if holds(&self.0, &id)? {
            return Ok(id);
        }
        let mut inner = self.0.inner();
        inner.waiting.push((id, bytes));
        if inner.waiting.len() >= NODES_A_FRAME {
            flush_nodes(&self.0, &mut inner)?;
        }
        Ok(id)
    }
}

fn flush_nodes(shared: &Shared, inner: &mut Inner) -> Result<(), PoolError> {
    if inner.waiting.is_empty() {
        return Ok(());
    }
    let (ids, nodes): (Vec<ChunkId>, Vec<Vec<u8>>) = std::mem::take(&mut inner.waiting).into_iter().unzip();
    let content = frame::join_nodes(&nodes);
    put(shared, inner, PackKind::Nodes, frame::PLAIN, &content, content.len() as u32, &ids)
}

fn put(
    shared: &Shared,
    inner: &mut Inner,
    kind: PackKind,
    codec: u8,
    encoded: &[u8],
    decoded: u32,
    ids: &[ChunkId],
) -> Result<(), PoolError> {
    let open = inner.blocks.iter().chain(&inner.nodes);
    let parity: u64 = open.map(PackWriter::parity_bytes).sum();
    shared.pool.leave_reserve(encoded.len() as u64 + parity)?;
    let slot = match kind {
        PackKind::Blocks => &mut inner.blocks,
        PackKind::Nodes => &mut inner.nodes,
    };
    if slot.is_none() {
        let id = shared.pool.new_pack()?;
        *slot = Some(PackWriter::begin(
            shared.pool.world.files.clone(),
            shared.pool.id(),
            &shared.keys,
            kind,
            id,
        )?);
    }
    let Some(writer) = slot else { return Ok(()) };
    writer.parity = shared.pool.settings().parity_percent;
    let places = writer.put(codec, encoded, decoded, ids)?;
    let is_full = writer.length() >= crate::packs::PACK_BYTES;
    inner.current.extend(ids.iter().copied().zip(places));
    if is_full {
        finish_pack(shared, inner, kind)?;
    }
    Ok(())
}

fn finish_pack(shared: &Shared, inner: &mut Inner, kind: PackKind) -> Result<(), PoolError> {
    let writer = match kind {
        PackKind::Blocks => inner.blocks.take(),
        PackKind::Nodes => inner.nodes.take(),
    };
    let Some(writer) = writer else { return Ok(()) };
    let id = writer.id();
    // Before anybody can see it: no point names it yet.
    shared.pass.pin(id);
    let finished = shared.pool.finish_pack(writer)?;
    inner.current.retain(|_, place| place.pack != id);
    inner.finished.insert(id);
    inner.entries += finished.table.len();
    inner.figures.stored += finished.length;
    shared.pool.index_mut().add_loose(&finished);
    if inner.entries >= HELD_ENTRIES {
        shared.pool.flush_index()?;
        inner.entries = 0;
    }
    Ok(())
}

/// Whether the pool or this job has a copy of a chunk that may be used for a new point: not damaged, not in quarantine,
/// and proved now if it is of an earlier job (INV-9).
fn holds(shared: &Shared, id: &ChunkId) -> Result<bool, PoolError> {
    {
        let inner = shared.inner();
        if inner.current.contains_key(id) || inner.waiting.iter().any(|(waiting, _)| waiting == id) {
            return Ok(true);
        }
    }
    let is_good = |place: &Location| shared.pool.state().is_healthy(place.pack, place.frame());
    for place in shared.pool.find_near(id, is_good)?.into_iter().filter(is_good) {
        let key = (place.pack, place.frame());
        {
            let inner = shared.inner();
            if inner.finished.contains(&place.pack) || inner.proved.contains(&key) {
                return Ok(true);
            }
        }
        // From here on no reclaim lets go of the pack while this job runs.
        if !shared.pass.pin_healthy(place) {
            continue;
        }
        match shared.pool.proof(place, id) {
            Some(Proof::Frame) => {
                shared.inner().proved.insert(key);
                return Ok(true);
            }
            Some(Proof::Chunk) => {
                shared.inner().shared.insert(place.pack);
                return Ok(true);
            }
            // What the index does not know any more is no damage of it.
            None if !shared.pool.index().packs().contains_key(&place.pack) => continue,
            None => {}
        }
        let record = crate::format::payload::Damage {
            pack: place.pack.0.to_vec(),
            frames: vec![place.frame()],
            reason: "it could not be read or did not fit its seal when a backup wanted to share it"
                .to_owned(),
        };
        shared.pool.append(Kind::Damage, &record)?;
    }
    Ok(false)
}

/// An id that may be absent, as a record has it.
fn bytes_of(id: Option<RecoveryPointId>) -> Vec<u8> {
    id.map(|id| id.0.to_vec()).unwrap_or_default()
}

/// What is said about a new point.
#[derive(Debug, Clone)]
pub struct NewPoint {
    /// The machine.
    pub datasource: DatasourceId,
    /// Its name now.
    pub machine: String,
    /// Its host's name now.
    pub host: String,
    /// The point it was made from.
    pub base: Option<RecoveryPointId>,
    /// When the view was frozen.
    pub captured: Timestamp,
    /// How far the view can be trusted.
    pub consistency: Consistency,
    /// Why that far.
    pub evidence: String,
    /// What was done, and why.
    pub cause: Cause,
    /// The job.
    pub job: Option<JobId>,
    /// Its figures.
    pub figures: BTreeMap<String, u64>,
    /// Definition of the machine.
    pub definition: String,
    /// Whether disks are missing.
    pub incomplete: bool,
}

/// What is said about a disk of a new point.
#[derive(Debug, Clone)]
pub struct NewDisk {
    /// From 0.
    pub index: u32,
    /// Bytes.
    pub size: u64,
    /// 512 or 4096.
    pub sector: u32,
    /// Its map.
    pub map: MapRoot,
    /// What recovery needs to make the image again.
    pub description: String,
    /// Where the audit goes on.
    pub audit_next: u64,
    /// Whether this point read the disk in full; else the point that did.
    pub full_compare: FullCompare,
}

/// Which point read a disk in full last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FullCompare {
    /// The new one.
    Now,
    /// An earlier one, or none.
    At(Option<RecoveryPointId>),
}

impl Ingest {
    /// Begins, in a domain of the pool.
    pub fn begin(pool: &Arc<Pool>, domain: DomainId) -> Result<Ingest, PoolError> {
        pool.check_writer()?;
        let pass = pool.enter_ingest();
        let shared = Shared {
            pool: pool.clone(),
            keys: pool.domain_keys(domain),
            inner: Mutex::new(Inner {
                blocks: None,
                nodes: None,
                current: HashMap::new(),
                waiting: Vec::new(),
                finished: HashSet::new(),
                shared: HashSet::new(),
                entries: 0,
                proved: HashSet::new(),
                figures: IngestFigures::default(),
            }),
            pass,
        };
        Ok(Ingest { shared: Arc::new(shared) })
    }

    /// Chunk id of a block with this plain hash.
    pub fn chunk_id(&self, block_hash: &[u8; 32]) -> ChunkId {
        self.shared.keys.chunk_id(ChunkKind::Block, block_hash)
    }

    /// Whether this very job stored the block.
    pub fn is_in_job(&self, id: &ChunkId) -> Result<bool, PoolError> {
        if self.shared.inner().current.contains_key(id) {
            return Ok(true);
        }
        let found = self.shared.pool.find(id)?;
        let inner = self.shared.inner();
        Ok(found.iter().any(|place| inner.finished.contains(&place.pack)))
    }

    /// Whether a chunk that a map names can be had and may be used for a new point. Looks at the index only.
    pub fn is_usable(&self, id: &ChunkId) -> Result<bool, PoolError> {
        if self.shared.inner().current.contains_key(id) {
            return Ok(true);
        }
        let found = self.shared.pool.find(id)?;
        let state = self.shared.pool.state();
        Ok(found.iter().any(|place| state.is_healthy(place.pack, place.frame())))
    }

    /// Whether the pool has a copy of the block that a new point may use. Proves the copy's bytes.
    pub fn holds(&self, id: &ChunkId) -> Result<bool, PoolError> {
        holds(&self.shared, id)
    }

    /// Stores the blocks of a frame that the pool does not hold. `encoded` must decode to one block of 65,536 bytes for
    /// each of `hashes`, and each block must have that hash: the caller has proved it. Returns the chunk ids.
    pub fn put_blocks(
        &self,
        is_zstd: bool,
        encoded: &[u8],
        hashes: &[[u8; 32]],
    ) -> Result<Vec<ChunkId>, PoolError> {
        let ids: Vec<ChunkId> = hashes.iter().map(|hash| self.chunk_id(hash)).collect();
        if ids.is_empty() || ids.len() > pack::MAX_CHUNKS {
            return Err(PoolError::Misuse(format!("a frame of {} blocks", ids.len())));
        }
        let mut new = Vec::new();
        for (position, id) in ids.iter().enumerate() {
            if !ids[..position].contains(id) && !self.holds(id)? {
                new.push(position);
            }
        }
        let mut inner = self.shared.inner();
        inner.figures.new_blocks += new.len() as u64 * BLOCK_BYTES;
        inner.figures.duplicate_blocks += (ids.len() - new.len()) as u64 * BLOCK_BYTES;
        if new.is_empty() {
            return Ok(ids);
        }
        let decoded = ids.len() * BLOCK;
        let codec = if is_zstd { frame::ZSTD } else { frame::PLAIN };
        if new.len() == ids.len() {
            // The bytes that the agent compressed are stored as they came (decision 2).
            put(&self.shared, &mut inner, PackKind::Blocks, codec, encoded, decoded as u32, &ids)?;
            return Ok(ids);
        }
        let content = frame::decode(codec, encoded, decoded).map_err(PoolError::Misuse)?;
        let mut kept = Vec::with_capacity(new.len() * BLOCK);
        for &position in &new {
            kept.extend_from_slice(&content[position * BLOCK..(position + 1) * BLOCK]);
        }
        let (codec, encoded) = frame::encode(self.shared.pool.settings().zstd_level, &kept);
        let new_ids: Vec<ChunkId> = new.iter().map(|&position| ids[position]).collect();
        put(&self.shared, &mut inner, PackKind::Blocks, codec, &encoded, kept.len() as u32, &new_ids)?;
        Ok(ids)
    }

    /// Stores blocks that the pool holds once more, in a frame of their own, for the sake of where they lie. `content` is
    /// the blocks of `ids`, proved to be them.
    pub(crate) fn put_again(&self, content: &[u8], ids: &[ChunkId]) -> Result<(), PoolError> {
        if ids.is_empty() || ids.len() > pack::MAX_CHUNKS || content.len() != ids.len() * BLOCK {
            return Err(PoolError::Misuse(format!("a frame of {} blocks", ids.len())));
        }
        let (codec, encoded) = frame::encode(self.shared.pool.settings().zstd_level, content);
        let mut inner = self.shared.inner();
        put(&self.shared, &mut inner, PackKind::Blocks, codec, &encoded, content.len() as u32, ids)
    }

    /// Begins the map of a disk of `size` bytes from `base`, or from zeros where there is none or it has another height.
    pub fn edit_map(&self, base: Option<MapRoot>, size: u64) -> Result<MapEditor<JobNodes>, PoolError> {
        let blocks = size.div_ceil(BLOCK_BYTES);
        let base = base.filter(|base| base.levels == levels(blocks)).unwrap_or(MapRoot::zeros(blocks));
        let mut editor = MapEditor::new(self.nodes(), base, blocks)?;
        // What lay behind the end of a larger disk must not come back when this one grows.
        editor.zero(blocks..editor.reach(), &mut self.nodes())?;
        Ok(editor)
    }

    /// Reads any map of this domain, as this job sees it.
    pub fn read_map(&self, map: MapRoot) -> MapReader<JobNodes> {
        MapReader::new(self.nodes(), map)
    }

    /// Stores a text as the content of a disk of as many bytes.
    pub fn put_text(&self, index: u32, text: &[u8]) -> Result<NewDisk, PoolError> {
        let mut nodes = self.nodes();
        let mut editor = self.edit_map(None, text.len() as u64)?;
        for (block, part) in (0..).zip(text.chunks(BLOCK)) {
            let mut content = part.to_vec();
            content.resize(BLOCK, 0);
            if content.iter().all(|byte| *byte == 0) {
                continue;
            }
            let hash = *blake3::hash(&content).as_bytes();
            let (codec, encoded) = frame::encode(3, &content);
            let ids = self.put_blocks(codec == frame::ZSTD, &encoded, &[hash])?;
            editor.set(block, ids.first().copied(), &mut nodes)?;
        }
        Ok(NewDisk {
            index,
            size: text.len() as u64,
            sector: 512,
            map: editor.finish(&mut nodes)?,
            description: String::new(),
            audit_next: 0,
            full_compare: FullCompare::Now,
        })
    }

    /// Nodes as this job sees and makes them.
    pub fn nodes(&self) -> JobNodes {
        JobNodes(self.shared.clone())
    }

    /// What was stored so far.
    pub fn figures(&self) -> IngestFigures {
        self.shared.inner().figures
    }

    /// Makes everything stored so far durable and indexed.
    pub fn settle(&self) -> Result<(), PoolError> {
        let mut inner = self.shared.inner();
        flush_nodes(&self.shared, &mut inner)?;
        finish_pack(&self.shared, &mut inner, PackKind::Blocks)?;
        finish_pack(&self.shared, &mut inner, PackKind::Nodes)?;
        self.shared.pool.flush_index()?;
        inner.entries = 0;
        Ok(())
    }

    /// Reads the packs of this job back from the disk and compares every byte with its hash: the replica's proof after
    /// an initial replication (S15). Call after [`Ingest::settle`].
    pub fn prove_packs(&self) -> Result<(), PoolError> {
        let packs: Vec<PackId> = self.shared.inner().finished.iter().copied().collect();
        for id in packs {
            let files = &*self.shared.pool.world.files;
            let found = examine::examine(files, self.shared.pool.id(), id, Reading::default(), None)?;
            if let Some((offset, reason)) = found.damaged.into_iter().next() {
                return Err(PoolError::Damaged {
                    path: self.shared.pool.world.files.display(&pack::name(id)),
                    offset,
                    reason,
                });
            }
        }
        Ok(())
    }

    /// Proves that every chunk of a map can be found in the pool: the replica's structure after an initial
    /// replication (S15). Returns the number of blocks with data.
    pub fn prove_map(&self, map: MapRoot) -> Result<u64, PoolError> {
        let reader = self.read_map(map);
        let (mut blocks, mut failed) = (0, None);
        reader.walk(
            &mut |_, _| true,
            &mut |block, chunk| match self.is_usable(&chunk) {
                Ok(true) => blocks += 1,
                Ok(false) => {
                    failed.get_or_insert(PoolError::ChunkLost {
                        chunk: chunk.to_string(),
                        reason: format!("block {block} of the new map is in no sound pack"),
                    });
                }
                Err(error) => failed = Some(error),
            },
            &mut |_, _| {},
        );
        failed.map_or(Ok(blocks), Err)
    }

    /// Commits the point: everything it names durable and indexed, then its record, read back. Only when this returns may
    /// anybody be told.
    pub fn commit(self, id: RecoveryPointId, new: NewPoint, disks: Vec<NewDisk>) -> Result<Point, PoolError> {
        self.settle()?;
        self.prove_base(new.base)?;
        self.prove_disks(&disks)?;
        let record = payload::Point {
            point: id.0.to_vec(),
            datasource: new.datasource.0.to_vec(),
            machine: new.machine,
            host: new.host,
            domain: self.shared.keys.domain.0.to_vec(),
            base: bytes_of(new.base),
            captured: new.captured.0,
            consistency: new.consistency.word().to_owned(),
            evidence: new.evidence,
            decision: new.cause.decision,
            because: new.cause.because,
            disks: disks
                .into_iter()
                .map(|disk| payload::Disk {
                    index: disk.index,
                    size: disk.size,
                    sector: disk.sector,
                    root: disk.map.root.map(|root| root.0.to_vec()).unwrap_or_default(),
                    levels: u32::from(disk.map.levels),
                    description: disk.description,
                    audit_next: disk.audit_next,
                    full_compare: match disk.full_compare {
                        FullCompare::Now => id.0.to_vec(),
                        FullCompare::At(earlier) => bytes_of(earlier),
                    },
                })
                .collect(),
            job: new.job.map(|job| job.0.to_vec()).unwrap_or_default(),
            figures: new.figures,
            definition: new.definition,
            incomplete: new.incomplete,
        };
        let used: HashSet<PackId> = {
            let inner = self.shared.inner();
            {
                let proved = inner.proved.iter().map(|(pack, _)| *pack);
                proved.chain(inner.shared.iter().copied()).chain(inner.finished.iter().copied()).collect()
            }
        };
        self.shared.pool.append_if(Kind::Point, |state| {
            if state.points.contains_key(&id) {
                return Err(PoolError::Misuse(format!("recovery point {id} exists")));
            }
            // Nothing that is pinned gets a permit, and what is expired was not when this job began. If either were
            // wrong, this is the last moment at which it costs a job and not a point.
            self.prove_base_in(state, new.base)?;
            if let Some(gone) = used.iter().find(|pack| state.permitted.contains_key(*pack)) {
                return Err(PoolError::Misuse(format!(
                    "pack {gone} went away while this point was made of it"
                )));
            }
            Ok(Some(&record))
        })?;
        self.shared.pool.point(id)
    }

    /// Refuses a point made from one whose chunks may be gone or are under other keys.
    fn prove_base(&self, base: Option<RecoveryPointId>) -> Result<(), PoolError> {
        self.prove_base_in(&self.shared.pool.state(), base)
    }

    fn prove_base_in(&self, state: &State, base: Option<RecoveryPointId>) -> Result<(), PoolError> {
        let Some(base) = base else { return Ok(()) };
        let point = state.points.get(&base).ok_or(PoolError::NoSuchPoint(base))?;
        // Expired when this job began: then a reclaim may not have counted it. What expired later is counted as long as
        // this job runs.
        let period = self.shared.pool.settings().soft_delete;
        let was_expired = state.is_expired_at(point, period, self.shared.pass.began);
        if was_expired || point.domain != self.shared.keys.domain {
            let reason = if was_expired { "is expired" } else { "is in another key domain" };
            return Err(PoolError::Misuse(format!("a point cannot be made from {base}, which {reason}")));
        }
        Ok(())
    }

    /// Refuses maps of which the pool knows that a part cannot be had (INV-3). What no damage is known of was proved
    /// when it was stored or shared.
    fn prove_disks(&self, disks: &[NewDisk]) -> Result<(), PoolError> {
        for disk in disks {
            let blocks = disk.size.div_ceil(BLOCK_BYTES);
            if disk.map.levels != levels(blocks) || !matches!(disk.sector, 512 | 4096) {
                return Err(PoolError::Misuse(format!(
                    "disk {} of {} bytes, sectors of {}, with a map of {} levels",
                    disk.index, disk.size, disk.sector, disk.map.levels
                )));
            }
            let lost = |blocks: std::ops::Range<u64>, chunk: String| PoolError::ChunkLost {
                chunk,
                reason: format!("disk {} of the new point needs it for blocks {blocks:?}", disk.index),
            };
            if let Some(root) = disk.map.root
                && !self.is_usable(&root)?
            {
                return Err(lost(0..blocks, root.to_string()));
            }
            let found = self.shared.pool.lost_blocks(self.shared.keys.domain, disk.map)?;
            if let Some(first) = found.into_iter().next() {
                return Err(lost(first, "of a damaged pack".to_owned()));
            }
        }
        Ok(())
    }
}
