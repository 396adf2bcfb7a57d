//! One life: random histories of a pool with power cuts, kills and faults, and the ledger after each.
//!
//! A *crash point* is one accident at one place of a history, with one state of storage after it, against which the
//! ledger was compared: every point listed, opened and read. Counted are accidents that came, not those that were
//! planned behind the end of a round; of a power cut, each of the (at most [`STATES`]) different states compared.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use environment::SeededRandomness;
use environment::simulated::{Failure, Operation, SimulatedFiles, When};
use model::{DatasourceId, RecoveryPointId};
use storage_pool::reclaim::{CountsUse, ReclaimOptions};
use storage_pool::verify::{Depth, VerifyOptions};
use storage_pool::{Access, Damage, Pool, PoolError, Settings};

use super::{CONTENTS, Content, Elsewhere, Known, Open, Order, Rig, is_exact, is_exact_knowing, store};

const DAY: u64 = 86_400;
/// States compared after a power cut, if there are so many; one of them is where life goes on.
const STATES: usize = 3;

/// What the ledger knows of a point.
#[derive(Debug, Clone)]
struct Line {
    content: Content,
    blocks: u64,
    datasource: u8,
    /// Somebody was told that it is there.
    is_acknowledged: bool,
    /// A deletion was asked for, at this many hours of the life: it may be gone when it expired.
    deleted: Option<u64>,
}

/// What happened in a life.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Power cuts, each with one state of storage after it.
    pub power_cuts: u64,
    /// Power cuts while coming back from one, the same.
    pub cuts_coming_back: u64,
    pub kills: u64,
    /// Calls that failed: input and output errors, no space, syncs that threw away.
    pub faults: u64,
    pub points: u64,
    pub freed_packs: u64,
    pub fenced: u64,
}

impl Figures {
    /// As the head of this file says what one is.
    pub fn crash_points(&self) -> u64 {
        self.power_cuts + self.cuts_coming_back + self.kills + self.faults
    }

    fn add(&mut self, other: &Figures) {
        self.power_cuts += other.power_cuts;
        self.cuts_coming_back += other.cuts_coming_back;
        self.kills += other.kills;
        self.faults += other.faults;
        self.points += other.points;
        self.freed_packs += other.freed_packs;
        self.fenced += other.fenced;
    }
}

/// Lives many lives, `threads` at a time: those of the seeds from `first` on, until there were `points` crash points or
/// the time is over. Returns their number and figures. An error says what was wrong and ends with the seed.
pub fn live_many(
    first: u64,
    rounds: u64,
    points: u64,
    until: Instant,
    threads: usize,
) -> Result<(u64, Figures), String> {
    let (next, total) = (AtomicU64::new(0), Mutex::new((0, Figures::default(), None)));
    let locked = || total.lock().unwrap_or_else(PoisonError::into_inner);
    let work = || {
        loop {
            {
                let total = locked();
                if total.2.is_some() || total.1.crash_points() >= points || Instant::now() > until {
                    return;
                }
            }
            let seed = first.wrapping_add(next.fetch_add(1, Ordering::Relaxed));
            let lived = live(seed, rounds);
            let mut total = locked();
            match lived {
                Ok(figures) => {
                    total.0 += 1;
                    total.1.add(&figures);
                }
                Err(wrong) => total.2 = Some((seed, wrong)),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(work);
        }
    });
    let (lived, figures, failed) = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    match failed {
        None => Ok((lived, figures)),
        Some((seed, wrong)) => Err(format!(
            "{wrong}\nreplay: cargo run -p storage-pool --example simulate -- --seed {seed} --lives 1 --rounds {rounds}"
        )),
    }
}

struct Life {
    rig: Rig,
    random: SeededRandomness,
    ledger: BTreeMap<RecoveryPointId, Line>,
    next: u64,
    server: u8,
    /// Hours that pool time can have gone on at most.
    hours: u64,
    /// A sync was made to fail and to lose: until the next power cut what can be seen is not all durable.
    is_volume_suspect: bool,
    /// Such a loss ever happened: records that nobody was told of may be missing.
    is_scarred: bool,
    /// A mark found the reference counts wrong, which no accident may make them.
    contradicted: Option<String>,
    figures: Figures,
    log: Vec<String>,
}

