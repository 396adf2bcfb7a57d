//! One job's data stream as synchronous threads see it, the same at both ends.
//!
//! ```text
//! job thread  -- send ----> [queue of 8] --> body of the HTTP/2 stream      (async, on the runtime)
//! job thread  <-- receive - [queue of 8] <-- pump, reading the HTTP/2 stream
//! ```
//!
//! The queues are short and bounded: a slow reader stops the pump, that stops the HTTP/2 window, that stops the other
//! end's TCP. A stream that ends without `End` was cut: [`DataChannel::receive`] says so after everything that arrived,
//! and [`DataChannel::reconnect`] waits for the next stream of the same job. What must be sent again is the transfer's
//! matter, not ours.
//!
//! | event | send | receive | reconnect |
//! |---|---|---|---|
//! | the connection breaks | `Cut` | what arrived, then `Cut` | waits for the next stream |
//! | a newer stream of the job arrives | `Cut` | what arrived, then `Cut` | takes the newer one |
//! | the other side said `End` | goes on | what arrived, then `None` | - |
//! | the job is refused or stopped ([`Doorway::close`]) | `Closed` | `Closed` | `Closed` |

use crate::v0::{self, packet};
use crate::wire::{PAYLOAD_BYTES, broken};
use bytes::Bytes;
use model::Problem;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// Packets in each queue; at most 1 MiB each.
const QUEUE: usize = 8;

/// Why nothing can be sent or received.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// The stream broke. Reconnect and resume.
    #[error("the data stream was cut")]
    Cut,
    /// There will be no further stream: the job was stopped or refused.
    #[error("the data stream is closed: {0}")]
    Closed(Problem),
    /// No new stream came in time.
    #[error("no new data stream within {0:?}")]
    TimedOut(Duration),
    /// The payload is larger than a packet may be.
    #[error("a payload of {0} bytes, expected at most 1048576")]
    TooLarge(usize),
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The synchronous ends of one stream.
struct Link {
    outbound: mpsc::Sender<v0::Packet>,
    inbound: mpsc::Receiver<Event>,
    stream: Arc<Stream>,
}

/// One stream, as both sides of the queues can end it.
struct Stream {
    alive: watch::Sender<bool>,
    /// What is to be sent. Taken away at a cut: HTTP/2 does not ask for more while its window is full, and a thread
    /// that waits for room must not wait for that.
    queue: Mutex<Option<mpsc::Receiver<v0::Packet>>>,
}

impl Stream {
    fn cut(&self) {
        self.alive.send_replace(false);
        *locked(&self.queue) = None;
    }
}

enum Event {
    Payload(Bytes),
    End,
}

#[derive(Default)]
struct State {
    /// A stream that no thread has taken yet.
    waiting: Option<Link>,
    /// Ends the stream that is in use.
    current: Option<Arc<Stream>>,
    closed: Option<Problem>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Where the streams of one job arrive; the asynchronous side's handle of a [`DataChannel`].
#[derive(Clone)]
pub struct Doorway {
    shared: Arc<Shared>,
}

/// Asks for a new stream: dials at the agent, does nothing at the server.
pub type Redial = Box<dyn Fn() + Send + Sync>;

/// One job's data stream. `send` and `receive` may be called from two threads at once; neither from async code.
pub struct DataChannel {
    shared: Arc<Shared>,
    redial: Redial,
    outbound: Mutex<Option<mpsc::Sender<v0::Packet>>>,
    inbound: Mutex<Option<mpsc::Receiver<Event>>>,
}

/// The channel of a job that no stream has reached yet, and the doorway through which they come.
pub fn data_channel(redial: Redial) -> (DataChannel, Doorway) {
    let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
    let doorway = Doorway { shared: Arc::clone(&shared) };
    (DataChannel { shared, redial, outbound: Mutex::new(None), inbound: Mutex::new(None) }, doorway)
}

impl DataChannel {
    /// Sends one message of the transfer; waits while the queue is full.
    pub fn send(&self, payload: Bytes) -> Result<(), ChannelError> {
        if payload.len() > PAYLOAD_BYTES {
            return Err(ChannelError::TooLarge(payload.len()));
        }
        self.send_packet(packet::Kind::Payload(payload))
    }

    /// Says that nothing more will be sent. Receiving goes on.
    pub fn finish(&self) -> Result<(), ChannelError> {
        self.send_packet(packet::Kind::End(v0::End {}))?;
        *locked(&self.outbound) = None;
        Ok(())
    }

