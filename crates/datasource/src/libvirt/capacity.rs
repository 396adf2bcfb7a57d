//! How large a disk is for the guest.

use super::definition::Disk;
use super::rpc::{Connection, Domain, LibvirtError};
use crate::images::Images;
use crate::{ImageSource, ImagesSource, MachineSpec, Provider, ProviderError, Source};

/// Bytes of a stopped machine's disk where libvirt does not tell them: it looks into images itself, but of VHD and VHDX it
/// answers with the size of the file.
pub(super) fn in_image(domain: &Domain, disk: &Disk) -> Option<Result<u64, ProviderError>> {
    let is_off = domain.id < 0;
    if !is_off || !matches!(disk.format.as_str(), "vhd" | "vhdx") {
        return None;
    }
    let image = ImageSource {
        path: disk.file.as_deref()?.into(),
        format: Some(disk.format.clone()),
        sector: disk.sector,
    };
    let machine = MachineSpec {
        id: model::DatasourceId(domain.uuid),
        name: domain.name.clone(),
        source: Source::Images(ImagesSource { disks: vec![image], allow_backing: Vec::new() }),
    };
    let found = Images::new().inspect(&machine);
    Some(found.map(|found| found.disks.first().map_or(0, |disk| disk.size)))
}

/// Bytes of a disk; nothing where its storage is away: the machine is listed all the same.
pub(super) fn of(
    connection: &mut Connection,
    domain: &Domain,
    disk: &Disk,
) -> Result<Option<u64>, LibvirtError> {
    if let Some(found) = in_image(domain, disk) {
        return Ok(found.ok());
    }
    match connection.block_info(domain, &disk.target) {
        Ok(info) => Ok(Some(info.capacity)),
        Err(error) if error.code().is_some() => Ok(None),
        Err(error) => Err(error),
    }
}