/// Lives a life. An error tells the seed and what was wrong.
pub fn live(seed: u64, rounds: u64) -> Result<Figures, String> {
    let settings = Settings {
        soft_delete: 2 * DAY,
        reclaim_hold: DAY,
        floor_points: 1,
        floor_age: 0,
        breaker_percent: 100,
        zstd_level: 1,
        reserve: Some(1 << 14),
        parity_percent: if seed.is_multiple_of(3) { 5 } else { 0 },
    };
    let mut life = Life {
        rig: Rig::new(seed, settings),
        random: SeededRandomness::new(seed ^ 0x11FE),
        ledger: BTreeMap::new(),
        next: 1,
        server: 1,
        hours: 0,
        is_volume_suspect: false,
        is_scarred: false,
        contradicted: None,
        figures: Figures::default(),
        log: Vec::new(),
    };
    for round in 0..rounds {
        life.round().map_err(|wrong| {
            let log = life.log.join("\n  ");
            format!("seed {seed}, round {round} of {rounds}: {wrong}\n  {log}")
        })?;
    }
    life.rot().map_err(|wrong| format!("seed {seed}, rot after {rounds} rounds: {wrong}"))?;
    Ok(life.figures)
}

impl Life {
    fn below(&self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    fn round(&mut self) -> Result<(), String> {
        self.log.clear();
        // The pool opens with many reads, and writes between many more: half of the accidents come to an operation that
        // changes something, and of the others half early.
        let (now, changes) = (self.rig.files.operations(), self.rig.files.changes());
        let reach = if self.below(2) == 0 { 60 } else { 500 };
        let site = now + 1 + self.below(reach);
        let change = (self.below(2) == 0).then(|| changes + 1 + self.below(60));
        let accident = self.below(10);
        match (accident, change) {
            (0..4, None) => self.rig.files.crash_at(site),
            (0..4, Some(change)) => self.rig.files.crash_at_change(change),
            (4..6, None) => self.rig.files.kill_at(site),
            (4..6, Some(change)) => self.rig.files.kill_at_change(change),
            (6, None) => self.rig.files.fail(When::At(site), Failure::Io),
            (6, Some(change)) => self.rig.files.fail(When::AtChange(change), Failure::Io),
            (7, _) => {
                let failure = [Failure::IoAfter, Failure::NoSpace, Failure::Quota][self.below(3) as usize];
                let when = change.map_or(When::At(site), When::AtChange);
                self.rig.files.fail(when, failure);
            }
            (8, _) => {
                let kind = [Operation::SyncFile, Operation::SyncFolder, Operation::Link, Operation::Append]
                    [self.below(4) as usize];
                self.rig.files.fail(When::Next(kind), Failure::Io);
            }
            _ => {
                let kind = [Operation::SyncFile, Operation::SyncFolder][self.below(2) as usize];
                self.rig.files.fail(When::Next(kind), Failure::SyncDropsData);
                (self.is_volume_suspect, self.is_scarred) = (true, true);
            }
        }
        self.log.push(format!("accident {accident} at {site}, {change:?}"));
        if self.below(12) == 0 {
            self.server = 3 - self.server;
        }
        match self.rig.writer(self.server) {
            Ok(pool) => self.work(&pool)?,
            Err(error) => self.log.push(format!("open: {error}")),
        }
        if let Some(reason) = &self.contradicted {
            return Err(format!("the reference counts are wrong: {reason}"));
        }
        // A power cut compares by itself.
        let mut is_compared = true;
        let has_failed = self.rig.files.planned_failures() == 0;
        self.rig.files.clear_faults();
        if self.rig.files.is_off() {
            self.figures.power_cuts += self.reboot()?;
        } else if accident < 4 {
            // The cut was planned for later: it comes now, or the world goes on.
            if self.below(2) == 0 {
                self.rig.files.cut_power();
                self.figures.power_cuts += self.reboot()?;
            } else {
                self.rig.files.forget_crashes();
                is_compared = false;
            }
        } else {
            is_compared = false;
            if accident < 6 {
                self.rig.files.kill();
                self.rig.files = self.rig.files.second_process();
                self.figures.kills += 1;
            } else if has_failed {
                self.figures.faults += 1;
            }
        }
        if !is_compared {
            self.compare(&self.rig)?;
        }
        // Crashes while coming back (INV-4).
        while self.below(4) == 0 {
            self.rig.files.crash_at(self.rig.files.operations() + 1 + self.below(40));
            drop(self.rig.writer(self.server));
            self.figures.cuts_coming_back += self.reboot()?;
        }
        self.take_note()
    }

    /// Compares the ledger with states in which storage may be after a power cut now, and comes back in one of them.
    /// Returns how many it compared.
    fn reboot(&mut self) -> Result<u64, String> {
        self.rig.files.cut_power();
        self.is_volume_suspect = false;
        let mut states = self.rig.files.crash_states(STATES).states;
        let chosen = states.swap_remove(self.below(states.len() as u64) as usize);
        for (number, state) in states.iter().enumerate() {
            let other = self.rig.on(SimulatedFiles::from_snapshot(self.next, state));
            self.compare(&other)
                .map_err(|wrong| format!("in another state ({number}) after the cut: {wrong}"))?;
        }
        self.rig.files.reboot_into(&chosen);
        self.compare(&self.rig)?;
        Ok(states.len() as u64 + 1)
    }

    fn work(&mut self, pool: &Arc<Pool>) -> Result<(), String> {
        // Jobs that stay open while others are begun and ended, points expire, and reclaims come and go.
        let mut open: Vec<Open> = Vec::new();
        for _ in 0..1 + self.below(9) {
            let result = match self.below(4) {
                0 if open.len() < 3 => self.begin(pool).map(|job| {
                    let said = format!("began {:?}", job.order);
                    open.push(job);
                    said
                }),
                1 if !open.is_empty() => {
                    let at = self.below(open.len() as u64) as usize;
                    if open[at].is_done() {
                        let job = open.swap_remove(at);
                        self.end(job)
                    } else {
                        let gone_on = open[at].go_on();
                        if gone_on.is_err() {
                            // As in the product: a job that failed to store something ends.
                            drop(open.swap_remove(at));
                        }
                        gone_on.map(|()| "a job goes on".to_owned())
                    }
                }
                _ => self.step(pool),
            };
            match result {
                Ok(said) => self.log.push(said),
                Err(error) => {
                    self.log.push(format!("error: {error}"));
                    if self.below(3) > 0 {
                        return Ok(());
                    }
                }
            }
        }
        if self.below(8) == 0 && !self.rig.files.is_off() {
            self.fence(pool)?;
        }
        // What this process believes is what the records say.
        if !self.rig.files.is_off()
            && self.below(4) == 0
            && let Ok(reader) = self.rig.reader()
            && reader.state().head == pool.state().head
            // A read that failed once is known to the one and not to the other.
            && reader.state().unreadable == pool.state().unreadable
            && *reader.state() != *pool.state()
        {
            return Err(format!("state differs:\n{:?}\n{:?}", *pool.state(), *reader.state()));
        }
        Ok(())
    }

    fn order(&mut self, pool: &Pool, may_have_base: bool) -> Order {
        let datasource = 1 + self.below(3) as u8;
        let blocks = [2, 3, 5, 129][self.below(4) as usize];
        let base = if may_have_base && self.below(3) > 0 {
            pool.state()
                .in_order()
                .rev()
                .find(|point| point.datasource == DatasourceId([datasource; 16]) && point.deleted.is_none())
                .map(|point| point.id)
        } else {
            None
        };
        let changes = (0..1 + self.below(4))
            .map(|_| (self.below(blocks), if self.below(5) == 0 { 0 } else { 1 + self.below(CONTENTS) }))
            .collect();
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.next.to_le_bytes());
        self.next += 1;
        Order { id: RecoveryPointId(id), datasource, base, blocks, changes }
    }

