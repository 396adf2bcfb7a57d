//! Reading and extending the one sequence (section 5).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use environment::{Files, NewFile, Randomness};
use prost::Message;
use prost::bytes::Bytes;

use crate::error::PoolError;
use crate::format::FormatError;
use crate::format::payload::{self, Kind};
use crate::format::record::{self, RecordHeader};
use crate::keys::Keys;
use crate::state::{self, State, Unreadable};

/// A record as read: header, payload, and the hash of its file.
struct Opened {
    header: RecordHeader,
    payload: Vec<u8>,
    hash: [u8; 32],
}

/// Why a record cannot be read, and the version it needs if that is why.
struct Closed {
    reason: String,
    needs: Option<u16>,
    /// The key generation that is not known, if that is why.
    generation: Option<u16>,
}

impl From<String> for Closed {
    fn from(reason: String) -> Closed {
        Closed { reason, needs: None, generation: None }
    }
}

fn open_bytes(keys: &Keys, number: u64, bytes: &[u8]) -> Result<Opened, Closed> {
    let (header, raw, sealed) = record::decode(bytes).map_err(|error| match error {
        FormatError::TooNew(version) => {
            Closed { reason: format!("needs pool version {version}"), needs: Some(version), generation: None }
        }
        FormatError::Damaged { offset, reason } => Closed::from(format!("byte {offset}: {reason}")),
    })?;
    if header.pool != keys.pool() {
        return Err(format!("belongs to pool {}", header.pool).into());
    }
    if header.number != number {
        return Err(format!("is record {} under the name of {number}", header.number).into());
    }
    let key = keys.record(header.generation, &header.salt).map_err(|error| Closed {
        reason: error.to_string(),
        needs: None,
        generation: (!keys.knows(header.generation)).then_some(header.generation),
    })?;
    let mut payload = sealed.to_vec();
    let length = key
        .open([0; 12], &raw, &mut payload)
        .ok_or_else(|| "its seal does not fit: forged, or of another key".to_owned())?
        .len();
    payload.truncate(length);
    Ok(Opened { header, payload, hash: *blake3::hash(bytes).as_bytes() })
}

/// Numbers of the records that are there.
pub(crate) fn numbers(files: &dyn Files) -> Result<BTreeSet<u64>, PoolError> {
    let names =
        files.names("sequence").map_err(|source| PoolError::io(files.display("sequence"), "list", source))?;
    Ok(names.iter().filter_map(|name| record::number(name)).collect())
}

/// Header and payload of record `number` in `bytes`, or why it is none.
pub(crate) fn opened(keys: &Keys, number: u64, bytes: &[u8]) -> Result<(RecordHeader, Vec<u8>), String> {
    open_bytes(keys, number, bytes)
        .map(|opened| (opened.header, opened.payload))
        .map_err(|closed| closed.reason)
}

/// Where a reading of the records begins.
#[derive(Default)]
pub(crate) struct Start {
    /// What the records up to `state.head` say.
    pub state: State,
    /// Hash of record `state.head`, if it could be read.
    pub before: Option<[u8; 32]>,
}

/// Reads every record and what follows from them. Records that cannot be read are named in the state. One record is in
/// memory at a time.
pub fn load(files: &dyn Files, keys: &Keys) -> Result<State, PoolError> {
    let numbers = numbers(files)?;
    // A later record may carry the exact bytes of one whose file is damaged: then everything is read again with it in
    // its place.
    let mut restored: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    loop {
        let (state, copies) = fold(files, keys, &numbers, &restored, Start::default());
        let known = restored.len();
        for (number, bytes) in copies {
            let is_damaged = state.unreadable.iter().any(|record| record.number == number);
            if is_damaged && !restored.contains_key(&number) && is_record(keys, number, &bytes) {
                restored.insert(number, bytes);
            }
        }
        if restored.len() == known {
            return Ok(state);
        }
    }
}

