//! Which hosts are connected, what was asked of them, and the data streams of their jobs.
//!
//! A command outlives the session that carried it: a host that comes back within the grace names the commands it still
//! runs, is sent again those that never reached it, and delivers results until they are taken. A host whose agent
//! *restarted* (another instance) has forgotten them: they fail at once.

use super::{OPEN_COMMANDS, SessionSettings, require_good};
use identity::PeerCertificate;
use model::{Code, HostId, JobId, Problem};
use protocol::channel::{DataChannel, Doorway, InboundPump, OutboundPackets, data_channel};
use protocol::v0::{self, command, result, server_message};
use protocol::wire::{take_pages, tame};
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// Most characters of progress figures and inventories that are kept of one message.
const JSON_CHARACTERS: usize = protocol::wire::PAYLOAD_BYTES;

/// What a connected agent says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentInfo {
    /// What the host calls itself.
    pub host_name: String,
    /// Operating system and architecture.
    pub platform: String,
    /// Version of the agent.
    pub program_version: String,
    /// Its providers.
    pub providers: Vec<String>,
    /// Version of the protocol in use.
    pub protocol_version: u32,
    /// From where it is connected.
    pub remote: SocketAddr,
    /// 16 random bytes of this run of the agent.
    pub instance: Vec<u8>,
}

/// What happens to sessions, for log, alerts and the list of hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEvent {
    /// A host is there.
    Connected {
        /// Which.
        host: HostId,
        /// What it says of itself.
        info: AgentInfo,
    },
    /// A warning: a second agent with the same identity took over while the first was connected. Someone cloned the
    /// host or copied its key.
    Duplicate {
        /// Which.
        host: HostId,
        /// Where the first one is.
        old: SocketAddr,
        /// Where the second one is.
        new: SocketAddr,
    },
    /// A host's session broke.
    Lost {
        /// Which.
        host: HostId,
    },
    /// The server ended a session: revoked, expired.
    Ended {
        /// Which.
        host: HostId,
        /// Why.
        problem: Problem,
    },
}

struct Live {
    number: u64,
    out: mpsc::UnboundedSender<v0::ServerMessage>,
    info: AgentInfo,
    certificate: Arc<PeerCertificate>,
    end: watch::Sender<bool>,
}

struct Door {
    doorway: Doorway,
    certificate: Option<Arc<PeerCertificate>>,
}

struct Open {
    waiting: Arc<Waiting>,
    instance: Vec<u8>,
    /// Kept to be sent again to a host that never got it.
    messages: Vec<v0::ServerMessage>,
}

#[derive(Default)]
struct Host {
    live: Option<Live>,
    lost_at: Option<Instant>,
    open: BTreeMap<u64, Open>,
    doors: HashMap<JobId, Door>,
}

#[derive(Default)]
struct Outcome {
    result: Option<Result<String, Problem>>,
    progress: Option<v0::Progress>,
}

#[derive(Default)]
struct Waiting {
    outcome: Mutex<Outcome>,
    changed: Condvar,
}

impl Waiting {
    fn finish(&self, result: Result<String, Problem>) {
        locked(&self.outcome).result.get_or_insert(result);
        self.changed.notify_all();
    }
}

struct Shared {
    hosts: Mutex<HashMap<HostId, Host>>,
    next: AtomicU64,
    grace: Duration,
    report: Box<dyn Fn(SessionEvent) + Send + Sync>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unreachable(host: HostId, message: &str) -> Problem {
    Problem::new(Code::AgentUnreachable, message).about(host.to_string())
}

/// The connected agents. Cloning gives another handle of the same registry.
#[derive(Clone)]
pub struct SessionRegistry {
    shared: Arc<Shared>,
}

/// One host, as jobs speak to it. It may be away at the moment. Blocking: never call it from async code.
#[derive(Clone)]
pub struct AgentSession {
    registry: SessionRegistry,
    host: HostId,
}

/// A command whose result is awaited. Dropping it forgets the command; it does not stop it: see `CancelJob`.
pub struct PendingCommand {
    registry: SessionRegistry,
    host: HostId,
    id: u64,
    waiting: Arc<Waiting>,
}

impl SessionRegistry {
    /// An empty registry. `first_command` must differ between runs of the server (a random number): an agent may
    /// still run commands of the last one. `report` is called from the runtime and must not block.
    pub fn new(
        first_command: u32,
        contact_grace: Duration,
        report: impl Fn(SessionEvent) + Send + Sync + 'static,
    ) -> SessionRegistry {
        let shared = Shared {
            hosts: Mutex::default(),
            next: AtomicU64::new(u64::from(first_command) << 31),
            grace: contact_grace,
            report: Box::new(report),
        };
        SessionRegistry { shared: Arc::new(shared) }
    }

