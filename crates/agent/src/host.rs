//! A host's work: what an order of the server means for the providers of this machine.
//!
//! The same code whether the order came over a network or from the same process. Blocking; one thread an order.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use block_io::{BlockDevice, ThrottledDevice, WritableDevice};
use datasource::{
    Changed, DiskDescription, FreezeMethod, FreezeRequest, FrozenView, Images, MachineDescription,
    MachineSpec, Provider, Source, TargetRequest,
};
use disk_image::ImageFormat;
use disk_image::probe::NewDisk;
use environment::{Clock, Randomness};
use model::{
    BaseImage, Cause, Code, CompletedMachine, Consistency, DatasourceId, HostMachine, JobId, MachineRecovery,
    PreparedMachine, Problem, RecoveryPointId, Unfrozen,
};
use transfer::message::{FromTarget, ToAgent, ToServer, ToTarget};
use transfer::{
    Connector, DiskOrder, Mode, Sender, SenderError, SenderSettings, Steer, Target, TargetError,
    TargetSettings,
};

use crate::cpu::{Restraint, lower_priority};

/// How long a recovery waits for another one to leave its target.
const TARGET_GRACE: std::time::Duration = std::time::Duration::from_secs(15);

/// The providers of this machine and the world around them.
pub struct Host {
    images: Images,
    #[cfg(unix)]
    libvirt: datasource::Libvirt,
    clock: Arc<dyn Clock>,
    randomness: Arc<dyn Randomness>,
    running: Mutex<Vec<(JobId, Steer)>>,
    restraint: Restraint,
}

/// What a host told about a machine that it sent.
#[derive(Debug, Clone)]
pub struct Sent {
    /// The machine at the frozen moment.
    pub description: MachineDescription,
    /// How far that moment can be trusted.
    pub consistency: Consistency,
    /// Why that far.
    pub evidence: String,
    /// What else the machine is.
    pub configuration: String,
}

/// How a machine is to stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The consistency to aim at.
    pub consistency: Consistency,
    /// What is made of a running machine that cannot be frozen.
    pub unfrozen: Unfrozen,
    /// Whether it will be asked again before that.
    pub may_retry: bool,
    /// Bytes that the machine is predicted to overwrite meanwhile.
    pub scratch_bytes: u64,
}

/// What is to be written where.
#[derive(Debug, Clone)]
pub struct Receive {
    /// The job.
    pub job: JobId,
    /// The point that is recovered.
    pub point: RecoveryPointId,
    /// Its disk, from 0.
    pub disk: u32,
    /// The file that will be there in the end.
    pub path: PathBuf,
    /// `raw`, `vhd`, `vhdx` or `qcow2`.
    pub format: String,
    /// Bytes of the disk.
    pub size: u64,
    /// 512 or 4096.
    pub sector: u32,
    /// The disk's description in the point, as JSON.
    pub description: String,
    /// The image that the file is a difference to; a full image if absent.
    pub over: Option<BaseImage>,
    /// Whether an existing file may be replaced.
    pub overwrite: bool,
    /// Whether to wait for the target's disk at the end.
    pub sync: bool,
}

/// Reads a machine's definition.
pub fn machine(definition: &str) -> Result<MachineSpec, Problem> {
    serde_json::from_str(definition).map_err(|error| {
        Problem::new(Code::ProtocolBroken, format!("The definition of the machine cannot be read: {error}."))
    })
}

fn cancelled() -> Problem {
    Problem::new(Code::Cancelled, "The job was cancelled.")
}

impl Host {
    /// A host with the providers that this program has.
    pub fn new(clock: Arc<dyn Clock>, randomness: Arc<dyn Randomness>) -> Host {
        let (running, restraint) = (Mutex::default(), Restraint::default());
        Host {
            images: Images::new(),
            #[cfg(unix)]
            libvirt: datasource::Libvirt::default(),
            clock,
            randomness,
            running,
            restraint,
        }
    }