/// Reads the records `numbers` after `start`, each from `restored` where it is there, and applies them in order. Also gives
/// the copies of records that records carry.
pub(crate) fn fold(
    files: &dyn Files,
    keys: &Keys,
    numbers: &BTreeSet<u64>,
    restored: &BTreeMap<u64, Vec<u8>>,
    start: Start,
) -> (State, Vec<(u64, Vec<u8>)>) {
    let Start { mut state, mut before } = start;
    let mut copies = Vec::new();
    let path = |number| files.display(&record::name(number));
    let mut head = state.head;
    let mut strays = BTreeSet::new();
    let all: BTreeSet<u64> =
        numbers.iter().chain(restored.keys()).copied().filter(|&number| number > 0).collect();
    for number in all {
        let opened = match restored.get(&number) {
            Some(bytes) => open_bytes(keys, number, bytes),
            None => match files.read(&record::name(number), record::MAX_BYTES) {
                Ok(bytes) => open_bytes(keys, number, &bytes),
                Err(error) => Err(error.to_string().into()),
            },
        };
        let opened = match opened {
            Ok(opened) => opened,
            Err(closed) => {
                let Closed { reason, needs, generation } = closed;
                state.unreadable.push(Unreadable { number, path: path(number), reason, needs, generation });
                // A file far behind the end that is no record does not make the sequence longer.
                if head.checked_add(1) == Some(number) {
                    (head, before) = (number, None);
                } else {
                    strays.insert(number);
                }
                continue;
            }
        };
        for missing in (head + 1..number).filter(|missing| !strays.contains(missing)) {
            let reason = "is missing".to_owned();
            state.unreadable.push(Unreadable {
                number: missing,
                path: path(missing),
                reason,
                needs: None,
                generation: None,
            });
            before = None;
        }
        if head + 1 != number {
            before = None;
        }
        let Opened { header, payload, hash } = opened;
        let follows = match before {
            _ if number == 1 => header.previous == record::UNKNOWN,
            // The writer of this record could not read the one before, or we cannot.
            Some(_) if header.previous == record::UNKNOWN => true,
            Some(before) => header.previous == before,
            None => true,
        };
        if header.kind == Kind::Restored as u16
            && let Ok(copy) = payload::Restored::decode(&payload[..])
        {
            copies.push((copy.number, copy.bytes));
        }
        let wrong = if header.generation < state.generation && header.kind != Kind::Restored as u16 {
            // Whoever may write has the newest root. A copy of a damaged record proves itself.
            Some(format!(
                "is sealed under key generation {} though {} has begun: whoever wrote it has not the newest root key",
                header.generation, state.generation
            ))
        } else {
            // Only who has a generation's root seals under it; the record of the rotation itself may be damaged.
            state.generation = state.generation.max(header.generation);
            // Its copy proves itself, the time it states does not: whoever was removed could end every hold with it.
            let is_older = header.generation < state.generation;
            let time = if is_older { state.last_time } else { header.time };
            let payload = Bytes::from(payload);
            // A bundle's points are not taken apart when they are loaded; what comes from a record's own file is, once.
            let applied =
                if header.kind == Kind::Point as u16 { state::is_whole_point(&payload) } else { Ok(()) }
                    .and_then(|()| state.apply(number, header.epoch, time, header.kind, &payload));
            if follows {
                applied.err()
            } else {
                // Both are whole and authentic, so neither is dropped; that they do not follow each other means that
                // one was put back from another copy of the pool.
                Some("does not follow the record before it: one of the two was replaced".to_owned())
            }
        };
        if let Some(reason) = wrong {
            state.unreadable.push(Unreadable {
                number,
                path: path(number),
                reason,
                needs: None,
                generation: None,
            });
        }
        (head, before) = (number, Some(hash));
    }
    state.unreadable.sort_by_key(|record| record.number);
    state.head = head;
    state.head_hash = before.unwrap_or(record::UNKNOWN);
    (state, copies)
}

/// Appends records for one writer.
pub struct Appender {
    files: Arc<dyn Files>,
    keys: Keys,
    randomness: Arc<dyn Randomness>,
}

/// Where the sequence ends.
#[derive(Debug, Clone, Copy)]
pub struct Tip {
    /// Number of the last record.
    pub head: u64,
    /// Hash of its file, or [`record::UNKNOWN`].
    pub hash: [u8; 32],
    /// Takeovers so far.
    pub epoch: u64,
    /// Key generation that the next record is sealed under.
    pub generation: u16,
}

/// A record that is durable.
pub struct Appended {
    /// Where the sequence ends now.
    pub tip: Tip,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// A record that could not be appended.
pub struct NotAppended {
    /// Why.
    pub error: PoolError,
    /// Whether it may be there all the same, now or after a crash: nothing may be appended before the sequence was
    /// read anew.
    pub is_doubtful: bool,
}

impl From<PoolError> for NotAppended {
    fn from(error: PoolError) -> NotAppended {
        NotAppended { error, is_doubtful: false }
    }
}

impl Appender {
    /// An appender to the pool in `files`.
    pub fn new(files: Arc<dyn Files>, keys: Keys, randomness: Arc<dyn Randomness>) -> Appender {
        Appender { files, keys, randomness }
    }

