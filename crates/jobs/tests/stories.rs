//! Stories of protecting a machine, in an operator's words, each with the ledger at its end.
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]

mod fabric;

use std::sync::Arc;

use environment::simulated::ReadFault;
use fabric::{BLOCK, Fabric, Fault, Lost, Tracker, blocks, content, list, settings};
use jobs::decide::Wish;
use jobs::machine::{StoredDisk, WholeMachine};
use jobs::synchronize::{DOUBT_DOCUMENT, differing_bytes};
use jobs::{Machine, keep};
use model::{
    BLOCK_BYTES, Code, Consistency, DatasourceId, Identity, Network, Place, RangeSet, RecoveryPointId,
    Unfrozen,
};
use storage_pool::Settings;

fn nothing() -> RangeSet {
    RangeSet::new()
}

fn cause(fabric: &Fabric, id: RecoveryPointId) -> String {
    fabric.pool().point(id).unwrap().details().cause.to_string()
}

/// Runs with an empty list and expects that it was not believed, for this reason.
fn not_believed(fabric: &mut Fabric, since: Option<RecoveryPointId>, why: &str) {
    fabric.host.write(0, 3, 900_000);
    let outcome = fabric.listed(&[(0, nothing())], since).unwrap();
    let cause = outcome.point.details().cause.to_string();
    assert!(cause.starts_with("full scan because") && cause.contains(why), "{cause}");
    assert!(outcome.suspects.is_empty());
    fabric.examine();
}

#[test]
fn there_is_no_replica_before_the_first_one_is_proved() {
    let mut fabric = Fabric::seeded(1).disk(12);
    let refused = |fabric: &mut Fabric| {
        let sync = Wish::Synchronize { lists: [].into(), since: None, full_scan: false };
        assert_eq!(fabric.run(&sync).unwrap_err().code, Code::ReplicaNotReady);
        assert_eq!(fabric.run(&Wish::Check).unwrap_err().code, Code::ReplicaNotReady);
        assert_eq!(fabric.pool().state().points.len(), 0);
    };
    refused(&mut fabric);
    fabric.host.plan(Fault::ViewChanged);
    assert_eq!(fabric.run(&Wish::Protect).unwrap_err().code, Code::SourceChanged);
    refused(&mut fabric);
    let first = fabric.protect();
    assert_eq!(first.figures.bytes_transferred, 12 * BLOCK_BYTES);
    fabric.host.write(0, 5, 77);
    fabric.listed(&[(0, list(&[5..6]))], Some(first.point.id)).unwrap();
    fabric.examine();
}

#[test]
fn a_first_replica_that_rots_on_arrival_is_not_one() {
    // The same life twice, so that the names of the packs are known before they are made.
    let mut twin = Fabric::seeded(27).disk(12);
    twin.protect();
    let mut fabric = Fabric::seeded(27).disk(12);
    for name in twin.names("packs/") {
        fabric.files.fail_reads(&name, ReadFault::FlipBit(100 * 8));
    }
    let broken = fabric.run(&Wish::Protect).unwrap_err();
    assert_eq!(broken.code, Code::InitialReplicationBroken, "{}", broken.message);
    assert_eq!(fabric.pool().state().points.len(), 0);
    assert_eq!(fabric.run(&Wish::Check).unwrap_err().code, Code::ReplicaNotReady);
    // What was stored and is bad is not shared by the next try, though its reads go on failing.
    fabric.protect();
    fabric.examine();
}

#[test]
fn a_list_is_used_only_against_its_base() {
    let mut fabric = Fabric::seeded(2).disk(20);
    let first = fabric.protect().point.id;
    fabric.host.write(0, 4, 104);
    let second = fabric.listed(&[(0, list(&[4..5]))], Some(first)).unwrap();
    assert!(
        second.point.details().cause.to_string().starts_with("changed extents"),
        "{}",
        second.point.details().cause
    );
    assert_eq!(second.figures.bytes_transferred, BLOCK_BYTES);
    fabric.host.write(0, 6, 106);
    let third = fabric.listed(&[(0, list(&[6..7]))], None).unwrap();
    assert!(
        third.point.details().cause.to_string().contains("not stated"),
        "{}",
        third.point.details().cause
    );
    not_believed(&mut fabric, Some(first), "list is against point");
    not_believed(&mut fabric, Some(RecoveryPointId([0xEE; 16])), "list is against point");
}

/// A new point by whatever the host's own tracker says: its cause.
fn tracked(fabric: &mut Fabric) -> String {
    let outcome = fabric.listed(&[], None).unwrap();
    fabric.examine();
    outcome.point.details().cause.to_string()
}

