//! Going on with an image that exists: log replay into the file, and finding where its structures end.

use std::sync::Arc;

use block_io::{BlockDevice, GrowableFile};

use super::bat::State as BlockState;
use super::guid::derived;
use super::mapping::{Mapping, Place};
use super::reader::Opened;
use super::writer::{Ids, Live, Session, State, Writer};
use super::{MAX_FILE, MIB, damaged, unsupported};
use crate::{ImageError, Parents};

impl Writer {
    /// Opens an image to go on writing. A log that is in use is replayed into the file.
    ///
    /// The new `FileWriteGuid` and `DataWriteGuid` of this session follow from the old ones. Who may go on with two
    /// copies of one image gives own ids instead: [`Writer::open_with_ids`].
    pub fn open(file: Arc<dyn GrowableFile>, parents: &dyn Parents) -> Result<Writer, ImageError> {
        Writer::open_for(file, parents, None)
    }

    /// The same with new ids of the caller; the disk keeps its own, so `ids.virtual_disk` is not used.
    pub fn open_with_ids(
        file: Arc<dyn GrowableFile>,
        parents: &dyn Parents,
        ids: Ids,
    ) -> Result<Writer, ImageError> {
        Writer::open_for(file, parents, Some(ids))
    }

    fn open_for(
        file: Arc<dyn GrowableFile>,
        parents: &dyn Parents,
        ids: Option<Ids>,
    ) -> Result<Writer, ImageError> {
        let opened = Opened::read(Live::new(file.clone())?)?;
        let header = opened.current.header.clone();
        if u64::from(header.log_length) < MIB {
            return Err(unsupported(format!("writing with a log of {} bytes", header.log_length)));
        }
        if opened.file.size() > MAX_FILE {
            return Err(unsupported(format!("writing to a file of {} bytes", opened.file.size())));
        }
        let parent = opened.parent(parents, 1)?;
        let info = opened.info();
        let new = |old, purpose| derived(old, header.sequence, purpose);
        let session = Session {
            file_write: ids.map_or_else(|| new(&header.file_write_guid, "file"), |ids| ids.file_write),
            data_write: ids.map_or_else(|| new(&header.data_write_guid, "data"), |ids| ids.data_write),
        };
        let (geometry, bat) = (opened.geometry, opened.regions.bat.start);
        let taken = opened.regions.all.clone();
        let replayed = opened.file;
        // Looked through before anything is written: a damaged image is refused as it is.
        let seen = Mapping::new(replayed, geometry, bat, taken.clone(), None);
        let end = find_end(&seen)?;
        let replayed = seen.file;
        let size = replayed.size();
        let extents: Vec<_> =
            replayed.extents().map(|(range, bytes)| (range, bytes.map(<[u8]>::to_vec))).collect();
        let live = replayed.into_below();
        let mut state = State {
            mapping: Mapping::new(live, geometry, bat, taken, parent.map(|parent| parent as _)),
            header,
            slot: opened.current.slot,
            end,
            free: Vec::new(),
            freed: Vec::new(),
            session: Some(session),
            failed: false,
        };
        if state.header.log_in_use() {
            // First the new id, with the log still in use: a stop from here on leaves the replay to the next opener.
            state.header.file_write_guid = session.file_write;
            state.update_header(state.header.log_guid)?;
            state.mapping.file.set_length(size.next_multiple_of(MIB))?;
            for (range, bytes) in extents {
                match bytes {
                    Some(bytes) => file.write_at(range.start, &bytes)?,
                    None => file.punch(range)?,
                }
            }
            file.flush()?;
            state.update_header([0; 16])?;
            state.update_header([0; 16])?;
        }
        Ok(Writer::from_state(info, state))
    }
}

/// First byte after all structures. Refuses blocks that share a place: writing to one would change the other.
fn find_end<F: BlockDevice>(mapping: &Mapping<F>) -> Result<u64, ImageError> {
    let geometry = mapping.geometry;
    let mut used = vec![0u64; (mapping.file.size().div_ceil(MIB * 64)) as usize + 1];
    let mut end = mapping.taken.iter().map(|range| range.end).max().unwrap_or(MIB).max(MIB);
    let mut take = |block: u64, start: u64, length: u64| -> Result<(), ImageError> {
        for mib in start / MIB..(start + length).div_ceil(MIB) {
            let Some(word) = used.get_mut((mib / 64) as usize) else { continue };
            let bit = 1u64 << (mib % 64);
            if *word & bit != 0 {
                let at = mapping.entry_offset(geometry.payload_entry(block));
                return Err(damaged("BAT", at, format!("byte {} of the file has two owners", mib * MIB)));
            }
            *word |= bit;
        }
        Ok(())
    };
    let mut last_bitmap = None;
    let mut block = 0;
    while block < geometry.blocks() {
        if let Some(next) = mapping.skip_empty_page(block)? {
            block = next;
            continue;
        }
        let payload = match mapping.place(block)? {
            Place::Here(payload) | Place::Mixed { payload, .. } => {
                take(block, payload, geometry.used_bytes(block))?;
                Some(payload)
            }
            // An undefined or unmapped block may keep its place for a program that shows its old content.
            Place::Zeros => match mapping.payload_entry(block)? {
                entry if matches!(entry.state, BlockState::Undefined | BlockState::Unmapped) => {
                    Some(entry.offset)
                }
                _ => None,
            },
            Place::Parent => None,
        };
        if let Some(payload) = payload.filter(|payload| *payload < mapping.file.size()) {
            end = end.max(payload + geometry.block);
        }
        let chunk = block / geometry.ratio();
        if geometry.differencing && last_bitmap != Some(chunk) {
            last_bitmap = Some(chunk);
            if let Some(bitmap) = mapping.bitmap_block(block)? {
                take(block, bitmap, MIB)?;
                end = end.max(bitmap + MIB);
            }
        }
        block += 1;
    }
    Ok(end)
}