    /// The session of a connected host; `None` if it is not connected now.
    pub fn host(&self, host: HostId) -> Option<AgentSession> {
        locked(&self.shared.hosts).get(&host)?.live.as_ref()?;
        Some(AgentSession { registry: self.clone(), host })
    }

    /// The connected hosts.
    pub fn connected(&self) -> Vec<(HostId, AgentInfo)> {
        let hosts = locked(&self.shared.hosts);
        let mut list: Vec<_> =
            hosts.iter().filter_map(|(id, host)| Some((*id, host.live.as_ref()?.info.clone()))).collect();
        list.sort_by_key(|(id, _)| *id);
        list
    }

    /// Ends everything of a host at once, for instance because it was revoked.
    pub fn end(&self, id: HostId, problem: &Problem) {
        let mut hosts = locked(&self.shared.hosts);
        let Some(host) = hosts.get_mut(&id) else { return };
        let had_session = host.live.is_some();
        if let Some(live) = host.live.take() {
            goodbye(&live, problem);
        }
        host.lost_at = Some(Instant::now());
        for (_, open) in std::mem::take(&mut host.open) {
            open.waiting.finish(Err(problem.clone()));
        }
        for (_, door) in host.doors.drain() {
            door.doorway.close(problem.clone());
        }
        drop(hosts);
        if had_session {
            (self.shared.report)(SessionEvent::Ended { host: id, problem: problem.clone() });
        }
    }

    pub(super) fn close_all(&self) {
        let problem = Problem::new(Code::NoContact, "The server stops.");
        for (_, host) in locked(&self.shared.hosts).iter_mut() {
            if let Some(live) = host.live.take() {
                goodbye(&live, &problem);
                host.lost_at = Some(Instant::now());
            }
            host.doors.values().for_each(|door| door.doorway.cut());
        }
    }

    /// Asks of every open session whether it may go on. Blocking.
    pub(super) fn sweep(&self, settings: &SessionSettings) {
        let now = settings.now();
        let mut certificates: Vec<Arc<PeerCertificate>> = Vec::new();
        for (_, host) in locked(&self.shared.hosts).iter_mut() {
            host.doors.retain(|_, door| !door.doorway.is_closed());
            certificates.extend(host.live.iter().map(|live| Arc::clone(&live.certificate)));
            certificates.extend(host.doors.values().filter_map(|door| door.certificate.clone()));
        }
        certificates.sort_by(|a, b| (a.host, &a.serial).cmp(&(b.host, &b.serial)));
        certificates.dedup();
        for certificate in certificates {
            if let Err(problem) = settings.register.admit(&certificate) {
                self.end(certificate.host, &problem);
            } else if let Err(problem) = require_good(&certificate, now) {
                self.expire(&certificate, &problem);
            }
        }
    }

    /// Hangs up on what still uses an ended certificate. Jobs go on when the host is back with a new one.
    fn expire(&self, certificate: &Arc<PeerCertificate>, problem: &Problem) {
        let mut ended = false;
        if let Some(host) = locked(&self.shared.hosts).get_mut(&certificate.host) {
            if let Some(live) = host.live.take_if(|live| live.certificate.serial == certificate.serial) {
                goodbye(&live, problem);
                host.lost_at = Some(Instant::now());
                ended = true;
            }
            for door in host.doors.values_mut() {
                if door.certificate.take_if(|used| used.serial == certificate.serial).is_some() {
                    door.doorway.cut();
                }
            }
        }
        if ended {
            (self.shared.report)(SessionEvent::Ended { host: certificate.host, problem: problem.clone() });
        }
    }