#[test]
fn a_host_with_a_tracker_is_asked_what_changed_and_its_doubts_are_the_points() {
    let mut fabric = Fabric::seeded(40).disk(200);
    fabric.host.track(Tracker::Right);
    fabric.protect();
    fabric.host.write(0, 4, 104);
    assert!(tracked(&mut fabric).starts_with("changed extents because: the tracker's list since view 0"));
    fabric.host.write(0, 7, 107);
    let outcome = fabric.listed(&[], None).unwrap();
    assert_eq!((outcome.figures.bytes_listed, outcome.figures.bytes_transferred), (BLOCK_BYTES, BLOCK_BYTES));
    assert!(outcome.point.details().cause.to_string().contains("since view 1"));

    // A run that fails after its view was made: the next one asks for the view of the newest point, not for that one.
    fabric.host.write(0, 9, 109);
    fabric.host.plan(Fault::ViewChanged);
    fabric.listed(&[], None).unwrap_err();
    fabric.host.write(0, 11, 111);
    assert!(tracked(&mut fabric).contains("since view 2"));

    // Lost: everything is compared, and the next run has a base again.
    fabric.host.write(0, 13, 113);
    fabric.host.track(Tracker::Lost);
    assert_eq!(tracked(&mut fabric), "full compare because: the tracker does not know that view");
    fabric.host.track(Tracker::Right);
    fabric.host.write(0, 15, 115);
    assert!(tracked(&mut fabric).starts_with("changed extents"));

    // It lies: an audit finds it, now or later, and no wrong point stays above suspicion.
    fabric.host.track(Tracker::Lying);
    let suspects = (0..40).find_map(|round| {
        (20..180).for_each(|block| fabric.host.write(0, block, 1000 * (round + 1) + block));
        let outcome = fabric.listed(&[], None).unwrap();
        outcome.point.details().cause.to_string().starts_with("full compare because: audit").then_some(())
    });
    assert!(suspects.is_some(), "a tracker that lists nothing was never caught");
    fabric.host.track(Tracker::Right);
    assert!(tracked(&mut fabric).starts_with("changed extents"));
}

#[test]
fn after_the_newest_point_was_deleted_no_list_is_believed_once() {
    let mut fabric = Fabric::seeded(3).disk(20);
    let first = fabric.protect().point.id;
    fabric.host.write(0, 4, 104);
    let second = fabric.listed(&[(0, list(&[4..5]))], Some(first)).unwrap().point.id;
    fabric.pool().delete_point(second, "a mistake").unwrap();
    fabric.ledger.delete(second);
    not_believed(&mut fabric, None, "was deleted");
    let now = fabric.listed(&[(0, nothing())], None).unwrap();
    assert!(
        now.point.details().cause.to_string().starts_with("changed extents"),
        "{}",
        now.point.details().cause
    );
    fabric.pool().undelete_point(second).unwrap();
    fabric.examine();
}

#[test]
fn a_record_that_cannot_be_read_may_be_a_newer_point() {
    let mut fabric = Fabric::seeded(4).disk(20);
    let first = fabric.protect().point.id;
    fabric.host.write(0, 4, 104);
    fabric.listed(&[(0, list(&[4..5]))], Some(first)).unwrap();
    fabric.pool().tick().unwrap();
    let newest = fabric.names("sequence/").into_iter().nth_back(1).unwrap();
    fabric.files.flip_bit(&newest, 3_000).unwrap();
    fabric.reopen();
    let pool = fabric.pool().clone();
    fabric.ledger.roll_back(&pool);
    assert_eq!(pool.state().points.len(), 1);
    not_believed(&mut fabric, None, "cannot be read");
}

#[test]
fn a_pool_that_was_rolled_back_believes_no_list_once() {
    let mut fabric = Fabric::seeded(5).disk(20);
    let first = fabric.protect().point.id;
    let old = fabric.files.snapshot();
    fabric.host.write(0, 4, 104);
    fabric.listed(&[(0, list(&[4..5]))], Some(first)).unwrap();
    for document in ["17", "nobody can read this"] {
        fabric.files.restore(&old);
        fabric.reopen();
        let pool = fabric.pool().clone();
        fabric.ledger.roll_back(&pool);
        let head = pool.state().head;
        let text = if document == "17" { head.to_string() } else { document.to_owned() };
        pool.put_document(DOUBT_DOCUMENT, Some(text.as_bytes())).unwrap();
        not_believed(&mut fabric, None, "found older than it had been");
    }
}

