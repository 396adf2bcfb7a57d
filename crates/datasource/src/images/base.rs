//! The image that a disk is recovered over: it stays as it is, and what differs goes to a qcow2 overlay of it.
//!
//! It is opened as a view in place is: through its whole chain, refused while anybody may write, every file watched.
//! Whoever writes to one of the files afterwards changes the disk under the overlay, so the overlay gets its name only
//! when all of them are proved to be as they were. What a hypervisor is told later nobody can watch from here.

use std::path::Path;

use disk_image::{ImageFormat, qcow2};

use super::freeze::{self, ImagesView};
use super::sys::{self, Stamp};
use crate::target::{BaseState, Below, FileState};
use crate::{BaseImage, FrozenView, ImageSource, ProviderError};

/// An opened image that nobody writes to, as far as can be seen.
pub(super) struct OpenBase {
    view: ImagesView,
    base: qcow2::Base,
}

impl OpenBase {
    pub fn open(image: &BaseImage) -> Result<OpenBase, ProviderError> {
        let shown = image.path.display().to_string();
        let unsupported = |reason: String| ProviderError::Unsupported { object: shown.clone(), reason };
        let path = std::fs::canonicalize(&image.path)
            .map_err(|error| ProviderError::source(shown.clone(), "find it", &error))?;
        let Some(name) = path.to_str() else {
            return Err(unsupported(
                "an overlay cannot name it: its path is not UTF-8 text; rename it or recover the whole disk"
                    .to_owned(),
            ));
        };
        let source =
            ImageSource { path: path.clone(), format: Some(image.format.word().to_owned()), sector: None };
        let view = freeze::stand(&source, &image.allow_backing)?;
        if view.watched().all(|(watched, _)| watched != path) {
            let reason = "its path leads to another file since".to_owned();
            return Err(ProviderError::Changed { object: shown, reason });
        }
        let Some(disk) = view.disks().first() else {
            return Err(unsupported("has no disk".to_owned()));
        };
        // The overlay is for QEMU, which must see below it what is seen here.
        let properties = &disk.description.properties;
        if properties.get("kind").is_some_and(|kind| kind == "differencing") {
            return Err(unsupported(format!(
                "QEMU does not read differencing {} images; merge it with its parent or recover the whole disk",
                image.format.word()
            )));
        }
        if image.format == ImageFormat::Vhdx && properties.contains_key("not_closed") {
            return Err(unsupported(
                "its log has not been replayed, so QEMU does not open it below an overlay; \
                 `qemu-img check -r all` on it replays the log"
                    .to_owned(),
            ));
        }
        let base = qcow2::Base { name: name.to_owned(), format: image.format, disk: disk.device.clone() };
        Ok(OpenBase { view, base })
    }
}

impl Below for OpenBase {
    fn base(&self) -> &qcow2::Base {
        &self.base
    }

    fn state(&self) -> BaseState {
        let state = |path: &Path, stamp: &Stamp| FileState {
            path: path.display().to_string(),
            size: stamp.length,
            inode: stamp.identity.1,
            modified: stamp.modified,
            changed: stamp.changed,
        };
        BaseState {
            path: self.base.name.clone(),
            format: self.base.format.word().to_owned(),
            files: self.view.watched().map(|(path, stamp)| state(path, stamp)).collect(),
        }
    }

    fn holds(&self, path: &Path) -> bool {
        let place = std::fs::canonicalize(path).ok();
        let identity = sys::identity_at(path);
        self.view
            .watched()
            .any(|(watched, known)| identity == Some(known.identity) || place.as_deref() == Some(watched))
    }

    fn verify_unchanged(&self) -> Result<(), ProviderError> {
        self.view.verify_unchanged().map_err(|error| match error {
            ProviderError::Changed { object, reason } => ProviderError::Changed {
                object,
                reason: format!(
                    "{reason}; what was written over it no longer fits. Stop who writes to it, and begin the \
                     recovery anew"
                ),
            },
            other => other,
        })?;
        match self.view.writer()? {
            None => Ok(()),
            Some(reason) => Err(ProviderError::Locked {
                object: self.base.name.clone(),
                reason: format!(
                    "{reason}; stop it, for an overlay is only good over an image that stays as it is"
                ),
            }),
        }
    }
}
