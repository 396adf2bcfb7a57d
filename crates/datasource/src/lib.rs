//! Providers of protected machines behind one trait.
//!
//! A [`Provider`] knows the machines of one kind of host: today [`images`], machines made of image files; libvirt and
//! Hyper-V fit the same trait. It describes a machine, freezes it into a [`FrozenView`] whose disks are plain
//! [`BlockDevice`](block_io::BlockDevice)s, and makes [`RecoveryTarget`]s. It cleans up after itself, after a crash too.
//!
//! Refuses to know: the server, the pool, schedules, what is done with the bytes.
//!
//! Invariants
//! - All disks of a view show one moment, or there is no view. (must: S17)
//! - A view in place is proved still by [`FrozenView::verify_unchanged`] before anything made from it is committed. (must)
//! - What a freeze makes on the host goes with the view, and what a crash leaves carries our mark; only what carries
//!   it is ever removed (INV-21, S32). (must)
//! - No name found inside an image is opened outside the folders that were allowed (INV-25). (must)
//! - Recovery writes under another name until it is done, and never over an existing file unless told to. (must)
//! - An overlay gets its name only when every file below it was proved to be as it was when it was begun. (must)

pub mod conformance;
mod error;
pub mod images;
#[cfg(unix)]
pub mod libvirt;
mod provider;
mod target;

pub use error::ProviderError;
pub use images::Images;
#[cfg(unix)]
pub use libvirt::Libvirt;
pub use provider::{
    Changed, DiskDescription, FreezeMethod, FreezeRequest, FrozenDisk, FrozenView, ImageSource, ImagesSource,
    LibvirtSource, MachineDescription, MachineSpec, Provider, Source, Swept,
};
pub use target::{BaseImage, RecoveryTarget, TargetRequest};
