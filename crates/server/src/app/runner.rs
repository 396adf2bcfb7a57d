//! Running jobs: one thread each, events for whoever watches, cancel at any time.
//!
//! ```text
//! Queued --> Running --> Succeeded | Failed | Cancelled
//! ```

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use environment::{Clock, Randomness};
use jobs::{JobContext, LogLevel};
use model::{Code, DatasourceId, HostId, JobId, Problem, Timestamp};
use protocol::api::{self, Figures, Job, JobEvent, JobKind, JobLogLine, JobState, Progress, Severity, Time};
use transfer::Steer;

use super::History;
use crate::api::JobEvents;

/// Whoever watches a job's progress is woken at most so often, in microseconds.
const TELL_MICROS: u64 = 100_000;

/// Jobs at work and those that ended.
pub struct Runner {
    shared: Arc<Shared>,
}

/// Jobs that read from hosts at once, in all.
const SERVER_JOBS: usize = 8;
/// And from one host.
const HOST_JOBS: usize = 2;

/// Jobs that read from a host, in the order in which they asked.
#[derive(Default)]
struct Lanes {
    at_work: Vec<(JobId, Option<HostId>)>,
    waiting: VecDeque<(JobId, Option<HostId>)>,
}

impl Lanes {
    fn has_room(&self, host: Option<HostId>) -> bool {
        let of_host = self.at_work.iter().filter(|(_, other)| *other == host).count();
        self.at_work.len() < SERVER_JOBS && of_host < HOST_JOBS
    }

    /// Lets a job in if it is its turn: nobody who asked before could go on now.
    fn admit(&mut self, job: JobId) -> bool {
        let next = self.waiting.iter().position(|(_, host)| self.has_room(*host));
        let Some(next) = next.filter(|next| self.waiting.get(*next).is_some_and(|(id, _)| *id == job)) else {
            return false;
        };
        self.at_work.extend(self.waiting.remove(next));
        true
    }

    fn leave(&mut self, job: JobId) {
        self.at_work.retain(|(id, _)| *id != job);
        self.waiting.retain(|(id, _)| *id != job);
    }
}

/// A job's turn to read from its host, until it is dropped.
pub struct Turn<'a> {
    job: &'a RunningJob,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.job.shared.lanes().leave(self.job.id);
        self.job.shared.lane_free.notify_all();
    }
}

struct Shared {
    lanes: Mutex<Lanes>,
    lane_free: Condvar,
    clock: Arc<dyn Clock>,
    randomness: Arc<dyn Randomness>,
    history: Arc<History>,
    running: Mutex<Running>,
    ended: Condvar,
}

#[derive(Default)]
struct Running {
    jobs: BTreeMap<JobId, Arc<RunningJob>>,
    busy: HashSet<DatasourceId>,
}

/// A job at work, as it sees itself.
pub struct RunningJob {
    shared: Arc<Shared>,
    id: JobId,
    steer: Steer,
    state: Mutex<JobData>,
    changed: Condvar,
}

struct JobData {
    job: Job,
    log: Vec<JobLogLine>,
    progress: Option<Progress>,
    /// Rises with every change, so that a watcher knows what it has not seen.
    event: u64,
    progress_event: u64,
    log_events: Vec<u64>,
    phase_began: u64,
    last_rate: (u64, u64, u64),
    /// When those who wait were last woken for progress, by the monotonic clock.
    told: Option<u64>,
}

/// What a job's work gives back.
pub type Work = Box<dyn FnOnce(&RunningJob) -> Result<Done, Problem> + Send>;

/// How a job ended well.
#[derive(Default)]
pub struct Done {
    /// What it counted.
    pub figures: Figures,
    /// What was less than asked.
    pub warnings: Vec<Problem>,
}

impl Runner {
    /// A runner without jobs.
    pub fn new(clock: Arc<dyn Clock>, randomness: Arc<dyn Randomness>, history: Arc<History>) -> Runner {
        let shared = Shared {
            lanes: Mutex::default(),
            lane_free: Condvar::new(),
            clock,
            randomness,
            history,
            running: Mutex::new(Running::default()),
            ended: Condvar::new(),
        };
        Runner { shared: Arc::new(shared) }
    }

