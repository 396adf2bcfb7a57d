//! How much of each pack is needed, as the counts keep it.
//!
//! A chunk with several copies is needed in its *home* alone: the newest sound copy that is not on its way out. If no copy is
//! sound, all are kept, for whatever can still be made of them. Newest is what the counts met last: that order never
//! changes, so what is subtracted later is what was added.

use std::collections::HashSet;

use crate::chunk::{ChunkId, Location, PackId};
use crate::error::PoolError;
use crate::format::counts::{GONE, MISSING, PackRow, QUARANTINED};
use crate::index::{Bits, View, ViewPlace};
use crate::mark::{Marks, Moment};
use crate::packs;
use crate::pool::Pool;
use crate::sorter::{Sorted, Sorter, distinct};
use crate::state::State;

use super::CountsUse;
use super::store::{CHANGE, Failure, Packs, Store, row};

/// So many packs that are new are looked at one by one, however few there are.
const FEW: usize = 64;
/// More than one in so many, and all are.
const PART: usize = 8;

/// The packs of a view, in its order.
pub(crate) type Rows = Vec<PackRow>;

/// The counts of one moment.
pub(crate) struct Counted {
    pub(super) moment: Moment,
    /// The counts.
    pub store: Store,
    /// Figures of the packs of the view.
    pub rows: Rows,
    /// Why everything was counted anew, if it was.
    pub anew: Option<String>,
}

impl Counted {
    /// The index then.
    pub fn view(&self) -> &View {
        &self.moment.view
    }

    /// The state then.
    pub fn state(&self) -> &State {
        &self.moment.state
    }

    /// Points whose soft-delete period is over.
    pub fn expired(&self) -> u64 {
        self.moment.expired
    }
}

/// Tells `each` of the places in which a needed chunk is needed.
pub(crate) fn homes(
    view: &View,
    state: &State,
    rows: &[PackRow],
    places: &[ViewPlace],
    mut each: impl FnMut(&ViewPlace),
) {
    let known = |place: &&ViewPlace| row_at(rows, place).is_some();
    let home = places
        .iter()
        .filter_map(|place| {
            let row = row_at(rows, place)?;
            let (id, _) = view.packs.get(place.pack as usize)?;
            let is_sound = row.flags & MISSING == 0
                && !state.permitted.contains_key(id)
                && state.is_undamaged(*id, Location { pack: *id, at: place.at }.frame());
            is_sound.then_some(((row.flags & QUARANTINED == 0, row.order, place.at), place))
        })
        .max_by_key(|(rank, _)| *rank);
    match home {
        Some((_, place)) => each(place),
        None => places.iter().filter(known).for_each(each),
    }
}

fn row_at<'r>(rows: &'r [PackRow], place: &ViewPlace) -> Option<&'r PackRow> {
    rows.get(place.pack as usize).filter(|row| row.flags & GONE == 0)
}

/// What recorded damage says, in 32 bytes.
fn damage_hash(state: &State) -> [u8; 32] {
    let mut packs: Vec<_> = state.damaged.iter().collect();
    packs.sort_unstable_by_key(|(pack, _)| **pack);
    let mut hasher = blake3::Hasher::new();
    for (pack, frames) in packs {
        hasher.update(&pack.0).update(&(frames.len() as u64).to_le_bytes());
        for frame in frames {
            hasher.update(&frame.to_le_bytes());
        }
    }
    *hasher.finalize().as_bytes()
}

/// The figures of all packs, and what they depend on.
pub(super) struct PackFigures {
    pub rows: Rows,
    pub damage: [u8; 32],
    pub next_order: u64,
}

/// What is done with the packs.
enum Plan {
    /// All figures are made again.
    All,
    /// Chunks of these packs, by their positions in the view, are looked at again.
    These(Vec<usize>),
}

