//! What a running server does by itself: pool time goes on, what is stored is proved again, and in idle time machines are
//! compared in full.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use block_io::Pace;
use environment::Clock;
use model::{Code, DatasourceId, Problem, Timestamp};
use protocol::api::{HostState, JobKind, JobRequest, RateLimit, VerifyPool};
use storage_pool::proofs::RING;

use crate::app::{App, TokenBucket};

/// How often it looks around.
const ROUND: Duration = Duration::from_secs(60);
/// How often it looks whether it shall stop.
const LOOK: Duration = Duration::from_millis(200);
/// Every machine's blocks are all compared within this time (INV-22: what an audit cannot find, this does).
const SWEEP: u64 = 30 * Timestamp::DAY;
/// A compare that failed is not tried again before.
const PAUSE: u64 = Timestamp::DAY;

/// A verify by age that failed is not tried again before.
const REST: u64 = Timestamp::DAY / 24;
/// While other jobs run, a verify by age reads so many times slower.
const YIELD: u64 = 8;

/// How everything that is stored is proved again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByAge {
    /// Within so many seconds; never if 0.
    pub every_seconds: u64,
    /// Read no faster than so.
    pub bytes_per_second: u64,
}

impl Default for ByAge {
    /// 30 days, 50 MB/s: enough for a pool of 120 TB.
    fn default() -> ByAge {
        ByAge { every_seconds: VerifyPool::EVERY_SECONDS, bytes_per_second: 50_000_000 }
    }
}

/// A rate that other jobs come before.
struct Yielding {
    bucket: TokenBucket,
    app: std::sync::Weak<App>,
}

impl Pace for Yielding {
    fn wait(&self, bytes: u64) {
        let is_alone = self
            .app
            .upgrade()
            .is_none_or(|app| app.runner().running().iter().all(|job| job.kind == JobKind::Verify));
        self.bucket.wait(if is_alone { bytes } else { bytes.saturating_mul(YIELD) });
    }
}

/// The thread.
pub struct Housekeeping {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Housekeeping {
    /// Starts it.
    pub fn start(app: Arc<App>, clock: Arc<dyn Clock>, by_age: ByAge) -> Result<Housekeeping, Problem> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("housekeeping".to_owned())
            .spawn(move || {
                let mut tried = HashMap::new();
                let mut proved = None;
                while !stopping.load(Ordering::SeqCst) {
                    round(&app, Timestamp(clock.now_micros()), &mut tried);
                    prove_due(&app, &clock, by_age, &mut proved);
                    let rounds = ROUND.as_millis() / LOOK.as_millis();
                    for _ in 0..rounds {
                        if stopping.load(Ordering::SeqCst) {
                            break;
                        }
                        std::thread::sleep(LOOK);
                    }
                }
            })
            .map_err(|error| Problem::new(Code::Internal, format!("No thread for housekeeping: {error}.")))?;
        Ok(Housekeeping { stop, thread: Some(thread) })
    }
}

