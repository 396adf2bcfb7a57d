//! Which files an image may refer to.
//!
//! A reference is text that whoever wrote the image chose. It is followed only to a regular file whose true place,
//! after every link and `..`, is the folder of the disk's own image, or lies in or below a folder that the
//! administrator allowed. `nbd://..`, `json:{..}` and the like are not names of files. Of a Windows path with a drive
//! or a share only the last part counts here, in the folder of the image that holds it; VHD and VHDX then check the
//! parent's identity.

use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use block_io::{BlockDevice, DeviceError};
use disk_image::{ImageError, ImageFormat, ParentReference, Parents};

use crate::ProviderError;

/// Gives the bytes of files of a chain; every call names a path without links that passed the rules.
pub(super) trait Opener: Send + Sync {
    fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>, ProviderError>;
}

/// What one disk's chain may use, and what it did use.
pub(super) struct Chain {
    opener: Arc<dyn Opener>,
    /// The folder of the disk's own image, without links.
    own: PathBuf,
    /// Folders in and below which files may lie, without links.
    allowed: Vec<PathBuf>,
    opened: Mutex<Vec<PathBuf>>,
    /// The error behind the last refused or failed reference: image errors cannot say which file is missing or in use.
    failure: Mutex<Option<ProviderError>>,
}

impl Chain {
    pub fn new(opener: Arc<dyn Opener>, image: &Path, allowed: &[PathBuf]) -> Arc<Chain> {
        Arc::new(Chain {
            opener,
            own: folder_of(image),
            // A folder that is not there allows nothing.
            allowed: allowed.iter().filter_map(|folder| std::fs::canonicalize(folder).ok()).collect(),
            opened: Mutex::default(),
            failure: Mutex::default(),
        })
    }

    /// Opens the disk's own image.
    pub fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>, ProviderError> {
        let device = self.opener.open(path)?;
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
        Ok(device)
    }

    /// The references of the disk's own image.
    pub fn parents(self: &Arc<Chain>) -> FolderParents {
        FolderParents { chain: self.clone(), folder: self.own.clone() }
    }

    /// Images opened so far, the uppermost first.
    pub fn length(&self) -> usize {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// What went wrong with a reference, if something did.
    pub fn take_failure(&self) -> Option<ProviderError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn allows(&self, path: &Path) -> bool {
        path.parent() == Some(&self.own) || self.allowed.iter().any(|folder| path.starts_with(folder))
    }
}

fn folder_of(path: &Path) -> PathBuf {
    path.parent().map(Path::to_owned).unwrap_or_default()
}

/// References relative to one folder of a chain.
pub(super) struct FolderParents {
    chain: Arc<Chain>,
    folder: PathBuf,
}

impl FolderParents {
    fn refuse(&self, reference: &ParentReference, name: &str, reason: String) -> ImageError {
        ImageError::NotAllowed { format: reference.child, reference: name.to_owned(), reason }
    }

    /// The place a name means, links not followed yet.
    fn place(&self, child: ImageFormat, name: &str) -> Result<PathBuf, String> {
        if name.is_empty() || name.contains('\0') {
            return Err("it is not the name of a file".to_owned());
        }
        if child == ImageFormat::Qcow2 {
            let first = name.split('/').next().unwrap_or_default();
            if first.contains(':') {
                return Err("it names a protocol and not a file".to_owned());
            }
            return Ok(self.folder.join(name));
        }
        if cfg!(windows) {
            return Ok(self.folder.join(name));
        }
        let name = name.replace('\\', "/");
        let drive = name.as_bytes().get(1) == Some(&b':');
        if drive || name.starts_with("//") {
            let last = name.rsplit('/').next().filter(|last| !last.is_empty() && !last.contains(':'));
            return Ok(self.folder.join(last.ok_or("it is not the name of a file")?));
        }
        Ok(self.folder.join(name))
    }
}

/// `path` without `.` and `..`, by its text alone.
fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            part => plain.push(part),
        }
    }
    plain
}

impl Parents for FolderParents {
    fn open(
        &self,
        reference: &ParentReference,
    ) -> Result<(Arc<dyn BlockDevice>, Arc<dyn Parents>), ImageError> {
        let mut refusal = None;
        let mut missing = None;
        for name in &reference.names {
            let place = match self.place(reference.child, name) {
                Ok(place) => place,
                Err(reason) => {
                    refusal.get_or_insert_with(|| self.refuse(reference, name, reason));
                    continue;
                }
            };
            let (path, exists) = match std::fs::canonicalize(&place) {
                Ok(path) => (path, true),
                Err(_) => (without_dots(&place), false),
            };
            if !self.chain.allows(&path) {
                let reason = format!(
                    "it lies in {}, which is neither the image's folder {} nor an allowed one",
                    folder_of(&path).display(),
                    self.chain.own.display()
                );
                refusal.get_or_insert_with(|| self.refuse(reference, name, reason));
                continue;
            }
            if !exists {
                missing.get_or_insert(path);
                continue;
            }
            return match self.chain.open(&path) {
                Ok(device) => {
                    let next = FolderParents { chain: self.chain.clone(), folder: folder_of(&path) };
                    Ok((device, Arc::new(next)))
                }
                Err(error) => {
                    let text = error.to_string();
                    *self.chain.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    Err(ImageError::Device(DeviceError::Damaged {
                        object: path.display().to_string(),
                        offset: 0,
                        length: 0,
                        reason: text,
                    }))
                }
            };
        }
        // A refused name weighs more than a missing one: it may be the one that was meant.
        if let (None, Some(path)) = (&refusal, &missing) {
            *self.chain.failure.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(ProviderError::Missing {
                    object: path.display().to_string(),
                    reason: format!(
                        "does not exist, and is the parent of a {} image",
                        reference.child.word()
                    ),
                });
        }
        Err(refusal.unwrap_or_else(|| {
            ImageError::Device(DeviceError::Io {
                object: missing.unwrap_or_default().display().to_string(),
                action: "open",
                offset: 0,
                length: 0,
                source: std::io::ErrorKind::NotFound.into(),
            })
        }))
    }
}
