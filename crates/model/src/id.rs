//! Typed ids: 16 random bytes each, written as 32 lowercase hex digits.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Text that is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an id: expected 32 hexadecimal digits")]
pub struct NotAnId {
    /// What was given.
    pub text: String,
}

fn parse(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 {
        return None;
    }
    let mut bytes = [0u8; 16];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digit = |c: u8| (c as char).to_digit(16).filter(|_| !c.is_ascii_uppercase());
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(bytes)
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; 16]);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                // At once: lists of many points spend their time here otherwise.
                const DIGITS: [u8; 16] = *b"0123456789abcdef";
                let mut text = [0; 32];
                for (pair, byte) in text.chunks_exact_mut(2).zip(self.0) {
                    for (place, half) in pair.iter_mut().zip([byte >> 4, byte & 15]) {
                        *place = DIGITS.get(usize::from(half)).copied().unwrap_or_default();
                    }
                }
                f.write_str(std::str::from_utf8(&text).unwrap_or_default())
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl std::str::FromStr for $name {
            type Err = NotAnId;
            fn from_str(text: &str) -> Result<$name, NotAnId> {
                parse(text).map($name).ok_or_else(|| NotAnId { text: text.chars().take(80).collect() })
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = NotAnId;
            fn try_from(bytes: &[u8]) -> Result<$name, NotAnId> {
                bytes.try_into().map($name).map_err(|_| NotAnId { text: format!("{} bytes", bytes.len()) })
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

ids! {
    /// A storage pool.
    PoolId
    /// A key domain of a pool: what is deduplicated together and sealed with the same keys.
    DomainId
    /// A protected machine. Its identity is the machine's own id; a rename keeps it.
    DatasourceId
    /// A recovery point.
    RecoveryPointId
    /// A job.
    JobId
    /// An enrolled host.
    HostId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_as_text() {
        let id = PoolId([0xab; 16]);
        assert_eq!(id.to_string(), "abababababababababababababababab");
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in [
            "",
            "ab",
            "ABABABABABABABABABABABABABABABAB",
            "gbababababababababababababababab",
            "éééééééééééééééé",
        ] {
            assert!(bad.parse::<PoolId>().is_err(), "{bad}");
        }
    }
}
