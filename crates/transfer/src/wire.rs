//! Reading and writing the little-endian fields of messages. Every length is checked against a limit and against
//! what is really there before anything is allocated for it.

use bytes::{BufMut, Bytes, BytesMut};

/// Why bytes are not a message. Offsets count from the start of the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than any message may be.
    #[error("a message of {found} bytes, at most {limit} are allowed")]
    TooLong {
        /// Its bytes.
        found: usize,
        /// Most bytes of a message.
        limit: usize,
    },
    /// Ends in the middle of a field.
    #[error("the message ends at byte {found}, {what} needs {expected}")]
    Truncated {
        /// The field.
        what: &'static str,
        /// Where the field would end.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// Goes on after its last field.
    #[error("{found} bytes follow the last field, which ends at byte {at}")]
    Trailing {
        /// Where the last field ends.
        at: usize,
        /// Bytes too many.
        found: usize,
    },
    /// A version that this program does not speak.
    #[error("message version {found}, this program speaks {expected}")]
    Version {
        /// Ours.
        expected: u8,
        /// Theirs.
        found: u8,
    },
    /// A field has a value that it cannot have.
    #[error("{what} at byte {at} is {found}, allowed is {allowed}")]
    Value {
        /// The field.
        what: &'static str,
        /// Where it begins.
        at: usize,
        /// Its value.
        found: u64,
        /// What would be right.
        allowed: &'static str,
    },
}

pub(crate) struct Reader {
    bytes: Bytes,
    at: usize,
}

impl Reader {
    pub(crate) fn new(bytes: Bytes) -> Reader {
        Reader { bytes, at: 0 }
    }

    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// The next `length` bytes, shared with the message, not copied.
    pub(crate) fn slice(&mut self, what: &'static str, length: usize) -> Result<Bytes, WireError> {
        let found = self.bytes.len();
        let expected = self.at.saturating_add(length);
        if expected > found {
            return Err(WireError::Truncated { what, expected, found });
        }
        let slice = self.bytes.slice(self.at..expected);
        self.at = expected;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], WireError> {
        let found = self.bytes.len();
        let expected = self.at.saturating_add(N);
        let field = self.bytes.get(self.at..expected).and_then(|field| <[u8; N]>::try_from(field).ok());
        self.at = expected.min(found);
        field.ok_or(WireError::Truncated { what, expected, found })
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        Ok(u8::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn hash(&mut self, what: &'static str) -> Result<[u8; 32], WireError> {
        self.array(what)
    }

    pub(crate) fn bool(&mut self, what: &'static str) -> Result<bool, WireError> {
        let at = self.at;
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            found => Err(WireError::Value { what, at, found: found.into(), allowed: "0 or 1" }),
        }
    }

    /// A number of entries of `entry_bytes` each at the least: not above `limit`, and no more than can follow.
    pub(crate) fn count(
        &mut self,
        what: &'static str,
        limit: usize,
        entry_bytes: usize,
    ) -> Result<usize, WireError> {
        let at = self.at;
        let count = usize::from(self.u16(what)?);
        if count > limit {
            return Err(WireError::Value { what, at, found: count as u64, allowed: "at most its limit" });
        }
        let expected = self.at.saturating_add(count.saturating_mul(entry_bytes));
        if expected > self.bytes.len() {
            return Err(WireError::Truncated { what, expected, found: self.bytes.len() });
        }
        Ok(count)
    }

    pub(crate) fn text(&mut self, what: &'static str, limit: usize) -> Result<String, WireError> {
        let at = self.at;
        let length = self.count(what, limit, 1)?;
        let bytes = self.slice(what, length)?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => {
                let found = error.valid_up_to() as u64;
                Err(WireError::Value { what, at, found, allowed: "UTF-8 (valid up to that byte)" })
            }
        }
    }

    pub(crate) fn end(self) -> Result<(), WireError> {
        match self.bytes.len() - self.at {
            0 => Ok(()),
            found => Err(WireError::Trailing { at: self.at, found }),
        }
    }
}

/// Writes a count; the makers of messages keep within the limits, so what is cut off here is a bug that the far
/// end refuses.
pub(crate) fn put_count(out: &mut BytesMut, count: usize) {
    out.put_u16_le(u16::try_from(count).unwrap_or(u16::MAX));
}

/// Writes text, cut at a character so that it has at most `limit` bytes.
pub(crate) fn put_text(out: &mut BytesMut, text: &str, limit: usize) {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    put_count(out, end);
    out.put_slice(&text.as_bytes()[..end]);
}