#[test]
fn a_lying_list_is_caught_and_made_good_in_the_same_run() {
    let mut fabric = Fabric::seeded(6).disk(20);
    let first = fabric.protect().point.id;
    fabric.host.write(0, 4, 104);
    let second = fabric.listed(&[(0, list(&[4..5]))], Some(first)).unwrap().point.id;
    let checked = fabric.check().point.id;
    fabric.host.write(0, 5, 105);
    let fourth = fabric.listed(&[(0, list(&[5..6]))], None).unwrap().point.id;
    fabric.host.write(0, 6, 106);
    fabric.host.write(0, 15, 115);
    let outcome = fabric.listed(&[(0, list(&[6..7]))], Some(fourth)).unwrap();
    assert!(
        outcome.point.details().cause.to_string().starts_with("full compare because: audit"),
        "{}",
        outcome.point.details().cause
    );
    assert_eq!(outcome.suspects, [fourth], "points up to the last full compare are above doubt");
    assert_eq!(fabric.alerts.len(), 1);
    assert_eq!(fabric.alerts[0].code, Code::PointNotUsable);
    let suspect = [first, second, checked, fourth, outcome.point.id].map(|id| fabric.is_suspect(id));
    assert_eq!(suspect, [false, false, false, true, false]);
    assert_eq!(outcome.figures.bytes_changed, 2 * BLOCK_BYTES);
    // The full compare is one: the next list is believed, and doubt of the tracker begins anew from here.
    let next = fabric.listed(&[(0, nothing())], Some(outcome.point.id)).unwrap();
    assert!(
        next.point.details().cause.to_string().starts_with("changed extents"),
        "{}",
        next.point.details().cause
    );
    fabric.examine();
}

/// A lie that the audit meets only days later: what was made meanwhile is wrong, and must be said to be.
fn lie_that_stays_hidden(seed: u64) -> (Fabric, [RecoveryPointId; 3]) {
    let mut fabric = Fabric::seeded(seed).disk(384);
    let first = fabric.protect().point.id;
    fabric.host.write(0, 5, 1005);
    fabric.host.write(0, 300, 1300);
    let second = fabric.listed(&[(0, list(&[5..6]))], Some(first)).unwrap();
    assert!(second.suspects.is_empty());
    fabric.host.write(0, 7, 1007);
    let third = fabric.listed(&[(0, list(&[7..8]))], None).unwrap();
    assert!(third.suspects.is_empty());
    let wrong = fabric.ledger.examine(fabric.pool(), Lost::None).unwrap_err();
    assert!(wrong.contains("block 300 is wrong"), "the audit was not to have met it: {wrong}");
    (fabric, [first, second.point.id, third.point.id])
}

#[test]
fn a_lie_found_late_makes_every_point_since_the_last_full_compare_suspect() {
    let (mut fabric, [first, second, third]) = lie_that_stays_hidden(7);
    let outcome = fabric.listed(&[(0, nothing())], Some(third)).unwrap();
    assert_eq!(outcome.suspects, [second, third]);
    assert!(!fabric.is_suspect(first));
    let refused = fabric.recover(&fabric.recovery(second)).unwrap_err();
    assert_eq!(refused.code, Code::PointNotUsable);
    let (right, bytes) = fabric.recover(&fabric.recovery(outcome.point.id)).unwrap();
    assert!(right.verified && bytes[300 * BLOCK..301 * BLOCK] == content(1300));
    fabric.examine();
}

#[test]
fn suspects_are_marked_before_the_right_point_is_committed() {
    let (mut fabric, [first, second, third]) = lie_that_stays_hidden(8);
    let files = fabric.files.clone();
    fabric.on_alert = Some(Arc::new(move || files.cut_power()));
    assert!(fabric.listed(&[(0, nothing())], Some(third)).is_err());
    fabric.on_alert = None;
    fabric.reboot();
    assert_eq!([first, second, third].map(|id| fabric.is_suspect(id)), [false, true, true]);
    assert_eq!(fabric.pool().state().points.len(), 3);
    not_believed(&mut fabric, None, "suspect");
}

#[test]
fn a_suspect_point_whose_record_comes_back_is_suspect_too() {
    let (mut fabric, [_, second, third]) = lie_that_stays_hidden(9);
    let number = fabric.pool().point(second).unwrap().number;
    let copy = fabric.pool().record_bytes(number).unwrap();
    let name = fabric.names("sequence/")[number as usize - 1].clone();
    assert!(fabric.files.snapshot().get(&name).unwrap() == copy);
    fabric.files.flip_bit(&name, 3_000).unwrap();
    fabric.reopen();
    assert!(fabric.pool().point(second).is_err());
    let outcome = fabric.listed(&[(0, nothing())], Some(third)).unwrap();
    assert!(outcome.suspects.contains(&third) && outcome.suspects.contains(&second));
    assert!(fabric.pool().restore_record(number, &copy).unwrap());
    assert!(fabric.is_suspect(second));
    fabric.examine();
}

