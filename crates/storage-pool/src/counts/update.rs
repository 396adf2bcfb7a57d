//! Bringing the counts up to date: what came and went, level by level.
//!
//! Ids of one level are sorted with the sum of their changes and looked up in one ascending pass. A node whose count leaves or
//! reaches zero is read, in order of location, and changes each of its different children by one. Nothing is held that grows
//! with what changes: it goes to files without a name.

use std::sync::Arc;

use crate::chunk::ChunkId;
use crate::error::PoolError;
use crate::format::counts::CountsTail;
use crate::format::node::MAX_LEVELS;
use crate::format::run::{PagesOf, RunWriter, counts_name};
use crate::index::Run;
use crate::mark::{Moment, NODE, Walk, node, of_node};
use crate::pool::Pool;
use crate::sequence::{self, Unpublished};
use crate::sorter::{Sorted, Sorter, distinct};

use super::packs::{Counted, PackFigures, Rows, by_id, contradiction, difference, homes, ids};
use super::store::{CHANGE, Failure, Store, Sums, change, entry, newest, of_change, packs_of, summed};

/// Bytes that are collected before they are written.
const WRITE_BYTES: usize = 1 << 20;
/// Bytes of an entry, its share of the page, and of a pack and a root in the tail: to see whether there is room.
const ENTRY_BYTES: u64 = 23;
const TAIL_BYTES: u64 = 48;

/// What owns a node of which the children are to be counted once more, or once less.
const CAME: u64 = 0;
const WENT: u64 = 1;

impl Pool {
    /// Brings the counts up to date with the points that are needed now, and writes them. If they are damaged, or
    /// `distrusted` for a reason, everything is counted anew.
    pub(crate) fn update_counts(self: &Arc<Self>, distrusted: Option<String>) -> Result<Counted, PoolError> {
        let files = &*self.world.files;
        let mut anew = distrusted;
        let mut store = Store::default();
        if anew.is_none() {
            match Store::open(files, &self.keys) {
                Ok(Some(found)) => store = found,
                Ok(None) => {}
                Err(Failure::Counts(reason)) => anew = Some(reason),
                Err(Failure::Pool(error)) => return Err(error),
            }
        }
        loop {
            match self.try_update(&store) {
                Ok(counted) => return Ok(Counted { anew, ..counted }),
                Err(Failure::Counts(reason)) if !store.is_empty() => {
                    (anew, store) = (Some(reason), Store::default());
                }
                Err(Failure::Counts(reason)) => {
                    return Err(PoolError::Stopped { reason: format!("counting from nothing: {reason}") });
                }
                Err(Failure::Pool(
                    error @ (PoolError::Damaged { .. } | PoolError::TooNew { .. } | PoolError::Io { .. }),
                )) => self.index_mut().heal(error)?,
                Err(Failure::Pool(error)) => return Err(error),
            }
        }
    }

    fn try_update(self: &Arc<Self>, store: &Store) -> Result<Counted, Failure> {
        let moment = self.moment(&[])?;
        let roots = moment.roots();
        let mut touched = ids(self);
        let (fresh, changes) = self.follow(&moment, store, &roots, &mut touched)?;
        let PackFigures { rows, damage, next_order } = self.pack_figures(&moment, store, &fresh, touched)?;
        let packs = by_id(&moment.view, &rows);
        let is_same = changes == 0
            && roots == store.roots
            && packs == store.packs
            && (damage, next_order) == (store.damage, store.next_order);
        let mut new = Store { files: store.files.clone(), roots, packs, damage, next_order };
        // Of a pool without anything there is nothing to be written.
        let is_nothing = store.is_empty() && new.roots.is_empty() && new.packs.is_empty();
        if !is_same && !is_nothing {
            let written = self.write_counts(&moment, &new, &rows, &fresh, changes);
            if let Err(Failure::Pool(error)) = &written {
                self.heed_naming(error);
            }
            new.files = written?;
        }
        Ok(Counted { moment, store: new, rows, anew: None })
    }

