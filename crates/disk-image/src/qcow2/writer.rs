//! Writing a version 3 image: create one, or go on with one.
//!
//! Data goes to its cluster at once; what refers to it waits in memory for a *commit*, which writes in this order, with
//! a flush of the file after each step:
//!
//! 1. data (already written), L2 tables that are new, refcounts of all new clusters, and the refcount table if it moved;
//! 2. entries of the refcount table, or the header if the table moved;
//! 3. entries of L2 tables, L1 entries of new L2 tables, refcounts of a table that was left.
//!
//! A crash before the end of step 3 leaks the new clusters and nothing else; within step 3 each 8-byte entry is either
//! old or new, both valid. [`Writer::open`] finds and frees what leaked. `flush` is a commit; another one happens when
//! the tables held in memory are all changed and a further one is needed.
//!
//! Zeros: a cluster that was never written stays unallocated; one that was gets the zero flag and keeps its place.
//!
//! Overlay: an image with a backing file, the [`Base`], which shows through where no cluster is allocated and is never
//! written. A cluster that is written in part gets the rest of its bytes from the base, before it is referred to as any
//! other; bytes past the end of the disk stay zeros, so that a disk that is made larger later does not show more of the
//! base. Zeros over data of the base get the zero flag without a place, for nothing else hides what is below; where the
//! base has none they stay unallocated.
//!
//! Refuses to go on with: versions other than 3, snapshots, backing files other than the given base, compressed
//! clusters, extended L2 entries, refcounts not of 16 bits, bitmaps and other auto-clear features, the dirty or the
//! corrupt bit.
//!
//! Memory: the L1 and the refcount table, 16 MiB of L2 tables, two clusters. One lock: calls from several threads take
//! turns.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_io::{BlockDevice, ByteRange, DeviceError, GrowableFile, WritableDevice};

use super::backing::{Base, Below};
use super::entry::{COPIED, Cluster, Layout, ZERO};
use super::refcounts::{self, Plan, Refcounts};
use super::{Backing, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MAX_SIZE, cannot_hold, header};
use crate::ImageError;

/// Name of the structure in errors.
const OBJECT: &str = "qcow2 image";
/// Memory for L2 tables.
const TABLE_MEMORY: u64 = 16 << 20;
/// Most bytes prepared for one write of tables.
const PIECE: usize = 64 << 10;
/// Bytes of the header written here: up to and with `compression_type`, padded.
const HEADER_LENGTH: u32 = 112;
/// Bytes of type and length of a header extension; the one that ends them has nothing else.
const EXTENSION_HEAD: u64 = 8;

/// What a new image is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// Size of a cluster as a power of two, 9 to 21. Small clusters limit the disk: 512 bytes to less than 128 GiB.
    pub cluster_bits: u32,
}

impl CreateOptions {
    /// A disk of `size` bytes in clusters of 64 KiB, as QEMU makes them.
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions { size, cluster_bits: 16 }
    }
}

/// Fills a qcow2 image; reads what it holds, too.
pub struct Writer {
    layout: Layout,
    state: Mutex<State>,
}

pub(super) struct State {
    pub layout: Layout,
    pub file: Arc<dyn GrowableFile>,
    /// The active L1 table, as it is on disk after the next commit.
    pub l1: Vec<u64>,
    pub l1_offset: u64,
    /// Entries of `l1` that differ from the disk lie in here.
    pub l1_dirty: Option<Range<usize>>,
    pub tables: HashMap<usize, Table>,
    pub dirty: BTreeSet<usize>,
    pub refcounts: Refcounts,
    /// Clusters to give to a refcount table that is made.
    pub wanted_refcount_table: u64,
    /// What shows through where nothing is allocated.
    pub base: Option<Below>,
    /// Bytes of the file.
    pub length: u64,
    /// A commit failed: what is on disk is not known any more (INV-5).
    pub failed: bool,
}

/// An L2 table in memory.
pub(super) struct Table {
    host: u64,
    /// No L1 entry on disk refers to it yet.
    fresh: bool,
    entries: Vec<u64>,
    /// Entries that differ from the disk lie in here.
    dirty: Option<Range<usize>>,
}

/// The header extensions and the name of a backing file, as they stand in the first cluster.
fn parts_of(backing: &Backing) -> (Vec<u8>, &[u8]) {
    let format = backing.format.as_deref().unwrap_or_default();
    let mut extension = header::EXTENSION_BACKING_FORMAT.to_be_bytes().to_vec();
    extension.extend_from_slice(&(format.len() as u32).to_be_bytes());
    extension.extend_from_slice(format.as_bytes());
    extension.resize(extension.len().next_multiple_of(8), 0);
    (extension, backing.name.as_bytes())
}