    /// The same host, with libvirt reached and guarded this way.
    #[cfg(unix)]
    pub fn with_libvirt(self, settings: datasource::libvirt::Settings) -> Host {
        Host { libvirt: datasource::Libvirt::new(settings), ..self }
    }

    /// The machines that the hypervisor of this host knows.
    pub fn inventory(&self) -> Result<Vec<HostMachine>, Problem> {
        #[cfg(unix)]
        return match self.libvirt.is_there() {
            true => self.libvirt.inventory().map_err(Problem::from),
            false => Err(self.libvirt.absence().into()),
        };
        #[cfg(not(unix))]
        self.images.inventory().map_err(Problem::from)
    }

    /// The same host, held back.
    pub fn restrained(self, restraint: Restraint) -> Host {
        Host { restraint, ..self }
    }

    /// Names of the providers.
    pub fn providers(&self) -> Vec<&'static str> {
        #[cfg(unix)]
        if self.libvirt.is_there() {
            return vec![self.images.name(), self.libvirt.name()];
        }
        vec![self.images.name()]
    }

    fn provider(&self, machine: &MachineSpec) -> &dyn Provider {
        match &machine.source {
            Source::Images(_) => &self.images,
            #[cfg(unix)]
            Source::Libvirt(_) => &self.libvirt,
            #[cfg(not(unix))]
            Source::Libvirt(_) => &self.images,
        }
    }

    /// Looks at a machine without disturbing it.
    pub fn inspect(&self, machine: &MachineSpec) -> Result<MachineDescription, Problem> {
        self.provider(machine).inspect(machine).map_err(Problem::from)
    }

    /// Removes what crashed jobs left behind for these machines; gives lines for the log.
    pub fn sweep(&self, machines: &[MachineSpec]) -> Result<Vec<String>, Problem> {
        let mut removed = Vec::new();
        for machine in machines {
            let provider = self.provider(machine);
            let swept = provider.sweep(std::slice::from_ref(machine)).map_err(Problem::from)?;
            removed.extend(swept.removed);
            removed.extend(swept.troubles);
        }
        Ok(removed)
    }

    /// Ends a running order.
    pub fn cancel(&self, job: JobId) {
        for (_, steer) in self.running().iter().filter(|(running, _)| *running == job) {
            steer.cancel();
        }
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Vec<(JobId, Steer)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, job: JobId, steer: Steer) -> Running<'_> {
        self.running().push((job, steer));
        Running { host: self, job }
    }

    /// Freezes a machine, sends what is ordered, and proves that the view stood still until the end.
    pub fn send(
        &self,
        job: JobId,
        machine: &MachineSpec,
        orders: Vec<DiskOrder>,
        wanted: Wanted,
        settings: SenderSettings,
        connector: &mut dyn Connector<ToServer, ToAgent>,
    ) -> Result<Sent, Problem> {
        if self.restraint.low_priority {
            // This thread and the transfer's, which it starts, end with the order.
            lower_priority();
        }
        let since = orders.iter().map(|order| match &order.mode {
            Mode::Tracked { base, .. } => serde_json::from_str(base).ok(),
            _ => None,
        });
        let request = FreezeRequest {
            job,
            wanted: wanted.consistency,
            unfrozen: wanted.unfrozen,
            may_retry: wanted.may_retry,
            scratch_bytes: wanted.scratch_bytes,
            since: since.collect(),
        };
        let view = self.provider(machine).freeze(machine, &request).map_err(Problem::from)?;
        if view.disks().len() != orders.len() {
            return Err(Problem::new(
                Code::SourceChanged,
                format!(
                    "{} has {} disks, the order is for {}.",
                    machine.name,
                    view.disks().len(),
                    orders.len()
                ),
            )
            .about(machine.name.clone()));
        }
        let paced = |device: &Arc<dyn BlockDevice>| match &self.restraint.cpu {
            Some(cpu) => Arc::new(ThrottledDevice::new(device.clone(), cpu.clone())) as Arc<dyn BlockDevice>,
            None => device.clone(),
        };
        let orders = view.disks().iter().zip(orders).map(|(disk, order)| resolved(order, &disk.changed));
        let disks = view.disks().iter().map(|disk| paced(&disk.device)).zip(orders).collect();
        let sender = Sender::new(disks, settings);
        let running = self.begin(job, sender.steer());
        let result = sender.run(connector);
        drop(running);
        match result {
            Ok(_) => {}
            Err(SenderError::Device { disk, source }) => {
                let known = view.disks().get(disk as usize);
                let unknown = unknown_disk();
                let description = known.map_or(&unknown, |disk| &disk.description);
                return Err(view.explain(description, &source).into());
            }
            Err(SenderError::Cancelled) => return Err(cancelled()),
            Err(SenderError::Link(error)) => return Err(Problem::new(Code::NoContact, format!("{error}."))),
            Err(error) => return Err(Problem::new(Code::ProtocolBroken, format!("{error}."))),
        }
        view.verify_unchanged().map_err(Problem::from)?;
        Ok(Sent {
            description: view.description().clone(),
            consistency: view.consistency(),
            evidence: evidence(&*view),
            configuration: view.configuration().to_owned(),
        })
    }

    /// Checks what can be checked before a whole machine is recovered, and says where its disks go.
    pub fn prepare_machine(&self, recovery: &MachineRecovery) -> Result<PreparedMachine, Problem> {
        let mut id = [0; 16];
        self.randomness.fill(&mut id).map_err(|error| {
            Problem::new(Code::Internal, format!("No random bytes for a machine's identity: {error}."))
        })?;
        let provider = self.provider(&machine(&recovery.spec)?);
        provider.prepare_machine(recovery, DatasourceId(id)).map_err(Problem::from)
    }

    /// Makes a machine of the disks that were received.
    pub fn complete_machine(
        &self,
        recovery: &MachineRecovery,
        prepared: &PreparedMachine,
    ) -> Result<CompletedMachine, Problem> {
        self.provider(&machine(&recovery.spec)?).complete_machine(recovery, prepared).map_err(Problem::from)
    }

    /// Removes what a recovery made that will not be completed.
    pub fn abandon_machine(
        &self,
        recovery: &MachineRecovery,
        prepared: &PreparedMachine,
    ) -> Result<(), Problem> {
        self.provider(&machine(&recovery.spec)?).abandon_machine(recovery, prepared).map_err(Problem::from)
    }

    /// Opens a target, waiting a little for another recovery that fills it: one whose server was restarted does not know
    /// yet that nobody waits for it, and ends when it asks.
    fn free_target(&self, request: &TargetRequest) -> Result<datasource::RecoveryTarget, Problem> {
        let began = self.clock.monotonic_micros();
        loop {
            match self.images.recovery_target(request) {
                Err(datasource::ProviderError::TargetBusy { .. })
                    if self.clock.monotonic_micros().saturating_sub(began)
                        < TARGET_GRACE.as_micros() as u64 =>
                {
                    self.clock.sleep(std::time::Duration::from_millis(200));
                }
                other => return other.map_err(Problem::from),
            }
        }
    }

    /// Writes a recovered disk, and gives the file its name when everything is there.
    pub fn receive(
        &self,
        order: &Receive,
        connector: &mut dyn Connector<FromTarget, ToTarget>,
    ) -> Result<(), Problem> {
        let format: ImageFormat = order
            .format
            .parse()
            .map_err(|error: String| Problem::new(Code::TargetFormat, format!("{error}.")))?;
        let mut ids = [[0u8; 16]; 3];
        for id in &mut ids {
            self.randomness.fill(id).map_err(|error| {
                Problem::new(Code::Internal, format!("No random bytes for a new image: {error}."))
            })?;
        }
        let described: Option<DiskDescription> = serde_json::from_str(&order.description).ok();
        let fixed = described
            .filter(|described| described.format == order.format)
            .and_then(|described| described.properties.get("subformat").cloned())
            .is_some_and(|kind| kind == "fixed");
        let request = TargetRequest {
            path: order.path.clone(),
            format,
            new: NewDisk {
                size: order.size,
                logical_sector_size: order.sector,
                fixed,
                ids,
                created: seconds_since_2000(self.clock.now_micros()),
            },
            point: order.point,
            disk: format!("disk{}", order.disk),
            overwrite: order.overwrite,
            over: order
                .over
                .as_ref()
                .map(|base| -> Result<datasource::BaseImage, Problem> {
                    Ok(datasource::BaseImage {
                        path: PathBuf::from(&base.path),
                        format: base
                            .format
                            .parse()
                            .map_err(|error: String| Problem::new(Code::TargetFormat, format!("{error}.")))?,
                        allow_backing: base.folders.iter().map(PathBuf::from).collect(),
                    })
                })
                .transpose()?,
        };
        let target = self.free_target(&request)?;
        let device = target.device();
        let steer = Steer::new();
        let running = self.begin(order.job, steer.clone());
        let paced;
        let written: &dyn WritableDevice = match &self.restraint.cpu {
            Some(cpu) => {
                paced = ThrottledDevice::new(&*device, cpu.clone());
                &paced
            }
            None => &*device,
        };
        let result = Target::new(written, TargetSettings { fresh: target.fresh() }, steer).run(connector);
        drop(running);
        match result {
            Ok(_) => {}
            Err(TargetError::Device(error)) => {
                let object = order.path.display().to_string();
                return Err(datasource::ProviderError::from_target_device(object, &error).into());
            }
            Err(TargetError::Cancelled) => return Err(cancelled()),
            Err(TargetError::Link(error)) => return Err(Problem::new(Code::NoContact, format!("{error}."))),
            Err(error @ TargetError::NotVerified) => {
                return Err(Problem::new(Code::TargetWrite, format!("{error}."))
                    .about(order.path.display().to_string()));
            }
            Err(error) => return Err(Problem::new(Code::ProtocolBroken, format!("{error}."))),
        }
        drop(device);
        target.finish(order.sync).map_err(Problem::from)
    }
}

