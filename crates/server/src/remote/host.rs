//! An enrolled host, as jobs use it.
//!
//! ```text
//! send:  open the job's doorway -> SendOrder -> links, one after each cut -> result of the command
//! ```
//!
//! A cut is waited out up to [`RemoteTimes::link_grace`]; meanwhile the agent's own word on the control session counts:
//! if it gave up, its problem ends the wait. Every wait looks at the job's cancel several times a second.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jobs::port::{AgentEnd, TargetEnd};
use jobs::{
    DiskView, Machine, MachineView, ProtectedHost, ReceiveOrder, Receiving, SendOrder, Sending, SentView,
};
use model::{
    Code, CompletedMachine, HostId, HostMachine, JobId, MachineRecovery, PreparedMachine, Problem, RangeSet,
};
use protocol::channel::{ChannelError, Doorway};
use protocol::machine::{MachineReport, MachineStep, SentReport};
use protocol::stream::JobStreams;
use protocol::v0::{self, command, disk_read};
use protocol::wire::{LIST_RANGES, broken, tame};
use transfer::message::{MAX_DISKS, ToAgent, ToServer};
use transfer::{Encoded, Link, LinkError, Message, Mode, Steer, Wire};

use super::stream::{Broken, StreamWire, link_error};
use crate::session::{AgentSession, PendingCommand, SessionRegistry};

/// How often a wait looks at cancels and results.
const LOOK: Duration = Duration::from_millis(200);
/// Ranges to heal in one order: they travel in the order itself, which has a largest size.
const HEAL_RANGES: usize = 8 * 1024;
/// Most machines of a host: no hypervisor of today runs a tenth of it.
const MACHINES: usize = 16 * 1024;
/// Longest configuration of a machine: a definition, firmware variables and the state of a TPM are some hundred KiB.
const CONFIGURATION_BYTES: usize = 2 << 20;
/// Longest description of a disk.
const DESCRIPTION_BYTES: usize = 64 * 1024;
/// The largest disk of any format (VHDX: 64 TB).
const DISK_BYTES: u64 = 64 << 40;

/// How long to wait for a host.
#[derive(Debug, Clone, Copy)]
pub struct RemoteTimes {
    /// For a host that is not connected when a job wants it: a server that was just started is found within seconds.
    pub arrival: Duration,
    /// For a quick answer.
    pub answer: Duration,
    /// For a step of the recovery of a machine.
    pub machine: Duration,
    /// For the next link after a cut.
    pub link_grace: Duration,
    /// For the end of work that was cancelled.
    pub ending: Duration,
}

impl Default for RemoteTimes {
    fn default() -> RemoteTimes {
        RemoteTimes {
            arrival: Duration::from_secs(15),
            answer: Duration::from_secs(120),
            machine: Duration::from_secs(900),
            link_grace: Duration::from_secs(300),
            ending: Duration::from_secs(10),
        }
    }
}

/// An enrolled host.
pub struct RemoteHost {
    id: HostId,
    name: String,
    registry: SessionRegistry,
    times: RemoteTimes,
}

impl RemoteHost {
    /// The host `id`, called `name`.
    pub fn new(id: HostId, name: String, registry: SessionRegistry, times: RemoteTimes) -> RemoteHost {
        RemoteHost { id, name, registry, times }
    }

