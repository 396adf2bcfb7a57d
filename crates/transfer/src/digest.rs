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

/// The digest of a disk's content: every block that is not all zeros, with its index, ascending. It depends on
/// nothing but content, so a hole and a block of zeros are the same.
#[derive(Clone, Default)]
pub(crate) struct ContentDigest(blake3::Hasher);

impl ContentDigest {
    pub(crate) fn add(&mut self, block: u64, hash: &BlockHash) {
        self.0.update(&block.to_le_bytes());
        self.0.update(&hash.0);
    }

    pub(crate) fn finish(&self, size: u64) -> [u8; 32] {
        let mut last = self.0.clone();
        last.update(&size.to_le_bytes());
        *last.finalize().as_bytes()
    }
}
