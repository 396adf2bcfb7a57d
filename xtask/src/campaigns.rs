//! Campaigns: searches for faults that could go on for hours, of which the tests run a slice and `cargo xtask night` much.
//!
//! A campaign is one command that ends by itself and exits 0 only if it found nothing. It prints the seed that repeats
//! a failure, and lines `result: N things, N other things` that can be added up. To add one, add a line to [`CAMPAIGNS`].
//!
//! The arguments of the slice and of the night are of cargo; words `NAME=VALUE` before the first other word are its
//! environment. `{seed}` and `{seconds}` stand for the numbers of a shift of the night.

use crate::run;
use std::process::Command;
use std::time::Duration;

/// One campaign.
pub struct Campaign {
    /// Its name, as the summary prints it.
    pub name: &'static str,
    /// The command of its slice for the tests; none if the tests have it among them.
    pub slice: Option<&'static str>,
    /// The slice is ended, and counts as failed, after this time.
    pub limit: Duration,
    /// The command of a shift of the night.
    pub night: &'static str,
    /// Its part of the night, against the parts of others; 0 runs it once, to its end.
    pub share: u64,
    /// A file without which this machine cannot run it.
    pub needs: Option<&'static str>,
}

const FIVE_MINUTES: Duration = Duration::from_secs(300);

/// All campaigns, in the shape of the suite's own build, so that nothing is built twice.
pub const CAMPAIGNS: &[Campaign] = &[
    // 500,000 crash points: what counts as one stands in crates/storage-pool/tests/rig/life.rs.
    Campaign {
        name: "SIM: storage pool, lives with crashes and faults",
        slice: Some(
            "SIM_POINTS=500000 SEED=1000000000 test -q --locked --workspace --test simulation -- lives_of_pools --nocapture",
        ),
        limit: Duration::from_secs(15 * 60),
        night: "SIM_SECONDS={seconds} SIM_THREADS=1 SEED={seed} test -q --locked --workspace --test simulation -- lives_of_pools --nocapture",
        share: 30,
        needs: None,
    },
    Campaign {
        name: "ENUM: storage pool, every crash state of every operation",
        slice: None,
        limit: FIVE_MINUTES,
        night: "test -q --locked --workspace --test crash_states -- --nocapture --test-threads=1",
        share: 0,
        needs: None,
    },
    // Hours, not minutes: on its own, so that it keeps no other operation waiting.
    Campaign {
        name: "ENUM: storage pool, a job that commits after a reclaim beside it",
        slice: None,
        limit: FIVE_MINUTES,
        night: "test -q --locked --workspace --test crash_states -- --ignored --nocapture",
        share: 0,
        needs: None,
    },
    Campaign {
        name: "ROT: storage pool, every bit of the golden pool",
        slice: Some(
            "ROT_STEP=1 test -q --locked --workspace --test rot -- flipped_bits_are_named --nocapture",
        ),
        limit: Duration::from_secs(10 * 60),
        night: "ROT_POINTS=40 ROT_SECONDS={seconds} ROT_THREADS=1 SEED={seed} test -q --locked --workspace --test rot -- larger_pool --nocapture",
        share: 10,
        needs: None,
    },
    Campaign {
        name: "ROT: storage pool, golden pools by feature",
        slice: None,
        limit: FIVE_MINUTES,
        night: "ROT_BITS=4000 test -q --locked --workspace --test golden -- flipped_bits --nocapture",
        share: 0,
        needs: None,
    },
    // 500 kills, in two halves that take equally long: standalone, and server and agent apart.
    Campaign {
        name: "KILL: program, kill -9 at random moments",
        slice: Some(
            "KILLS=340 KILLS_NETWORK=160 SEED=2 test -q --locked --workspace --test kill -- --nocapture",
        ),
        limit: Duration::from_secs(10 * 60),
        night: "KILLS=130 KILLS_NETWORK=60 SEED={seed} test -q --locked --workspace --test kill -- --nocapture",
        share: 25,
        needs: None,
    },
    // A hundred kills and more of agent, server, libvirtd and QEMU in a backup, of an agent alone, and of a recovery.
    Campaign {
        name: "KILL: agent, server, libvirtd and QEMU in backup and recovery of a real guest, kill -9 at random moments",
        slice: None,
        limit: FIVE_MINUTES,
        night: "LIBVIRT_KILLS=100 SEED={seed} test -q --locked --workspace --test libvirt -- kill dies --test-threads=1 --nocapture",
        share: 5,
        needs: Some("/usr/sbin/libvirtd"),
    },
    Campaign {
        name: "FSX: program, storage that cuts the power, fails, fills and lies",
        slice: Some("FSX_ACCIDENTS=100 SEED=2 test -q --locked --workspace --test fsx -- --nocapture"),
        limit: FIVE_MINUTES,
        night: "FSX_ACCIDENTS=100 FSX_LIES=20 FSX_LIVES=8 SEED={seed} test -q --locked --workspace --test fsx -- --nocapture",
        share: 20,
        needs: Some("/dev/fuse"),
    },
    Campaign {
        name: "ROT: program, flipped bits in every file of the data folder",
        slice: None,
        limit: FIVE_MINUTES,
        night: "BITS=2 FIRST_SEED={seed} test -q --locked --workspace --test rot -- a_flipped_bit --nocapture",
        share: 5,
        needs: None,
    },
    Campaign {
        name: "synchronisation: lives of a machine, its tracker, host and pool",
        slice: None,
        limit: FIVE_MINUTES,
        night: "STILLPOINT_LIVES=2000 STILLPOINT_FIRST_SEED={seed} test -q --locked --workspace --test simulation -- whatever_happens --nocapture",
        share: 5,
        needs: None,
    },
    Campaign {
        name: "FUZZ: images of every format",
        slice: None,
        limit: FIVE_MINUTES,
        night: "FUZZ_SECONDS=60 FUZZ_SEED={seed} test -q --locked --workspace --test fuzz_slice -- --nocapture",
        share: 5,
        needs: None,
    },
];

impl Campaign {
    /// Whether this machine can run it; why not, if it cannot.
    pub fn missing(&self) -> Option<&'static str> {
        self.needs.filter(|file| !std::path::Path::new(file).exists())
    }
}

/// The cargo command of a campaign, with the numbers of a shift in it.
pub fn command(words: &str, seed: u64, seconds: u64) -> Command {
    let words = words.replace("{seed}", &seed.to_string()).replace("{seconds}", &seconds.to_string());
    let mut command = run::cargo();
    let mut is_environment = true;
    for word in words.split_whitespace() {
        match word.split_once('=') {
            Some((name, value)) if is_environment && !name.starts_with('-') => {
                command.env(name, value);
            }
            _ => {
                is_environment = false;
                command.arg(word);
            }
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_shift_and_environment_find_their_places() {
        let command = command("A=1 SEED={seed} test -q -- --seconds {seconds} --x=y", 7, 60);
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        assert_eq!(words, ["test", "-q", "--", "--seconds", "60", "--x=y"]);
        let given: Vec<_> = command.get_envs().filter(|(name, _)| *name == "SEED").collect();
        assert_eq!(given.len(), 1);
        assert_eq!(given[0].1.and_then(|value| value.to_str()), Some("7"));
    }
}