#[test]
fn damaged_blocks_are_healed_by_a_run_with_a_list() {
    let mut fabric = Fabric::seeded(10).disk(40);
    let first = fabric.protect().point.id;
    // One frame of four blocks.
    let pack = fabric
        .names("packs/")
        .into_iter()
        .max_by_key(|name| fabric.files.snapshot().get(name).unwrap().len());
    fabric.files.flip_bit(&pack.unwrap(), 100_000 * 8).unwrap();
    fabric.reopen();
    assert_eq!(fabric.verify().damaged_points, [first]);
    let outcome = fabric.listed(&[(0, nothing())], Some(first)).unwrap();
    assert!(
        outcome.point.details().cause.to_string().contains("damaged and read again"),
        "{}",
        outcome.point.details().cause
    );
    let moved = outcome.figures.bytes_transferred / BLOCK_BYTES;
    assert!((1..=4).contains(&moved), "{moved} blocks");
    assert!(outcome.suspects.is_empty());
    fabric.reopen();
    fabric.examine();
    assert!(fabric.verify().damaged_points.is_empty(), "the old point is whole again with it");
}

#[test]
fn a_known_damaged_map_means_a_full_scan() {
    let mut fabric = Fabric::seeded(11).disk(40);
    let first = fabric.protect().point.id;
    fabric.rot_packs(|bytes| bytes.len() < 20_000);
    fabric.lost = Lost::Older;
    fabric.reopen();
    assert_eq!(fabric.verify().damaged_points, [first]);
    not_believed(&mut fabric, Some(first), "map of disk 0 is damaged");
}

#[test]
fn a_map_that_rotted_unnoticed_costs_one_run() {
    let mut fabric = Fabric::seeded(12).disk(40);
    let first = fabric.protect().point.id;
    fabric.rot_packs(|bytes| bytes.len() < 20_000);
    fabric.lost = Lost::Older;
    fabric.reopen();
    fabric.host.write(0, 3, 103);
    let failed = fabric.listed(&[(0, list(&[3..4]))], Some(first)).unwrap_err();
    assert_eq!(failed.code, Code::PoolDamaged, "{}", failed.message);
    not_believed(&mut fabric, Some(first), "map of disk 0 is damaged");
}

#[test]
fn a_disk_that_grows_shrinks_comes_or_goes_is_read_in_full() {
    // 127 to 130 blocks: across the height of a map; and a last block that is only partly on the disk.
    for (before, after) in [(127, 129), (129, 127), (130, 128), (20, 21), (21, 20), (1, 200), (200, 1)] {
        for odd in [0, 513] {
            let mut fabric = Fabric::seeded(before * 1000 + after).disk(before);
            let first = fabric.protect().point.id;
            fabric.host.change(|disks| {
                disks[0].resize(after as usize * BLOCK - odd, 0);
                let end = disks[0].len();
                disks[0][end - 1] = 1;
            });
            let outcome = fabric.listed(&[(0, nothing())], Some(first)).unwrap();
            assert!(
                outcome.point.details().cause.to_string().contains("bytes, the replica"),
                "{}",
                outcome.point.details().cause
            );
            let moved = outcome.figures.bytes_transferred / BLOCK_BYTES;
            assert!(moved <= 1, "only the end is new, {moved} blocks moved from {before} to {after}");
            // Back again: what lay behind the end must not come back.
            fabric.host.change(|disks| disks[0].resize(before as usize * BLOCK, 0));
            fabric.check();
            fabric.examine();
        }
    }
}

#[test]
fn where_a_disk_came_or_went_every_disk_is_read_in_full() {
    let mut fabric = Fabric::seeded(14).disk(10);
    let first = fabric.protect().point.id;
    // The new one is the first: the old one has another place now, and an empty list that was right of it.
    fabric.host.change(|disks| disks.insert(0, content(5000).repeat(10)));
    let outcome = fabric.listed(&[(0, nothing()), (1, nothing())], Some(first)).unwrap();
    assert!(outcome.suspects.is_empty());
    assert!(
        outcome.point.details().cause.to_string().starts_with("full scan"),
        "{}",
        outcome.point.details().cause
    );
    fabric.examine();
    fabric.host.change(|disks| disks.remove(0));
    let outcome = fabric.listed(&[(0, nothing())], Some(outcome.point.id)).unwrap();
    assert!(
        outcome.point.details().cause.to_string().contains("the machine has 1 disks"),
        "{}",
        outcome.point.details().cause
    );
    fabric.examine();
}