    /// What changes from the counted roots to `roots`, and how many chunks that are. Chunks that reach or leave zero are added
    /// to `touched`.
    fn follow(
        self: &Arc<Self>,
        moment: &Moment,
        store: &Store,
        roots: &crate::mark::Roots,
        touched: &mut Sorter<16>,
    ) -> Result<(Sorted<CHANGE>, u64), Failure> {
        let sorter = || Sorter::<CHANGE>::new(&self.world.files, self.room, summed);
        let mut levels: Vec<Sorter<CHANGE>> = (0..MAX_LEVELS).map(|_| sorter()).collect();
        let signed = [(roots, 1i64), (&store.roots, -1)];
        for (roots, sign) in signed {
            for ((level, root), times) in roots {
                let level = levels.get_mut(usize::from(*level)).ok_or_else(|| {
                    Failure::Counts(format!("a root of level {level}, expected less than {MAX_LEVELS}"))
                })?;
                level.push(change(root, sign * i64::from(*times)))?;
            }
        }
        let mut fresh = sorter();
        let mut changes = 0;
        let mut below: Option<Sorter<CHANGE>> = None;
        let walk = Walk::of(self, moment);
        for level in (0..=MAX_LEVELS).rev() {
            // Level 0 are leaves, whose children are blocks: one more step than there are levels.
            let ids = match level {
                0 => below.take().unwrap_or_else(sorter),
                _ => match (levels.pop(), below.take()) {
                    (Some(mut roots), Some(children)) => {
                        let children = children.finish();
                        let mut children = children.read();
                        while let Some(child) = children.next()? {
                            roots.push(child)?;
                        }
                        roots
                    }
                    (Some(roots), None) => roots,
                    (None, _) => break,
                },
            }
            .finish();
            if ids.is_empty() {
                continue;
            }
            let is_nodes = level > 0;
            let mut nodes = Sorter::<NODE>::new(&self.world.files, self.room, distinct);
            changes += step(&walk, moment, store, &ids, &mut fresh, touched, is_nodes.then_some(&mut nodes))?;
            if is_nodes {
                let mut children = sorter();
                self.count_children(&walk, &nodes.finish(), level - 1, &mut children)?;
                below = Some(children);
            }
        }
        Ok((fresh.finish(), changes))
    }

    /// Reads nodes that came or went, and adds what that changes of their children.
    fn count_children(
        &self,
        walk: &Walk<'_>,
        nodes: &Sorted<NODE>,
        level: u8,
        children: &mut Sorter<CHANGE>,
    ) -> Result<(), Failure> {
        let mut nodes = nodes.read();
        while let Some(record) = nodes.next()? {
            let (place, id, owner) = of_node(&record);
            let node = walk.read(place, &id, level).map_err(|reason| match owner {
                // What is needed and cannot be read stops everything; what went was needed when it was counted.
                CAME => Failure::Pool(walk.stopped(&id, reason)),
                _ => Failure::Counts(format!("map node {id}, which is to be taken back: {reason}")),
            })?;
            let mut different: Vec<ChunkId> = node.children.iter().flatten().copied().collect();
            different.sort_unstable();
            different.dedup();
            for child in different {
                children.push(change(&child, if owner == CAME { 1 } else { -1 }))?;
            }
        }
        Ok(())
    }

