//! Bundles: so that opening a pool of ten thousand points does not read ten thousand files (section 5.1).
//!
//! Refuses: bundling past a record that cannot be read, and being believed where the record files say otherwise.
//!
//! Invariants
//! - A bundle is derived: without it everything is read from the records, and the state is the same. (must)
//! - What a bundle covers is read from the record files again before anything is freed, and by every verify. (must:
//!   INV-12)
//! - Bundles that count are disjoint and cover 1 to some number without a gap; a longer one supersedes those inside it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use environment::{Files, Randomness};
use prost::bytes::Bytes;

use crate::error::{Damage, PoolError};
use crate::format::bundle::{self, BundleHeader, Bundled};
use crate::format::{FormatError, record};
use crate::keys::Keys;
use crate::sequence::{self, Unpublished};
use crate::state::{State, Unreadable};
use crate::world::names_in;

/// So many records that are in no bundle get one.
pub const BUNDLE_RECORDS: u64 = 16;

/// Records that a bundle covers, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// The first.
    pub first: u64,
    /// The last.
    pub last: u64,
}

impl Span {
    fn count(self) -> u64 {
        self.last - self.first + 1
    }

    fn name(self) -> String {
        bundle::name(self.first, self.last)
    }

    fn holds(self, other: Span) -> bool {
        self != other && self.first <= other.first && other.last <= self.last
    }
}

/// What the bundles of a pool gave.
#[derive(Default)]
pub(crate) struct Bundles {
    /// State after the last record that they cover.
    pub state: State,
    /// Hash of that record's file.
    pub hash: [u8; 32],
    /// Those that count, in order; the last one ends at `state.head`.
    pub spans: Vec<Span>,
    /// Those that cannot be read.
    pub damage: Vec<Damage>,
}

/// Spans of all bundles that are there.
pub(crate) fn list(files: &dyn Files) -> Result<Vec<Span>, PoolError> {
    let mut spans: Vec<Span> = names_in(files, "index")?
        .iter()
        .filter_map(|name| bundle::span(name))
        .map(|(first, last)| Span { first, last })
        .collect();
    spans.sort_unstable();
    Ok(spans)
}

/// Bundles that lie inside a longer one, by their names alone.
pub(crate) fn superseded_names(files: &dyn Files) -> Result<Vec<String>, PoolError> {
    let spans = list(files)?;
    let inside = spans.iter().filter(|span| spans.iter().any(|other| other.holds(**span)));
    Ok(inside.map(|span| span.name()).collect())
}

/// Bundles that a longer one, which can be read, has made needless.
pub(crate) fn superseded(files: &dyn Files, keys: &Keys) -> Result<Vec<String>, PoolError> {
    let spans = list(files)?;
    let mut needless = Vec::new();
    let outer = spans.iter().filter(|span| !spans.iter().any(|other| other.holds(**span)));
    for outer in outer {
        let inside: Vec<&Span> = spans.iter().filter(|span| outer.holds(**span)).collect();
        let is_believed =
            || open_with_generation(files, keys, *outer).is_ok_and(|(_, found)| found == keys.newest());
        if !inside.is_empty() && is_believed() {
            needless.extend(inside.into_iter().map(|span| span.name()));
        }
    }
    needless.sort_unstable();
    needless.dedup();
    Ok(needless)
}

/// The opened content of a bundle.
fn open(files: &dyn Files, keys: &Keys, span: Span) -> Result<Vec<u8>, PoolError> {
    open_with_generation(files, keys, span).map(|(content, _)| content)
}

fn open_with_generation(files: &dyn Files, keys: &Keys, span: Span) -> Result<(Vec<u8>, u16), PoolError> {
    let name = span.name();
    let path = files.display(&name);
    let bytes =
        files.read(&name, bundle::MAX_BYTES).map_err(|source| PoolError::io(path.clone(), "read", source))?;
    let format = |error: FormatError| error.in_file(path.clone());
    let (header, raw, sealed) = bundle::decode(&bytes).map_err(format)?;
    if header.pool != keys.pool() || (header.first, header.last) != (span.first, span.last) {
        let found = format!("is of records {} to {} of pool {}", header.first, header.last, header.pool);
        return Err(format(FormatError::at(16, found)));
    }
    let mut content = sealed.to_vec();
    let length = keys
        .bundle(header.generation, &header.salt)?
        .open([0; 12], &raw, &mut content)
        .ok_or_else(|| format(FormatError::at(0, "its seal does not fit: forged, or of another key")))?
        .len();
    content.truncate(length);
    Ok((content, header.generation))
}