#[test]
fn one_disk_with_a_list_and_one_without() {
    let mut fabric = Fabric::seeded(15).disk(10).disk(14);
    let first = fabric.protect().point.id;
    fabric.host.write(0, 2, 102);
    fabric.host.write(1, 9, 109);
    let outcome = fabric.listed(&[(0, list(&[2..3]))], Some(first)).unwrap();
    assert_eq!(outcome.figures.bytes_transferred, 2 * BLOCK_BYTES);
    let cause = outcome.point.details().cause.to_string();
    assert!(cause.starts_with("full scan of some disks"), "{cause}");
    let full: Vec<_> = outcome.point.disks.iter().map(|disk| disk.full_compare).collect();
    assert_eq!(full, [Some(first), Some(outcome.point.id)]);
    // A lie about either disk puts that point in doubt: not all of it was compared.
    fabric.host.write(1, 4, 104);
    let lie = fabric.listed(&[(0, nothing()), (1, nothing())], Some(outcome.point.id)).unwrap();
    assert_eq!(lie.suspects, [outcome.point.id]);
    fabric.examine();
}

#[test]
fn trims_and_blocks_of_zeros() {
    let mut fabric = Fabric::seeded(16).disk(140);
    let first = fabric.protect().point.id;
    for block in (10..60).chain(100..140) {
        fabric.host.write(0, block, 0);
    }
    let trimmed = fabric.listed(&[(0, list(&[10..60, 100..140]))], Some(first)).unwrap();
    assert_eq!((trimmed.figures.bytes_transferred, trimmed.figures.bytes_changed), (0, 90 * BLOCK_BYTES));
    // A trim that the list leaves out is a change like any other.
    fabric.host.write(0, 70, 0);
    let lie = fabric.listed(&[(0, nothing())], Some(trimmed.point.id)).unwrap();
    assert_eq!(lie.suspects, [trimmed.point.id]);
    fabric.host.change(|disks| disks[0].fill(0));
    let empty = fabric.check();
    assert!(empty.point.disks[0].root.is_none(), "a disk of zeros costs nothing");
    fabric.examine();
}

#[test]
fn a_fault_at_any_message_leaves_nothing_and_the_next_run_works() {
    let faults: [fn(u64) -> Fault; 4] = [Fault::Cancel, Fault::Dies, Fault::ReadFails, Fault::Cut];
    for (kind, fault) in faults.into_iter().enumerate() {
        for wish in ["protect", "list", "lie", "check"] {
            let mut at = 0;
            loop {
                let mut fabric = Fabric::seeded(17).disk(18);
                let base = (wish != "protect").then(|| fabric.protect().point.id);
                fabric.host.write(0, 5, 105);
                fabric.host.write(0, 12, 112);
                let run = |fabric: &mut Fabric| match wish {
                    "protect" => fabric.run(&Wish::Protect),
                    "check" => fabric.run(&Wish::Check),
                    "lie" => fabric.listed(&[(0, list(&[5..6]))], base),
                    _ => fabric.listed(&[(0, list(&[5..6, 12..13]))], base),
                };
                fabric.host.plan(fault(at));
                let points = fabric.pool().state().points.len();
                let result = run(&mut fabric);
                let passed = result.is_ok();
                if let Err(problem) = result {
                    assert_ne!(kind, 3, "a cut is gone on from: {}", problem.message);
                    assert!(kind != 0 || problem.code == Code::Cancelled, "{}", problem.message);
                    assert_eq!(fabric.pool().state().points.len(), points);
                    assert!(fabric.pool().state().points.values().all(|point| point.suspect.is_none()));
                    fabric.examine();
                    run(&mut fabric).unwrap();
                }
                fabric.examine();
                let messages = fabric.host.messages();
                if at > messages || (kind == 2 && passed) {
                    break;
                }
                // Every message of the first ones, then each third.
                at += if at < 6 { 1 } else { 3 };
            }
        }
    }
}

#[test]
fn a_cancel_after_the_transfer_still_leaves_nothing() {
    let mut fabric = Fabric::seeded(18).disk(18);
    for wish in [Wish::Protect, Wish::Protect, Wish::Check] {
        let points = fabric.pool().state().points.len();
        fabric.host.plan(Fault::CancelAtConclude);
        assert_eq!(fabric.run(&wish).unwrap_err().code, Code::Cancelled);
        assert_eq!(fabric.pool().state().points.len(), points);
        fabric.run(&wish).unwrap();
        fabric.examine();
    }
}

#[test]
fn what_the_host_cannot_stand_for_is_not_committed() {
    let mut fabric = Fabric::seeded(19).disk(18).disk(3);
    fabric.protect();
    let grow: Fault = Fault::Before(Arc::new(|host| host.change(|disks| disks[0].resize(20 * BLOCK, 1))));
    let shrink: Fault = Fault::Before(Arc::new(|host| host.change(|disks| disks[0].truncate(7 * BLOCK))));
    let gone: Fault = Fault::Before(Arc::new(|host| host.change(|disks| drop(disks.pop()))));
    for fault in [Fault::ViewChanged, Fault::OtherView, grow, shrink, gone] {
        let points = fabric.pool().state().points.len();
        fabric.host.plan(fault);
        let problem = fabric.run(&Wish::Check).unwrap_err();
        assert!(matches!(problem.code, Code::SourceChanged | Code::ProtocolBroken), "{}", problem.message);
        assert_eq!(fabric.pool().state().points.len(), points);
        fabric.check();
        fabric.examine();
    }
}

