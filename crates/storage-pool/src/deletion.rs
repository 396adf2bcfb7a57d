//! The deletion service: the only one that unlinks anything of a pool (INV-15).
//!
//! Refuses: removing a pack while a record cannot be read; removing anything that a sealed record or a readable newer file
//! does not allow. Ballast is nobody's data and goes on request.

use std::io;
use std::sync::Arc;

use environment::{Files, Removal};

use crate::error::PoolError;
use crate::format::{ballast, pack, run};
use crate::pool::World;
use crate::sequence;

/// Unlinks what a permit allows. In the product a process of its own; see [`run_deletion_service`].
pub trait DeletionService {
    /// Carries out the permit with this record number, and removes these superseded runs.
    fn carry_out(&self, permit: Option<u64>, runs: &[u64]) -> Result<(), PoolError>;
    /// Removes the ballast, if it has a way to.
    fn give_up_ballast(&self) -> Result<(), PoolError> {
        Ok(())
    }
}

/// The deletion service: reads the permit from the pool itself and unlinks exactly what it names.
///
/// It believes nothing it is told but numbers: the packs come from the sealed record, and a run is unlinked only if a
/// readable run supersedes it.
pub fn run_deletion_service(
    world: &World,
    removal: &dyn Removal,
    recipient: &crate::kit::Recipient,
    permit: Option<u64>,
    runs: &[u64],
) -> Result<(), PoolError> {
    let keys = crate::rings::open(world, recipient)?.keys;
    let state = sequence::load(&*world.files, &keys)?;
    if let Some(record) = state.unreadable.first() {
        return Err(PoolError::Stopped { reason: format!("{}: {}", record.path, record.reason) });
    }
    let io = |name: &str, source| PoolError::io(world.files.display(name), "remove", source);
    if let Some(permit) = permit {
        for (pack, number) in &state.permitted {
            if *number == permit {
                let name = pack::name(*pack);
                removal.remove(&name).map_err(|source| io(&name, source))?;
            }
        }
    }
    let bundles = crate::bundle::superseded(&*world.files, &keys)?;
    for name in bundles.into_iter().chain(crate::counts::superseded(&*world.files, &keys)?) {
        removal.remove(&name).map_err(|source| io(&name, source))?;
    }
    if runs.is_empty() {
        return Ok(());
    }
    let gone = |pack| state.permitted.contains_key(&pack);
    let index = crate::index::Index::open(world.files.clone(), &keys, state.generation, &gone)?;
    let superseded = index.superseded();
    for number in runs.iter().filter(|number| superseded.contains(number)) {
        let name = run::name(*number);
        removal.remove(&name).map_err(|source| io(&name, source))?;
    }
    Ok(())
}

/// A deletion service in this process: for simulations and tests.
pub struct InProcessDeletion {
    /// The pool's world.
    pub world: World,
    /// The right to remove.
    pub removal: Arc<dyn Removal>,
    /// A way into the pool.
    pub recipient: crate::kit::Recipient,
}

impl DeletionService for InProcessDeletion {
    fn carry_out(&self, permit: Option<u64>, runs: &[u64]) -> Result<(), PoolError> {
        run_deletion_service(&self.world, &*self.removal, &self.recipient, permit, runs)
    }

    fn give_up_ballast(&self) -> Result<(), PoolError> {
        give_up_ballast(&*self.removal)
    }
}

/// Files of ballast that are there, with their bytes.
pub(crate) fn ballast_there(files: &dyn Files) -> Result<Vec<(u32, u64)>, PoolError> {
    let entries = match files.list(ballast::FOLDER) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(PoolError::io(files.display(ballast::FOLDER), "list", source)),
    };
    Ok(entries.iter().filter_map(|entry| Some((ballast::number(&entry.name)?, entry.len))).collect())
}

/// Removes the ballast of a pool.
pub fn give_up_ballast(removal: &dyn Removal) -> Result<(), PoolError> {
    for (number, _) in ballast_there(removal)? {
        let name = ballast::name(number);
        removal.remove(&name).map_err(|source| PoolError::io(removal.display(&name), "remove", source))?;
    }
    Ok(())
}
