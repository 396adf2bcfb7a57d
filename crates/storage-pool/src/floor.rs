//! What the retention floor keeps, whatever a policy says (INV-13).

use std::collections::{HashMap, HashSet};

use model::{DatasourceId, RecoveryPointId, Timestamp};

use crate::state::{Point, State};

/// The floor of one moment. It is worked out once for a whole list: each point asked by itself would look through all of
/// its machine.
#[derive(Debug, Clone)]
pub struct Floor {
    newest: HashSet<RecoveryPointId>,
    terms: Terms,
    now: u64,
}

/// How much the floor keeps, as fixed when the pool was created.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    /// The newest good points of each machine.
    pub(crate) points: u32,
    /// Points younger than so many seconds.
    pub(crate) age: u64,
}

impl Floor {
    /// The floor of `machine`, or of every machine, when the clock says `now` (microseconds).
    pub(crate) fn of(state: &State, terms: Terms, now: u64, machine: Option<DatasourceId>) -> Floor {
        let most = terms.points as usize;
        let good = |point: &&Point| point.deleted.is_none() && point.suspect.is_none() && !point.incomplete;
        let points = state.in_order().rev().filter(good);
        let newest = match machine {
            Some(machine) => {
                points.filter(|point| point.datasource == machine).take(most).map(|point| point.id).collect()
            }
            None => {
                let mut seen: HashMap<DatasourceId, usize> = HashMap::new();
                points
                    .filter(|point| {
                        let seen = seen.entry(point.datasource).or_default();
                        *seen += 1;
                        *seen <= most
                    })
                    .map(|point| point.id)
                    .collect()
            }
        };
        Floor { newest, terms, now }
    }

    /// Why the floor keeps a point, if it does: it is one of the machine's newest good points, or too young.
    pub fn keeps(&self, point: &Point) -> Option<String> {
        if self.newest.contains(&point.id) {
            return Some(format!(
                "it is one of the last {} good points of {}",
                self.terms.points, point.machine
            ));
        }
        let age = self.now.saturating_sub(point.captured.0) / Timestamp::SECOND;
        (age < self.terms.age)
            .then(|| format!("it is {age} s old, points younger than {} s are kept", self.terms.age))
    }
}