    fn send_packet(&self, kind: packet::Kind) -> Result<(), ChannelError> {
        if let Some(problem) = locked(&self.shared.state).closed.clone() {
            return Err(ChannelError::Closed(problem));
        }
        // Cloned, so that a thread that waits for room does not hold the lock.
        let sender = locked(&self.outbound).clone();
        let sent = sender
            .ok_or(())
            .and_then(|sender| sender.blocking_send(v0::Packet { kind: Some(kind) }).map_err(|_| ()));
        sent.map_err(|()| self.reason())
    }

    /// The next message; `None` after the other side's `End`.
    pub fn receive(&self) -> Result<Option<Bytes>, ChannelError> {
        match locked(&self.inbound).as_mut().and_then(mpsc::Receiver::blocking_recv) {
            Some(Event::Payload(payload)) => Ok(Some(payload)),
            Some(Event::End) => Ok(None),
            None => Err(self.reason()),
        }
    }

    fn reason(&self) -> ChannelError {
        locked(&self.shared.state).closed.clone().map_or(ChannelError::Cut, ChannelError::Closed)
    }

    /// Lets go of the present stream, if any, and waits for the next one of this job. Also the way to the first one.
    pub fn reconnect(&self, timeout: Duration) -> Result<(), ChannelError> {
        if let Some(stream) = locked(&self.shared.state).current.take() {
            stream.cut();
        }
        (self.redial)();
        let deadline = Instant::now() + timeout;
        let mut state = locked(&self.shared.state);
        let link = loop {
            if let Some(problem) = &state.closed {
                return Err(ChannelError::Closed(problem.clone()));
            }
            if let Some(link) = state.waiting.take() {
                // One that died while it waited is no use.
                if *link.stream.alive.borrow() && !link.outbound.is_closed() {
                    break link;
                }
                drop(state);
                (self.redial)();
                state = locked(&self.shared.state);
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ChannelError::TimedOut(timeout));
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.current = Some(link.stream);
        drop(state);
        *locked(&self.outbound) = Some(link.outbound);
        *locked(&self.inbound) = Some(link.inbound);
        Ok(())
    }

    /// Ends the stream in use, as if the connection had broken. One that waits to be taken stays.
    pub fn let_go(&self) {
        if let Some(stream) = locked(&self.shared.state).current.take() {
            stream.cut();
        }
    }

    /// A handle that can close the channel from any thread.
    pub fn doorway(&self) -> Doorway {
        Doorway { shared: Arc::clone(&self.shared) }
    }
}

impl Drop for DataChannel {
    fn drop(&mut self) {
        // What was sent is still delivered if it ended with `finish`: then `outbound` is gone and the stream ends by
        // itself. Otherwise the other side must not wait for more.
        let finished = locked(&self.outbound).is_none();
        let mut state = locked(&self.shared.state);
        state.waiting = None;
        if !finished && let Some(stream) = state.current.take() {
            stream.cut();
        }
        if state.closed.is_none() {
            state.closed = Some(broken("The job's thread has ended."));
        }
    }
}

impl std::fmt::Debug for DataChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DataChannel")
    }
}

impl Doorway {
    /// A new stream: the asynchronous ends of it. The stream that was in use, if any, is cut.
    pub fn enter(&self) -> Result<(OutboundPackets, InboundPump), Problem> {
        let (alive, watching) = watch::channel(true);
        let (outbound, queue) = mpsc::channel(QUEUE);
        let stream = Arc::new(Stream { alive, queue: Mutex::new(Some(queue)) });
        let (inbound_queue, inbound) = mpsc::channel(QUEUE);
        let mut state = locked(&self.shared.state);
        if let Some(problem) = &state.closed {
            return Err(problem.clone());
        }
        if let Some(stream) = state.current.take() {
            stream.cut();
        }
        state.waiting = Some(Link { outbound, inbound, stream: Arc::clone(&stream) });
        drop(state);
        self.shared.changed.notify_all();
        let ended = watching.clone();
        Ok((
            OutboundPackets {
                stream: Arc::clone(&stream),
                cut: Box::pin(async move { until_dead(ended).await }),
                was_cut: false,
                first: None,
            },
            InboundPump { queue: inbound_queue, watching, stream },
        ))
    }

