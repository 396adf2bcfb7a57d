//! Campaigns: searches for faults that could go on for hours, of which the tests run a short slice.
//!
//! A campaign is one command that ends by itself and exits 0 only if it found nothing. It prints the seed that repeats
//! a failure. To add one, add a line to [`CAMPAIGNS`].

use std::time::Duration;

/// One campaign and its slice for the tests.
pub struct Campaign {
    /// Its name, as the summary prints it.
    pub name: &'static str,
    /// Arguments for cargo that run the slice.
    pub cargo: &'static [&'static str],
    /// The slice is ended, and counts as failed, after this time.
    pub limit: Duration,
}

/// All campaigns.
pub const CAMPAIGNS: &[Campaign] = &[
    Campaign {
        name: "storage pool: lives with crashes and faults",
        cargo: &[
            "run",
            "-q",
            "--locked",
            "-p",
            "storage-pool",
            "--example",
            "simulate",
            "--",
            "--seconds",
            "15",
        ],
        limit: Duration::from_secs(300),
    },
    Campaign {
        name: "storage pool: flipped bits of every file",
        cargo: &[
            "run",
            "-q",
            "--locked",
            "-p",
            "storage-pool",
            "--example",
            "rot",
            "--",
            "--first",
            "3",
            "--step",
            "11",
        ],
        limit: Duration::from_secs(300),
    },
    // As many as one likes: KILLS=200 SEED=7 cargo test -p stillpoint --test kill -- --nocapture. In the shape of the
    // suite's own build, so that nothing is built twice.
    Campaign {
        name: "program: kill -9 at random moments",
        cargo: &[
            "--config",
            "env.KILLS=\"40\"",
            "--config",
            "env.SEED=\"2\"",
            "test",
            "-q",
            "--locked",
            "--workspace",
            "--test",
            "kill",
            "--",
            "--nocapture",
        ],
        limit: Duration::from_secs(300),
    },
];
