//! What a transfer counted.

/// What a protect transfer read, compared and moved. All in bytes; blocks count with their full 64 KiB.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Figures {
    /// Size of all disks.
    pub bytes_logical: u64,
    /// Bytes of the change lists, as listed.
    pub bytes_listed: u64,
    /// Bytes read from the frozen view, audits included (told by the agent at the end).
    pub bytes_read: u64,
    /// Bytes of blocks read although nothing called them changed.
    pub bytes_audited: u64,
    /// Bytes announced so far, zeros included: the progress of a pass against what it will announce.
    pub bytes_announced: u64,
    /// Bytes that differ from the replica before the job.
    pub bytes_changed: u64,
    /// Block data from agent to server, before compression, each block once.
    pub bytes_transferred: u64,
    /// The same as it was encoded in frames.
    pub bytes_on_wire: u64,
    /// Block data sent a second time after a cut.
    pub bytes_transferred_again: u64,
    /// Where the audit of the next run begins, for each disk.
    pub next_rotations: Vec<u64>,
}

/// Told how far a transfer is. Called often, from the transfer's own thread: be quick.
pub trait Progress: Send + Sync {
    /// The figures so far.
    fn update(&self, figures: &Figures);
}

/// Progress that nobody looks at.
pub struct Silent;

impl Progress for Silent {
    fn update(&self, _figures: &Figures) {}
}
