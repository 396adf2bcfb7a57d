//! Reading and extending the one sequence (section 5).

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use environment::{Files, Randomness};
use prost::Message;

use crate::error::PoolError;
use crate::format::payload::{self, Kind};
use crate::format::record::{self, RecordHeader};
use crate::keys::Keys;
use crate::state::{State, Unreadable};

/// A record as read: header, payload, and the hash of its file.
struct Opened {
    header: RecordHeader,
    payload: Vec<u8>,
    hash: [u8; 32],
}

fn open_bytes(keys: &Keys, number: u64, bytes: &[u8]) -> Result<Opened, String> {
    let describe = |error| match error {
        crate::format::FormatError::TooNew(version) => format!("needs pool version {version}"),
        crate::format::FormatError::Damaged { offset, reason } => format!("byte {offset}: {reason}"),
    };
    let (header, raw, sealed) = record::decode(bytes).map_err(describe)?;
    if header.pool != keys.pool() {
        return Err(format!("belongs to pool {}", header.pool));
    }
    if header.number != number {
        return Err(format!("is record {} under the name of {number}", header.number));
    }
    let key = keys.record(&header.salt).map_err(|error| error.to_string())?;
    let mut payload = sealed.to_vec();
    let length = key
        .open([0; 12], &raw, &mut payload)
        .ok_or("its seal does not fit: forged, or of another key")?
        .len();
    payload.truncate(length);
    Ok(Opened { header, payload, hash: *blake3::hash(bytes).as_bytes() })
}

/// Numbers of the records that are there, ascending.
fn numbers(files: &dyn Files) -> Result<Vec<u64>, PoolError> {
    let entries =
        files.list("sequence").map_err(|source| PoolError::io(files.display("sequence"), "list", source))?;
    let mut numbers: Vec<u64> = entries.iter().filter_map(|entry| record::number(&entry.name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads every record and what follows from them. Records that cannot be read are named in the state.
pub fn load(files: &dyn Files, keys: &Keys) -> Result<State, PoolError> {
    let numbers = numbers(files)?;
    let last = numbers.last().copied().unwrap_or(0);
    let mut read: HashMap<u64, Result<Opened, String>> = HashMap::new();
    let mut hashes: HashMap<u64, [u8; 32]> = HashMap::new();
    for &number in &numbers {
        let name = record::name(number);
        let opened = match files.read(&name, record::MAX_BYTES) {
            Ok(bytes) => {
                hashes.insert(number, *blake3::hash(&bytes).as_bytes());
                open_bytes(keys, number, &bytes)
            }
            Err(error) => Err(error.to_string()),
        };
        read.insert(number, opened);
    }

    // A later record may carry the exact bytes of one whose file is damaged.
    let restored: Vec<(u64, Vec<u8>)> = read
        .values()
        .filter_map(|opened| opened.as_ref().ok())
        .filter(|opened| opened.header.kind == Kind::Restored as u16)
        .filter_map(|opened| payload::Restored::decode(&opened.payload[..]).ok())
        .map(|restored| (restored.number, restored.bytes))
        .collect();
    // The record after a restored one was written either before the damage, and names the true bytes, or after it,
    // and names the damaged ones.
    let mut true_hashes: HashMap<u64, [u8; 32]> = HashMap::new();
    for (number, bytes) in restored {
        let is_damaged = number <= last && read.get(&number).is_none_or(Result::is_err);
        if is_damaged && let Ok(opened) = open_bytes(keys, number, &bytes) {
            true_hashes.insert(number, opened.hash);
            read.insert(number, Ok(opened));
        }
    }

    let mut state = State::default();
    for number in 1..=last {
        let path = files.display(&record::name(number));
        let unreadable = match read.get(&number) {
            None => Some("is missing".to_owned()),
            Some(Err(reason)) => Some(reason.clone()),
            Some(Ok(opened)) => {
                let header = &opened.header;
                let before_is_good = number == 1 || matches!(read.get(&(number - 1)), Some(Ok(_)));
                let follows = if number == 1 {
                    header.previous == [0; 32]
                } else {
                    [&hashes, &true_hashes].iter().any(|map| map.get(&(number - 1)) == Some(&header.previous))
                };
                let applied = state.apply(number, header.epoch, header.time, header.kind, &opened.payload);
                if before_is_good && !follows {
                    // Both are whole and authentic, so neither is dropped; that they do not follow each other means
                    // that one was put back from another copy of the pool.
                    Some("does not follow the record before it: one of the two was replaced".to_owned())
                } else {
                    applied.err()
                }
            }
        };
        if let Some(reason) = unreadable {
            state.unreadable.push(Unreadable { number, path, reason });
        }
    }
    state.head = last;
    state.head_hash = hashes.get(&last).copied().unwrap_or_default();
    Ok(state)
}

/// Appends records for one writer.
pub struct Appender {
    files: Arc<dyn Files>,
    keys: Keys,
    randomness: Arc<dyn Randomness>,
}

impl Appender {
    /// An appender to the pool in `files`.
    pub fn new(files: Arc<dyn Files>, keys: Keys, randomness: Arc<dyn Randomness>) -> Appender {
        Appender { files, keys, randomness }
    }

    /// Makes the next record durable, reads it back and applies it to `state`. Returns its number.
    ///
    /// Only when this returns may anything be acknowledged (INV-2).
    pub fn append(
        &self,
        state: &mut State,
        time: u64,
        kind: Kind,
        payload: &impl Message,
    ) -> Result<u64, PoolError> {
        let number = state.head + 1;
        let name = record::name(number);
        let path = self.files.display(&name);
        let epoch = state.epoch + u64::from(kind == Kind::Takeover);
        let plain = payload.encode_to_vec();

        let mut salt = [0u8; 16];
        self.randomness
            .fill(&mut salt)
            .map_err(|source| PoolError::io(path.clone(), "draw random bytes for", source))?;
        let header = RecordHeader {
            kind: kind as u16,
            pool: self.keys.pool(),
            number,
            epoch,
            time,
            previous: state.head_hash,
            salt,
        };
        let raw = header.encode(plain.len() + crate::keys::TAG);
        let mut sealed = plain.clone();
        self.keys.record(&salt)?.seal([0; 12], &raw, &mut sealed)?;
        let bytes = record::encode(&raw, &sealed);

        let write = || -> io::Result<()> {
            let mut file = self.files.create(&name)?;
            file.append(&bytes)?;
            file.publish()
        };
        write().map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => PoolError::Fenced { number },
            _ => PoolError::io(path.clone(), "write", source),
        })?;

        let back = self
            .files
            .read(&name, record::MAX_BYTES)
            .map_err(|source| PoolError::io(path.clone(), "read back", source))?;
        if back != bytes {
            return Err(PoolError::Damaged {
                path,
                offset: 0,
                reason: "what was read back is not what was written".to_owned(),
            });
        }
        state
            .apply(number, epoch, time, kind as u16, &plain)
            .map_err(|reason| PoolError::Misuse(format!("{path}: {reason}")))?;
        state.head = number;
        state.head_hash = *blake3::hash(&bytes).as_bytes();
        Ok(number)
    }
}

/// The exact bytes of a record, for the catalog's copy.
pub fn raw(files: &dyn Files, number: u64) -> io::Result<Vec<u8>> {
    files.read(&record::name(number), record::MAX_BYTES)
}

/// Whether `bytes` are record `number`, authentic and whole.
pub fn is_record(keys: &Keys, number: u64, bytes: &[u8]) -> bool {
    open_bytes(keys, number, bytes).is_ok()
}
