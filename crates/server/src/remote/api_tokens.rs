//! Tokens of people and scripts that use the API. Only their hashes are stored.

use std::sync::{Arc, PoisonError, RwLock};

use environment::Randomness;
use model::{Code, Problem, Timestamp};
use serde::{Deserialize, Serialize};
use storage_pool::Pool;

use crate::app::Tokens;

const FOLDER: &str = "api-token/";
/// How a token begins, so that people and scanners of secrets know what they found.
const PREFIX: &str = "spapi0-";
const SECRET_BYTES: usize = 32;

#[derive(Serialize, Deserialize)]
struct Stored {
    hash: String,
    created: Timestamp,
}

/// The API tokens of a pool.
pub struct ApiTokens {
    pool: Arc<Pool>,
    /// Names and hashes.
    known: RwLock<Vec<(String, blake3::Hash)>>,
}

fn hash(token: &str) -> blake3::Hash {
    blake3::Hasher::new_derive_key("stillpoint 2026 API token").update(token.as_bytes()).finalize()
}

impl ApiTokens {
    /// Reads them.
    pub fn open(pool: Arc<Pool>) -> ApiTokens {
        let known = pool
            .documents(FOLDER)
            .iter()
            .filter_map(|(name, bytes)| {
                let stored: Stored = serde_json::from_slice(bytes).ok()?;
                let hash = blake3::Hash::from_hex(stored.hash).ok()?;
                Some((name.strip_prefix(FOLDER)?.to_owned(), hash))
            })
            .collect();
        ApiTokens { pool, known: RwLock::new(known) }
    }

    /// Whether nobody can use the API.
    pub fn is_empty(&self) -> bool {
        self.known.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Makes a token for `name`, in place of the one it had; the text exists only in the answer.
    pub fn issue(&self, name: &str, now: Timestamp, randomness: &dyn Randomness) -> Result<String, Problem> {
        let mut secret = [0u8; SECRET_BYTES];
        randomness
            .fill(&mut secret)
            .map_err(|error| Problem::new(Code::Internal, format!("No random numbers: {error}.")))?;
        let token = format!("{PREFIX}{}", blake3::Hash::from_bytes(secret).to_hex());
        let made = hash(&token);
        let stored = Stored { hash: made.to_hex().to_string(), created: now };
        let bytes = serde_json::to_vec(&stored).map_err(|error| {
            Problem::new(Code::Internal, format!("A token cannot be written down: {error}."))
        })?;
        self.pool.put_document(&format!("{FOLDER}{name}"), Some(&bytes)).map_err(jobs::problem::pool)?;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(other, _)| other != name);
        known.push((name.to_owned(), made));
        Ok(token)
    }
}

impl Tokens for ApiTokens {
    fn check(&self, token: &str) -> Option<String> {
        let asked = hash(token);
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        // Comparing hashes of `blake3` takes the same time wherever they differ, and every one is looked at.
        let mut found = None;
        for (name, hash) in known.iter() {
            if *hash == asked {
                found = Some(name.clone());
            }
        }
        found
    }
}
