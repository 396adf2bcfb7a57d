//! A host that misbehaves on purpose, a pool on simulated files, and the ledger of what every point must be.
//!
//! The agent's end is the product's own ([`Sender`], [`Target`]) in threads over links of this process. Everything that
//! is drawn follows from the fabric's seed; only the order of threads does not.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

mod host;
mod ledger;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use environment::simulated::SimulatedFiles;
use environment::{Clock, FixedClock, SeededRandomness};
use jobs::decide::Wish;
use jobs::machine::{self, RecoveredMachine, WholeMachine};
use jobs::recover::{Recovered, Recovery};
use jobs::synchronize::Outcome;
use jobs::{JobContext, LogLevel, Machine, recover, synchronize};
use model::{
    BLOCK_BYTES, ByteRange, DatasourceId, JobId, Problem, RangeSet, RecoveryPointId, Timestamp, Unfrozen,
};
use storage_pool::kit::Recipient;
use storage_pool::reclaim::{InProcessDeletion, ReclaimOptions, ReclaimReport};
use storage_pool::verify::{Depth, VerifyReport};
use storage_pool::{Access, Pool, PoolError, Settings, World};
use transfer::Steer;

pub use host::{FakeHost, Fault, Tracker};
pub use ledger::{Ledger, Lost};

pub const BLOCK: usize = BLOCK_BYTES as usize;
const NOW: u64 = 1_790_000_000_000_000;

/// Safe enough for stories: deletions can be taken back, but nothing is held by age or number.
pub fn settings() -> Settings {
    Settings { soft_delete: 14 * 86_400, ..Settings::without_safety() }
}

/// A block's content by its number; 0 is zeros.
pub fn content(number: u64) -> Vec<u8> {
    let word = number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK).collect()
}

pub fn blocks(range: std::ops::Range<u64>) -> ByteRange {
    ByteRange { start: range.start * BLOCK_BYTES, end: range.end * BLOCK_BYTES }
}

pub fn list(ranges: &[std::ops::Range<u64>]) -> RangeSet {
    ranges.iter().cloned().map(blocks).collect()
}

/// A job as the test sees it.
pub struct Context {
    id: JobId,
    pub steer: Steer,
    pub lines: Mutex<Vec<String>>,
    pub alerts: Mutex<Vec<Problem>>,
    on_alert: Box<dyn Fn() + Send + Sync>,
}

impl JobContext for Context {
    fn id(&self) -> JobId {
        self.id
    }

    fn steer(&self) -> &Steer {
        &self.steer
    }

    fn phase(&self, _name: &str, _total: Option<u64>) {}

    fn progress(&self, _done: u64, _transferred: u64, _stored: u64, _deduplicated: u64) {}

    fn log(&self, _level: LogLevel, line: String) {
        self.lines.lock().unwrap().push(line);
    }

    fn wait(&self, duration: Duration) -> Result<(), Problem> {
        self.lines.lock().unwrap().push(format!("waits {} s", duration.as_secs()));
        Ok(())
    }

    fn alert(&self, problem: Problem) {
        self.alerts.lock().unwrap().push(problem);
        (self.on_alert)();
    }
}

/// A pool, a host, a machine, and what is known of them.
pub struct Fabric {
    pub files: SimulatedFiles,
    pub clock: Arc<FixedClock>,
    pub random: Arc<SeededRandomness>,
    server: Recipient,
    pool: Option<Arc<Pool>>,
    pub host: FakeHost,
    pub machine: Machine,
    pub ledger: Ledger,
    /// The last job's log and alerts.
    pub lines: Vec<String>,
    pub alerts: Vec<Problem>,
    /// Called when a job raises an alert.
    pub on_alert: Option<Arc<dyn Fn() + Send + Sync>>,
    /// What [`Fabric::examine`] lets pass.
    pub lost: Lost,
    seed: u64,
    boots: u64,
}

impl Fabric {
    pub fn seeded(seed: u64) -> Fabric {
        Fabric::with(seed, settings())
    }

    pub fn with(seed: u64, settings: Settings) -> Fabric {
        let files = SimulatedFiles::new(seed);
        let clock = Arc::new(FixedClock::new(NOW));
        let random = Arc::new(SeededRandomness::new(seed ^ 0xFAB));
        let world =
            World { files: Arc::new(files.clone()), clock: clock.clone(), randomness: random.clone() };
        let created = Pool::create(world, settings, [1; 16], "fabric", &mut |kit| Ok(kit.clone())).unwrap();
        Fabric {
            files,
            clock,
            random,
            server: created.server,
            pool: Some(Arc::new(created.pool)),
            host: FakeHost::default(),
            machine: Machine {
                id: DatasourceId([7; 16]),
                name: "web".to_owned(),
                host: "hv1".to_owned(),
                definition: "{}".to_owned(),
                unfrozen: Unfrozen::default(),
                freeze_wait: Duration::from_secs(300),
                news: None,
            },
            ledger: Ledger::default(),
            lines: Vec::new(),
            alerts: Vec::new(),
            on_alert: None,
            lost: Lost::None,
            seed,
            boots: 0,
        }
    }

    /// Adds a disk of so many blocks, each with content of its own.
    pub fn disk(self, count: u64) -> Fabric {
        self.host.add_disk((1..=count).flat_map(content).collect());
        self
    }

    fn world(&self) -> World {
        World {
            files: Arc::new(self.files.clone()),
            clock: self.clock.clone(),
            randomness: self.random.clone(),
        }
    }

