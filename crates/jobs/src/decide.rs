//! What a run reads, and why: decisions as pure functions (INV-22).

use std::collections::BTreeMap;

use model::{BLOCK_BYTES, ByteRange, Cause, RangeSet, RecoveryPointId};

use transfer::message::ReadDisk;

use crate::port::DiskView;

/// What somebody asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// The first replica.
    Protect,
    /// A new point.
    Synchronize {
        /// Change lists by disk.
        lists: BTreeMap<u32, RangeSet>,
        /// The point that the lists are against, if that was stated.
        since: Option<RecoveryPointId>,
        /// Whether everything is to be read whatever lists say.
        full_scan: bool,
    },
    /// Source against replica.
    Check,
}

/// A disk of the replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaDisk {
    /// Bytes.
    pub size: u64,
    /// Where the audit goes on.
    pub rotation: u64,
    /// Bytes whose stored blocks are damaged; `None` if the map itself is lost.
    pub damaged: Option<RangeSet>,
    /// The host's description of it then.
    pub description: String,
}

/// The replica: what the newest usable point of the machine says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// That point.
    pub point: RecoveryPointId,
    /// Its disks by index.
    pub disks: BTreeMap<u32, ReplicaDisk>,
    /// Why no change list may be trusted against it, if so: it is suspect, newer points exist or may have existed.
    pub doubt: Option<String>,
}

/// What is done with one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// Every block.
    Full,
    /// The listed bytes.
    Extents(RangeSet),
    /// What the host's tracker lists since the replica's point; everything if it cannot.
    Tracked {
        /// The host's description of the disk at that point.
        base: String,
    },
}

/// The plan for one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlan {
    /// Which bytes.
    pub read: Read,
    /// Bytes to send although the list calls them unchanged: what the pool has of them is damaged.
    pub heal: RangeSet,
    /// Where the audit begins.
    pub rotation: u64,
    /// Whether the replica's map of this disk can be built upon.
    pub keep_map: bool,
    /// Why.
    pub cause: Cause,
}

/// The plan of a run, and its cause in one chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// By disk.
    pub disks: Vec<DiskPlan>,
    /// For the point and the job.
    pub cause: Cause,
}

/// Why a wish cannot be planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// A list names a disk that the machine does not have.
    NoSuchDisk(u32),
    /// A list names bytes outside its disk.
    OutsideDisk {
        /// The disk.
        disk: u32,
        /// Its bytes.
        size: u64,
        /// The range.
        range: ByteRange,
    },
    /// Synchronise or check without a replica.
    NotProtected,
}

/// Decides what to read.
pub fn plan(wish: &Wish, disks: &[DiskView], replica: Option<&Replica>) -> Result<Plan, Refusal> {
    if let Wish::Synchronize { lists, .. } = wish {
        for (&disk, list) in lists {
            let view = disks.get(disk as usize).ok_or(Refusal::NoSuchDisk(disk))?;
            if let Some(range) = list.iter().find(|range| range.end > view.size) {
                return Err(Refusal::OutsideDisk { disk, size: view.size, range: *range });
            }
        }
    }
    if replica.is_none() && !matches!(wish, Wish::Protect) {
        return Err(Refusal::NotProtected);
    }
    let plans: Vec<DiskPlan> = disks
        .iter()
        .zip(0u32..)
        .map(|(view, index)| plan_disk(wish, index, view, disks.len(), replica))
        .collect();
    let cause = chain(&plans);
    Ok(Plan { disks: plans, cause })
}