    /// Starts a job in a thread of its own. A datasource has one writing job at a time.
    pub fn start(
        &self,
        kind: JobKind,
        datasource: Option<(DatasourceId, String)>,
        exclusive: bool,
        work: Work,
    ) -> Result<Job, Problem> {
        let mut id = [0u8; 16];
        self.shared.randomness.fill(&mut id).map_err(|error| {
            Problem::new(Code::Internal, format!("No random bytes for a job id: {error}."))
        })?;
        let id = JobId(id);
        let now = Time(Timestamp(self.shared.clock.now_micros()));
        let job = Job {
            id,
            kind,
            state: JobState::Running,
            datasource: datasource.as_ref().map(|(id, _)| *id),
            datasource_name: datasource.as_ref().map(|(_, name)| name.clone()),
            created_at: now,
            started_at: Some(now),
            ended_at: None,
            warnings: Vec::new(),
            problem: None,
            figures: Figures::default(),
        };
        let running = Arc::new(RunningJob {
            shared: self.shared.clone(),
            id,
            steer: Steer::new(),
            state: Mutex::new(JobData {
                job: job.clone(),
                log: Vec::new(),
                progress: None,
                event: 1,
                progress_event: 0,
                log_events: Vec::new(),
                phase_began: self.shared.clock.monotonic_micros(),
                last_rate: (0, 0, 0),
                told: None,
            }),
            changed: Condvar::new(),
        });
        let exclusive = datasource.filter(|_| exclusive);
        {
            let mut all = self.shared.running();
            if let Some((datasource, name)) = &exclusive
                && !all.busy.insert(*datasource)
            {
                return Err(Problem::new(Code::SourceBusy, format!("A job for {name} is running."))
                    .about(name.clone()));
            }
            all.jobs.insert(id, running.clone());
        }
        let thread = running.clone();
        let began = self.shared.clock.monotonic_micros();
        let claimed = exclusive.as_ref().map(|(id, _)| *id);
        let body = move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&thread)))
                .unwrap_or_else(|_| {
                    Err(Problem::new(Code::Internal, "The job's thread stopped at an impossible state."))
                });
            thread.end(outcome, began, exclusive.map(|(id, _)| id));
        };
        let spawned = std::thread::Builder::new().name(format!("job-{}", kind.word())).spawn(body);
        if let Err(error) = spawned {
            let mut all = self.shared.running();
            all.jobs.remove(&id);
            if let Some(datasource) = claimed {
                all.busy.remove(&datasource);
            }
            return Err(Problem::new(Code::Internal, format!("No thread for the job: {error}.")));
        }
        Ok(job)
    }

    /// Keeps a job that had nothing to do.
    pub fn keep_ended(
        &self,
        kind: JobKind,
        datasource: (DatasourceId, String),
        figures: Figures,
    ) -> Result<Job, Problem> {
        let mut id = [0u8; 16];
        self.shared.randomness.fill(&mut id).map_err(|error| {
            Problem::new(Code::Internal, format!("No random bytes for a job id: {error}."))
        })?;
        let now = Time(Timestamp(self.shared.clock.now_micros()));
        let job = Job {
            id: JobId(id),
            kind,
            state: JobState::Succeeded,
            datasource: Some(datasource.0),
            datasource_name: Some(datasource.1),
            created_at: now,
            started_at: Some(now),
            ended_at: Some(now),
            warnings: Vec::new(),
            problem: None,
            figures: Figures { seconds: Some(0.0), ..figures },
        };
        self.shared.history.keep(job.clone(), Vec::new());
        Ok(job)
    }

    /// All jobs, newest first.
    pub fn jobs(&self) -> Vec<Job> {
        // First those at work, then those kept: a job that ends in between is in both, never in neither.
        let mut all = self.running();
        let kept = self.shared.history.jobs();
        all.retain(|job| kept.iter().all(|other| other.id != job.id));
        all.extend(kept);
        all.sort_by_key(|job| std::cmp::Reverse((job.created_at.0, job.id)));
        all
    }

    /// One job, at work or ended.
    pub fn job(&self, id: JobId) -> Option<Job> {
        let running = self.shared.running().jobs.get(&id).map(|job| job.data().job.clone());
        running.or_else(|| self.shared.history.job(id))
    }

    /// Jobs at work.
    pub fn running(&self) -> Vec<Job> {
        self.shared.running().jobs.values().map(|job| job.data().job.clone()).collect()
    }

    /// A job's log so far.
    pub fn log(&self, id: JobId) -> Option<Vec<JobLogLine>> {
        let running = self.shared.running().jobs.get(&id).cloned();
        match running {
            Some(job) => Some(job.data().log.clone()),
            None => self.shared.history.log(id),
        }
    }

    /// Asks a job to end.
    pub fn cancel(&self, id: JobId) {
        let running = self.shared.running().jobs.get(&id).cloned();
        if let Some(job) = running {
            job.steer.cancel();
        }
    }

    /// Cancels everything and waits until nothing runs.
    pub fn stop(&self) {
        let jobs: Vec<Arc<RunningJob>> = self.shared.running().jobs.values().cloned().collect();
        jobs.iter().for_each(|job| job.steer.cancel());
        let mut running = self.shared.running();
        while !running.jobs.is_empty() {
            running = self.shared.ended.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What happened in a job after event `after`; waits for something.
    pub fn events(&self, id: JobId, after: u64, wait: Duration) -> Option<JobEvents> {
        let running = self.shared.running().jobs.get(&id).cloned();
        let Some(job) = running else {
            let ended = self.shared.history.job(id)?;
            let log = self.shared.history.log(id).unwrap_or_default();
            // The log lines of an ended job are numbered as the events they were, which nobody kept: all are given to
            // whoever starts, none to whoever goes on and saw them.
            let mut events: Vec<JobEvent> =
                if after == 0 { log.into_iter().map(JobEvent::Log).collect() } else { Vec::new() };
            events.push(JobEvent::Job(Box::new(ended)));
            return Some(JobEvents { events, next: u64::MAX, ended: true });
        };
        let mut data = job.data();
        if data.event <= after {
            data = job.changed.wait_timeout(data, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut events: Vec<JobEvent> = data
            .log
            .iter()
            .zip(&data.log_events)
            .filter(|(_, event)| **event > after)
            .map(|(line, _)| JobEvent::Log(line.clone()))
            .collect();
        if data.progress_event > after
            && let Some(progress) = &data.progress
        {
            events.push(JobEvent::Progress(progress.clone()));
        }
        let ended = data.job.state.ended();
        if ended {
            events.push(JobEvent::Job(Box::new(data.job.clone())));
        }
        Some(JobEvents { events, next: data.event, ended })
    }
}

impl Shared {
    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RunningJob {
    /// Waits for the job's turn: so many read from one host at once, so many in all. It is queued meanwhile.
    pub fn turn(&self, host: Option<HostId>) -> Result<Turn<'_>, Problem> {
        let turn = Turn { job: self };
        let mut lanes = self.shared.lanes();
        lanes.waiting.push_back((self.id, host));
        let mut is_queued = false;
        while !lanes.admit(self.id) {
            if !is_queued {
                is_queued = true;
                self.set_state(JobState::Queued);
            }
            if self.steer.is_cancelled() {
                drop(lanes);
                return Err(jobs::problem::cancelled());
            }
            let woken = self.shared.lane_free.wait_timeout(lanes, Duration::from_millis(200));
            lanes = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(lanes);
        if is_queued {
            self.set_state(JobState::Running);
        }
        // Whoever asked after this one may have room on another host.
        self.shared.lane_free.notify_all();
        Ok(turn)
    }

    fn set_state(&self, state: JobState) {
        let mut data = self.data();
        data.job.state = state;
        if state == JobState::Running {
            data.job.started_at = Some(Time(Timestamp(self.shared.clock.now_micros())));
        }
        data.event += 1;
        drop(data);
        self.changed.notify_all();
    }

    fn data(&self) -> MutexGuard<'_, JobData> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, outcome: Result<Done, Problem>, began: u64, exclusive: Option<DatasourceId>) {
        // Its work is over. Who sees that it ended may ask for the next one at once, so the machine is free before that.
        if let Some(datasource) = exclusive {
            self.shared.running().busy.remove(&datasource);
        }
        let now = Timestamp(self.shared.clock.now_micros());
        let seconds = self.shared.clock.monotonic_micros().saturating_sub(began) as f64 / 1e6;
        if let Err(problem) = &outcome {
            self.log(LogLevel::Error, problem.message.clone());
        }
        let (job, log) = {
            let mut data = self.data();
            match outcome {
                Ok(done) => {
                    data.job.state = JobState::Succeeded;
                    data.job.figures = done.figures;
                    data.job.warnings = done.warnings;
                }
                Err(problem) => {
                    data.job.state =
                        if problem.code == Code::Cancelled { JobState::Cancelled } else { JobState::Failed };
                    data.job.problem = Some(problem);
                }
            }
            data.job.figures.seconds = Some(seconds);
            data.job.ended_at = Some(Time(now));
            data.event += 1;
            (data.job.clone(), data.log.clone())
        };
        if job.state == JobState::Failed
            && let Some(problem) = &job.problem
        {
            let severity =
                if problem.code == Code::PoolDamaged { Severity::Critical } else { Severity::Warning };
            self.shared.history.raise(severity, problem, now);
        }
        self.shared.history.keep(job, log);
        let mut running = self.shared.running();
        running.jobs.remove(&self.id);
        drop(running);
        self.changed.notify_all();
        self.shared.ended.notify_all();
    }
}

impl JobContext for RunningJob {
    fn id(&self) -> JobId {
        self.id
    }

    fn steer(&self) -> &Steer {
        &self.steer
    }

    fn phase(&self, name: &str, total: Option<u64>) {
        let mut data = self.data();
        data.phase_began = self.shared.clock.monotonic_micros();
        data.last_rate = (data.phase_began, 0, 0);
        data.told = None;
        data.progress = Some(Progress { phase: name.to_owned(), bytes_total: total, ..Progress::default() });
        data.event += 1;
        data.progress_event = data.event;
        drop(data);
        self.changed.notify_all();
    }

    fn progress(&self, done: u64, transferred: u64, stored: u64, deduplicated: u64) {
        let now = self.shared.clock.monotonic_micros();
        let mut data = self.data();
        let (since, before, rate) = data.last_rate;
        // The rate is that of the last second, so that a stall shows.
        let elapsed = now.saturating_sub(since);
        let rate = if elapsed >= 1_000_000 {
            let rate = u128::from(done.saturating_sub(before)) * 1_000_000 / u128::from(elapsed);
            let rate = u64::try_from(rate).unwrap_or(u64::MAX);
            data.last_rate = (now, done, rate);
            rate
        } else {
            rate
        };
        let total = data.progress.as_ref().and_then(|progress| progress.bytes_total);
        let phase = data.progress.as_ref().map(|progress| progress.phase.clone()).unwrap_or_default();
        data.progress = Some(Progress {
            phase,
            bytes_done: done,
            bytes_total: total,
            bytes_transferred: transferred,
            bytes_stored: stored,
            bytes_deduplicated: deduplicated,
            bytes_per_second: rate,
            seconds_left: total.filter(|_| rate > 0).map(|total| total.saturating_sub(done) / rate),
        });
        // A job tells of every frame: waking everybody each time would cost it a thirtieth of its processor time.
        if data.told.is_some_and(|told| now.saturating_sub(told) < TELL_MICROS) {
            return;
        }
        data.told = Some(now);
        data.event += 1;
        data.progress_event = data.event;
        drop(data);
        self.changed.notify_all();
    }

    fn log(&self, level: LogLevel, line: String) {
        let now = Time(Timestamp(self.shared.clock.now_micros()));
        let level = match level {
            LogLevel::Info => api::LogLevel::Info,
            LogLevel::Warning => api::LogLevel::Warning,
            LogLevel::Error => api::LogLevel::Error,
        };
        let mut data = self.data();
        let number = data.log.len() as u64 + 1;
        data.log.push(JobLogLine { line: number, time: now, level, message: line });
        data.event += 1;
        let event = data.event;
        data.log_events.push(event);
        drop(data);
        self.changed.notify_all();
    }

    fn wait(&self, duration: Duration) -> Result<(), Problem> {
        let until = self.shared.clock.monotonic_micros().saturating_add(duration.as_micros() as u64);
        while self.shared.clock.monotonic_micros() < until {
            if self.steer.is_cancelled() {
                return Err(jobs::problem::cancelled());
            }
            let left = until.saturating_sub(self.shared.clock.monotonic_micros());
            self.shared.clock.sleep(Duration::from_micros(left.min(200_000)));
        }
        Ok(())
    }

    fn alert(&self, problem: Problem) {
        self.shared.history.raise(Severity::Critical, &problem, Timestamp(self.shared.clock.now_micros()));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_so_many_jobs_and_the_first_to_ask_goes_first() {
        let (job, host) = (|n: u8| JobId([n; 16]), |n: u8| Some(HostId([n; 16])));
        let mut lanes = Lanes::default();
        lanes.waiting.extend([(job(1), host(1)), (job(2), host(1)), (job(3), host(1)), (job(4), host(2))]);
        assert!(!lanes.admit(job(2)), "job 1 asked before");
        assert!(lanes.admit(job(1)) && lanes.admit(job(2)));
        assert!(!lanes.admit(job(3)), "two jobs read from host 1");
        assert!(lanes.admit(job(4)), "host 2 is free");
        lanes.leave(job(1));
        assert!(lanes.admit(job(3)));
        for n in 10..20 {
            lanes.waiting.push_back((job(n), host(n)));
        }
        let admitted = (10..20).filter(|n| lanes.admit(job(*n))).count();
        assert_eq!(lanes.at_work.len(), SERVER_JOBS);
        assert_eq!(admitted, SERVER_JOBS - 3);
        lanes.leave(job(15));
        assert!(lanes.waiting.iter().all(|(id, _)| *id != job(15)));
    }
}