    /// Writes a file of what changed, taken together with the smaller ones before it. Gives the files that count then.
    fn write_counts(
        &self,
        moment: &Moment,
        new: &Store,
        rows: &Rows,
        fresh: &Sorted<CHANGE>,
        changes: u64,
    ) -> Result<Vec<Arc<Run>>, Failure> {
        // Files grow as digits carry: every entry is written again once for each doubling of their number.
        let (mut kept, mut entries) = (new.files.len(), changes);
        while let Some(last) = kept.checked_sub(1).and_then(|last| new.files.get(last))
            && last.head.ends.entries <= 2 * entries
        {
            entries += last.head.ends.entries;
            kept -= 1;
        }
        let tail = TAIL_BYTES * (new.roots.len() + new.packs.len()) as u64;
        if self.leave_reserve(entries * ENTRY_BYTES + tail).is_err() {
            // Less is written if nothing is taken in; if that is too much as well, there are no counts.
            (kept, entries) = (new.files.len(), changes);
            self.leave_reserve(entries * ENTRY_BYTES + tail)?;
        }
        let (below, merged) = new.files.split_at(kept);
        let tail = CountsTail {
            damage: new.damage,
            next_order: new.next_order,
            roots: new.roots.iter().map(|((level, id), times)| (*level, *id, *times)).collect(),
            packs: difference(&moment.view, rows, &packs_of(below).map_err(counts_error)?),
        };
        let below: Vec<u64> = below.iter().map(|file| file.number()).collect();
        let mut number = newest(&*self.world.files, &self.keys)?;
        loop {
            let name = counts_name(number);
            let exists = || PoolError::Exists { path: self.world.files.display(&name) };
            number = number.checked_add(1).ok_or_else(exists)?;
            match self.write_counts_as(number, merged, fresh, &below, &tail.encode())? {
                Ok(()) => break,
                // Another process was faster, or what stands there is no file of counts.
                Err(Unpublished::Taken) => {}
                Err(failed) => return Err(failed.into_error(name).into()),
            }
        }
        let run = Run::open_counts(&*self.world.files, &self.keys, number)?;
        let mut files = new.files.get(..kept).unwrap_or_default().to_vec();
        files.push(Arc::new(run));
        Ok(files)
    }

    pub(super) fn write_counts_as(
        &self,
        number: u64,
        merged: &[Arc<Run>],
        fresh: &Sorted<CHANGE>,
        below: &[u64],
        tail: &[u8],
    ) -> Result<Result<(), Unpublished>, Failure> {
        let name = counts_name(number);
        let failed = |source| PoolError::io(self.world.files.display(&name), "write", source);
        let mut file = self.world.files.create(&name).map_err(failed)?;
        let generation = self.keys.generation();
        let key = self.keys.counts(generation, number)?;
        let mut writer = RunWriter::new(PagesOf::Counts, key, generation, self.id(), number);
        let mut sums = Sums::of_files(merged, Some(fresh));
        while let Some((id, by)) = sums.next()? {
            // What came and went again needs no entry, unless a file below has something of it: then that is in no sum here.
            if by == 0 {
                continue;
            }
            let fits = entry(id, by).is_some_and(|entry| writer.push(&entry));
            if !fits {
                return Err(Failure::Counts(format!("chunk {id} changes by {by}, expected less than 2^47")));
            }
            if writer.ready() >= WRITE_BYTES {
                writer.take(|bytes| file.append(bytes)).map_err(failed)?;
            }
        }
        let head = self.state().head;
        writer.finish(&[], below, head, tail);
        writer.take(|bytes| file.append(bytes)).map_err(failed)?;
        Ok(sequence::publish_file(&*self.world.files, &name, file))
    }

