//! Encoding and decoding the content of frames.

use std::cell::RefCell;

use zstd::bulk::Decompressor;

use crate::format::FormatError;
use crate::format::pack::PackKind;

/// Bytes of a block.
pub const BLOCK: usize = model::BLOCK_BYTES as usize;

/// Codec numbers of section 6.
pub const PLAIN: u8 = 0;
/// One zstd frame.
pub const ZSTD: u8 = 1;

/// Encodes `content`: zstd if that saves at least a thirtieth, else plain.
pub fn encode(level: i32, content: &[u8]) -> (u8, Vec<u8>) {
    match zstd::bulk::compress(content, level) {
        Ok(small) if small.len() < content.len() - content.len() / 30 => (ZSTD, small),
        _ => (PLAIN, content.to_vec()),
    }
}

/// Decodes to exactly `decoded` bytes.
pub fn decode(codec: u8, bytes: &[u8], decoded: usize) -> Result<Vec<u8>, String> {
    let content = match codec {
        PLAIN => bytes.to_vec(),
        ZSTD => decompress(bytes, decoded).map_err(|error| format!("zstd: {error}"))?,
        other => return Err(format!("codec {other} is unknown")),
    };
    if content.len() != decoded {
        return Err(format!("decodes to {} bytes, expected {decoded}", content.len()));
    }
    Ok(content)
}

thread_local! {
    /// Made once a thread: it has memory of its own that every frame would ask for and clear.
    static DECODER: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// At most `capacity` bytes out of one zstd frame.
fn decompress(bytes: &[u8], capacity: usize) -> std::io::Result<Vec<u8>> {
    DECODER.with_borrow_mut(|decoder| match decoder {
        Some(decoder) => decoder.decompress(bytes, capacity),
        None => decoder.insert(Decompressor::new()?).decompress(bytes, capacity),
    })
}

/// Decodes one frame after another with the same memory, for whoever reads packs as a whole.
pub struct Decoder {
    zstd: Decompressor<'static>,
    content: Vec<u8>,
}

impl Decoder {
    /// A decoder, with memory for the largest frame.
    pub fn new() -> Result<Decoder, String> {
        let zstd = Decompressor::new().map_err(|error| format!("zstd: {error}"))?;
        Ok(Decoder { zstd, content: Vec::with_capacity(crate::format::pack::MAX_DECODED as usize) })
    }

    /// As [`decode`]; plain content is given as it lies.
    pub fn decode<'a>(&'a mut self, codec: u8, bytes: &'a [u8], decoded: usize) -> Result<&'a [u8], String> {
        let content = match codec {
            PLAIN => bytes,
            ZSTD => {
                self.content.clear();
                self.content.reserve(decoded);
                self.zstd
                    .decompress_to_buffer(bytes, &mut self.content)
                    .map_err(|error| format!("zstd: {error}"))?;
                &self.content
            }
            other => return Err(format!("codec {other} is unknown")),
        };
        if content.len() != decoded {
            return Err(format!("decodes to {} bytes, expected {decoded}", content.len()));
        }
        Ok(content)
    }
}

/// Content of a frame of nodes: their lengths, then they.
pub fn join_nodes(nodes: &[Vec<u8>]) -> Vec<u8> {
    let mut content = Vec::with_capacity(nodes.iter().map(|node| node.len() + 4).sum());
    for node in nodes {
        content.extend_from_slice(&(node.len() as u32).to_le_bytes());
    }
    for node in nodes {
        content.extend_from_slice(node);
    }
    content
}

/// Where each of `chunks` chunks lies in decoded content.
pub fn spans(
    kind: PackKind,
    chunks: usize,
    content: &[u8],
) -> Result<Vec<std::ops::Range<usize>>, FormatError> {
    match kind {
        PackKind::Blocks if content.len() == chunks * BLOCK => {
            Ok((0..chunks).map(|index| index * BLOCK..(index + 1) * BLOCK).collect())
        }
        PackKind::Blocks => {
            Err(FormatError::at(0, format!("frame of {chunks} blocks decodes to {} bytes", content.len())))
        }
        PackKind::Nodes => {
            let mut spans = Vec::with_capacity(chunks);
            let mut at = chunks * 4;
            for index in 0..chunks {
                let length = super::format::u32_at(content, index * 4)? as usize;
                let end = at.checked_add(length).filter(|&end| end <= content.len());
                let end =
                    end.ok_or_else(|| FormatError::at(index as u64 * 4, "a node reaches past its frame"))?;
                spans.push(at..end);
                at = end;
            }
            Ok(spans)
        }
    }
}
