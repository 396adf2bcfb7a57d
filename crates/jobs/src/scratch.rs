//! How much scratch space a frozen view will need on its host (S49-S51): what the machine overwrites while it is read.
//!
//! S50: size x churn x window. The churn is measured, from the machine's newest points; so is the window, from how fast they were read.

use model::Timestamp;
use storage_pool::state::Point;

/// How fast a disk is read where nothing is known of it, in bytes a second: a network of 1 Gbit/s.
const READ_RATE: u64 = 100 << 20;
/// A view stands for so long at least, in seconds.
const LEAST_WINDOW: u64 = 30;
/// What is measured is multiplied by this: a backup does not meet the average hour.
const SAFETY: u64 = 2;
/// Figure of a point: for how many milliseconds its view stood.
pub const VIEW_MILLIS: &str = "view_millis";

/// What is known of how a machine changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Churn {
    /// Bytes that change in a second.
    pub bytes_per_second: u64,
    /// Bytes read in a second.
    pub read_per_second: u64,
}

impl Churn {
    /// From a machine's points, oldest first: the highest churn between two neighbours of the newest, and the rate of the last reads.
    pub fn measured<'a>(points: impl DoubleEndedIterator<Item = &'a Point>) -> Option<Churn> {
        const LOOKED_AT: usize = 8;
        let newest: Vec<&Point> = points.rev().take(LOOKED_AT).collect();
        let mut churn = None;
        for pair in newest.windows(2) {
            let [later, earlier] = pair else { continue };
            let millis = later.captured.since(earlier.captured) / (Timestamp::SECOND / 1000);
            let changed = later.details().figures.get("bytes_changed").copied().unwrap_or_default();
            let rate =
                u64::try_from(u128::from(changed) * 1000 / u128::from(millis.max(1000))).unwrap_or(u64::MAX);
            churn = churn.max(Some(rate));
        }
        let rates = newest.iter().filter_map(|point| {
            let figures = point.details().figures;
            let (read, millis) = (figures.get("bytes_read")?, figures.get(VIEW_MILLIS)?);
            // Too little to tell a rate.
            (*read >= 64 << 20).then(|| read.saturating_mul(1000) / (*millis).max(1))
        });
        Some(Churn {
            bytes_per_second: churn?,
            read_per_second: rates.min().unwrap_or(READ_RATE).max(1 << 20),
        })
    }

    /// Bytes of scratch space for a view of disks of `size` bytes of which `read` are read.
    pub fn scratch(self, size: u64, read: u64) -> u64 {
        let window = (read / self.read_per_second).max(LEAST_WINDOW);
        self.bytes_per_second.saturating_mul(window).saturating_mul(SAFETY).min(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formula_is_churn_by_window_and_never_more_than_the_disk() {
        let churn = Churn { bytes_per_second: 1 << 20, read_per_second: 100 << 20 };
        // 10 GiB at 100 MiB/s are 102 s, in which 102 MiB change; twice that.
        assert_eq!(churn.scratch(10 << 30, 10 << 30), 204 << 20);
        assert_eq!(churn.scratch(10 << 30, 0), 60 << 20);
        assert_eq!(churn.scratch(1 << 20, 10 << 30), 1 << 20);
        let still = Churn { bytes_per_second: 0, ..churn };
        assert_eq!(still.scratch(1 << 40, 1 << 40), 0);
    }
}
