//! Entries, refcounts and chains where files of QEMU do not reach.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use block_io::{BlockDevice, ByteRange, MemoryDevice, MemoryFile, WritableDevice};

use super::entry::{COPIED, Cluster, Layout, State, ZERO};
use super::refcounts::{Refcounts, per_block, table_clusters_for};
use super::{CreateOptions, Reader, Writer};
use crate::{ImageError, MAX_CHAIN, NoParents, ParentReference, Parents};

fn layout(cluster_bits: u32, extended: bool) -> Layout {
    Layout { version: 3, cluster_bits, extended, size: 1 << 40 }
}

#[test]
fn standard_entries() {
    let plain = layout(16, false);
    assert_eq!(plain.cluster(0, 0), Ok(Cluster::Absent));
    assert_eq!(plain.cluster(ZERO, 0), Ok(Cluster::Zero { host: None }));
    assert_eq!(plain.cluster(0x3_0000 | ZERO | COPIED, 0), Ok(Cluster::Zero { host: Some(0x3_0000) }));
    assert_eq!(plain.cluster(0x3_0000, 0), Ok(Cluster::Data { host: 0x3_0000 }));
    for (entry, says) in [
        (0x3_0200, "not a multiple of a cluster"),
        (COPIED, "offset 0"),
        (0x3_0000 | 2, "reserved"),
        (0x3_0000 | 1 << 8, "reserved"),
        (0x3_0000 | 1 << 56, "reserved"),
    ] {
        assert!(plain.cluster(entry, 0).unwrap_err().contains(says), "{entry:#x}");
    }
    let old = Layout { version: 2, ..plain };
    assert!(old.cluster(ZERO, 0).is_err());
    assert_eq!(plain.l2_table(0x3_0000 | COPIED), Ok(Some(0x3_0000)));
    assert!(
        plain.l2_table(0x3_0200).is_err() && plain.l2_table(1).is_err() && plain.l2_table(COPIED).is_err()
    );
}

#[test]
fn compressed_entries_of_every_cluster_size() {
    for bits in 9..=21u32 {
        let layout = layout(bits, false);
        let x = 62 - (bits - 8);
        let host = layout.cluster_size() + 100;
        let most = (1u64 << (bits - 8)) - 1;
        let found = layout.cluster(1 << 62 | most << x | host, 0).unwrap();
        let Cluster::Compressed { host: at, length } = found else { panic!("{found:?}") };
        assert_eq!((at, length), (host, (most + 1) * 512 - host % 512));
        assert!(length <= 2 * layout.cluster_size());
        if x > 56 {
            assert!(layout.cluster(1 << 62 | 1 << 56 | host, 0).is_err(), "bits beyond 55");
        }
    }
}

#[test]
fn extended_entries() {
    let extended = layout(16, true);
    let host = 0x3_0000u64;
    assert!(extended.cluster(host | ZERO, 0).unwrap_err().contains("reserved"));
    assert!(extended.cluster(host, 1 << 32 | 1).unwrap_err().contains("both"));
    assert!(extended.cluster(0, 1).unwrap_err().contains("without an offset"));
    assert_eq!(extended.cluster(host, 0), Ok(Cluster::Absent));
    assert_eq!(extended.cluster(0, 0xffff_ffff << 32), Ok(Cluster::Zero { host: None }));
    assert_eq!(extended.cluster(host, 0xffff_ffff), Ok(Cluster::Data { host }));

    // Subclusters of 2 KiB: 0 and 1 allocated, 2 zero, 31 allocated, others show the backing file.
    let split = extended.cluster(host, 1 << 34 | 1 << 31 | 0b11).unwrap();
    assert_eq!(split.state(0, &extended), (State::Data(host), 4096));
    assert_eq!(split.state(2100, &extended), (State::Data(host + 2100), 1996));
    assert_eq!(split.state(4096, &extended), (State::Zero, 2048));
    assert_eq!(split.state(6144, &extended), (State::Through, 28 * 2048));
    assert_eq!(split.state(65_535, &extended), (State::Data(host + 65_535), 1));
    // Zero subclusters need no place.
    let zero = extended.cluster(0, 1 << 32).unwrap();
    assert_eq!(zero.state(5, &extended), (State::Zero, 2043));
}

#[test]
fn a_refcount_table_covers_itself_and_its_blocks() {
    for bits in [9, 12, 16, 21] {
        let layout = layout(bits, false);
        for clusters in [1u64, 255, 256, 257, 16_384, 1_000_003] {
            let table = table_clusters_for(&layout, clusters);
            let mut refcounts =
                Refcounts { table: vec![], table_offset: 0, table_clusters: 0, counted: 0, next: clusters };
            let plan = refcounts.plan(&layout, table, 8 << 20 >> bits).unwrap();
            assert!(refcounts.table_clusters >= table, "{clusters} clusters of 2^{bits}");
            assert_eq!(plan.ones, 0..refcounts.next);
            assert_eq!(plan.replaced, Some(0..0));
            assert_eq!(plan.entries.len() as u64, refcounts.next.div_ceil(per_block(&layout)));
            assert!(refcounts.table.len() as u64 <= refcounts.table_clusters * layout.cluster_size() / 8);
            let mut places = refcounts.table.clone();
            places.push(refcounts.table_offset);
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), refcounts.table.len() + 1, "no cluster is taken twice");
        }
    }
    let layout = layout(9, false);
    let mut refcounts =
        Refcounts { table: vec![], table_offset: 0, table_clusters: 0, counted: 0, next: 1 << 30 };
    assert!(refcounts.plan(&layout, 0, 100).is_none(), "a table larger than allowed");
    assert!(refcounts.allocate(&layout, u64::MAX).is_none());
    assert!(refcounts.allocate(&layout, 1 << 48).is_none(), "past 2^56 bytes");
}