impl Pool {
    /// The figures of packs after what `fresh` changes. `touched` are chunks that reached or left zero.
    pub(super) fn pack_figures(
        &self,
        moment: &Moment,
        store: &Store,
        fresh: &Sorted<CHANGE>,
        touched: Sorter<16>,
    ) -> Result<PackFigures, Failure> {
        let (view, state) = (&moment.view, &moment.state);
        let damage = damage_hash(state);
        let mut next_order = store.next_order;
        // As they were, and as they are; what was not there has no figures then.
        let mut before: Rows = Vec::with_capacity(view.packs.len());
        let mut rows: Rows = Vec::with_capacity(view.packs.len());
        let mut again = Vec::new();
        let mut is_seen = vec![false; store.packs.len()];
        let mut is_doubtful = damage != store.damage;
        for (at, (id, info)) in view.packs.iter().enumerate() {
            let is_quarantined = state.quarantined.contains_key(id);
            let flags = if is_quarantined { QUARANTINED } else { 0 } | if info.present { 0 } else { MISSING };
            match row(&store.packs, *id) {
                Some((seen, old)) => {
                    if let Some(seen) = is_seen.get_mut(seen) {
                        *seen = true;
                    }
                    is_doubtful |= (old.flags ^ flags) & MISSING != 0;
                    // Into quarantine goes what is nobody's home; what comes out of it may become one.
                    if (old.flags ^ flags) & QUARANTINED != 0 && (!is_quarantined || old.used > 0) {
                        again.push(at);
                    }
                    before.push(old);
                    rows.push(PackRow { flags, ..old });
                }
                None => {
                    again.push(at);
                    let new = PackRow { order: next_order, entries: 0, used: 0, flags };
                    next_order += 1;
                    before.push(PackRow { flags: GONE, ..new });
                    rows.push(new);
                }
            }
        }
        // What went had nothing to be moved, and a permit; or it is not known what moved.
        is_doubtful |= store
            .packs
            .iter()
            .zip(&is_seen)
            .any(|((id, old), is_seen)| !is_seen && (old.used > 0 || !state.permitted.contains_key(id)));
        let mut plan = if is_doubtful || again.len() > FEW.max(view.packs.len() / PART) {
            Plan::All
        } else {
            Plan::These(again)
        };
        if let Plan::These(again) = &plan
            && !self.change_figures(moment, store, fresh, touched, (again, &before, &mut rows))?
        {
            plan = Plan::All;
        }
        if let Plan::All = plan {
            all_figures(moment, store, fresh, &mut rows)?;
        }
        Ok(PackFigures { rows, damage, next_order })
    }

    /// Moves what changed from the packs where it was needed to those where it is. False if that cannot be told of single
    /// packs: then nothing that `rows` says counts.
    fn change_figures(
        &self,
        moment: &Moment,
        store: &Store,
        fresh: &Sorted<CHANGE>,
        mut touched: Sorter<16>,
        (again, before, rows): (&[usize], &[PackRow], &mut Rows),
    ) -> Result<bool, Failure> {
        let (view, state) = (&moment.view, &moment.state);
        for at in again {
            let Some((id, info)) = view.packs.get(*at) else { continue };
            if !info.present {
                return Ok(false);
            }
            let Ok(table) = packs::read_table(&*self.world.files, &self.keys, *id) else { return Ok(false) };
            let mut places: Vec<u32> = table.table.iter().map(|entry| entry.location).collect();
            places.sort_unstable();
            places.dedup();
            if let Some(row) = rows.get_mut(*at) {
                row.entries = places.len() as u32;
            }
            for entry in &table.table {
                touched.push(entry.id.0)?;
            }
        }
        let touched = touched.finish();
        let mut ids = touched.read();
        let mut old = store.sums(None);
        let mut new = store.sums(Some(fresh));
        let mut join = view.join();
        let mut places = Vec::new();
        let mut is_right = true;
        while let Some(id) = ids.next()? {
            let id = ChunkId(id);
            let (was, is) = (old.of(&id)? > 0, new.of(&id)? > 0);
            if !was && !is {
                continue;
            }
            places.clear();
            join.find(&id, &mut places, None)?;
            places.sort_unstable();
            places.dedup();
            let mut from = Vec::new();
            if was {
                homes(view, state, before, &places, |place| from.push(place.pack));
            }
            let mut to = Vec::new();
            if is {
                homes(view, state, rows, &places, |place| to.push(place.pack));
            }
            for pack in from {
                let Some(row) = rows.get_mut(pack as usize) else { continue };
                is_right &= row.used > 0;
                row.used = row.used.saturating_sub(1);
            }
            for pack in to {
                if let Some(row) = rows.get_mut(pack as usize) {
                    row.used += 1;
                }
            }
        }
        Ok(is_right && rows.iter().all(|row| row.used <= row.entries))
    }
}