    /// Of packs of a view, by their positions, the places where something is needed, in order: position, place. A pack whose
    /// table cannot be read is left out.
    pub(crate) fn needed_places(&self, counted: &Counted, packs: &[usize]) -> Result<Sorted<8>, Failure> {
        let (view, state) = (counted.view(), counted.state());
        let mut wanted: Sorter<24> = Sorter::new(&self.world.files, self.room, distinct);
        let mut read = Vec::new();
        for at in packs {
            let Some((id, _)) = view.packs.get(*at) else { continue };
            let Ok(table) = crate::packs::read_table(&*self.world.files, &self.keys, *id) else { continue };
            read.push((*at, 0));
            for chunk in &table.table {
                let mut record = [0; 24];
                record[..16].copy_from_slice(&chunk.id.0);
                record[16..20].copy_from_slice(&(*at as u32).to_be_bytes());
                record[20..].copy_from_slice(&chunk.location.to_be_bytes());
                wanted.push(record)?;
            }
        }
        read.sort_unstable();
        let wanted = wanted.finish();
        let mut wanted = wanted.read();
        let mut used: Sorter<8> = Sorter::new(&self.world.files, self.room, distinct);
        let (mut sums, mut join) = (counted.store.sums(None), view.join());
        let mut last: Option<(ChunkId, Vec<[u8; 8]>)> = None;
        while let Some(record) = wanted.next()? {
            let (mut id, mut place) = ([0; 16], [0; 8]);
            id.copy_from_slice(&record[..16]);
            place.copy_from_slice(&record[16..]);
            let id = ChunkId(id);
            if last.as_ref().is_none_or(|(same, _)| *same != id) {
                let mut needed = Vec::new();
                if sums.of(&id)? > 0 {
                    let mut places = Vec::new();
                    join.find(&id, &mut places, None)?;
                    places.sort_unstable();
                    places.dedup();
                    homes(view, state, &counted.rows, &places, |home| {
                        let mut record = [0; 8];
                        record[..4].copy_from_slice(&home.pack.to_be_bytes());
                        record[4..].copy_from_slice(&home.at.to_be_bytes());
                        needed.push(record);
                    });
                }
                last = Some((id, needed));
            }
            if last.as_ref().is_some_and(|(_, needed)| needed.contains(&place)) {
                let at = u32::from_be_bytes([place[0], place[1], place[2], place[3]]) as usize;
                if let Ok(found) = read.binary_search_by_key(&at, |(at, _)| *at)
                    && let Some((_, found)) = read.get_mut(found)
                {
                    *found += 1;
                }
                used.push(place)?;
            }
        }
        for (at, found) in read {
            if let (Some(row), Some((id, _))) = (counted.rows.get(at), view.packs.get(at))
                && row.used as usize != found
            {
                return Err(contradiction(*id, row.used, found));
            }
        }
        Ok(used.finish())
    }
}

fn counts_error(error: PoolError) -> Failure {
    Failure::Counts(error.to_string())
}

/// Looks the changes of one level up and notes them. Of nodes that reach or leave zero, also where they are read. Gives how
/// many chunks change.
fn step(
    walk: &Walk<'_>,
    moment: &Moment,
    store: &Store,
    ids: &Sorted<CHANGE>,
    fresh: &mut Sorter<CHANGE>,
    touched: &mut Sorter<16>,
    mut nodes: Option<&mut Sorter<NODE>>,
) -> Result<u64, Failure> {
    let mut sums = store.sums(None);
    let mut join = moment.view.join();
    let mut places = Vec::new();
    let mut changes = 0;
    let mut ids = ids.read();
    while let Some(record) = ids.next()? {
        let (id, by) = of_change(&record);
        if by == 0 {
            continue;
        }
        let old = sums.of(&id)?;
        let new = old.saturating_add(by);
        if new < 0 {
            return Err(Failure::Counts(format!("chunk {id} has a count of {old}, and {} go", -by)));
        }
        fresh.push(record)?;
        changes += 1;
        if (old == 0) == (new == 0) {
            continue;
        }
        touched.push(id.0)?;
        let Some(nodes) = nodes.as_deref_mut() else { continue };
        places.clear();
        join.find(&id, &mut places, None)?;
        match walk.place(&places) {
            Some(place) => nodes.push(node(place, &id, if old == 0 { CAME } else { WENT }))?,
            None if old == 0 => return Err(walk.stopped(&id, "it is in no pack").into()),
            None => {
                return Err(Failure::Counts(format!("map node {id} is in no pack and is to be taken back")));
            }
        }
    }
    Ok(changes)
}
