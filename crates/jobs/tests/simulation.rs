//! Random lives of a protected machine: whatever goes wrong, a point that is there and not suspect is right.
//!
//! `cargo test -p jobs --test simulation` lives a slice of lives; `STILLPOINT_SEED=17` one of them, and
//! `STILLPOINT_LIVES=5000` more, from `STILLPOINT_FIRST_SEED` on. A failing life tells its seed and its steps.
#![allow(clippy::unwrap_used)]

mod fabric;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use environment::simulated::{Failure, When};
use fabric::{BLOCK, Fabric, Fault, Lost, Tracker, blocks, settings};
use jobs::decide::Wish;
use jobs::keep;
use model::{Code, RangeSet, RecoveryPointId};
use storage_pool::Settings;

const DAY: u64 = 86_400;

struct Life {
    fabric: Fabric,
    /// What changed since the newest point that somebody was told of, as a right tracker knows it.
    changed: BTreeMap<u32, RangeSet>,
    newest: Option<RecoveryPointId>,
    content: u64,
    steps: Vec<String>,
    /// A lying list was used in this life.
    lied: bool,
    figures: Figures,
}

#[derive(Default, Debug)]
struct Figures {
    points: u64,
    listed: u64,
    refused: u64,
    caught: u64,
    reboots: u64,
}

impl Life {
    fn below(&self, bound: u64) -> u64 {
        self.fabric.random.below(bound)
    }

    fn sizes(&self) -> Vec<usize> {
        self.fabric.host.change(|disks| disks.iter().map(Vec::len).collect())
    }

    fn write(&mut self) {
        for _ in 0..1 + self.below(6) {
            let sizes = self.sizes();
            let disk = self.below(sizes.len() as u64) as usize;
            let block = self.below((sizes[disk].div_ceil(BLOCK)) as u64);
            let number = match self.below(4) {
                0 => 0,
                // Content that is elsewhere already.
                1 => 1 + self.below(8),
                _ => {
                    self.content += 1;
                    self.content
                }
            };
            self.fabric.host.write(disk, block, number);
            let end = blocks(block..block + 1).end.min(sizes[disk] as u64);
            let range = model::ByteRange { start: blocks(block..block + 1).start, end };
            let known = self.changed.entry(disk as u32).or_default();
            *known = known.union(&RangeSet::from_ranges(vec![range]));
        }
    }

    fn reshape(&mut self) {
        let sizes = self.sizes();
        let what = self.below(4);
        let size = (1 + self.below(24)) as usize * BLOCK - self.below(2) as usize * 512;
        self.steps.push(format!("reshape {what} to {size}"));
        match what {
            0 if sizes.len() < 3 => self.fabric.host.add_disk(vec![0; size]),
            1 if sizes.len() > 1 => {
                let gone = self.below(sizes.len() as u64) as usize;
                self.fabric.host.change(|disks| drop(disks.remove(gone)));
                // Who tracks changes tracks them by place, and is as surprised as anybody.
                self.changed.clear();
            }
            _ => {
                let disk = self.below(sizes.len() as u64) as usize;
                self.fabric.host.change(|disks| disks[disk].resize(size, 0));
                self.resized(disk);
            }
        }
    }

    /// Who tracks changes loses track of a disk that gets another size: then the size tells. Of one that gets the size of a point
    /// again it must say that all may have changed, or it lies.
    fn resized(&mut self, disk: usize) {
        let size = self.sizes()[disk] as u64;
        let state = self.fabric.pool().state();
        let is_known = state
            .points
            .values()
            .flat_map(|point| &point.disks)
            .any(|known| known.index as usize == disk && known.size == size);
        drop(state);
        if is_known {
            let all = RangeSet::from_ranges(vec![model::ByteRange { start: 0, end: size }]);
            self.changed.insert(disk as u32, all);
        } else {
            self.changed.remove(&(disk as u32));
        }
    }

    fn lists(&mut self) -> Wish {
        let sizes = self.sizes();
        let mut lists = BTreeMap::new();
        for disk in 0..sizes.len() as u32 {
            if self.below(6) == 0 {
                continue;
            }
            lists.insert(disk, self.changed.get(&disk).cloned().unwrap_or_default());
        }
        if self.below(5) == 0
            && let Some(list) = lists.values_mut().find(|list| !list.is_empty())
        {
            self.steps.push("a lie".to_owned());
            self.lied = true;
            *list = RangeSet::from_ranges(list.as_slice()[1..].to_vec());
        }
        let since = self.newest.filter(|_| self.below(2) == 0);
        Wish::Synchronize { lists, since, full_scan: self.below(12) == 0 }
    }