/// Makes the figures of all packs of a view in one pass over index and counts.
fn all_figures(
    moment: &Moment,
    store: &Store,
    fresh: &Sorted<CHANGE>,
    rows: &mut Rows,
) -> Result<(), Failure> {
    for row in rows.iter_mut() {
        (row.entries, row.used) = (0, 0);
    }
    let none = Bits::none();
    let mut groups = moment.view.groups(&none)?;
    let mut sums = store.sums(Some(fresh));
    let mut places = Vec::new();
    let mut needed = Vec::new();
    while let Some((id, _, found)) = groups.next()? {
        places.clear();
        places.extend_from_slice(found);
        places.sort_unstable();
        places.dedup();
        for place in &places {
            if let Some(row) = rows.get_mut(place.pack as usize) {
                row.entries += 1;
            }
        }
        if sums.of(&id)? > 0 {
            needed.clear();
            homes(&moment.view, &moment.state, rows, &places, |place| needed.push(place.pack));
            for pack in &needed {
                if let Some(row) = rows.get_mut(*pack as usize) {
                    row.used += 1;
                }
            }
        }
    }
    Ok(())
}

/// The figures of all packs, made again from the counts.
#[cfg(test)]
pub(super) fn recount(pool: &Pool, counted: &Counted) -> Result<Rows, Failure> {
    let mut rows = counted.rows.clone();
    let none = Sorter::new(&pool.world.files, pool.room, super::store::summed);
    all_figures(&counted.moment, &counted.store, &none.finish(), &mut rows)?;
    Ok(rows)
}

/// What a new file says of packs, beside what the files below it say.
pub(super) fn difference(view: &View, rows: &Rows, below: &Packs) -> Packs {
    let mut is_seen = vec![false; below.len()];
    let mut changed = Packs::new();
    for ((id, _), new) in view.packs.iter().zip(rows) {
        match row(below, *id) {
            Some((at, old)) => {
                if let Some(seen) = is_seen.get_mut(at) {
                    *seen = true;
                }
                if old != *new {
                    changed.push((*id, *new));
                }
            }
            None => changed.push((*id, *new)),
        }
    }
    let gone = below.iter().zip(&is_seen).filter(|(_, is_seen)| !**is_seen);
    changed.extend(gone.map(|((id, row), _)| (*id, PackRow { flags: GONE, ..*row })));
    changed.sort_unstable_by_key(|(id, _)| *id);
    changed
}

/// Packs of a view with their figures, by id.
pub(super) fn by_id(view: &View, rows: &Rows) -> Packs {
    let mut packs: Packs = view.packs.iter().zip(rows).map(|((id, _), row)| (*id, *row)).collect();
    packs.sort_unstable_by_key(|(id, _)| *id);
    packs
}

/// A sorter of ids.
pub(super) fn ids(pool: &Pool) -> Sorter<16> {
    Sorter::new(&pool.world.files, pool.room, distinct)
}

/// For the error of a pack whose figures are not what its chunks say.
pub(crate) fn contradiction(id: PackId, said: u32, found: usize) -> Failure {
    Failure::Counts(format!("pack {id} has {found} needed chunks, the counts say {said}"))
}

/// Whether a mark that was made after counting says something else, for people; `due` are packs that are to be let go.
///
/// If no point came or went in between, everything is compared. Otherwise only what would be lost: a chunk that is needed,
/// stands in a pack that is due and nowhere else, and does not count as needed.
pub(crate) fn contradicts(
    counted: &Counted,
    marks: &Marks,
    due: &HashSet<PackId>,
) -> Result<Option<CountsUse>, PoolError> {
    let is_same = marks.roots == counted.store.roots;
    let mut sums = counted.store.sums(None);
    let mut groups = marks.view.groups(&marks.bits)?;
    let pack = |place: &ViewPlace| marks.view.packs.get(place.pack as usize);
    while let Some((id, is_needed, places)) = groups.next()? {
        let is_due = |place: &ViewPlace| pack(place).is_some_and(|(id, _)| due.contains(id));
        let is_compared = is_same || is_needed && places.iter().all(is_due);
        if !is_compared {
            continue;
        }
        let count = match sums.of(&id) {
            Ok(count) => count,
            // They cannot be read any more: nothing is known against what they said.
            Err(Failure::Counts(reason)) => return Ok(Some(CountsUse::Anew(reason))),
            Err(Failure::Pool(error)) => return Err(error),
        };
        if (count > 0) != is_needed {
            let needs = if is_needed { "need it" } else { "do not need it" };
            let place = places.first().and_then(pack).map(|(id, _)| id.to_string()).unwrap_or_default();
            return Ok(Some(CountsUse::Wrong(format!(
                "chunk {id} of pack {place} has a count of {count}, and the points {needs}"
            ))));
        }
    }
    Ok(None)
}
