//! Carries out a server's commands with this host's providers.
//!
//! One thread a command, given by the connection. The order of a job: what killed runs left beside the images is swept,
//! the machine is remembered in the state folder (so that the next start can sweep it, too), then it is frozen and sent.
//! A cut of the data stream is waited out while the frozen view is held; the server says when it wants no more.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block_io::Pace;
use bytes::Bytes;
use environment::Clock;
use model::{ByteRange, Cause, Code, JobId, Problem, RangeSet, RecoveryPointId};
use protocol::channel::{ChannelError, Doorway};
use protocol::machine::{DiskReport, MachineReport, MachineStep, SentReport};
use protocol::stream::{JobStream, JobStreams};
use protocol::v0::{self, command, disk_read};
use protocol::wire::{broken, id};
use transfer::{Connector, DiskOrder, Encoded, Link, LinkError, Message, Mode, SenderSettings, Wire};

use crate::connection::{AgentState, Executor, ServerLink};
use crate::host::{Host, Receive, Wanted, machine};

/// Without a server for that long a job is given up and its frozen view let go of.
const PATIENCE: Duration = Duration::from_secs(900);
/// Most machines whose folders are swept at a start.
const MACHINES: usize = 1000;

/// The commands of a server, over a [`Host`].
pub struct HostExecutor {
    host: Arc<Host>,
    state: AgentState,
    clock: Arc<dyn Clock>,
    jobs: Mutex<HashMap<JobId, Stop>>,
    /// One writer of the list of machines at a time.
    machines: Mutex<()>,
}

/// Ends a job from another thread.
#[derive(Clone)]
struct Stop {
    cancelled: Arc<AtomicBool>,
    doorway: Doorway,
}

impl Stop {
    fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        self.doorway.close(cancelled());
    }
}

fn cancelled() -> Problem {
    Problem::new(Code::Cancelled, "The job was cancelled.")
}

impl HostExecutor {
    /// Orders go to `host`; the machines they were for are kept in `state`.
    pub fn new(host: Arc<Host>, state: AgentState, clock: Arc<dyn Clock>) -> HostExecutor {
        HostExecutor { host, state, clock, jobs: Mutex::default(), machines: Mutex::default() }
    }

    /// Removes what crashed jobs left behind; for the start. Gives lines for the log.
    pub fn sweep(&self) -> Result<Vec<String>, Problem> {
        let (definitions, damage) = self.state.machines()?;
        let mut lines: Vec<String> = damage.into_iter().map(|problem| problem.message).collect();
        for definition in definitions {
            // One machine whose folder cannot be read must not keep the others from being swept.
            match machine(&definition).and_then(|machine| self.host.sweep(&[machine])) {
                Ok(removed) => {
                    lines.extend(removed.iter().map(|path| format!("Removed {path}, left by a job.")))
                }
                Err(problem) => lines.push(problem.message),
            }
        }
        Ok(lines)
    }

    /// Remembers a machine, before anything is put beside its images.
    fn remember(&self, definition: &str) -> Result<(), Problem> {
        let _one = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut known, _) = self.state.machines()?;
        if known.iter().any(|other| other == definition) {
            return Ok(());
        }
        known.push(definition.to_owned());
        let too_many = known.len().saturating_sub(MACHINES);
        self.state.set_machines(known.split_off(too_many))
    }

    fn jobs(&self) -> MutexGuard<'_, HashMap<JobId, Stop>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the job's streams and makes it known to `CancelJob` until the answer is dropped.
    fn begin(&self, job: JobId, link: &ServerLink) -> Running<'_> {
        let streams = JobStreams::new(link.open_data(job));
        let stop = Stop { cancelled: Arc::default(), doorway: streams.doorway() };
        self.jobs().insert(job, stop.clone());
        Running { executor: self, job, stop, streams }
    }

    fn send(&self, order: v0::SendOrder, link: &ServerLink) -> Result<String, Problem> {
        let job: JobId = id("job", &order.job)?;
        let definition = order.machine.unwrap_or_default().json;
        let machine = machine(&definition)?;
        let disks = order
            .disks
            .into_iter()
            .zip(0u32..)
            .map(|(disk, expected)| disk_order(disk, expected))
            .collect::<Result<Vec<_>, Problem>>()?;
        let wanted = v0::Consistency::try_from(order.wanted).ok().and_then(v0::Consistency::level);
        let pacing = order.pacing.unwrap_or_default();
        let mut settings = SenderSettings::default();
        if pacing.window_bytes > 0 {
            settings.window_bytes = pacing.window_bytes.min(settings.window_bytes);
        }
        if pacing.bytes_per_second > 0 {
            settings.pace = Some(Arc::new(Limit::new(pacing.bytes_per_second, self.clock.clone())));
        }
        let running = self.begin(job, link);
        self.remember(&definition)?;
        self.host.sweep(std::slice::from_ref(&machine))?;
        running.check()?;
        let wanted = Wanted {
            consistency: wanted.unwrap_or(model::Consistency::Crash),
            unfrozen: v0::Unfrozen::try_from(order.unfrozen).unwrap_or_default().into(),
            may_retry: order.may_retry,
            scratch_bytes: order.scratch_bytes,
        };
        let sent = self.host.send(job, &machine, disks, wanted, settings, &mut running.connector())?;
        json(&SentReport {
            machine: report(&sent.description)?,
            consistency: sent.consistency,
            evidence: sent.evidence,
            configuration: sent.configuration,
        })
    }

    fn receive(&self, order: v0::ReceiveOrder, link: &ServerLink) -> Result<String, Problem> {
        let job: JobId = id("job", &order.job)?;
        let point: RecoveryPointId = id("recovery point", &order.point)?;
        let path = PathBuf::from(&order.target_path);
        if !path.is_absolute() {
            return Err(Problem::new(
                Code::Usage,
                format!("{:?} is no absolute path of this host.", order.target_path),
            )
            .about(order.target_path));
        }
        let receive = Receive {
            job,
            point,
            disk: order.disk,
            path,
            format: order.format,
            size: order.disk_bytes,
            sector: order.logical_sector_bytes,
            description: order.image_json,
            over: match order.over_json.as_str() {
                "" => None,
                text => Some(serde_json::from_str(text).map_err(|error| {
                    broken(format!("The image below the target cannot be read: {error}."))
                })?),
            },
            overwrite: order.overwrite,
            sync: order.durable,
        };
        let running = self.begin(job, link);
        self.host.receive(&receive, &mut running.connector())?;
        json(&())
    }
}

