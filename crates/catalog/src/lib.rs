//! The server's database: derived tables and history.
//!
//! *Derived* tables (datasources, replicas, points, hosts, settings) are a pure function of the pool's records: they are
//! replaced from it, never the other way, and losing them loses nothing (INV-6). *History* (jobs, their log, alerts,
//! sessions) is the catalog's own; a sealed export saves it, written at a clean close: at each while it is small, once a day when it is long.
//!
//! Refuses: knowing the pool, SQL in its interface, believing a damaged file.
//!
//! - [`Catalog`] is a trait of domain operations; [`conformance`] examines every implementation.
//! - [`SqliteCatalog`] is the default one. Any changed bit of its file is noticed: after a clean close by a digest of the
//!   whole file beside it; after a crash by the database's own check, and the caller replaces the derived tables.
//! - A damaged file is moved aside, never deleted, and an empty catalog with the salvaged history takes its place;
//!   [`Opened::rebuilt`] says so, and the caller fills the derived tables from the pool.

pub mod conformance;
mod row;
mod sqlite;

pub use row::{AlertRow, Derived, Filter, JobRow, LogRow, Row, Rows, SessionRow, Table};
pub use sqlite::{Opened, SqliteCatalog};

/// Why the catalog could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// A file beside or of the database cannot be read or written.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// `read`, `write`, `move aside`.
        action: &'static str,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The database engine failed.
    #[error("the catalog's database failed: {0}")]
    Database(#[from] rusqlite::Error),
    /// A stored row does not parse.
    #[error("the catalog's table {table} has a row that cannot be read: {reason}")]
    Row {
        /// The table.
        table: &'static str,
        /// What was found.
        reason: String,
    },
    /// A newer program wrote it.
    #[error("{path}: has schema {found}, this program knows up to {known}")]
    TooNew {
        /// The file.
        path: std::path::PathBuf,
        /// What was found.
        found: i64,
        /// What this program knows.
        known: i64,
    },
    /// A thread ended in the middle of an operation.
    #[error("the catalog was left in the middle of an operation; open it again")]
    Poisoned,
}

impl From<CatalogError> for model::Problem {
    fn from(error: CatalogError) -> model::Problem {
        let code = match &error {
            CatalogError::TooNew { .. } => model::Code::PoolTooNew,
            _ => model::Code::CatalogDamaged,
        };
        model::Problem::new(code, format!("{error}."))
    }
}

/// What the server keeps in its database. Every method is one transaction: after `Ok` it is durable, after an error
/// nothing of it is.
pub trait Catalog: Send + Sync {
    /// Replaces all derived tables by the pool's state.
    fn replace_derived(&self, derived: &Derived) -> Result<(), CatalogError>;
    /// Empties `cleared` and puts rows into derived tables: what [`Catalog::replace_derived`] does, for the tables and rows
    /// that may have changed.
    fn update_derived(&self, cleared: &[Table], rows: &Derived) -> Result<(), CatalogError>;
    /// Puts rows into a derived table; a row of the same key is replaced.
    fn put(&self, table: Table, rows: &[Row]) -> Result<(), CatalogError>;
    /// Takes a row out of a derived table; one that is not there is no error.
    fn remove(&self, table: Table, key: &str) -> Result<(), CatalogError>;
    /// One row of a derived table.
    fn get(&self, table: Table, key: &str) -> Result<Option<Row>, CatalogError>;
    /// Up to `limit` rows of a derived table in its order, after the row `after`, of one owner if given.
    ///
    /// The order is (`order`, `key`): for points the pool's sequence, for the others usually 0 and so the key.
    fn list(
        &self,
        table: Table,
        owner: Option<&str>,
        after: Option<(u64, &str)>,
        limit: u32,
    ) -> Result<Rows, CatalogError>;
    /// All derived tables as one text: equal text, equal tables, whatever the history of writes.
    fn derived_dump(&self) -> Result<String, CatalogError>;

    /// Puts a job; the same id replaces it.
    fn put_job(&self, job: &JobRow) -> Result<(), CatalogError>;
    /// One job.
    fn job(&self, id: &str) -> Result<Option<JobRow>, CatalogError>;
    /// Ids of jobs that begin with `prefix`, at most two: enough to tell whether it is unique.
    fn jobs_with_prefix(&self, prefix: &str) -> Result<Vec<String>, CatalogError>;
    /// Jobs, newest first, before the job `before` (its time of creation and id).
    fn jobs(
        &self,
        filter: Filter,
        before: Option<(u64, &str)>,
        limit: u32,
    ) -> Result<Vec<JobRow>, CatalogError>;
    /// Adds a line to a job's log and returns its number, from 1.
    fn log(&self, job: &str, time: u64, level: &str, message: &str) -> Result<u64, CatalogError>;
    /// A job's log after line `after`.
    fn log_lines(&self, job: &str, after: u64, limit: u32) -> Result<Vec<LogRow>, CatalogError>;
    /// Puts an alert: number 0 gets the next number. Returns the number.
    fn put_alert(&self, alert: &AlertRow) -> Result<u64, CatalogError>;
    /// One alert.
    fn alert(&self, number: u64) -> Result<Option<AlertRow>, CatalogError>;
    /// Alerts, newest first, before number `before`; acknowledged ones only if `all`.
    fn alerts(&self, all: bool, before: Option<u64>, limit: u32) -> Result<Vec<AlertRow>, CatalogError>;
    /// Puts a session; the same id replaces it.
    fn put_session(&self, session: &SessionRow) -> Result<(), CatalogError>;
    /// Sessions by id.
    fn sessions(&self) -> Result<Vec<SessionRow>, CatalogError>;
    /// Writes the sealed export of history.
    fn export_history(&self) -> Result<(), CatalogError>;
}
