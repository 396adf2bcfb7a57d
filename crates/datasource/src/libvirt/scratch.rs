//! What a backup of a running machine needs on its host: a folder with scratch files and a socket, and room for them.

use std::collections::BTreeSet;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use block_io::DiskFile;
use disk_image::ImageFormat;
use disk_image::probe::{self, NewDisk};

use rustix::fs::{AtFlags, Dir, Mode, OFlags};

use super::definition;
use super::rpc::{Connection, Domain, LibvirtError};
use super::volumes::{RESERVE, free};
use crate::{MachineSpec, ProviderError};

/// Begins the name of every folder with scratch files and a socket of ours; the beginning of the machine's id and the job's id follow.
const FOLDER: &str = ".stillpoint-";
/// The socket's name in it.
pub(super) const SOCKET: &str = "nbd.sock";
/// Ends the names of scratch files.
pub(super) const SCRATCH: &str = ".qcow2";
/// A socket's path has at most 107 bytes on Linux.
pub(super) const SOCKET_PATH: usize = 107;

/// Makes the folders that QEMU writes to: its user's, whom the running machine's image belongs to, and nobody else's.
pub(super) fn make_folders(files: &[PathBuf], image: &str) -> Result<(), ProviderError> {
    let owner =
        std::fs::metadata(image).map_err(|error| ProviderError::source(image, "look at it", &error))?;
    for file in files {
        let Some(folder) = file.parent() else { continue };
        let made = match std::fs::DirBuilder::new().mode(0o700).create(folder) {
            // One that was made a moment ago; anybody may write to some of the folders around.
            Err(error)
                if error.kind() == std::io::ErrorKind::AlreadyExists && is_private(folder, owner.uid()) =>
            {
                continue;
            }
            made => made,
        };
        made.and_then(|()| std::os::unix::fs::chown(folder, Some(owner.uid()), Some(owner.gid()))).map_err(
            |error| {
                ProviderError::source(folder.display().to_string(), "make a folder for scratch space", &error)
            },
        )?;
    }
    Ok(())
}

/// Whether a folder is one, no link to one, and nobody else's.
fn is_private(folder: &Path, owner: u32) -> bool {
    let own = rustix::process::geteuid().as_raw();
    std::fs::symlink_metadata(folder)
        .is_ok_and(|found| found.is_dir() && [owner, own].contains(&found.uid()) && found.mode() & 0o077 == 0)
}

/// Makes the scratch files, each an empty qcow2 image of exactly its disk's size: QEMU lays the view over the disk with it.
pub(super) fn make_files<'a>(
    files: impl Iterator<Item = (&'a PathBuf, &'a u64)>,
    image: &str,
) -> Result<(), ProviderError> {
    let owner =
        std::fs::metadata(image).map_err(|error| ProviderError::source(image, "look at it", &error))?;
    for (path, size) in files {
        let shown = path.display().to_string();
        let failed = |error: std::io::Error| ProviderError::source(&shown, "make a scratch file", &error);
        let file = DiskFile::create(path).map_err(failed)?;
        let new =
            NewDisk { size: *size, logical_sector_size: 512, fixed: false, ids: [[0; 16]; 3], created: 0 };
        let made = probe::create_writer(ImageFormat::Qcow2, Arc::new(file), &new);
        made.map_err(|error| ProviderError::from_target_image(&shown, error))?
            .flush()
            .map_err(|error| ProviderError::from_target_device(&shown, &error))?;
        std::os::unix::fs::lchown(path, Some(owner.uid()), Some(owner.gid())).map_err(failed)?;
    }
    Ok(())
}

/// Removes files of a job that is over.
pub(super) fn remove(files: &[PathBuf]) {
    for file in files {
        let _ = std::fs::remove_file(file);
    }
    for folder in files.iter().filter_map(|file| file.parent()) {
        if is_marked(folder) {
            // Only when nothing is in it any more.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Begins the names of the folders of one machine. Short, because a socket's path must be.
pub(super) fn own_mark(machine: &MachineSpec) -> String {
    format!("{FOLDER}{}-", machine.id.to_string().get(..8).unwrap_or_default())
}

/// Removes what killed jobs of a machine left in these folders. Nobody else may have a view of it.
///
/// Anybody may write to some of these folders, so a name proves nothing: no link is followed, and only what QEMU makes for us goes.
pub(super) fn remove_left(machine: &MachineSpec, folders: &BTreeSet<PathBuf>) -> Vec<String> {
    let mark = own_mark(machine);
    let mut removed = Vec::new();
    for entry in folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&mark) && empty_and_remove(&entry.path()).is_ok() {
            removed.push(entry.path().display().to_string());
        }
    }
    removed
}

fn empty_and_remove(folder: &Path) -> std::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(folder, flags, Mode::empty())?;
    for entry in Dir::read_from(&opened)? {
        let name = entry?.file_name().to_owned();
        let text = name.to_string_lossy();
        if text == SOCKET || text.ends_with(SCRATCH) {
            rustix::fs::unlinkat(&opened, &*name, AtFlags::empty())?;
        }
    }
    // Of a link, or of what is not empty, nothing goes.
    std::fs::remove_dir(folder)
}