#[test]
fn a_check_moves_and_tells_only_what_differs() {
    let mut fabric = Fabric::seeded(20).disk(100);
    fabric.protect();
    let same = fabric.check();
    assert_eq!((same.figures.bytes_transferred, differing_bytes(&same.differences)), (0, 0));
    for block in [7, 8, 50] {
        fabric.host.write(0, block, 1000 + block);
    }
    fabric.host.write(0, 60, 0);
    // A copy of what is elsewhere on the disk moves as well: only the same place counts as had.
    let outcome = fabric.check();
    assert_eq!(outcome.figures.bytes_transferred, 3 * BLOCK_BYTES);
    assert_eq!(outcome.figures.bytes_read, 99 * BLOCK_BYTES);
    assert_eq!(outcome.differences.ranges, [list(&[7..9, 50..51, 60..61])]);
    assert_eq!(cause(&fabric, outcome.point.id), "consistency check because: it was asked for");
    fabric.examine();
}

#[test]
fn a_recovery_lists_what_is_lost_and_no_more() {
    let mut fabric = Fabric::seeded(21).disk(40);
    let first = fabric.protect().point.id;
    let pack = fabric
        .names("packs/")
        .into_iter()
        .max_by_key(|name| fabric.files.snapshot().get(name).unwrap().len());
    fabric.files.flip_bit(&pack.unwrap(), 100_000 * 8).unwrap();
    fabric.reopen();
    let mut recovery = fabric.recovery(first);
    assert_eq!(fabric.recover(&recovery).unwrap_err().code, Code::PointNotUsable);
    recovery.accept_damage = true;
    let (done, bytes) = fabric.recover(&recovery).unwrap();
    let truth: Vec<u8> = (1..=40).flat_map(content).collect();
    let wrong: RangeSet = (0..40u64)
        .filter(|&block| {
            let at = block as usize * BLOCK;
            bytes[at..at + BLOCK] != truth[at..at + BLOCK]
        })
        .map(|block| blocks(block..block + 1))
        .collect();
    assert!(!wrong.is_empty());
    assert_eq!(done.lost, wrong);
    for range in done.lost.iter() {
        assert!(bytes[range.start as usize..range.end as usize].iter().all(|&byte| byte == 0));
    }
    recovery.min_consistency = Some(Consistency::Offline);
    fabric.recover(&recovery).unwrap();
    recovery.point.consistency = Consistency::Crash;
    let problem = fabric.recover(&recovery).unwrap_err();
    assert!(problem.message.contains("asked for was at least offline"), "{}", problem.message);
}

#[test]
fn a_prune_says_why_and_the_floor_holds() {
    let floor = Settings { floor_points: 2, ..settings() };
    let mut fabric = Fabric::with(22, floor).disk(6);
    let mut points = vec![fabric.protect().point.id];
    for block in 0..4 {
        fabric.host.write(0, block, 200 + block);
        points.push(fabric.check().point.id);
    }
    let why = |plan: &keep::PrunePlan, id: RecoveryPointId| {
        plan.kept.iter().chain(&plan.removed).find(|marked| marked.point.id == id).unwrap().why.clone()
    };
    let all = keep::plan_prune(fabric.pool(), None, None).unwrap();
    assert!(all.removed.is_empty() && all.kept.len() == 5);
    let plan = keep::plan_prune(fabric.pool(), Some(fabric.machine.id), Some(1)).unwrap();
    let ids = |marked: &[keep::Marked]| marked.iter().map(|marked| marked.point.id).collect::<Vec<_>>();
    assert_eq!(ids(&plan.removed), points[..3]);
    assert!(why(&plan, points[4]).contains("one of the last 1 good"), "{}", why(&plan, points[4]));
    assert!(why(&plan, points[3]).starts_with("retention floor"), "{}", why(&plan, points[3]));
    // Whatever is asked for, the pool itself refuses.
    assert!(fabric.pool().delete_point(points[3], "asked").is_err());
    // Suspect points do not count: the last good ones stay.
    fabric.pool().mark_suspect(&points[3..], "a test").unwrap();
    let plan = keep::plan_prune(fabric.pool(), None, Some(1)).unwrap();
    assert_eq!(ids(&plan.removed), points[..1]);
    assert!(why(&plan, points[4]).contains("no newer good point"), "{}", why(&plan, points[4]));
    assert_eq!(keep::prune(fabric.pool(), &plan).unwrap(), points[..1]);
    fabric.ledger.delete(points[0]);
    fabric.examine();
}

