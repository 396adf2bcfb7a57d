//! XDR (RFC 4506), as far as libvirt's messages use it: big-endian words of four bytes, opaque bytes padded with zeros to a
//! multiple of four.

use super::LibvirtError;

/// The longest string that libvirt's protocol allows (`REMOTE_STRING_MAX`: 4 MiB since 1.1.2).
const MAX_STRING: usize = 4 << 20;

/// Arguments being written.
#[derive(Debug, Default, Clone)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn new() -> Writer {
        Writer::default()
    }

    pub(super) fn u32(mut self, value: u32) -> Writer {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Writer {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub(super) fn i32(self, value: i32) -> Writer {
        self.u32(value as u32)
    }

    /// A fixed number of bytes, which must be a multiple of four.
    pub(super) fn fixed(mut self, bytes: &[u8; 16]) -> Writer {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn string(self, text: &str) -> Writer {
        let mut out = self.u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
        out.0.extend_from_slice(text.as_bytes());
        out.0.resize(out.0.len().next_multiple_of(4), 0);
        out
    }

    /// A pointer that may be null: a word that says whether something follows.
    pub(super) fn optional(self, text: Option<&str>) -> Writer {
        match text {
            None => self.u32(0),
            Some(text) => self.u32(1).string(text),
        }
    }

    /// What was written elsewhere.
    pub(super) fn append(mut self, bytes: &[u8]) -> Writer {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn done(self) -> Vec<u8> {
        self.0
    }
}

/// An answer being read. Every step checks what is left; nothing is allocated by a length that the bytes do not bear out.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, at: 0 }
    }

    fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], LibvirtError> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len());
        let found = end.and_then(|end| self.bytes.get(self.at..end));
        let Some(found) = found else {
            let left = self.bytes.len().saturating_sub(self.at);
            return Err(LibvirtError::Protocol(format!(
                "{what}: {length} bytes expected at byte {}, {left} are left",
                self.at
            )));
        };
        self.at = self.at.saturating_add(length);
        Ok(found)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, LibvirtError> {
        let mut word = [0; 4];
        word.copy_from_slice(self.take(4, what)?);
        Ok(u32::from_be_bytes(word))
    }

    pub(super) fn i32(&mut self, what: &'static str) -> Result<i32, LibvirtError> {
        Ok(self.u32(what)? as i32)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, LibvirtError> {
        Ok(u64::from(self.u32(what)?) << 32 | u64::from(self.u32(what)?))
    }

    pub(super) fn fixed(&mut self, what: &'static str) -> Result<[u8; 16], LibvirtError> {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(self.take(16, what)?);
        Ok(bytes)
    }

    pub(super) fn string(&mut self, what: &'static str) -> Result<String, LibvirtError> {
        let length = self.u32(what)? as usize;
        if length > MAX_STRING {
            return Err(LibvirtError::Protocol(format!(
                "{what}: a string of {length} bytes, at most {MAX_STRING}"
            )));
        }
        // Host names and definitions are bytes to libvirt; what is no UTF-8 must not keep a machine from being protected.
        let text = String::from_utf8_lossy(self.take(length, what)?).into_owned();
        self.take(length.next_multiple_of(4) - length, what)?;
        Ok(text)
    }

    pub(super) fn optional(&mut self, what: &'static str) -> Result<Option<String>, LibvirtError> {
        match self.u32(what)? {
            0 => Ok(None),
            1 => self.string(what).map(Some),
            other => Err(LibvirtError::Protocol(format!("{what}: {other} is no truth value"))),
        }
    }

    /// A count of things of at least `least` bytes each.
    pub(super) fn count(&mut self, least: usize, what: &'static str) -> Result<usize, LibvirtError> {
        let count = self.u32(what)? as usize;
        let left = self.bytes.len().saturating_sub(self.at);
        if count.saturating_mul(least) > left {
            return Err(LibvirtError::Protocol(format!("{what}: {count} of them in {left} bytes")));
        }
        Ok(count)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_padded_and_read_back() {
        let bytes = Writer::new().string("g1").optional(None).optional(Some("abcd")).i32(-1).done();
        assert_eq!(bytes.len(), 8 + 4 + 12 + 4);
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.string("name").unwrap(), "g1");
        assert_eq!(reader.optional("none").unwrap(), None);
        assert_eq!(reader.optional("some").unwrap().unwrap(), "abcd");
        assert_eq!(reader.i32("number").unwrap(), -1);
        assert!(reader.u32("more").is_err());
    }

    #[test]
    fn no_length_is_believed() {
        for bytes in [vec![0xff; 4], vec![0, 0, 0, 9, 1], vec![0, 0x10, 0, 0], vec![]] {
            assert!(Reader::new(&bytes).string("text").is_err(), "{bytes:?}");
            assert!(Reader::new(&bytes).count(4, "list").is_err(), "{bytes:?}");
        }
        assert!(Reader::new(&[0, 0, 0, 2]).optional("flag").is_err());
    }
}