/// A chain without end: every backing file is the same image, which refers to the next. Counts down to one without.
struct Chain {
    link: Vec<u8>,
    last: Vec<u8>,
    left: usize,
}

impl Parents for Chain {
    fn open(
        &self,
        reference: &ParentReference,
    ) -> Result<(Arc<dyn BlockDevice>, Arc<dyn Parents>), ImageError> {
        assert!(reference.depth < MAX_CHAIN);
        let file = if self.left == 0 { &self.last } else { &self.link };
        let next =
            Chain { link: self.link.clone(), last: self.last.clone(), left: self.left.saturating_sub(1) };
        Ok((Arc::new(MemoryDevice::new(file.clone())), Arc::new(next)))
    }
}

/// An empty image, and the same with a backing file of format qcow2 put into its header.
fn link_and_last() -> (Vec<u8>, Vec<u8>) {
    let file = Arc::new(MemoryFile::default());
    let writer = Writer::create(file.clone(), CreateOptions { size: 1 << 20, cluster_bits: 9 }).unwrap();
    let mut link = file.to_vec();
    link[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 4]);
    link[112..132].copy_from_slice(b"\xe2\x79\x2a\xca\0\0\0\x05qcow2\0\0\0\0\0\0\0");
    link[256..260].copy_from_slice(b"base");
    writer.write_at(4096, &[5; 8192]).unwrap();
    writer.flush().unwrap();
    (link, file.to_vec())
}

#[test]
fn the_longest_chain_is_read_and_a_longer_one_refused() {
    let (link, last) = link_and_last();
    let open = |links: usize| {
        let chain = Chain { link: link.clone(), last: last.clone(), left: links - 1 };
        Reader::open(Arc::new(MemoryDevice::new(link.clone())), &chain)
    };
    let reader = open(MAX_CHAIN - 1).unwrap();
    let mut found = [0u8; 8192];
    reader.read_at(4096, &mut found).unwrap();
    assert_eq!(found, [5; 8192]);
    assert_eq!(reader.next_allocated(0).unwrap(), Some(ByteRange { start: 4096, end: 12_288 }));
    let error = open(MAX_CHAIN).err().unwrap();
    assert!(matches!(error, ImageError::Unsupported { .. }), "{error}");
}

#[test]
fn zeros_of_a_layer_hide_what_is_below() {
    let (link, last) = link_and_last();
    // The L2 table of the first 32 KiB goes to the end: cluster 8 (4096) zero, cluster 9 shows through.
    let mut top = link.clone();
    let table = top.len().next_multiple_of(512);
    top.resize(table + 512, 0);
    top[table + 64..table + 72].copy_from_slice(&1u64.to_be_bytes());
    top[512..520].copy_from_slice(&(table as u64 | COPIED).to_be_bytes());
    let chain = Chain { link, last, left: 0 };
    let reader = Reader::open(Arc::new(MemoryDevice::new(top)), &chain).unwrap();
    let mut found = [9u8; 1024];
    reader.read_at(4096, &mut found).unwrap();
    assert!(found[..512] == [0; 512] && found[512..] == [5; 512]);
    assert_eq!(reader.next_allocated(0).unwrap(), Some(ByteRange { start: 4608, end: 12_288 }));
    assert_eq!(reader.next_allocated(5000).unwrap(), Some(ByteRange { start: 5000, end: 12_288 }));
    assert_eq!(reader.next_allocated(12_288).unwrap(), None);
}

#[test]
fn readers_from_several_threads_agree() {
    let file = Arc::new(MemoryFile::default());
    let writer = Writer::create(file.clone(), CreateOptions { size: 8 << 20, cluster_bits: 9 }).unwrap();
    let content: Vec<u8> = (0..8u32 << 20).map(|at| (at / 511) as u8).collect();
    writer.write_at(0, &content).unwrap();
    writer.flush().unwrap();
    let reader = Reader::open(Arc::new(MemoryDevice::new(file.to_vec())), &NoParents).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let (reader, content) = (&reader, &content);
            scope.spawn(move || {
                for turn in 0..200usize {
                    let at = (turn * 40_009 + thread * 1_000_003) % (content.len() - 5000);
                    let mut part = vec![0u8; 5000];
                    reader.read_at(at as u64, &mut part).unwrap();
                    assert!(part == content[at..at + 5000]);
                }
            });
        }
    });
}