    /// The disk that an order makes. The map of a disk of another height begins with zeros.
    fn content(&self, order: &Order) -> Content {
        let height = |blocks: u64| if blocks > 128 { 2 } else { 1 };
        let mut content: Content = order
            .base
            .and_then(|base| self.ledger.get(&base))
            .filter(|line| height(line.blocks) == height(order.blocks))
            .map(|line| line.content.range(..order.blocks).map(|(at, content)| (*at, *content)).collect())
            .unwrap_or_default();
        content.extend(&order.changes);
        content
    }

    fn enter(&mut self, order: &Order) {
        let content = self.content(order);
        let line = Line {
            content,
            blocks: order.blocks,
            datasource: order.datasource,
            is_acknowledged: false,
            deleted: None,
        };
        self.ledger.insert(order.id, line);
    }

    fn put(&mut self, pool: &Arc<Pool>, may_have_base: bool) -> Result<String, PoolError> {
        let order = self.order(pool, may_have_base);
        self.enter(&order);
        store(pool, &order)?;
        if let Some(line) = self.ledger.get_mut(&order.id) {
            line.is_acknowledged = true;
        }
        self.figures.points += 1;
        Ok(format!("stored {order:?}"))
    }

    fn begin(&mut self, pool: &Arc<Pool>) -> Result<Open, PoolError> {
        let order = self.order(pool, true);
        self.enter(&order);
        Open::begin(pool, order)
    }

