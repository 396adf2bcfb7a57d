//! The server behind its API: data folder, pool, datasources, running jobs.
//!
//! ```text
//! api::Service  ->  App  ->  jobs (over the pool and a ProtectedHost)
//! ```
//!
//! One [`App`] owns one data folder:
//!
//! ```text
//! DIR/pool/                 the storage pool, docs/formats/storage-pool.md
//! DIR/keys/server.secret    the server's way into the pool (a twin file)
//! DIR/catalog/              the database: derived tables, history of jobs and alerts
//! DIR/agent/                the state of the agent of this machine, where there is one
//! ```
//!
//! Refuses to know: how a host is reached ([`Hosts`]), HTTP, what an image file is.

mod copies;
mod datasources;
mod folder;
mod hashes;
mod history;
mod machines;
mod mapping;
mod owner;
mod points;
mod runner;
mod service;
mod work;

use std::sync::{Arc, Mutex, PoisonError};

use environment::{Clock, Randomness};
use jobs::ProtectedHost;
use model::{Code, HostId, Problem};
use storage_pool::Pool;
use storage_pool::reclaim::DeletionService;

pub use copies::{Copies, CopyDeletion};
pub use datasources::StoredDatasource;
pub use folder::{DataFolder, FolderOptions, NewPool, Opened, default_kit_path, open_kit, read_secret};
pub use hashes::verify_folder;
pub use history::History;
pub use runner::Runner;
pub use service::AppService;
pub(crate) use work::TokenBucket;

/// How the server reaches hosts.
pub trait Hosts: Send + Sync {
    /// The host of a datasource; `None` is this machine itself.
    fn host(&self, host: Option<HostId>) -> Result<Arc<dyn ProtectedHost>, Problem>;
    /// Enrolled hosts.
    fn list(&self) -> Result<Vec<protocol::api::Host>, Problem>;
    /// Makes an enrolment token.
    fn make_token(&self, request: &protocol::api::MakeToken) -> Result<protocol::api::TokenMade, Problem>;
    /// Revokes a host.
    fn revoke(&self, host: HostId) -> Result<(), Problem>;
    /// Whether this process is server and agent in one, with nobody else on the line.
    fn is_standalone(&self) -> bool;
}

/// Who may ask over the network.
pub trait Tokens: Send + Sync {
    /// The name of a token's owner, if the token is right.
    fn check(&self, token: &str) -> Option<String>;
}

/// Refuses every token: standalone.
pub struct NoTokens;

impl Tokens for NoTokens {
    fn check(&self, _token: &str) -> Option<String> {
        None
    }
}

/// The parts an [`App`] is made of.
pub struct Parts {
    /// The data folder, for messages and kits.
    pub folder: DataFolder,
    /// The pool.
    pub pool: Arc<Pool>,
    /// How hosts are reached.
    pub hosts: Arc<dyn Hosts>,
    /// Who may ask.
    pub tokens: Arc<dyn Tokens>,
    /// What unlinks.
    pub deletion: Arc<dyn DeletionService + Send + Sync>,
    /// Copies of the pool.
    pub copies: Copies,
    /// Jobs and alerts of before.
    pub history: Arc<History>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Unpredictable bytes.
    pub randomness: Arc<dyn Randomness>,
}

/// The server.
pub struct App {
    pub(crate) parts: Parts,
    pub(crate) runner: Runner,
    /// Points known to be damaged, at the head of the sequence for which that was found out.
    pub(crate) damaged: Mutex<Option<(u64, std::collections::BTreeSet<model::RecoveryPointId>)>>,
    /// What only one point uses, at the head of the sequence for which it was counted.
    pub(crate) unique: Mutex<Option<(u64, points::UniqueBytes)>>,
}

impl App {
    /// A server over these parts.
    pub fn new(parts: Parts) -> Arc<App> {
        let runner = Runner::new(parts.clock.clone(), parts.randomness.clone(), parts.history.clone());
        Arc::new(App { parts, runner, damaged: Mutex::new(None), unique: Mutex::new(None) })
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.parts.pool
    }

    /// Running and ended jobs.
    pub fn runner(&self) -> &Runner {
        &self.runner
    }

    /// Ends in order: the catalog is brought up to the pool and closed.
    pub fn close(&self) {
        if let Err(problem) = self.parts.history.close(self.pool()) {
            tracing::warn!("the catalog was not closed in order: {problem}");
        }
    }

    pub(crate) fn forget_damaged(&self) {
        *self.damaged.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn writable(&self) -> Result<(), Problem> {
        if self.parts.pool.is_writable() {
            return Ok(());
        }
        Err(Problem::new(Code::Internal, "This command opened the pool for reading and was asked to write."))
    }
}
