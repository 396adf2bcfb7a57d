//! RFC 4648 base 32 in lower case without padding: safe in a shell, in a URL, and read aloud.

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

pub(crate) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(5) * 8);
    let (mut pending, mut bits) = (0u32, 0u32);
    for &byte in bytes {
        pending = (pending << 8) | u32::from(byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            text.push(char::from(ALPHABET[(pending >> bits & 31) as usize]));
        }
    }
    if bits > 0 {
        text.push(char::from(ALPHABET[(pending << (5 - bits) & 31) as usize]));
    }
    text
}

/// The `N` bytes that `text` spells; `None` for any other length, character or bits left over.
pub(crate) fn decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != (N * 8).div_ceil(5) {
        return None;
    }
    let mut bytes = [0u8; N];
    let mut filled = bytes.iter_mut();
    let (mut pending, mut bits) = (0u32, 0u32);
    for character in text.bytes() {
        let value = ALPHABET.iter().position(|&letter| letter == character)? as u32;
        pending = (pending << 5 | value) & 0xFFFF;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            *filled.next()? = (pending >> bits & 0xFF) as u8;
        }
    }
    (pending & ((1 << bits) - 1) == 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_vectors_and_refusals() {
        for (bytes, text) in [(&b""[..], ""), (b"f", "my"), (b"fo", "mzxq"), (b"foobar", "mzxw6ytboi")] {
            assert_eq!(encode(bytes), text);
        }
        assert_eq!(decode::<6>("mzxw6ytboi"), Some(*b"foobar"));
        // Too short, wrong letter, upper case, and a bit set past the end.
        for bad in ["mzxw6ytbo", "mzxw6ytbo1", "MZXW6YTBOI", "mzxw6ytboj"] {
            assert_eq!(decode::<6>(bad), None, "{bad}");
        }
    }
}