    fn end(&mut self, job: Open) -> Result<String, PoolError> {
        let order = job.order.clone();
        job.commit()?;
        if let Some(line) = self.ledger.get_mut(&order.id) {
            line.is_acknowledged = true;
        }
        self.figures.points += 1;
        Ok(format!("committed {order:?}"))
    }

    fn pick(&self, pool: &Pool, is_deleted: bool) -> Option<RecoveryPointId> {
        let state = pool.state();
        let ids: Vec<RecoveryPointId> = state
            .in_order()
            .filter(|point| point.deleted.is_some() == is_deleted)
            .map(|point| point.id)
            .collect();
        ids.get(self.below(ids.len() as u64) as usize).copied()
    }

    fn step(&mut self, pool: &Arc<Pool>) -> Result<String, PoolError> {
        match self.below(26) {
            0..7 => self.put(pool, true),
            7..10 => {
                let Some(id) = self.pick(pool, false) else { return Ok("nothing to delete".to_owned()) };
                // Asked for is enough: a crash may leave the record with nobody told.
                let hours = self.hours;
                let was = self.ledger.get_mut(&id).map(|line| {
                    // An earlier tombstone counts, also one that this process could not read.
                    let was = line.deleted;
                    line.deleted.get_or_insert(hours);
                    was
                });
                let result = pool.delete_point(id, "simulated");
                if matches!(result, Err(PoolError::Kept { .. }))
                    && let Some((line, was)) = self.ledger.get_mut(&id).zip(was)
                {
                    line.deleted = was;
                    return Ok(format!("{id} is kept"));
                }
                result.map(|()| format!("deleted {id}"))
            }
            10 => {
                let Some(id) = self.pick(pool, true) else { return Ok("nothing to undelete".to_owned()) };
                match pool.undelete_point(id) {
                    Ok(()) => {
                        if let Some(line) = self.ledger.get_mut(&id) {
                            line.deleted = None;
                        }
                        Ok(format!("undeleted {id}"))
                    }
                    Err(PoolError::Misuse(_)) => Ok(format!("{id} is expired")),
                    Err(error @ PoolError::Stopped { .. }) => Ok(format!("undelete: {error}")),
                    Err(error) => Err(error),
                }
            }
            11..16 => {
                let report = pool.reclaim(ReclaimOptions::default(), &self.rig.deletion());
                match report {
                    Ok(report) => {
                        self.figures.freed_packs += report.freed_packs;
                        if let CountsUse::Wrong(reason) = &report.counts {
                            self.contradicted = Some(reason.clone());
                        }
                        Ok(format!("reclaim {report:?}"))
                    }
                    Err(error @ PoolError::Stopped { .. }) => Ok(format!("reclaim: {error}")),
                    Err(error) => Err(error),
                }
            }
            16 => {
                let every = (self.below(2) == 0).then_some(10 * DAY);
                let options = VerifyOptions { every, ..VerifyOptions::new(Depth::ReadData) };
                let report = pool.verify_with(&options, &mut |_, _| true)?;
                Ok(format!("verified {} packs", report.packs))
            }
            17 => {
                let bytes = self.random.next_u64().to_le_bytes();
                pool.put_document("a", (bytes[0] > 50).then_some(&bytes)).map(|()| "document".to_owned())
            }
            18 => {
                let jump = [100 * 365 * DAY, 30 * DAY, 0][self.below(3) as usize] * 1_000_000;
                self.rig.clock.jump_to(super::NOW + jump);
                self.hours += 72;
                Ok(format!("clock jumps to {jump}"))
            }
            19..21 => {
                let Some(id) = self.pick(pool, false) else { return Ok("nothing to write again".to_owned()) };
                match pool.relay(id, None, 1 << 20) {
                    Ok(relaid) => Ok(format!("wrote again {relaid:?}")),
                    // A node or block that rotted, as far as anybody may tell: nothing is copied unproved.
                    Err(PoolError::ChunkLost { .. }) => Ok(format!("{id} cannot be read whole")),
                    Err(error) => Err(error),
                }
            }
            22 => {
                let mut id = None;
                pool.add_kit(&mut |kit| {
                    id = Some(kit.id);
                    Ok(kit.clone())
                })?;
                // Half of the rotations remove a kit.
                let removed: Vec<_> = id.into_iter().filter(|_| self.below(2) == 0).collect();
                match pool.rotate_keys(&removed) {
                    Ok(generation) => Ok(format!("key generation {generation}, without {removed:?}")),
                    Err(error @ (PoolError::Stopped { .. } | PoolError::Busy { .. })) => {
                        Ok(format!("rotation: {error}"))
                    }
                    Err(error) => Err(error),
                }
            }
            21 => pool.tidy(&self.rig.deletion()).map(|asked| format!("tidied {asked}")),
            _ => {
                let hours = 1 + self.below(72);
                self.rig.clock.advance(Duration::from_secs(hours * 3600));
                self.hours += hours;
                Ok(format!("{hours} hours pass"))
            }
        }
    }

