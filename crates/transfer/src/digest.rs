//! Digests over what was announced and over what a disk holds.

use crate::BlockHash;
use crate::message::Run;

/// Adds the runs of one announcement to the digest of a pass. Both ends do it by themselves: the sender from what
/// it read, the server from what it took in (S15).
pub(crate) fn digest_runs(digest: &mut blake3::Hasher, disk: u32, runs: &[Run]) {
    for run in runs {
        digest.update(&disk.to_le_bytes());
        match run {
            Run::Data { first, hashes } => {
                digest.update(&[0]);
                digest.update(&first.to_le_bytes());
                digest.update(&(hashes.len() as u64).to_le_bytes());
                for hash in hashes {
                    digest.update(&hash.0);
                }
            }
            Run::Zeros { first, blocks } => {
                digest.update(&[1]);
                digest.update(&first.to_le_bytes());
                digest.update(&blocks.to_le_bytes());
            }
        }
    }
}

/// The digest of a disk's content: every block that is not all zeros, with its index. It depends on nothing
/// but content, so a hole and a block of zeros are the same, and so is the order in which blocks are proved:
/// a target has those that it kept long before it can read back what it wrote.
///
/// A sum guards against accidents, not against a peer that means ill: that one could repeat the digest it is
/// told.
#[derive(Clone, Default)]
pub(crate) struct ContentDigest([u64; 4]);

impl ContentDigest {
    /// Adds a block, which must be added once.
    pub(crate) fn add(&mut self, block: u64, hash: &BlockHash) {
        let mut one = blake3::Hasher::new();
        one.update(&block.to_le_bytes());
        one.update(&hash.0);
        for (sum, word) in self.0.iter_mut().zip(one.finalize().as_bytes().as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }

    pub(crate) fn finish(&self, size: u64) -> [u8; 32] {
        let mut last = blake3::Hasher::new();
        for sum in self.0 {
            last.update(&sum.to_le_bytes());
        }
        last.update(&size.to_le_bytes());
        *last.finalize().as_bytes()
    }
}