    /// A host said hello. Gives the queue of messages to it, the sign to end, and the number of the session.
    pub(super) fn attach(
        &self,
        certificate: Arc<PeerCertificate>,
        info: AgentInfo,
        running: &[u64],
        greeting: v0::HelloReply,
    ) -> (mpsc::UnboundedReceiver<v0::ServerMessage>, watch::Receiver<bool>, u64) {
        let id = certificate.host;
        let number = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (out, queue) = mpsc::unbounded_channel();
        let (end, ending) = watch::channel(false);
        let mut hosts = locked(&self.shared.hosts);
        let host = hosts.entry(id).or_default();
        let mut events = Vec::new();
        let _ = out.send(message(server_message::Kind::HelloReply(greeting)));
        if let Some(old) = host.live.take() {
            if old.info.instance != info.instance {
                events.push(SessionEvent::Duplicate { host: id, old: old.info.remote, new: info.remote });
            }
            goodbye(&old, &unreachable(id, "Another session of this host took over."));
        }
        host.open.retain(|number, open| {
            if open.instance != info.instance {
                let restarted = "The agent restarted and no longer knows the command.";
                open.waiting.finish(Err(unreachable(id, restarted)));
                return false;
            }
            if !running.contains(number) {
                for message in &open.messages {
                    let _ = out.send(message.clone());
                }
            }
            true
        });
        // Results of commands that nobody waits for any longer.
        for number in running.iter().filter(|number| !host.open.contains_key(number)) {
            let _ = out.send(message(server_message::Kind::ResultTaken(v0::ResultTaken { id: *number })));
        }
        events.push(SessionEvent::Connected { host: id, info: info.clone() });
        host.live = Some(Live { number, out, info, certificate, end });
        host.lost_at = None;
        drop(hosts);
        events.into_iter().for_each(|event| (self.shared.report)(event));
        (queue, ending, number)
    }

    /// The session `number` of a host is over. A newer one is left alone.
    pub(super) fn detach(&self, id: HostId, number: u64) {
        let lost = locked(&self.shared.hosts).get_mut(&id).is_some_and(|host| {
            let lost = host.live.take_if(|live| live.number == number).is_some();
            if lost {
                host.lost_at = Some(Instant::now());
            }
            lost
        });
        if lost {
            (self.shared.report)(SessionEvent::Lost { host: id });
        }
    }

    /// Sends a message in session `number`.
    pub(super) fn reply(&self, id: HostId, kind: server_message::Kind) {
        if let Some(live) = locked(&self.shared.hosts).get(&id).and_then(|host| host.live.as_ref()) {
            let _ = live.out.send(message(kind));
        }
    }

    pub(super) fn take_result(&self, id: HostId, result: v0::Result) {
        let open = locked(&self.shared.hosts).get_mut(&id).and_then(|host| host.open.remove(&result.id));
        if let Some(open) = open {
            open.waiting.finish(match result.outcome {
                Some(result::Outcome::Ok(json)) => Ok(json),
                Some(result::Outcome::Problem(problem)) => Err(problem.into()),
                None => {
                    Err(protocol::wire::broken("A result says neither that it went well nor that it failed."))
                }
            });
        }
        self.reply(id, server_message::Kind::ResultTaken(v0::ResultTaken { id: result.id }));
    }

    pub(super) fn take_progress(&self, id: HostId, mut progress: v0::Progress) {
        progress.phase = tame(&progress.phase);
        if progress.json.len() > JSON_CHARACTERS {
            progress.json.clear();
        }
        let hosts = locked(&self.shared.hosts);
        if let Some(open) = hosts.get(&id).and_then(|host| host.open.get(&progress.id)) {
            locked(&open.waiting.outcome).progress = Some(progress);
            open.waiting.changed.notify_all();
        }
    }

    /// A data stream of a host for a job. One answer for a job of another host and for no job at all (INV-23).
    pub(super) fn enter_data(
        &self,
        certificate: Arc<PeerCertificate>,
        job: JobId,
    ) -> Result<(OutboundPackets, InboundPump), Problem> {
        let mut hosts = locked(&self.shared.hosts);
        let door =
            hosts.get_mut(&certificate.host).and_then(|host| host.doors.get_mut(&job)).ok_or_else(|| {
                Problem::new(Code::Unauthorised, format!("Host {} has no job {job} here.", certificate.host))
            })?;
        let entered = door.doorway.enter()?;
        door.certificate = Some(certificate);
        Ok(entered)
    }
}

fn message(kind: server_message::Kind) -> v0::ServerMessage {
    v0::ServerMessage { kind: Some(kind) }
}

fn goodbye(live: &Live, problem: &Problem) {
    let _ = live.out.send(message(server_message::Kind::Goodbye(problem.into())));
    live.end.send_replace(true);
}

impl AgentSession {
    /// Which host it is.
    pub fn host(&self) -> HostId {
        self.host
    }