fn widen(range: &mut Option<Range<usize>>, by: Range<usize>) {
    *range = Some(match range.take() {
        None => by,
        Some(old) => old.start.min(by.start)..old.end.max(by.end),
    });
}

impl Writer {
    /// Makes an image of zeros in an empty `file`. It is durable when this returns.
    pub fn create(file: Arc<dyn GrowableFile>, options: CreateOptions) -> Result<Writer, ImageError> {
        Writer::made(file, options, None)
    }

    /// Makes an overlay in an empty `file` that reads as `base`: cut off if that is larger, with zeros behind it if that
    /// is smaller. It is durable when this returns.
    pub fn create_overlay(
        file: Arc<dyn GrowableFile>,
        options: CreateOptions,
        base: &Base,
    ) -> Result<Writer, ImageError> {
        Writer::made(file, options, Some(base))
    }

    fn made(
        file: Arc<dyn GrowableFile>,
        options: CreateOptions,
        base: Option<&Base>,
    ) -> Result<Writer, ImageError> {
        let CreateOptions { size, cluster_bits } = options;
        if !(9..=21).contains(&cluster_bits) {
            return Err(cannot_hold(format!("clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are possible")));
        }
        if size > MAX_SIZE || !size.is_multiple_of(512) {
            return Err(cannot_hold(format!(
                "{size} bytes; a multiple of 512 bytes, less than 2^63, is possible"
            )));
        }
        if !file.is_empty()? {
            return Err(cannot_hold("the file to create it in is not empty"));
        }
        let layout = Layout { version: 3, cluster_bits, extended: false, size };
        let l1_entries = layout.l1_entries();
        if l1_entries > MAX_L1_BYTES / 8 {
            return Err(cannot_hold(format!(
                "{size} bytes in clusters of {} bytes need an L1 table of more than 32 MiB; use larger clusters",
                layout.cluster_size()
            )));
        }
        let l1_clusters = (l1_entries * 8).div_ceil(layout.cluster_size()).max(1);
        // Everything allocated, with an eighth for what crashes leak: the table need not move before that.
        let most = size.div_ceil(layout.cluster_size()) + l1_entries + l1_clusters + 1;
        let wanted = refcounts::table_clusters_for(&layout, most + most / 8);
        let most_table = MAX_REFCOUNT_TABLE_BYTES / layout.cluster_size();
        if refcounts::table_clusters_for(&layout, most) > most_table {
            return Err(cannot_hold(format!(
                "{size} bytes in clusters of {} bytes need a refcount table of more than 8 MiB; use larger clusters",
                layout.cluster_size()
            )));
        }
        let l1_offset = layout.cluster_size();
        let backing = base.map(Base::reference).transpose()?;
        let (extensions, name) = backing.as_ref().map(parts_of).unwrap_or_default();
        let name_at = u64::from(HEADER_LENGTH) + extensions.len() as u64 + EXTENSION_HEAD;
        if name_at + name.len() as u64 > layout.cluster_size() {
            return Err(cannot_hold(format!(
                "a backing file name of {} bytes does not fit in the first cluster of {}; use larger clusters",
                name.len(),
                layout.cluster_size()
            )));
        }
        let mut start = Vec::with_capacity(HEADER_LENGTH as usize);
        start.extend_from_slice(&header::MAGIC);
        start.extend_from_slice(&3u32.to_be_bytes());
        start.extend_from_slice(&if name.is_empty() { 0 } else { name_at }.to_be_bytes());
        start.extend_from_slice(&(name.len() as u32).to_be_bytes());
        start.extend_from_slice(&cluster_bits.to_be_bytes());
        start.extend_from_slice(&size.to_be_bytes());
        start.extend_from_slice(&0u32.to_be_bytes()); // not encrypted
        start.extend_from_slice(&(l1_entries as u32).to_be_bytes());
        start.extend_from_slice(&l1_offset.to_be_bytes());
        start.extend_from_slice(&[0; 12]); // the refcount table: by the commit below
        start.extend_from_slice(&[0; 12]); // no snapshots
        start.extend_from_slice(&[0; 24]); // no features
        start.extend_from_slice(&refcounts::ORDER.to_be_bytes());
        start.extend_from_slice(&HEADER_LENGTH.to_be_bytes());
        start.resize(HEADER_LENGTH as usize, 0); // deflate
        start.extend_from_slice(&extensions);
        start.extend_from_slice(&[0; EXTENSION_HEAD as usize]); // end of header extensions
        start.extend_from_slice(name);
        file.write_at(0, &start)?;
        let mut state = State {
            layout,
            file,
            l1: vec![0; l1_entries as usize],
            l1_offset,
            l1_dirty: None,
            tables: HashMap::new(),
            dirty: BTreeSet::new(),
            refcounts: Refcounts {
                table: Vec::new(),
                table_offset: 0,
                table_clusters: 0,
                counted: 0,
                next: 1 + l1_clusters,
            },
            wanted_refcount_table: wanted.min(most_table),
            base: base.map(|base| Below::new(base.disk.clone())),
            length: start.len() as u64,
            failed: false,
        };
        state.commit()?;
        Ok(Writer::going_on_from(state))
    }