/// State from the bundles alone. Damage is no error: what bundles do not give is read from the records.
///
/// Believed is only what is sealed under the newest generation that can be reached: a recipient that was removed could still
/// make a bundle of an older one that leaves its removal out.
pub(crate) fn load(files: &dyn Files, keys: &Keys) -> Result<Bundles, PoolError> {
    let mut spans = list(files)?;
    let mut refused = Vec::new();
    let mut found = loop {
        match chain(files, keys, &spans) {
            Ok(found) => break found,
            // It was taken half: begin again without it. A state of its own for each bundle would cost more than all reading.
            Err((wrong, error)) => {
                spans.retain(|span| *span != wrong);
                refused.push(damage_of(files, wrong, &error));
            }
        }
    };
    found.damage.append(&mut refused);
    // A sequence that was put back from another copy has other records under these numbers.
    if let Some(last) = found.spans.last().map(|span| span.last) {
        let is_same =
            sequence::raw(files, last).is_ok_and(|bytes| *blake3::hash(&bytes).as_bytes() == found.hash);
        if !is_same {
            let damage = found.damage;
            return Ok(Bundles { damage, ..Bundles::default() });
        }
    }
    Ok(found)
}

fn damage_of(files: &dyn Files, span: Span, error: &PoolError) -> Damage {
    Damage::File { path: files.display(&span.name()), offset: 0, reason: error.to_string(), derived: true }
}

