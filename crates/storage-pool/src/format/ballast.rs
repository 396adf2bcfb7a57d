//! Ballast (section 2.1): bytes that say nothing and follow from the pool's id, so that they can be checked without a key.

use model::PoolId;

use super::head;

const MAGIC: &[u8; 8] = b"STPBALST";
/// The folder.
pub const FOLDER: &str = "ballast";

/// Name of file `number` in the pool's folder.
pub fn name(number: u32) -> String {
    format!("{FOLDER}/{number:02x}.ballast")
}

/// Number of a file by the last part of its name.
pub fn number(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".ballast")?;
    (digits.len() == 2).then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

/// The `length` bytes of file `number`.
pub fn encode(pool: PoolId, number: u32, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    let mut hasher = blake3::Hasher::new_derive_key("stillpoint pool v1 ballast");
    hasher.update(&pool.0).update(&number.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    let mut start = head(MAGIC).to_vec();
    start.extend_from_slice(&[0; 4]);
    start.extend_from_slice(&pool.0);
    let common = start.len().min(bytes.len());
    bytes[..common].copy_from_slice(&start[..common]);
    bytes
}