    fn session(&self) -> Result<AgentSession, Problem> {
        let deadline = Instant::now() + self.times.arrival;
        loop {
            if let Some(session) = self.registry.host(self.id) {
                return Ok(session);
            }
            if Instant::now() >= deadline {
                return Err(Problem::new(
                    Code::AgentUnreachable,
                    format!("The agent of host {} is not connected.", self.name),
                )
                .about(self.name.clone()));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The answer to a quick question.
    fn answer(&self, question: command::Kind) -> Result<String, Problem> {
        self.answer_within(self.times.answer, question)
    }

    fn answer_within(&self, limit: Duration, question: command::Kind) -> Result<String, Problem> {
        let command = self.session()?.start(question)?;
        command.wait_for(limit).ok_or_else(|| {
            Problem::new(
                Code::AgentUnreachable,
                format!("Host {} did not answer within {} seconds.", self.name, limit.as_secs()),
            )
            .about(self.name.clone())
        })?
    }

    /// A step of the recovery of a machine, which may have to stop a guest first.
    fn machine_step<T: serde::de::DeserializeOwned>(&self, step: &MachineStep) -> Result<T, Problem> {
        let order = v0::RecoverMachine { step_json: json(step)? };
        parsed(&self.answer_within(self.times.machine, command::Kind::RecoverMachine(order))?)
    }

    fn start(
        &self,
        session: AgentSession,
        job: JobId,
        steer: Steer,
        order: command::Kind,
    ) -> Result<Work, Problem> {
        // The doorway before the order: the agent's first stream may be quicker than we are.
        let streams = JobStreams::new(session.open_data(job));
        let command = session.start(order)?;
        Ok(Work {
            job,
            name: self.name.clone(),
            steer,
            times: self.times,
            doorway: streams.doorway(),
            streams,
            session,
            command: Some(command),
            result: None,
            broken: Broken::default(),
        })
    }
}

fn spec(definition: &str) -> v0::MachineSpec {
    let provider = serde_json::from_str::<serde_json::Value>(definition)
        .ok()
        .and_then(|value| value.get("source")?.get("provider")?.as_str().map(str::to_owned));
    v0::MachineSpec { provider: provider.unwrap_or_default(), json: definition.to_owned() }
}

/// The ranges, at most `most` of them: neighbours are joined where there are more, which reads more and never less.
fn at_most(ranges: &RangeSet, most: usize) -> Vec<v0::Range> {
    let join = ranges.as_slice().len().div_ceil(most.max(1)).max(1);
    ranges
        .as_slice()
        .chunks(join)
        .filter_map(|part| {
            let (first, last) = (part.first()?, part.last()?);
            Some(v0::Range { offset: first.start, length: last.end.saturating_sub(first.start) })
        })
        .collect()
}

fn checked(report: MachineReport) -> Result<MachineView, Problem> {
    if report.disks.len() > MAX_DISKS {
        return Err(broken(format!(
            "The machine has {} disks, at most {MAX_DISKS} can be.",
            report.disks.len()
        )));
    }
    let disks = report.disks.into_iter().enumerate().map(|(index, disk)| {
        if disk.size > DISK_BYTES || !matches!(disk.sector, 512 | 4096) {
            return Err(broken(format!(
                "Disk {index} has {} bytes in sectors of {}, expected at most {DISK_BYTES} in sectors of 512 or 4096.",
                disk.size, disk.sector
            )));
        }
        if disk.description.len() > DESCRIPTION_BYTES {
            return Err(broken(format!("Disk {index} is described in {} bytes.", disk.description.len())));
        }
        Ok(DiskView {
            size: disk.size,
            sector: disk.sector,
            description: disk.description,
            tracked: disk.tracked,
        })
    });
    Ok(MachineView { disks: disks.collect::<Result<_, Problem>>()? })
}

fn json<T: serde::Serialize>(value: &T) -> Result<String, Problem> {
    serde_json::to_string(value).map_err(|error| {
        Problem::new(Code::Internal, format!("An order cannot be written as JSON: {error}."))
    })
}

fn parsed<T: serde::de::DeserializeOwned>(json: &str) -> Result<T, Problem> {
    serde_json::from_str(json).map_err(|error| broken(format!("The agent's answer cannot be read: {error}.")))
}

impl ProtectedHost for RemoteHost {
    fn machines(&self) -> Result<Vec<HostMachine>, Problem> {
        let json = self.answer(command::Kind::ListInventory(v0::ListInventory::default()))?;
        let machines: Vec<HostMachine> = parsed(&json)?;
        if machines.len() > MACHINES {
            return Err(broken(format!("The agent lists {} machines, at most {MACHINES}.", machines.len())));
        }
        Ok(machines)
    }

    fn inspect(&self, machine: &Machine) -> Result<MachineView, Problem> {
        let inspect = v0::Inspect { machine: Some(spec(&machine.definition)) };
        checked(parsed(&self.answer(command::Kind::Inspect(inspect))?)?)
    }

    fn send(&self, order: SendOrder) -> Result<Box<dyn Sending>, Problem> {
        let disks = order.disks.iter().zip(0u32..).map(|(disk, index)| {
            let (mode, rotation) = match &disk.mode {
                Mode::Full { .. } => (disk_read::Mode::Full(v0::WholeDisk { ignore_allocation: false }), 0),
                Mode::Extents { listed, rotation } => {
                    let ranges = at_most(listed, LIST_RANGES / order.disks.len().max(1));
                    (disk_read::Mode::Extents(v0::ChangedExtents { ranges, pages: 0 }), *rotation)
                }
                Mode::Tracked { base, rotation } => {
                    (disk_read::Mode::Tracked(v0::Tracked { base_json: base.clone() }), *rotation)
                }
            };
            v0::DiskRead {
                disk: index,
                mode: Some(mode),
                rotation,
                heal: at_most(&disk.heal, HEAL_RANGES / order.disks.len().max(1)),
                ..Default::default()
            }
        });
        let message = v0::SendOrder {
            job: order.job.0.to_vec().into(),
            attempt: 1,
            machine: Some(spec(&order.machine.definition)),
            disks: disks.collect(),
            wanted: v0::Consistency::from(order.wanted) as i32,
            least: v0::Consistency::Crash as i32,
            pacing: None,
            unfrozen: v0::Unfrozen::from(order.machine.unfrozen) as i32,
            may_retry: order.may_retry,
            scratch_bytes: order.scratch_bytes,
        };
        let work = self.start(self.session()?, order.job, order.steer, command::Kind::Send(message))?;
        Ok(Box::new(RemoteSending(work)))
    }

    fn receive(&self, order: ReceiveOrder) -> Result<Box<dyn Receiving>, Problem> {
        let message = v0::ReceiveOrder {
            job: order.job.0.to_vec().into(),
            attempt: 1,
            target_path: order.path,
            format: order.format,
            disk_bytes: order.size,
            logical_sector_bytes: order.sector,
            physical_sector_bytes: order.sector,
            over_json: order.over.as_ref().map(json).transpose()?.unwrap_or_default(),
            overwrite: order.overwrite,
            durable: order.sync,
            image_json: order.description,
            pacing: None,
            point: order.point.0.to_vec().into(),
            disk: order.disk,
        };
        let work = self.start(self.session()?, order.job, order.steer, command::Kind::Receive(message))?;
        Ok(Box::new(RemoteReceiving(work)))
    }

    fn prepare_machine(&self, recovery: &MachineRecovery) -> Result<PreparedMachine, Problem> {
        self.machine_step(&MachineStep::Prepare { recovery: recovery.clone() })
    }

    fn complete_machine(
        &self,
        recovery: &MachineRecovery,
        prepared: &PreparedMachine,
    ) -> Result<CompletedMachine, Problem> {
        self.machine_step(&MachineStep::Complete { recovery: recovery.clone(), prepared: prepared.clone() })
    }

    fn abandon_machine(&self, recovery: &MachineRecovery, prepared: &PreparedMachine) -> Result<(), Problem> {
        self.machine_step(&MachineStep::Abandon { recovery: recovery.clone(), prepared: prepared.clone() })
    }
}

/// Told to a host that asks for another stream of a job that has moved everything.
fn over() -> Problem {
    Problem::new(Code::Unauthorised, "The job needs no further data stream.")
}

/// An order at a host, from its start to its result.
struct Work {
    job: JobId,
    name: String,
    steer: Steer,
    times: RemoteTimes,
    streams: Arc<JobStreams>,
    doorway: Doorway,
    session: AgentSession,
    /// Until its result is there.
    command: Option<PendingCommand>,
    result: Option<Result<String, Problem>>,
    broken: Broken,
}

impl Work {
    /// The command's result, if it comes within `timeout`.
    fn look(&mut self, timeout: Duration) -> Option<&Result<String, Problem>> {
        if let Some(result) = self.command.as_ref().and_then(|command| command.wait_for(timeout)) {
            self.result = Some(result);
            self.command = None;
        }
        self.result.as_ref()
    }

    fn link<Out: Message + 'static, In: Message + 'static>(
        &mut self,
    ) -> Result<Arc<dyn Link<Out, In>>, LinkError> {
        let deadline = Instant::now() + self.times.link_grace;
        loop {
            if self.steer.is_cancelled() {
                return Err(LinkError::Cancelled);
            }
            if self.broken().is_some() {
                return Err(LinkError::Cut("the agent broke the protocol".to_owned()));
            }
            match self.streams.next(LOOK) {
                Ok(stream) => {
                    let wire = StreamWire { stream, broken: Arc::clone(&self.broken) };
                    return Ok(Arc::new(Encoded::new(wire)));
                }
                Err(ChannelError::TimedOut(_)) => {}
                Err(other) => return Err(link_error(other)),
            }
            match self.look(Duration::ZERO) {
                Some(Ok(_)) => {
                    return Err(LinkError::Cut("the agent ended before everything was moved".to_owned()));
                }
                Some(Err(problem)) => return Err(LinkError::Cut(problem.message.clone())),
                None => {}
            }
            if Instant::now() >= deadline {
                let seconds = self.times.link_grace.as_secs();
                return Err(LinkError::Cut(format!("host {} was away for {seconds} seconds", self.name)));
            }
        }
    }

    fn broken(&self) -> Option<Problem> {
        self.broken.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Why the host gave up. Its word travels beside the stream, so it may come a moment later than the cut.
    fn failure(&mut self) -> Option<Problem> {
        if let Some(problem) = self.broken() {
            return Some(problem);
        }
        let wait = if self.session.info().is_some() { Duration::from_secs(1) } else { Duration::ZERO };
        self.look(wait).and_then(|result| result.as_ref().err().cloned())
    }

    fn conclude(&mut self) -> Result<String, Problem> {
        loop {
            if let Some(result) = self.look(LOOK) {
                return result.clone();
            }
            if self.steer.is_cancelled() {
                return Err(jobs::problem::cancelled());
            }
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.doorway.close(jobs::problem::cancelled());
        if self.command.is_none() {
            return;
        }
        // A host that is away now learns it when it asks for the stream again.
        let cancel = v0::CancelJob { job: self.job.0.to_vec().into() };
        let asked = self.session.start(command::Kind::CancelJob(cancel));
        let deadline = Instant::now() + self.times.ending;
        // The next job of the machine must not meet the frozen view of this one.
        while self.session.info().is_some() && self.look(LOOK).is_none() && Instant::now() < deadline {}
        drop(asked);
    }
}

struct RemoteSending(Work);

impl Sending for RemoteSending {
    fn link(&mut self) -> Result<AgentEnd, LinkError> {
        self.0.link()
    }

    fn failure(&mut self) -> Option<Problem> {
        self.0.failure()
    }

    fn conclude(mut self: Box<Self>) -> Result<SentView, Problem> {
        let farewell = Farewell::start(&self.0)?;
        let result = self.0.conclude();
        self.0.doorway.close(over());
        farewell.end();
        let sent: SentReport = parsed(&result?)?;
        Ok(SentView {
            view: checked(sent.machine)?,
            consistency: sent.consistency,
            evidence: tame(&sent.evidence),
            configuration: match sent.configuration.len() {
                0..=CONFIGURATION_BYTES => sent.configuration,
                bytes => return Err(broken(format!("The machine's configuration has {bytes} bytes."))),
            },
        })
    }
}

/// Answers an agent whose last stream broke before it heard that the transfer is finished.
struct Farewell(JoinHandle<()>);

impl Farewell {
    fn start(work: &Work) -> Result<Farewell, Problem> {
        let (streams, grace, broken) =
            (Arc::clone(&work.streams), work.times.link_grace, Arc::clone(&work.broken));
        let spawned = std::thread::Builder::new().name("farewell".to_owned()).spawn(move || {
            // The agent cuts the present stream when it has heard.
            streams.drain();
            while let Ok(stream) = streams.next(grace) {
                let wire = StreamWire { stream, broken: Arc::clone(&broken) };
                let Ok(ToServer::Hello { next, .. }) =
                    wire.receive().map_err(drop).and_then(|bytes| ToServer::decode(bytes).map_err(drop))
                else {
                    continue;
                };
                let answer = ToAgent::Resume { next, finished: true, open: Vec::new() };
                let _ = wire.send(answer.encode());
                while wire.receive().is_ok() {}
            }
        });
        spawned.map(Farewell).map_err(|error| {
            Problem::new(Code::Internal, format!("No thread for the end of a transfer: {error}."))
        })
    }

    fn end(self) {
        let _ = self.0.join();
    }
}

struct RemoteReceiving(Work);

impl Receiving for RemoteReceiving {
    fn link(&mut self) -> Result<TargetEnd, LinkError> {
        self.0.link()
    }

    fn failure(&mut self) -> Option<Problem> {
        self.0.failure()
    }

    fn conclude(mut self: Box<Self>) -> Result<(), Problem> {
        // A target that has proved its content and is refused another stream knows that it is done.
        self.0.doorway.close(over());
        self.0.conclude().map(drop)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use model::ByteRange;

    #[test]
    fn long_lists_are_joined_and_lose_nothing() {
        let all: RangeSet = (0..1000).filter_map(|n| ByteRange::at(n * 100, 10)).collect();
        for most in [1, 7, 999, 1000, 5000] {
            let few = at_most(&all, most);
            assert!(few.len() <= most.max(1), "{} of at most {most}", few.len());
            let again: RangeSet =
                few.iter().filter_map(|range| ByteRange::at(range.offset, range.length)).collect();
            assert!(all.difference(&again).is_empty());
        }
    }

    #[test]
    fn what_no_disk_can_be_is_refused() {
        let disk = |size, sector, text: usize| protocol::machine::DiskReport {
            size,
            sector,
            description: "x".repeat(text),
            tracked: false,
        };
        let one = |disk| checked(MachineReport { disks: vec![disk] });
        assert!(one(disk(1 << 30, 512, 10)).is_ok());
        for wrong in [disk(DISK_BYTES + 1, 512, 0), disk(1, 520, 0), disk(1, 512, DESCRIPTION_BYTES + 1)] {
            assert_eq!(one(wrong).unwrap_err().code, Code::ProtocolBroken);
        }
        let many = MachineReport { disks: vec![disk(1, 512, 0); MAX_DISKS + 1] };
        assert_eq!(checked(many).unwrap_err().code, Code::ProtocolBroken);
    }
}
