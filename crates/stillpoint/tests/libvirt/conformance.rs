//! The examination of providers, on machines of a real libvirt.

use std::time::Duration;

use datasource::conformance::{self, Rig};
use datasource::libvirt::{Libvirt, Settings};
use datasource::{ImagesSource, LibvirtSource, MachineSpec, Provider, Source};
use model::{ByteRange, DatasourceId};

use crate::hosts::{Host, Hosts};
use crate::program::tool;

struct Guest {
    host: Host,
    provider: Libvirt,
    notes: tempfile::TempDir,
    /// The last disk, where the machine is off.
    image: Option<(std::path::PathBuf, &'static str)>,
}

impl Guest {
    fn new(host: Host, image: Option<(std::path::PathBuf, &'static str)>) -> Guest {
        let notes = tempfile::tempdir().unwrap();
        let provider = Libvirt::new(Settings {
            socket: host.socket(),
            scratch: None,
            monitor: true,
            freeze_limit: Duration::from_secs(3),
            tpm: "/var/lib/libvirt/swtpm".into(),
            notes: notes.path().to_owned(),
            program: None,
        });
        Guest { host, provider, notes, image }
    }
}

impl Rig for Guest {
    fn provider(&self) -> &dyn Provider {
        &self.provider
    }

    fn machine(&self) -> MachineSpec {
        let id: DatasourceId = self.host.virsh(&["domuuid", "g1"]).trim().replace('-', "").parse().unwrap();
        let source =
            LibvirtSource { owner: "00112233445566778899aabbccddeeff".to_owned(), ..Default::default() };
        MachineSpec { id, name: "g1".to_owned(), source: Source::Libvirt(source) }
    }

    fn absent(&self) -> MachineSpec {
        MachineSpec { id: DatasourceId([0x42; 16]), name: "nobody".to_owned(), ..self.machine() }
    }

    fn foreign(&self) -> MachineSpec {
        let source = Source::Images(ImagesSource { disks: Vec::new(), allow_backing: Vec::new() });
        MachineSpec { source, ..self.machine() }
    }

    fn fill(&self, range: ByteRange, byte: u8) {
        let (start, length) = (range.start, range.len());
        match &self.image {
            Some((image, format)) => {
                let write = format!("write -P {byte} {start} {length}");
                tool("qemu-io", &["-f", format, "-c", &write, &image.display().to_string()]);
            }
            None => {
                let source = format!("head -c {length} /dev/zero | tr '\\000' '\\{byte:03o}'");
                let sink = format!("dd of=/dev/vdb bs=4096 seek={} conv=notrunc,fsync", start / 4096);
                let said = self.host.said("g1", &format!("{source} | {sink} 2>/dev/null && echo written"));
                assert_eq!(said.trim(), "written");
            }
        }
    }

    fn tracks(&self) -> bool {
        self.image.is_none()
    }

    fn leftovers(&self) -> Vec<String> {
        let mut found = self.host.leftovers("g1");
        // What was replaced is kept for its time.
        found.retain(|name| !name.contains("-replaced-"));
        let notes = std::fs::read_dir(self.notes.path()).unwrap();
        let names = notes.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        // The lock of a claim is a file that stays.
        found.extend(names.filter(|name| name.contains("frozen") || name.contains("paused")));
        // Nothing to ask where it is off.
        let nodes = ["qemu-monitor-command", "g1", "{\"execute\":\"query-named-block-nodes\"}"];
        let nodes = String::from_utf8_lossy(&self.host.virsh_output(&nodes).stdout).into_owned();
        found.extend(nodes.contains("-read-").then(|| "a bitmap for reading".to_owned()));
        found
    }

    fn folder(&self) -> String {
        self.host.images().display().to_string()
    }
}

/// S17, S22, S26, S32, INV-21, INV-22, of a running machine; one disk has sectors of 4096 bytes.
#[test]
fn a_running_machine_conforms() {
    let hosts = Hosts::start(&["a"]);
    let host = hosts.host("a");
    let (first, second) = (host.disk_of("g1", "qcow2", 128), host.disk_of("d2", "qcow2", 16));
    host.define_with("g1", &[&first, &second], 0, "");
    let target = "<target dev='vdb' bus='virtio'/>";
    let text = host.virsh(&["dumpxml", "g1", "--inactive"]);
    assert!(text.contains(target), "{text}");
    let text = text
        .replace(target, &format!("{target}<blockio logical_block_size='4096' physical_block_size='4096'/>"));
    let file = host.images().join("g1.xml");
    std::fs::write(&file, text).unwrap();
    host.virsh(&["define", &file.display().to_string()]);
    host.boot("g1");
    conformance::all(&Guest::new(host, None));
}

/// The same of one that is off, with a disk whose size libvirt does not tell.
#[test]
fn a_stopped_machine_conforms() {
    let hosts = Hosts::start(&["a"]);
    let host = hosts.host("a");
    let (first, second) = (host.disk_of("g1", "qcow2", 64), host.disk_of("d2", "vhdx", 16));
    host.define_with("g1", &[&first, &second], 0, "");
    conformance::all(&Guest::new(host, Some((second, "vhdx"))));
}