#[test]
fn a_prune_never_trades_whole_points_for_damaged_ones() {
    let mut fabric = Fabric::seeded(23).disk(6);
    let whole = fabric.protect().point.id;
    let before: Vec<String> = fabric.names("packs/");
    fabric.host.write(0, 1, 201);
    let second = fabric.check().point.id;
    for name in fabric.names("packs/").iter().filter(|name| !before.contains(name)) {
        fabric.files.flip_bit(name, 100 * 8).unwrap();
    }
    fabric.reopen();
    assert_eq!(fabric.verify().damaged_points, [second]);
    let plan = keep::plan_prune(fabric.pool(), None, Some(1)).unwrap();
    assert!(plan.removed.is_empty(), "{:?}", plan.removed);
    assert!(plan.kept.iter().any(|marked| marked.point.id == whole && marked.why.contains("last 1 good")));
}

#[test]
fn a_point_made_beside_a_run_ends_the_run() {
    let mut fabric = Fabric::seeded(24).disk(12);
    let first = fabric.protect().point.id;
    let pool = fabric.pool().clone();
    let doubt = pool.clone();
    fabric.host.plan(Fault::After(Arc::new(move || doubt.mark_suspect(&[first], "meanwhile").unwrap())));
    assert_eq!(fabric.listed(&[(0, nothing())], Some(first)).unwrap_err().code, Code::SourceBusy);
    assert_eq!(pool.state().points.len(), 1);
    // Another machine's points are nobody's business here.
    let other = Machine { id: DatasourceId([8; 16]), name: "db".to_owned(), ..fabric.machine.clone() };
    fabric.run_as(&other, &Wish::Protect).unwrap();
    fabric.check();
    fabric.examine();
}

#[test]
fn a_base_that_is_deleted_beside_a_run_does_no_harm() {
    let mut fabric = Fabric::seeded(25).disk(12);
    let first = fabric.protect().point.id;
    fabric.host.write(0, 2, 102);
    let pool = fabric.pool().clone();
    fabric.host.plan(Fault::After(Arc::new(move || pool.delete_point(first, "beside").unwrap())));
    let second = fabric.listed(&[(0, list(&[2..3]))], Some(first)).unwrap();
    fabric.ledger.delete(first);
    assert_eq!(second.point.base, Some(first));
    fabric.clock.advance(std::time::Duration::from_secs(15 * 86_400));
    for _ in 0..8 {
        fabric.clock.advance(std::time::Duration::from_secs(2 * 86_400));
        fabric.reclaim().unwrap();
    }
    fabric.reopen();
    fabric.examine();
}

/// INV-11: no run waits for a reclaim, no reclaim is refused beside a run, and the run's point is whole.
#[test]
fn a_reclaim_goes_beside_a_run() {
    let mut fabric = Fabric::seeded(26).disk(12);
    fabric.protect();
    let pool = fabric.pool().clone();
    let report = Arc::new(std::sync::Mutex::new(None));
    let seen = report.clone();
    struct Nobody;
    impl storage_pool::reclaim::DeletionService for Nobody {
        fn carry_out(&self, _: Option<u64>, _: &[u64]) -> Result<(), storage_pool::PoolError> {
            unreachable!("nothing is due")
        }
    }
    fabric.host.plan(Fault::After(Arc::new(move || {
        *seen.lock().unwrap() = Some(pool.reclaim(Default::default(), &Nobody));
    })));
    fabric.check();
    let report = report.lock().unwrap().take().unwrap().unwrap();
    assert_eq!((report.quarantined_bytes, report.freed_bytes), (0, 0), "{report:?}");
    fabric.reclaim().unwrap();
    fabric.examine();
}

#[test]
fn a_pack_of_which_nobody_knows_what_it_holds_is_never_reclaimed() {
    let mut fabric = Fabric::seeded(28).disk(40);
    let first = fabric.protect().point.id;
    fabric.host.write(0, 5, 105);
    fabric.listed(&[(0, list(&[5..6]))], Some(first)).unwrap();
    fabric.reopen();
    // The index cannot be read, nor the table of the pack that holds nearly everything. Its frames can.
    let snapshot = fabric.files.snapshot();
    let packs = fabric.names("packs/");
    let largest = packs.iter().max_by_key(|name| snapshot.get(name).unwrap().len()).unwrap();
    let length = snapshot.get(largest).unwrap().len() as u64;
    fabric.files.fail_reads(largest, ReadFault::FlipBit((length - 80) * 8));
    for run in fabric.names("index/") {
        fabric.files.fail_reads(&run, ReadFault::Io);
    }
    for _ in 0..3 {
        fabric.clock.advance(std::time::Duration::from_secs(86_400));
        let _ = fabric.reclaim();
    }
    assert!(fabric.names("packs/").contains(largest), "the pack was unlinked");
    // A run heals what cannot be had, and commits nothing that it does not have.
    let healed = fabric.listed(&[(0, nothing())], None).unwrap();
    assert!(healed.figures.bytes_transferred > 0);
    fabric.lost = Lost::Older;
    fabric.examine();
    fabric.files.clear_faults();
    fabric.lost = Lost::None;
    fabric.reopen();
    fabric.examine();
}

