//! The simulated world of a small pool, and the ledger outside it: what was acknowledged must be there, exactly.
//!
//! Blocks are mostly zeros so that thousands of crash points run in a second; what differs stands in their first bytes.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

pub mod golden;
pub mod life;
pub mod recipes;
pub mod rot;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use block_io::BlockDevice;
use environment::simulated::SimulatedFiles;
use environment::{Entry, Files, FixedClock, Lock, NewFile, Randomness, ReadFile, SeededRandomness};
use model::{BLOCK_BYTES, Cause, Consistency, DatasourceId, RecoveryPointId, Timestamp};
use storage_pool::chunk::ChunkId;
use storage_pool::kit::Recipient;
use storage_pool::reclaim::InProcessDeletion;
use storage_pool::{
    Access, FullCompare, Ingest, JobNodes, MapEditor, MapReader, MapRoot, NewDisk, NewPoint, Pool, PoolError,
    PoolNodes, Settings, World,
};

pub const BLOCK: usize = BLOCK_BYTES as usize;
pub const NOW: u64 = 1_790_000_000_000_000;
/// How many threads there is work for.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get())
}

/// A number of the environment.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// Different contents of blocks; few, so that points share.
pub const CONTENTS: u64 = 24;
/// Bytes at the head of a block that tell which it is.
const HEAD: usize = 256;

pub struct Block {
    pub head: [u8; HEAD],
    pub encoded: Vec<u8>,
    pub hash: [u8; 32],
}

/// Block `content`, from 1.
pub fn block(content: u64) -> &'static Block {
    static BLOCKS: OnceLock<Vec<Block>> = OnceLock::new();
    let blocks = BLOCKS.get_or_init(|| {
        (1..=CONTENTS)
            .map(|content| {
                let mut bytes = vec![0u8; BLOCK];
                let random = SeededRandomness::new(content);
                Randomness::fill(&random, &mut bytes[..HEAD]).unwrap();
                Block {
                    head: bytes[..HEAD].try_into().unwrap(),
                    encoded: zstd::bulk::compress(&bytes, 1).unwrap(),
                    hash: *blake3::hash(&bytes).as_bytes(),
                }
            })
            .collect()
    });
    &blocks[(content - 1) as usize]
}

/// Content of a disk: block to content number; zeros elsewhere.
pub type Content = BTreeMap<u64, u64>;

/// A disk to be stored.
#[derive(Debug, Clone)]
pub struct Order {
    pub id: RecoveryPointId,
    pub datasource: u8,
    pub base: Option<RecoveryPointId>,
    pub blocks: u64,
    /// Changes against the base; 0 for zeros.
    pub changes: Content,
}

/// The point that tests call `n`.
pub fn id(n: u8) -> RecoveryPointId {
    RecoveryPointId([n; 16])
}

/// Point `n` of the one machine that most tests have: five blocks.
pub fn order(n: u8, base: Option<u8>, changes: &[(u64, u64)]) -> Order {
    Order {
        id: id(n),
        datasource: 1,
        base: base.map(id),
        blocks: 5,
        changes: changes.iter().copied().collect(),
    }
}

/// A job that is under way: one change at a time.
pub struct Open {
    pub order: Order,
    ingest: Ingest,
    editor: MapEditor<JobNodes>,
    left: Vec<(u64, u64)>,
}

impl Open {
    pub fn begin(pool: &Arc<Pool>, order: Order) -> Result<Open, PoolError> {
        let ingest = Ingest::begin(pool, pool.default_domain()?)?;
        let map = match order.base {
            None => None,
            Some(base) => {
                let disk = &pool.point(base)?.disks[0];
                Some(MapRoot { root: disk.root, levels: disk.levels })
            }
        };
        let editor = ingest.edit_map(map, order.blocks * BLOCK_BYTES)?;
        let left = order.changes.iter().rev().map(|(at, content)| (*at, *content)).collect();
        Ok(Open { order, ingest, editor, left })
    }

    pub fn is_done(&self) -> bool {
        self.left.is_empty()
    }

    /// Stores or shares one block.
    pub fn go_on(&mut self) -> Result<(), PoolError> {
        let Some((at, content)) = self.left.pop() else { return Ok(()) };
        let chunk = match content {
            0 => None,
            content => {
                let block = block(content);
                Some(self.ingest.put_blocks(true, &block.encoded, &[block.hash])?[0])
            }
        };
        self.editor.set(at, chunk, &mut self.ingest.nodes())
    }

    /// Makes what was stored so far durable, as a large job does from time to time.
    pub fn settle(&self) -> Result<(), PoolError> {
        self.ingest.settle()
    }

    pub fn commit(mut self) -> Result<(), PoolError> {
        while !self.is_done() {
            self.go_on()?;
        }
        let Open { order, ingest, editor, .. } = self;
        let map = editor.finish(&mut ingest.nodes())?;
        let new = NewPoint {
            datasource: DatasourceId([order.datasource; 16]),
            machine: format!("vm{}", order.datasource),
            host: "host".to_owned(),
            base: order.base,
            captured: Timestamp(NOW),
            consistency: Consistency::Offline,
            evidence: String::new(),
            cause: Cause::new("test", ["a test"]),
            job: None,
            figures: BTreeMap::new(),
            definition: String::new(),
            incomplete: false,
        };
        let disk = NewDisk {
            index: 0,
            size: order.blocks * BLOCK_BYTES,
            sector: 512,
            map,
            description: String::new(),
            audit_next: 0,
            full_compare: FullCompare::Now,
        };
        ingest.commit(order.id, new, vec![disk]).map(drop)
    }
}