    /// Ends the channel for good: whoever waits in it gets this problem.
    pub fn close(&self, problem: Problem) {
        let mut state = locked(&self.shared.state);
        state.closed.get_or_insert(problem);
        state.waiting = None;
        if let Some(stream) = state.current.take() {
            stream.cut();
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Cuts the stream in use, as if the connection had broken.
    pub fn cut(&self) {
        let mut state = locked(&self.shared.state);
        state.waiting = None;
        if let Some(stream) = state.current.take() {
            stream.cut();
        }
    }

    /// Whether no further stream will be taken.
    pub fn is_closed(&self) -> bool {
        locked(&self.shared.state).closed.is_some()
    }
}

async fn until_dead(mut watching: watch::Receiver<bool>) {
    if watching.wait_for(|alive| !alive).await.is_err() {
        // Nobody is left who could cut it: the queues alone say when it ends.
        std::future::pending::<()>().await;
    }
}

/// The packets to put on the wire: a `Stream`. Ends after the queue is let go of, or at once when the stream is cut.
pub struct OutboundPackets {
    stream: Arc<Stream>,
    cut: Pin<Box<dyn Future<Output = ()> + Send>>,
    was_cut: bool,
    first: Option<v0::Packet>,
}

impl OutboundPackets {
    /// Puts `packet` before all others.
    pub fn starting_with(mut self, packet: packet::Kind) -> OutboundPackets {
        self.first = Some(v0::Packet { kind: Some(packet) });
        self
    }
}

impl futures::Stream for OutboundPackets {
    type Item = v0::Packet;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<v0::Packet>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(first));
        }
        if self.was_cut || self.cut.as_mut().poll(context).is_ready() {
            self.was_cut = true;
            return Poll::Ready(None);
        }
        match locked(&self.stream.queue).as_mut() {
            Some(queue) => queue.poll_recv(context),
            None => Poll::Ready(None),
        }
    }
}

impl Drop for OutboundPackets {
    fn drop(&mut self) {
        // The connection let go of the stream: nobody will send what is queued.
        *locked(&self.stream.queue) = None;
    }
}

/// Reads a stream of packets into the channel.
pub struct InboundPump {
    queue: mpsc::Sender<Event>,
    watching: watch::Receiver<bool>,
    stream: Arc<Stream>,
}

impl InboundPump {
    /// Reads until the stream ends, breaks, is cut or carries something that does not belong there. The result says why
    /// it ended before the other side's `End`.
    pub async fn run<S>(self, mut packets: S) -> Result<(), Problem>
    where
        S: futures::Stream<Item = Result<v0::Packet, tonic::Status>> + Unpin,
    {
        let InboundPump { queue, watching, stream } = self;
        let dead = until_dead(watching);
        tokio::pin!(dead);
        let cut = || Problem::new(model::Code::NoContact, "The data stream was cut.");
        let outcome = loop {
            let packet = tokio::select! {
                biased;
                () = &mut dead => break Err(cut()),
                packet = futures::StreamExt::next(&mut packets) => packet,
            };
            let event = match packet {
                None => break Err(cut()),
                Some(Err(status)) => break Err(crate::wire::from_status(&status)),
                Some(Ok(v0::Packet { kind: Some(packet::Kind::Payload(payload)) }))
                    if payload.len() <= PAYLOAD_BYTES =>
                {
                    Event::Payload(payload)
                }
                Some(Ok(v0::Packet { kind: Some(packet::Kind::End(_)) })) => Event::End,
                Some(Ok(_)) => break Err(broken("A data packet is not a payload of at most 1 MiB.")),
            };
            let last = matches!(event, Event::End);
            let sent = tokio::select! {
                biased;
                () = &mut dead => break Err(cut()),
                sent = queue.send(event) => sent,
            };
            if sent.is_err() {
                break Err(cut());
            }
            if last {
                break Ok(());
            }
        };
        if outcome.is_err() {
            // The way out must not go on where the way in is broken: both sides resume together.
            stream.cut();
        } else {
            // Held until the way out has ended, too: a server that lets go of the request resets the stream.
            while let Some(Ok(_)) = tokio::select! {
                () = &mut dead => None,
                () = queue.closed() => None,
                more = futures::StreamExt::next(&mut packets) => more,
            } {}
        }
        outcome
    }
}

#[cfg(test)]
#[path = "channel_tests.rs"]
mod tests;