struct Running<'a> {
    host: &'a Host,
    job: JobId,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut running = self.host.running();
        if let Some(position) = running.iter().position(|(job, _)| *job == self.job) {
            running.remove(position);
        }
    }
}

/// VHD counts from the year 2000.
fn seconds_since_2000(micros: u64) -> u32 {
    u32::try_from((micros / 1_000_000).saturating_sub(946_684_800)).unwrap_or(u32::MAX)
}

/// The order with what the host's tracker says in the place of the question.
fn resolved(order: DiskOrder, changed: &Changed) -> DiskOrder {
    let Mode::Tracked { rotation, .. } = order.mode else { return order };
    match changed {
        Changed::Listed { ranges, because } => DiskOrder {
            mode: Mode::Extents { listed: ranges.clone(), rotation },
            because: because.clone(),
            ..order
        },
        Changed::Unknown { because } => DiskOrder {
            mode: Mode::Full {
                cause: Cause { decision: "full compare".to_owned(), because: vec![because.clone()] },
            },
            because: because.clone(),
            ..order
        },
    }
}

fn unknown_disk() -> DiskDescription {
    DiskDescription {
        key: String::new(),
        file_name: "a disk".to_owned(),
        format: String::new(),
        size: 0,
        sector: 512,
        chain: 1,
        tracked: false,
        properties: std::collections::BTreeMap::new(),
    }
}

fn evidence(view: &dyn FrozenView) -> String {
    match view.method() {
        FreezeMethod::Reflink => match view.consistency() {
            Consistency::Offline => {
                "copies sharing their blocks with the images, nobody had them open for writing".to_owned()
            }
            _ => "copies sharing their blocks with images that were in use".to_owned(),
        },
        FreezeMethod::Checkpoint { evidence } => evidence.clone(),
        FreezeMethod::InPlace { because } => {
            format!("images read in place ({because}); nobody wrote to them from the first to the last byte")
        }
    }
}
