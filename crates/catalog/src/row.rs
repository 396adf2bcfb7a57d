//! Plain rows. A derived row carries what is searched as columns and the rest as the server's own JSON.

use serde::{Deserialize, Serialize};

/// A derived table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Machines; key: id, owner: host id or empty.
    Datasources,
    /// Replicas; key: id, owner: datasource.
    Replicas,
    /// Recovery points; key: id, owner: datasource, order: sequence.
    Points,
    /// Hosts; key: id.
    Hosts,
    /// Settings and policies; key: name.
    Settings,
}

impl Table {
    /// Every derived table.
    pub const ALL: [Table; 5] =
        [Table::Datasources, Table::Replicas, Table::Points, Table::Hosts, Table::Settings];

    /// Its name in the database and in dumps.
    pub fn name(self) -> &'static str {
        match self {
            Table::Datasources => "datasources",
            Table::Replicas => "replicas",
            Table::Points => "points",
            Table::Hosts => "hosts",
            Table::Settings => "settings",
        }
    }
}

/// A row of a derived table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Row {
    /// Unique in the table.
    pub key: String,
    /// What it belongs to; empty if nothing.
    pub owner: String,
    /// Its place in lists, before the key.
    pub order: u64,
    /// Everything else, as the server writes it.
    pub json: String,
}

/// Rows of a list.
pub type Rows = Vec<Row>;

/// The contents of all derived tables.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Derived {
    /// Rows by table, in any order.
    pub rows: Vec<(Table, Row)>,
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct JobRow {
    /// Its id.
    pub id: String,
    /// Microseconds since 1970.
    pub created: u64,
    /// `queued`, `running`, `succeeded`, `failed`, `cancelled`.
    pub state: String,
    /// The machine it is about; empty if none.
    pub datasource: String,
    /// Everything else, as the server writes it.
    pub json: String,
}

/// A line of a job's log.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LogRow {
    /// The job.
    pub job: String,
    /// From 1 within the job.
    pub line: u64,
    /// Microseconds since 1970.
    pub time: u64,
    /// `info`, `warning`, `error`.
    pub level: String,
    /// One sentence.
    pub message: String,
}

/// An alert.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AlertRow {
    /// Its number; 0 in a new one.
    pub number: u64,
    /// Whether somebody took note.
    pub acknowledged: bool,
    /// Everything else, as the server writes it.
    pub json: String,
}

/// A session.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SessionRow {
    /// Its id.
    pub id: String,
    /// Everything else, as the server writes it.
    pub json: String,
}

/// Which jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Filter {
    /// Only those that failed.
    pub failed: bool,
    /// Only those created at or after, microseconds since 1970.
    pub since: u64,
}
