//! Machines of libvirt: QEMU and KVM.
//!
//! Running machines are frozen by their guest agent, given a checkpoint and read over NBD while they go on; what changed since
//! the newest point comes from QEMU's dirty bitmaps. Stopped machines are read from their image files. Decision and order of
//! steps: docs/design/0020-libvirt.md.
//!
//! Refuses to know: the server, the pool, what is done with the bytes.
//!
//! Invariants
//! - A guest that was frozen is thawed, also if this program is killed (`guard`). (must)
//! - A list counts only if libvirt and QEMU made it from the checkpoint that the newest point names, for the same file of the
//!   same disk; in any doubt it is unknown what changed (INV-22). (must)
//! - What is not named by our mark is never removed (INV-21). (must)

mod base;
mod capacity;
mod claim;
mod configuration;
mod definition;
pub mod guard;
mod monitor;
mod properties;
mod recovery;
mod request;
mod rpc;
mod scratch;
mod still;
mod stopped;
mod swap;
mod view;
mod volumes;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::{CompletedMachine, DatasourceId, HostDisk, HostMachine, MachineRecovery, Power, PreparedMachine};

pub use rpc::LibvirtError;
pub use view::LibvirtView;

use crate::images::Images;
use crate::{
    FreezeRequest, FrozenView, ImageSource, ImagesSource, LibvirtSource, MachineDescription, MachineSpec,
    Provider, ProviderError, RecoveryTarget, Source, Swept, TargetRequest,
};
use claim::Claim;
use configuration::Configuration;
use rpc::{Connection, Domain, State};
use view::Found;

/// Begins the name of every checkpoint of ours; the job's id follows.
const CHECKPOINT: &str = "stillpoint-";

/// How the provider works.
#[derive(Debug, Clone)]
pub struct Settings {
    /// libvirt's socket.
    pub socket: PathBuf,
    /// Where QEMU keeps what running machines overwrite during a backup; each image's own folder if absent.
    pub scratch: Option<PathBuf>,
    /// Whether QEMU's own monitor may be used, which taints a machine: for lists of changes of raw, VHD and VHDX disks.
    pub monitor: bool,
    /// How long file systems of a guest may be frozen.
    pub freeze_limit: Duration,
    /// Where the emulator of TPMs keeps their state, a folder for each machine.
    pub tpm: PathBuf,
    /// Where notes of frozen guests lie. They need not outlive a restart of the host.
    pub notes: PathBuf,
    /// This program, for the guard over a freeze; a thread of this process if absent.
    pub program: Option<PathBuf>,
}

/// Sockets of libvirt's daemons, the newer one first.
const SOCKETS: [&str; 2] = ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"];

impl Default for Settings {
    fn default() -> Settings {
        let found = SOCKETS.iter().find(|path| Path::new(path).exists());
        Settings {
            socket: found.unwrap_or(&SOCKETS[1]).into(),
            scratch: None,
            monitor: true,
            freeze_limit: Duration::from_secs(3),
            tpm: "/var/lib/libvirt/swtpm".into(),
            notes: "/run/stillpoint".into(),
            program: None,
        }
    }
}

/// The provider of libvirt's machines.
#[derive(Debug, Clone, Default)]
pub struct Libvirt {
    settings: Settings,
    images: Images,
    volumes: volumes::Volumes,
}

/// What a failed call means.
fn failed(object: &str, error: &LibvirtError) -> ProviderError {
    let (object, reason) = (object.to_owned(), error.to_string());
    match error {
        LibvirtError::Connect { .. } | LibvirtError::Lost(_) | LibvirtError::TimedOut { .. } => {
            ProviderError::Read { object, reason }
        }
        LibvirtError::Protocol(_) => ProviderError::Unsupported { object, reason },
        LibvirtError::Refused { code, .. } if *code == LibvirtError::NO_DOMAIN => {
            ProviderError::Missing { object, reason }
        }
        LibvirtError::Refused { .. } => ProviderError::Read { object, reason },
    }
}

fn source(machine: &MachineSpec) -> Result<&LibvirtSource, ProviderError> {
    match &machine.source {
        Source::Libvirt(source) => Ok(source),
        Source::Images(_) => Err(ProviderError::Unsupported {
            object: machine.name.clone(),
            reason: "is no machine of libvirt".to_owned(),
        }),
    }
}

/// Whether swap partitions are protected like everything else.
fn keeps_swap(machine: &MachineSpec) -> bool {
    matches!(&machine.source, Source::Libvirt(source) if source.keep_swap)
}

