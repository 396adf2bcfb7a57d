//! What a machine's definition says of its disks (libvirt's domain XML).
//!
//! Reads what protection needs and nothing else; the text itself is kept with the point.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use roxmltree::{Document, Node};

use crate::ProviderError;

/// One disk of a definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// Its name in the machine: `vda`. libvirt keeps it unique.
    pub(super) target: String,
    /// `virtio`, `scsi`, `sata`, ...
    pub(super) bus: String,
    /// `raw`, `qcow2`, `vhdx`, ...: the format that QEMU was told, never guessed from the file.
    pub(super) format: String,
    /// The file, if it is one.
    pub(super) file: Option<String>,
    /// Its device's name in QEMU, of a running machine.
    pub(super) alias: Option<String>,
    /// What else it is: `block /dev/sdb`, `network rbd p/i`.
    pub(super) storage: String,
    /// Bytes of a logical sector, if the definition says so.
    pub(super) sector: Option<u32>,
    /// How many images its chain has, as far as the definition tells.
    pub(super) chain: u32,
    /// Why it cannot be protected, if so.
    pub(super) unprotected: Option<String>,
    /// Whether nothing of the machine's state is on it: it has no medium, or cannot be written to.
    pub(super) is_no_state: bool,
}

/// Formats that libvirt calls by other names than the rest of the world: theirs, ours.
const FORMATS: [(&str, &str); 2] = [("vhd", "vhdx"), ("vpc", "vhd")];

/// libvirt's word for a format.
pub(super) fn driver_type(format: &str) -> &str {
    FORMATS.iter().find(|(_, ours)| *ours == format).map_or(format, |(theirs, _)| theirs)
}

/// The disks of a machine, in the order of its definition.
pub(super) fn disks(machine: &str, definition: &str) -> Result<Vec<Disk>, ProviderError> {
    let wrong = |reason: String| ProviderError::Format { object: machine.to_owned(), reason };
    let document = Document::parse(definition)
        .map_err(|error| wrong(format!("libvirt's definition of it cannot be read: {error}")))?;
    let devices = child(document.root_element(), "devices")
        .ok_or_else(|| wrong("libvirt's definition of it has no <devices>".to_owned()))?;
    let mut found: Vec<Disk> = Vec::new();
    for node in devices.children().filter(|node| node.has_tag_name("disk")) {
        let kind = node.attribute("device").unwrap_or("disk");
        // Removable media are no part of the machine.
        if !matches!(kind, "disk" | "lun") {
            continue;
        }
        let disk = disk(node, kind);
        if disk.target.is_empty() || found.iter().any(|other| other.target == disk.target) {
            return Err(wrong(format!(
                "libvirt's definition of it names disk {:?} twice or not",
                disk.target
            )));
        }
        found.push(disk);
    }
    Ok(found)
}