fn plan_disk(wish: &Wish, index: u32, view: &DiskView, disks: usize, replica: Option<&Replica>) -> DiskPlan {
    let known = replica.and_then(|replica| replica.disks.get(&index));
    let keep_map = known.is_some_and(|disk| disk.damaged.is_some());
    let rotation = known.map_or(0, |disk| disk.rotation);
    let full = |decision: &str, because: Vec<String>| DiskPlan {
        read: Read::Full,
        heal: RangeSet::new(),
        rotation,
        keep_map,
        cause: Cause { decision: decision.to_owned(), because },
    };
    let (lists, since, full_scan) = match wish {
        Wish::Protect => return full("initial replication", vec!["there is no replica yet".to_owned()]),
        Wish::Check => return full("consistency check", vec!["it was asked for".to_owned()]),
        Wish::Synchronize { lists, since, full_scan } => (lists, since, full_scan),
    };
    let Some((replica, known)) = replica.zip(known) else {
        return full("full scan", vec![format!("disk {index} is new")]);
    };
    let Some(damaged) = &known.damaged else {
        return full("full scan", vec![format!("the replica's map of disk {index} is damaged")]);
    };
    if *full_scan {
        return full("full scan", vec!["it was asked for".to_owned()]);
    }
    let is_resized = known.size != view.size;
    let resized =
        is_resized.then(|| format!("disk {index} has {} bytes, the replica {}", view.size, known.size));
    if !lists.contains_key(&index) && view.tracked {
        // Where disks came or went the host knows better than their places do. A size that changed is not for its list: a map of
        // another size is not built upon in full.
        if let Some(resized) = resized {
            return full("full scan", vec![resized]);
        }
        if let Some(doubt) = &replica.doubt {
            return full("full scan", vec![doubt.clone()]);
        }
        return DiskPlan {
            read: Read::Tracked { base: known.description.clone() },
            heal: damaged.rounded_out(BLOCK_BYTES, view.size),
            rotation,
            keep_map,
            cause: Cause {
                decision: "changed extents".to_owned(),
                because: vec![format!("the host's tracker lists them since point {}", replica.point)],
            },
        };
    }
    if replica.disks.len() != disks {
        // Disks are told apart by their place: where one came or went, the others may have moved.
        let moved = format!("the machine has {disks} disks, the replica {}", replica.disks.len());
        return full("full scan", vec![moved]);
    }
    let Some(list) = lists.get(&index) else {
        return full("full scan", vec![format!("disk {index} has no list of changed extents")]);
    };
    if let Some(resized) = resized {
        return full("full scan", vec![resized]);
    }
    if let Some(since) = since
        && *since != replica.point
    {
        return full(
            "full scan",
            vec![format!("list is against point {since}"), format!("the replica is at {}", replica.point)],
        );
    }
    if let Some(doubt) = &replica.doubt {
        return full("full scan", vec![doubt.clone()]);
    }
    let mut because = match since {
        Some(since) => vec![format!("the list is against point {since}, where the replica is")],
        None => vec![format!(
            "a list was given; which point it is against was not stated, it is taken to be the newest, {}",
            replica.point
        )],
    };
    if !damaged.is_empty() {
        because.push(format!("{} bytes of the replica are damaged and read again", damaged.bytes()));
    }
    DiskPlan {
        read: Read::Extents(list.clone()),
        heal: damaged.rounded_out(BLOCK_BYTES, view.size),
        rotation,
        keep_map,
        cause: Cause { decision: "changed extents".to_owned(), because },
    }
}

/// The plan with what the host said of how it reads the disks that it tracks itself.
pub(crate) fn stated(mut plan: Plan, stated: &[Option<ReadDisk>]) -> Plan {
    for (disk, stated) in plan.disks.iter_mut().zip(stated) {
        let (Read::Tracked { .. }, Some(stated)) = (&disk.read, stated) else { continue };
        let damaged = disk.heal.bytes();
        disk.cause = Cause { decision: "changed extents".to_owned(), because: vec![stated.because.clone()] };
        if stated.full {
            disk.read = Read::Full;
            disk.cause.decision = "full compare".to_owned();
        } else if damaged > 0 {
            disk.cause.because.push(format!("{damaged} bytes of the replica are damaged and read again"));
        }
    }
    plan.cause = chain(&plan.disks);
    plan
}