pub fn store(pool: &Arc<Pool>, order: &Order) -> Result<(), PoolError> {
    Open::begin(pool, order.clone())?.commit()
}

/// Chunks that were read from an opened pool, with the content that they were found to have.
pub type Known = HashMap<ChunkId, u64>;

/// Whether disk 0 of a point is exactly `content`. `Ok(false)`: other bytes, the worst there is.
pub fn is_exact(pool: &Arc<Pool>, point: RecoveryPointId, content: &Content) -> Result<bool, String> {
    is_exact_knowing(pool, point, content, &mut Known::new())
}

/// The same of several points of one opened pool: a chunk that they share is read and compared once.
pub fn is_exact_knowing(
    pool: &Arc<Pool>,
    point: RecoveryPointId,
    content: &Content,
    known: &mut Known,
) -> Result<bool, String> {
    let device = pool.open_disk(point, 0).map_err(|error| error.to_string())?;
    let point = pool.point(point).map_err(|error| error.to_string())?;
    let root = MapRoot { root: point.disks[0].root, levels: point.disks[0].levels };
    let map = MapReader::new(PoolNodes::new(pool, point.domain), root);
    let mut buf = [0u8; 2 * HEAD];
    for at in 0..device.size() / BLOCK_BYTES {
        let chunk = map.get(at).map_err(|error| error.to_string())?;
        let expected = content.get(&at).copied().unwrap_or(0);
        if chunk.is_some_and(|chunk| known.get(&chunk) == Some(&expected)) {
            continue;
        }
        device.read_at(at * BLOCK_BYTES, &mut buf).map_err(|error| error.to_string())?;
        let head = match expected {
            0 => &[0u8; HEAD],
            content => &block(content).head,
        };
        if buf[..HEAD] != *head || buf[HEAD..] != [0; HEAD] {
            return Ok(false);
        }
        if let Some(chunk) = chunk {
            known.insert(chunk, expected);
        }
    }
    Ok(true)
}

/// Files on a machine that the writer's lock does not reach.
pub struct Elsewhere(pub SimulatedFiles);

struct NoLock;
impl Lock for NoLock {}

impl Files for Elsewhere {
    fn open(&self, name: &str) -> std::io::Result<Box<dyn ReadFile>> {
        self.0.open(name)
    }
    fn list(&self, folder: &str) -> std::io::Result<Vec<Entry>> {
        self.0.list(folder)
    }
    fn make_folder(&self, folder: &str) -> std::io::Result<()> {
        self.0.make_folder(folder)
    }
    fn sync_folder(&self, folder: &str) -> std::io::Result<()> {
        self.0.sync_folder(folder)
    }
    fn create(&self, name: &str) -> std::io::Result<Box<dyn NewFile>> {
        self.0.create(name)
    }
    fn lock(&self, _: &str) -> std::io::Result<Option<Box<dyn Lock>>> {
        Ok(Some(Box::new(NoLock)))
    }
    fn free_bytes(&self) -> std::io::Result<u64> {
        self.0.free_bytes()
    }
    fn total_bytes(&self) -> std::io::Result<u64> {
        self.0.total_bytes()
    }
    fn display(&self, name: &str) -> String {
        self.0.display(name)
    }
}

/// A pool in its world.
pub struct Rig {
    pub files: SimulatedFiles,
    pub clock: Arc<FixedClock>,
    pub random: Arc<dyn Randomness>,
    pub server: Recipient,
    pub kit: Recipient,
}

impl Rig {
    pub fn new(seed: u64, settings: Settings) -> Rig {
        let files = SimulatedFiles::new(seed);
        let clock = Arc::new(FixedClock::new(NOW));
        let random: Arc<dyn Randomness> = Arc::new(SeededRandomness::new(seed ^ 0xF00D));
        let world =
            World { files: Arc::new(files.clone()), clock: clock.clone(), randomness: random.clone() };
        let mut kit = None;
        let created = Pool::create(world, settings, [1; 16], "one", &mut |recipient| {
            kit = Some(recipient.clone());
            Ok(recipient.clone())
        })
        .unwrap();
        Rig { files, clock, random, server: created.server, kit: kit.unwrap() }
    }

    /// The same pool on other files.
    pub fn on(&self, files: SimulatedFiles) -> Rig {
        Rig {
            files,
            clock: self.clock.clone(),
            random: self.random.clone(),
            server: self.server.clone(),
            kit: self.kit.clone(),
        }
    }

    pub fn world(&self) -> World {
        self.world_of(Arc::new(self.files.clone()))
    }

    pub fn world_of(&self, files: Arc<dyn Files>) -> World {
        World { files, clock: self.clock.clone(), randomness: self.random.clone() }
    }

    pub fn writer(&self, server: u8) -> Result<Arc<Pool>, PoolError> {
        let access = Access::Write { server: [server; 16], name: format!("server {server}") };
        let mut pool = Pool::open(self.world(), &self.server, access)?;
        // A reclaim spills what it sorts, as that of a large pool does.
        pool.limit_sorting(16);
        Ok(Arc::new(pool))
    }

    pub fn reader(&self) -> Result<Arc<Pool>, PoolError> {
        Pool::open(self.world(), &self.kit, Access::Read).map(Arc::new)
    }

    pub fn deletion(&self) -> InProcessDeletion {
        InProcessDeletion {
            world: self.world(),
            removal: Arc::new(self.files.clone()),
            recipient: self.server.clone(),
        }
    }
}
