//! Data that will not shrink, told from a sample before it is compressed.
//!
//! Films, archives and what a guest encrypted have bytes that are spread like noise, and compressing them costs time for
//! nothing. The test looks at 512 bytes of the first block first, so that on ordinary data it costs next to nothing.
//!
//! It errs on one side: noise that repeats itself within a frame would shrink, and is not seen. What it calls noise is
//! kept as it is, so an error costs space and nothing else.

use crate::BLOCK_BYTES;

/// Stretches of a block that are looked at, and their bytes: spread over all of it, for the middle of a film's block may
/// be the end of it.
const STRETCHES: usize = 64;
const STRETCH: usize = 64;

/// Stretches after which ordinary data is given up.
const FIRST: usize = 8;

/// Most by which the counts of the 256 values may miss an even spread (Pearson's chi-squared). Noise has 255 on average,
/// with a deviation of 23. The output of weak compressors begins at 400, and shrinks by a few hundredths: decision 16.
const SPREAD: u64 = 400;

/// Whether all blocks of `bytes` are spread like noise.
pub fn is_noise(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.chunks(BLOCK_BYTES as usize).all(is_even)
}

fn is_even(block: &[u8]) -> bool {
    let step = block.len() / STRETCHES;
    if step < STRETCH {
        return false;
    }
    let mut counts = [0u16; 256];
    for (number, place) in block.chunks_exact(step).take(STRETCHES).enumerate() {
        for &byte in &place[..STRETCH] {
            counts[usize::from(byte)] += 1;
        }
        let looked_at = number + 1;
        if (looked_at == FIRST || looked_at == STRETCHES) && spread(&counts, looked_at * STRETCH) > SPREAD {
            return false;
        }
    }
    true
}

/// Chi-squared of counts that should be equal.
fn spread(counts: &[u16; 256], all: usize) -> u64 {
    let squares: u64 = counts.iter().map(|&count| u64::from(count) * u64::from(count)).sum();
    (squares * 256 / all as u64).saturating_sub(all as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = BLOCK_BYTES as usize;

    /// Numbers without a pattern, the same ones every time.
    fn noise(seed: u64, bytes: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..bytes)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            })
            .collect()
    }

    #[test]
    fn noise_is_told_and_no_block_of_a_thousand_is_missed() {
        let missed = (1..=1000).filter(|&seed| !is_noise(&noise(seed, BLOCK))).count();
        assert_eq!(missed, 0);
        assert!(is_noise(&noise(1, 4 * BLOCK)));
    }

    #[test]
    fn what_shrinks_is_not_called_noise() {
        let seven: Vec<u8> = noise(2, BLOCK).iter().map(|byte| byte & 127).collect();
        let hex: Vec<u8> = noise(3, BLOCK / 2).iter().flat_map(|b| format!("{b:02x}").into_bytes()).collect();
        let text = "a line of a log, as there are many; ".repeat(BLOCK / 30).as_bytes()[..BLOCK].to_vec();
        // A page of a database: half of it records.
        let page: Vec<u8> = [noise(4, BLOCK / 2), text[..BLOCK / 2].to_vec()].concat();
        for (name, bytes) in
            [("seven bits", seven), ("hex", hex), ("text", text), ("page", page), ("zeros", vec![0; BLOCK])]
        {
            assert!(!is_noise(&bytes), "{name}");
        }
    }

    #[test]
    fn one_block_that_shrinks_is_enough() {
        let mut frame = noise(5, 4 * BLOCK);
        frame[2 * BLOCK..3 * BLOCK].fill(7);
        assert!(!is_noise(&frame));
    }

    #[test]
    fn too_little_to_tell_is_not_noise() {
        assert!(!is_noise(&[]));
        assert!(!is_noise(&noise(6, 4095)));
        assert!(is_noise(&noise(6, 4096)));
    }
}
