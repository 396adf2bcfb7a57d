//! What a recovery point says about itself.

use serde::{Deserialize, Serialize};

/// How far the frozen view of the machine could be trusted when it was taken. Ordered from least to most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// As after a power cut.
    Crash,
    /// File systems were frozen.
    File,
    /// Applications said that they were quiet.
    Application,
    /// The machine was off, or its image files were proved to stand still.
    Offline,
}

impl Consistency {
    /// The word used in files, API and screens.
    pub fn word(self) -> &'static str {
        match self {
            Consistency::Crash => "crash",
            Consistency::File => "file",
            Consistency::Application => "application",
            Consistency::Offline => "offline",
        }
    }
}

impl std::str::FromStr for Consistency {
    type Err = String;
    fn from_str(text: &str) -> Result<Consistency, String> {
        [Consistency::Crash, Consistency::File, Consistency::Application, Consistency::Offline]
            .into_iter()
            .find(|level| level.word() == text)
            .ok_or_else(|| {
                format!("{text:?} is not a consistency level: expected application, file, crash or offline")
            })
    }
}

/// The life of a recovery point, as `recovery-point list` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PointState {
    /// Being sent.
    Receiving,
    /// Durable and read back.
    Committed,
    /// All its bytes were read and hashed since.
    Verified,
    /// A machine was started from it.
    RestoreTested,
    /// Some of the machine's disks are missing.
    Incomplete,
    /// It may hold old bytes: the change tracker that it relied on was caught lying.
    Suspect,
    /// Some of its bytes cannot be had.
    Damaged,
    /// Deleted, and still recoverable for a while.
    SoftDeleted,
    /// Deleted; its space returns at the next reclaim.
    Expired,
}

impl PointState {
    /// The word used in files, API and screens.
    pub fn word(self) -> &'static str {
        match self {
            PointState::Receiving => "receiving",
            PointState::Committed => "committed",
            PointState::Verified => "verified",
            PointState::RestoreTested => "restore-tested",
            PointState::Incomplete => "incomplete",
            PointState::Suspect => "suspect",
            PointState::Damaged => "damaged",
            PointState::SoftDeleted => "soft-deleted",
            PointState::Expired => "expired",
        }
    }

    /// Whether the name `latest` may mean a point in this state.
    pub fn counts_as_latest(self) -> bool {
        matches!(self, PointState::Committed | PointState::Verified | PointState::RestoreTested)
    }
}

/// Why a job read what it read: a chain from the finding to the decision, each a sentence part without a full stop.
///
/// `["list is against point X", "the replica is at Y"]` after `full scan` is shown as
/// `full scan because: list is against point X, the replica is at Y`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// What was done: `full scan`, `changed extents`, `initial replication`, `consistency check`.
    pub decision: String,
    /// The findings that led to it, first cause first.
    pub because: Vec<String>,
}

impl Cause {
    /// A decision with its findings.
    pub fn new(decision: impl Into<String>, because: impl IntoIterator<Item = impl Into<String>>) -> Cause {
        Cause { decision: decision.into(), because: because.into_iter().map(Into::into).collect() }
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.decision)?;
        if !self.because.is_empty() {
            write!(f, " because: {}", self.because.join(", "))?;
        }
        Ok(())
    }
}

/// What is made of a running machine whose file systems cannot be frozen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unfrozen {
    /// No point.
    Fail,
    /// The machine is paused for the instant of the checkpoint; the point is crash-consistent.
    Pause,
    /// A crash-consistent point, and an alert that stands as long as that is so.
    #[default]
    Crash,
}

impl Unfrozen {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Unfrozen::Fail => "fail",
            Unfrozen::Pause => "pause",
            Unfrozen::Crash => "crash",
        }
    }
}

impl std::str::FromStr for Unfrozen {
    type Err = String;

    fn from_str(text: &str) -> Result<Unfrozen, String> {
        [Unfrozen::Fail, Unfrozen::Pause, Unfrozen::Crash]
            .into_iter()
            .find(|one| one.word() == text)
            .ok_or_else(|| format!("{text:?} is none of fail, pause and crash"))
    }
}
