//! Room for what running machines overwrite while they are read, shared by all views on one volume (S49-S51).
//!
//! Before a view: what it is predicted to need, and what the others on the same volume are, must be free, beside a reserve. If it is
//! not, a view waits for the others to end; if there are none, it is refused with the numbers. No more than a few views at once read from one
//! volume: more of them would only be slower together.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::JobId;

use crate::ProviderError;

/// Bytes that stay free on a volume, whatever happens.
pub(super) const RESERVE: u64 = 512 << 20;
/// Views that read from one volume at once.
const VIEWS: usize = 2;
/// How long a view waits for others to end: less than a server waits for the word of a silent agent.
const PATIENCE: Duration = Duration::from_secs(200);

#[derive(Debug, Clone, Copy)]
struct View {
    job: JobId,
    predicted: u64,
}

#[derive(Debug, Default)]
struct Shared {
    views: Mutex<BTreeMap<u64, Vec<View>>>,
    left: Condvar,
}

/// Views by volume, of this process.
#[derive(Debug, Clone, Default)]
pub(super) struct Volumes(Arc<Shared>);

/// A view's place on its volumes, until it is dropped.
pub(super) struct Place {
    shared: Arc<Shared>,
    job: JobId,
}

impl Shared {
    fn views(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<View>>> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes free in a folder.
pub(super) fn free(folder: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(folder)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Why a view cannot begin now.
enum Verdict {
    Go,
    Wait(String),
    Refuse(String),
}

fn verdict(folder: &Path, free: u64, predicted: u64, others: &[View]) -> Verdict {
    let reserved: u64 = others.iter().map(|view| view.predicted).sum();
    let needed = (2 * RESERVE).saturating_add(predicted).saturating_add(reserved);
    let folder = folder.display();
    if free < needed {
        let numbers = format!(
            "{folder} has {free} bytes free; this backup is predicted to need {predicted} there for what the machine overwrites meanwhile, {} \
             others on that volume {reserved}, and {} stay free",
            others.len(),
            2 * RESERVE
        );
        return match others.is_empty() {
            true => Verdict::Refuse(format!(
                "{numbers}: free some, or set STILLPOINT_SCRATCH to a folder with room"
            )),
            false => Verdict::Wait(numbers),
        };
    }
    match others.len() {
        VIEWS.. => Verdict::Wait(format!("{} backups read from the volume of {folder}", others.len())),
        _ => Verdict::Go,
    }
}

impl Volumes {
    /// Waits for a place for a view with scratch files in these folders.
    pub(super) fn enter(
        &self,
        machine: &str,
        job: JobId,
        folders: &[PathBuf],
        predicted: u64,
    ) -> Result<Place, ProviderError> {
        self.enter_within(machine, job, folders, predicted, PATIENCE, &free)
    }

    fn enter_within(
        &self,
        machine: &str,
        job: JobId,
        folders: &[PathBuf],
        predicted: u64,
        patience: Duration,
        free: &dyn Fn(&Path) -> io::Result<u64>,
    ) -> Result<Place, ProviderError> {
        let mut volumes = BTreeMap::new();
        for folder in folders {
            let failed = |error: io::Error| {
                ProviderError::source(folder.display().to_string(), "look at its free space", &error)
            };
            volumes.insert(std::fs::metadata(folder).map_err(failed)?.dev(), folder);
        }
        let began = Instant::now();
        let mut views = self.0.views();
        loop {
            let mut waits_for = None;
            for (volume, folder) in &volumes {
                let free = free(folder).map_err(|error| {
                    ProviderError::source(folder.display().to_string(), "look at its free space", &error)
                })?;
                let others = views.get(volume).map_or(&[][..], Vec::as_slice);
                match verdict(folder, free, predicted, others) {
                    Verdict::Go => {}
                    Verdict::Wait(why) => waits_for = Some(why),
                    Verdict::Refuse(reason) => {
                        return Err(ProviderError::Unsupported { object: machine.to_owned(), reason });
                    }
                }
            }
            let Some(why) = waits_for else { break };
            let left = patience.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(ProviderError::Unsupported {
                    object: machine.to_owned(),
                    reason: format!("{why}; it waited {} s for them to end", patience.as_secs()),
                });
            }
            // Space may come free without a view that ends.
            let step = left.min(Duration::from_secs(5));
            views = self.0.left.wait_timeout(views, step).unwrap_or_else(PoisonError::into_inner).0;
        }
        for volume in volumes.keys() {
            views.entry(*volume).or_default().push(View { job, predicted });
        }
        Ok(Place { shared: Arc::clone(&self.0), job })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for views in self.shared.views().values_mut() {
            views.retain(|view| view.job != self.job);
        }
        self.shared.left.notify_all();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn job(number: u8) -> JobId {
        JobId([number; 16])
    }

    #[test]
    fn views_on_one_volume_share_its_room() {
        let folder = tempfile::tempdir().unwrap();
        let folders = [folder.path().to_owned()];
        let volumes = Volumes::default();
        let enter = |number: u8, predicted: u64, free: u64| {
            volumes.enter_within(
                "web",
                job(number),
                &folders,
                predicted,
                Duration::from_millis(50),
                &move |_: &Path| Ok(free),
            )
        };
        let told = enter(1, 5 * GIB, 5 * GIB).err().unwrap().to_string();
        assert!(told.contains("5368709120 bytes free") && told.contains("STILLPOINT_SCRATCH"), "{told}");
        let first = enter(1, 2 * GIB, 5 * GIB).unwrap();
        // Room for one and not for both: it waits, and says for what.
        let told = enter(2, 3 * GIB, 5 * GIB).err().unwrap().to_string();
        assert!(told.contains("1 others") && told.contains("waited"), "{told}");
        let second = enter(2, GIB, 5 * GIB).unwrap();
        let told = enter(3, 0, 100 * GIB).err().unwrap().to_string();
        assert!(told.contains("2 backups read"), "{told}");
        drop(first);
        let third = enter(3, 0, 100 * GIB).unwrap();
        drop((second, third));
        assert!(volumes.0.views().values().all(Vec::is_empty));
    }

    #[test]
    fn a_view_that_waits_goes_on_when_another_ends() {
        let folder = tempfile::tempdir().unwrap();
        let folders = [folder.path().to_owned()];
        let volumes = Volumes::default();
        let plenty = |_: &Path| Ok(100 * GIB);
        let patience = Duration::from_secs(20);
        let first = volumes.enter_within("a", job(1), &folders, 0, patience, &plenty).unwrap();
        let _second = volumes.enter_within("b", job(2), &folders, 0, patience, &plenty).unwrap();
        let waiting = std::thread::spawn({
            let (volumes, folders) = (volumes.clone(), folders.clone());
            move || volumes.enter_within("c", job(3), &folders, 0, patience, &plenty).is_ok()
        });
        std::thread::sleep(Duration::from_millis(50));
        drop(first);
        assert!(waiting.join().unwrap());
    }
}
