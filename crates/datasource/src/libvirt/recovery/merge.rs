//! The end of what was replaced: the overlay's content goes into the image below, and the machine has its old file again.

use std::path::Path;
use std::time::{Duration, Instant};

use model::{DatasourceId, Network};

use super::note::{self, Note, Overlay, remove};
use super::rewrite::{Changes, NewSource, rewritten};
use crate::ProviderError;
use crate::libvirt::configuration::dashed;
use crate::libvirt::definition;
use crate::libvirt::failed;
use crate::libvirt::rpc::{Connection, Domain, LibvirtError, State};

/// How long a sweep waits for one disk; a later one goes on.
const PATIENCE: Duration = Duration::from_secs(60);

/// Merges what a note names if its time is over and the machine runs: libvirt does it under the running guest.
pub(super) fn when_due(
    connection: &mut Connection,
    domain: &Domain,
    machine: DatasourceId,
    path: &Path,
    removed: &mut Vec<String>,
) -> Result<(), ProviderError> {
    let Some(note) = Note::read(path)? else { return Ok(()) };
    let told = |error: LibvirtError| failed(&domain.name, &error);
    if note.until.is_none_or(|until| until > note::now()) {
        return Ok(());
    }
    if !note.overlays.is_empty() && connection.state(domain).map_err(told)? != State::Running {
        return Ok(());
    }
    let mut note = note;
    while let Some(overlay) = note.overlays.first().cloned() {
        if !merged(connection, domain, &overlay)? {
            return Ok(());
        }
        for other in note::replaced(path.parent().unwrap_or(Path::new("/")), machine) {
            stand_on_base(&other, &overlay, domain)?;
        }
        // Its content is below, and what is written down of it goes first.
        note.overlays.remove(0);
        note.write(path)?;
        remove(&overlay.file)?;
        removed.push(format!(
            "{}, whose content is in {} now",
            overlay.file.display(),
            overlay.base.display()
        ));
    }
    if let Some(tpm) = note.tpm.as_ref().filter(|tpm| tpm.old.exists()) {
        std::fs::remove_dir_all(&tpm.old)
            .map_err(|error| ProviderError::target(tpm.old.display().to_string(), "remove it", &error))?;
    }
    remove(path)
}

/// A later recovery was made over this overlay: what it replaced is in the image below now.
fn stand_on_base(path: &Path, merged: &Overlay, domain: &Domain) -> Result<(), ProviderError> {
    let Some(mut note) = Note::read(path)? else { return Ok(()) };
    let Some(above) = note.overlays.iter_mut().find(|above| above.base == merged.file) else { return Ok(()) };
    above.base.clone_from(&merged.base);
    above.base_format.clone_from(&merged.base_format);
    let source =
        NewSource::File { path: merged.base.display().to_string(), format: merged.base_format.clone() };
    let changes = Changes {
        name: &domain.name,
        uuid: dashed(&domain.uuid),
        disks: [(merged.target.clone(), source)].into(),
        eject: false,
        nvram: None,
        network: &Network::Keep,
        new_addresses: false,
    };
    note.before = rewritten(&note.before, &changes)?;
    note.write(path)
}

/// Whether this run saw the overlay go into the image below, and nothing on the host names it any more.
///
/// Anything else keeps the file: a disk that was given another name, or another machine, still needs it.
fn merged(connection: &mut Connection, domain: &Domain, overlay: &Overlay) -> Result<bool, ProviderError> {
    let told = |error: LibvirtError| failed(&domain.name, &error);
    let text = connection.definition(domain, false).map_err(told)?;
    let disks = definition::disks(&domain.name, &text)?;
    let Some(disk) = disks.iter().find(|disk| disk.target == overlay.target) else { return Ok(false) };
    let is_overlay = |file: &str| same_file(Path::new(file), &overlay.file);
    let top = disk.file.as_deref().filter(|file| is_overlay(file));
    let below = definition::chain_files(&text).into_iter().find(|file| is_overlay(file));
    let (is_top, shown) = match (top, below) {
        (Some(top), _) => (true, top.to_owned()),
        (None, Some(below)) => (false, below),
        (None, None) => return Ok(false),
    };
    // A job that somebody else began is not ours to end.
    if connection.block_job(domain, &overlay.target).map_err(told)?.is_some() {
        return Ok(false);
    }
    let base = overlay.base.display().to_string();
    let layer = (!is_top).then_some(shown.as_str());
    connection.block_commit(domain, &overlay.target, &base, layer).map_err(told)?;
    let began = Instant::now();
    let mut has_pivoted = false;
    while let Some((done, end)) = connection.block_job(domain, &overlay.target).map_err(told)? {
        if is_top && end > 0 && done == end {
            match connection.pivot(domain, &overlay.target) {
                Err(error) if error.code().is_some() && began.elapsed() < PATIENCE => {}
                other => {
                    other.map_err(told)?;
                    has_pivoted = true;
                }
            }
        }
        if began.elapsed() > PATIENCE {
            // Given up: the machine goes on from the overlay, which stays.
            connection.cancel_block_job(domain, &overlay.target).map_err(told)?;
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    if is_top && !has_pivoted {
        return Ok(false);
    }
    Ok(!is_named(connection, &overlay.file).map_err(told)?)
}

/// Whether two paths are one file.
pub(super) fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    a == b || identity(a).is_some_and(|it| Some(it) == identity(b))
}

/// Whether any machine of the host names a file: as a disk, a layer below one, or its firmware's variables, now or at its
/// next start.
pub(super) fn is_named(connection: &mut Connection, file: &Path) -> Result<bool, LibvirtError> {
    for domain in connection.domains()? {
        for inactive in [false, true] {
            let text = match connection.definition(&domain, inactive) {
                // It went meanwhile.
                Err(error) if error.code() == Some(LibvirtError::NO_DOMAIN) => continue,
                text => text?,
            };
            let disks = definition::disks(&domain.name, &text).unwrap_or_default();
            let named = disks.into_iter().filter_map(|disk| disk.file).chain(definition::chain_files(&text));
            let variables = definition::nvram(&text);
            if variables.is_some_and(|variables| same_file(Path::new(&variables), file)) {
                return Ok(true);
            }
            if layers(named.map(Into::into)).iter().any(|layer| same_file(layer, file)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// These files and what their qcow2 headers say is below them.
pub(super) fn layers(files: impl Iterator<Item = std::path::PathBuf>) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for file in files {
        let mut at = Some(file);
        while let Some(file) = at.filter(|file| !found.contains(file) && found.len() < 10_000) {
            at = below(&file);
            found.push(file);
        }
    }
    found
}

/// The backing file that a qcow2 header names.
fn below(file: &Path) -> Option<std::path::PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::FileExt;
    let opened =
        std::fs::File::open(file).ok().filter(|opened| opened.metadata().is_ok_and(|it| it.is_file()))?;
    let mut head = [0; 20];
    opened.read_exact_at(&mut head, 0).ok()?;
    let (offset, length) = (head.get(8..16)?.try_into().ok()?, head.get(16..20)?.try_into().ok()?);
    let (offset, length) = (u64::from_be_bytes(offset), u32::from_be_bytes(length) as usize);
    if head.get(..4)? != b"QFI\xfb" || offset == 0 || length == 0 || length > 1023 {
        return None;
    }
    let mut name = vec![0; length];
    opened.read_exact_at(&mut name, offset).ok()?;
    Some(file.parent()?.join(std::ffi::OsStr::from_bytes(&name)))
}
