//! The definition of a recovered machine: that of the point, with what must be otherwise.
//!
//! The text is edited in place, so that everything that is not known here stays as it was.

use std::collections::BTreeMap;
use std::ops::Range;

use model::Network;
use roxmltree::{Document, Node};

use crate::ProviderError;
use crate::libvirt::definition::{child, driver_type, escaped};

/// What a disk of the recovered machine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NewSource {
    /// An image file.
    File {
        /// Its path.
        path: String,
        /// Its format.
        format: String,
    },
    /// Not part of the machine.
    Gone,
}

/// What must be otherwise.
#[derive(Debug, Clone)]
pub(super) struct Changes<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Its UUID, with dashes.
    pub(super) uuid: String,
    /// Its disks by target. A disk that is not named here is as the definition has it.
    pub(super) disks: BTreeMap<String, NewSource>,
    /// Whether removable media are taken out.
    pub(super) eject: bool,
    /// The file of firmware variables.
    pub(super) nvram: Option<String>,
    /// What adapters are connected to.
    pub(super) network: &'a Network,
    /// Whether adapters get new addresses.
    pub(super) new_addresses: bool,
}

/// A text and what becomes of it.
struct Edits<'a> {
    text: &'a str,
    changes: Vec<(Range<usize>, String)>,
}

impl Edits<'_> {
    fn replace(&mut self, range: Range<usize>, with: impl Into<String>) {
        self.changes.push((range, with.into()));
    }

    fn remove(&mut self, node: Node<'_, '_>) {
        self.replace(node.range(), "");
    }

    /// Just behind the opening tag of `node`, which may be an empty one: then it is opened.
    fn insert(&mut self, node: Node<'_, '_>, what: &str) {
        let range = node.range();
        let whole = &self.text[range.clone()];
        match node.first_child() {
            Some(first) => self.replace(first.range().start..first.range().start, what),
            None if whole.ends_with("/>") => {
                let tag = node.tag_name().name();
                self.replace(range.end - 2..range.end, format!(">{what}</{tag}>"));
            }
            None => {
                let at = range.start + whole.find('>').map_or(whole.len(), |at| at + 1);
                self.replace(at..at, what);
            }
        }
    }

    /// Gives an attribute a value.
    fn set(&mut self, node: Node<'_, '_>, name: &str, value: &str) {
        let value = escaped(value);
        match node.attribute_node(name) {
            Some(attribute) => self.replace(attribute.range(), format!("{name}='{value}'")),
            None => {
                let at = node.range().start + 1 + node.tag_name().name().len();
                self.replace(at..at, format!(" {name}='{value}'"));
            }
        }
    }

    fn done(mut self) -> String {
        self.changes.sort_by_key(|(range, _)| (range.start, range.end));
        let mut out = String::with_capacity(self.text.len());
        let mut at = 0;
        for (range, with) in self.changes {
            // Inside of what was replaced as a whole.
            if range.start < at {
                continue;
            }
            out.push_str(&self.text[at..range.start]);
            out.push_str(&with);
            at = range.end;
        }
        out.push_str(&self.text[at..]);
        out
    }
}

/// The changed definition.
pub(super) fn rewritten(definition: &str, changes: &Changes<'_>) -> Result<String, ProviderError> {
    let wrong = |reason: &str| ProviderError::Format {
        object: changes.name.to_owned(),
        reason: format!("the definition in the recovery point {reason}"),
    };
    let document = Document::parse(definition).map_err(|error| wrong(&format!("cannot be read: {error}")))?;
    let root = document.root_element();
    if !root.has_tag_name("domain") {
        return Err(wrong("is none of a machine"));
    }
    let devices = child(root, "devices").ok_or_else(|| wrong("has no <devices>"))?;
    let mut edits = Edits { text: definition, changes: Vec::new() };

    if let Some(id) = root.attribute_node("id") {
        edits.replace(id.range(), "");
    }
    let own = [("name", escaped(changes.name)), ("uuid", changes.uuid.clone())];
    for (tag, text) in own {
        let element = format!("<{tag}>{text}</{tag}>");
        match child(root, tag) {
            Some(node) => edits.replace(node.range(), element),
            None => edits.insert(root, &element),
        }
    }
    for node in root.children() {
        // The guest has gone back in time, which this tells it.
        if node.has_tag_name("genid") {
            edits.replace(node.range(), "<genid/>");
        }
        // What a host gave the running machine is that host's.
        if node.has_tag_name("seclabel") && node.attribute("type") == Some("dynamic") {
            edits.remove(node);
        }
        if node.has_tag_name("sysinfo") {
            let uuid = |entry: &Node<'_, '_>| entry.attribute("name") == Some("uuid");
            for entry in node.descendants().filter(uuid) {
                edits.replace(entry.range(), format!("<entry name='uuid'>{}</entry>", changes.uuid));
            }
        }
    }
    if let Some((node, path)) =
        child(root, "os").and_then(|os| child(os, "nvram")).zip(changes.nvram.as_deref())
    {
        nvram(&mut edits, node, path);
    }
    for node in devices.children() {
        match node.tag_name().name() {
            "disk" => disk(&mut edits, node, changes),
            "interface" => interface(&mut edits, node, changes),
            _ => {}
        }
    }
    Ok(edits.done())
}