    /// Makes the record after `tip` durable and reads it back. Only when this returns may anything be acknowledged
    /// (INV-2).
    pub fn append(
        &self,
        tip: Tip,
        time: u64,
        kind: Kind,
        payload: &impl Message,
    ) -> Result<Appended, NotAppended> {
        let number =
            tip.head.checked_add(1).ok_or_else(|| PoolError::Misuse("the sequence is full".to_owned()))?;
        let name = record::name(number);
        let path = self.files.display(&name);
        let epoch = tip.epoch + u64::from(kind == Kind::Takeover);
        let plain = payload.encode_to_vec();

        let mut salt = [0u8; 16];
        self.randomness
            .fill(&mut salt)
            .map_err(|source| PoolError::io(path.clone(), "draw random bytes for", source))?;
        let header = RecordHeader {
            kind: kind as u16,
            generation: tip.generation,
            pool: self.keys.pool(),
            number,
            epoch,
            time,
            previous: tip.hash,
            salt,
        };
        // What would be too long to be read must never be written: it would stand in the way for ever.
        let most = if kind == Kind::Restored { record::MAX_BYTES } else { record::MAX_NEW_BYTES };
        if (plain.len() + record::HEADER + crate::keys::TAG + 32) as u64 > most {
            let reason = format!("{path}: a record of {} bytes, at most {most} are written", plain.len());
            return Err(PoolError::Misuse(reason).into());
        }
        let raw = header.encode(plain.len() + crate::keys::TAG);
        let mut sealed = plain.clone();
        self.keys.record(tip.generation, &salt)?.seal([0; 12], &raw, &mut sealed)?;
        let bytes = record::encode(&raw, &sealed);
        let hash = *blake3::hash(&bytes).as_bytes();

        publish(&*self.files, &name, &bytes).map_err(|failed| match failed {
            Unpublished::Taken => NotAppended::from(PoolError::Fenced { number }),
            Unpublished::Failed(error) => error.into(),
            Unpublished::Doubtful(error) => NotAppended { error, is_doubtful: true },
        })?;

        let doubtful = |error| NotAppended { error, is_doubtful: true };
        let back = self
            .files
            .read(&name, record::MAX_BYTES)
            .map_err(|source| doubtful(PoolError::io(path.clone(), "read back", source)))?;
        if back != bytes {
            return Err(doubtful(PoolError::Damaged {
                path,
                offset: 0,
                reason: "what was read back is not what was written".to_owned(),
            }));
        }
        Ok(Appended { tip: Tip { head: number, hash, epoch, generation: tip.generation }, payload: plain })
    }
}

/// What failed when a file has its name and that may not last.
pub(crate) const NAMING: &str = "make its name durable";

/// Why a file was not published.
pub(crate) enum Unpublished {
    /// The name is taken.
    Taken,
    /// It has no name and never will.
    Failed(PoolError),
    /// It has its name, but that may not last over a crash, and neither may other names in that folder (INV-5).
    Doubtful(PoolError),
}

impl Unpublished {
    /// The error for a caller to whom a taken name is one like others.
    pub(crate) fn into_error(self, path: String) -> PoolError {
        match self {
            Unpublished::Taken => PoolError::Exists { path },
            Unpublished::Failed(error) | Unpublished::Doubtful(error) => error,
        }
    }
}

/// Makes a file of `bytes` durable.
pub(crate) fn publish(files: &dyn Files, name: &str, bytes: &[u8]) -> Result<(), Unpublished> {
    let failed = |source| Unpublished::Failed(PoolError::io(files.display(name), "write", source));
    let mut file = files.create(name).map_err(failed)?;
    file.append(bytes).map_err(failed)?;
    publish_file(files, name, file)
}

/// Gives a written file its name, durably.
pub(crate) fn publish_file(files: &dyn Files, name: &str, file: Box<dyn NewFile>) -> Result<(), Unpublished> {
    let Err(source) = file.publish() else { return Ok(()) };
    if source.kind() == io::ErrorKind::AlreadyExists {
        return Err(Unpublished::Taken);
    }
    let path = files.display(name);
    match files.open(name) {
        // Its bytes could not be synced, or it could not be linked: it is gone with its handle.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Unpublished::Failed(PoolError::io(path, "write", source)))
        }
        _ => Err(Unpublished::Doubtful(PoolError::Io { path, action: NAMING, source })),
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
