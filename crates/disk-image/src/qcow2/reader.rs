//! Cluster mapping, for reading.

use std::sync::{Arc, Mutex, PoisonError};

use block_io::{BlockDevice, ByteRange, DeviceError};

use super::backing::{self, BackingFile, Below};
use super::entry::{Layout, State};
use super::header::Header;
use super::tables::Tables;
use super::{Info, compressed, damaged};
use crate::{ImageError, ImageFormat, Parents};

/// Name of the structure in errors.
const OBJECT: &str = "qcow2 image";

/// A compressed cluster: offset and length in the file, and what it decompresses to.
type Decompressed = (u64, u64, Arc<[u8]>);

/// The disk inside a qcow2 image, at its active state.
pub struct Reader {
    file: Arc<dyn BlockDevice>,
    header: Header,
    tables: Tables,
    below: Option<Below>,
    /// The compressed cluster that was read last.
    cluster: Mutex<Option<Decompressed>>,
}

fn open_below(backing: BackingFile) -> Result<Below, ImageError> {
    let BackingFile { file, format, parents, depth } = backing;
    Ok(Below::new(match format {
        ImageFormat::Raw => file,
        ImageFormat::Qcow2 => Arc::new(Reader::open_at(file, parents.as_ref(), depth)?),
        ImageFormat::Vhd => Arc::new(crate::vhd::Reader::open(file, parents.as_ref())?),
        ImageFormat::Vhdx => Arc::new(crate::vhdx::Reader::open(file, parents.as_ref())?),
    }))
}

impl Reader {
    /// Opens the image in `file`, and through `parents` the chain of backing files below it.
    pub fn open(file: Arc<dyn BlockDevice>, parents: &dyn Parents) -> Result<Reader, ImageError> {
        Reader::open_at(file, parents, 0)
    }

    /// The same with `depth` images above it.
    fn open_at(
        file: Arc<dyn BlockDevice>,
        parents: &dyn Parents,
        depth: usize,
    ) -> Result<Reader, ImageError> {
        let header = Header::read(file.as_ref())?;
        check_l1(&header, file.as_ref())?;
        let below = match &header.backing {
            Some(backing) => Some(open_below(backing::find(backing, parents, depth)?)?),
            None => None,
        };
        let tables = Tables::new(file.clone());
        Ok(Reader { file, header, tables, below, cluster: Mutex::new(None) })
    }

    /// What the image says about itself.
    pub fn info(&self) -> Info {
        self.header.info()
    }

    fn layout(&self) -> &Layout {
        &self.header.layout
    }

    /// The state of the byte at `offset`, which lies in the disk, and the end of the bytes that share it in its
    /// cluster, or in its L2 table if there is none.
    fn piece(&self, offset: u64) -> Result<(State, u64), DeviceError> {
        let layout = self.layout();
        // No overflow: the L1 table lies in the file and was found large enough for the disk.
        let l1_entry = self.tables.entry(self.header.l1_offset + layout.l1_index(offset) * 8)?;
        let table = layout
            .l2_table(l1_entry)
            .map_err(|reason| self.damage(offset, layout.table_end(offset), format!("L1 entry {reason}")))?;
        let Some(table) = table else {
            return Ok((State::Through, layout.table_end(offset)));
        };
        let at = table + layout.l2_index(offset) * layout.entry_size();
        let entry = self.tables.entry(at)?;
        let bitmap = if layout.extended { self.tables.entry(at + 8)? } else { 0 };
        let cluster = layout.cluster(entry, bitmap).map_err(|reason| {
            self.damage(offset, layout.cluster_end(offset), format!("L2 entry at {at}: {reason}"))
        })?;
        let (state, length) = cluster.state(offset % layout.cluster_size(), layout);
        Ok((state, offset.saturating_add(length).min(layout.size)))
    }

    /// As `piece`, with the pieces that go on in the same state before `limit`; data must go on in the file too.
    fn run(&self, offset: u64, limit: u64) -> Result<(State, u64), DeviceError> {
        let (state, mut end) = self.piece(offset)?;
        while end < limit && !matches!(state, State::Compressed { .. }) {
            let expected = match state {
                State::Data(host) => State::Data(host.saturating_add(end - offset)),
                other => other,
            };
            // Damage further on belongs to the call that asks for those bytes.
            let Ok((next, next_end)) = self.piece(end) else { break };
            if next != expected {
                break;
            }
            end = next_end;
        }
        Ok((state, end.min(limit)))
    }

    fn damage(&self, offset: u64, end: u64, reason: String) -> DeviceError {
        DeviceError::Damaged { object: OBJECT.to_owned(), offset, length: end.saturating_sub(offset), reason }
    }

    fn read_data(&self, offset: u64, host: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let length = buf.len() as u64;
        if host.checked_add(length).is_none_or(|end| end > self.file.size()) {
            return Err(self.damage(
                offset,
                offset + length,
                format!("its data lies at {host}..+{length} and the file ends at {}", self.file.size()),
            ));
        }
        self.file.read_at(host, buf)
    }