    fn job(&mut self) -> Result<(), String> {
        let tracker = match self.below(4) {
            0 | 1 => Tracker::None,
            2 => Tracker::Right,
            _ => Tracker::Lost,
        };
        self.fabric.host.track(tracker);
        self.steps.push(format!("tracker: {tracker:?}"));
        let wish = match self.below(10) {
            0 => Wish::Check,
            _ if self.fabric.pool().state().points.values().all(|point| point.deleted.is_some()) => {
                Wish::Protect
            }
            _ => self.lists(),
        };
        let at = self.below(14);
        let fault = match self.below(16) {
            0 => Some(Fault::Cut(at)),
            1 => Some(Fault::CutEvery(2 + at)),
            2 => Some(Fault::Cancel(at)),
            3 => Some(Fault::Dies(at)),
            4 => Some(Fault::ReadFails(at / 2)),
            5 => Some(Fault::ViewChanged),
            6 => Some(Fault::OtherView),
            7 => Some(Fault::CancelAtConclude),
            8 => Some(Fault::Before(std::sync::Arc::new(|host| {
                host.change(|disks| disks[0].resize(3 * BLOCK, 9));
            }))),
            _ => None,
        };
        if self.below(5) == 0 {
            let site = self.fabric.files.operations() + 1 + self.below(120);
            match self.below(4) {
                0 => self.fabric.files.fail(When::At(site), Failure::Io),
                1 => self.fabric.files.fail(When::At(site), Failure::NoSpace),
                _ => self.fabric.files.crash_at(site),
            }
            self.steps.push(format!("storage fails at {site}"));
        }
        let told = match &wish {
            Wish::Synchronize { lists, since, full_scan } => {
                format!("lists of {:?}, since {}, full {full_scan}", lists.keys(), since.is_some())
            }
            other => format!("{other:?}"),
        };
        let is_before = matches!(fault, Some(Fault::Before(_)));
        if let Some(fault) = fault {
            self.fabric.host.plan(fault);
        }
        let result = self.fabric.run(&wish);
        self.fabric.host.forget_plan();
        if is_before {
            self.resized(0);
        }
        self.steps.push(match &result {
            Ok(outcome) => format!("{told}: {} {}", outcome.point.id, outcome.point.details().cause),
            Err(problem) => format!("{told}: {:?} {}", problem.code, problem.message),
        });
        match result {
            Ok(outcome) => {
                self.figures.points += 1;
                self.figures.listed += u64::from(outcome.point.details().cause.decision == "changed extents");
                self.figures.caught += u64::from(outcome.point.details().cause.decision == "full compare");
                if !outcome.suspects.is_empty() && !self.lied {
                    return Err("points are suspect and nobody lied".to_owned());
                }
                self.newest = Some(outcome.point.id);
                self.changed.clear();
            }
            Err(problem) => {
                self.figures.refused += 1;
                if problem.code == Code::Internal {
                    return Err(format!("an error of our own: {}", problem.message));
                }
            }
        }
        self.fabric.files.clear_faults();
        self.settle();
        Ok(())
    }

    /// After trouble with storage the pool is opened again, as the operator is told to.
    fn settle(&mut self) {
        // A cut that was planned and not reached.
        self.fabric.files.crash_at(u64::MAX);
        if self.fabric.files.is_off() {
            self.figures.reboots += 1;
            self.fabric.reboot();
        } else if self.fabric.pool().tick().is_err() {
            self.fabric.reopen();
        }
    }

