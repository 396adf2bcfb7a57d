//! What a running server does by itself: pool time goes on, and in idle time machines are compared in full.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use environment::Clock;
use model::{Code, DatasourceId, Problem, Timestamp};
use protocol::api::{HostState, JobRequest};

use crate::app::App;

/// How often it looks around.
const ROUND: Duration = Duration::from_secs(60);
/// How often it looks whether it shall stop.
const LOOK: Duration = Duration::from_millis(200);
/// Every machine's blocks are all compared within this time (INV-22: what an audit cannot find, this does).
const SWEEP: u64 = 30 * Timestamp::DAY;
/// A compare that failed is not tried again before.
const PAUSE: u64 = Timestamp::DAY;

/// The thread.
pub struct Housekeeping {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Housekeeping {
    /// Starts it.
    pub fn start(app: Arc<App>, clock: Arc<dyn Clock>) -> Result<Housekeeping, Problem> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("housekeeping".to_owned())
            .spawn(move || {
                let mut tried = HashMap::new();
                while !stopping.load(Ordering::SeqCst) {
                    round(&app, Timestamp(clock.now_micros()), &mut tried);
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
    if !app.runner().running().is_empty() {
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
                point.disks.iter().any(|disk| {
                    let compared = disk.full_compare.and_then(|id| state.points.get(&id));
                    // A point that is gone already is older than what is kept.
                    compared.is_none_or(|compared| now.since(compared.captured) >= SWEEP)
                })
            })
        })
        .map(|datasource| datasource.id)
}