fn json<T: serde::Serialize>(value: &T) -> Result<String, Problem> {
    serde_json::to_string(value).map_err(|error| {
        Problem::new(Code::Internal, format!("A result cannot be written as JSON: {error}."))
    })
}

fn report(description: &datasource::MachineDescription) -> Result<MachineReport, Problem> {
    let disks = description.disks.iter().map(|disk| {
        Ok(DiskReport {
            size: disk.size,
            sector: disk.sector,
            description: json(disk)?,
            tracked: disk.tracked,
        })
    });
    Ok(MachineReport { disks: disks.collect::<Result<_, Problem>>()? })
}

fn ranges(ranges: Vec<v0::Range>) -> Result<RangeSet, Problem> {
    let ranges = ranges.into_iter().map(|range| {
        ByteRange::at(range.offset, range.length).ok_or_else(|| {
            broken(format!("A range of {} bytes at {} ends past any disk.", range.length, range.offset))
        })
    });
    Ok(RangeSet::from_ranges(ranges.collect::<Result<_, Problem>>()?))
}

fn disk_order(disk: v0::DiskRead, expected: u32) -> Result<DiskOrder, Problem> {
    if disk.disk != expected {
        return Err(broken(format!("Disk {} is ordered where disk {expected} was expected.", disk.disk)));
    }
    let mode = match disk.mode {
        Some(disk_read::Mode::Full(_)) => Mode::Full {
            cause: Cause {
                decision: "full scan".to_owned(),
                because: vec!["ordered by the server".to_owned()],
            },
        },
        Some(disk_read::Mode::Extents(list)) => {
            Mode::Extents { listed: ranges(list.ranges)?, rotation: disk.rotation }
        }
        Some(disk_read::Mode::Tracked(tracked)) => {
            Mode::Tracked { base: tracked.base_json, rotation: disk.rotation }
        }
        None => return Err(broken(format!("The order of disk {expected} does not say what to read."))),
    };
    Ok(DiskOrder { mode, heal: ranges(disk.heal)?, because: String::new() })
}

impl Executor for HostExecutor {
    fn providers(&self) -> Vec<String> {
        self.host.providers().into_iter().map(str::to_owned).collect()
    }

    fn command(&self, _id: u64, command: command::Kind, link: &ServerLink) -> Result<String, Problem> {
        match command {
            command::Kind::Inspect(inspect) => {
                let machine = machine(&inspect.machine.unwrap_or_default().json)?;
                json(&report(&self.host.inspect(&machine)?)?)
            }
            command::Kind::Send(order) => self.send(order, link),
            command::Kind::Receive(order) => self.receive(order, link),
            command::Kind::CancelJob(cancel) => {
                let job: JobId = id("job", &cancel.job)?;
                let stop = self.jobs().get(&job).cloned();
                if let Some(stop) = stop {
                    stop.cancel();
                }
                self.host.cancel(job);
                json(&())
            }
            command::Kind::RecoverMachine(order) => {
                let step: MachineStep = serde_json::from_str(&order.step_json)
                    .map_err(|error| broken(format!("The step of a recovery cannot be read: {error}.")))?;
                match step {
                    MachineStep::Prepare { recovery } => {
                        self.remember(&recovery.spec)?;
                        json(&self.host.prepare_machine(&recovery)?)
                    }
                    MachineStep::Complete { recovery, prepared } => {
                        json(&self.host.complete_machine(&recovery, &prepared)?)
                    }
                    MachineStep::Abandon { recovery, prepared } => {
                        json(&self.host.abandon_machine(&recovery, &prepared)?)
                    }
                }
            }
            command::Kind::ListInventory(wanted) => {
                let mut machines = self.host.inventory()?;
                machines.retain(|machine| wanted.provider.is_empty() || machine.provider == wanted.provider);
                json(&machines)
            }
        }
    }
}