/// One cause for all disks: the common one, or each disk's.
pub(crate) fn chain(plans: &[DiskPlan]) -> Cause {
    let Some(first) = plans.first() else { return Cause::new("nothing", ["the machine has no disks"]) };
    if plans.iter().all(|plan| plan.cause == first.cause) {
        return first.cause.clone();
    }
    let decision = if plans.iter().all(|plan| plan.cause.decision == first.cause.decision) {
        first.cause.decision.clone()
    } else {
        "full scan of some disks".to_owned()
    };
    let because = plans
        .iter()
        .enumerate()
        .map(|(index, plan)| {
            format!("disk {index}: {} ({})", plan.cause.decision, plan.cause.because.join(", "))
        })
        .collect();
    Cause { decision, because }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn view(size: u64) -> DiskView {
        DiskView { size, sector: 512, description: String::new(), tracked: false }
    }

    fn id(byte: u8) -> RecoveryPointId {
        RecoveryPointId([byte; 16])
    }

    fn replica() -> Replica {
        let disk = ReplicaDisk {
            size: 64 * MIB,
            rotation: 5 * MIB,
            damaged: Some(RangeSet::new()),
            description: "c1".to_owned(),
        };
        Replica { point: id(1), disks: [(0, disk)].into(), doubt: None }
    }

    fn list(ranges: &[(u64, u64)]) -> RangeSet {
        ranges.iter().map(|&(start, end)| ByteRange { start, end }).collect()
    }

    fn wish(since: Option<RecoveryPointId>, full_scan: bool) -> Wish {
        Wish::Synchronize { lists: [(0, list(&[(0, 100)]))].into(), since, full_scan }
    }

    fn decide(wish: &Wish, replica: Option<&Replica>) -> (Read, String) {
        let plan = plan(wish, &[view(64 * MIB)], replica).unwrap_or_else(|refusal| panic!("{refusal:?}"));
        (plan.disks[0].read.clone(), plan.cause.to_string())
    }

    #[test]
    fn a_list_is_used_only_against_its_point() {
        let listed = Read::Extents(list(&[(0, 100)]));
        assert_eq!(decide(&wish(Some(id(1)), false), Some(&replica())).0, listed);
        let (read, cause) = decide(&wish(None, false), Some(&replica()));
        assert_eq!(read, listed);
        assert!(cause.contains("not stated"), "{cause}");
        let (read, cause) = decide(&wish(Some(id(2)), false), Some(&replica()));
        assert_eq!(read, Read::Full);
        assert_eq!(
            cause,
            format!("full scan because: list is against point {}, the replica is at {}", id(2), id(1))
        );
    }

    #[test]
    fn doubt_of_any_kind_means_a_full_scan() {
        let doubtful = Replica { doubt: Some("the newest point was deleted".to_owned()), ..replica() };
        let mut resized = replica();
        resized.disks.get_mut(&0).unwrap_or_else(|| unreachable!()).size = 32 * MIB;
        let mut lost = replica();
        lost.disks.get_mut(&0).unwrap_or_else(|| unreachable!()).damaged = None;
        for replica in [doubtful, resized, lost] {
            assert_eq!(decide(&wish(Some(id(1)), false), Some(&replica)).0, Read::Full);
        }
        assert_eq!(decide(&wish(Some(id(1)), true), Some(&replica())).0, Read::Full);
        let without = Wish::Synchronize { lists: BTreeMap::new(), since: None, full_scan: false };
        assert_eq!(decide(&without, Some(&replica())).0, Read::Full);
        assert_eq!(decide(&Wish::Check, Some(&replica())).0, Read::Full);
        assert_eq!(decide(&Wish::Protect, None).0, Read::Full);
    }

    #[test]
    fn a_host_that_tracks_is_asked_unless_something_is_in_doubt() {
        let tracked = DiskView { tracked: true, ..view(64 * MIB) };
        let wish = Wish::Synchronize { lists: BTreeMap::new(), since: None, full_scan: false };
        let planned = |replica: &Replica, disk: &DiskView| {
            plan(&wish, std::slice::from_ref(disk), Some(replica)).unwrap_or_else(|r| panic!("{r:?}"))
        };
        let asked = planned(&replica(), &tracked);
        assert_eq!(asked.disks[0].read, Read::Tracked { base: "c1".to_owned() });
        let doubtful = Replica { doubt: Some("the newest point was deleted".to_owned()), ..replica() };
        assert_eq!(planned(&doubtful, &tracked).disks[0].read, Read::Full);
        assert_eq!(planned(&replica(), &view(64 * MIB)).disks[0].read, Read::Full);
        let grown = DiskView { tracked: true, ..view(65 * MIB) };
        assert_eq!(planned(&replica(), &grown).disks[0].read, Read::Full);

        let said = |full, because: &str| Some(ReadDisk { size: 64 * MIB, full, because: because.to_owned() });
        let listed = stated(asked.clone(), &[said(false, "dirty blocks since checkpoint c1")]);
        assert_eq!(listed.cause.to_string(), "changed extents because: dirty blocks since checkpoint c1");
        let full = stated(asked, &[said(true, "checkpoint c1 is gone")]);
        assert_eq!(full.cause.to_string(), "full compare because: checkpoint c1 is gone");
        assert_eq!(full.disks[0].read, Read::Full);
    }

    #[test]
    fn damaged_blocks_are_read_again() {
        let mut replica = replica();
        replica.disks.get_mut(&0).unwrap_or_else(|| unreachable!()).damaged = Some(list(&[(MIB, MIB + 1)]));
        let plan =
            plan(&wish(None, false), &[view(64 * MIB)], Some(&replica)).unwrap_or_else(|r| panic!("{r:?}"));
        assert_eq!(plan.disks[0].heal, list(&[(MIB, MIB + BLOCK_BYTES)]));
    }

    #[test]
    fn lists_that_cannot_be_are_refused() {
        let far =
            Wish::Synchronize { lists: [(0, list(&[(0, 65 * MIB)]))].into(), since: None, full_scan: true };
        assert!(matches!(
            plan(&far, &[view(64 * MIB)], Some(&replica())),
            Err(Refusal::OutsideDisk { disk: 0, .. })
        ));
        let other = Wish::Synchronize { lists: [(1, list(&[(0, 1)]))].into(), since: None, full_scan: false };
        assert_eq!(plan(&other, &[view(64 * MIB)], Some(&replica())), Err(Refusal::NoSuchDisk(1)));
        assert_eq!(plan(&Wish::Check, &[view(MIB)], None), Err(Refusal::NotProtected));
    }
}
