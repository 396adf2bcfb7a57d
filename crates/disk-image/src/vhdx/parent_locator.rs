//! Parent locator (2.6.2.6): where the parent of a differencing image is, and how to know it.

use super::bytes::{guid_at, put, u16_at, u32_at};
use super::guid::{guid_from_text, guid_text, known};
use super::{Guid, damaged, unsupported};
use crate::ImageError;

/// The locator type of a parent that is a VHDX file; no other is defined.
const VHDX_PARENT: Guid =
    known(0xB04A_EFB7, 0xD19E, 0x4A81, [0xB7, 0x89, 0x25, 0xB8, 0xE9, 0x44, 0x59, 0x13]);
const HEADER_BYTES: usize = 20;
const ENTRY_BYTES: usize = 12;
/// Bytes of the longest key that is looked at: the longest known one, `absolute_win32_path`, has 38.
const MAX_KEY_BYTES: u16 = 64;

/// Names and identity of a parent. Names are as they stand in the image: text of a guest's host, not yet a path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParentLocator {
    /// `DataWriteGuid` of the parent when the child was made.
    pub linkage: Guid,
    /// Another `DataWriteGuid` that is right as well: a parent into which a merge was not completed.
    pub linkage2: Option<Guid>,
    /// Name relative to the folder of the child, with `\`.
    pub relative_path: Option<String>,
    /// Absolute name by volume GUID.
    pub volume_path: Option<String>,
    /// Absolute name by drive letter or share.
    pub absolute_win32_path: Option<String>,
}

impl ParentLocator {
    /// The names in the order to try.
    pub fn names(&self) -> Vec<String> {
        [&self.relative_path, &self.volume_path, &self.absolute_win32_path]
            .into_iter()
            .flatten()
            .cloned()
            .collect()
    }

    /// Whether a file with this `DataWriteGuid` is the parent.
    pub fn fits(&self, data_write_guid: &Guid) -> bool {
        self.linkage == *data_write_guid || self.linkage2.as_ref() == Some(data_write_guid)
    }

    /// Reads the item, which begins at `offset` of the file. Unknown keys are left alone.
    pub(crate) fn parse(item: &[u8], offset: u64) -> Result<ParentLocator, ImageError> {
        let wrong = |reason: String| damaged("parent locator", offset, reason);
        if item.len() < HEADER_BYTES {
            return Err(wrong(format!("{} bytes, expected at least {HEADER_BYTES}", item.len())));
        }
        let kind = guid_at(item, 0);
        if kind != VHDX_PARENT {
            return Err(unsupported(format!("parent locator type {}", guid_text(&kind))));
        }
        let count = usize::from(u16_at(item, 18));
        let table = item
            .get(HEADER_BYTES..HEADER_BYTES + count * ENTRY_BYTES)
            .ok_or_else(|| wrong(format!("{count} entries do not fit into {} bytes", item.len())))?;
        let mut locator = ParentLocator::default();
        let (mut linkage, mut linkage2) = (None, None);
        for entry in table.chunks_exact(ENTRY_BYTES) {
            let (key_length, value_length) = (u16_at(entry, 8), u16_at(entry, 10));
            let text = |at: u32, length: u16| -> Result<String, ImageError> {
                let (at, length) = (at as usize, usize::from(length));
                let bytes = item.get(at..).and_then(|rest| rest.get(..length)).ok_or_else(|| {
                    wrong(format!("text at {at} with {length} bytes lies outside the item"))
                })?;
                let units: Vec<u16> = bytes.chunks_exact(2).map(|pair| u16_at(pair, 0)).collect();
                if length % 2 != 0 || units.contains(&0) {
                    return Err(wrong(format!("text at {at} with {length} bytes is cut or holds a NUL")));
                }
                String::from_utf16(&units).map_err(|_| wrong(format!("text at {at} is not UTF-16")))
            };
            if key_length > MAX_KEY_BYTES {
                continue;
            }
            let key = text(u32_at(entry, 0), key_length)?;
            let place = match key.as_str() {
                "parent_linkage" => &mut linkage,
                "parent_linkage2" => &mut linkage2,
                "relative_path" => &mut locator.relative_path,
                "volume_path" => &mut locator.volume_path,
                "absolute_win32_path" => &mut locator.absolute_win32_path,
                _ => continue,
            };
            if place.replace(text(u32_at(entry, 4), value_length)?).is_some() {
                return Err(wrong(format!("the key {key} is there twice")));
            }
        }
        let guid = |text: &String| {
            guid_from_text(text).ok_or_else(|| wrong(format!("the linkage {text:?} is not a GUID")))
        };
        match linkage {
            Some(text) => locator.linkage = guid(&text)?,
            None => return Err(wrong("the key parent_linkage is missing".to_owned())),
        }
        locator.linkage2 = linkage2.as_ref().map(guid).transpose()?;
        if locator.names().is_empty() {
            return Err(wrong("there is no name of the parent".to_owned()));
        }
        Ok(locator)
    }

    /// The item of a new image.
    pub(crate) fn bytes(&self) -> Result<Vec<u8>, ImageError> {
        let linkage = Some(guid_text(&self.linkage));
        let linkage2 = self.linkage2.as_ref().map(guid_text);
        let pairs: Vec<(&str, &String)> = [
            ("parent_linkage", &linkage),
            ("parent_linkage2", &linkage2),
            ("relative_path", &self.relative_path),
            ("volume_path", &self.volume_path),
            ("absolute_win32_path", &self.absolute_win32_path),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.as_ref()?)))
        .collect();
        let mut buf = vec![0; HEADER_BYTES + pairs.len() * ENTRY_BYTES];
        put(&mut buf, 0, &VHDX_PARENT);
        put(&mut buf, 18, &(pairs.len() as u16).to_le_bytes());
        for (index, (key, value)) in pairs.into_iter().enumerate() {
            let at = HEADER_BYTES + index * ENTRY_BYTES;
            for (text, offset_at, length_at) in [(key, at, at + 8), (value.as_str(), at + 4, at + 10)] {
                let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                let length = u16::try_from(units.len())
                    .map_err(|_| super::cannot_hold("a name of the parent is longer than 64 KiB"))?;
                if units.is_empty() || text.contains('\0') {
                    return Err(super::cannot_hold("a name of the parent is empty or holds a NUL"));
                }
                let offset = buf.len() as u32;
                put(&mut buf, offset_at, &offset.to_le_bytes());
                put(&mut buf, length_at, &length.to_le_bytes());
                buf.extend_from_slice(&units);
            }
        }
        Ok(buf)
    }
}
