//! Work on several threads whose results are seen in the order of what was worked on.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::PoolError;

/// Calls `work` for every item on up to `threads` threads, each with a `begin()` of its own, and `seen` with the results in
/// the order of the items; where `seen` says false, no further one begins. Returns whether all were seen.
pub(crate) fn in_order<T: Sync, S, R: Send>(
    items: &[T],
    threads: usize,
    begin: impl Fn() -> S + Sync,
    work: impl Fn(&T, &mut S) -> R + Sync,
    mut seen: impl FnMut(&T, R) -> bool,
) -> Result<bool, PoolError> {
    let threads = threads.min(items.len());
    if threads <= 1 {
        let mut own = begin();
        return Ok(items.iter().all(|item| seen(item, work(item, &mut own))));
    }
    let next = AtomicUsize::new(0);
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next, begin, work) = (sender.clone(), &next, &begin, &work);
            scope.spawn(move || {
                let mut own = begin();
                loop {
                    let position = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(position) else { return };
                    if sender.send((position, work(item, &mut own))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut early = BTreeMap::new();
        for (position, item) in items.iter().enumerate() {
            let result = loop {
                if let Some(result) = early.remove(&position) {
                    break result;
                }
                match receiver.recv() {
                    Ok((other, result)) => early.insert(other, result),
                    Err(_) => return Err(PoolError::Misuse("a thread of verify ended early".to_owned())),
                };
            };
            if !seen(item, result) {
                next.store(items.len(), Ordering::Relaxed);
                return Ok(false);
            }
        }
        Ok(true)
    })
}
