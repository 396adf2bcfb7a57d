#![allow(clippy::unwrap_used)]

use environment::simulated::SimulatedFiles;
use model::PoolId;

use super::*;
use crate::chunk::ChunkKind;
use crate::format::pack::{PackHeader, TableEntry};
use crate::keys::Secret;

fn keys() -> Keys {
    Keys::new(PoolId([7; 16]), Secret::from_bytes([1; 32]))
}

fn chunk(n: u64) -> ChunkId {
    let keys = keys().domain(DomainId([2; 16]));
    keys.chunk_id(ChunkKind::Block, blake3::hash(&n.to_le_bytes()).as_bytes())
}

fn pack_id(n: u32) -> PackId {
    let mut id = [0u8; 16];
    id[..4].copy_from_slice(&n.to_be_bytes());
    PackId(id)
}

/// A pack of the chunks `from..to`, of which only the table exists.
fn table(n: u32, chunks: std::ops::Range<u64>) -> FinishedPack {
    let header = PackHeader {
        generation: 0,
        kind: PackKind::Blocks,
        pool: PoolId([7; 16]),
        domain: DomainId([2; 16]),
        pack: pack_id(n),
    };
    let table = chunks.enumerate().map(|(at, n)| TableEntry {
        id: chunk(n),
        location: Location::new(header.pack, 64 + at as u32 / 16 * 64, at % 16).at,
    });
    FinishedPack {
        header,
        length: 1 << 20,
        content: 1 << 20,
        table: table.collect(),
        rebuilt: Default::default(),
    }
}

fn index(files: &Arc<SimulatedFiles>) -> Index {
    Index::open(files.clone(), &keys(), 0, &|_| false).unwrap()
}

/// Merges as long as something is due.
fn merge(index: &mut Index) -> usize {
    let mut merged = 0;
    while let Some(build) = index.due_merge(1) {
        let built = build.write().unwrap();
        index.install(built);
        merged += 1;
    }
    merged
}

/// Many packs in many flushes: every chunk is where its newest table says, no other is found, and few runs stand.
#[test]
fn tiers_hold_every_chunk() {
    let files = Arc::new(SimulatedFiles::new(1));
    files.make_folder("index").unwrap();
    let mut index = index(&files);
    for n in 0..40 {
        index.add_loose(&table(n, u64::from(n) * 100..u64::from(n) * 100 + 130));
        index.flush(1).unwrap();
        merge(&mut index);
    }
    let (runs, entries) = index.size();
    assert!(runs < FAN, "{runs} runs");
    assert_eq!(entries, 40 * 130);
    for n in 0..40 * 100 {
        let found = index.find(&chunk(n)).unwrap();
        let expected = if n % 100 < 30 && n >= 100 { 2 } else { 1 };
        assert_eq!(found.len(), expected, "chunk {n}: {found:?}");
        assert_eq!(found.first().unwrap().pack, pack_id(n as u32 / 100), "the newest one comes first");
    }
    for n in 10_000..20_000 {
        assert_eq!(index.find(&chunk(n)).unwrap(), [], "chunk {n}");
    }
    let mut all = 0;
    index.for_each(|_, _| all += 1).unwrap();
    assert_eq!(all, 40 * 130);
    assert!(index.examine().is_empty());
}

/// What goes is left out, what stays stays, and a run that names nothing that goes is not written again.
#[test]
fn a_rewrite_touches_only_runs_that_name_what_goes() {
    let files = Arc::new(SimulatedFiles::new(2));
    files.make_folder("index").unwrap();
    let mut index = index(&files);
    for n in 0..3 {
        index.add_loose(&table(n, u64::from(n) * 10..u64::from(n) * 10 + 10));
        index.flush(1).unwrap();
    }
    let built = index.due_rewrite(2, &|pack| pack != pack_id(1)).unwrap().write().unwrap();
    index.install(built);
    index.forget(&|pack| pack == pack_id(1));
    assert!(index.due_rewrite(2, &|_| true).is_none());
    assert_eq!(index.superseded(), [2]);
    assert_eq!(index.find(&chunk(11)).unwrap(), []);
    assert_eq!(index.find(&chunk(5)).unwrap().len(), 1);
    assert_eq!(index.find(&chunk(25)).unwrap().len(), 1);
    let mut all = 0;
    index.for_each(|_, _| all += 1).unwrap();
    assert_eq!(all, 20);
    assert_eq!(Index::witnessed_by_ends(&*files, &keys(), 0).unwrap(), 2);
}

/// The same chunk in more packs than a page has entries: all places are found, across pages.
#[test]
fn an_id_may_fill_several_pages() {
    let files = Arc::new(SimulatedFiles::new(3));
    files.make_folder("index").unwrap();
    let mut index = index(&files);
    for n in 0..500 {
        index.add_loose(&table(n, 0..1));
    }
    index.add_loose(&table(500, 0..50));
    index.flush(1).unwrap();
    assert_eq!(index.find(&chunk(0)).unwrap().len(), 501);
    for n in 1..50 {
        assert_eq!(index.find(&chunk(n)).unwrap().len(), 1);
    }
}

/// Every bit of a run's file: the run does not open, or a page or filter of it is told as damaged; a filter whose bits
/// were cleared hides nothing.
#[test]
fn every_flipped_bit_is_noticed_and_hides_no_chunk() {
    let files = Arc::new(SimulatedFiles::new(4));
    files.make_folder("index").unwrap();
    let mut index = index(&files);
    index.add_loose(&table(1, 0..20));
    index.flush(1).unwrap();
    let name = run::name(1);
    let bytes = files.read(&name, 1 << 20).unwrap();
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        files.set_bytes(&name, flipped);
        let Ok(run) = Run::open(&*files, &keys(), 1) else { continue };
        assert_eq!(run.examine().len(), 1, "byte {at}");
        for n in 0..20 {
            let mut found = Vec::new();
            if run.find(&chunk(n), &mut found).is_ok() {
                assert_eq!(found.len(), 1, "byte {at}: chunk {n} is hidden");
            }
        }
    }
}

#[test]
fn filters_lie_seldom_and_only_one_way() {
    let key = |n: u64| run::filter_key(&chunk(n));
    let keys: Vec<u64> = (0..100_000).map(key).collect();
    let filter = run::Filter::of(&keys);
    assert!(keys.iter().all(|key| filter.may_hold(*key)));
    let lies = (100_000..300_000).filter(|n| filter.may_hold(key(*n))).count();
    assert!(lies < 2_000, "{lies} of 200,000");
    assert_eq!(filter.bytes(), 150_016);
}

#[test]
fn tables_answer_for_neighbours_within_their_bytes() {
    let mut tables = Tables::default();
    assert!(!tables.meet(pack_id(0)));
    assert!(tables.meet(pack_id(0)));
    for n in 0..200 {
        tables.hold(&table(n, u64::from(n) * 1000..u64::from(n) * 1000 + 1000));
        assert!(tables.find(&chunk(u64::from(n) * 1000 + 500)).is_some());
    }
    assert!(tables.bytes() <= 6 << 20);
    for n in 199_000..200_000u64 {
        assert_eq!(tables.find(&chunk(n)).unwrap().pack, pack_id(199));
    }
    assert_eq!(tables.find(&chunk(3)), None);
    tables.forget(pack_id(199));
    assert_eq!(tables.find(&chunk(199_500)), None);
    tables.hold(&table(300, 0..0));
    tables.hold(&table(301, 1..2));
    assert!(tables.find(&chunk(1)).is_some());
}
