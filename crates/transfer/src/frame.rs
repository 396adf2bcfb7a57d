//! Frames on their way: one to [`FRAME_BLOCKS`] blocks, packed by the end that reads and opened by the end that
//! keeps.
//!
//! Refuses: a zstd payload that is not exactly one frame, or that does not decode to exactly the blocks it stands
//! for; the output buffer has that size, so no claim of the sender allocates more.

use std::cell::RefCell;

use bytes::Bytes;
use model::noise::is_noise;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::CParameter;

use crate::{BLOCK, BlockHash, Codec, FRAME_BLOCKS, Frame, Hashed, hash_block};

/// The encoded blocks of one frame, perhaps with the proof that this process hashed them.
#[derive(Debug, Clone)]
pub struct Payload {
    codec: Codec,
    bytes: Bytes,
    blocks: usize,
    proof: Option<Hashed>,
}

/// The proof never travels, so it does not count: a message equals its decoded encoding.
impl PartialEq for Payload {
    fn eq(&self, other: &Payload) -> bool {
        (self.codec, &self.bytes, self.blocks) == (other.codec, &other.bytes, other.blocks)
    }
}

/// Why a payload is not the blocks it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PayloadError {
    #[error("the payload stands for {found} blocks, expected {expected}")]
    Count { expected: usize, found: usize },
    #[error("the payload decodes to {found} bytes, expected {expected}")]
    Length { expected: usize, found: usize },
    #[error("the payload is not exactly one zstd frame")]
    NotZstd,
    #[error("block {index} of the frame does not have the hash announced for it")]
    Hash { index: usize },
}

impl Payload {
    /// A payload without a proof, as it comes from a wire.
    pub fn unproved(codec: Codec, bytes: Bytes, blocks: usize) -> Payload {
        Payload { codec, bytes, blocks, proof: None }
    }

    /// How the bytes are encoded.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The encoded bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Blocks it stands for.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The blocks as plain bytes; exactly `blocks()` times 64 KiB.
    pub(crate) fn open(&self) -> Result<Bytes, PayloadError> {
        if self.blocks == 0 || self.blocks > FRAME_BLOCKS {
            return Err(PayloadError::Count { expected: FRAME_BLOCKS, found: self.blocks });
        }
        let expected = self.blocks * BLOCK;
        match self.codec {
            Codec::Plain if self.bytes.len() == expected => Ok(self.bytes.clone()),
            Codec::Plain => Err(PayloadError::Length { expected, found: self.bytes.len() }),
            Codec::Zstd => {
                // Bytes behind the frame would be stored and never looked at.
                if zstd::zstd_safe::find_frame_compressed_size(&self.bytes) != Ok(self.bytes.len()) {
                    return Err(PayloadError::NotZstd);
                }
                let plain = decompress(&self.bytes, expected).map_err(|_| PayloadError::NotZstd)?;
                if plain.len() != expected {
                    return Err(PayloadError::Length { expected, found: plain.len() });
                }
                Ok(plain.into())
            }
        }
    }

    /// Whether these are blocks with these hashes: by the proof if this process made it, by hashing otherwise.
    pub(crate) fn check(&self, expected: &[BlockHash]) -> Result<(), PayloadError> {
        if self.blocks != expected.len() {
            return Err(PayloadError::Count { expected: expected.len(), found: self.blocks });
        }
        match &self.proof {
            Some(proof) => compare(expected, proof.hashes().iter().copied()),
            None => compare(expected, self.open()?.chunks_exact(BLOCK).map(hash_block)),
        }
    }

    /// Checks and decodes in one step.
    pub(crate) fn open_checked(&self, expected: &[BlockHash]) -> Result<Bytes, PayloadError> {
        if self.blocks != expected.len() {
            return Err(PayloadError::Count { expected: expected.len(), found: self.blocks });
        }
        let plain = self.open()?;
        match &self.proof {
            Some(proof) => compare(expected, proof.hashes().iter().copied())?,
            None => compare(expected, plain.chunks_exact(BLOCK).map(hash_block))?,
        }
        Ok(plain)
    }

    /// The frame for the store, once its blocks were checked against `hashes`.
    pub(crate) fn into_frame(self, hashes: Vec<BlockHash>) -> Frame {
        Frame { codec: self.codec, bytes: self.bytes, hashes }
    }
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

fn compare(expected: &[BlockHash], found: impl Iterator<Item = BlockHash>) -> Result<(), PayloadError> {
    match expected.iter().zip(found).position(|(expected, found)| *expected != found) {
        Some(index) => Err(PayloadError::Hash { index }),
        None => Ok(()),
    }
}

/// Level 3 of zstd takes tables of half a MiB for a frame of 256 KiB: they do not stay in a core's cache, and are cleared for
/// every frame. These take a tenth of the time away and add half a percent to the size (docs/design/0017-pipeline.md).
const TABLES_OF_LEVEL_3: [CParameter; 2] = [CParameter::HashLog(15), CParameter::ChainLog(14)];

/// Packs blocks into payloads. One a thread: it keeps the compressor's memory.
pub(crate) struct Packer {
    compressor: Option<Compressor<'static>>,
}

impl Packer {
    /// A packer with that zstd level; `None` never compresses.
    pub(crate) fn new(level: Option<i32>) -> Packer {
        // Without memory for a compressor the blocks travel plain: slower, not wrong.
        let compressor = level.and_then(|level| {
            let mut compressor = Compressor::new(level).ok()?;
            if level == 3 {
                for size in TABLES_OF_LEVEL_3 {
                    compressor.set_parameter(size).ok()?;
                }
            }
            Some(compressor)
        });
        Packer { compressor }
    }

    /// Packs whole blocks, hashed by this process. Plain unless compression saves at least 3 %: decoding costs
    /// every later reader. What looks like noise is not tried.
    pub(crate) fn pack(&mut self, plain: Bytes, hashes: Vec<BlockHash>) -> Payload {
        let blocks = hashes.len();
        let proof = Some(Hashed::vouched(hashes));
        if let Some(compressor) = &mut self.compressor
            && !is_noise(&plain)
            && let Ok(packed) = compressor.compress(&plain)
            && packed.len() < plain.len() / 100 * 97
        {
            return Payload { codec: Codec::Zstd, bytes: packed.into(), blocks, proof };
        }
        Payload { codec: Codec::Plain, bytes: plain, blocks, proof }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Noise that stands twice in a frame would shrink to half: that it is kept plain shows that nobody tried.
    #[test]
    fn what_looks_like_noise_is_not_compressed() {
        let mut half = vec![0; 2 * BLOCK];
        blake3::Hasher::new().finalize_xof().fill(&mut half);
        let plain = [half.clone(), half].concat();
        let pack = |plain: &[u8]| {
            let hashes = plain.chunks_exact(BLOCK).map(hash_block).collect();
            Packer::new(Some(3)).pack(Bytes::copy_from_slice(plain), hashes)
        };
        assert_eq!(pack(&plain).codec(), Codec::Plain);
        let seven: Vec<u8> = plain.iter().map(|byte| byte & 127).collect();
        assert_eq!(pack(&seven).codec(), Codec::Zstd);
    }
}