    /// What the agent says of itself; `None` while it is away.
    pub fn info(&self) -> Option<AgentInfo> {
        let hosts = locked(&self.registry.shared.hosts);
        Some(hosts.get(&self.host)?.live.as_ref()?.info.clone())
    }

    /// Gives a command and waits for its result (JSON).
    pub fn command(&self, kind: command::Kind) -> Result<String, Problem> {
        self.start(kind)?.wait()
    }

    /// Gives a command.
    pub fn start(&self, kind: command::Kind) -> Result<PendingCommand, Problem> {
        let shared = &self.registry.shared;
        let id = shared.next.fetch_add(1, Ordering::Relaxed);
        let mut command = v0::Command { id, kind: Some(kind) };
        let pages = take_pages(&mut command);
        let mut messages: Vec<_> =
            pages.into_iter().map(|page| message(server_message::Kind::ListPage(page))).collect();
        messages.push(message(server_message::Kind::Command(command)));

        let mut hosts = locked(&shared.hosts);
        let host = hosts.entry(self.host).or_default();
        let Some(live) = &host.live else {
            return Err(unreachable(self.host, "The host's agent is not connected."));
        };
        if host.open.len() >= OPEN_COMMANDS {
            let message = format!("{OPEN_COMMANDS} commands of this host are still open.");
            return Err(Problem::new(Code::SourceBusy, message).about(self.host.to_string()));
        }
        for message in &messages {
            let _ = live.out.send(message.clone());
        }
        let waiting = Arc::new(Waiting::default());
        let instance = live.info.instance.clone();
        host.open.insert(id, Open { waiting: Arc::clone(&waiting), instance, messages });
        Ok(PendingCommand { registry: self.registry.clone(), host: self.host, id, waiting })
    }

    /// The data channel of a job. Make it before the order that lets the agent open the stream, then call
    /// [`DataChannel::reconnect`] to wait for the stream. A second channel of the same job closes the first.
    pub fn open_data(&self, job: JobId) -> DataChannel {
        let (channel, doorway) = data_channel(Box::new(|| {}));
        let mut hosts = locked(&self.registry.shared.hosts);
        let doors = &mut hosts.entry(self.host).or_default().doors;
        if let Some(old) = doors.insert(job, Door { doorway, certificate: None }) {
            old.doorway.close(Problem::new(Code::Cancelled, "The job opened its data stream anew."));
        }
        channel
    }
}

impl PendingCommand {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Waits for the result. Fails with [`Code::AgentUnreachable`] when the host stays away longer than the grace.
    pub fn wait(self) -> Result<String, Problem> {
        loop {
            if let Some(result) = self.wait_for(Duration::from_secs(60)) {
                return result;
            }
        }
    }

    /// The result if it comes within `timeout`.
    pub fn wait_for(&self, timeout: Duration) -> Option<Result<String, Problem>> {
        let deadline = Instant::now() + timeout;
        loop {
            let outcome = locked(&self.waiting.outcome);
            if let Some(result) = &outcome.result {
                return Some(result.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let step = left.min(Duration::from_millis(500));
            let (outcome, _) =
                self.waiting.changed.wait_timeout(outcome, step).unwrap_or_else(PoisonError::into_inner);
            if let Some(result) = &outcome.result {
                return Some(result.clone());
            }
            drop(outcome);
            if self.away_too_long() {
                let message =
                    format!("The host was away for {} seconds.", self.registry.shared.grace.as_secs());
                self.waiting.finish(Err(unreachable(self.host, &message)));
            }
        }
    }

    fn away_too_long(&self) -> bool {
        let hosts = locked(&self.registry.shared.hosts);
        let lost_at = hosts.get(&self.host).and_then(|host| host.lost_at);
        lost_at.is_some_and(|lost_at| lost_at.elapsed() > self.registry.shared.grace)
    }

    /// The newest figures that the agent sent.
    pub fn progress(&self) -> Option<v0::Progress> {
        locked(&self.waiting.outcome).progress.clone()
    }
}

impl Drop for PendingCommand {
    fn drop(&mut self) {
        if let Some(host) = locked(&self.registry.shared.hosts).get_mut(&self.host) {
            host.open.remove(&self.id);
        }
    }
}
