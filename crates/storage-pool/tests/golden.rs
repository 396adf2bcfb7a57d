//! The golden pools: each is made again byte by byte, each kept one is read by this program, and damage of any is told
//! (INV-7, INV-8). The recipes and their features: `rig/recipes.rs`. An independent reader restores the same files:
//! `crates/stillpoint/tests/oracle`.
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use block_io::BlockDevice;
use environment::simulated::{SimulatedFiles, Snapshot};
use rig::golden::{Golden, unpack};
use rig::recipes::{RECIPES, Recipe, archive};
use rig::rot::look;
use rig::{Known, Rig, is_exact, is_exact_knowing};
use storage_pool::Damage;
use storage_pool::verify::Depth;

fn path(recipe: &Recipe) -> PathBuf {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/golden-v1");
    PathBuf::from(folder).join(format!("{}.tar", recipe.name))
}

fn kept(recipe: &Recipe) -> BTreeMap<String, Vec<u8>> {
    unpack(&std::fs::read(path(recipe)).unwrap())
}

/// What the byte at `at` of a file is, by the tables of the format page.
fn region(name: &str, bytes: &[u8], at: usize) -> String {
    let field = |fields: &[(usize, &str)]| {
        fields.iter().rev().find(|(from, _)| *from <= at).map_or("", |(_, what)| *what).to_owned()
    };
    let end = bytes.len().saturating_sub(at);
    if name.ends_with(".record") {
        return match end {
            0..=32 => "record: hash".to_owned(),
            _ => field(&[
                (0, "record: magic"),
                (8, "record: versions"),
                (12, "record: kind"),
                (14, "record: key generation"),
                (16, "record: pool id"),
                (32, "record: number"),
                (40, "record: epoch"),
                (48, "record: time"),
                (56, "record: hash of the record before"),
                (88, "record: salt"),
                (104, "record: length of the payload"),
                (108, "record: reserved"),
                (112, "record: sealed payload"),
            ]),
        };
    }
    if name.ends_with(".pack") {
        return match end {
            0..=32 => "pack: hash of header, table and trailer".to_owned(),
            33..=64 => "pack: trailer, or the footer of its parity".to_owned(),
            _ => field(&[
                (0, "pack: magic"),
                (8, "pack: versions"),
                (12, "pack: kind"),
                (14, "pack: key generation"),
                (16, "pack: pool id"),
                (32, "pack: domain id"),
                (48, "pack: pack id"),
                (64, "pack: header of the first frame"),
                (80, "pack: short hash of the first frame"),
                (96, "pack: frames, table, parity"),
            ]),
        };
    }
    if name.ends_with(".run") {
        return match end {
            0..=96 => "run: trailer".to_owned(),
            _ => field(&[(0, "run: header"), (64, "run: pages, filters, tail")]),
        };
    }
    if name.ends_with(".key") || name.ends_with(".ring") {
        return "key file or ring: sections 3.1 and 3.4".to_owned();
    }
    if name.ends_with(".counts") {
        return match end {
            0..=96 => "counts: trailer".to_owned(),
            _ => field(&[(0, "counts: header"), (64, "counts: pages, tail")]),
        };
    }
    if name.ends_with(".records") {
        return match end {
            0..=32 => "bundle: hash".to_owned(),
            _ => field(&[(0, "bundle: header"), (48, "bundle: salt"), (72, "bundle: sealed content")]),
        };
    }
    "the page's table of this kind of file".to_owned()
}

