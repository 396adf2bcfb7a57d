//! What the API asks of the server: one trait, one method a question.
//!
//! Blocking and object-safe: the router calls it from threads made for waiting, never from the runtime's own. A job
//! is started by [`Service::start`] and followed by [`Service::job_events`]; no method here waits for a job's end.
//!
//! Names arrive as typed. An implementation resolves them with [`super::names`] and nothing else, so that the same
//! text means the same thing everywhere. A [`Problem`] goes to the caller as it is: no secret may be in it.

use std::sync::Arc;
use std::time::Duration;

use block_io::BlockDevice;
use model::{Consistency, JobId, Problem, Timestamp};
use protocol::api::{
    AddImage, AddMachine, Alert, Datasource, Host, Job, JobEvent, JobLogLine, JobRequest, KeyGeneration,
    KitFile, KitReport, ListedMachine, MakeToken, Page, PageQuery, Plan, PointDiff, PoolStatus, Recipient,
    RecoveryPoint, Started, Status, TokenMade,
};

/// Where a request came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// From this very process: standalone. Whoever can start it owns the data folder.
    InProcess,
    /// Over the network with this bearer token.
    Bearer(String),
    /// Over the network, without a token.
    Missing,
}

/// What a request needs. Each route names one; there is no route without (except `/version`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Right {
    /// See datasources, points, jobs, alerts, the pool's state.
    Read,
    /// Protect, synchronise, check, verify, cancel, acknowledge; add a datasource.
    Operate,
    /// Recover, and read a point's bytes.
    Recover,
    /// Remove, delete, prune, reclaim.
    Destroy,
    /// Hosts, tokens, keys, the catalog.
    Administer,
}

/// Who asks, after [`Service::authorise`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// For the audit log: a token's name, or `standalone`.
    pub name: String,
}

/// Which jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JobFilter {
    /// Only those that failed.
    pub failed: bool,
    /// Only those created at or after.
    pub since: Option<Timestamp>,
}

/// What happened in a job after some event.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct JobEvents {
    /// In order. Of several progress events only the newest need be there.
    pub events: Vec<JobEvent>,
    /// Give it as `after` to get what comes next.
    pub next: u64,
    /// Nothing more will come; the last event is [`JobEvent::Job`].
    pub ended: bool,
}

/// The server, as the API sees it.
pub trait Service: Send + Sync + 'static {
    /// Says who asks, or refuses. Called before anything else of every request but `version`; must refuse what it does
    /// not know. The answer may not tell whether a token exists.
    fn authorise(&self, credentials: &Credentials, right: Right) -> Result<Caller, Problem>;

    /// Everything on one screen.
    fn status(&self) -> Result<Status, Problem>;

    /// Datasources by name; removed ones are not among them.
    fn datasources(&self, page: &PageQuery) -> Result<Page<Datasource>, Problem>;
    /// One datasource. NAME, HOST/NAME, id or unique prefix.
    fn datasource(&self, name: &str) -> Result<Datasource, Problem>;
    /// Adds a machine made of image files. The same name with the same images again gives the same datasource.
    fn add_image(&self, by: &Caller, request: &AddImage) -> Result<Datasource, Problem>;

    /// Machines that a host knows by itself, by name; `None` is the server's own.
    fn machines(&self, host: Option<&str>, page: &PageQuery) -> Result<Page<ListedMachine>, Problem>;
    /// Adds one of them. Again gives the same datasource.
    fn add_machine(&self, by: &Caller, request: &AddMachine) -> Result<Datasource, Problem>;

    /// Starts a job. Returns at once; the job may have ended already (`protect` of a protected machine).
    fn start(&self, by: &Caller, request: &JobRequest) -> Result<Started, Problem>;
    /// What the job would do. Changes nothing.
    fn plan(&self, request: &JobRequest) -> Result<Plan, Problem>;

    /// Jobs, newest first.
    fn jobs(&self, filter: &JobFilter, page: &PageQuery) -> Result<Page<Job>, Problem>;
    /// One job, by id or unique prefix.
    fn job(&self, id: &str) -> Result<Job, Problem>;
    /// A job's log, oldest line first. `after` of the page is a line number.
    fn job_log(&self, id: JobId, page: &PageQuery) -> Result<Page<JobLogLine>, Problem>;
    /// What happened after event number `after` (0: from the start; earlier progress may be left out). Waits at most
    /// `wait` for something to happen; empty `events` means that nothing did.
    fn job_events(&self, id: JobId, after: u64, wait: Duration) -> Result<JobEvents, Problem>;
    /// Asks a job to end. Returns at once; the job's own events tell when it did. Of an ended job: the job as it is.
    fn cancel_job(&self, by: &Caller, id: JobId) -> Result<Job, Problem>;

    /// Recovery points of a datasource, or of all, in the pool's order, oldest first.
    fn recovery_points(
        &self,
        datasource: Option<&str>,
        page: &PageQuery,
    ) -> Result<Page<RecoveryPoint>, Problem>;
    /// One point. `point` is an id, a unique prefix, and with a datasource also `latest` or `@TIME`. What only it uses is told
    /// if `is_counted`.
    fn recovery_point(
        &self,
        point: &str,
        datasource: Option<&str>,
        min_consistency: Option<Consistency>,
        is_counted: bool,
    ) -> Result<RecoveryPoint, Problem>;
    /// What differs between two points of one datasource, from their maps.
    fn diff(&self, a: &str, b: &str) -> Result<PointDiff, Problem>;
    /// Soft-deletes a point.
    fn delete_point(&self, by: &Caller, point: &str) -> Result<RecoveryPoint, Problem>;
    /// Takes a soft-deletion back.
    fn undelete_point(&self, by: &Caller, point: &str) -> Result<RecoveryPoint, Problem>;
    /// A point's disk for reading. Every read is checked against its hash.
    fn open_disk(&self, by: &Caller, point: &str, disk: u32) -> Result<Arc<dyn BlockDevice>, Problem>;

    /// How the pool is.
    fn pool_status(&self) -> Result<PoolStatus, Problem>;

    /// Enrolled hosts by name.
    fn hosts(&self, page: &PageQuery) -> Result<Page<Host>, Problem>;
    /// Makes an enrolment token. It is shown once and stored hashed.
    fn make_token(&self, by: &Caller, request: &MakeToken) -> Result<TokenMade, Problem>;
    /// Revokes a host, by name, id or unique prefix.
    fn revoke_host(&self, by: &Caller, host: &str) -> Result<Host, Problem>;

    /// Alerts, newest first; acknowledged ones only when `all`.
    fn alerts(&self, all: bool, page: &PageQuery) -> Result<Page<Alert>, Problem>;
    /// Takes note of an alert. A second time: as it is.
    fn acknowledge_alert(&self, by: &Caller, id: u64) -> Result<Alert, Problem>;

    /// Who can open the pool.
    fn recipients(&self) -> Result<Vec<Recipient>, Problem>;
    /// Begins a new key generation, without one recipient if one is named: id or unique prefix.
    fn rotate_keys(&self, by: &Caller, revoked: Option<&str>) -> Result<KeyGeneration, Problem>;
    /// Writes the recovery kit and proves it. The path is this machine's: refused unless standalone.
    fn write_kit(&self, by: &Caller, request: &KitFile) -> Result<KitReport, Problem>;
    /// Opens the pool with nothing but the kit. The path is this machine's: refused unless standalone.
    fn test_kit(&self, by: &Caller, request: &KitFile) -> Result<KitReport, Problem>;
}
