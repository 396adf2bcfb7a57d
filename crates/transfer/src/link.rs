//! A link inside one process: two bounded channels of Rust values, nothing encoded.

use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded, select_biased};

use crate::{Link, LinkError};

/// Ends both directions. Dropping the sender wakes every waiter.
struct Shutdown {
    open: Mutex<(Option<Sender<()>>, Option<LinkError>)>,
}

impl Shutdown {
    fn close(&self, why: LinkError) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.1.get_or_insert(why);
        open.0 = None;
    }

    fn reason(&self) -> LinkError {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.1.clone().unwrap_or_else(|| LinkError::Cut("the other end of the link is gone".to_owned()))
    }
}

struct End<Out, In> {
    out: Sender<Out>,
    inbox: Receiver<In>,
    closed: Receiver<()>,
    shutdown: Arc<Shutdown>,
}

impl<Out: Send, In: Send> Link<Out, In> for End<Out, In> {
    fn send(&self, message: Out) -> Result<(), LinkError> {
        // Biased: after a close nothing is sent any more, even where there is room.
        select_biased! {
            recv(self.closed) -> _ => Err(self.shutdown.reason()),
            send(self.out, message) -> sent => sent.map_err(|_| self.shutdown.reason()),
        }
    }

    fn receive(&self) -> Result<In, LinkError> {
        select_biased! {
            recv(self.inbox) -> message => message.map_err(|_| self.shutdown.reason()),
            recv(self.closed) -> _ => Err(self.shutdown.reason()),
        }
    }

    fn close(&self, why: LinkError) {
        self.shutdown.close(why);
    }
}

/// The two ends of a link in this process. Each direction buffers `capacity` messages. An end that is dropped cuts
/// the link: the other still receives what was sent before.
pub fn pair<A, B>(capacity: usize) -> (impl Link<A, B> + 'static, impl Link<B, A> + 'static)
where
    A: Send + 'static,
    B: Send + 'static,
{
    let (to_second, from_first) = bounded(capacity.max(1));
    let (to_first, from_second) = bounded(capacity.max(1));
    let (keep, closed) = bounded(0);
    let shutdown = Arc::new(Shutdown { open: Mutex::new((Some(keep), None)) });
    let first =
        End { out: to_second, inbox: from_second, closed: closed.clone(), shutdown: shutdown.clone() };
    let second = End { out: to_first, inbox: from_first, closed, shutdown };
    (first, second)
}
