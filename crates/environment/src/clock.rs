//! What time it is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Wall-clock time. It may jump either way; nothing may be deleted or unlocked on its word alone (INV-19).
pub trait Clock: Send + Sync {
    /// Microseconds since 1970 UTC.
    fn now_micros(&self) -> u64;
    /// Microseconds of a clock that never goes back, from an arbitrary start. For durations.
    fn monotonic_micros(&self) -> u64;
    /// Waits.
    fn sleep(&self, duration: Duration);
    /// Microseconds of processor time that all threads of this process have taken; `None` where nobody tells.
    fn process_cpu_micros(&self) -> Option<u64> {
        None
    }
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_micros(&self) -> u64 {
        // Before 1970 counts as 1970: a machine that boots without a clock.
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_micros() as u64)
    }

    fn monotonic_micros(&self) -> u64 {
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        START.get_or_init(std::time::Instant::now).elapsed().as_micros() as u64
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }

    #[cfg(unix)]
    fn process_cpu_micros(&self) -> Option<u64> {
        let taken = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let seconds = u64::try_from(taken.tv_sec).ok()?;
        Some(seconds.saturating_mul(1_000_000).saturating_add(u64::try_from(taken.tv_nsec).ok()? / 1000))
    }
}

/// A clock that moves only when told; `sleep` moves it.
#[derive(Debug)]
pub struct FixedClock {
    now: AtomicU64,
    elapsed: AtomicU64,
}

impl FixedClock {
    /// A clock that shows `now` microseconds since 1970.
    pub fn new(now: u64) -> FixedClock {
        FixedClock { now: AtomicU64::new(now), elapsed: AtomicU64::new(0) }
    }

    /// Time passes.
    pub fn advance(&self, duration: Duration) {
        self.now.fetch_add(duration.as_micros() as u64, Ordering::SeqCst);
        self.elapsed.fetch_add(duration.as_micros() as u64, Ordering::SeqCst);
    }

    /// The wall clock jumps; the monotonic one does not.
    pub fn jump_to(&self, now: u64) {
        self.now.store(now, Ordering::SeqCst);
    }
}

impl Clock for FixedClock {
    fn now_micros(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    fn monotonic_micros(&self) -> u64 {
        self.elapsed.load(Ordering::SeqCst)
    }

    fn sleep(&self, duration: Duration) {
        self.advance(duration);
    }
}
