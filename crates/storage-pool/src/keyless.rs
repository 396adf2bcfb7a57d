//! Verifying a folder of which nobody has the keys: a copy at another site, a disk in a shelf.
//!
//! Every hash of the format that needs no key is computed: twin files, records and their chain, bundles, each frame,
//! table and trailer of each pack, and of its parity, which says what of a damaged pack can be rebuilt: its hashes need no key
//! either. Nothing is written: a pack cannot be stored again without the keys, and nothing is written over. What only the root key proves is not: that whoever wrote a file had it, that all packs
//! are there which points need, that nothing was taken from the end of the sequence, and the index, whose hashes are keyed.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use environment::Files;
use model::PoolId;
use prost::Message;

use crate::chunk::PackId;
use crate::error::{Damage, PoolError};
use crate::examine::{self, PackExamination, Reading};
use crate::format::key::KeyFile;
use crate::format::ring::{self, Ring};
use crate::format::{FormatError, bundle, pack, payload, record, twin};
use crate::in_order::in_order;
use crate::pool::{HEADER_NAME, key_name};
use crate::rebuilt::Repaired;
use crate::verify::{VerifyOptions, VerifyProgress};

/// What a look without keys found.
#[derive(Debug, Clone)]
pub struct HashReport {
    /// The pool, as its header says.
    pub pool: PoolId,
    /// Damaged files, in order of name.
    pub damage: Vec<Damage>,
    /// Damaged packs of which parity gives sectors back: whoever reads them with the keys, or copies them, has these.
    pub repairable: Vec<Repaired>,
    /// Packs read.
    pub packs: u64,
    /// Records read.
    pub records: u64,
    /// Index files of which nothing could be proved.
    pub runs: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Whether it was ended early.
    pub is_cancelled: bool,
}

/// Reads every file of a pool that carries a hash which needs no key. Nothing is written and no lock is taken, so files may
/// come and go beside it: what is gone when it is opened is left out.
pub fn verify_hashes(
    files: &Arc<dyn Files>,
    options: &VerifyOptions,
    progress: &mut dyn VerifyProgress,
) -> Result<HashReport, PoolError> {
    let files = &**files;
    let path = files.display(HEADER_NAME);
    let bytes = files.read(HEADER_NAME, twin::MAX_BYTES).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => PoolError::NoPool { path: files.display("") },
        _ => PoolError::io(path.clone(), "read", source),
    })?;
    let header = twin::decode(twin::POOL, &bytes).map_err(|error| error.in_file(path.clone()))?;
    let damaged = |reason: String| PoolError::Damaged { path: path.clone(), offset: 16, reason };
    let content = payload::Header::decode(&header.content[..]).map_err(|error| damaged(error.to_string()))?;
    let pool = PoolId::try_from(&content.pool[..]).map_err(|error| damaged(error.to_string()))?;
    let mut look = Look {
        files,
        report: HashReport {
            pool,
            damage: Vec::new(),
            repairable: Vec::new(),
            packs: 0,
            records: 0,
            runs: 0,
            bytes_read: bytes.len() as u64,
            is_cancelled: false,
        },
    };
    if let Some(error) = header.damage {
        look.add(HEADER_NAME, error);
    }
    look.keys()?;
    look.records()?;
    look.index()?;
    look.packs(options, progress)?;
    Ok(look.report)
}

struct Look<'f> {
    files: &'f dyn Files,
    report: HashReport,
}