fn disk(node: Node<'_, '_>, kind: &str) -> Disk {
    let source = child(node, "source");
    let attribute = |of: &str, name: &str| {
        child(node, of).and_then(|node| node.attribute(name)).unwrap_or_default().to_owned()
    };
    let storage = node.attribute("type").unwrap_or("file");
    let file = source.and_then(|source| source.attribute("file")).map(str::to_owned);
    let format = match child(node, "driver").and_then(|driver| driver.attribute("type")) {
        Some(word) => {
            FORMATS.iter().find(|(theirs, _)| *theirs == word).map_or(word, |(_, ours)| ours).to_owned()
        }
        None => "raw".to_owned(),
    };
    let unprotected = if kind == "lun" {
        Some("it is a device passed through with its SCSI commands (device=lun)".to_owned())
    } else if child(node, "shareable").is_some() {
        Some(
            "it is shared with other machines (<shareable/>): no freeze of one covers the writes of all"
                .to_owned(),
        )
    } else if child(node, "transient").is_some() {
        Some("it is transient: what is written to it goes with the machine's stop".to_owned())
    } else if child(node, "readonly").is_some() {
        Some("the machine cannot write to it (<readonly/>)".to_owned())
    } else if let Some(odd) = ["encryption", "slices"].into_iter().find(|name| {
        source.is_some_and(|source| child(source, name).is_some()) || child(node, name).is_some()
    }) {
        Some(format!("its source has <{odd}>: what the guest sees is not what is in the file"))
    } else if storage != "file" {
        Some(format!("its storage is of the kind {storage:?}; disks in files are protected"))
    } else if file.is_none() {
        Some("it has no medium".to_owned())
    } else {
        None
    };
    Disk {
        target: attribute("target", "dev"),
        bus: attribute("target", "bus"),
        format,
        alias: child(node, "alias").and_then(|alias| alias.attribute("name")).map(str::to_owned),
        file,
        storage: source.map_or_else(
            || storage.to_owned(),
            |source| {
                let names = ["protocol", "dev", "name", "pool", "volume"];
                let words = names.iter().filter_map(|name| source.attribute(*name));
                std::iter::once(storage).chain(words).collect::<Vec<_>>().join(" ")
            },
        ),
        sector: child(node, "blockio")
            .and_then(|blockio| blockio.attribute("logical_block_size"))
            .and_then(|bytes| bytes.parse().ok()),
        chain: 1 + backing(node),
        unprotected,
        is_no_state: child(node, "readonly").is_some() || source.is_none(),
    }
}

/// Files below the uppermost images, as far as the definition tells.
pub(super) fn chain_files(definition: &str) -> Vec<String> {
    let Ok(document) = Document::parse(definition) else { return Vec::new() };
    let below = document.descendants().filter(|node| node.has_tag_name("backingStore"));
    below.filter_map(|node| child(node, "source")?.attribute("file").map(str::to_owned)).collect()
}

/// Their folders.
pub(super) fn chain_folders(definition: &str) -> BTreeSet<PathBuf> {
    let files = chain_files(definition);
    files.iter().filter_map(|file| Path::new(file).parent().map(Path::to_owned)).collect()
}

/// How many images are below. A chain is as deep as its author wanted; libvirt itself stops at 200.
fn backing(node: Node<'_, '_>) -> u32 {
    let mut depth = 0;
    let mut at = node;
    while let Some(below) = child(at, "backingStore").filter(|below| child(*below, "source").is_some()) {
        depth += 1;
        at = below;
    }
    depth
}

pub(super) fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

/// Whether the guest's agent is connected; nothing if the machine has no channel for one or does not run.
pub(super) fn guest_agent(definition: &str) -> Option<bool> {
    let document = Document::parse(definition).ok()?;
    let target = document.descendants().find(|node| {
        node.has_tag_name("target") && node.attribute("name") == Some("org.qemu.guest_agent.0")
    })?;
    target.attribute("state").map(|state| state == "connected")
}

/// The file of firmware variables, if the machine has one.
pub(super) fn nvram(definition: &str) -> Option<String> {
    let document = Document::parse(definition).ok()?;
    let node = child(child(document.root_element(), "os")?, "nvram")?;
    let path = match child(node, "source") {
        Some(source) => source.attribute("file"),
        None => node.text().map(str::trim),
    };
    path.filter(|path| path.starts_with('/')).map(str::to_owned)
}

/// The version of the machine's emulated TPM, if it has one.
pub(super) fn emulated_tpm(definition: &str) -> Option<String> {
    let document = Document::parse(definition).ok()?;
    let tpm = child(child(document.root_element(), "devices")?, "tpm")?;
    let backend = child(tpm, "backend").filter(|backend| backend.attribute("type") == Some("emulator"))?;
    Some(backend.attribute("version").unwrap_or("2.0").to_owned())
}

/// The text of an element below the root.
pub(super) fn text(document: &str, path: &[&str]) -> Option<String> {
    let document = Document::parse(document).ok()?;
    let mut node = document.root_element();
    for name in path {
        node = child(node, name)?;
    }
    Some(node.text().unwrap_or_default().to_owned())
}

