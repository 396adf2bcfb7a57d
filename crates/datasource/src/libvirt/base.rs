//! What a list of changes can begin with: the checkpoint or the bitmap that the newest point names, if nothing speaks against it.

use std::os::unix::fs::MetadataExt;

use super::CHECKPOINT;
use super::definition::{self, Disk};
use super::monitor::Node;
use super::properties::{FILE, INODE, KEPT, MARK, TARGET};
use super::request::{self, Base, keeps_bitmaps};
use super::rpc::{Checkpoint, Connection, Domain, LibvirtError};
use crate::{DiskDescription, MachineSpec};

/// The file's identity.
pub(super) fn inode(file: &str) -> Option<u64> {
    std::fs::metadata(file).ok().map(|found| found.ino())
}

/// Makes checkpoints known again that the newest point names and libvirt does not: it does not take them along when a machine
/// moves, though the bitmaps move with the images. libvirt proves that the bitmaps are there.
pub(super) fn adopt(
    connection: &mut Connection,
    domain: &Domain,
    machine: &MachineSpec,
    disks: &[Disk],
    since: &[Option<DiskDescription>],
) -> Result<(), LibvirtError> {
    let listed = connection.checkpoints(domain)?;
    let known = |description: &DiskDescription, name: &str| description.properties.get(name).cloned();
    let mut names: Vec<String> = Vec::new();
    for description in since.iter().flatten() {
        let kept = known(description, KEPT).unwrap_or_default();
        let marks = known(description, MARK).into_iter().chain(kept.split(' ').map(str::to_owned));
        names.extend(marks.filter(|mark| mark.starts_with(CHECKPOINT)));
    }
    names.sort();
    names.dedup();
    for name in names.iter().filter(|name| !listed.iter().any(|one| one.0 == **name)) {
        let has_it = |disk: &&Disk| {
            keeps_bitmaps(disk)
                && since.iter().flatten().any(|description| {
                    known(description, TARGET).as_ref() == Some(&disk.target)
                        && (known(description, MARK).as_ref() == Some(name)
                            || known(description, KEPT)
                                .unwrap_or_default()
                                .split(' ')
                                .any(|kept| kept == name))
                })
        };
        let named: Vec<(&str, bool)> =
            disks.iter().filter(has_it).map(|disk| (disk.target.as_str(), true)).collect();
        if named.is_empty() {
            continue;
        }
        let text = request::checkpoint(machine, name, named.into_iter(), true);
        match connection.redefine_checkpoint(domain, &text) {
            // It is gone, or broken: then it is not listed, and the base is found to be gone.
            Err(error) if error.code().is_none() => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// What holds the changes of `disk` since the view of `base`.
pub(super) fn base_of(
    connection: &mut Connection,
    domain: &Domain,
    disk: &Disk,
    node: Result<&Node, &str>,
    base: Option<&DiskDescription>,
) -> Result<Base, LibvirtError> {
    let none = |why: String| Ok(Base::None(why));
    let Some(base) = base else { return none("the newest point does not say since when".to_owned()) };
    let known = |name: &str| base.properties.get(name).map(String::as_str);
    let in_memory = !keeps_bitmaps(disk);
    if in_memory && let Err(why) = node {
        return none(format!(
            "QEMU keeps no list of changes in a {} image, and none in memory: {why}",
            disk.format
        ));
    }
    let Some(mark) = known(MARK) else { return none("the newest point has no checkpoint".to_owned()) };
    if !mark.starts_with(CHECKPOINT) {
        return none(format!("{mark:?} is no checkpoint of ours"));
    }
    let file = disk.file.as_deref().unwrap_or_default();
    let now = inode(file).map(|inode| inode.to_string());
    if known(TARGET) != Some(&disk.target) || known(FILE) != Some(file) || known(INODE) != now.as_deref() {
        return none(format!("disk {} is another file than at the newest point", disk.target));
    }
    let size = match node {
        Ok(node) => node.size,
        Err(_) => connection.block_info(domain, &disk.target)?.capacity,
    };
    if base.size != size {
        return none(format!("disk {} has {size} bytes, {} at the newest point", disk.target, base.size));
    }
    if in_memory {
        return Ok(match node {
            Ok(node) if node.has(mark) => Base::Memory(mark.to_owned()),
            _ => Base::None(format!(
                "QEMU has no bitmap {mark} of disk {} in memory: the machine was started anew, or the disk was moved",
                disk.target
            )),
        });
    }
    let Some(text) = connection.checkpoint_definition(domain, &Checkpoint(mark.to_owned()))? else {
        return none(format!("checkpoint {mark} is gone"));
    };
    if !definition::tracked_disks(&text).contains(&disk.target) {
        return none(format!("checkpoint {mark} has no bitmap of disk {}", disk.target));
    }
    Ok(Base::Checkpoint(mark.to_owned()))
}
