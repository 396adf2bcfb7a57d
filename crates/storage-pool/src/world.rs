//! What a pool stands in: its files, a clock, randomness.

use std::io;
use std::sync::Arc;

use environment::{Clock, Files, Randomness};

use crate::error::PoolError;
use crate::kit::RecipientId;
use crate::sequence;

/// Names of what a folder of the pool holds, in order; none where it is missing.
pub(crate) fn names_in(files: &dyn Files, folder: &str) -> Result<Vec<String>, PoolError> {
    match files.names(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        found => found.map_err(|source| PoolError::io(files.display(folder), "list", source)),
    }
}

/// The world around a pool.
#[derive(Clone)]
pub struct World {
    /// Its folder.
    pub files: Arc<dyn Files>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Unpredictable bytes.
    pub randomness: Arc<dyn Randomness>,
}

impl World {
    /// A fresh random id.
    pub fn random_id(&self) -> Result<[u8; 16], PoolError> {
        let mut id = [0u8; 16];
        self.randomness
            .fill(&mut id)
            .map_err(|source| PoolError::io(self.files.display(""), "draw random bytes for", source))?;
        Ok(id)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.files.display(name)
    }

    pub(crate) fn publish(&self, name: &str, bytes: &[u8]) -> Result<(), PoolError> {
        sequence::publish(&*self.files, name, bytes).map_err(|failed| failed.into_error(self.path(name)))
    }
}

/// Name of a recipient's key file.
pub fn key_name(id: RecipientId) -> String {
    format!("keys/{id}.key")
}