/// A machine for the list.
fn listed(connection: &mut Connection, domain: &Domain) -> Result<HostMachine, LibvirtError> {
    let state = connection.state(domain)?;
    let text = connection.definition(domain, state == State::Off)?;
    // A definition that cannot be understood is a machine without disks, which says so when it is to be protected.
    let found = definition::disks(&domain.name, &text).unwrap_or_default();
    let mut disks = Vec::new();
    for disk in found {
        let bytes = capacity::of(connection, domain, &disk)?;
        disks.push(HostDisk {
            name: disk.target,
            storage: disk.file.unwrap_or(disk.storage),
            format: disk.format,
            bus: disk.bus,
            bytes,
            chain: disk.chain,
            unprotected: disk.unprotected,
        });
    }
    Ok(HostMachine {
        id: DatasourceId(domain.uuid),
        name: domain.name.clone(),
        provider: "libvirt".to_owned(),
        power: match state {
            State::Running => Power::Running,
            State::Paused => Power::Paused,
            State::Off => Power::Off,
        },
        guest_agent: definition::guest_agent(&text),
        disks,
    })
}

impl Libvirt {
    /// The provider over this host's daemon.
    pub fn new(settings: Settings) -> Libvirt {
        Libvirt { settings, images: Images::new(), volumes: volumes::Volumes::default() }
    }

    /// Why this host has no machines, if it has no daemon.
    pub fn absence(&self) -> ProviderError {
        ProviderError::Unsupported {
            object: self.settings.socket.display().to_string(),
            reason: "no hypervisor is known on this host: libvirt's socket is not there; start libvirtd, or name its socket \
                     in STILLPOINT_LIBVIRT_SOCKET"
                .to_owned(),
        }
    }

    /// Whether this host has a daemon.
    pub fn is_there(&self) -> bool {
        self.settings.socket.exists()
    }

    fn open(&self, object: &str) -> Result<Connection, ProviderError> {
        Connection::open(&self.settings.socket).map_err(|error| failed(object, &error))
    }

    /// The machine and whether it runs.
    fn find(&self, machine: &MachineSpec) -> Result<Found, ProviderError> {
        let mut connection = self.open(&machine.name)?;
        let told = |error: LibvirtError| failed(&machine.name, &error);
        let domain = connection.domain(&machine.id.0).map_err(told)?.ok_or_else(|| ProviderError::Missing {
            object: machine.name.clone(),
            reason: "libvirt on this host has no machine of its UUID: was it removed or moved to another host?"
                .to_owned(),
        })?;
        let state = connection.state(&domain).map_err(told)?;
        Ok(Found { connection, domain, state })
    }

    /// The image files of a stopped machine.
    fn at_rest(
        &self,
        connection: &mut Connection,
        domain: &Domain,
        machine: &MachineSpec,
    ) -> Result<(Vec<definition::Disk>, MachineSpec), ProviderError> {
        let text = connection.definition(domain, true).map_err(|error| failed(&machine.name, &error))?;
        let disks =
            view::chosen(machine, &source(machine)?.exclude, definition::disks(&machine.name, &text)?)?;
        let images = disks.iter().map(|disk| ImageSource {
            path: disk.file.clone().unwrap_or_default().into(),
            format: Some(disk.format.clone()),
            sector: disk.sector,
        });
        let source = Source::Images(ImagesSource { disks: images.collect(), allow_backing: Vec::new() });
        Ok((disks, MachineSpec { source, ..machine.clone() }))
    }

    fn sweep_machine(&self, machine: &MachineSpec, swept: &mut Swept) -> Result<(), ProviderError> {
        let told = |error: LibvirtError| failed(&machine.name, &error);
        // Held until the end, so that no view begins meanwhile.
        let Some(_claim) = Claim::of(machine, &self.settings.notes)? else {
            swept.in_use.push(machine.name.clone());
            return Ok(());
        };
        for (act, what) in [(guard::Act::Thaw, "a freeze"), (guard::Act::Resume, "a pause")] {
            let watch = guard::Watch {
                act,
                socket: self.settings.socket.clone(),
                machine: machine.id,
                limit: self.settings.freeze_limit,
                note: still::note(&self.settings, machine.id, act),
            };
            // Nobody else has a view, so it is over or its maker is dead, and so may be his guard.
            if watch.note.exists() && guard::release(&watch, false, || !watch.note.exists()) {
                swept.removed.push(format!("{what} of {}", machine.name));
            }
        }
        let mut connection = self.open(&machine.name)?;
        let Some(domain) = connection.domain(&machine.id.0).map_err(told)? else { return Ok(()) };
        let text = connection.definition(&domain, false).map_err(told)?;
        if let Some(job) = connection.backup(&domain).map_err(told)? {
            let files: Vec<PathBuf> = definition::files_of(&job).into_iter().map(PathBuf::from).collect();
            let is_ours = |file: &PathBuf| file.parent().is_some_and(scratch::is_marked);
            if files.is_empty() || !files.iter().all(is_ours) {
                return Ok(());
            }
            view::end(&mut connection, &domain).map_err(told)?;
            scratch::remove(&files);
            swept.removed.push(format!("a backup job of {}", machine.name));
        }
        let disks = definition::disks(&machine.name, &text).unwrap_or_default();
        let images = disks.iter().filter_map(|disk| Path::new(disk.file.as_deref()?).parent());
        let mut folders: BTreeSet<PathBuf> = images.map(Path::to_owned).collect();
        folders.extend(self.settings.scratch.clone());
        folders.insert("/var/tmp".into());
        swept.removed.extend(scratch::remove_left(machine, &folders));
        let removed = &mut swept.removed;
        // What keeps an old recovery from its end must not keep the machine from being protected.
        if let Err(error) = recovery::sweep(&mut connection, machine, &domain, &text, removed) {
            swept.troubles.push(format!("a recovery of {} is not at its end: {error}", machine.name));
            connection = self.open(&machine.name)?;
        }
        if domain.id >= 0 {
            let any = view::sweep_copies(&mut connection, &domain, machine, &disks, &self.settings);
            if any.map_err(told)? {
                swept.removed.push(format!("bitmaps of a job of {}", machine.name));
            }
        }
        Ok(())
    }
}

