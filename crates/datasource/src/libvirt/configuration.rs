//! What a point keeps of a machine beside its disks: definition, firmware variables, state of the emulated TPM.
//!
//! JSON, docs/design/0021. Only this provider reads it again, perhaps on another host and years later.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use super::capacity;
use super::definition::{self, Disk};
use super::rpc::{Connection, Domain, Kept, LibvirtError};
use crate::ProviderError;

/// The form that is written.
const VERSION: u32 = 1;
/// Most bytes of one file. Firmware variables have 64 KiB to 1 MiB, a TPM's state some 10 KiB.
const FILE_BYTES: u64 = 4 << 20;
/// And packed: together with the definition they travel in one message.
const PACKED_BYTES: usize = 512 << 10;
/// Most files of a TPM.
const FILES: usize = 16;
/// Name of the file of firmware variables.
pub(super) const NVRAM: &str = "nvram";
/// Begins the names of the files of a TPM.
pub(super) const TPM: &str = "tpm/";

/// The configuration of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Configuration {
    version: u32,
    /// libvirt's definition.
    pub(super) definition: String,
    /// Whether its host starts it by itself.
    pub(super) autostart: bool,
    files: Vec<KeptFile>,
    /// Disks of the definition that are not in the point.
    pub(super) left_out: Vec<LeftOut>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KeptFile {
    name: String,
    /// zstd, then base64.
    bytes: String,
}

/// A disk that is not in the point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LeftOut {
    /// Its name in the machine.
    pub(super) target: String,
    /// Its bytes, where they could be told.
    pub(super) bytes: Option<u64>,
}

