//! One connection in the transmission phase: many requests in flight, told apart by their cookies ("Transmission",
//! "Request message": the cookie was once called the handle).
//!
//! A thread reads replies and fills the buffers of the requests they belong to; whoever asked waits for his own. Who
//! waits also watches the clock: after the timeout without a byte in either direction, or ten timeouts for one
//! request, he ends the connection for all. A flush alone may be silent for ten timeouts: it waits for a disk to take
//! all that was written before. The first failure is final; a client that wants to go on connects again.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::NbdError;
use crate::error::ESHUTDOWN;
use crate::handshake::Agreed;
use crate::reply::{self, Answer, Broken, Gathering};
use crate::stream::Stream;
use crate::wire::{self, Command, Request};

/// One request may take this many timeouts as long as bytes flow. It ends a server that answers others but never
/// this one, and one that sends a byte now and then.
pub(crate) const PATIENCE: u32 = 10;
/// What goes to the socket at once; between two of them the clock is set back.
const SEND_PIECE: usize = 256 * 1024;
/// How long the farewell may block.
const FAREWELL: Duration = Duration::from_secs(1);

const ANSWER: &str = "answer a request";
const TAKE: &str = "take a request";

type Outcome = Result<Answer, NbdError>;

struct Waiting {
    gathering: Gathering,
    done: SyncSender<Outcome>,
}

#[derive(Default)]
struct State {
    /// Once set, nothing new is asked.
    failure: Option<NbdError>,
    /// Nothing is read or sent any more either.
    ended: bool,
    waiting: HashMap<u64, Waiting>,
    next_cookie: u64,
}

struct Shared {
    stream: Stream,
    timeout: Duration,
    structured: bool,
    contexts: Vec<(u32, String)>,
    ids: Vec<u32>,
    state: Mutex<State>,
    /// Messages must not mix.
    sending: Mutex<()>,
    begun: Instant,
    /// Milliseconds from `begun` to the last byte in either direction.
    active: AtomicU64,
}

/// See the module.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

impl Connection {
    /// Takes over a stream after its handshake.
    pub(crate) fn start(stream: Stream, agreed: &Agreed, timeout: Duration) -> Result<Connection, NbdError> {
        let closed = |error: io::Error| NbdError::Closed { reason: format!("cannot begin: {error}") };
        // Whoever waits watches the clock; an idle connection is no failure.
        stream.set_read_timeout(None).map_err(closed)?;
        let shared = Arc::new(Shared {
            stream,
            timeout,
            structured: agreed.structured,
            contexts: agreed.contexts.clone(),
            ids: agreed.contexts.iter().map(|(id, _)| *id).collect(),
            state: Mutex::default(),
            sending: Mutex::new(()),
            begun: Instant::now(),
            active: AtomicU64::new(0),
        });
        let reading = Arc::clone(&shared);
        let reader = std::thread::Builder::new()
            .name("nbd-replies".to_owned())
            .spawn(move || reading.read_replies())
            .map_err(closed)?;
        Ok(Connection { shared, reader: Some(reader) })
    }

    /// Number of a context on this connection.
    pub(crate) fn context(&self, name: &str) -> Option<u32> {
        self.shared.contexts.iter().find(|(_, offered)| offered == name).map(|(id, _)| *id)
    }

    /// Sends a request and waits for its reply. Of a block status, the extents of context `wanted` are kept.
    pub(crate) fn call(&self, request: Request, payload: &[u8], wanted: Option<u32>) -> Outcome {
        let shared = &self.shared;
        let gathering = Gathering::new(request, shared.structured, &shared.ids, wanted);
        let (done, outcome) = sync_channel(1);
        let cookie = {
            let mut state = shared.state();
            if let Some(failure) = &state.failure {
                return Err(failure.closed_by());
            }
            let cookie = state.next_cookie;
            state.next_cookie = cookie.wrapping_add(1);
            state.waiting.insert(cookie, Waiting { gathering, done });
            cookie
        };
        if let Err(error) = shared.send(&request.encode(cookie), payload) {
            shared.fail(error);
        }
        let patience = shared.timeout.saturating_mul(PATIENCE);
        let silence = if request.command == Command::Flush { patience } else { shared.timeout };
        shared.wait(&outcome, silence, patience)
    }