    pub(super) fn going_on_from(state: State) -> Writer {
        Writer { layout: state.layout, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn usable(&self) -> Result<(), DeviceError> {
        if self.failed {
            return Err(self.io("write", 0, "an earlier flush failed; the image is in doubt"));
        }
        Ok(())
    }

    fn io(&self, action: &'static str, offset: u64, reason: &str) -> DeviceError {
        DeviceError::Io {
            object: OBJECT.to_owned(),
            action,
            offset,
            length: 0,
            source: std::io::Error::other(reason.to_owned()),
        }
    }

    fn allocate(&mut self, clusters: u64) -> Result<u64, DeviceError> {
        let layout = self.layout;
        self.refcounts
            .allocate(&layout, clusters)
            .ok_or_else(|| self.io("write", self.length, "the image file would pass 2^56 bytes"))
    }

    /// Grows the file to at least `end`. New bytes are zeros.
    fn grow(&mut self, end: u64) -> Result<(), DeviceError> {
        if self.length < end {
            self.file.set_len(end)?;
            self.length = end;
        }
        Ok(())
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.file.write_at(offset, bytes)?;
        self.length = self.length.max(offset.saturating_add(bytes.len() as u64));
        Ok(())
    }

    /// Writes numbers, in pieces.
    pub fn put_numbers(&self, offset: u64, numbers: &[u64]) -> Result<(), DeviceError> {
        for (index, piece) in numbers.chunks(PIECE / 8).enumerate() {
            let bytes: Vec<u8> = piece.iter().flat_map(|number| number.to_be_bytes()).collect();
            self.file.write_at(offset + (index * PIECE) as u64, &bytes)?;
        }
        Ok(())
    }

    /// Sets the refcounts of `clusters` to `value`; their refcount blocks exist.
    pub fn put_refcounts(&self, clusters: Range<u64>, value: u16) -> Result<(), DeviceError> {
        let per_block = refcounts::per_block(&self.layout);
        let mut at = clusters.start;
        while at < clusters.end {
            let end = clusters.end.min((at / per_block + 1) * per_block).min(at + PIECE as u64 / 2);
            let block = self.refcounts.table.get((at / per_block) as usize).copied().unwrap_or_default();
            if block == 0 {
                return Err(self.io("write", at, "a refcount block is missing"));
            }
            self.file
                .write_at(block + at % per_block * 2, &value.to_be_bytes().repeat((end - at) as usize))?;
            at = end;
        }
        Ok(())
    }

    /// Makes everything before it durable. See the module page for the order. After a failure nothing is written any
    /// more.
    pub fn commit(&mut self) -> Result<(), DeviceError> {
        self.usable()?;
        let done = self.commit_steps();
        self.failed = done.is_err();
        done
    }

    fn commit_steps(&mut self) -> Result<(), DeviceError> {
        let layout = self.layout;
        let most_table = MAX_REFCOUNT_TABLE_BYTES / layout.cluster_size();
        let Some(plan) = self.refcounts.plan(&layout, self.wanted_refcount_table, most_table) else {
            return Err(self.io("write", self.length, "the refcount table would pass 8 MiB"));
        };
        self.grow(self.refcounts.next << layout.cluster_bits)?;
        let dirty: Vec<usize> = std::mem::take(&mut self.dirty).into_iter().collect();
        for index in &dirty {
            self.put_table(*index, true)?;
        }
        self.put_refcounts(plan.ones.clone(), 1)?;
        if plan.replaced.is_some() {
            self.put_numbers(self.refcounts.table_offset, &self.refcounts.table)?;
        }
        self.file.flush()?;
        if self.put_refcount_table(&plan)? {
            self.file.flush()?;
        }
        let mut referred = false;
        for index in &dirty {
            referred |= self.put_table(*index, false)?;
        }
        if let Some(range) = self.l1_dirty.take() {
            let entries = self.l1.get(range.clone()).unwrap_or_default();
            self.put_numbers(self.l1_offset + range.start as u64 * 8, entries)?;
            referred = true;
        }
        if let Some(replaced) = plan.replaced {
            self.put_refcounts(replaced, 0)?;
            referred = true;
        }
        if referred {
            self.file.flush()?;
        }
        for index in &dirty {
            if let Some(table) = self.tables.get_mut(index) {
                (table.fresh, table.dirty) = (false, None);
            }
        }
        self.refcounts.counted = self.refcounts.next;
        Ok(())
    }

    /// Writes what changed in an L2 table, if it is `fresh` or not as asked.
    fn put_table(&self, index: usize, fresh: bool) -> Result<bool, DeviceError> {
        let Some(table) = self.tables.get(&index).filter(|table| table.fresh == fresh) else {
            return Ok(false);
        };
        let Some(range) = table.dirty.clone() else { return Ok(false) };
        let entries = table.entries.get(range.clone()).unwrap_or_default();
        self.put_numbers(table.host + range.start as u64 * 8, entries)?;
        Ok(true)
    }

    /// Step 2: makes new refcount blocks known. `false` if there are none.
    fn put_refcount_table(&self, plan: &Plan) -> Result<bool, DeviceError> {
        let refcounts = &self.refcounts;
        if plan.replaced.is_some() {
            // Offset and clusters of the table follow each other in the header's first sector: both are new, or none.
            let mut fields = refcounts.table_offset.to_be_bytes().to_vec();
            fields.extend_from_slice(&(refcounts.table_clusters as u32).to_be_bytes());
            self.file.write_at(48, &fields)?;
            return Ok(true);
        }
        // A new block is a cluster that another new block may count. It may be known only when that one is durably
        // known, or a crash between the two would leave a cluster in use with a refcount of zero. Places rise with the
        // order of taking, so no two blocks count each other.
        let counted_by = |index: usize| {
            let host = refcounts.table.get(index).copied().unwrap_or_default();
            ((host >> self.layout.cluster_bits) / refcounts::per_block(&self.layout)) as usize
        };
        let mut left = plan.entries.clone();
        while !left.is_empty() {
            let (waiting, ready): (Vec<usize>, Vec<usize>) = left
                .iter()
                .partition(|&&index| counted_by(index) != index && left.contains(&counted_by(index)));
            if ready.is_empty() {
                return Err(self.io(
                    "write",
                    refcounts.table_offset,
                    "refcount blocks that count each other",
                ));
            }
            for index in ready {
                let entry = refcounts.table.get(index).copied().unwrap_or_default();
                self.file.write_at(refcounts.table_offset + index as u64 * 8, &entry.to_be_bytes())?;
            }
            if !waiting.is_empty() {
                self.file.flush()?;
            }
            left = waiting;
        }
        Ok(!plan.entries.is_empty())
    }

    /// Makes the L2 table of an L1 entry present in `tables`, if it exists or is to be made.
    fn load(&mut self, index: usize, make: bool) -> Result<bool, DeviceError> {
        if self.tables.contains_key(&index) {
            return Ok(true);
        }
        let layout = self.layout;
        let entry = self.l1.get(index).copied().unwrap_or_default();
        let found = layout.l2_table(entry).map_err(|reason| self.io("read", index as u64, &reason))?;
        if found.is_none() && !make {
            return Ok(false);
        }
        if self.tables.len() as u64 >= TABLE_MEMORY >> layout.cluster_bits {
            if !self.dirty.is_empty() {
                self.commit()?;
            }
            // All at once, so that choosing costs nothing even with tables of 512 bytes.
            self.tables.clear();
        }
        let table = match found {
            Some(host) => {
                let mut bytes = vec![0u8; layout.cluster_size() as usize];
                self.file.read_at(host, &mut bytes)?;
                let entries =
                    bytes.as_chunks::<8>().0.iter().map(|bytes| u64::from_be_bytes(*bytes)).collect();
                Table { host, fresh: false, entries, dirty: None }
            }
            None => {
                let host = self.allocate(1)?;
                if let Some(entry) = self.l1.get_mut(index) {
                    *entry = host | COPIED;
                }
                widen(&mut self.l1_dirty, index..index + 1);
                self.dirty.insert(index);
                Table { host, fresh: true, entries: vec![0; layout.l2_entries() as usize], dirty: Some(0..0) }
            }
        };
        self.tables.insert(index, table);
        Ok(true)
    }

    /// What the cluster of the byte at `offset` is.
    fn cluster(&mut self, offset: u64) -> Result<Cluster, DeviceError> {
        let index = self.layout.l1_index(offset) as usize;
        if !self.load(index, false)? {
            return Ok(Cluster::Absent);
        }
        let at = self.layout.l2_index(offset) as usize;
        let entry =
            self.tables.get(&index).and_then(|table| table.entries.get(at)).copied().unwrap_or_default();
        self.layout.cluster(entry, 0).map_err(|reason| DeviceError::Damaged {
            object: OBJECT.to_owned(),
            offset,
            length: 1,
            reason: format!("L2 entry {reason}"),
        })
    }

    /// Sets the entries of `hosts.len()` clusters from the one at `offset`; all of one L2 table, which is loaded.
    fn set(&mut self, offset: u64, entries: impl ExactSizeIterator<Item = u64>) {
        let index = self.layout.l1_index(offset) as usize;
        let at = self.layout.l2_index(offset) as usize;
        let range = at..at + entries.len();
        if let Some(table) = self.tables.get_mut(&index)
            && let Some(places) = table.entries.get_mut(range.clone())
        {
            places.iter_mut().zip(entries).for_each(|(place, entry)| *place = entry);
            widen(&mut table.dirty, range);
            self.dirty.insert(index);
        }
    }

    /// The state of the byte at `offset` and the end of the bytes, before `limit` and in the same L2 table, that share
    /// it; data follows itself in the file. Other clusters than data come as `None`, with the host they keep only for
    /// the first.
    fn run(&mut self, offset: u64, limit: u64) -> Result<(Cluster, u64), DeviceError> {
        let layout = self.layout;
        let first = self.cluster(offset)?;
        let limit = limit.min(layout.table_end(offset));
        let mut end = layout.cluster_end(offset);
        let start = offset / layout.cluster_size() * layout.cluster_size();
        if first == Cluster::Absent && !self.tables.contains_key(&(layout.l1_index(offset) as usize)) {
            end = limit;
        }
        while end < limit {
            let same = match first {
                Cluster::Data { host } => Cluster::Data { host: host.saturating_add(end - start) },
                Cluster::Absent => Cluster::Absent,
                _ => break,
            };
            if self.cluster(end)? != same {
                break;
            }
            end = layout.cluster_end(end);
        }
        Ok((first, end.min(limit)))
    }

    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        let layout = self.layout;
        let cluster_size = layout.cluster_size();
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            self.load(layout.l1_index(at) as usize, true)?;
            let (cluster, end) = self.run(at, at + rest.len() as u64)?;
            let (part, after) = rest.split_at((end - at) as usize);
            let within = at % cluster_size;
            match cluster {
                Cluster::Data { host } => self.put(host + within, part)?,
                Cluster::Zero { host: Some(host) } => {
                    // What the place held before must not show: the whole cluster is written. On disk it still reads
                    // as zeros until the commit, which comes after this data.
                    let mut whole = vec![0u8; cluster_size as usize];
                    if let Some(place) = whole.get_mut(within as usize..within as usize + part.len()) {
                        place.copy_from_slice(part);
                    }
                    self.put(host, &whole)?;
                    self.set(at, std::iter::once(host | COPIED));
                }
                _ => {
                    let clusters = (within + part.len() as u64).div_ceil(cluster_size);
                    let start = at - within;
                    let whole_end = start.saturating_add(clusters * cluster_size).min(layout.size);
                    // Before a place is taken: a base that cannot be read must leave no leak.
                    let before = self.shown_through(cluster, start..at)?;
                    let behind = self.shown_through(cluster, end..whole_end)?;
                    let host = self.allocate(clusters)?;
                    if let Some(before) = before {
                        self.put(host, &before)?;
                    }
                    self.put(host + within, part)?;
                    if let Some(behind) = behind {
                        self.put(host + within + part.len() as u64, &behind)?;
                    }
                    self.grow(host + clusters * cluster_size)?;
                    self.set(
                        at,
                        (0..clusters as usize).map(|index| (host + index as u64 * cluster_size) | COPIED),
                    );
                }
            }
            (at, rest) = (end, after);
        }
        Ok(())
    }

