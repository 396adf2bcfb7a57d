//! A pool on simulated files, and disks to put into it.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::sync::Arc;

use block_io::BlockDevice;
use environment::simulated::SimulatedFiles;
use environment::{FixedClock, SeededRandomness};
use model::{BLOCK_BYTES, Cause, Consistency, DatasourceId, DomainId, RecoveryPointId, Timestamp};
use storage_pool::kit::Recipient;
use storage_pool::reclaim::InProcessDeletion;
use storage_pool::{
    Access, FullCompare, Ingest, MapRoot, NewDisk, NewPoint, Pool, PoolError, Settings, World,
};

pub const BLOCK: usize = BLOCK_BYTES as usize;

pub struct Bench {
    pub files: SimulatedFiles,
    pub clock: Arc<FixedClock>,
    pub random: Arc<SeededRandomness>,
    pub server: Recipient,
    pub kit: Recipient,
    pub domain: DomainId,
}

pub const NOW: u64 = 1_790_000_000_000_000;

impl Bench {
    pub fn new(seed: u64) -> Bench {
        Bench::with(seed, Settings::without_safety())
    }

    pub fn with(seed: u64, settings: Settings) -> Bench {
        let files = SimulatedFiles::new(seed);
        let clock = Arc::new(FixedClock::new(NOW));
        let random = Arc::new(SeededRandomness::new(seed ^ 0xABCD));
        let world =
            World { files: Arc::new(files.clone()), clock: clock.clone(), randomness: random.clone() };
        let mut kit = None;
        let created = Pool::create(world, settings, [1; 16], "bench", &mut |recipient| {
            let text = storage_pool::kit::write(recipient, "here");
            let read = storage_pool::kit::read(&text).unwrap().recipient;
            kit = Some(read.clone());
            Ok(read)
        })
        .unwrap();
        Bench { files, clock, random, server: created.server, kit: kit.unwrap(), domain: created.domain }
    }

    pub fn world(&self) -> World {
        World {
            files: Arc::new(self.files.clone()),
            clock: self.clock.clone(),
            randomness: self.random.clone(),
        }
    }

    pub fn writer(&self) -> Result<Arc<Pool>, PoolError> {
        let access = Access::Write { server: [1; 16], name: "bench".to_owned() };
        Pool::open(self.world(), &self.server, access).map(Arc::new)
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

/// Content of a block that does not compress and follows from its number.
pub fn block(number: u64) -> Vec<u8> {
    let random = SeededRandomness::new(number);
    (0..BLOCK / 8).flat_map(|_| random.next_u64().to_le_bytes()).collect()
}

/// A point of one disk: from `base`, with the blocks of `changes` set (0 for zeros).
pub fn put(
    pool: &Arc<Pool>,
    datasource: u8,
    base: Option<RecoveryPointId>,
    size: u64,
    changes: &BTreeMap<u64, u64>,
) -> Result<RecoveryPointId, PoolError> {
    let domain = pool.default_domain()?;
    let ingest = Ingest::begin(pool, domain)?;
    let map = match base {
        None => None,
        Some(base) => {
            let disk = pool.point(base)?.disks[0].clone();
            Some(MapRoot { root: disk.root, levels: disk.levels })
        }
    };
    let mut editor = ingest.edit_map(map, size)?;
    let mut nodes = ingest.nodes();
    for (&at, &content) in changes {
        if content == 0 {
            editor.set(at, None, &mut nodes)?;
            continue;
        }
        let bytes = block(content);
        let hash = *blake3::hash(&bytes).as_bytes();
        let ids = ingest.put_blocks(false, &bytes, &[hash])?;
        editor.set(at, Some(ids[0]), &mut nodes)?;
    }
    let map = editor.finish(&mut nodes)?;
    let id = RecoveryPointId(pool.random_id()?);
    let new = NewPoint {
        datasource: DatasourceId([datasource; 16]),
        machine: format!("vm{datasource}"),
        host: "host".to_owned(),
        base,
        captured: Timestamp(NOW),
        consistency: Consistency::Offline,
        evidence: "test".to_owned(),
        cause: Cause::new("test", ["a test"]),
        job: None,
        figures: BTreeMap::new(),
        definition: "{}".to_owned(),
        incomplete: false,
    };
    let disk = NewDisk {
        index: 0,
        size,
        sector: 512,
        map,
        description: "{}".to_owned(),
        audit_next: 0,
        full_compare: FullCompare::Now,
    };
    ingest.commit(id, new, vec![disk])?;
    Ok(id)
}

/// Every block of disk 0 of a point, as content numbers by comparing; panics on anything else.
pub fn check(pool: &Arc<Pool>, point: RecoveryPointId, truth: &BTreeMap<u64, u64>) {
    let device = pool.open_disk(point, 0).unwrap();
    let mut buf = vec![0u8; BLOCK];
    for at in 0..device.size().div_ceil(BLOCK_BYTES) {
        let length = BLOCK.min((device.size() - at * BLOCK_BYTES) as usize);
        device
            .read_at(at * BLOCK_BYTES, &mut buf[..length])
            .unwrap_or_else(|error| panic!("{point}: {error}"));
        match truth.get(&at) {
            None | Some(0) => assert!(buf[..length].iter().all(|&byte| byte == 0), "block {at} is not zeros"),
            Some(&content) => assert!(buf[..length] == block(content)[..length], "block {at} differs"),
        }
    }
}
