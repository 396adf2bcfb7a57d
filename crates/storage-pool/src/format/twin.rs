//! Twin files (section 3.1): small files whose loss would lose everything, holding their content twice.

use super::{FormatError, check_head, head, take, u32_at};

/// Magic of the pool header.
pub const POOL: &[u8; 8] = b"STPPOOL1";
/// Magic of a key file.
pub const KEY: &[u8; 8] = b"STPKEY_1";
/// Magic of a ring file.
pub const RING: &[u8; 8] = b"STPRING1";
/// Magic of a secret file.
pub const SECRET: &[u8; 8] = b"STPSECR1";

/// Largest file that is read as a twin: headers and keys take some hundred bytes.
pub const MAX_BYTES: u64 = 64 * 1024;

/// The content of a twin file and what is wrong with the copy that was not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Twin {
    /// The content.
    pub content: Vec<u8>,
    /// Damage of the other copy.
    pub damage: Option<FormatError>,
}

/// Both copies of `content`.
pub fn encode(magic: &[u8; 8], content: &[u8]) -> Vec<u8> {
    let mut copy = head(magic);
    copy.extend_from_slice(&(content.len() as u32).to_le_bytes());
    copy.extend_from_slice(content);
    let hash = blake3::hash(&copy);
    copy.extend_from_slice(hash.as_bytes());
    let mut both = copy.clone();
    both.extend_from_slice(&copy);
    both
}

fn decode_copy(magic: &[u8; 8], bytes: &[u8]) -> Result<Vec<u8>, FormatError> {
    check_head(bytes, magic)?;
    let length = u32_at(bytes, 12)? as usize;
    let end = 16usize.checked_add(length).filter(|&end| end + 32 == bytes.len());
    let Some(end) = end else {
        return Err(FormatError::at(
            12,
            format!("content of {length} bytes in a copy of {} bytes", bytes.len()),
        ));
    };
    let hash: [u8; 32] = take(bytes, end)?;
    if blake3::hash(&bytes[..end]) != hash {
        return Err(FormatError::at(0, "the copy does not match its hash"));
    }
    Ok(bytes[16..end].to_vec())
}

/// The content, from whichever copy is right.
pub fn decode(magic: &[u8; 8], bytes: &[u8]) -> Result<Twin, FormatError> {
    // The copies are equally long, so the middle is where the second begins; a file that lost its tail gives its
    // first copy by the length that this copy states.
    let stated = u32_at(bytes, 12).ok().and_then(|length| (length as usize).checked_add(48));
    let half = bytes.len() / 2;
    let first_end = stated.filter(|&end| end <= bytes.len() && bytes.len() % 2 == 1).unwrap_or(half);
    let first = decode_copy(magic, &bytes[..first_end]);
    let second = decode_copy(magic, &bytes[half..]);
    match (first, second) {
        (Ok(content), Ok(other)) if content == other => Ok(Twin { content, damage: None }),
        (Ok(content), Ok(_)) => {
            Ok(Twin { content, damage: Some(FormatError::at(half as u64, "the two copies differ")) })
        }
        (Ok(content), Err(_)) => {
            Ok(Twin { content, damage: Some(FormatError::at(half as u64, "the second copy is damaged")) })
        }
        (Err(_), Ok(content)) => {
            Ok(Twin { content, damage: Some(FormatError::at(0, "the first copy is damaged")) })
        }
        (Err(error), Err(_)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_single_flipped_bit_is_noticed_and_survived() {
        let bytes = encode(KEY, b"the content of a key file");
        assert_eq!(decode(KEY, &bytes).map(|twin| twin.damage), Ok(None));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let twin = decode(KEY, &flipped).unwrap_or_else(|error| panic!("bit {bit}: {error:?}"));
            assert_eq!(twin.content, b"the content of a key file", "bit {bit}");
            assert!(twin.damage.is_some(), "bit {bit} was not noticed");
        }
    }

    #[test]
    fn truncation_gives_an_error_or_the_content() {
        let bytes = encode(POOL, b"x");
        for length in 0..bytes.len() {
            match decode(POOL, &bytes[..length]) {
                Ok(twin) => assert!(twin.content == b"x" && twin.damage.is_some(), "length {length}"),
                Err(_) => assert!(length < 98, "length {length}"),
            }
        }
    }
}