    /// What a cluster has to keep of the base in `range` when it gets a place; `None` if that is zeros, as which every new
    /// place reads.
    fn shown_through(&self, cluster: Cluster, range: Range<u64>) -> Result<Option<Vec<u8>>, DeviceError> {
        let Some(base) = self.base.as_ref().filter(|_| cluster == Cluster::Absent && !range.is_empty())
        else {
            return Ok(None);
        };
        let mut bytes = vec![0u8; (range.end - range.start) as usize];
        base.read(range.start, &mut bytes)?;
        Ok(bytes.iter().any(|&byte| byte != 0).then_some(bytes))
    }

    /// Hides data of the base in `range`, where nothing is allocated and which lies in one L2 table. Gives the byte to go
    /// on from.
    fn hide(&mut self, range: Range<u64>) -> Result<u64, DeviceError> {
        let layout = self.layout;
        let cluster_size = layout.cluster_size();
        let Some(base) = &self.base else { return Ok(range.end) };
        let Some(found) = base.next_allocated(range.start)?.filter(|found| found.start < range.end) else {
            return Ok(range.end);
        };
        // The cluster of the first data. Only whole clusters get the flag; what the range has of others is written.
        let start = range.start.max(found.start / cluster_size * cluster_size);
        let whole_end =
            if range.end == layout.size { range.end } else { range.end / cluster_size * cluster_size };
        if start.is_multiple_of(cluster_size) && start < whole_end {
            let stop = found.end.div_ceil(cluster_size).saturating_mul(cluster_size).min(whole_end);
            self.load(layout.l1_index(start) as usize, true)?;
            self.set(start, std::iter::repeat_n(ZERO, (stop - start).div_ceil(cluster_size) as usize));
            return Ok(stop);
        }
        let stop = range.end.min(layout.cluster_end(start));
        self.write(start, &vec![0u8; (stop - start) as usize])?;
        Ok(stop)
    }