/// Whether a folder is one of ours.
pub(super) fn is_marked(folder: &Path) -> bool {
    folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(FOLDER))
}

/// Ends the job before its scratch space is full: QEMU would fail the guest's own writes then.
pub(super) struct Reserve {
    stop: mpsc::Sender<()>,
}

/// The folder that a job's own folder is in.
pub(super) fn around(file: &Path) -> &Path {
    file.parent().and_then(Path::parent).unwrap_or(Path::new("/"))
}

/// Whether a backup job, as libvirt describes it, writes to these files.
pub(super) fn writes_to(job: &str, files: &[PathBuf]) -> bool {
    let named = definition::files_of(job);
    files.iter().all(|file| named.iter().any(|name| Path::new(name) == file))
}

/// Whether a backup job runs that writes to these files.
pub(super) fn is_ours(
    connection: &mut Connection,
    domain: &Domain,
    files: &[PathBuf],
) -> Result<bool, LibvirtError> {
    Ok(connection.backup(domain)?.is_some_and(|job| writes_to(&job, files)))
}

impl Reserve {
    pub(super) fn watch(connection: Connection, domain: Domain, files: Vec<PathBuf>) -> Reserve {
        let (stop, stopped) = mpsc::channel();
        std::thread::spawn(move || {
            let mut connection = connection;
            while stopped.recv_timeout(Duration::from_millis(500)) == Err(mpsc::RecvTimeoutError::Timeout) {
                if files.iter().any(|file| free(around(file)).is_ok_and(|free| free < RESERVE)) {
                    // Only what is ours: the same order would end a migration.
                    let ours = is_ours(&mut connection, &domain, &files);
                    if matches!(ours, Ok(false)) {
                        return;
                    }
                    if connection.abort_job(&domain).is_err()
                        && let Ok(another) = connection.another()
                    {
                        connection = another;
                        continue;
                    }
                    return;
                }
            }
        });
        Reserve { stop }
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        // A thread that ended by itself needs no word.
        let _ = self.stop.send(());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{LibvirtSource, Source};

    #[test]
    fn only_our_own_files_go_and_no_link_is_followed() {
        let room = tempfile::tempdir().unwrap();
        let machine = MachineSpec {
            id: model::DatasourceId([0xab; 16]),
            name: "web".to_owned(),
            source: Source::Libvirt(LibvirtSource::default()),
        };
        let path = |name: &str| room.path().join(name);
        let file = |name: &str| {
            std::fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            std::fs::write(path(name), b"x").unwrap();
        };
        let (ours, others, foreign, link) = (
            ".stillpoint-abababab-1",
            ".stillpoint-cdcdcdcd-1",
            ".stillpoint-abababab-2",
            ".stillpoint-abababab-3",
        );
        for name in ["0.qcow2", "nbd.sock"] {
            file(&format!("{ours}/{name}"));
            file(&format!("{others}/{name}"));
        }
        file(&format!("{foreign}/letter"));
        file("kept/0.qcow2");
        std::os::unix::fs::symlink(path("kept"), path(link)).unwrap();

        let removed = remove_left(&machine, &[room.path().to_owned()].into());
        assert_eq!(removed, [path(ours).display().to_string()]);
        for left in [format!("{others}/0.qcow2"), format!("{foreign}/letter"), "kept/0.qcow2".to_owned()] {
            assert!(path(&left).exists(), "{left}");
        }
    }

    #[test]
    fn folders_are_for_one_user_and_go_with_their_files() {
        use std::os::unix::fs::PermissionsExt;
        let room = tempfile::tempdir().unwrap();
        let image = room.path().join("image");
        std::fs::write(&image, b"").unwrap();
        let folder = room.path().join(".stillpoint-abababab-1");
        let files = [folder.join("0.qcow2"), folder.join(SOCKET)];
        make_folders(&files, &image.display().to_string()).unwrap();
        assert_eq!(std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        std::fs::write(&files[0], b"").unwrap();
        remove(&files);
        assert!(!folder.exists());
        assert!(make_folders(&files, "/nonexistent/image").is_err());
    }
}