fn nvram(edits: &mut Edits<'_>, node: Node<'_, '_>, path: &str) {
    if let Some(source) = child(node, "source") {
        return edits.replace(source.range(), format!("<source file='{}'/>", escaped(path)));
    }
    match node.first_child() {
        Some(text) => edits.replace(text.range(), escaped(path)),
        None => edits.insert(node, &escaped(path)),
    }
}

fn disk(edits: &mut Edits<'_>, node: Node<'_, '_>, changes: &Changes<'_>) {
    let target = child(node, "target").and_then(|target| target.attribute("dev")).unwrap_or_default();
    let is_removable = !matches!(node.attribute("device").unwrap_or("disk"), "disk" | "lun");
    if is_removable {
        if changes.eject
            && let Some(source) = child(node, "source")
        {
            edits.remove(source);
        }
        return;
    }
    let (path, format) = match changes.disks.get(target) {
        None => return,
        Some(NewSource::Gone) => return edits.remove(node),
        Some(NewSource::File { path, format }) => (path, format),
    };
    edits.set(node, "type", "file");
    if node.attribute("device") == Some("lun") {
        edits.set(node, "device", "disk");
    }
    let source = format!("<source file='{}'/>", escaped(path));
    match child(node, "source") {
        Some(old) => edits.replace(old.range(), source),
        None => edits.insert(node, &source),
    }
    match child(node, "driver") {
        Some(driver) => edits.set(driver, "type", driver_type(format)),
        None => edits.insert(node, &format!("<driver name='qemu' type='{}'/>", escaped(driver_type(format)))),
    }
    // What is below the new file is read from its header.
    for old in
        node.children().filter(|child| child.has_tag_name("backingStore") || child.has_tag_name("mirror"))
    {
        edits.remove(old);
    }
}

fn interface(edits: &mut Edits<'_>, node: Node<'_, '_>, changes: &Changes<'_>) {
    if changes.new_addresses
        && let Some(mac) = child(node, "mac")
    {
        edits.remove(mac);
    }
    match changes.network {
        Network::Keep => {}
        Network::Disconnect => match child(node, "link") {
            Some(link) => edits.replace(link.range(), "<link state='down'/>"),
            None => edits.insert(node, "<link state='down'/>"),
        },
        Network::Map(names) => {
            let Some(source) = child(node, "source") else { return };
            for name in ["network", "bridge", "dev"] {
                if let Some(other) = source.attribute(name).and_then(|old| names.get(old)) {
                    edits.set(source, name, other);
                }
            }
        }
    }
}