    /// Why the connection cannot be used any more, if so.
    pub(crate) fn failure(&self) -> Option<NbdError> {
        self.shared.state().failure.as_ref().map(NbdError::closed_by)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.shared.state().ended && self.shared.stream.set_write_timeout(FAREWELL).is_ok() {
            let farewell = Request { command: Command::Disconnect, flags: 0, offset: 0, length: 0 };
            // "Terminating the transmission phase": there is no reply. A server that does not take it is left anyway.
            let _ = self.shared.send(&farewell.encode(0), &[]);
        }
        self.shared.stream.shutdown();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.active.fetch_max(now, Ordering::Relaxed);
    }

    fn quiet(&self) -> Duration {
        let active = Duration::from_millis(self.active.load(Ordering::Relaxed));
        self.begun.elapsed().saturating_sub(active)
    }

    /// Ends the connection for all who wait and all who come; the first reason stays.
    fn fail(&self, error: NbdError) {
        let waiting = {
            let mut state = self.state();
            state.failure.get_or_insert(error);
            state.ended = true;
            std::mem::take(&mut state.waiting)
        };
        self.stream.shutdown();
        // Those who wait find the reason when their channel closes.
        drop(waiting);
    }

    fn reason(&self) -> NbdError {
        let closed = NbdError::Closed { reason: "the reading thread has ended".to_owned() };
        self.state().failure.clone().unwrap_or(closed)
    }

    fn send(&self, head: &[u8], payload: &[u8]) -> Result<(), NbdError> {
        let _turn = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state().ended {
            return Err(self.reason());
        }
        self.touch();
        for piece in std::iter::once(head).chain(payload.chunks(SEND_PIECE)) {
            (&self.stream).write_all(piece).map_err(|error| wire::broken(&error, TAKE, self.timeout))?;
            self.touch();
        }
        Ok(())
    }

    fn wait(&self, outcome: &Receiver<Outcome>, silence: Duration, patience: Duration) -> Outcome {
        let asked = Instant::now();
        loop {
            let quiet = silence.saturating_sub(self.quiet());
            let rest = patience.saturating_sub(asked.elapsed());
            match outcome.recv_timeout(quiet.min(rest)) {
                Ok(outcome) => return outcome,
                Err(RecvTimeoutError::Disconnected) => return Err(self.reason()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let impatient = asked.elapsed() >= patience;
            if impatient || self.quiet() >= silence {
                let waited = if impatient { patience } else { silence };
                self.fail(NbdError::TimedOut { what: ANSWER, waited });
                return Err(self.reason());
            }
        }
    }

    /// Reads replies until the stream breaks.
    fn read_replies(&self) {
        let mut from = BufReader::new(Heard(self));
        loop {
            if let Err(broken) = self.one_message(&mut from) {
                return self.end(broken);
            }
        }
    }

    fn end(&self, broken: Broken) {
        self.fail(match broken {
            Broken::Protocol(error) => error,
            Broken::Socket(error) => wire::broken(&error, ANSWER, self.timeout),
        });
    }

    fn one_message(&self, from: &mut impl Read) -> Result<(), Broken> {
        let (head, cookie) = reply::head(from)?.map_err(Broken::Protocol)?;
        // Taken out while it is filled: the lock is not held while the socket is awaited.
        let Some(mut waiting) = self.state().waiting.remove(&cookie) else {
            return Err(Broken::Protocol(NbdError::protocol(
                "a reply",
                "the cookie of a request in flight",
                format!("{cookie:#x}"),
            )));
        };
        let whole = match waiting.gathering.take(head, from) {
            Ok(whole) => whole,
            Err(broken) => {
                // Before `waiting` goes: whoever waits then looks for the reason.
                self.end(broken);
                return Ok(());
            }
        };
        let mut state = self.state();
        if state.ended {
            // Unless another has ended it meanwhile, which the next read will meet.
            return Ok(());
        }
        if !whole {
            state.waiting.insert(cookie, waiting);
            return Ok(());
        }
        drop(state);
        let outcome = match waiting.gathering.finish() {
            Ok(outcome) => outcome,
            Err(error) => {
                self.fail(error);
                return Ok(());
            }
        };
        if let Err(error @ NbdError::Server { errno: ESHUTDOWN, .. }) = &outcome {
            // "Terminating the transmission phase": nothing new is to be asked. What is in flight may still come.
            self.state().failure.get_or_insert(error.clone());
        }
        // Whoever asked may have given up.
        let _ = waiting.done.send(outcome);
        Ok(())
    }
}

/// The stream, with every byte noted.
struct Heard<'a>(&'a Shared);

impl Read for Heard<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = (&self.0.stream).read(buf)?;
        self.0.touch();
        Ok(read)
    }
}
