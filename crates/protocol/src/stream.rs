//! The streams of one job, one after another.
//!
//! A [`DataChannel`] is one object for all streams of its job. A thread that still holds the last stream must neither
//! read from the next one nor write to it: each [`JobStream`] belongs to one turn, and a turn that is over only says
//! `Cut`.

use crate::channel::{ChannelError, DataChannel, Doorway};
use bytes::Bytes;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The streams of one job.
pub struct JobStreams {
    channel: DataChannel,
    turn: AtomicU64,
    sending: Mutex<()>,
    receiving: Mutex<()>,
}

/// One stream. `send` and `receive` may be called from two threads at once; neither from async code.
pub struct JobStream {
    streams: Arc<JobStreams>,
    turn: u64,
}

impl JobStreams {
    /// The streams that `channel` brings.
    pub fn new(channel: DataChannel) -> Arc<JobStreams> {
        Arc::new(JobStreams {
            channel,
            turn: AtomicU64::new(0),
            sending: Mutex::new(()),
            receiving: Mutex::new(()),
        })
    }

    /// Lets go of the stream in use and waits for the next one.
    pub fn next(self: &Arc<Self>, timeout: Duration) -> Result<JobStream, ChannelError> {
        let turn = self.turn.fetch_add(1, Ordering::SeqCst) + 1;
        self.channel.let_go();
        // Whoever was inside has left the old stream when these were free once; later comers see the new turn.
        drop(self.sending.lock().unwrap_or_else(PoisonError::into_inner));
        drop(self.receiving.lock().unwrap_or_else(PoisonError::into_inner));
        self.channel.reconnect(timeout)?;
        Ok(JobStream { streams: Arc::clone(self), turn })
    }

    /// Reads the stream in use until it ends; what was sent before goes on to be delivered.
    pub fn drain(&self) {
        let _turn = self.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(Some(_)) = self.channel.receive() {}
    }

    /// A handle that can close the channel from any thread.
    pub fn doorway(&self) -> Doorway {
        self.channel.doorway()
    }
}

impl JobStream {
    fn is_over(&self) -> bool {
        self.streams.turn.load(Ordering::SeqCst) != self.turn
    }

    /// Sends one message; waits while the other side does not read.
    pub fn send(&self, payload: Bytes) -> Result<(), ChannelError> {
        let _turn = self.streams.sending.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_over() {
            return Err(ChannelError::Cut);
        }
        self.streams.channel.send(payload)
    }

    /// The next message. The other side's end is a cut: a transfer says for itself when it is complete.
    pub fn receive(&self) -> Result<Bytes, ChannelError> {
        let _turn = self.streams.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_over() {
            return Err(ChannelError::Cut);
        }
        self.streams.channel.receive()?.ok_or(ChannelError::Cut)
    }

    /// Ends the stream and wakes whoever waits in it.
    pub fn cut(&self) {
        if !self.is_over() {
            self.streams.channel.let_go();
        }
    }
}
