//! To the original, by difference: overlays over the current images, swapped in by one change of the definition.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use model::{BaseImage, CompletedMachine, PreparedDisk, PreparedMachine, Stop};

use super::note::{self, Note, Overlay, Stamp, remove, short, sync_folder};
use super::rewrite::{Changes, NewSource, rewritten};
use super::{Exchange, Talk, check_room, merge};
use crate::libvirt::claim::Claim;
use crate::libvirt::configuration::{self, dashed};
use crate::libvirt::definition::{self, Disk};
use crate::libvirt::failed;
use crate::libvirt::properties::FILE;
use crate::libvirt::rpc::{Connection, Domain, State};
use crate::{MachineSpec, ProviderError};

/// How long a guest may take to shut down when it is asked to.
const SHUTDOWN: Duration = Duration::from_secs(300);
/// How long another job of the machine is waited for.
const CLAIM: Duration = Duration::from_secs(20);
/// Ends the stem of every file that a recovery makes beside an image; the job's mark follows.
const MARK: &str = ".recovered-";

/// A name beside `file` for what takes its place.
fn beside(file: &Path, job: &str, extension: &str) -> PathBuf {
    let stem = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    // That of an earlier recovery: names do not grow.
    let stem = stem.split(MARK).next().unwrap_or(&stem);
    let dot = if extension.is_empty() { "" } else { "." };
    file.with_file_name(format!("{stem}{MARK}{job}{dot}{extension}"))
}

fn folder_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("/")).to_owned()
}