impl Drop for Housekeeping {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn round(app: &Arc<App>, now: Timestamp, tried: &mut HashMap<DatasourceId, Timestamp>) {
    let last = app.pool().state().last_time;
    // Pool time moves only with records; without a job in a day it would stand still.
    if now.0.saturating_sub(last) >= Timestamp::DAY
        && let Err(error) = app.pool().tick()
    {
        tracing::warn!(%error, "the pool's clock cannot go on");
    }
    if app.runner().running().iter().any(|job| job.kind != JobKind::Verify) {
        return;
    }
    let Some(datasource) = due(app, now, tried) else { return };
    tried.insert(datasource, now);
    let request = JobRequest::Check { datasource: datasource.to_string() };
    match app.start_job(&request) {
        Ok(started) => {
            tracing::info!(%datasource, job = %started.job.id, "comparing in full: the last time is 30 days ago")
        }
        Err(problem) => tracing::warn!(%datasource, %problem, "a full compare could not be started"),
    }
}

/// Reads a day's share of what is stored, when it is due.
fn prove_due(app: &Arc<App>, clock: &Arc<dyn Clock>, by_age: ByAge, tried: &mut Option<Timestamp>) {
    let now = Timestamp(clock.now_micros());
    if by_age.every_seconds == 0
        || tried.is_some_and(|at| now.since(at) < REST)
        || app.runner().running().iter().any(|job| job.kind == JobKind::Verify)
    {
        return;
    }
    let a_day = u128::from(RING) * u128::from(by_age.every_seconds.min(Timestamp::DAY / Timestamp::SECOND));
    let is_due = app
        .pool()
        .due(by_age.every_seconds)
        .is_some_and(|part| u128::from(part.length) * u128::from(by_age.every_seconds) >= a_day);
    if !is_due {
        return;
    }
    *tried = Some(now);
    let limit = RateLimit { bytes_per_second: by_age.bytes_per_second, hours: None };
    let pace =
        Arc::new(Yielding { bucket: TokenBucket::new(limit, clock.clone()), app: Arc::downgrade(app) });
    let options =
        VerifyPool { due: true, every_seconds: Some(by_age.every_seconds), ..VerifyPool::default() };
    match app.start_verify(options, Some(pace)) {
        Ok(job) => tracing::info!(job = %job.id, "reading what is due"),
        Err(problem) => tracing::warn!(%problem, "what is due could not be read"),
    }
}

/// A protected machine on a connected host whose newest point relies on a full compare of more than [`SWEEP`] ago.
fn due(app: &App, now: Timestamp, tried: &HashMap<DatasourceId, Timestamp>) -> Option<DatasourceId> {
    let hosts = app.parts.hosts.list().ok()?;
    let reachable = |host: Option<model::HostId>| match host {
        None => app.parts.hosts.is_standalone(),
        Some(id) => hosts.iter().any(|known| known.id == id && known.state == HostState::Connected),
    };
    let rested = |id: &DatasourceId| tried.get(id).is_none_or(|at| now.since(*at) >= PAUSE);
    let datasources = app.stored_datasources();
    let state = app.pool().state();
    datasources
        .iter()
        .filter(|datasource| !datasource.removed && reachable(datasource.host) && rested(&datasource.id))
        .find(|datasource| {
            let newest = state
                .in_order()
                .rev()
                .find(|point| point.datasource == datasource.id && point.deleted.is_none());
            newest.is_some_and(|point| {
                point.machine_disks().any(|disk| {
                    let compared = disk.full_compare.and_then(|id| state.points.get(&id));
                    // A point that is gone already is older than what is kept.
                    compared.is_none_or(|compared| now.since(compared.captured) >= SWEEP)
                })
            })
        })
        .map(|datasource| datasource.id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use environment::{FixedClock, FolderFiles, SystemRandomness};
    use model::{Cause, Consistency, RecoveryPointId};
    use storage_pool::reclaim::DeletionService;
    use storage_pool::{FullCompare, Ingest, NewDisk, NewPoint, Settings, World};

    use super::*;
    use crate::app::{DataFolder, FolderOptions, History, Hosts, NewPool, NoTokens, Parts, StoredDatasource};

    const NOW: u64 = 1_790_000_000_000_000;

    /// This machine, of which nothing can be read: a started job is all that is looked at.
    struct NoHosts;

    impl Hosts for NoHosts {
        fn host(&self, _: Option<model::HostId>) -> Result<Arc<dyn jobs::ProtectedHost>, Problem> {
            Err(Problem::new(Code::AgentUnreachable, "No host in this test."))
        }
        fn list(&self) -> Result<Vec<protocol::api::Host>, Problem> {
            Ok(Vec::new())
        }
        fn make_token(&self, _: &protocol::api::MakeToken) -> Result<protocol::api::TokenMade, Problem> {
            Err(Problem::new(Code::Unsupported, "Not in this test."))
        }
        fn revoke(&self, _: model::HostId) -> Result<(), Problem> {
            Err(Problem::new(Code::Unsupported, "Not in this test."))
        }
        fn is_standalone(&self) -> bool {
            true
        }
    }

    struct NothingGoes;

    impl DeletionService for NothingGoes {
        fn carry_out(&self, _: Option<u64>, _: &[u64]) -> Result<(), storage_pool::PoolError> {
            Ok(())
        }
    }

    impl crate::app::CopyDeletion for NothingGoes {
        fn carry_out_in(&self, _: &std::path::Path, _: Option<u64>) -> Result<(), storage_pool::PoolError> {
            Ok(())
        }
    }

    fn app(root: &std::path::Path, clock: &Arc<FixedClock>) -> Arc<App> {
        let folder = DataFolder::new(root.join("data"));
        let randomness = Arc::new(SystemRandomness);
        let files = Arc::new(FolderFiles::new(folder.pool()));
        let world = World { files, clock: clock.clone(), randomness: randomness.clone() };
        let create = Some(NewPool { settings: Settings::without_safety(), kit: None });
        let opened =
            folder.open(&world, &FolderOptions { create, pool: None, writes: true }, "test").unwrap();
        let (history, _) = History::open(&folder.catalog(), &opened.pool, true).unwrap();
        App::new(Parts {
            folder,
            pool: opened.pool,
            hosts: Arc::new(NoHosts),
            tokens: Arc::new(NoTokens),
            deletion: Arc::new(NothingGoes),
            copies: crate::app::Copies { folders: Vec::new(), deletion: Arc::new(NothingGoes) },
            history: Arc::new(history),
            clock: clock.clone(),
            randomness,
        })
    }

    /// A machine with a point that read everything at `compared` and one from a list a day later.
    fn machine(app: &App, byte: u8, compared: u64) -> DatasourceId {
        let id = DatasourceId([byte; 16]);
        let stored = StoredDatasource {
            id,
            name: format!("vm{byte}"),
            host: None,
            host_name: String::new(),
            provider: "images".to_owned(),
            definition: "{}".to_owned(),
            disks: Vec::new(),
            removed: false,
            unfrozen: Default::default(),
            freeze_wait_seconds: 300,
        };
        app.pool()
            .put_document(&format!("datasource/{id}"), Some(&serde_json::to_vec(&stored).unwrap()))
            .unwrap();
        let mut full = None;
        for (turn, captured) in [compared, compared + Timestamp::DAY].into_iter().enumerate() {
            let ingest = Ingest::begin(app.pool(), app.pool().default_domain().unwrap()).unwrap();
            let map = ingest.edit_map(None, 1 << 20).unwrap().finish(&mut ingest.nodes()).unwrap();
            let point = RecoveryPointId(app.pool().random_id().unwrap());
            let disk = NewDisk {
                index: 0,
                size: 1 << 20,
                sector: 512,
                map,
                description: "{}".to_owned(),
                audit_next: 0,
                full_compare: if turn == 0 { FullCompare::Now } else { FullCompare::At(full) },
            };
            let new = NewPoint {
                datasource: id,
                machine: stored.name.clone(),
                host: String::new(),
                base: full,
                captured: Timestamp(captured),
                consistency: Consistency::Offline,
                evidence: "test".to_owned(),
                cause: Cause::new("test", ["a test"]),
                job: None,
                figures: std::collections::BTreeMap::new(),
                definition: "{}".to_owned(),
                incomplete: false,
            };
            ingest.commit(point, new, vec![disk]).unwrap();
            full = Some(point);
        }
        id
    }

    fn checks(app: &App) -> Vec<DatasourceId> {
        while !app.runner().running().is_empty() {
            std::thread::sleep(LOOK / 50);
        }
        let jobs = app.runner().jobs();
        jobs.iter().rev().filter(|job| job.kind == JobKind::Check).filter_map(|job| job.datasource).collect()
    }

    /// The sweep of INV-22: what was last read in full 30 days ago is compared, one machine at a time, not again at once.
    #[test]
    fn a_machine_is_compared_in_full_after_thirty_days() {
        let scratch = tempfile::tempdir().unwrap();
        let clock = Arc::new(FixedClock::new(NOW));
        let app = app(scratch.path(), &clock);
        let old = machine(&app, 1, NOW - 30 * Timestamp::DAY);
        machine(&app, 2, NOW - 29 * Timestamp::DAY);
        let mut tried = HashMap::new();
        round(&app, Timestamp(NOW), &mut tried);
        assert_eq!(checks(&app), [old]);
        round(&app, Timestamp(NOW + Timestamp::SECOND), &mut tried);
        assert_eq!(checks(&app), [old], "a compare that failed is not tried again at once");
        round(&app, Timestamp(NOW + PAUSE), &mut tried);
        assert!(checks(&app).len() >= 2, "but later");
    }

    /// Everything is read again within the period, a share a day, without anybody asking.
    #[test]
    fn a_share_is_proved_each_day() {
        let scratch = tempfile::tempdir().unwrap();
        let clock = Arc::new(FixedClock::new(NOW));
        let app = app(scratch.path(), &clock);
        machine(&app, 1, NOW);
        let shared: Arc<dyn Clock> = clock.clone();
        let by_age = ByAge { every_seconds: 4 * 86_400, bytes_per_second: 1_000_000_000 };
        let mut tried = None;
        let verified = |app: &App| {
            while !app.runner().running().is_empty() {
                std::thread::sleep(LOOK / 50);
            }
            app.runner().jobs().iter().filter(|job| job.kind == JobKind::Verify).count()
        };
        prove_due(&app, &shared, by_age, &mut tried);
        assert_eq!(verified(&app), 0, "everything is new");
        for day in 1..=4 {
            clock.advance(Duration::from_secs(86_400));
            assert_eq!(app.pool().state().proofs.oldest(), None);
            prove_due(&app, &shared, by_age, &mut tried);
            assert_eq!(verified(&app), day);
            prove_due(&app, &shared, by_age, &mut tried);
            assert_eq!(verified(&app), day, "not twice a day");
        }
        assert_eq!(app.pool().state().proofs.oldest(), Some(Timestamp(NOW + Timestamp::DAY)));
        prove_due(&app, &shared, ByAge { every_seconds: 0, ..by_age }, &mut None);
        assert_eq!(verified(&app), 4);
    }

    /// Pool time goes on although nothing happens (section 9.3 of the pool's format).
    #[test]
    fn a_quiet_pool_gets_a_record_a_day() {
        let scratch = tempfile::tempdir().unwrap();
        let clock = Arc::new(FixedClock::new(NOW));
        let app = app(scratch.path(), &clock);
        let head = app.pool().state().head;
        round(&app, Timestamp(NOW + Timestamp::DAY - 1), &mut HashMap::new());
        assert_eq!(app.pool().state().head, head);
        round(&app, Timestamp(NOW + Timestamp::DAY), &mut HashMap::new());
        assert_eq!(app.pool().state().head, head + 1);
    }
}
