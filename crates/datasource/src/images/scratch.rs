//! Temporary files on the host, and what a crash leaves of them.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use model::JobId;

use crate::{ProviderError, Swept};

/// Beginning of the name of every temporary file beside an image.
pub const MARK: &str = ".stillpoint-frozen-";

/// Whether a name is a mark with job and number, to the letter.
fn is_marked(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(MARK) else { return false };
    let Some((job, number)) = rest.split_once('-') else { return false };
    job.parse::<JobId>().is_ok() && number.parse::<u32>().is_ok_and(|parsed| parsed.to_string() == number)
}

/// Removes what carries the mark in these folders and is not held.
pub(super) fn sweep(folders: Vec<PathBuf>) -> Result<Swept, ProviderError> {
    let mut swept = Swept::default();
    let folders: BTreeSet<PathBuf> = folders.into_iter().collect();
    for folder in folders {
        let failed = |error: &io::Error| {
            ProviderError::source(folder.display().to_string(), "look for leftovers", error)
        };
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            // Its disk may be away; the job that needs it says so.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(&error)),
        };
        for entry in entries {
            let entry = entry.map_err(|error| failed(&error))?;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            // A link or a folder of that name is not from us.
            if !is_marked(&name) || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
                continue;
            }
            let path = entry.path();
            let shown = path.display().to_string();
            let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
            let file = match std::fs::OpenOptions::new().read(true).write(true).open(&path) {
                Ok(file) => file,
                Err(error) if gone(&error) => continue,
                Err(error) => return Err(failed(&error)),
            };
            if file.try_lock().is_err() {
                swept.in_use.push(shown);
                continue;
            }
            match std::fs::remove_file(&path) {
                Ok(()) => swept.removed.push(shown),
                Err(error) if gone(&error) => {}
                Err(error) => return Err(failed(&error)),
            }
        }
    }
    Ok(swept)
}

#[cfg(unix)]
pub(super) use making::*;

#[cfg(unix)]
mod making {
    use std::fs::File;
    use std::io;
    use std::path::{Path, PathBuf};

    use model::JobId;

    use super::MARK;

    /// The name of clone `number` of a job.
    pub fn name(job: JobId, number: u32) -> String {
        format!("{MARK}{job}-{number}")
    }

    /// Makes an empty file in `folder` that has no name any more when this returns.
    pub fn create(folder: &Path, job: JobId, number: u32) -> io::Result<File> {
        use rustix::fs::{Mode, OFlags};
        match rustix::fs::open(folder, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from(0o600)) {
            Ok(file) => return Ok(file.into()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        let (file, path) = create_named(folder, job, number)?;
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(file),
        }
    }

    /// Makes an empty file with our mark, held by a lock.
    pub fn create_named(folder: &Path, job: JobId, number: u32) -> io::Result<(File, PathBuf)> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = folder.join(name(job, number));
        let file =
            std::fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        // If a sweep comes between the two calls, it holds the lock and the name goes a moment sooner than planned; the
        // file stays ours. Where there are no locks, nothing better can be done.
        let _ = file.try_lock();
        Ok((file, path))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_whole_names_are_marked() {
        let job = "0123456789abcdef0123456789abcdef";
        assert!(super::is_marked(&format!(".stillpoint-frozen-{job}-0")));
        assert!(super::is_marked(&format!(".stillpoint-frozen-{job}-12")));
        for other in [
            format!("stillpoint-frozen-{job}-0"),
            format!(".stillpoint-frozen-{job}-"),
            format!(".stillpoint-frozen-{job}-01"),
            format!(".stillpoint-frozen-{job}-+1"),
            format!(".stillpoint-frozen-{job}-1.raw"),
            format!(".stillpoint-frozen-{job}"),
            ".stillpoint-frozen-mine-1".to_owned(),
            "disk.raw".to_owned(),
        ] {
            assert!(!super::is_marked(&other), "{other}");
        }
    }
}