fn extension(path: &Path) -> String {
    path.extension().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Folders with the images of a machine's disks.
fn folders(disks: &[Disk]) -> BTreeSet<PathBuf> {
    disks.iter().filter_map(|disk| Some(folder_of(Path::new(disk.file.as_deref()?)))).collect()
}

/// Everything that will be made for a recovery, known before the first of it.
struct Layout {
    prepared: Vec<PreparedDisk>,
    overlays: Vec<Overlay>,
    files: Vec<PathBuf>,
    needs: Vec<(PathBuf, u64)>,
    notes: Vec<String>,
}

/// `made` are files of an earlier try: it goes on with them.
fn lay_out(
    talk: &Talk<'_>,
    current: &[Disk],
    chain: &BTreeSet<PathBuf>,
    made: &[PathBuf],
) -> Result<Layout, ProviderError> {
    let job = short(&talk.recovery.job.0);
    let mut layout = Layout {
        prepared: Vec::new(),
        overlays: Vec::new(),
        files: Vec::new(),
        needs: Vec::new(),
        notes: Vec::new(),
    };
    let disks = talk.disks()?;
    for (disk, description, target) in &disks {
        let now = current.iter().find(|now| now.target == *target && now.unprotected.is_none());
        let base = now.and_then(|now| Some((now, PathBuf::from(now.file.as_deref()?))));
        let prepared = match base {
            Some((now, base)) => {
                let file = beside(&base, &job, "qcow2");
                let folder = folder_of(&base);
                layout.needs.push((folder, disk.changed_bytes));
                layout.overlays.push(Overlay {
                    target: target.clone(),
                    file: file.clone(),
                    base: base.clone(),
                    base_format: now.format.clone(),
                    stamp: None,
                });
                let over = BaseImage {
                    path: base.display().to_string(),
                    format: now.format.clone(),
                    folders: chain.iter().map(|folder| folder.display().to_string()).collect(),
                };
                (file, "qcow2".to_owned(), Some(over))
            }
            None => {
                let was = PathBuf::from(description.properties.get(FILE).cloned().unwrap_or_default());
                if !was.is_absolute() {
                    return Err(talk.refused(format!("disk {target} of the point does not say where it was")));
                }
                let is_free = !was.exists() || made.contains(&was);
                let file = if is_free { was } else { beside(&was, &job, &extension(&was)) };
                layout.notes.push(format!(
                    "The machine has no disk {target} now; it comes back as {}.",
                    file.display()
                ));
                layout.needs.push((folder_of(&file), disk.data_bytes));
                layout.files.push(file.clone());
                (file, description.format.clone(), None)
            }
        };
        let (path, format, over) = prepared;
        let is_done = made.contains(&path) && path.exists();
        layout.prepared.push(PreparedDisk {
            disk: disk.disk,
            path: path.display().to_string(),
            format,
            over,
            is_done,
        });
    }
    let is_known = |target: &str| {
        disks.iter().any(|(_, _, known)| known == target)
            || talk.configuration.left_out.iter().any(|left| left.target == target)
    };
    for gone in current.iter().filter(|now| !is_known(&now.target)) {
        layout.notes.push(format!(
            "Disk {} ({}) is not in the point: it is no part of the machine afterwards, and stays where it is.",
            gone.target,
            gone.file.as_deref().unwrap_or(&gone.storage)
        ));
    }
    for left in &talk.configuration.left_out {
        layout.notes.push(format!(
            "Disk {} was left out of the point: it stays as it is now, newer than the rest.",
            left.target
        ));
    }
    Ok(layout)
}

/// Checks everything, writes the note, stops the machine.
pub(super) fn prepare(talk: &mut Talk<'_>, stop: Option<Stop>) -> Result<PreparedMachine, ProviderError> {
    let (id, name) = (talk.recovery.machine, talk.recovery.machine_name.clone());
    let told = |error| failed(&name, &error);
    let _claim = Claim::of(&talk.spec, &talk.settings.notes)?.ok_or_else(|| ProviderError::Locked {
        object: name.clone(),
        reason: "another job of it runs".to_owned(),
    })?;
    let domain = talk.connection.domain(&id.0).map_err(told)?;
    let Some(domain) = domain else { return anew(talk) };
    let state = talk.connection.state(&domain).map_err(told)?;
    let text = talk.connection.definition(&domain, state == State::Off).map_err(told)?;
    let current = definition::disks(&domain.name, &text)?;
    // One that a killed agent left: it is over, because nobody else has the claim.
    settle_all(&mut talk.connection, &talk.spec, &domain, &current, &mut Vec::new())?;
    let running = state != State::Off;
    if running && stop.is_none() {
        return Err(ProviderError::Locked {
            object: name,
            reason: "it runs, and its disks are to be replaced: say how it is stopped first: --stop graceful (the guest is \
                     asked) or --stop now (its power is cut)"
                .to_owned(),
        });
    }
    if !talk.connection.is_persistent(&domain).map_err(told)? {
        return Err(talk.refused(
            "it is transient: libvirt forgets it when it stops, so it cannot be put back; define it first: `virsh dumpxml NAME >F`, \
             `virsh define F`",
        ));
    }
    if talk.connection.has_left(&domain).map_err(told)? {
        return Err(talk.refused("it was migrated to another host, which runs it with these very disks"));
    }
    if !running && talk.connection.has_saved_memory(&domain).map_err(told)? {
        return Err(talk.refused(
            "its memory is saved and would be restored over other disks at its next start: discard it first, \
             `virsh managedsave-remove`",
        ));
    }
    if talk.connection.backup(&domain).map_err(told)?.is_some() {
        return Err(ProviderError::Locked { object: name, reason: "a backup job of it runs".to_owned() });
    }
    let chain = definition::chain_folders(&text);
    let mut layout = lay_out(talk, &current, &chain, &[])?;
    check_room(&name, &layout.needs)?;

    let job = short(&talk.recovery.job.0);
    if let Some(nvram) = definition::nvram(&talk.configuration.definition) {
        layout.files.push(beside(Path::new(&nvram), &job, &extension(Path::new(&nvram))));
    }
    let tpm = configuration::tpm_folder(&talk.settings.tpm, &id.0, &talk.configuration.definition);
    let tpm = tpm.filter(|_| talk.has_tpm()).map(|place| exchange(place, &job));
    // Beside a disk that the machine has: there it is looked for.
    let folder = folders(&current).into_iter().next().ok_or_else(|| {
        talk.refused("the machine has no disk in a file now, beside which the recovery could be noted")
    })?;
    let path = note::in_progress(&folder, id);
    let before = talk.connection.definition(&domain, true).map_err(told)?;
    let mut note = Note {
        job: talk.recovery.job,
        point: talk.recovery.point,
        machine: id,
        overlays: layout.overlays,
        files: layout.files,
        tpm,
        was_running: running,
        before,
        keep_seconds: talk.recovery.keep_seconds,
        until: None,
    };
    note.write(&path)?;
    if running && let Err(error) = halt(&mut talk.connection, &domain, &name, stop) {
        remove(&path)?;
        return Err(error);
    }
    // From here on nobody may write to them.
    for overlay in &mut note.overlays {
        overlay.stamp = Stamp::of(&overlay.base);
    }
    note.write(&path)?;
    Ok(PreparedMachine {
        id,
        name: domain.name,
        disks: layout.prepared,
        stopped: running,
        notes: layout.notes,
    })
}

fn exchange(place: PathBuf, mark: &str) -> Exchange {
    Exchange {
        new: place.with_extension(format!("new-{mark}")),
        old: place.with_extension(format!("old-{mark}")),
        place,
    }
}

/// The machine is not there any more: full images where they were.
fn anew(talk: &mut Talk<'_>) -> Result<PreparedMachine, ProviderError> {
    let name = talk.recovery.machine_name.clone();
    if let Some(other) = talk.connection.domain_named(&name).map_err(|error| failed(&name, &error))? {
        return Err(ProviderError::TargetExists {
            object: name,
            reason: format!(
                "is the name of another machine now (UUID {}), and the original is gone: recover to a host with another \
                 --name",
                dashed(&other.uuid)
            ),
        });
    }
    let id = talk.recovery.machine;
    let first = talk.disks()?.first().and_then(|(_, disk, _)| disk.properties.get(FILE).cloned());
    let path = note::in_progress(&folder_of(Path::new(&first.unwrap_or_default())), id);
    let earlier = Note::read(&path)?.filter(|note| note.point == talk.recovery.point);
    let made = earlier.map(|note| note.files).unwrap_or_default();
    let mut layout = lay_out(talk, &[], &BTreeSet::new(), &made)?;
    layout.notes.insert(0, "The machine is not there any more; it is made again.".to_owned());
    for disk in &layout.prepared {
        if Path::new(&disk.path).to_string_lossy().contains(MARK) {
            return Err(ProviderError::TargetExists {
                object: disk.path.clone(),
                reason: "the machine is gone, and a file stands where one of its disks was: move it away"
                    .to_owned(),
            });
        }
        std::fs::create_dir_all(folder_of(Path::new(&disk.path)))
            .map_err(|error| ProviderError::target(disk.path.clone(), "make its folder", &error))?;
    }
    check_room(&name, &layout.needs)?;
    // Another try of the same point has the same names, so nothing of the first one is left.
    let mark = short(&talk.recovery.point.0);
    if let Some(place) = definition::nvram(&talk.configuration.definition).map(PathBuf::from) {
        // What somebody kept of the machine is not written over.
        let is_free = !place.exists() || made.contains(&place);
        layout.files.push(if is_free { place } else { beside(&place, &mark, &extension(&place)) });
    }
    let tpm = configuration::tpm_folder(&talk.settings.tpm, &id.0, &talk.configuration.definition);
    let note = Note {
        job: talk.recovery.job,
        point: talk.recovery.point,
        machine: id,
        overlays: Vec::new(),
        files: layout.files,
        tpm: tpm.filter(|_| talk.has_tpm()).map(|place| exchange(place, &mark)),
        was_running: false,
        before: String::new(),
        keep_seconds: talk.recovery.keep_seconds,
        until: None,
    };
    note.write(&path)?;
    Ok(PreparedMachine { id, name, disks: layout.prepared, stopped: false, notes: layout.notes })
}

fn halt(
    connection: &mut Connection,
    domain: &Domain,
    name: &str,
    stop: Option<Stop>,
) -> Result<(), ProviderError> {
    let told = |error| failed(name, &error);
    match stop {
        Some(Stop::Now) => connection.destroy(domain).map_err(told)?,
        _ => connection.shut_down(domain).map_err(told)?,
    }
    let began = Instant::now();
    while connection.state(domain).map_err(told)? != State::Off {
        if began.elapsed() > SHUTDOWN {
            return Err(ProviderError::Locked {
                object: name.to_owned(),
                reason: format!(
                    "the guest was asked to shut down and still runs after {} s; nothing was changed: stop it in the guest, \
                     or use --stop now",
                    SHUTDOWN.as_secs()
                ),
            });
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// Swaps the disks by a new definition.
pub(super) fn complete(
    talk: &mut Talk<'_>,
    prepared: &PreparedMachine,
) -> Result<CompletedMachine, ProviderError> {
    let (id, name) = (talk.recovery.machine, prepared.name.clone());
    let told = |error| failed(&name, &error);
    let domain = talk.connection.domain(&id.0).map_err(told)?;
    let mut notes = Vec::new();
    let _claim = claim(talk)?;
    super::check_files(talk, prepared)?;
    let mut path = PathBuf::new();
    let mut note = None;
    if let Some(domain) = &domain {
        let text = talk.connection.definition(domain, true).map_err(told)?;
        for folder in folders(&definition::disks(&name, &text)?) {
            path = note::in_progress(&folder, id);
            note = Note::read(&path)?.filter(|note| note.job == talk.recovery.job);
            if note.is_some() {
                break;
            }
        }
    } else if let Some(first) = prepared.disks.first() {
        path = note::in_progress(&folder_of(Path::new(&first.path)), id);
        note = Note::read(&path)?.filter(|note| note.job == talk.recovery.job);
    }
    let mut disks = BTreeMap::new();
    for (disk, (_, _, target)) in prepared.disks.iter().zip(talk.disks()?) {
        let source = NewSource::File { path: disk.path.clone(), format: disk.format.clone() };
        disks.insert(target, source);
    }
    let domain = match domain {
        // The answer to an earlier call was lost, or it was cut off after the swap.
        Some(domain) if has_all(talk, &domain, prepared)? => domain,
        domain => swap(talk, domain.as_ref(), &name, disks, noted(note.as_ref(), &path)?)?,
    };
    if let Err(error) = talk.connection.set_autostart(&domain, talk.configuration.autostart) {
        notes.push(format!("Whether the host starts it by itself could not be set: {error}."));
    }
    if let Some(note) = note {
        let kept: Vec<String> = note.overlays.iter().map(|over| over.base.display().to_string()).collect();
        let days = note.keep_seconds / 86_400;
        let is_off = talk.connection.state(&domain).map_err(told)? == State::Off;
        match note.tpm.as_ref().is_some_and(|tpm| tpm.new.exists()) && !is_off {
            // Somebody started it after the swap; the sweep ends it when it is off again.
            true => notes.push("The state of its TPM takes its place when the machine is off.".to_owned()),
            false => finish(note, &path)?,
        }
        if !kept.is_empty() {
            notes.push(format!(
                "What the disks were is kept for {days} days: {}; the machine needs these files until then.",
                kept.join(", ")
            ));
        }
    }
    let started = talk.recovery.start;
    if started && talk.connection.state(&domain).map_err(told)? == State::Off {
        talk.connection.start(&domain).map_err(told)?;
    }
    Ok(CompletedMachine { id, name, started, notes })
}

/// Changes the definition to the recovered disks, or makes it again if `domain` is nothing.
fn swap(
    talk: &mut Talk<'_>,
    domain: Option<&Domain>,
    name: &str,
    mut disks: BTreeMap<String, NewSource>,
    note: &Note,
) -> Result<Domain, ProviderError> {
    let told = |error| failed(name, &error);
    let mut nvram = None;
    if let Some(domain) = domain {
        if talk.connection.state(domain).map_err(told)? != State::Off {
            return Err(ProviderError::Changed {
                object: name.to_owned(),
                reason:
                    "the machine was started while its disks were recovered; it goes on with the old ones"
                        .to_owned(),
            });
        }
        let text = talk.connection.definition(domain, true).map_err(told)?;
        let current = definition::disks(name, &text)?;
        let is_base = |overlay: &Overlay| {
            current.iter().any(|disk| {
                disk.target == overlay.target && disk.file.as_deref().map(Path::new) == Some(&*overlay.base)
            })
        };
        if let Some(moved) = note.overlays.iter().find(|overlay| !is_base(overlay)) {
            return Err(ProviderError::Changed {
                object: name.to_owned(),
                reason: format!("disk {} is another file than when the recovery began", moved.target),
            });
        }
        still_as_they_were(note, name)?;
        // Disks that were left out stay what they are now.
        for left in &talk.configuration.left_out {
            let now = current.iter().find(|disk| disk.target == left.target);
            if let Some((now, file)) = now.and_then(|now| Some((now, now.file.clone()?))) {
                disks.insert(left.target.clone(), NewSource::File { path: file, format: now.format.clone() });
            }
        }
        if let Some(old) = definition::nvram(&talk.configuration.definition) {
            let new = beside(Path::new(&old), &short(&talk.recovery.job.0), &extension(Path::new(&old)));
            if talk.write_nvram(&new)? {
                nvram = Some(new.display().to_string());
            }
        }
        if let Some(tpm) = &note.tpm {
            talk.write_tpm(&tpm.new)?;
        }
    } else {
        // Made again: everything goes where it was, or beside what stands there.
        if let Some(place) = definition::nvram(&talk.configuration.definition).map(PathBuf::from) {
            let beside = beside(&place, &short(&note.point.0), &extension(&place));
            let chosen = if note.files.contains(&beside) { beside } else { place };
            if talk.write_nvram(&chosen)? {
                nvram = Some(chosen.display().to_string());
            }
        }
        if let Some(tpm) = &note.tpm {
            talk.write_tpm(&tpm.new)?;
        }
    }
    let changes = Changes {
        name,
        uuid: dashed(&talk.recovery.machine.0),
        disks,
        eject: false,
        nvram,
        network: &talk.recovery.network,
        new_addresses: false,
    };
    let definition = rewritten(&talk.configuration.definition, &changes)?;
    // The moment of the swap.
    let domain = talk.connection.define(&definition).map_err(told)?;
    // One that was made again had nobody to be quicker.
    if !note.before.is_empty() {
        // Somebody was quicker by a moment: then the machine runs from the old disks, and must find them again.
        let is_off = talk.connection.state(&domain).map_err(told)? == State::Off;
        let proved = match is_off {
            true => still_as_they_were(note, name),
            false => Err(ProviderError::Changed {
                object: name.to_owned(),
                reason: "the machine was started in the moment of the swap; it goes on with the old disks"
                    .to_owned(),
            }),
        };
        if let Err(error) = proved {
            talk.connection.define(&note.before).map_err(told)?;
            return Err(error);
        }
    }
    Ok(domain)
}

fn noted<'a>(note: Option<&'a Note>, path: &Path) -> Result<&'a Note, ProviderError> {
    note.ok_or_else(|| ProviderError::Changed {
        object: path.display().to_string(),
        reason: "the note of this recovery is gone: it was given up and swept meanwhile".to_owned(),
    })
}

/// Whether the machine has the disks that were prepared for it.
fn has_all(talk: &mut Talk<'_>, domain: &Domain, prepared: &PreparedMachine) -> Result<bool, ProviderError> {
    let text = talk.connection.definition(domain, true).map_err(|error| failed(&domain.name, &error))?;
    let current = definition::disks(&domain.name, &text)?;
    let mut wanted = prepared.disks.iter().zip(talk.disks()?);
    Ok(wanted.all(|(disk, (_, _, target))| {
        current.iter().any(|now| now.target == target && now.file.as_deref() == Some(&disk.path))
    }))
}

/// The right to touch the machine; somebody who has it for a moment is waited for.
fn claim(talk: &Talk<'_>) -> Result<Claim, ProviderError> {
    let began = Instant::now();
    loop {
        match Claim::of(&talk.spec, &talk.settings.notes)? {
            Some(claim) => return Ok(claim),
            None if began.elapsed() < CLAIM => std::thread::sleep(Duration::from_millis(200)),
            None => {
                return Err(ProviderError::Locked {
                    object: talk.recovery.machine_name.clone(),
                    reason: "another job of it runs".to_owned(),
                });
            }
        }
    }
}

/// Nobody has written to the images below since the machine was stopped, not even for a moment.
fn still_as_they_were(note: &Note, name: &str) -> Result<(), ProviderError> {
    let changed = note
        .overlays
        .iter()
        .find(|overlay| overlay.stamp.is_none() || Stamp::of(&overlay.base) != overlay.stamp);
    match changed {
        None => Ok(()),
        Some(overlay) => Err(ProviderError::Changed {
            object: name.to_owned(),
            reason: format!("somebody wrote to {} while the recovery went on", overlay.base.display()),
        }),
    }
}

/// After the swap: the TPM's state, and the note of what was replaced. Each may have been done already.
fn finish(note: Note, path: &Path) -> Result<(), ProviderError> {
    if let Some(tpm) = &note.tpm
        && tpm.new.exists()
    {
        let moved = |from: &Path, to: &Path| {
            std::fs::rename(from, to)
                .map_err(|error| ProviderError::target(from.display().to_string(), "rename it", &error))
        };
        if tpm.place.exists() && !tpm.old.exists() {
            moved(&tpm.place, &tpm.old)?;
        }
        if tpm.place.exists() {
            // Made anew by the emulator between a kill and now.
            std::fs::remove_dir_all(&tpm.place).map_err(|error| {
                ProviderError::target(tpm.place.display().to_string(), "remove it", &error)
            })?;
        }
        moved(&tpm.new, &tpm.place)?;
        sync_folder(&folder_of(&tpm.place))?;
    }
    note.settle(path, note::now())
}

/// Removes what a recovery made that was not completed.
fn undo(note: &Note, path: &Path) -> Result<(), ProviderError> {
    let made = note.overlays.iter().map(|overlay| &overlay.file).chain(&note.files);
    for file in made {
        for suffix in ["", ".partial", ".partial.state", ".new"] {
            let mut name = file.as_os_str().to_owned();
            name.push(suffix);
            remove(Path::new(&name))?;
        }
    }
    if let Some(tpm) = &note.tpm
        && tpm.new.exists()
    {
        std::fs::remove_dir_all(&tpm.new)
            .map_err(|error| ProviderError::target(tpm.new.display().to_string(), "remove it", &error))?;
    }
    remove(path)
}

/// Ends recoveries of a machine that nobody works at any more: forward if libvirt has the new definition, else back.
fn settle_all(
    connection: &mut Connection,
    machine: &MachineSpec,
    domain: &Domain,
    current: &[Disk],
    removed: &mut Vec<String>,
) -> Result<(), ProviderError> {
    for folder in folders(current) {
        let path = note::in_progress(&folder, machine.id);
        let Some(note) = Note::read(&path)? else { continue };
        if let Some(busy) = note
            .overlays
            .iter()
            .map(|over| &over.file)
            .chain(&note.files)
            .find(|file| crate::target::is_being_filled(file))
        {
            return Err(ProviderError::TargetBusy {
                object: busy.display().to_string(),
                reason: "another recovery of the machine is writing to it".to_owned(),
            });
        }
        // Whatever names a file that was made, a snapshot over it as well, needs it: then the swap has happened.
        let mut is_swapped = false;
        for file in note.overlays.iter().map(|over| &over.file).chain(&note.files) {
            is_swapped |= merge::is_named(connection, file).map_err(|error| failed(&domain.name, &error))?;
        }
        let is_off = connection.state(domain).map_err(|error| failed(&domain.name, &error))? == State::Off;
        if is_swapped && !is_off && note.tpm.as_ref().is_some_and(|tpm| tpm.new.exists()) {
            // The state of a TPM is not exchanged under a running machine.
            continue;
        }
        removed.push(format!(
            "a recovery of {} that was cut off {}",
            domain.name,
            match is_swapped {
                true => "after the swap: it is complete",
                false => "before the swap: the machine is as it was",
            }
        ));
        match is_swapped {
            true => finish(note, &path)?,
            false => {
                undo(&note, &path)?;
                // It was stopped for what did not come about.
                if note.was_running && is_off {
                    connection.start(domain).map_err(|error| failed(&domain.name, &error))?;
                }
            }
        }
    }
    Ok(())
}

/// A recovery that failed: back, and on again if it was stopped for it.
pub(super) fn abandon(talk: &mut Talk<'_>, prepared: &PreparedMachine) -> Result<(), ProviderError> {
    let name = prepared.name.clone();
    let told = |error| failed(&name, &error);
    let _claim = claim(talk)?;
    let Some(domain) = talk.connection.domain(&talk.recovery.machine.0).map_err(told)? else { return Ok(()) };
    let text = talk.connection.definition(&domain, true).map_err(told)?;
    let current = definition::disks(&name, &text)?;
    let began = Instant::now();
    loop {
        match settle_all(&mut talk.connection, &talk.spec, &domain, &current, &mut Vec::new()) {
            // The disk's own order ends a moment later.
            Err(ProviderError::TargetBusy { .. }) if began.elapsed() < CLAIM => {
                std::thread::sleep(Duration::from_millis(200));
            }
            other => return other,
        }
    }
}

/// What a sweep does for recoveries of a machine, whose claim the caller has.
pub(in crate::libvirt) fn sweep(
    connection: &mut Connection,
    machine: &MachineSpec,
    domain: &Domain,
    definition: &str,
    removed: &mut Vec<String>,
) -> Result<(), ProviderError> {
    let current = definition::disks(&domain.name, definition)?;
    match settle_all(connection, machine, domain, &current, removed) {
        // It is at work.
        Err(ProviderError::TargetBusy { .. }) => return Ok(()),
        other => other?,
    }
    for folder in folders(&current) {
        for path in note::replaced(&folder, machine.id) {
            merge::when_due(connection, domain, machine.id, &path, removed)?;
        }
    }
    Ok(())
}