/// Names of the networks, bridges and devices that adapters are connected to.
pub(super) fn networks(definition: &str) -> Vec<String> {
    let Ok(document) = Document::parse(definition) else { return Vec::new() };
    let interfaces = document.descendants().filter(|node| node.has_tag_name("interface"));
    let sources = interfaces.filter_map(|node| child(node, "source"));
    let named = sources.filter_map(|source| {
        ["network", "bridge", "dev"].iter().find_map(|name| source.attribute(*name)).map(str::to_owned)
    });
    named.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MACHINE: &str = "<domain type='kvm' id='7'>
  <name>web</name><uuid>11111111-1111-1111-1111-111111111111</uuid>
  <genid>22222222-2222-2222-2222-222222222222</genid>
  <metadata><a:note xmlns:a='urn:x'>kept &amp; read</a:note></metadata>
  <sysinfo type='smbios'><system><entry name='uuid'>11111111-1111-1111-1111-111111111111</entry></system></sysinfo>
  <os firmware='efi'><nvram template='/usr/share/V.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='/a/web.qcow2' index='1'/>
      <backingStore type='file'><format type='qcow2'/><source file='/a/base.qcow2'/></backingStore>
      <target dev='vda' bus='virtio'/></disk>
    <disk type='block' device='lun'><source dev='/dev/sdb'/><target dev='sdb' bus='scsi'/></disk>
    <disk type='file' device='disk'><source file='/a/d.raw'/><target dev='vdc' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/iso/x.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='lan'/><model type='virtio'/></interface>
    <interface type='bridge'><source bridge='br0'/><link state='up'/></interface>
    <interface type='user'/>
  </devices>
  <seclabel type='dynamic' model='dac'><label>+64055</label></seclabel>
  <seclabel type='static' model='dac'><label>root</label></seclabel>
</domain>";

    fn changes(network: &Network) -> Changes<'_> {
        let file =
            |path: &str, format: &str| NewSource::File { path: path.to_owned(), format: format.to_owned() };
        Changes {
            name: "web <2>",
            uuid: "33333333-3333-3333-3333-333333333333".to_owned(),
            disks: [
                ("vda".to_owned(), file("/b/web 'x'.raw", "raw")),
                ("sdb".to_owned(), file("/b/sdb.qcow2", "qcow2")),
                ("vdc".to_owned(), NewSource::Gone),
            ]
            .into(),
            eject: true,
            nvram: Some("/b/VARS.fd".to_owned()),
            network,
            new_addresses: true,
        }
    }

    #[test]
    fn what_must_be_otherwise_is_and_the_rest_stays() {
        let text = rewritten(MACHINE, &changes(&Network::Disconnect)).unwrap();
        let document = Document::parse(&text).unwrap();
        let root = document.root_element();
        assert_eq!(root.attribute("id"), None);
        assert_eq!(child(root, "name").unwrap().text(), Some("web <2>"));
        assert_eq!(text.matches("33333333-3333-3333-3333-333333333333").count(), 2, "uuid and sysinfo");
        assert_eq!(text.matches("11111111").count() + text.matches("22222222").count(), 0);
        assert!(text.contains("<genid/>") && text.contains("kept &amp; read"));
        assert!(text.contains("<nvram template='/usr/share/V.fd'>/b/VARS.fd</nvram>"), "{text}");
        assert!(!text.contains("dynamic") && text.contains("type='static'"));
        let devices = child(root, "devices").unwrap();
        let disks: Vec<_> = devices.children().filter(|node| node.has_tag_name("disk")).collect();
        assert_eq!(disks.len(), 3);
        assert_eq!(child(disks[0], "source").unwrap().attribute("file"), Some("/b/web 'x'.raw"));
        let driver = child(disks[0], "driver").unwrap();
        assert_eq!((driver.attribute("type"), driver.attribute("cache")), (Some("raw"), Some("none")));
        assert!(child(disks[0], "backingStore").is_none());
        assert_eq!((disks[1].attribute("type"), disks[1].attribute("device")), (Some("file"), Some("disk")));
        assert_eq!(child(disks[1], "source").unwrap().attribute("file"), Some("/b/sdb.qcow2"));
        assert_eq!(child(disks[1], "driver").unwrap().attribute("type"), Some("qcow2"));
        assert!(child(disks[2], "source").is_none(), "the medium is out");
        let adapters: Vec<_> = devices.children().filter(|node| node.has_tag_name("interface")).collect();
        assert_eq!(adapters.len(), 3);
        for adapter in adapters {
            assert_eq!(child(adapter, "link").unwrap().attribute("state"), Some("down"));
            assert!(child(adapter, "mac").is_none());
        }
    }

    #[test]
    fn networks_are_mapped_by_name() {
        assert_eq!(networks(MACHINE), ["lan", "br0"]);
        let map = Network::Map([("lan".to_owned(), "test&1".to_owned())].into());
        let text = rewritten(MACHINE, &changes(&map)).unwrap();
        assert!(text.contains("<source network='test&amp;1'/>") && text.contains("bridge='br0'"), "{text}");
        let kept = Changes { new_addresses: false, eject: false, ..changes(&Network::Keep) };
        let text = rewritten(MACHINE, &kept).unwrap();
        assert!(
            text.contains("52:54:00:00:00:01") && text.contains("/iso/x.iso") && !text.contains("'down'")
        );
    }

    #[test]
    fn what_is_no_machine_is_refused() {
        for wrong in ["", "<network/>", "<domain>", "<domain/>"] {
            assert!(rewritten(wrong, &changes(&Network::Keep)).is_err(), "{wrong}");
        }
        let plain = rewritten("<domain><devices/></domain>", &changes(&Network::Keep)).unwrap();
        assert!(Document::parse(&plain).unwrap().root_element().children().count() == 3, "{plain}");
    }
}