/// UUID with dashes, as libvirt writes it.
pub(super) fn dashed(uuid: &[u8; 16]) -> String {
    let hex = model::DatasourceId(*uuid).to_string();
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default().to_owned();
    [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-")
}

/// The folder in which the emulator of a TPM of this version keeps its state.
pub(super) fn tpm_folder(root: &Path, uuid: &[u8; 16], definition: &str) -> Option<PathBuf> {
    let version = definition::emulated_tpm(definition)?;
    let name = if version == "1.2" { "tpm1.2" } else { "tpm2" };
    Some(root.join(dashed(uuid)).join(name))
}

fn packed(path: &Path) -> Result<String, String> {
    let told = |error: std::io::Error| format!("{}: {error}", path.display());
    // The emulator's user may write to its folder: no link is followed, and nothing is waited for.
    let mut options = std::fs::OpenOptions::new();
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = options.read(true).custom_flags(flags.bits().cast_signed()).open(path).map_err(told)?;
    let found = file.metadata().map_err(told)?;
    if !found.is_file() || found.len() > FILE_BYTES {
        return Err(format!(
            "{}: has {} bytes, files of {FILE_BYTES} are kept at most",
            path.display(),
            found.len()
        ));
    }
    let mut content = Vec::new();
    file.take(FILE_BYTES).read_to_end(&mut content).map_err(told)?;
    let packed = BASE64.encode(zstd::bulk::compress(&content, 9).map_err(told)?);
    if packed.len() > PACKED_BYTES {
        return Err(format!(
            "{}: has {} bytes packed, {PACKED_BYTES} are kept at most",
            path.display(),
            packed.len()
        ));
    }
    Ok(packed)
}

impl Configuration {
    /// The configuration of a machine now, and what could not be had of it.
    ///
    /// `disks` are those of the point.
    pub(super) fn capture(
        connection: &mut Connection,
        domain: &Domain,
        disks: &[Disk],
        tpm: &Path,
    ) -> Result<(Configuration, Vec<String>), LibvirtError> {
        let mut missing = Vec::new();
        let all = |text: &str| definition::disks(&domain.name, text).unwrap_or_default();
        let mut text = connection.definition_to_keep(domain, Kept::NextStart)?;
        let has = |text: &str| {
            let known = all(text);
            disks
                .iter()
                .all(|disk| known.iter().any(|now| now.target == disk.target && now.file == disk.file))
        };
        if !has(&text) {
            // Disks were added or moved since it was started: the running machine is what the point is of.
            text = connection.definition_to_keep(domain, Kept::Running)?;
        }
        let (mut files, mut lost) = (Vec::new(), None);
        let mut keep = |name: String, path: &Path| match packed(path) {
            Ok(bytes) => files.push(KeptFile { name, bytes }),
            Err(why) => missing.push(why),
        };
        if let Some(path) = definition::nvram(&text) {
            keep(NVRAM.to_owned(), Path::new(&path));
        }
        if let Some(folder) = tpm_folder(tpm, &domain.uuid, &text) {
            let mut names: Vec<_> = match std::fs::read_dir(&folder) {
                Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
                Err(error) => {
                    lost = Some(format!("{}: {error}", folder.display()));
                    Vec::new()
                }
            };
            names.sort();
            // A lock is no state.
            names.retain(|path| path.is_file() && path.file_name().is_none_or(|name| name != ".lock"));
            for path in names.iter().take(FILES) {
                let name =
                    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                keep(format!("{TPM}{name}"), path);
            }
        }
        missing.extend(lost);
        let mut left_out = Vec::new();
        for left in all(&text) {
            if !disks.iter().any(|disk| disk.target == left.target) {
                let bytes = capacity::of(connection, domain, &left)?;
                left_out.push(LeftOut { target: left.target, bytes });
            }
        }
        let autostart = connection.autostart(domain)?;
        Ok((Configuration { version: VERSION, definition: text, autostart, files, left_out }, missing))
    }

    /// As a point keeps it.
    pub(super) fn encode(&self) -> Result<String, ProviderError> {
        serde_json::to_string(self).map_err(|error| ProviderError::Format {
            object: "a machine's configuration".to_owned(),
            reason: error.to_string(),
        })
    }

    /// As a point kept it.
    pub(super) fn decode(machine: &str, text: &str) -> Result<Configuration, ProviderError> {
        let wrong = |reason: String| ProviderError::Format {
            object: machine.to_owned(),
            reason: format!("its configuration in the recovery point {reason}"),
        };
        let found: Configuration =
            serde_json::from_str(text).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        if found.version != VERSION {
            return Err(wrong(format!(
                "has version {}, this program knows {VERSION}; recover it with a newer one",
                found.version
            )));
        }
        Ok(found)
    }

    /// The content of one of its files.
    pub(super) fn file(&self, name: &str) -> Result<Option<Vec<u8>>, ProviderError> {
        let Some(kept) = self.files.iter().find(|file| file.name == name) else { return Ok(None) };
        let wrong = |reason: String| ProviderError::Format {
            object: format!("{name} in the recovery point"),
            reason,
        };
        let packed = BASE64.decode(&kept.bytes).map_err(|error| wrong(error.to_string()))?;
        let content = zstd::bulk::decompress(&packed, FILE_BYTES as usize);
        content.map(Some).map_err(|error| wrong(error.to_string()))
    }

    /// Names of its files that begin so.
    pub(super) fn names<'a>(&'a self, begin: &'a str) -> impl Iterator<Item = &'a str> {
        self.files.iter().map(|file| file.name.as_str()).filter(move |name| name.starts_with(begin))
    }

    #[cfg(test)]
    pub(super) fn of(definition: &str, files: &[(&str, &Path)]) -> Configuration {
        let kept = |(name, path): &(&str, &Path)| KeptFile {
            name: (*name).to_owned(),
            bytes: packed(path).unwrap_or_default(),
        };
        Configuration {
            version: VERSION,
            definition: definition.to_owned(),
            autostart: false,
            files: files.iter().map(kept).collect(),
            left_out: Vec::new(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_are_kept_to_the_byte_and_the_text_is_always_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("VARS.fd");
        let content: Vec<u8> = (0..600_000u32).map(|n| if n < 5000 { (n * 7) as u8 } else { 0xff }).collect();
        std::fs::write(&path, &content).unwrap();
        let kept = Configuration::of("<domain/>", &[(NVRAM, &path), ("tpm/tpm2-00.permall", &path)]);
        let text = kept.encode().unwrap();
        assert!(text.len() < 40_000, "{}", text.len());
        assert_eq!(
            text,
            Configuration::of("<domain/>", &[(NVRAM, &path), ("tpm/tpm2-00.permall", &path)])
                .encode()
                .unwrap()
        );
        let found = Configuration::decode("web", &text).unwrap();
        assert_eq!(found, kept);
        assert_eq!(found.file(NVRAM).unwrap().unwrap(), content);
        assert_eq!(found.file("other").unwrap(), None);
        assert_eq!(found.names(TPM).collect::<Vec<_>>(), ["tpm/tpm2-00.permall"]);
    }

    #[test]
    fn a_text_that_is_none_of_ours_is_refused() {
        for (text, word) in [("", "cannot be read"), ("{}", "cannot be read"), ("[1]", "cannot be read")] {
            assert!(Configuration::decode("web", text).unwrap_err().to_string().contains(word), "{text}");
        }
        let newer = Configuration { version: 2, ..Configuration::of("", &[]) };
        let told = Configuration::decode("web", &newer.encode().unwrap()).unwrap_err().to_string();
        assert!(told.contains("newer"), "{told}");
        let mut spoilt = Configuration::of("", &[]);
        spoilt.files.push(KeptFile { name: "nvram".to_owned(), bytes: "AAAA".to_owned() });
        assert!(spoilt.file("nvram").is_err());
    }

    #[test]
    fn uuids_have_dashes() {
        assert_eq!(dashed(&[0x1a; 16]), "1a1a1a1a-1a1a-1a1a-1a1a-1a1a1a1a1a1a");
    }
}