/// A disk in a checkpoint's definition that has a bitmap of its own.
pub(super) fn tracked_disks(checkpoint: &str) -> Vec<String> {
    let Ok(document) = Document::parse(checkpoint) else { return Vec::new() };
    let Some(disks) = child(document.root_element(), "disks") else { return Vec::new() };
    disks
        .children()
        .filter(|node| node.has_tag_name("disk") && node.attribute("checkpoint") == Some("bitmap"))
        .filter_map(|node| node.attribute("name").map(str::to_owned))
        .collect()
}

/// Number of the node through which a job's view of a disk is read: `7` for `libvirt-7-format`.
pub(super) fn view_index(backup: &str, target: &str) -> Option<String> {
    let document = Document::parse(backup).ok()?;
    let disk = document
        .descendants()
        .find(|node| node.has_tag_name("disk") && node.attribute("name") == Some(target))?;
    disk.attribute("index").map(str::to_owned)
}

/// The scratch files and the socket of a backup job.
pub(super) fn files_of(backup: &str) -> Vec<String> {
    let Ok(document) = Document::parse(backup) else { return Vec::new() };
    document
        .descendants()
        .filter_map(|node| match node.tag_name().name() {
            "server" => node.attribute("socket"),
            "scratch" => node.attribute("file"),
            _ => None,
        })
        .map(str::to_owned)
        .collect()
}

/// Text for an attribute or an element.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MACHINE: &str = "<domain type='kvm'><name>web</name><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/srv/a.qcow2'/>
 <backingStore type='file'><format type='qcow2'/><source file='/srv/base.qcow2'/><backingStore/></backingStore>
 <target dev='vda' bus='virtio'/></disk>
<disk type='block' device='disk'><source dev='/dev/sdb'/><target dev='vdb' bus='virtio'/></disk>
<disk type='network' device='disk'><source protocol='rbd' name='p/i'/><target dev='vdc' bus='virtio'/></disk>
<disk type='file' device='disk'><source file='/srv/s.raw'/><target dev='vdd' bus='scsi'/><shareable/></disk>
<disk type='file' device='disk'><source file='/srv/r.raw'/><target dev='vde' bus='sata'/><readonly/></disk>
<disk type='file' device='cdrom'><source file='/srv/i.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
<disk type='file' device='disk'><driver type='vhd'/><source file='/srv/v.vhdx'/><target dev='vdf' bus='sata'/>
 <blockio logical_block_size='4096'/></disk>
</devices></domain>";

    #[test]
    fn disks_are_told_with_what_keeps_them_from_being_protected() {
        let disks = disks("web", MACHINE).unwrap();
        let told: Vec<_> = disks
            .iter()
            .map(|disk| (disk.target.as_str(), disk.unprotected.as_deref().unwrap_or("")))
            .collect();
        assert_eq!(told.len(), 6);
        assert_eq!(told[0], ("vda", ""));
        assert!(told[1].1.contains("\"block\""));
        assert!(told[2].1.contains("\"network\""));
        assert!(told[3].1.contains("shared"));
        assert!(told[4].1.contains("cannot write"));
        assert_eq!(told[5], ("vdf", ""));
        assert_eq!(disks[0].chain, 2);
        assert_eq!((disks[5].sector, disks[5].format.as_str()), (Some(4096), "vhdx"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for wrong in ["", "<domain>", "<domain/>", "<domain><devices><disk/></devices></domain>"] {
            assert!(disks("m", wrong).is_err(), "{wrong}");
        }
        let twice = MACHINE.replace("vdf", "vda");
        assert!(disks("m", &twice).unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn names_cannot_break_out_of_their_place() {
        assert_eq!(escaped("a'><b&\""), "a&apos;&gt;&lt;b&amp;&quot;");
    }
}