    fn keep(&mut self) -> Result<(), String> {
        let plan = keep::plan_prune(self.fabric.pool(), None, Some(1 + self.below(3) as u32)).unwrap();
        for id in keep::prune(self.fabric.pool(), &plan).map_err(|problem| problem.message)? {
            self.fabric.ledger.delete(id);
        }
        if self.below(3) == 0 {
            let state = self.fabric.pool().state().clone();
            let newest = state.in_order().next_back().map(|point| point.id);
            if let Some(id) = newest
                && self.fabric.pool().delete_point(id, "a mistake").is_ok()
            {
                self.fabric.ledger.delete(id);
                self.steps.push(format!("deleted the newest, {id}"));
            }
        }
        self.fabric.clock.advance(Duration::from_secs((1 + self.below(2)) * DAY));
        self.steps.push(format!("keep, {} removed", plan.removed.len()));
        match self.fabric.reclaim() {
            Ok(_) | Err(storage_pool::PoolError::Stopped { .. }) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn rot(&mut self) {
        let packs = self.fabric.names("packs/");
        if packs.is_empty() {
            return;
        }
        let name = &packs[self.below(packs.len() as u64) as usize];
        let length = self.fabric.files.snapshot().get(name).unwrap().len() as u64;
        let bit = self.below(length * 8);
        self.fabric.files.flip_bit(name, bit).unwrap();
        self.fabric.lost = Lost::Older;
        self.fabric.reopen();
        let found = self.fabric.verify();
        self.steps.push(format!("rot in {name}, {} points damaged", found.damaged_points.len()));
    }

    fn step(&mut self) -> Result<(), String> {
        match self.below(20) {
            0 => self.reshape(),
            1 | 2 => self.keep()?,
            // What rots is looked at after the next point was made, which must be whole.
            3 => {
                self.rot();
                let lost = std::mem::replace(&mut self.fabric.lost, Lost::Any);
                self.examine()?;
                self.fabric.lost = lost;
                if self.fabric.run(&Wish::Check).is_ok_and(|outcome| {
                    self.newest = Some(outcome.point.id);
                    self.changed.clear();
                    true
                }) {
                    self.steps.push("checked after rot".to_owned());
                } else if self
                    .newest
                    .is_some_and(|id| self.fabric.pool().point(id).unwrap().deleted.is_none())
                {
                    return Err("no point can be made after rot".to_owned());
                } else {
                    self.fabric.run(&Wish::Protect).map_err(|problem| problem.message)?;
                    let state = self.fabric.pool().state().clone();
                    self.newest = state.in_order().next_back().map(|point| point.id);
                    self.changed.clear();
                }
            }
            4 => self.fabric.reopen(),
            _ => {
                self.write();
                self.job()?;
            }
        }
        self.examine()
    }

    fn examine(&self) -> Result<(), String> {
        self.fabric.ledger.examine(self.fabric.pool(), self.fabric.lost)?;
        let state = self.fabric.pool().state();
        let suspect = state.points.values().any(|point| point.suspect.is_some());
        if suspect && !self.lied { Err("a point is suspect and nobody lied".to_owned()) } else { Ok(()) }
    }
}

fn live(seed: u64, steps: u64) -> Result<Figures, String> {
    let settings = Settings { soft_delete: 2 * DAY, floor_points: seed as u32 % 3, ..settings() };
    let mut life = Life {
        fabric: Fabric::with(seed, settings).disk(1 + seed % 20),
        changed: BTreeMap::new(),
        newest: None,
        content: 1000,
        steps: Vec::new(),
        lied: false,
        figures: Figures::default(),
    };
    for step in 0..steps {
        life.step()
            .map_err(|wrong| format!("seed {seed}, step {step}: {wrong}\n  {}", life.steps.join("\n  ")))?;
    }
    Ok(life.figures)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn whatever_happens_a_point_that_is_not_suspect_is_right() {
    if let Some(seed) = number("STILLPOINT_SEED") {
        live(seed, 60).unwrap_or_else(|wrong| panic!("{wrong}"));
        return;
    }
    let asked = number("STILLPOINT_LIVES");
    let until = Instant::now() + Duration::from_secs(10);
    let (mut total, mut lives) = (Figures::default(), 0);
    let first = number("STILLPOINT_FIRST_SEED").unwrap_or(0);
    for seed in first..first + asked.unwrap_or(400) {
        if asked.is_none() && Instant::now() > until {
            break;
        }
        let figures = live(seed, 60).unwrap_or_else(|wrong| panic!("{wrong}"));
        lives += 1;
        total.points += figures.points;
        total.listed += figures.listed;
        total.refused += figures.refused;
        total.caught += figures.caught;
        total.reboots += figures.reboots;
    }
    println!("{lives} lives: {total:?}");
    println!("\nresult: {lives} lives, {} points, {} lists caught", total.points, total.caught);
    // A simulation in which nothing happens proves nothing.
    assert!(total.points > 20 && total.listed > 5 && total.refused > 5 && total.caught > 0, "{total:?}");
}