/// State from the bundles `all`, or the one that cannot be taken although it can be read.
fn chain(files: &dyn Files, keys: &Keys, all: &[Span]) -> Result<Bundles, (Span, PoolError)> {
    let mut found = Bundles::default();
    loop {
        let next = found.state.head + 1;
        let mut candidates: Vec<Span> = all.iter().copied().filter(|span| span.first == next).collect();
        candidates.sort_unstable_by_key(|span| std::cmp::Reverse(span.last));
        let mut is_taken = false;
        for span in candidates {
            match open_with_generation(files, keys, span) {
                Ok((_, generation)) if generation != keys.newest() => {}
                Ok((content, _)) => {
                    found.hash = apply(files, span, &Bytes::from(content), &mut found.state)
                        .map_err(|error| (span, error))?;
                    found.spans.push(span);
                    is_taken = true;
                    break;
                }
                // The deletion service removed it after the listing: a longer one is there.
                Err(PoolError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => found.damage.push(damage_of(files, span, &error)),
            }
        }
        if !is_taken {
            return Ok(found);
        }
    }
}

/// What the sequence says, by its bundles (section 5.1) and the records after them.
///
/// A record that a bundle covers is only looked for, not read: [`sequence::load`] reads every one, and does so before anything is
/// freed and in every verify.
pub(crate) fn load_bundled(
    files: &dyn Files,
    keys: &Keys,
) -> Result<(State, Vec<Span>, Vec<Damage>), PoolError> {
    // Bundles first: they name only records that were there before them.
    let bundles = load(files, keys)?;
    let numbers = sequence::numbers(files)?;
    let covered = bundles.state.head;
    let mut state = bundles.state;
    for number in (1..=covered).filter(|number| !numbers.contains(number)) {
        let path = record_path(files, number);
        state.unreadable.push(Unreadable {
            number,
            path,
            reason: "is missing".to_owned(),
            needs: None,
            generation: None,
        });
    }
    let before = (covered > 0).then_some(bundles.hash);
    let after: BTreeSet<u64> = numbers.into_iter().filter(|&number| number > covered).collect();
    let start = sequence::Start { state, before };
    let (state, copies) = sequence::fold(files, keys, &after, &BTreeMap::new(), start);
    if copies.is_empty() || state.unreadable.is_empty() {
        return Ok((state, bundles.spans, bundles.damage));
    }
    // A restored record takes effect in its own place.
    Ok((sequence::load(files, keys)?, Vec::new(), bundles.damage))
}

/// Takes a bundle's opened content into `state`; gives the hash of its last record's file.
fn apply(files: &dyn Files, span: Span, content: &Bytes, state: &mut State) -> Result<[u8; 32], PoolError> {
    let mut number = span.first;
    let (_, hash) = bundle::records(content, span.count(), |record| {
        state
            .apply(number, record.epoch, record.time, record.kind, &content.slice_ref(record.payload))
            .map_err(|reason| FormatError::at(0, format!("record {number}: {reason}")))?;
        number += 1;
        Ok(())
    })
    .map_err(|error| error.in_file(files.display(&span.name())))?;
    (state.head, state.head_hash) = (span.last, hash);
    Ok(hash)
}

/// Damage of every bundle that is there, also of those that a longer one has made needless.
pub(crate) fn examine(files: &dyn Files, keys: &Keys) -> Result<Vec<Damage>, PoolError> {
    let mut damage = Vec::new();
    for span in list(files)? {
        let wrong = match open(files, keys, span) {
            Ok(content) => bundle::records(&content, span.count(), |_| Ok(()))
                .err()
                .map(|error| error.in_file(files.display(&span.name()))),
            Err(PoolError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(error),
        };
        damage.extend(wrong.map(|error| damage_of(files, span, &error)));
    }
    Ok(damage)
}

/// Writes a bundle up to record `head`, if enough records are in none, and says what the bundles are then.
///
/// `None`: nothing to do, or a record cannot be read; then the records stay what is read.
pub(crate) fn extend(
    files: &dyn Files,
    keys: &Keys,
    randomness: &dyn Randomness,
    spans: &[Span],
    head: u64,
) -> Result<Option<Vec<Span>>, Unpublished> {
    let covered = spans.last().map_or(0, |span| span.last);
    let generation = keys.generation();
    // Beside the ring of a rotation that was cut off nobody would believe it.
    if head.saturating_sub(covered) < BUNDLE_RECORDS || generation != keys.newest() {
        return Ok(None);
    }
    let mut content = Vec::new();
    let mut hash = [0u8; 32];
    let mut last = head;
    for number in covered + 1..=head {
        let Ok(bytes) = sequence::raw(files, number) else { return Ok(None) };
        let Ok((header, payload)) = sequence::opened(keys, number, &bytes) else { return Ok(None) };
        // What does not fit goes into the next one.
        if content.len() + bundle::cost(payload.len()) > bundle::MAX_CONTENT {
            last = number - 1;
            break;
        }
        bundle::push(
            &mut content,
            &Bundled { epoch: header.epoch, time: header.time, kind: header.kind, payload: &payload },
        );
        hash = *blake3::hash(&bytes).as_bytes();
    }
    if last < covered + BUNDLE_RECORDS {
        return Ok(None);
    }
    let mut span = Span { first: covered + 1, last };
    let mut kept = spans.to_vec();
    // Bundles grow as digits carry: every record is written again once for each doubling of their number.
    while let Some(last) = kept.last().copied().filter(|last| last.count() < 2 * span.count()) {
        let Ok(before) = open(files, keys, last) else { break };
        let Ok((records, _)) = bundle::records(&before, last.count(), |_| Ok(())) else { break };
        if records.len() + content.len() > bundle::MAX_CONTENT {
            break;
        }
        let mut joined = Vec::with_capacity(records.len() + content.len() + 64);
        joined.extend_from_slice(records);
        joined.append(&mut content);
        content = joined;
        span.first = last.first;
        kept.pop();
    }
    content.extend_from_slice(&hash);

    let path = || files.display(&span.name());
    let failed = |error: PoolError| Unpublished::Failed(error);
    let mut salt = [0u8; 16];
    randomness
        .fill(&mut salt)
        .map_err(|source| failed(PoolError::io(path(), "draw random bytes for", source)))?;
    let header = BundleHeader { generation, pool: keys.pool(), first: span.first, last: span.last, salt };
    let raw = header.encode(content.len() + crate::keys::TAG);
    keys.bundle(generation, &salt).and_then(|key| key.seal([0; 12], &raw, &mut content)).map_err(failed)?;
    match sequence::publish(files, &span.name(), &bundle::encode(&raw, &content)) {
        Ok(()) => {}
        Err(Unpublished::Taken) => match open_with_generation(files, keys, span) {
            // A process that was killed right after it wrote the same.
            Ok((_, found)) if found == generation => {}
            // One of before a rotation has the name.
            Ok(_) => return extend(files, keys, randomness, spans, span.last - 1),
            Err(_) => return Ok(None),
        },
        Err(other) => return Err(other),
    }
    kept.push(span);
    Ok(Some(kept))
}

/// Name of a record that a bundle covers, for messages.
pub(crate) fn record_path(files: &dyn Files, number: u64) -> String {
    files.display(&record::name(number))
}