    pub fn pool(&self) -> &Arc<Pool> {
        self.pool.as_ref().unwrap()
    }

    /// Closes the pool and opens it anew: nothing that was cached helps.
    pub fn reopen(&mut self) {
        self.pool = None;
        let access = Access::Write { server: [1; 16], name: "fabric".to_owned() };
        self.pool = Some(Arc::new(Pool::open(self.world(), &self.server, access).unwrap()));
    }

    /// The power comes back after a cut.
    pub fn reboot(&mut self) {
        self.pool = None;
        self.boots += 1;
        self.files.reboot(self.seed.wrapping_mul(31).wrapping_add(self.boots));
        self.reopen();
    }

    pub fn run_as(&mut self, machine: &Machine, wish: &Wish) -> Result<Outcome, Problem> {
        self.clock.advance(Duration::from_secs(60));
        let mut id = [0; 16];
        environment::Randomness::fill(&*self.random, &mut id).unwrap();
        let hook = self.on_alert.clone();
        let context = Context {
            id: JobId(id),
            steer: Steer::new(),
            lines: Mutex::default(),
            alerts: Mutex::default(),
            on_alert: Box::new(move || hook.iter().for_each(|hook| hook())),
        };
        let now = Timestamp(self.clock.now_micros());
        let result = synchronize::run(self.pool(), &self.host, machine, wish, &|| now, &context);
        self.lines = context.lines.into_inner().unwrap();
        self.alerts = context.alerts.into_inner().unwrap();
        for (job, disks) in self.host.take_sent() {
            self.ledger.sent(job, disks);
        }
        if let Ok(outcome) = &result {
            self.ledger.acknowledge(outcome.point.id);
        }
        result
    }

    pub fn run(&mut self, wish: &Wish) -> Result<Outcome, Problem> {
        let machine = self.machine.clone();
        self.run_as(&machine, wish)
    }

    pub fn protect(&mut self) -> Outcome {
        self.run(&Wish::Protect).unwrap()
    }

    pub fn check(&mut self) -> Outcome {
        self.run(&Wish::Check).unwrap()
    }

    /// With lists by disk, and what they are said to be against.
    pub fn listed(
        &mut self,
        lists: &[(u32, RangeSet)],
        since: Option<RecoveryPointId>,
    ) -> Result<Outcome, Problem> {
        let lists: BTreeMap<u32, RangeSet> = lists.iter().cloned().collect();
        self.run(&Wish::Synchronize { lists, since, full_scan: false })
    }

    pub fn verify(&self) -> VerifyReport {
        self.pool().verify(Depth::ReadData, &mut |_: u64, _: u64| true).unwrap()
    }

    pub fn reclaim(&self) -> Result<ReclaimReport, PoolError> {
        let deletion = InProcessDeletion {
            world: self.world(),
            removal: Arc::new(self.files.clone()),
            recipient: self.server.clone(),
        };
        self.pool().reclaim(ReclaimOptions::default(), &deletion)
    }

    /// Every acknowledged point that is not suspect is what its disks were; see [`Ledger::examine`].
    pub fn examine(&self) {
        self.ledger.examine(self.pool(), self.lost).unwrap();
    }

    pub fn is_suspect(&self, id: RecoveryPointId) -> bool {
        self.pool().point(id).unwrap().suspect.is_some()
    }

    /// Files of the pool under a prefix.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let snapshot = self.files.snapshot();
        snapshot.files().map(|(name, _)| name.to_owned()).filter(|name| name.starts_with(prefix)).collect()
    }

    /// Rots every pack of blocks or of nodes: a bit in each KiB between header and trailer.
    pub fn rot_packs(&self, wanted: impl Fn(&[u8]) -> bool) {
        let snapshot = self.files.snapshot();
        for (name, bytes) in snapshot.files().filter(|(name, _)| name.starts_with("packs/")) {
            if wanted(bytes) {
                for at in (300..bytes.len() as u64 - 200).step_by(1024) {
                    self.files.flip_bit(name, at * 8).unwrap();
                }
            }
        }
    }

    pub fn recovery(&self, id: RecoveryPointId) -> Recovery {
        Recovery {
            point: self.pool().point(id).unwrap(),
            disk: 0,
            path: "disk0".to_owned(),
            format: "raw".to_owned(),
            over: None,
            overwrite: false,
            sync: true,
            accept_damage: false,
            min_consistency: None,
            pace: None,
            compress: None,
        }
    }

    pub fn recover_machine(&self, whole: &WholeMachine) -> Result<RecoveredMachine, Problem> {
        let newest = self.pool().state().in_order().next_back().cloned();
        let context = Context {
            id: JobId([9; 16]),
            steer: Steer::new(),
            lines: Mutex::default(),
            alerts: Mutex::default(),
            on_alert: Box::new(|| {}),
        };
        machine::run(self.pool(), &self.host, whole, newest.as_ref(), &context)
    }

    pub fn recover(&self, recovery: &Recovery) -> Result<(Recovered, Vec<u8>), Problem> {
        let context = Context {
            id: JobId([9; 16]),
            steer: Steer::new(),
            lines: Mutex::default(),
            alerts: Mutex::default(),
            on_alert: Box::new(|| {}),
        };
        let done = recover::run(self.pool(), &self.host, recovery, &context)?;
        Ok((done, self.host.recovered()))
    }
}
