//! GUIDs: known ones, their text, and new ones made from old ones.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::Guid;

/// A GUID from its usual spelling.
pub(crate) const fn known(first: u32, second: u16, third: u16, rest: [u8; 8]) -> Guid {
    let (a, b, c, r) = (first.to_le_bytes(), second.to_le_bytes(), third.to_le_bytes(), rest);
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]]
}

/// The GUID as a parent locator spells it: lower case, in braces.
pub fn guid_text(guid: &Guid) -> String {
    let [a, b, c, d, e, f, g, h, rest @ ..] = *guid;
    let [i, j, tail @ ..] = rest;
    let tail: String = tail.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{{{:08x}-{:04x}-{:04x}-{i:02x}{j:02x}-{tail}}}",
        u32::from_le_bytes([a, b, c, d]),
        u16::from_le_bytes([e, f]),
        u16::from_le_bytes([g, h]),
    )
}

/// Reads [`guid_text`]; any case, with or without braces.
pub fn guid_from_text(text: &str) -> Option<Guid> {
    let inner = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
    let parts: Vec<&str> = inner.split('-').collect();
    let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    if lengths != [8, 4, 4, 4, 12] || !parts.iter().all(|part| part.bytes().all(|b| b.is_ascii_hexdigit())) {
        return None;
    }
    let first = u32::from_str_radix(parts.first()?, 16).ok()?;
    let second = u16::from_str_radix(parts.get(1)?, 16).ok()?;
    let third = u16::from_str_radix(parts.get(2)?, 16).ok()?;
    let rest = u64::from_str_radix(&format!("{}{}", parts.get(3)?, parts.get(4)?), 16).ok()?;
    Some(known(first, second, third, rest.to_be_bytes()))
}

/// A GUID that follows from `previous`, `turn` and `purpose`, in the form of a random one (version 4).
///
/// This room has no source of randomness. Two copies of one file that go different ways get different GUIDs only if
/// their owner gives ids of his own; within one file's history every turn gives a new one.
pub(crate) fn derived(previous: &Guid, turn: u64, purpose: &str) -> Guid {
    let half = |part: u8| {
        let mut hasher = DefaultHasher::new();
        (part, previous, turn, purpose).hash(&mut hasher);
        hasher.finish().to_le_bytes()
    };
    let (low, high) = (half(0), half(1));
    let mut guid = [0; 16];
    guid[..8].copy_from_slice(&low);
    guid[8..].copy_from_slice(&high);
    guid[7] = guid[7] & 0x0F | 0x40;
    guid[8] = guid[8] & 0x3F | 0x80;
    guid
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let guid = known(0x83ed_0ec3, 0x24c8, 0x49a6, [0xa9, 0x59, 0x5e, 0x4b, 0xf1, 0x28, 0x8b, 0xfb]);
        assert_eq!(guid_text(&guid), "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}");
        assert_eq!(guid_from_text("{83ED0EC3-24C8-49A6-A959-5E4BF1288BFB}"), Some(guid));
        assert_eq!(guid_from_text("83ed0ec3-24c8-49a6-a959-5e4bf1288bfb"), Some(guid));
        for wrong in ["", "{}", "83ed0ec3-24c8-49a6-a959-5e4bf1288bf", "+3ed0ec3-24c8-49a6-a959-5e4bf1288bfb"]
        {
            assert_eq!(guid_from_text(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn derived_guids_differ_by_turn_purpose_and_past() {
        let a = derived(&[1; 16], 1, "file");
        assert_ne!(a, derived(&[1; 16], 2, "file"));
        assert_ne!(a, derived(&[1; 16], 1, "data"));
        assert_ne!(a, derived(&[2; 16], 1, "file"));
        assert_eq!(a, derived(&[1; 16], 1, "file"));
    }
}