#[test]
fn a_machine_is_made_of_a_points_disks_and_definition_or_everything_is_as_it_was() {
    let mut fabric = Fabric::seeded(41).disk(12).disk(6);
    fabric.host.configure("{}");
    let first = fabric.protect().point;
    assert_eq!(first.disks.len(), 3, "two disks and the configuration");
    assert_eq!(first.machine_disks().count(), 2);
    fabric.host.write(0, 5, 77);
    let list = [(0, list(&[5..6])), (1, nothing())];
    let second = fabric.listed(&list, Some(first.id)).unwrap().point;
    // What did not change is stored once.
    assert_eq!(first.configuration().unwrap().root, second.configuration().unwrap().root);
    fabric.examine();

    let whole = |point: &storage_pool::state::Point, place: Place| WholeMachine {
        point: point.clone(),
        place,
        name: None,
        identity: Identity::Keep,
        network: Network::Keep,
        start: false,
        min_consistency: None,
        pace: None,
        compress: None,
    };
    let elsewhere = Place::Elsewhere { folder: None, format: None };
    let original = Place::Original { stop: None };
    let recovered = fabric.recover_machine(&whole(&first, elsewhere.clone())).unwrap();
    assert_eq!(recovered.files, ["/disks/0", "/disks/1"]);
    assert_eq!(fabric.host.steps(), ["prepare {} [(12, 1), (6, 0)]", "complete"]);
    let (one, many) = (StoredDisk::of(&first, 0), StoredDisk::of(&second, 0));
    let differing = jobs::machine::differing(fabric.pool(), one, many).unwrap();
    assert_eq!(differing, [blocks(5..6)].into_iter().collect());

    // A part of a large disk is worth keeping where nothing is in its way; beside an original nothing stays.
    fabric.host.refuse_completion(true);
    for (place, last) in [(elsewhere.clone(), "complete"), (original.clone(), "abandon")] {
        assert_eq!(fabric.recover_machine(&whole(&first, place)).unwrap_err().code, Code::TargetWrite);
        assert_eq!(fabric.host.steps().last().unwrap(), last);
    }
    fabric.host.refuse_completion(false);
    // An agent that restarts has lost what it was asked, and may have done it.
    fabric.host.lose_an_answer();
    fabric.recover_machine(&whole(&first, original.clone())).unwrap();
    let steps = fabric.host.steps();
    assert!(steps.ends_with(&["complete".to_owned(), "complete".to_owned()]), "{steps:?}");
    let asked = WholeMachine { min_consistency: Some(Consistency::Application), ..whole(&first, original) };
    let level = first.consistency;
    assert_eq!(fabric.recover_machine(&asked).is_err(), level < Consistency::Application);

    // A point of a host that keeps no definition has disks, and no machine.
    fabric.host.configure("");
    let bare = fabric.check().point;
    assert_eq!(bare.configuration(), None);
    let told = fabric.recover_machine(&whole(&bare, elsewhere)).unwrap_err();
    assert!(told.message.contains("definition") && told.hint.contains("recover disk"));
    fabric.examine();
}

/// S24: two more attempts, then what was chosen.
#[test]
fn a_machine_that_cannot_be_frozen_is_tried_again_twice_and_then_what_was_chosen_counts() {
    let mut fabric = Fabric::seeded(42).disk(4);
    fabric.protect();
    fabric.host.stay_thawed();
    fabric.machine.unfrozen = Unfrozen::Fail;
    let sync = Wish::Synchronize { lists: [].into(), since: None, full_scan: false };
    assert_eq!(fabric.run(&sync).unwrap_err().code, Code::NotFrozen);
    let waits = |fabric: &Fabric| fabric.lines.iter().filter(|line| *line == "waits 300 s").count();
    assert_eq!(waits(&fabric), 2, "{:?}", fabric.lines);
    fabric.machine.unfrozen = Unfrozen::Crash;
    fabric.run(&sync).unwrap();
    assert_eq!(waits(&fabric), 2, "{:?}", fabric.lines);
    assert!(fabric.lines.iter().any(|line| line.contains("1 attempts are left")), "{:?}", fabric.lines);
    fabric.examine();
}