impl Provider for Libvirt {
    fn name(&self) -> &'static str {
        "libvirt"
    }

    fn inventory(&self) -> Result<Vec<HostMachine>, ProviderError> {
        let object = self.settings.socket.display().to_string();
        let mut connection = self.open(&object)?;
        let domains = connection.domains().map_err(|error| failed(&object, &error))?;
        let mut machines = Vec::new();
        for domain in domains {
            match listed(&mut connection, &domain) {
                Ok(machine) => machines.push(machine),
                // Removed while the list was made.
                Err(error) if error.code() == Some(LibvirtError::NO_DOMAIN) => {}
                Err(error) => return Err(failed(&domain.name, &error)),
            }
        }
        machines.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(machines)
    }

    fn inspect(&self, machine: &MachineSpec) -> Result<MachineDescription, ProviderError> {
        let exclude = &source(machine)?.exclude;
        let Found { mut connection, domain, state } = self.find(machine)?;
        let text = connection
            .definition(&domain, state == State::Off)
            .map_err(|error| failed(&machine.name, &error))?;
        let mut disks = Vec::new();
        for disk in view::chosen(machine, exclude, definition::disks(&machine.name, &text)?)? {
            let bytes = match capacity::in_image(&domain, &disk) {
                Some(found) => found?,
                None => {
                    let info = connection.block_info(&domain, &disk.target);
                    let object = format!("{} disk {}", machine.name, disk.target);
                    info.map_err(|error| failed(&object, &error))?.capacity
                }
            };
            disks.push(view::describe(&disk, bytes, None));
        }
        Ok(MachineDescription { id: machine.id, name: domain.name, provider: "libvirt".to_owned(), disks })
    }

    fn freeze(
        &self,
        machine: &MachineSpec,
        request: &FreezeRequest,
    ) -> Result<Box<dyn FrozenView>, ProviderError> {
        let exclude = &source(machine)?.exclude;
        let mut found = self.find(machine)?;
        if found.state == State::Off {
            if found.connection.has_left(&found.domain).map_err(|error| failed(&machine.name, &error))? {
                return Err(ProviderError::Missing {
                    object: machine.name.clone(),
                    reason: "it was migrated from this host to another one, which runs it with these very images: enrol that host, \
                             or start its agent"
                        .to_owned(),
                });
            }
            let (disks, images) = self.at_rest(&mut found.connection, &found.domain, machine)?;
            let inner = self.images.freeze(&images, request)?;
            let Found { connection, domain, .. } = &mut found;
            let kept = Configuration::capture(connection, domain, &disks, &self.settings.tpm);
            let (configuration, _) = kept.map_err(|error| failed(&machine.name, &error))?;
            let configuration = configuration.encode()?;
            return Ok(Box::new(stopped::Stopped::new(inner, machine, &disks, &domain.name, configuration)));
        }
        let claim = Claim::of(machine, &self.settings.notes)?.ok_or_else(|| ProviderError::Locked {
            object: machine.name.clone(),
            reason: "another job of it runs".to_owned(),
        })?;
        let means = (&self.settings, &self.volumes);
        Ok(Box::new(view::freeze(found, machine, exclude, request, means, claim)?))
    }

    fn recovery_target(&self, request: &TargetRequest) -> Result<RecoveryTarget, ProviderError> {
        crate::images::target(request)
    }

    fn prepare_machine(
        &self,
        recovery: &MachineRecovery,
        new: DatasourceId,
    ) -> Result<PreparedMachine, ProviderError> {
        recovery::prepare(&self.settings, recovery, new)
    }

    fn complete_machine(
        &self,
        recovery: &MachineRecovery,
        prepared: &PreparedMachine,
    ) -> Result<CompletedMachine, ProviderError> {
        recovery::complete(&self.settings, recovery, prepared)
    }

    fn abandon_machine(
        &self,
        recovery: &MachineRecovery,
        prepared: &PreparedMachine,
    ) -> Result<(), ProviderError> {
        recovery::abandon(&self.settings, recovery, prepared)
    }

    fn sweep(&self, machines: &[MachineSpec]) -> Result<Swept, ProviderError> {
        let mut swept = Swept::default();
        for machine in machines {
            self.sweep_machine(machine, &mut swept)?;
        }
        Ok(swept)
    }
}
