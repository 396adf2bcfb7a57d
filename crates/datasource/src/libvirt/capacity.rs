//! How large a disk is for the guest.

use super::definition::Disk;
use super::rpc::{Connection, Domain, LibvirtError};
use crate::images::Images;
use crate::{ImageSource, ImagesSource, MachineSpec, Provider, Source};

/// Bytes of a disk; an error where nothing can tell.
///
/// libvirt looks into images of stopped machines itself, but not into VHD and VHDX: there it answers with the size of the file.
pub(super) fn told(connection: &mut Connection, domain: &Domain, disk: &Disk) -> Result<u64, LibvirtError> {
    let is_off = domain.id < 0;
    if is_off
        && matches!(disk.format.as_str(), "vhd" | "vhdx")
        && let Some(bytes) = of_image(domain, disk)
    {
        return Ok(bytes);
    }
    Ok(connection.block_info(domain, &disk.target)?.capacity)
}

/// The same; nothing where its storage is away: the machine is listed all the same.
pub(super) fn of(
    connection: &mut Connection,
    domain: &Domain,
    disk: &Disk,
) -> Result<Option<u64>, LibvirtError> {
    match told(connection, domain, disk) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.code().is_some() => Ok(None),
        Err(error) => Err(error),
    }
}

fn of_image(domain: &Domain, disk: &Disk) -> Option<u64> {
    let image = ImageSource {
        path: disk.file.as_deref()?.into(),
        format: Some(disk.format.clone()),
        sector: disk.sector,
    };
    let spec = MachineSpec {
        id: model::DatasourceId(domain.uuid),
        name: domain.name.clone(),
        source: Source::Images(ImagesSource { disks: vec![image], allow_backing: Vec::new() }),
    };
    Some(Images::new().inspect(&spec).ok()?.disks.first()?.size)
}
