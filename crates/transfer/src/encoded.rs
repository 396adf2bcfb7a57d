//! A link over anything that carries byte strings: messages are encoded on the way out and decoded on the way in.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use crate::message::{FromTarget, ToAgent, ToServer, ToTarget};
use crate::{Link, LinkError, WireError};

/// Carries byte strings of at most [`crate::message::MAX_MESSAGE_BYTES`], in order, until it breaks.
pub trait Wire: Send + Sync {
    /// Hands over a message; waits while the other side does not read.
    fn send(&self, bytes: Bytes) -> Result<(), LinkError>;
    /// Waits for the next message.
    fn receive(&self) -> Result<Bytes, LinkError>;
    /// Ends it for both sides and wakes whoever waits in it.
    fn cut(&self);
    /// The other side sent what is no message: it will not get better by trying again.
    fn broken(&self, reason: String);
}

/// A message with bytes.
pub trait Message: Sized {
    /// Its bytes.
    fn to_wire(&self) -> Bytes;
    /// Reads it.
    fn from_wire(bytes: Bytes) -> Result<Self, WireError>;
}

macro_rules! messages {
    ($($name:ident)*) => {$(
        impl Message for $name {
            fn to_wire(&self) -> Bytes {
                self.encode()
            }

            fn from_wire(bytes: Bytes) -> Result<$name, WireError> {
                $name::decode(bytes)
            }
        }
    )*};
}

messages! { ToServer ToAgent ToTarget FromTarget }

/// A [`Link`] over a [`Wire`].
pub struct Encoded<W> {
    wire: W,
    closed: Mutex<Option<LinkError>>,
}

impl<W: Wire> Encoded<W> {
    /// A link over `wire`.
    pub fn new(wire: W) -> Encoded<W> {
        Encoded { wire, closed: Mutex::new(None) }
    }

    fn closed(&self) -> Option<LinkError> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<W: Wire, Out: Message, In: Message> Link<Out, In> for Encoded<W> {
    fn send(&self, message: Out) -> Result<(), LinkError> {
        match self.closed() {
            Some(why) => Err(why),
            None => self.wire.send(message.to_wire()).map_err(|error| self.closed().unwrap_or(error)),
        }
    }

    fn receive(&self) -> Result<In, LinkError> {
        let bytes = self.wire.receive().map_err(|error| self.closed().unwrap_or(error))?;
        In::from_wire(bytes).map_err(|error| {
            let reason = format!("a message of the transfer cannot be read: {error}");
            self.wire.broken(reason.clone());
            let why = LinkError::Cut(reason);
            Link::<Out, In>::close(self, why.clone());
            why
        })
    }

    fn close(&self, why: LinkError) {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.wire.cut();
    }
}
