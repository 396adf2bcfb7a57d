//! Encoding and decoding the content of frames.

use std::cell::RefCell;
use std::io;

use zstd::bulk::Decompressor;
use zstd::stream::raw::{self, InBuffer, Operation, OutBuffer};

use crate::format::FormatError;
use crate::format::pack::PackKind;

/// Bytes of a block.
pub const BLOCK: usize = model::BLOCK_BYTES as usize;

/// Codec numbers of section 6.
pub const PLAIN: u8 = 0;
/// One zstd frame.
pub const ZSTD: u8 = 1;

/// Bytes of a zstd frame that its decoder asks for first.
const FIRST_STEP: usize = 5;

/// Encodes `content`: zstd if that saves at least a thirtieth, else plain. What looks like noise is not tried.
pub fn encode(level: i32, content: &[u8]) -> (u8, Vec<u8>) {
    if model::noise::is_noise(content) {
        return (PLAIN, content.to_vec());
    }
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

thread_local! {
    /// For starts of frames; it has buffers of its own, half a MiB.
    static START: RefCell<Option<raw::Decoder<'static>>> = const { RefCell::new(None) };
}

/// Decodes from the start on, `wanted` bytes at least or all: who reads a page of a block needs not what stands behind it. That
/// the rest can be decoded is not known then.
pub fn decode_start(codec: u8, bytes: &[u8], decoded: usize, wanted: usize) -> Result<Vec<u8>, String> {
    // A frame may declare a window that only a decoder of the whole takes; and that one has the last word on damage.
    start(codec, bytes, decoded, wanted).or_else(|_| decode(codec, bytes, decoded))
}

fn start(codec: u8, bytes: &[u8], decoded: usize, wanted: usize) -> Result<Vec<u8>, String> {
    // zstd decodes in blocks of 128 KiB at most, so near the end nothing is saved.
    if codec != ZSTD || wanted > decoded / 2 {
        return decode(codec, bytes, decoded);
    }
    let failed = |error: io::Error| format!("zstd: {error}");
    START.with_borrow_mut(|decoder| {
        let decoder = match decoder {
            Some(decoder) => decoder,
            None => decoder.insert(raw::Decoder::new().map_err(failed)?),
        };
        decoder.reinit().map_err(failed)?;
        let mut content = Vec::with_capacity(decoded);
        let mut output = OutBuffer::around(&mut content);
        // Given more than it asks for, it decodes the next block as well.
        let (mut at, mut step) = (0, FIRST_STEP);
        while output.pos() < wanted {
            let part = &bytes[at..bytes.len().min(at + step)];
            if part.is_empty() {
                return Err(format!("ends after {} bytes, expected {decoded}", output.pos()));
            }
            let mut input = InBuffer::around(part);
            step = decoder.run(&mut input, &mut output).map_err(failed)?.max(1);
            at += input.pos();
        }
        Ok(content)
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

/// Where each of `chunks` chunks lies in content of `decoded` bytes, of which the start is `content`; all of it, if it is of nodes.
pub fn spans(
    kind: PackKind,
    chunks: usize,
    content: &[u8],
    decoded: usize,
) -> Result<Vec<std::ops::Range<usize>>, FormatError> {
    match kind {
        PackKind::Blocks if decoded == chunks * BLOCK => {
            Ok((0..chunks).map(|index| index * BLOCK..(index + 1) * BLOCK).collect())
        }
        PackKind::Blocks => {
            Err(FormatError::at(0, format!("frame of {chunks} blocks decodes to {decoded} bytes")))
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Text of four blocks, so that a frame of it has more than one zstd block.
    fn content() -> Vec<u8> {
        (0..60_000u32)
            .flat_map(|number| number.wrapping_mul(2_654_435_761).to_string().into_bytes())
            .take(4 * BLOCK)
            .collect()
    }

    #[test]
    fn the_start_of_a_frame_is_decoded_alone() {
        let content = content();
        assert_eq!(content.len(), 4 * BLOCK);
        let (codec, bytes) = encode(3, &content);
        assert_eq!(codec, ZSTD);
        for wanted in [1, BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK] {
            let start = decode_start(codec, &bytes, content.len(), wanted).unwrap();
            assert!(start.len() >= wanted, "{wanted}: {}", start.len());
            assert!(content.starts_with(&start), "{wanted}");
            assert!(
                wanted > 2 * BLOCK || start.len() <= 2 * BLOCK,
                "{wanted}: {} bytes were decoded",
                start.len()
            );
        }
        assert_eq!(decode_start(PLAIN, &content, content.len(), 1).unwrap(), content);
    }

    /// Whatever bytes come: an error or some content, no more of it than was said, and the next frame is decoded as ever.
    #[test]
    fn damaged_starts_are_told_and_forgotten() {
        let content = content();
        let (_, bytes) = encode(3, &content);
        for at in (0..bytes.len()).step_by(bytes.len() / 300) {
            assert!(decode_start(ZSTD, &bytes[..at.min(1000)], content.len(), BLOCK).is_err());
            let mut wrong = bytes.clone();
            wrong[at] ^= 1 << (at % 8);
            if let Ok(start) = decode_start(ZSTD, &wrong, content.len(), BLOCK) {
                assert!((BLOCK..=content.len()).contains(&start.len()));
            }
            assert!(content.starts_with(&decode_start(ZSTD, &bytes, content.len(), BLOCK).unwrap()));
        }
        assert!(decode_start(7, &bytes, content.len(), BLOCK).is_err());
    }
}
