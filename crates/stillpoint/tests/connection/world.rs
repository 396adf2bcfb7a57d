//! A server with a register in memory, agents on folders of their own, and a proxy that cuts.

use agent::connection::{AgentState, ConnectionEvent, ConnectionSettings, Executor, ServerLink, enrol, run};
use bytes::Bytes;
use environment::{FixedClock, FolderFiles, SystemRandomness};
use identity::{PeerCertificate, ServerIdentity, Token, TokenRecord, TokenRefusal, TokenScope};
use model::{Code, HostId, JobId, PoolId, Problem, Timestamp};
use protocol::channel::ChannelError;
use protocol::v0::{self, command};
use server::session::{EnrolRequest, HostRegister, SessionEvent, SessionRegistry, SessionSettings, serve};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::watch;

pub const NOW: u64 = 1_795_000_000 * Timestamp::SECOND;
pub const DAY: Duration = Duration::from_secs(86_400);
pub const SOON: Duration = Duration::from_secs(20);

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Waits until `look` sees something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + SOON;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < end, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[derive(Default)]
pub struct Register {
    pub tokens: Mutex<HashMap<String, TokenRecord>>,
    pub hosts: Mutex<HashSet<HostId>>,
    pub revoked: Mutex<HashSet<HostId>>,
    pub asked: AtomicUsize,
}

impl HostRegister for Register {
    fn enrol(&self, request: &EnrolRequest) -> Result<HostId, Problem> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut tokens = self.tokens.lock().unwrap();
        let record = tokens.get_mut(&request.token_hash).ok_or(TokenRefusal::Unknown)?;
        let (used, host) = record.redeem(request.key, &request.host_name, request.fresh, request.now)?;
        *record = used;
        self.hosts.lock().unwrap().insert(host);
        Ok(host)
    }

    fn admit(&self, certificate: &PeerCertificate) -> Result<(), Problem> {
        let known = self.hosts.lock().unwrap().contains(&certificate.host);
        if !known || self.revoked.lock().unwrap().contains(&certificate.host) {
            return Err(Problem::new(Code::HostRevoked, "The host was revoked."));
        }
        Ok(())
    }

    fn issued(&self, _: &PeerCertificate) -> Result<(), Problem> {
        Ok(())
    }
}

pub struct Server {
    pub identity: Arc<ServerIdentity>,
    pub register: Arc<Register>,
    pub registry: SessionRegistry,
    pub clock: Arc<FixedClock>,
    pub address: String,
    pub events: Arc<Mutex<Vec<SessionEvent>>>,
    stop: watch::Sender<bool>,
}

impl Server {
    pub fn start(runtime: &Runtime, clock: &Arc<FixedClock>) -> Server {
        let identity = Arc::new(ServerIdentity::generate([1; 16]).unwrap());
        Server::start_as(runtime, clock, identity, Arc::default(), &[])
    }

    /// `more` are addresses told to the agents beside the server's own.
    pub fn start_as(
        runtime: &Runtime,
        clock: &Arc<FixedClock>,
        identity: Arc<ServerIdentity>,
        register: Arc<Register>,
        more: &[String],
    ) -> Server {
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let told = [vec![listener.local_addr().unwrap().to_string()], more.to_vec()].concat();
        Server::start_on(runtime, clock, identity, register, told, listener)
    }

    /// On a listener of the caller's, telling agents these addresses only.
    pub fn start_on(
        runtime: &Runtime,
        clock: &Arc<FixedClock>,
        identity: Arc<ServerIdentity>,
        register: Arc<Register>,
        addresses: Vec<String>,
        listener: tokio::net::TcpListener,
    ) -> Server {
        let address = listener.local_addr().unwrap().to_string();
        let events = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&events);
        static RUN: AtomicU64 = AtomicU64::new(1);
        let first = RUN.fetch_add(1, Ordering::SeqCst) as u32;
        let grace = Duration::from_secs(10);
        let registry = SessionRegistry::new(first, grace, move |event| heard.lock().unwrap().push(event));
        let settings = SessionSettings {
            identity: Arc::clone(&identity),
            server_name: "backup".to_owned(),
            addresses,
            pool: PoolId([5; 16]),
            clock: clock.clone(),
            randomness: Arc::new(SystemRandomness),
            register: register.clone(),
            contact_grace: grace,
        };
        let (stop, stopping) = watch::channel(false);
        runtime.spawn(serve(listener, settings, registry.clone(), axum::Router::new(), stopping));
        Server { identity, register, registry, clock: clock.clone(), address, events, stop }
    }

    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    pub fn token(&self, scope: TokenScope) -> Token {
        static SECRET: AtomicU64 = AtomicU64::new(1);
        let mut secret = [9; 20];
        secret[..8].copy_from_slice(&SECRET.fetch_add(1, Ordering::SeqCst).to_le_bytes());
        let now = Timestamp(environment::Clock::now_micros(&*self.clock));
        let (token, record) = Token::issue(self.identity.fingerprint(), secret, scope, now);
        self.register.tokens.lock().unwrap().insert(record.hash.clone(), record);
        token
    }
}