    /// The decompressed cluster that holds the byte at `offset` of the disk.
    fn read_cluster(&self, offset: u64, host: u64, length: u64) -> Result<Arc<[u8]>, DeviceError> {
        if let Some((at, of, bytes)) = &*self.cluster.lock().unwrap_or_else(PoisonError::into_inner)
            && (*at, *of) == (host, length)
        {
            return Ok(bytes.clone());
        }
        let layout = self.layout();
        let cluster_size = layout.cluster_size();
        let fail = |reason| {
            let start = offset / cluster_size * cluster_size;
            self.damage(start, layout.cluster_end(offset), reason)
        };
        // The last sector of the stream need not be there in full.
        let present = self.file.size().saturating_sub(host).min(length);
        if present == 0 {
            return Err(fail(format!(
                "its compressed cluster lies at {host} and the file ends at {}",
                self.file.size()
            )));
        }
        let mut input = vec![0u8; present as usize];
        self.file.read_at(host, &mut input)?;
        let bytes: Arc<[u8]> = compressed::decompress(self.header.compression, &input, cluster_size as usize)
            .map_err(|reason| fail(format!("the compressed cluster at {host}: {reason}")))?
            .into();
        *self.cluster.lock().unwrap_or_else(PoisonError::into_inner) = Some((host, length, bytes.clone()));
        Ok(bytes)
    }
}

impl BlockDevice for Reader {
    fn size(&self) -> u64 {
        self.header.layout.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size())?;
        let end = offset + buf.len() as u64;
        let (mut at, mut rest) = (offset, buf);
        while at < end {
            let (state, run_end) = self.run(at, end)?;
            let (part, after) = rest.split_at_mut((run_end - at) as usize);
            match state {
                State::Zero => part.fill(0),
                State::Through => match &self.below {
                    Some(below) => below.read(at, part)?,
                    None => part.fill(0),
                },
                State::Data(host) => self.read_data(at, host, part)?,
                State::Compressed { host, length } => {
                    let cluster = self.read_cluster(at, host, length)?;
                    let within = (at % self.layout().cluster_size()) as usize;
                    if let Some(bytes) = cluster.get(within..within + part.len()) {
                        part.copy_from_slice(bytes);
                    }
                }
            }
            (at, rest) = (run_end, after);
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        let size = self.size();
        let mut at = from;
        while at < size {
            // One L2 table at a time, so that a caller gets answers at an even pace.
            let (state, end) = self.run(at, self.layout().table_end(at))?;
            match (state, &self.below) {
                (State::Data(_) | State::Compressed { .. }, _) => {
                    return Ok(Some(ByteRange { start: at, end }));
                }
                (State::Through, Some(below)) => {
                    if let Some(found) = below.next_allocated(at)?
                        && found.start < end
                    {
                        return Ok(Some(ByteRange { start: found.start, end: found.end.min(end) }));
                    }
                }
                (State::Through, None) | (State::Zero, _) => {}
            }
            at = end;
        }
        Ok(None)
    }
}

/// Checks every L1 entry that the disk uses: its L2 table lies in the file, and no other entry names the same.
///
/// Without the second check a small file could describe a disk whose tables take years to walk. The table is read in
/// pieces; offsets of the used entries are kept for the moment, fewer than the file has clusters and than 4 Mi.
fn check_l1(header: &Header, file: &dyn BlockDevice) -> Result<(), ImageError> {
    let layout = &header.layout;
    let entries = layout.l1_entries();
    let mut used = Vec::new();
    let mut piece = vec![0u8; 64 << 10];
    let mut at = 0;
    while at < entries {
        let count = (entries - at).min(piece.len() as u64 / 8);
        let bytes = piece.get_mut(..count as usize * 8).unwrap_or_default();
        let start = header.l1_offset + at * 8;
        file.read_at(start, bytes)?;
        for (index, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let offset = start + index as u64 * 8;
            let table = layout
                .l2_table(u64::from_be_bytes(*entry))
                .map_err(|reason| damaged("L1 table entry", offset, reason))?;
            let Some(table) = table else { continue };
            if table.checked_add(layout.cluster_size()).is_none_or(|end| end > file.size()) {
                return Err(damaged(
                    "L1 table entry",
                    offset,
                    format!("its L2 table lies at {table} and the file ends at {}", file.size()),
                ));
            }
            used.push((table, offset));
        }
        at += count;
    }
    used.sort_unstable();
    match used.windows(2).find(|pair| matches!(pair, [(a, _), (b, _)] if a == b)) {
        Some([(table, first), (_, second)]) => Err(damaged(
            "L1 table entry",
            *first.max(second),
            format!("its L2 table at {table} is also that of the entry at {}", first.min(second)),
        )),
        _ => Ok(()),
    }
}