/// A job at work.
struct Running<'a> {
    executor: &'a HostExecutor,
    job: JobId,
    stop: Stop,
    streams: Arc<JobStreams>,
}

impl Running<'_> {
    fn check(&self) -> Result<(), Problem> {
        if self.stop.cancelled.load(Ordering::SeqCst) { Err(cancelled()) } else { Ok(()) }
    }

    fn connector(&self) -> Streams {
        Streams { streams: Arc::clone(&self.streams), stop: self.stop.clone() }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.stop.doorway.close(cancelled());
        self.executor.jobs().remove(&self.job);
    }
}

/// The links of a job, one after another.
struct Streams {
    streams: Arc<JobStreams>,
    stop: Stop,
}

impl<Out: Message + 'static, In: Message + 'static> Connector<Out, In> for Streams {
    fn reconnect(&mut self) -> Result<Box<dyn Link<Out, In>>, LinkError> {
        let stream = self.streams.next(PATIENCE).map_err(|error| self.stop.explain(error))?;
        Ok(Box::new(Encoded::new(StreamWire { stream, stop: self.stop.clone() })))
    }
}

impl Stop {
    fn explain(&self, error: ChannelError) -> LinkError {
        if self.cancelled.load(Ordering::SeqCst) {
            return LinkError::Cancelled;
        }
        LinkError::Cut(match error {
            ChannelError::Closed(problem) => problem.message,
            other => other.to_string(),
        })
    }
}

struct StreamWire {
    stream: JobStream,
    stop: Stop,
}

impl Wire for StreamWire {
    fn send(&self, bytes: Bytes) -> Result<(), LinkError> {
        self.stream.send(bytes).map_err(|error| self.stop.explain(error))
    }

    fn receive(&self) -> Result<Bytes, LinkError> {
        self.stream.receive().map_err(|error| self.stop.explain(error))
    }

    fn cut(&self) {
        self.stream.cut();
    }

    fn broken(&self, reason: String) {
        self.stop.doorway.close(broken(format!("The server broke the protocol: {reason}.")));
    }
}

/// Lets so many bytes a second through, a tenth of a second at once.
struct Limit {
    bytes_per_second: u64,
    clock: Arc<dyn Clock>,
    paid_until: Mutex<u64>,
}

impl Limit {
    const BURST_MICROS: u64 = 100_000;

    fn new(bytes_per_second: u64, clock: Arc<dyn Clock>) -> Limit {
        let now = clock.monotonic_micros();
        Limit { bytes_per_second, clock, paid_until: Mutex::new(now) }
    }
}

impl Pace for Limit {
    fn wait(&self, bytes: u64) {
        let cost = u128::from(bytes) * 1_000_000 / u128::from(self.bytes_per_second.max(1));
        let cost = u64::try_from(cost).unwrap_or(u64::MAX / 4);
        let now = self.clock.monotonic_micros();
        let wait = {
            let mut paid = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
            *paid = (*paid).max(now.saturating_sub(Limit::BURST_MICROS)).saturating_add(cost);
            paid.saturating_sub(now)
        };
        if wait > 0 {
            self.clock.sleep(Duration::from_micros(wait));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_order_that_is_not_complete_is_refused_not_guessed() {
        let full = Some(disk_read::Mode::Full(v0::WholeDisk { ignore_allocation: false }));
        let good = v0::DiskRead { disk: 1, mode: full, ..Default::default() };
        assert!(matches!(disk_order(good.clone(), 1).unwrap().mode, Mode::Full { .. }));
        assert_eq!(disk_order(good.clone(), 0).unwrap_err().code, Code::ProtocolBroken);
        assert!(disk_order(v0::DiskRead { mode: None, ..good.clone() }, 1).is_err());
        let past = vec![v0::Range { offset: u64::MAX, length: 2 }];
        assert!(disk_order(v0::DiskRead { heal: past.clone(), ..good }, 1).is_err());
        let list = v0::ChangedExtents { ranges: past, pages: 0 };
        let list = v0::DiskRead { disk: 0, mode: Some(disk_read::Mode::Extents(list)), ..Default::default() };
        assert!(disk_order(list, 0).is_err());
    }

    #[test]
    fn a_limit_holds_over_time() {
        let clock = Arc::new(environment::FixedClock::new(0));
        let limit = Limit::new(1_000_000, clock.clone());
        (0..50).for_each(|_| limit.wait(100_000));
        let elapsed = clock.monotonic_micros();
        assert!((4_800_000..=5_000_000).contains(&elapsed), "{elapsed}");
    }
}
