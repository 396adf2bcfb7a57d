//! Opening an image to go on writing: every reference is followed, every refcount compared.
//!
//! A cluster with a refcount and no reference leaked in a crash: its refcount is taken back. A cluster with a reference
//! and no refcount, or with two references, is damage that no crash of [`super::Writer`] leaves: refused.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use block_io::{BlockDevice, ByteRange, DeviceError, GrowableFile};

use super::backing::{Base, Below};
use super::entry::{Cluster, Layout};
use super::header::{CORRUPT, DIRTY, Header};
use super::refcounts::{self, Refcounts};
use super::writer::{State, Writer};
use super::{MAX_REFCOUNT_TABLE_BYTES, damaged, unsupported};
use crate::{ImageError, ImageFormat};

/// Most clusters of a file that is examined: a map of 128 MiB, and 64 TiB in clusters of 64 KiB.
const MAX_CLUSTERS: u64 = 1 << 30;

/// A growing file as it is now.
struct Now {
    file: Arc<dyn GrowableFile>,
    size: u64,
}

impl BlockDevice for Now {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size)?;
        self.file.read_at(offset, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        Ok((from < self.size).then_some(ByteRange { start: from, end: self.size }))
    }
}

/// One bit for each cluster of the file: something refers to it.
struct Used {
    bits: Vec<u64>,
    layout: Layout,
    file_size: u64,
    /// First cluster after all that are used.
    end: u64,
}

impl Used {
    /// Marks `bytes` bytes at `offset`, from a reference found at `from`.
    fn mark(
        &mut self,
        structure: &'static str,
        from: u64,
        offset: u64,
        bytes: u64,
    ) -> Result<(), ImageError> {
        let cluster_size = self.layout.cluster_size();
        if !offset.is_multiple_of(cluster_size)
            || offset.checked_add(bytes).is_none_or(|end| end > self.file_size)
        {
            return Err(damaged(
                structure,
                from,
                format!(
                    "it names bytes {offset}..+{bytes}; the file ends at {}, clusters have {cluster_size} bytes",
                    self.file_size
                ),
            ));
        }
        for cluster in offset / cluster_size..(offset + bytes).div_ceil(cluster_size) {
            let bit = 1u64 << (cluster % 64);
            match self.bits.get_mut((cluster / 64) as usize) {
                Some(word) if *word & bit == 0 => *word |= bit,
                _ => {
                    return Err(damaged(
                        structure,
                        from,
                        format!("it names the cluster at {}, which is in use", cluster * cluster_size),
                    ));
                }
            }
            self.end = self.end.max(cluster + 1);
        }
        Ok(())
    }

    fn holds(&self, cluster: u64) -> bool {
        self.bits.get((cluster / 64) as usize).is_some_and(|word| word & (1 << (cluster % 64)) != 0)
    }
}

fn plain(header: &Header, base: Option<&Base>) -> Result<(), ImageError> {
    let refused = [
        (header.layout.version != 3, "version 2"),
        (header.layout.extended, "extended L2 entries"),
        (header.snapshots != 0, "internal snapshots"),
        (header.backing.is_some() && base.is_none(), "a backing file"),
        (header.refcount_order != refcounts::ORDER, "refcounts not of 16 bits"),
        (header.incompatible & DIRTY != 0, "the dirty bit (`qemu-img check -r all` clears it)"),
        (header.incompatible & CORRUPT != 0, "the corrupt bit (`qemu-img check -r all` clears it)"),
        (header.autoclear != 0 || header.bitmaps, "bitmaps or other auto-clear features"),
    ];
    match refused.iter().find(|(present, _)| *present) {
        Some((_, what)) => Err(unsupported(format!("writing to an image with {what}"))),
        None => base.map_or(Ok(()), |base| lies_over(header, base)),
    }
}

/// An overlay over other bytes is another disk: its header must name this base, with its format.
fn lies_over(header: &Header, base: &Base) -> Result<(), ImageError> {
    let expected = base.reference()?;
    if header.backing.as_ref() == Some(&expected) {
        return Ok(());
    }
    let shown = |name: &str, format: Option<&str>| {
        format!(
            "{name:?} of {}",
            format.map_or("no stated format".to_owned(), |format| format!("format {format:?}"))
        )
    };
    let found = match &header.backing {
        Some(found) => shown(&found.name, found.format.as_deref()),
        None => "no backing file".to_owned(),
    };
    Err(ImageError::ParentMismatch {
        format: ImageFormat::Qcow2,
        reason: format!(
            "its header names {found}, expected {}",
            shown(&expected.name, expected.format.as_deref())
        ),
    })
}

fn numbers(file: &dyn BlockDevice, offset: u64, count: u64) -> Result<Vec<u64>, ImageError> {
    let mut bytes = vec![0u8; count as usize * 8];
    file.read_at(offset, &mut bytes)?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|bytes| u64::from_be_bytes(*bytes)).collect())
}

impl Writer {
    /// Goes on with an image that a [`Writer`] began, or a plain one of version 3. Checks all its tables first, and
    /// gives back what a crash leaked.
    pub fn open(file: Arc<dyn GrowableFile>) -> Result<Writer, ImageError> {
        Ok(Writer::going_on_from(examined(file, None)?))
    }