/// What the test's host does: `Inspect` answers after a moment, `Send` serves bytes from wherever it is asked to,
/// `Receive` tries to open the stream of the job and says how that went.
pub struct Worker;

/// The byte at `offset` of what `Send` sends.
pub fn pattern(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
}

impl Executor for Worker {
    fn providers(&self) -> Vec<String> {
        vec!["images".to_owned()]
    }

    fn command(&self, _: u64, command: command::Kind, link: &ServerLink) -> Result<String, Problem> {
        match command {
            command::Kind::Inspect(inspect) => {
                let millis = inspect.machine.unwrap_or_default().json.parse().unwrap_or(0);
                link.progress(JobId([0; 16]), "waiting", 1, 2, String::new());
                std::thread::sleep(Duration::from_millis(millis));
                Ok("\"inspected\"".to_owned())
            }
            command::Kind::RecoverMachine(_) => Ok("null".to_owned()),
            command::Kind::ListInventory(_) => panic!("a provider with a defect"),
            command::Kind::Send(order) => {
                let job = JobId::try_from(&order.job[..]).unwrap();
                let total = order.disks[0].replica_bytes;
                let part = order.pacing.unwrap_or_default().window_bytes as usize;
                let listed = match &order.disks[0].mode {
                    Some(v0::disk_read::Mode::Extents(extents)) => extents.ranges.len(),
                    _ => 0,
                };
                let channel = link.open_data(job);
                let mut cuts = 0;
                while let Err(error) = send(&channel, total, part) {
                    match error {
                        ChannelError::Cut => cuts += 1,
                        other => return Err(Problem::new(Code::NoContact, other.to_string())),
                    }
                }
                Ok(format!("[{cuts},{listed}]"))
            }
            command::Kind::Receive(order) => {
                let channel = link.open_data(JobId::try_from(&order.job[..]).unwrap());
                match channel.reconnect(SOON) {
                    Ok(()) => Ok("\"open\"".to_owned()),
                    Err(ChannelError::Closed(problem)) => Err(problem),
                    Err(other) => Err(Problem::new(Code::Internal, other.to_string())),
                }
            }
            command::Kind::CancelJob(_) => Ok("null".to_owned()),
        }
    }
}

fn send(channel: &protocol::channel::DataChannel, total: u64, part: usize) -> Result<(), ChannelError> {
    channel.reconnect(SOON)?;
    let Some(from) = channel.receive()? else { return Ok(()) };
    let mut at = u64::from_le_bytes(from[..].try_into().unwrap());
    let block: Bytes = (0..part as u64 + 256).map(pattern_row).collect::<Vec<u8>>().into();
    while at < total {
        let count = (total - at).min(part as u64) as usize;
        let shift = (at % 256) as usize;
        channel.send(block.slice(shift..shift + count))?;
        at += count as u64;
    }
    channel.finish()?;
    // The receiver's End says that it has everything.
    match channel.receive()? {
        None => Ok(()),
        Some(_) => Err(ChannelError::Cut),
    }
}

/// Repeats every 256 bytes, so that one block serves every offset.
pub fn pattern_row(offset: u64) -> u8 {
    pattern(offset % 256)
}

pub struct Agent {
    pub folder: tempfile::TempDir,
    pub host: HostId,
    pub events: Arc<Mutex<Vec<ConnectionEvent>>>,
    pub stop: watch::Sender<bool>,
}

pub fn settings(clock: &Arc<FixedClock>, events: &Arc<Mutex<Vec<ConnectionEvent>>>) -> ConnectionSettings {
    let events = Arc::clone(events);
    let report = Arc::new(move |event| events.lock().unwrap().push(event));
    ConnectionSettings {
        backoff_first: Duration::from_millis(20),
        backoff_most: Duration::from_millis(200),
        renewal_check: Duration::from_millis(50),
        ..ConnectionSettings::new("hv1", clock.clone(), Arc::new(SystemRandomness), report)
    }
}

pub fn state(folder: &std::path::Path) -> AgentState {
    AgentState::new(Arc::new(FolderFiles::new(folder)))
}

impl Agent {
    pub fn enrol(runtime: &Runtime, server: &Server, at: &str) -> Agent {
        let folder = tempfile::tempdir().unwrap();
        let token = server.token(TokenScope::default());
        let events = Arc::default();
        let settings = settings(&server.clock, &events);
        let host =
            runtime.block_on(enrol(&settings, &state(folder.path()), &[at.to_owned()], &token)).unwrap();
        Agent { folder, host, events, stop: watch::channel(false).0 }
    }

