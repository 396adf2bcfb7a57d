//! Why a source cannot be read or a target cannot be written.

use std::io;

use block_io::DeviceError;
use disk_image::ImageError;
use model::{Code, Problem};

/// Why a provider refuses or fails. `object` is a path or the name of a machine.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "every variant has object and reason, and says the rest itself")]
pub enum ProviderError {
    /// A file of the machine is not there.
    #[error("{object}: {reason}")]
    Missing { object: String, reason: String },
    /// A file is not what it should be: damaged, truncated, of another format, with an unsupported feature.
    #[error("{object}: {reason}")]
    Format { object: String, reason: String },
    /// An image refers to what was not allowed.
    #[error("{object}: {reason}")]
    Unsafe { object: String, reason: String },
    /// It was written to while it had to stand still.
    #[error("{object}: changed while it was read: {reason}")]
    Changed { object: String, reason: String },
    /// Somebody uses it, and it cannot be frozen in use.
    #[error("{object}: is in use: {reason}")]
    Locked { object: String, reason: String },
    /// The guest's file systems could not be frozen, and no other view was wanted.
    #[error("{object}: {reason}")]
    NotFrozen { object: String, reason: String },
    /// It is on its way to another host.
    #[error("{object}: {reason}")]
    Migrating { object: String, reason: String },
    /// The storage below the source failed.
    #[error("{object}: {reason}")]
    Read { object: String, reason: String },
    /// Host, file system or format cannot do it.
    #[error("{object}: {reason}")]
    Unsupported { object: String, reason: String },
    /// The target is there already.
    #[error("{object}: {reason}")]
    TargetExists { object: String, reason: String },
    /// Another recovery fills the target.
    #[error("{object}: {reason}")]
    TargetBusy { object: String, reason: String },
    /// No space for the target.
    #[error("{object}: no space left: {reason}")]
    TargetFull { object: String, reason: String },
    /// The storage of the target failed.
    #[error("{object}: {reason}")]
    TargetWrite { object: String, reason: String },
    /// The format of the target cannot hold the disk.
    #[error("{object}: {reason}")]
    TargetFormat { object: String, reason: String },
}

impl ProviderError {
    /// The error code at the edge.
    pub fn code(&self) -> Code {
        match self {
            ProviderError::Missing { .. } => Code::SourceMissing,
            ProviderError::Format { .. } => Code::SourceFormat,
            ProviderError::Unsafe { .. } => Code::SourceUnsafe,
            ProviderError::Changed { .. } => Code::SourceChanged,
            ProviderError::Locked { .. } => Code::SourceLocked,
            ProviderError::NotFrozen { .. } => Code::NotFrozen,
            ProviderError::Migrating { .. } => Code::Migrating,
            ProviderError::Read { .. } => Code::SourceRead,
            ProviderError::Unsupported { .. } => Code::Unsupported,
            ProviderError::TargetExists { .. } => Code::TargetExists,
            ProviderError::TargetBusy { .. } => Code::SourceBusy,
            ProviderError::TargetFull { .. } => Code::TargetFull,
            ProviderError::TargetWrite { .. } => Code::TargetWrite,
            ProviderError::TargetFormat { .. } => Code::TargetFormat,
        }
    }

    /// The file or machine it is about.
    pub fn object(&self) -> &str {
        match self {
            ProviderError::Missing { object, .. }
            | ProviderError::Format { object, .. }
            | ProviderError::Unsafe { object, .. }
            | ProviderError::Changed { object, .. }
            | ProviderError::Locked { object, .. }
            | ProviderError::NotFrozen { object, .. }
            | ProviderError::Migrating { object, .. }
            | ProviderError::Read { object, .. }
            | ProviderError::Unsupported { object, .. }
            | ProviderError::TargetExists { object, .. }
            | ProviderError::TargetBusy { object, .. }
            | ProviderError::TargetFull { object, .. }
            | ProviderError::TargetWrite { object, .. }
            | ProviderError::TargetFormat { object, .. } => object,
        }
    }

    /// A failed call on a source file.
    pub(crate) fn source(object: impl Into<String>, action: &str, error: &io::Error) -> ProviderError {
        let object = object.into();
        match error.kind() {
            io::ErrorKind::NotFound => ProviderError::Missing { object, reason: "does not exist".to_owned() },
            io::ErrorKind::PermissionDenied => ProviderError::Missing {
                object,
                reason: format!("cannot {action}: this program may not read it"),
            },
            _ => ProviderError::Read { object, reason: format!("cannot {action}: {error}") },
        }
    }

    /// What a failed read of the disk of a source means.
    pub fn from_source_device(object: impl Into<String>, error: &DeviceError) -> ProviderError {
        let object = object.into();
        match error {
            DeviceError::Changed { object, reason } => {
                ProviderError::Changed { object: object.clone(), reason: reason.clone() }
            }
            DeviceError::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) =>
            {
                ProviderError::Missing { object, reason: error.to_string() }
            }
            DeviceError::Io { .. } | DeviceError::ReadOnly { .. } => {
                ProviderError::Read { object, reason: error.to_string() }
            }
            DeviceError::Damaged { .. } | DeviceError::OutOfBounds { .. } => {
                ProviderError::Format { object, reason: error.to_string() }
            }
        }
    }

    /// What an image that cannot be opened means.
    pub(crate) fn from_source_image(object: impl Into<String>, error: ImageError) -> ProviderError {
        let object = object.into();
        match error {
            ImageError::Device(error) => ProviderError::from_source_device(object, &error),
            ImageError::NotAllowed { .. } => ProviderError::Unsafe { object, reason: error.to_string() },
            _ => ProviderError::Format { object, reason: error.to_string() },
        }
    }

    /// A failed call on a target file.
    pub(crate) fn target(object: impl Into<String>, action: &str, error: &io::Error) -> ProviderError {
        let object = object.into();
        let reason = format!("cannot {action}: {error}");
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                ProviderError::TargetFull { object, reason }
            }
            io::ErrorKind::AlreadyExists => ProviderError::TargetExists { object, reason },
            _ => ProviderError::TargetWrite { object, reason },
        }
    }

    /// What a failed write to a recovery target means.
    pub fn from_target_device(object: impl Into<String>, error: &DeviceError) -> ProviderError {
        match error {
            DeviceError::Io { source, .. } => ProviderError::target(object, "write", source),
            // Only what lies below an overlay is read and watched.
            DeviceError::Changed { object, reason } => {
                ProviderError::Changed { object: object.clone(), reason: reason.clone() }
            }
            _ => ProviderError::TargetWrite { object: object.into(), reason: error.to_string() },
        }
    }

    /// What a failure of an image writer means.
    pub(crate) fn from_target_image(object: impl Into<String>, error: ImageError) -> ProviderError {
        match error {
            ImageError::Device(error) => ProviderError::from_target_device(object, &error),
            _ => ProviderError::TargetFormat { object: object.into(), reason: error.to_string() },
        }
    }
}

impl From<ProviderError> for Problem {
    fn from(error: ProviderError) -> Problem {
        let problem = Problem::new(error.code(), error.to_string()).about(error.object());
        match error {
            ProviderError::TargetBusy { .. } => {
                problem.hint("Wait for that recovery, or cancel it: `stillpoint job list` shows it.")
            }
            _ => problem,
        }
    }
}
