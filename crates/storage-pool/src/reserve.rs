//! The reserve: room that ingests leave, so that what gives space back can always be written down.
//!
//! Records of deletions and reclaims, runs and the catalog may go below the reserve; only ingests stop at it. If something
//! else on the volume takes even that, the ballast goes: a few files that say nothing, made with the pool, which the deletion
//! service removes on request and the next reclaim makes again.
//!
//! Invariants
//! - An ingest leaves at least the reserve free, but for what jobs beside it write in the same moment. (should)
//! - Ballast is data of nobody: it can be lost, damaged or removed at any time. (must)

use std::io;

use environment::Files;
use model::PoolId;

use crate::deletion::{DeletionService, ballast_there};
use crate::error::{Damage, PoolError};
use crate::format::ballast;
use crate::pool::Pool;
use crate::sequence;

/// Bytes of a file of ballast, at least and at most.
const LEAST: u64 = 1 << 10;
const MOST: u64 = 256 << 10;
/// The part of the reserve that one has otherwise.
const PART: u64 = 16;
/// Bytes of packs for which there is one more file: what a reclaim has to write down grows with the pool.
const PACKS_A_FILE: u64 = 256 << 20;
/// Files of ballast, at most.
const FILES: u64 = 64;

fn ballast_bytes(reserve: u64) -> u64 {
    if reserve == 0 { 0 } else { (reserve / PART).clamp(LEAST, MOST) }
}

/// How many a pool with so many bytes of packs has.
fn ballast_files(packs: u64) -> u32 {
    (1 + packs / PACKS_A_FILE).min(FILES) as u32
}

/// Reads the ballast and compares it with what it must be.
pub(crate) fn examine(files: &dyn Files, pool: PoolId, reserve: u64) -> Result<Vec<Damage>, PoolError> {
    let mut damage = Vec::new();
    let length = ballast_bytes(reserve);
    for (number, _) in ballast_there(files)? {
        let name = ballast::name(number);
        let wrong = match files.read(&name, MOST) {
            Ok(bytes) if bytes == ballast::encode(pool, number, length) => continue,
            Ok(_) => "is not the ballast that was written".to_owned(),
            // A reclaim gave it up meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => error.to_string(),
        };
        damage.push(Damage::File { path: files.display(&name), offset: 0, reason: wrong, derived: true });
    }
    Ok(damage)
}

impl Pool {
    /// Refuses what an ingest is about to store if that leaves less than the reserve.
    pub(crate) fn leave_reserve(&self, bytes: u64) -> Result<(), PoolError> {
        let reserve = self.settings().reserve.unwrap_or(0);
        if reserve == 0 {
            return Ok(());
        }
        // Where the room cannot be measured, the disk says when it is full.
        let Ok(free) = self.world.files.free_bytes() else { return Ok(()) };
        if free < reserve.saturating_add(bytes) {
            return Err(PoolError::Reserve { path: self.path(), free, reserve });
        }
        Ok(())
    }

    /// Makes ballast that is not there, as much as a pool of this size has, if the reserve stays free.
    pub(crate) fn make_ballast(&self) -> Result<(), PoolError> {
        let reserve = self.settings().reserve.unwrap_or(0);
        let length = ballast_bytes(reserve);
        if length == 0 {
            return Ok(());
        }
        let packs = self.index().packs().values().filter(|pack| pack.present).map(|pack| pack.length).sum();
        let there = ballast_there(&*self.world.files)?;
        let missing: Vec<u32> = (0..ballast_files(packs))
            .filter(|number| !there.iter().any(|(other, _)| other == number))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        if self.leave_reserve(length * missing.len() as u64).is_err() {
            return Ok(());
        }
        let failed = |source| PoolError::io(self.world.files.display(ballast::FOLDER), "create", source);
        self.world.files.make_folder(ballast::FOLDER).map_err(failed)?;
        for number in missing {
            let name = ballast::name(number);
            let bytes = ballast::encode(self.id(), number, length);
            match sequence::publish(&*self.world.files, &name, &bytes) {
                Ok(()) => {}
                // Nothing depends on it; the next reclaim tries again.
                Err(failed) => match failed.into_error(self.world.files.display(&name)) {
                    PoolError::Full { .. } | PoolError::Exists { .. } => return Ok(()),
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Before something that gives space back: if so little is free that even a record may not find room, the ballast
    /// goes. Whether it went.
    pub fn make_room(&self, service: &dyn DeletionService) -> Result<bool, PoolError> {
        let there: u64 = ballast_there(&*self.world.files)?.iter().map(|(_, length)| length).sum();
        let is_tight = self.world.files.free_bytes().is_ok_and(|free| free < there);
        if is_tight {
            service.give_up_ballast()?;
        }
        Ok(is_tight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ballast_grows_with_the_pool() {
        assert_eq!(ballast_bytes(0), 0);
        assert_eq!(
            (ballast_bytes(1), ballast_bytes(64 << 10), ballast_bytes(1 << 30)),
            (1 << 10, 4 << 10, 256 << 10)
        );
        let files = [0, PACKS_A_FILE - 1, PACKS_A_FILE, 16 << 30, 80 << 40].map(ballast_files);
        assert_eq!(files, [1, 1, 2, 64, 64]);
    }
}