    /// Another server takes the pool over where the lock does not reach; the first one wakes up and goes on (INV-16).
    fn fence(&mut self, stale: &Arc<Pool>) -> Result<(), String> {
        let other = self.rig.files.second_process();
        let world = self.rig.world_of(Arc::new(Elsewhere(other)));
        let server = 3 - self.server;
        let access = Access::Write { server: [server; 16], name: "elsewhere".to_owned() };
        let Ok(new) = Pool::open(world, &self.rig.server, access).map(Arc::new) else { return Ok(()) };
        let taken = new.state().head > stale.state().head;
        if self.below(2) == 0 {
            let _ = self.put(&new, true);
        }
        let head = stale.state().head;
        for _ in 0..2 {
            let said = match self.step(stale) {
                Err(PoolError::Fenced { .. }) => {
                    self.figures.fenced += 1;
                    "fenced".to_owned()
                }
                Err(error) => error.to_string(),
                Ok(said) => said,
            };
            self.log.push(format!("stale writer: {said}"));
        }
        if taken && stale.state().head > head {
            return Err(format!("a fenced writer wrote records {head}..{}", stale.state().head));
        }
        let _ = self.put(&new, true);
        Ok(())
    }

    /// The ledger against what is there, by the recovery kit alone.
    fn compare(&self, rig: &Rig) -> Result<(), String> {
        let pool = rig.reader().map_err(|error| format!("does not open: {error}"))?;
        let state = pool.state().clone();
        if !self.is_scarred && !pool.notes().is_empty() {
            return Err(format!("damage without any: {:?}", pool.notes()));
        }
        let (soft_delete, mut known) = (pool.settings().soft_delete, Known::new());
        for point in state.in_order() {
            let Some(line) = self.ledger.get(&point.id) else {
                return Err(format!("point {} was never stored", point.id));
            };
            if line.deleted.is_none() && point.deleted.is_some() {
                return Err(format!("nobody deleted {}", point.id));
            }
            if state.is_expired(point, soft_delete) {
                if line.deleted.is_none_or(|since| (self.hours - since) * 3600 < soft_delete) {
                    return Err(format!("{} expired too early", point.id));
                }
                continue;
            }
            match is_exact_knowing(&pool, point.id, &line.content, &mut known) {
                Ok(true) => {}
                Ok(false) => return Err(format!("point {} has other bytes", point.id)),
                Err(error) => return Err(format!("point {}: {error}", point.id)),
            }
        }
        let missing: Vec<_> = self
            .ledger
            .iter()
            .filter(|(id, line)| line.is_acknowledged && !state.points.contains_key(*id))
            .map(|(id, _)| *id)
            .collect();
        if missing.is_empty() { Ok(()) } else { Err(format!("acknowledged and gone: {missing:?}")) }
    }

