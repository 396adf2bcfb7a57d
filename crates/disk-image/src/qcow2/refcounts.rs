//! Host cluster management of the writer: clusters are taken from the end of the file, one after the other, and their
//! refcounts are written at the next commit.
//!
//! Nothing is ever taken twice and nothing is freed, so the refcounts that a commit owes are one run of ones, from
//! `counted` to `next`, and no refcount block has to be read.

use super::entry::Layout;

/// Bits of a refcount: the width of version 2, and what QEMU writes.
pub(super) const ORDER: u32 = 4;
/// Offsets in tables have 56 bits.
const MAX_HOST: u64 = 1 << 56;

/// The refcount table, and which clusters are taken.
pub(super) struct Refcounts {
    /// Offset of each refcount block in the file; 0 if there is none.
    pub table: Vec<u64>,
    /// Where the table lies in the file; 0 before it has a place.
    pub table_offset: u64,
    /// Clusters of the table in the file.
    pub table_clusters: u64,
    /// Clusters before this one have their refcounts on disk.
    pub counted: u64,
    /// First cluster that is not taken.
    pub next: u64,
}

/// What a commit has to write, in the order of its steps.
pub(super) struct Plan {
    /// Clusters whose refcounts become one.
    pub ones: std::ops::Range<u64>,
    /// Entries of the table that are new.
    pub entries: Vec<usize>,
    /// Clusters of the table that the new one replaces; `None` if it stays, empty if there was none.
    pub replaced: Option<std::ops::Range<u64>>,
}

/// Refcounts in a refcount block.
pub(super) fn per_block(layout: &Layout) -> u64 {
    (layout.cluster_size() * 8) >> ORDER
}

/// Clusters that a refcount table needs for a file of `clusters` clusters, refcount blocks and the table included.
pub(super) fn table_clusters_for(layout: &Layout, clusters: u64) -> u64 {
    let (per_block, per_cluster) = (per_block(layout), layout.cluster_size() / 8);
    let mut table = 1;
    // Each round adds at most what counting the last addition takes: a small part of it.
    loop {
        let mut all = clusters.saturating_add(table);
        all = all.saturating_add(all / (per_block - 1) + 2);
        let need = all.div_ceil(per_block).div_ceil(per_cluster);
        if need <= table {
            return table;
        }
        table = need;
    }
}

impl Refcounts {
    /// Takes `clusters` clusters that follow each other; gives the offset of the first. `None` if the file would pass
    /// what offsets can say.
    pub fn allocate(&mut self, layout: &Layout, clusters: u64) -> Option<u64> {
        let end = self.next.checked_add(clusters)?;
        if end > MAX_HOST >> layout.cluster_bits {
            return None;
        }
        let first = self.next;
        self.next = end;
        Some(first << layout.cluster_bits)
    }

    /// Takes what refcount blocks are missing, and a larger table if they do not fit in it. `None` if a table of more
    /// than `max_table` clusters would be needed.
    pub fn plan(&mut self, layout: &Layout, wanted_table: u64, max_table: u64) -> Option<Plan> {
        let (per_block, per_cluster) = (per_block(layout), layout.cluster_size() / 8);
        let mut plan = Plan { ones: self.counted..self.next, entries: Vec::new(), replaced: None };
        // Blocks and tables are clusters themselves and must be counted: repeat until nothing is missing.
        let mut block = self.counted / per_block;
        while block * per_block < self.next {
            if block / per_cluster >= self.table_clusters {
                let old = self.table_offset >> layout.cluster_bits;
                let old = if self.table_offset == 0 { 0..0 } else { old..old + self.table_clusters };
                let grown = self.next.saturating_add(self.next / 2);
                let clusters = table_clusters_for(layout, grown).max(wanted_table).min(max_table);
                if clusters <= block / per_cluster || plan.replaced.is_some() {
                    return None;
                }
                self.table_offset = self.allocate(layout, clusters)?;
                self.table_clusters = clusters;
                plan.replaced = Some(old);
                continue;
            }
            let index = block as usize;
            if self.table.len() <= index {
                self.table.resize(index + 1, 0);
            }
            if self.table.get(index) == Some(&0) {
                let host = self.allocate(layout, 1)?;
                if let Some(entry) = self.table.get_mut(index) {
                    *entry = host;
                }
                plan.entries.push(index);
            }
            block += 1;
        }
        plan.ones.end = self.next;
        Some(plan)
    }
}
