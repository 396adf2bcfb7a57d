//! What the agent leaves to the machines of its host: a low priority, and a cap on processor time.
//!
//! The cap is a token bucket over the processor time of the whole process, so that TLS and compression count wherever
//! they run. It is paid where data enters the agent's work: before each read of a protected disk, and before each read
//! and write of a recovered one. What is behind is bounded by the transfer's memory, so it follows.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use block_io::Pace;
use environment::Clock;
use model::{Code, Problem};

/// How a host's work is held back.
#[derive(Clone, Default)]
pub struct Restraint {
    /// Whether what protects machines runs at a low priority.
    pub low_priority: bool,
    /// The cap on processor time.
    pub cpu: Option<Arc<dyn Pace>>,
}

/// Steps of `nice`: about a tenth of a processor that others want, and a low priority at the disk, which follows.
/// At 19, a host that is always busy would never finish a backup.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// Gives this thread, and those that it starts, a low priority. What it has already is not raised.
pub fn lower_priority() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{getpriority_process, setpriority_process};
        // A system that forbids it runs the work as any other: slower for the others, not wrong.
        if getpriority_process(None).is_ok_and(|now| now < NICE) {
            let _ = setpriority_process(None, NICE);
        }
    }
}

/// A cap on processor time, in percent of one core.
pub struct CpuLimit {
    clock: Arc<dyn Clock>,
    percent: u64,
    bucket: Mutex<Bucket>,
}

struct Bucket {
    /// When it was looked at, and the processor time then, in microseconds.
    seen: u64,
    spent: u64,
    /// What may be spent, in hundredths of a microsecond so that no part of a percent is lost.
    may: i64,
}

impl CpuLimit {
    /// Saved up at most: the time of a rest that can be made good, in microseconds.
    const SAVED: i64 = 200_000;
    /// Owed at most, in microseconds of waiting: what else the process does must not stop this for longer than a second.
    const OWED: i64 = 1_000_000;

    /// A cap of `percent` of one core. Fails where the system does not tell processor time.
    pub fn new(percent: u32, clock: Arc<dyn Clock>) -> Result<CpuLimit, Problem> {
        let spent = clock.process_cpu_micros().ok_or_else(|| {
            Problem::new(Code::Usage, "This system does not tell the processor time of a process.")
                .hint("Leave out --cpu-limit (STILLPOINT_CPU_LIMIT) here.")
        })?;
        let bucket = Bucket { seen: clock.monotonic_micros(), spent, may: 0 };
        Ok(CpuLimit { clock, percent: u64::from(percent.max(1)), bucket: Mutex::new(bucket) })
    }

    /// Microseconds to wait now.
    fn owed(&self) -> u64 {
        let percent = self.percent.min(i64::MAX as u64) as i64;
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.monotonic_micros();
        let spent = self.clock.process_cpu_micros().unwrap_or(bucket.spent);
        let passed = i64::try_from(now.saturating_sub(bucket.seen)).unwrap_or(i64::MAX);
        let used = i64::try_from(spent.saturating_sub(bucket.spent)).unwrap_or(i64::MAX);
        (bucket.seen, bucket.spent) = (now, spent);
        bucket.may = bucket
            .may
            .saturating_add(passed.saturating_mul(percent))
            .saturating_sub(used.saturating_mul(100))
            .clamp(percent.saturating_mul(-CpuLimit::OWED), percent.saturating_mul(CpuLimit::SAVED));
        (bucket.may.min(0).unsigned_abs()).div_ceil(self.percent)
    }
}

impl Pace for CpuLimit {
    /// Waits until processor time is left, however many bytes are next: they are paid for when they were worked on.
    fn wait(&self, _bytes: u64) {
        let wait = self.owed();
        if wait > 0 {
            self.clock.sleep(Duration::from_micros(wait));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// A machine on which a piece of work takes as long as it is said to.
    struct Machine {
        clock: environment::FixedClock,
        cpu: AtomicU64,
    }

    impl Machine {
        fn new() -> Arc<Machine> {
            Arc::new(Machine { clock: environment::FixedClock::new(0), cpu: AtomicU64::new(7) })
        }

        /// Works on `cores` cores for so long.
        fn work(&self, micros: u64, cores: u64) {
            self.clock.advance(Duration::from_micros(micros));
            self.cpu.fetch_add(micros * cores, Ordering::SeqCst);
        }
    }

    impl Clock for Machine {
        fn now_micros(&self) -> u64 {
            self.clock.now_micros()
        }
        fn monotonic_micros(&self) -> u64 {
            self.clock.monotonic_micros()
        }
        fn sleep(&self, duration: Duration) {
            self.clock.sleep(duration);
        }
        fn process_cpu_micros(&self) -> Option<u64> {
            Some(self.cpu.load(Ordering::SeqCst))
        }
    }

    #[test]
    fn the_cap_holds_whatever_the_cores() {
        for (percent, cores) in [(10, 1), (50, 2), (100, 2), (150, 4), (33, 3)] {
            let machine = Machine::new();
            let limit = CpuLimit::new(percent, machine.clone()).unwrap();
            for _ in 0..1000 {
                machine.work(4_000, cores);
                limit.wait(1 << 20);
            }
            let cpu = machine.process_cpu_micros().unwrap() - 7;
            let share = cpu * 100 / machine.monotonic_micros();
            assert!((u64::from(percent) - 1..=u64::from(percent)).contains(&share), "{percent}: {share}");
        }
    }

    #[test]
    fn below_the_cap_nothing_waits_and_rest_is_saved_only_for_a_moment() {
        let machine = Machine::new();
        let limit = CpuLimit::new(50, machine.clone()).unwrap();
        for _ in 0..100 {
            machine.work(1_000, 1);
            machine.sleep(Duration::from_micros(2_000));
            limit.wait(1);
        }
        assert_eq!(machine.monotonic_micros(), 300_000, "a third of a core is below the cap");
        machine.sleep(Duration::from_secs(3600));
        limit.wait(1);
        let before = machine.monotonic_micros();
        machine.work(1_000_000, 1);
        limit.wait(1);
        let waited = machine.monotonic_micros() - before - 1_000_000;
        assert_eq!(waited, 800_000, "an hour of rest is worth 200 ms");
    }

    #[test]
    fn what_else_the_process_does_stops_no_backup() {
        let machine = Machine::new();
        let limit = CpuLimit::new(10, machine.clone()).unwrap();
        machine.work(60_000_000, 8);
        let before = machine.monotonic_micros();
        limit.wait(1);
        assert_eq!(machine.monotonic_micros() - before, 1_000_000);
    }

    #[test]
    fn a_system_that_does_not_tell_is_refused() {
        let blind = Arc::new(environment::FixedClock::new(0));
        assert_eq!(CpuLimit::new(50, blind).err().unwrap().code, Code::Usage);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_low_priority_is_of_this_thread_and_those_it_starts_alone() {
        use rustix::process::getpriority_process;
        let before = getpriority_process(None).unwrap();
        let seen = std::thread::spawn(|| {
            lower_priority();
            let started = std::thread::spawn(|| getpriority_process(None).unwrap()).join().unwrap();
            (getpriority_process(None).unwrap(), started)
        });
        let low = before.max(NICE);
        assert_eq!(seen.join().unwrap(), (low, low));
        assert_eq!(getpriority_process(None).unwrap(), before);
    }
}