impl Look<'_> {
    fn add(&mut self, name: &str, error: FormatError) {
        let (offset, reason) = match error {
            FormatError::Damaged { offset, reason } => (offset, reason),
            FormatError::TooNew(version) => {
                (8, format!("needs pool version {version}, this program reads 1"))
            }
        };
        self.report.damage.push(Damage::File {
            path: self.files.display(name),
            offset,
            reason,
            derived: false,
        });
    }

    /// Names in a folder; one that is not there has none.
    fn names(&self, folder: &str) -> Result<Vec<String>, PoolError> {
        match self.files.list(folder) {
            Ok(entries) => Ok(entries.into_iter().map(|entry| entry.name).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(PoolError::io(self.files.display(folder), "list", source)),
        }
    }

    /// The bytes of a file; what cannot be read is damage, what is gone is nothing.
    fn bytes(&mut self, name: &str, most: u64) -> Option<Vec<u8>> {
        match self.files.read(name, most) {
            Ok(bytes) => {
                self.report.bytes_read += bytes.len() as u64;
                Some(bytes)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                self.add(name, FormatError::at(0, error.to_string()));
                None
            }
        }
    }

    fn keys(&mut self) -> Result<(), PoolError> {
        for name in self.names("keys")? {
            let generation = ring::generation(&name);
            let name = format!("keys/{name}");
            let Some(bytes) = self.bytes(&name, twin::MAX_BYTES) else { continue };
            let magic = if generation.is_some() { twin::RING } else { twin::KEY };
            match twin::decode(magic, &bytes) {
                Err(error) => self.add(&name, error),
                Ok(twin) => {
                    let of = match generation {
                        None => KeyFile::decode(&twin.content)
                            .map(|file| file.pool == self.report.pool && key_name(file.recipient) == name),
                        Some(generation) => Ring::decode(&twin.content)
                            .map(|ring| ring.pool == self.report.pool && ring.generation == generation),
                    };
                    match of {
                        Ok(true) => {}
                        Ok(false) => {
                            let reason = "belongs to another pool, recipient or key generation";
                            self.add(&name, FormatError::at(16, reason));
                        }
                        Err(error) => self.add(&name, error),
                    }
                    if let Some(error) = twin.damage {
                        self.add(&name, error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Every record against its hash, its name and the record before it.
    fn records(&mut self) -> Result<(), PoolError> {
        let numbers: BTreeMap<u64, String> = self
            .names("sequence")?
            .into_iter()
            .filter_map(|name| Some((record::number(&name)?, format!("sequence/{name}"))))
            .collect();
        let mut before: Option<(u64, [u8; 32])> = None;
        let mut expected = 1;
        for (number, name) in numbers {
            for missing in expected..number {
                if missing - expected >= 16 {
                    break;
                }
                self.add(&record::name(missing), FormatError::at(0, "is missing"));
            }
            expected = number.saturating_add(1);
            let Some(bytes) = self.bytes(&name, record::MAX_BYTES) else { continue };
            self.report.records += 1;
            let header = match record::decode(&bytes) {
                Ok((header, ..)) => header,
                Err(error) => {
                    self.add(&name, error);
                    continue;
                }
            };
            if header.pool != self.report.pool || header.number != number {
                let found = format!("is record {} of pool {}", header.number, header.pool);
                self.add(&name, FormatError::at(16, found));
            } else if let Some((last, hash)) = before
                && last.checked_add(1) == Some(number)
                && header.previous != record::UNKNOWN
                && header.previous != hash
            {
                let reason = "does not follow the record before it: one of the two was replaced";
                self.add(&name, FormatError::at(56, reason));
            }
            before = Some((number, *blake3::hash(&bytes).as_bytes()));
        }
        Ok(())
    }

    /// Bundles; runs have only keyed hashes and are counted.
    fn index(&mut self) -> Result<(), PoolError> {
        for name in self.names("index")? {
            let Some(span) = bundle::span(&name) else {
                self.report.runs += u64::from(name.ends_with(".run"));
                continue;
            };
            let name = format!("index/{name}");
            let Some(bytes) = self.bytes(&name, bundle::MAX_BYTES) else { continue };
            match bundle::decode(&bytes) {
                Err(error) => self.add(&name, error),
                Ok((header, ..))
                    if header.pool == self.report.pool && (header.first, header.last) == span => {}
                Ok((header, ..)) => {
                    let found =
                        format!("is of records {} to {} of pool {}", header.first, header.last, header.pool);
                    self.add(&name, FormatError::at(16, found));
                }
            }
        }
        Ok(())
    }

    fn packs(&mut self, options: &VerifyOptions, progress: &mut dyn VerifyProgress) -> Result<(), PoolError> {
        let mut packs: Vec<(PackId, u64)> = Vec::new();
        for folder in self.names("packs")? {
            let folder = format!("packs/{folder}");
            let entries = match self.files.list(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(PoolError::io(self.files.display(&folder), "list", source)),
            };
            for entry in entries {
                match pack::id(&entry.name) {
                    Some(id) if pack::folder(id) == folder => packs.push((id, entry.len)),
                    _ => self.add(
                        &format!("{folder}/{}", entry.name),
                        FormatError::at(0, "is no pack of this folder by its name"),
                    ),
                }
            }
        }
        packs.sort_unstable();
        let total = packs.iter().map(|(_, length)| length).sum();
        let mut done = 0;
        let reading = Reading { proves_all: false, drops_cache: true, pace: options.pace.as_deref() };
        let (files, pool) = (self.files, self.report.pool);
        let read = |(id, _): &(PackId, u64)| match examine::examine(files, pool, *id, reading, None) {
            Err(PoolError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            found => Some(found),
        };
        let seen = |(id, length): &(PackId, u64), found: Option<Result<PackExamination, PoolError>>| {
            done += length;
            let damaged = match found {
                None => Vec::new(),
                Some(found) => {
                    self.report.packs += 1;
                    self.report.bytes_read += length;
                    match found {
                        Err(error) => vec![(0, error.to_string())],
                        Ok(found) => {
                            let sectors = found.sectors.len() as u64;
                            let repairable = (sectors > 0).then_some(Repaired { pack: *id, sectors });
                            self.report.repairable.extend(repairable);
                            found.damaged
                        }
                    }
                }
            };
            for (offset, reason) in damaged {
                self.add(&pack::name(*id), FormatError::at(offset, reason));
            }
            progress.update(done, total)
        };
        let all = in_order(&packs, options.threads, || (), |pack, ()| read(pack), seen);
        self.report.is_cancelled = !all?;
        Ok(())
    }
}