/// A change of the format, of keys, of codecs or of the order of operations shows here, and where. `STILLPOINT_BLESS=1`
/// writes the fixtures anew; for a released version that must never be done, a new version gets a new folder.
#[test]
fn golden_pools_are_made_again_byte_by_byte() {
    let is_blessed = std::env::var_os("STILLPOINT_BLESS").is_some();
    let mut wrong = Vec::new();
    for recipe in RECIPES {
        let made = archive(&(recipe.make)());
        if is_blessed {
            std::fs::write(path(recipe), &made).unwrap();
            continue;
        }
        assert!(made.len() < 1 << 20, "{}: {} bytes", recipe.name, made.len());
        let (made, kept) = (unpack(&made), kept(recipe));
        let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        if names(&made) != names(&kept) {
            wrong.push(format!(
                "{}: has the files {:?}, kept were {:?}",
                recipe.name,
                names(&made),
                names(&kept)
            ));
            continue;
        }
        for (name, kept) in &kept {
            let made = &made[name];
            let first = (0..made.len().max(kept.len())).find(|&at| made.get(at) != kept.get(at));
            if let Some(at) = first {
                let (made_byte, kept_byte) = (made.get(at), kept.get(at));
                let region = region(name, kept, at);
                wrong.push(format!(
                    "{}: {name}, byte {at} ({region}) is {made_byte:x?}, kept was {kept_byte:x?}; {} bytes, kept were {}",
                    recipe.name,
                    made.len(),
                    kept.len()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The kept files as a pool, opened with the kept kit.
fn opened(recipe: &Recipe, golden: &Golden) -> Rig {
    let kept = kept(recipe);
    let kit = storage_pool::kit::read(std::str::from_utf8(&kept["recovery-kit.txt"]).unwrap()).unwrap();
    let mut snapshot = Snapshot::default();
    for (name, bytes) in &kept {
        if let Some(name) = name.strip_prefix("pool/") {
            snapshot.insert(name, bytes.clone());
        }
    }
    Rig { kit: kit.recipient, ..golden.rig.on(SimulatedFiles::from_snapshot(1, &snapshot)) }
}

#[test]
fn kept_golden_pools_are_read() {
    for recipe in RECIPES {
        let made = (recipe.make)();
        let golden = &made.golden;
        let rig = opened(recipe, golden);
        let pool = rig.reader().unwrap();
        let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
        let named: Vec<&str> = report
            .damage
            .iter()
            .map(|damage| match damage {
                Damage::File { path, .. } => path.as_str(),
                other => panic!("{}: {other:?}", recipe.name),
            })
            .collect();
        let is_expected = |path: &&str| made.damaged.iter().any(|name| path.ends_with(name.as_str()));
        assert!(named.iter().all(is_expected), "{}: {named:?}", recipe.name);
        for name in &made.damaged {
            assert!(named.iter().any(|path| path.ends_with(name)), "{}: {name} is not named", recipe.name);
        }
        for (id, content) in &golden.points {
            assert_eq!(is_exact(&pool, *id, content), Ok(true), "{}: {id}", recipe.name);
        }
        for (id, index, content) in &made.further {
            let mut found = vec![0; content.len()];
            pool.open_disk(*id, *index).unwrap().read_at(0, &mut found).unwrap();
            assert!(found == *content, "{}: disk {index} of {id}", recipe.name);
        }
        // A writer goes on with it.
        drop(pool);
        let pool = rig.writer(9).unwrap();
        pool.put_document("policy", Some(b"goes on")).unwrap();
    }
}

/// Every so-many-th bit of the packs of the golden pool with parity; `ROT_STEP=1` flips each: it is named, the one sector is
/// rebuilt, and every point is exact.
#[test]
fn flipped_bits_of_packs_with_parity_are_repaired() {
    let made = RECIPES.iter().find(|recipe| recipe.name == "parity").map(|recipe| (recipe.make)()).unwrap();
    let golden = &made.golden;
    let step = rig::number("ROT_STEP").unwrap_or(401);
    let threads = rig::cores() as u64;
    let flipped = rig::rot::at_once(threads, &|thread| {
        let rig = golden.rig.on(SimulatedFiles::from_snapshot(1, &golden.snapshot));
        let mut flipped = 0;
        for (name, bytes) in golden.snapshot.files().filter(|(name, _)| name.ends_with(".pack")) {
            let footer = &bytes[bytes.len() - 64..];
            let content = u64::from_le_bytes(footer[8..16].try_into().unwrap());
            for bit in (thread * step..bytes.len() as u64 * 8).step_by((threads * step) as usize) {
                rig.files.flip_bit(name, bit).unwrap();
                let pool = rig.reader().unwrap();
                let mut known = Known::new();
                for (id, content) in &golden.points {
                    if is_exact_knowing(&pool, *id, content, &mut known) != Ok(true) {
                        return Err(format!("bit {bit} of {name}: {id} is not exact"));
                    }
                }
                let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
                let sectors: u64 = report.repairs.iter().map(|repair| repair.sectors).sum();
                let is_named =
                    |damage: &Damage| matches!(damage, Damage::File { path, .. } if path.ends_with(name));
                if !report.damage.iter().all(is_named)
                    || report.repairs.len() != 1
                    || sectors != u64::from(bit < content * 8)
                    || report.lost_blocks > 0
                {
                    return Err(format!("bit {bit} of {name}: {report:?}"));
                }
                rig.files.flip_bit(name, bit).unwrap();
                flipped += 1;
            }
        }
        Ok(flipped)
    })
    .unwrap();
    println!("\nresult: {flipped} flipped bits of packs with parity");
    assert!(flipped > 1_000, "{flipped}");
}

/// Some hundred bits of each; `ROT_BITS=4000` so many.
#[test]
fn flipped_bits_of_every_golden_pool_are_named() {
    let asked = rig::number("ROT_BITS");
    let bits = asked.unwrap_or(400) as usize;
    let (begin, mut all) = (Instant::now(), 0);
    for recipe in RECIPES {
        let made = (recipe.make)();
        let golden = &made.golden;
        let rig = golden.rig.on(SimulatedFiles::from_snapshot(1, &golden.snapshot));
        let total: usize = golden.snapshot.files().map(|(_, bytes)| bytes.len() * 8).sum();
        let mut number = 0;
        let mut flipped = 0;
        for (name, bytes) in golden.snapshot.files() {
            let named: &[&str] = if made.unread.iter().any(|unread| unread == name) { &[] } else { &[name] };
            for bit in 0..bytes.len() * 8 {
                number += 1;
                // Some bits of every file, and all over each.
                if number % (total / bits).max(1) != 0 && bit != bytes.len() * 3 {
                    continue;
                }
                rig.files.flip_bit(name, bit as u64).unwrap();
                look(&rig, golden, named)
                    .unwrap_or_else(|wrong| panic!("{}: bit {bit} of {name}: {wrong}", recipe.name));
                rig.files.flip_bit(name, bit as u64).unwrap();
                flipped += 1;
            }
        }
        all += flipped;
        assert!(flipped >= bits.min(total), "{}: {flipped}", recipe.name);
        let is_slow = asked.is_none() && begin.elapsed() > Duration::from_secs(120);
        assert!(!is_slow, "{} flips take too long", recipe.name);
    }
    println!("\nresult: {all} flipped bits of golden pools by feature");
}