    fn write_zeros(&mut self, range: ByteRange) -> Result<(), DeviceError> {
        let layout = self.layout;
        let mut at = range.start;
        while at < range.end {
            let (cluster, end) = self.run(at, range.end)?;
            if let Cluster::Data { host } = cluster {
                let whole_end = layout.cluster_end(at);
                if !at.is_multiple_of(layout.cluster_size()) || end < whole_end {
                    // Part of a cluster: the run may go on with whole ones, which come next.
                    let end = end.min(whole_end);
                    self.put(host + at % layout.cluster_size(), &vec![0u8; (end - at) as usize])?;
                    at = end;
                    continue;
                }
                // Only whole clusters of the run; a rest is the next turn's.
                let whole = if end == layout.size {
                    end
                } else {
                    end / layout.cluster_size() * layout.cluster_size()
                };
                let count = (whole - at).div_ceil(layout.cluster_size()) as usize;
                self.set(
                    at,
                    (0..count).map(|index| (host + index as u64 * layout.cluster_size()) | COPIED | ZERO),
                );
                at = whole;
                continue;
            }
            at = if cluster == Cluster::Absent { self.hide(at..end)? } else { end };
        }
        Ok(())
    }
}

impl BlockDevice for Writer {
    fn size(&self) -> u64 {
        self.layout.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size())?;
        let mut state = self.state();
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (cluster, end) = state.run(at, at + rest.len() as u64)?;
            let (part, after) = rest.split_at_mut((end - at) as usize);
            match cluster {
                Cluster::Data { host } => state.file.read_at(host + at % self.layout.cluster_size(), part)?,
                Cluster::Absent if let Some(base) = &state.base => base.read(at, part)?,
                _ => part.fill(0),
            }
            (at, rest) = (end, after);
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        let mut state = self.state();
        let mut at = from;
        while at < self.size() {
            let (cluster, end) = state.run(at, self.size())?;
            if matches!(cluster, Cluster::Data { .. }) {
                return Ok(Some(ByteRange { start: at, end }));
            }
            if cluster == Cluster::Absent
                && let Some(base) = &state.base
                && let Some(found) = base.next_allocated(at)?
                && found.start < end
            {
                return Ok(Some(ByteRange { start: found.start, end: found.end.min(end) }));
            }
            at = end;
        }
        Ok(None)
    }
}

impl WritableDevice for Writer {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size())?;
        let mut state = self.state();
        state.usable()?;
        state.write(offset, buf)
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        DeviceError::check_bounds(range.start, range.len(), self.size())?;
        let mut state = self.state();
        state.usable()?;
        state.write_zeros(range)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.state().commit()
    }
}
