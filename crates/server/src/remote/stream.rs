//! A job's data stream as a link of the transfer.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use model::{Code, Problem};
use protocol::channel::ChannelError;
use protocol::stream::JobStream;
use transfer::{LinkError, Wire};

/// What the other side did that it must not do; kept beyond the stream on which it did it.
pub(super) type Broken = Arc<Mutex<Option<Problem>>>;

pub(super) struct StreamWire {
    pub stream: JobStream,
    pub broken: Broken,
}

pub(super) fn link_error(error: ChannelError) -> LinkError {
    match error {
        ChannelError::Closed(problem) if problem.code == Code::Cancelled => LinkError::Cancelled,
        other => LinkError::Cut(other.to_string()),
    }
}

impl Wire for StreamWire {
    fn send(&self, bytes: Bytes) -> Result<(), LinkError> {
        self.stream.send(bytes).map_err(link_error)
    }

    fn receive(&self) -> Result<Bytes, LinkError> {
        self.stream.receive().map_err(link_error)
    }

    fn cut(&self) {
        self.stream.cut();
    }

    fn broken(&self, reason: String) {
        let problem = Problem::new(Code::ProtocolBroken, format!("The agent broke the protocol: {reason}."));
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(problem);
    }
}