    /// Whoever opens for writing may tell people what is there: from now on it must stay.
    fn take_note(&mut self) -> Result<(), String> {
        if !self.is_volume_suspect && self.below(2) == 0 {
            let pool = self
                .rig
                .writer(self.server)
                .map_err(|error| format!("does not open for writing: {error}"))?;
            let there: BTreeSet<RecoveryPointId> = pool.state().points.keys().copied().collect();
            for (id, line) in &mut self.ledger {
                line.is_acknowledged |= there.contains(id);
                if pool.state().points.get(id).is_none_or(|point| point.deleted.is_none()) {
                    line.deleted = None;
                }
            }
            self.ledger.retain(|id, _| there.contains(id));
            let snapshot = self.rig.files.snapshot();
            if let Some((name, _)) = snapshot.files().find(|(name, _)| name.starts_with("staging")) {
                return Err(format!("{name} is left over"));
            }
        }
        Ok(())
    }

    /// Bits rot in the packs. A full backup after that is exact whatever it shares (INV-9); old points are exact or
    /// say that they are not; after a verify an incremental one is exact or refused.
    fn rot(&mut self) -> Result<(), String> {
        let fail = |error: PoolError| error.to_string();
        let snapshot = self.rig.files.snapshot();
        let packs: Vec<&str> =
            snapshot.files().map(|(name, _)| name).filter(|name| name.starts_with("packs/")).collect();
        for _ in 0..1 + packs.len() / 4 {
            let Some(name) = packs.get(self.below(packs.len() as u64) as usize) else { return Ok(()) };
            let bits = snapshot.get(name).map_or(0, <[u8]>::len) as u64 * 8;
            self.rig.files.flip_bit(name, self.below(bits)).map_err(|error| error.to_string())?;
        }
        let pool = self.rig.writer(self.server).map_err(fail)?;
        let full: Vec<Order> = (0..4).map(|_| self.order(&pool, false)).collect();
        for order in &full {
            self.enter(order);
            store(&pool, order).map_err(|error| format!("a full backup after rot: {error}"))?;
        }
        let mut exact: Vec<RecoveryPointId> = full.iter().map(|order| order.id).collect();
        pool.verify(Depth::ReadData, &mut |_, _| true).map_err(fail)?;
        for _ in 0..4 {
            let order = self.order(&pool, true);
            self.enter(&order);
            if store(&pool, &order).is_ok() {
                exact.push(order.id);
            }
        }
        let report = pool.verify(Depth::ReadData, &mut |_, _| true).map_err(fail)?;
        drop(pool);
        let pool = self.rig.reader().map_err(fail)?;
        let state = pool.state().clone();
        for point in state.in_order() {
            let Some(line) = self.ledger.get(&point.id) else { continue };
            if state.is_expired(point, pool.settings().soft_delete) {
                continue;
            }
            let found = is_exact(&pool, point.id, &line.content);
            let is_told = report.damaged_points.contains(&point.id);
            match found {
                Ok(false) => return Err(format!("point {} has other bytes after rot", point.id)),
                Err(error) if exact.contains(&point.id) => {
                    return Err(format!("new point {} after rot: {error}", point.id));
                }
                Err(error) if !is_told => {
                    return Err(format!("{} is damaged, verify did not say: {error}", point.id));
                }
                Ok(true) if is_told => {
                    let said: Vec<_> = report.damage.iter().filter(|damage| !matches!(damage, Damage::Point { point: other, .. } if *other != point.id)).collect();
                    return Err(format!(
                        "verify says that {} is damaged, and it is exact: {said:#?}",
                        point.id
                    ));
                }
                _ => {}
            }
        }
        let is_named = report.damage.iter().any(|damage| matches!(damage, Damage::File { .. }));
        if is_named || self.is_scarred { Ok(()) } else { Err("verify did not find the rot".to_owned()) }
    }
}
