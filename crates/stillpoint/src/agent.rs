//! `stillpoint agent enroll` and `agent run`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ::agent::connection::{self, AgentState, ConnectionEvent, ConnectionSettings};
use ::agent::cpu::{CpuLimit, Restraint};
use ::agent::{Host, HostExecutor};
use block_io::Pace;
use cli::program::{AgentOptions, EnrollOptions, Say};
use environment::{FolderFiles, SystemClock, SystemRandomness};
use identity::Token;
use model::{Code, Problem};

use crate::world::machine_name;

/// Where the agent of a machine keeps its state unless told otherwise.
const STATE: &str = "/var/lib/stillpoint/agent";
/// Longest wait between two tries to reach the server: a job waits for its host for some minutes only.
const LONGEST_WAIT: Duration = Duration::from_secs(20);
/// How often the end is asked for.
const LOOK: Duration = Duration::from_millis(200);

fn folder(state: &Option<PathBuf>) -> PathBuf {
    state.clone().unwrap_or_else(|| PathBuf::from(STATE))
}

fn state(folder: &Path) -> AgentState {
    AgentState::new(Arc::new(FolderFiles::new(folder)))
}

fn settings(name: String, report: impl Fn(ConnectionEvent) + Send + Sync + 'static) -> ConnectionSettings {
    ConnectionSettings {
        backoff_most: LONGEST_WAIT,
        ..ConnectionSettings::new(name, Arc::new(SystemClock), Arc::new(SystemRandomness), Arc::new(report))
    }
}

/// The runtime of the network; jobs have threads of their own.
pub fn runtime() -> Result<tokio::runtime::Runtime, Problem> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Problem::new(Code::Internal, format!("Threads cannot be started: {error}.")))
}

/// Returns when the process is asked to end: SIGTERM, SIGINT, or the command line saw Ctrl-C.
pub async fn until_stopped(say: &dyn Say) -> Result<(), Problem> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error: std::io::Error| Problem::new(Code::Internal, format!("No signals: {error}."));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            () = tokio::time::sleep(LOOK) => {
                if say.cancelled().load(Ordering::SeqCst) {
                    return Ok(());
                }
            }
        }
    }
}

/// The folder holds a private key: nobody else may look into it.
fn make_private(folder: &Path) -> Result<(), Problem> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let failed = |error: std::io::Error| {
        Problem::new(Code::StateDamaged, format!("{}: cannot be made private: {error}.", folder.display()))
            .about(folder.display().to_string())
            .hint("Run the command as root, or name another folder with --state DIR.")
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).map_err(failed)
}

/// Enrols this machine.
pub fn enroll(options: &EnrollOptions, say: &dyn Say) -> Result<(), Problem> {
    let token: Token =
        options.token.parse().map_err(|refusal: identity::TokenRefusal| Problem::from(refusal))?;
    let name = options.name.clone().unwrap_or_else(machine_name);
    let folder = folder(&options.state);
    make_private(&folder)?;
    let state = state(&folder);
    let settings = settings(name.clone(), |_| {});
    let servers = [options.server.clone()];
    let host = runtime()?.block_on(connection::enrol(&settings, &state, &servers, &token))?;
    state.set_name(&name)?;
    say.step(
        &format!("Enrolled as {name} ({host}) with the server {}.", token.server),
        "enrolled",
        serde_json::json!({ "host": host, "name": name, "server": token.server, "state": folder }),
    );
    say.line(&match &options.state {
        None => "Start the agent: stillpoint agent run".to_owned(),
        Some(folder) => format!("Start the agent: stillpoint agent run --state {}", folder.display()),
    });
    Ok(())
}

/// The name under which this machine is enrolled, if it is.
pub fn this_host() -> Option<String> {
    let state = state(Path::new(STATE));
    state.identity().ok()?;
    state.name().ok().flatten()
}

fn told(event: &ConnectionEvent) -> String {
    match event {
        ConnectionEvent::Connected { address, server_name } => {
            format!("Connected to {server_name} at {address}.")
        }
        ConnectionEvent::Renewed { not_after } => {
            format!("The certificate is renewed until {}.", not_after.rfc3339())
        }
        ConnectionEvent::Lost { address, problem } => {
            format!("No session with {address}: {}", problem.message)
        }
        ConnectionEvent::Refused { problem } => format!("The server refuses this agent: {}", problem.message),
        ConnectionEvent::Warning { problem } => format!("Warning: {}", problem.message),
    }
}

/// How this machine's work is held back.
pub fn restraint(low_priority: bool, cpu_limit: Option<u32>) -> Result<Restraint, Problem> {
    let cpu = match cpu_limit {
        None => None,
        Some(percent) => Some(Arc::new(CpuLimit::new(percent, Arc::new(SystemClock))?) as Arc<dyn Pace>),
    };
    Ok(Restraint { low_priority, cpu })
}

/// Runs the agent until it is told to stop.
pub fn run(options: &AgentOptions, say: &dyn Say) -> Result<(), Problem> {
    crate::world::log_to_stderr();
    let folder = folder(&options.state);
    let state = state(&folder);
    let name = state.name()?.unwrap_or_else(machine_name);
    let _one = only_one(&folder)?;
    let clock = Arc::new(SystemClock);
    let restraint = restraint(!options.normal_priority, options.cpu_limit)?;
    let host = Arc::new(
        Host::new(clock.clone(), Arc::new(SystemRandomness))
            .restrained(restraint)
            .with_libvirt(crate::world::libvirt()),
    );
    let executor = HostExecutor::new(host, state.clone(), clock);
    match executor.sweep() {
        Ok(lines) => lines.iter().for_each(|line| say.line(line)),
        Err(problem) => say.line(&format!("Warning: {}", problem.message)),
    }
    let (events_in, mut events) = tokio::sync::mpsc::unbounded_channel();
    let settings = settings(name, move |event| drop(events_in.send(event)));
    let (stop, stopping) = tokio::sync::watch::channel(false);
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let mut running = tokio::spawn(connection::run(settings, state, Arc::new(executor), stopping));
        let stopped = until_stopped(say);
        tokio::pin!(stopped);
        let mut last = String::new();
        let ended = loop {
            tokio::select! {
                ended = &mut running => break ended,
                asked = &mut stopped => {
                    asked?;
                    stop.send_replace(true);
                    break running.await;
                }
                Some(event) = events.recv() => {
                    // A server that is away for a week fills no log.
                    let line = told(&event);
                    if line != last {
                        say.line(&line);
                        last = line;
                    }
                }
            }
        };
        ended.unwrap_or_else(|error| {
            Err(Problem::new(Code::Internal, format!("The connection stopped: {error}.")))
        })
    });
    // Jobs under way end with the process; what they leave beside images is swept at the next start.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Two agents on one state folder would take over from each other without end.
fn only_one(folder: &Path) -> Result<Box<dyn environment::Lock>, Problem> {
    use environment::Files;
    let files = FolderFiles::new(folder);
    let shown = folder.display().to_string();
    match files.lock("agent.lock") {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => {
            Err(Problem::new(Code::SourceBusy, format!("Another agent runs on {shown}.")).about(shown))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Problem::new(Code::NotFound, format!("{shown} does not exist: this agent is not enrolled."))
                .about(shown)
                .hint("Run `stillpoint agent enroll --server URL --token TOKEN`."))
        }
        Err(error) => {
            Err(Problem::new(Code::StateDamaged, format!("{shown}: cannot be locked: {error}.")).about(shown))
        }
    }
}
