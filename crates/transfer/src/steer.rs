//! Cancel, pause and throttle a running transfer from another thread.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What a person or a limit asked for, told to whoever runs the transfer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Cancel,
    Window(u64),
}

type Hook = Arc<dyn Fn(Order) + Send + Sync>;

/// The handle on a transfer. Cloned, all clones steer the same transfers; it outlives any one connection.
#[derive(Clone, Default)]
pub struct Steer {
    shared: Arc<Shared>,
}

struct Shared {
    cancelled: AtomicBool,
    window: AtomicU64,
    hooks: Mutex<(u64, BTreeMap<u64, Hook>)>,
}

impl Default for Shared {
    fn default() -> Shared {
        Shared {
            cancelled: AtomicBool::new(false),
            window: AtomicU64::new(u64::MAX),
            hooks: Mutex::default(),
        }
    }
}

impl Steer {
    /// A handle that asks for nothing yet.
    pub fn new() -> Steer {
        Steer::default()
    }

    /// Ends the transfers with this handle, also one that waits for its peer. Final.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
        self.tell(Order::Cancel);
    }

    /// Whether [`Steer::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::SeqCst)
    }

    /// Lets at most so many bytes of frames be on their way; 0 pauses, `u64::MAX` is no limit but the transfer's
    /// own. A window smaller than a batch counts as one batch.
    pub fn set_window(&self, bytes: u64) {
        self.shared.window.store(bytes, Ordering::SeqCst);
        self.tell(Order::Window(bytes));
    }

    /// Stops data until [`Steer::resume`] or [`Steer::set_window`].
    pub fn pause(&self) {
        self.set_window(0);
    }

    /// Takes back a pause or a smaller window.
    pub fn resume(&self) {
        self.set_window(u64::MAX);
    }

    pub(crate) fn window(&self) -> u64 {
        self.shared.window.load(Ordering::SeqCst)
    }

    fn tell(&self, order: Order) {
        // Called without the lock: a hook that waits for a slow link must not hold up a cancel.
        let hooks: Vec<Hook> = {
            let hooks = self.shared.hooks.lock().unwrap_or_else(PoisonError::into_inner);
            hooks.1.values().cloned().collect()
        };
        for hook in hooks {
            hook(order);
        }
    }

    /// Calls `hook` for each order until the watch is dropped. Orders of before are not repeated, except a cancel.
    pub(crate) fn watch(&self, hook: impl Fn(Order) + Send + Sync + 'static) -> Watch {
        let mut hooks = self.shared.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        hooks.0 += 1;
        let id = hooks.0;
        if self.is_cancelled() {
            hook(Order::Cancel);
        }
        hooks.1.insert(id, Arc::new(hook));
        Watch { steer: self.clone(), id }
    }
}

pub(crate) struct Watch {
    steer: Steer,
    id: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut hooks = self.steer.shared.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        hooks.1.remove(&self.id);
    }
}