    pub fn run(&mut self, runtime: &Runtime, clock: &Arc<FixedClock>) {
        let (stop, stopping) = watch::channel(false);
        self.stop = stop;
        runtime.spawn(run(
            settings(clock, &self.events),
            state(self.folder.path()),
            Arc::new(Worker),
            stopping,
        ));
    }

    pub fn started(runtime: &Runtime, server: &Server) -> Agent {
        let mut agent = Agent::enrol(runtime, server, &server.address);
        agent.run(runtime, &server.clock);
        until("the first session", || server.registry.host(agent.host));
        agent
    }

    pub fn refused_with(&self, code: Code) -> Problem {
        until("a refusal", || {
            self.events.lock().unwrap().iter().find_map(|event| match event {
                ConnectionEvent::Refused { problem } if problem.code == code => Some(problem.clone()),
                _ => None,
            })
        })
    }
}

#[derive(Debug)]
struct AtNow;

impl rustls::time_provider::TimeProvider for AtNow {
    fn current_time(&self) -> Option<rustls_pki_types::UnixTime> {
        Some(rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_micros(NOW)))
    }
}

/// A caller of our own making, with this certificate or none.
pub async fn caller(
    server: &Server,
    own: Option<(rustls_pki_types::CertificateDer<'static>, rustls_pki_types::PrivateKeyDer<'static>)>,
) -> tonic::transport::Channel {
    let tls = identity::agent_tls(server.identity.fingerprint(), own, Arc::new(AtNow)).unwrap();
    let tcp = tokio::net::TcpStream::connect(&server.address).await.unwrap();
    let name = rustls_pki_types::ServerName::try_from("any.name").unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.unwrap();
    let mut stream = Some(hyper_util::rt::TokioIo::new(stream));
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        std::future::ready(stream.take().ok_or(std::io::Error::from(std::io::ErrorKind::NotConnected)))
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://any.name");
    endpoint.connect_with_connector(connector).await.unwrap()
}

/// Passes bytes on, and cuts a connection when it has passed the next number of bytes in `cuts`.
pub struct Proxy {
    pub address: String,
    pub cut: Arc<AtomicUsize>,
    /// While true, bytes are taken and kept, as by a network that swallows them.
    pub swallow: Arc<AtomicBool>,
}

impl Proxy {
    pub fn start(runtime: &Runtime, listener: tokio::net::TcpListener, to: String, cuts: Vec<u64>) -> Proxy {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let address = listener.local_addr().unwrap().to_string();
        let cut = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&cut);
        let swallow = Arc::new(AtomicBool::new(false));
        let swallowing = Arc::clone(&swallow);
        let cuts = Arc::new(Mutex::new(cuts));
        // Bytes since the last cut, over all connections: a cut falls into whatever is under way.
        let passed = Arc::new(AtomicU64::new(0));
        runtime.spawn(async move {
            loop {
                let Ok((near, _)) = listener.accept().await else { return };
                let Ok(far) = tokio::net::TcpStream::connect(&to).await else { continue };
                let swallowing = Arc::clone(&swallowing);
                let (cuts, passed, counted) = (Arc::clone(&cuts), Arc::clone(&passed), Arc::clone(&counted));
                tokio::spawn(async move {
                    let (mut near_in, mut near_out) = near.into_split();
                    let (mut far_in, mut far_out) = far.into_split();
                    let up = async {
                        let mut buffer = vec![0; 64 * 1024];
                        while let Ok(count @ 1..) = near_in.read(&mut buffer).await {
                            let before = passed.fetch_add(count as u64, Ordering::SeqCst);
                            let due = cuts.lock().unwrap().last().copied();
                            if let Some(due) = due.filter(|due| before + count as u64 >= *due) {
                                let keep = due.saturating_sub(before).min(count as u64) as usize;
                                let _ = far_out.write_all(&buffer[..keep]).await;
                                cuts.lock().unwrap().pop();
                                passed.store(0, Ordering::SeqCst);
                                counted.fetch_add(1, Ordering::SeqCst);
                                return;
                            }
                            if swallowing.load(Ordering::SeqCst) {
                                continue;
                            }
                            if far_out.write_all(&buffer[..count]).await.is_err() {
                                return;
                            }
                        }
                    };
                    let down = async {
                        let mut buffer = vec![0; 64 * 1024];
                        while let Ok(count @ 1..) = far_in.read(&mut buffer).await {
                            let lost = swallowing.load(Ordering::SeqCst);
                            if !lost && near_out.write_all(&buffer[..count]).await.is_err() {
                                return;
                            }
                        }
                    };
                    // Either way ending ends both, as when the cable is pulled.
                    tokio::select! { () = up => {} () = down => {} }
                });
            }
        });
        Proxy { address, cut, swallow }
    }
}