    /// The same with an overlay that [`Writer::create_overlay`] began over `base`. That the bytes of the base are still
    /// those it was begun over is the caller's to know: only its name and format stand in the overlay.
    pub fn open_overlay(file: Arc<dyn GrowableFile>, base: &Base) -> Result<Writer, ImageError> {
        Ok(Writer::going_on_from(examined(file, Some(base))?))
    }
}

/// Checks the image in `file`, frees what leaked, and gives the state to go on from.
fn examined(file: Arc<dyn GrowableFile>, base: Option<&Base>) -> Result<State, ImageError> {
    let now = Now { size: file.len()?, file: file.clone() };
    let header = Header::read(&now)?;
    plain(&header, base)?;
    let layout = header.layout;
    let cluster_size = layout.cluster_size();
    let clusters = now.size.div_ceil(cluster_size);
    if clusters > MAX_CLUSTERS {
        return Err(unsupported(format!("writing to an image of {clusters} clusters; 2^30 are")));
    }
    let mut used =
        Used { bits: vec![0; clusters.div_ceil(64) as usize], layout, file_size: now.size, end: 0 };

    used.mark("header", 0, 0, cluster_size.min(now.size))?;
    let l1_bytes = u64::from(header.l1_entries) * 8;
    used.mark("header", 40, header.l1_offset, l1_bytes)?;
    let table_clusters = u64::from(header.refcount_table_clusters);
    let table_bytes = table_clusters.saturating_mul(cluster_size);
    if table_bytes > MAX_REFCOUNT_TABLE_BYTES || table_bytes == 0 || header.refcount_table_offset == 0 {
        return Err(damaged("header", 48, format!("the refcount table has {table_bytes} bytes")));
    }
    used.mark("header", 48, header.refcount_table_offset, table_bytes)?;

    let l1 = numbers(&now, header.l1_offset, u64::from(header.l1_entries))?;
    for (index, &entry) in l1.iter().enumerate() {
        let at = header.l1_offset + index as u64 * 8;
        let table = layout.l2_table(entry).map_err(|reason| damaged("L1 table entry", at, reason))?;
        let Some(table) = table else { continue };
        used.mark("L1 table entry", at, table, cluster_size)?;
        for (index, &entry) in numbers(&now, table, layout.l2_entries())?.iter().enumerate() {
            let at = table + index as u64 * 8;
            match layout.cluster(entry, 0).map_err(|reason| damaged("L2 table entry", at, reason))? {
                Cluster::Absent | Cluster::Zero { host: None } => {}
                // The last cluster of an image of QEMU may end with the disk.
                Cluster::Data { host } | Cluster::Zero { host: Some(host) } => {
                    let present = now.size.saturating_sub(host).clamp(1, cluster_size);
                    used.mark("L2 table entry", at, host, present)?;
                }
                Cluster::Compressed { .. } | Cluster::Split { .. } => {
                    return Err(unsupported("writing to an image with compressed clusters"));
                }
            }
        }
    }

    let table = numbers(&now, header.refcount_table_offset, table_bytes / 8)?;
    for (index, &block) in table.iter().enumerate() {
        let at = header.refcount_table_offset + index as u64 * 8;
        if block != 0 {
            used.mark("refcount table entry", at, block, cluster_size)?;
        }
    }
    compare(file.as_ref(), &now, header.refcount_table_offset, &table, &used)?;

    let length = used.end * cluster_size;
    file.set_len(length)?;
    file.flush()?;
    Ok(State {
        layout,
        file,
        l1,
        l1_offset: header.l1_offset,
        l1_dirty: None,
        tables: HashMap::new(),
        dirty: BTreeSet::new(),
        refcounts: Refcounts {
            table,
            table_offset: header.refcount_table_offset,
            table_clusters,
            counted: used.end,
            next: used.end,
        },
        wanted_refcount_table: 0,
        base: base.map(|base| Below::new(base.disk.clone())),
        length,
        failed: false,
    })
}

/// Compares refcounts with references; writes those that are too high.
fn compare(
    file: &dyn GrowableFile,
    now: &Now,
    table_offset: u64,
    table: &[u64],
    used: &Used,
) -> Result<(), ImageError> {
    let cluster_size = used.layout.cluster_size();
    let per_block = refcounts::per_block(&used.layout);
    let mut bytes = vec![0u8; cluster_size as usize];
    for (index, &block) in table.iter().enumerate() {
        let first = index as u64 * per_block;
        if block == 0 {
            if first >= used.end {
                continue;
            }
            bytes.fill(0);
        } else {
            now.read_at(block, &mut bytes)?;
        }
        let mut leaked = false;
        for (place, cluster) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(first..) {
            let (found, expected) = (u16::from_be_bytes(*place), u16::from(used.holds(cluster)));
            if found < expected {
                let (structure, at) = match block {
                    0 => ("refcount table entry", table_offset + index as u64 * 8),
                    block => ("refcount block", block),
                };
                return Err(damaged(
                    structure,
                    at,
                    format!(
                        "the refcount of the cluster at {} is 0 and it is in use",
                        cluster * cluster_size
                    ),
                ));
            }
            leaked |= found != expected;
            *place = expected.to_be_bytes();
        }
        if leaked {
            file.write_at(block, &bytes)?;
        }
    }
    let covered = (table.len() as u64).saturating_mul(per_block);
    if covered < used.end {
        return Err(damaged(
            "refcount table",
            table_offset,
            format!("it covers {covered} clusters and {} are in use", used.end),
        ));
    }
    Ok(())
}
