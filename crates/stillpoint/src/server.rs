//! `stillpoint server run`.
//!
//! ```text
//! bind the port -> [adopt the pool with its kit] -> open the data folder, take the pool's lock -> deletion service
//!   -> give up the right to remove -> catalog -> identity, hosts, tokens -> listener, housekeeping -> wait for a signal
//!   -> no new connections -> jobs cancelled -> catalog closed
//! ```

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ::server::api::Door;
use ::server::app::{App, AppService, DataFolder, FolderOptions, History, Parts};
use ::server::remote::{
    ApiTokens, ByAge, Housekeeping, PoolRegister, RemoteHosts, RemoteTimes, server_identity,
};
use ::server::session::{SessionEvent, SessionRegistry, SessionSettings, serve};
use cli::program::{Say, ServerOptions};
use environment::{Clock, FolderFiles, Randomness, SystemClock, SystemRandomness};
use model::{Code, Problem, Timestamp};
use protocol::api::Severity;
use serde::Deserialize;

use crate::agent::{runtime, until_stopped};
use crate::deletion::{ChildDeletion, give_up_removal};
use crate::standalone;
use crate::world::{machine_name, world_of};

/// The port of a server that was told none.
const PORT: u16 = ::agent::connection::DEFAULT_PORT;
/// Name of the first API token.
const ADMINISTRATOR: &str = "administrator";
/// How long connections have to end.
const ENDING: Duration = Duration::from_secs(2);

/// The configuration file, TOML. What the command line says comes first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// Address and port to listen on.
    listen: Option<String>,
    /// Where agents find this server, best first: `HOST:PORT`. They keep the list.
    addresses: Option<Vec<String>>,
    /// What the server calls itself.
    name: Option<String>,
    /// How long a job waits for a host that is away.
    contact_grace_seconds: Option<u64>,
    /// Everything that is stored is read and proved once in so many days; 0: never by itself.
    verify_every_days: Option<u32>,
    /// How fast that reads at most.
    verify_bytes_per_second: Option<u64>,
}

impl Config {
    fn by_age(&self) -> ByAge {
        let default = ByAge::default();
        ByAge {
            every_seconds: self
                .verify_every_days
                .map_or(default.every_seconds, |days| u64::from(days) * 86_400),
            bytes_per_second: self.verify_bytes_per_second.unwrap_or(default.bytes_per_second),
        }
    }

    fn read(path: &Path) -> Result<Config, Problem> {
        let shown = path.display().to_string();
        let wrong = |why: String| Problem::new(Code::Usage, format!("{shown}: {why}.")).about(shown.clone());
        let text =
            std::fs::read_to_string(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        let config: Config =
            toml::from_str(&text).map_err(|error| wrong(error.to_string().trim_end().replace('\n', " ")))?;
        if config.contact_grace_seconds.is_some_and(|grace| !(60..=86_400).contains(&grace)) {
            return Err(wrong("contact_grace_seconds is not between 60 and 86400".to_owned()));
        }
        if config.verify_every_days.is_some_and(|days| days > 3650) {
            return Err(wrong("verify_every_days is more than 3650".to_owned()));
        }
        if config.verify_bytes_per_second.is_some_and(|rate| rate < 1_000_000) {
            return Err(wrong("verify_bytes_per_second is less than 1000000".to_owned()));
        }
        Ok(config)
    }
}

/// `HOST:PORT`, `HOST`, `:PORT` or `PORT`, with what is missing filled in.
fn with_port(text: &str) -> String {
    if text.parse::<u16>().is_ok() {
        return format!("0.0.0.0:{text}");
    }
    if let Some(port) = text.strip_prefix(':').filter(|port| port.parse::<u16>().is_ok()) {
        return format!("0.0.0.0:{port}");
    }
    let has_port = text.rsplit_once(':').is_some_and(|(before, port)| {
        port.parse::<u16>().is_ok() && (!before.contains(':') || before.ends_with(']'))
    });
    match (has_port, text.contains(':') && !text.starts_with('[')) {
        (true, _) => text.to_owned(),
        (false, true) => format!("[{text}]:{PORT}"),
        (false, false) => format!("{text}:{PORT}"),
    }
}

/// Binds before anything is opened: a port that is taken must leave nothing behind.
fn bind(listen: Option<&str>) -> Result<TcpListener, Problem> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Problem::new(Code::Usage, format!("{what}: cannot listen there: {error}."))
            .about(what)
            .hint("Choose another address with --listen ADDR:PORT; another server may be using this one.")
    };
    let Some(text) = listen else {
        // Both families with one socket where the system has the newer one.
        let both = SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, PORT));
        let old = SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, PORT));
        return TcpListener::bind(both)
            .or_else(|_| TcpListener::bind(old))
            .map_err(|error| failed(&format!("port {PORT}"), &error));
    };
    let address = with_port(text);
    let all: Vec<SocketAddr> = address.to_socket_addrs().map_err(|error| failed(text, &error))?.collect();
    TcpListener::bind(&all[..]).map_err(|error| failed(text, &error))
}

/// Where agents find a server that listens on `local`: what was said, or what can be known from here.
fn addresses(told: Option<Vec<String>>, local: SocketAddr, name: &str) -> Vec<String> {
    match told {
        Some(told) if !told.is_empty() => told.iter().map(|address| with_port(address)).collect(),
        _ if local.ip().is_unspecified() => vec![format!("{name}:{}", local.port())],
        _ => vec![local.to_string()],
    }
}

fn no_random(error: std::io::Error) -> Problem {
    Problem::new(Code::Internal, format!("No random numbers: {error}."))
}

/// Runs the server until it is told to stop.
pub fn run(options: &ServerOptions, say: &dyn Say) -> Result<(), Problem> {
    crate::world::log_to_stderr();
    let config = options.config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
    let listener = bind(options.listen.as_deref().or(config.listen.as_deref()))?;
    let local = listener
        .local_addr()
        .and_then(|local| listener.set_nonblocking(true).map(|()| local))
        .map_err(|error| Problem::new(Code::Internal, format!("The socket cannot be used: {error}.")))?;
    let machine = machine_name();
    let by_age = config.by_age();
    let name = config.name.unwrap_or_else(|| machine.clone());
    let addresses = addresses(config.addresses, local, &machine);

    let folder = DataFolder::new(&options.data);
    let world = world_of(Arc::new(FolderFiles::new(folder.pool())));
    if let Some(kit) = &options.kit {
        let pool = folder.adopt(&world, kit, &machine)?;
        say.line(&format!(
            "Took over pool {pool} with its recovery kit. Its next synchronisations read everything."
        ));
    }
    let open = FolderOptions {
        create: Some(standalone::settings(&options.create)),
        pool: options.pool,
        writes: true,
    };
    let opened = folder.open(&world, &open, &machine)?;
    if let Some(kit) = &opened.created_kit {
        say.line(&format!(
            "Created the data folder {} with pool {}.",
            options.data.display(),
            opened.pool.id()
        ));
        say.line(&format!(
            "The recovery kit is {}. Keep a copy of it away from this machine.",
            kit.display()
        ));
    }
    for damage in &opened.damage {
        say.line(&format!("Warning: {}", standalone::describe(damage)));
    }

    // From here on only the other process can remove anything of the pool (INV-15). Before the first thread: the kernel
    // binds threads, and later ones take after those that start them.
    let deletion = Arc::new(ChildDeletion::start(&folder.root)?);
    let catalog = folder.catalog();
    std::fs::create_dir_all(&catalog).map_err(|error| {
        Problem::new(Code::PoolIo, format!("{}: cannot be made: {error}.", catalog.display()))
    })?;
    let staging = folder.pool().join("staging");
    if !give_up_removal(&[catalog.clone(), staging, std::env::temp_dir()]) {
        say.line("Note: this kernel cannot keep the server itself from removing pool files (no Landlock).");
    }

    let clock = Arc::new(SystemClock);
    let randomness = Arc::new(SystemRandomness);
    let now = Timestamp(clock.now_micros());
    let pool = opened.pool.clone();
    let (history, said) = History::open(&catalog, &pool, true)?;
    said.iter().for_each(|line| say.line(&format!("Warning: {line}.")));
    let history = Arc::new(history);
    let identity = Arc::new(server_identity(&pool, &*randomness)?);
    let register = Arc::new(PoolRegister::open(pool.clone()));
    let tokens = Arc::new(ApiTokens::open(pool.clone()));
    let first_token =
        tokens.is_empty().then(|| tokens.issue(ADMINISTRATOR, now, &*randomness)).transpose()?;

    let times = match config.contact_grace_seconds.map(Duration::from_secs) {
        Some(link_grace) => RemoteTimes { link_grace, ..RemoteTimes::default() },
        None => RemoteTimes::default(),
    };
    let mut first_command = [0; 4];
    randomness.fill(&mut first_command).map_err(no_random)?;
    let registry = SessionRegistry::new(u32::from_le_bytes(first_command), times.link_grace, {
        let (register, history, clock) = (register.clone(), history.clone(), clock.clone());
        move |event| session_event(&register, &history, Timestamp(clock.now_micros()), event)
    });
    let fingerprint = identity.fingerprint();
    let settings = SessionSettings {
        identity,
        server_name: name.clone(),
        addresses: addresses.clone(),
        pool: pool.id(),
        clock: clock.clone(),
        randomness: randomness.clone(),
        register: register.clone(),
        contact_grace: times.link_grace,
    };
    let app = App::new(Parts {
        folder,
        pool: pool.clone(),
        hosts: Arc::new(RemoteHosts {
            register,
            registry: registry.clone(),
            fingerprint,
            clock: clock.clone(),
            randomness: randomness.clone(),
            times,
        }),
        tokens,
        deletion,
        history,
        clock: clock.clone(),
        randomness,
    });
    let router = ::server::api::router(Arc::new(AppService(app.clone())), Door::Network);

    let runtime = runtime()?;
    let (stop, stopping) = tokio::sync::watch::channel(false);
    let result = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)
            .map_err(|error| Problem::new(Code::Internal, format!("The socket cannot be used: {error}.")))?;
        let mut serving = tokio::spawn(serve(listener, settings, registry, router, stopping));
        let housekeeping = Housekeeping::start(app.clone(), clock, by_age)?;
        greet(
            say,
            &name,
            local,
            &addresses,
            &pool.id().to_string(),
            &fingerprint.to_string(),
            first_token.as_deref(),
        );
        let result = tokio::select! {
            asked = until_stopped(say) => asked,
            ended = &mut serving => Err(match ended {
                Ok(Err(error)) => Problem::new(Code::Internal, format!("The listener stopped: {error}.")),
                _ => Problem::new(Code::Internal, "The listener stopped."),
            }),
        };
        say.line("Stopping: no new work is taken, running jobs are cancelled.");
        // Jobs tell their hosts to end while the sessions still stand.
        let ending = app.clone();
        let _ = tokio::task::spawn_blocking(move || {
            drop(housekeeping);
            ending.runner().stop();
        })
        .await;
        stop.send_replace(true);
        let _ = tokio::time::timeout(ENDING, serving).await;
        result
    });
    runtime.shutdown_timeout(ENDING);
    app.close();
    result
}

fn session_event(register: &PoolRegister, history: &Arc<History>, now: Timestamp, event: SessionEvent) {
    match event {
        SessionEvent::Connected { host, info } => {
            register.saw(host, now);
            tracing::info!(%host, name = %info.host_name, remote = %info.remote, "agent connected");
        }
        SessionEvent::Lost { host } => {
            register.saw(host, now);
            tracing::info!(%host, "agent lost");
        }
        SessionEvent::Ended { host, problem } => tracing::info!(%host, %problem, "session ended"),
        SessionEvent::Duplicate { host, old, new } => {
            let problem = Problem::new(
                Code::HostRevoked,
                format!("Two agents say that they are host {host}, at {old} and {new}: its key was copied."),
            )
            .about(host.to_string())
            .hint("Revoke the host and enrol the right machine again.");
            let history = Arc::clone(history);
            // The catalog may be slow, the caller must not be.
            let _ = std::thread::Builder::new()
                .name("alert".to_owned())
                .spawn(move || history.raise(Severity::Warning, &problem, now));
        }
    }
}

/// What a newcomer needs, ready to be pasted.
fn greet(
    say: &dyn Say,
    name: &str,
    local: SocketAddr,
    addresses: &[String],
    pool: &str,
    fingerprint: &str,
    token: Option<&str>,
) {
    let url = format!("https://{}", addresses.first().cloned().unwrap_or_else(|| local.to_string()));
    let mut lines = vec![
        format!("The server {name} listens on {local} with pool {pool}."),
        format!("Agents find it at {}; its fingerprint is {fingerprint}.", addresses.join(", ")),
    ];
    if token.is_some() {
        lines.push("The administrator's token is shown this once. To work through this server:".to_owned());
        lines.push(String::new());
    } else {
        lines.push("To work through this server, with the token from its first start:".to_owned());
        lines.push(String::new());
    }
    lines.push(format!("  export STILLPOINT_SERVER={url}"));
    lines.push(format!("  export STILLPOINT_FINGERPRINT={fingerprint}"));
    if let Some(token) = token {
        lines.push(format!("  export STILLPOINT_TOKEN={token}"));
    }
    lines.push(String::new());
    let figures = serde_json::json!({
        "name": name, "listen": local.to_string(), "addresses": addresses, "pool": pool,
        "fingerprint": fingerprint, "token": token,
    });
    say.step(&lines.join("\n"), "listening", figures);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_people_write_them() {
        for (text, means) in [
            ("7500", "0.0.0.0:7500"),
            (":7500", "0.0.0.0:7500"),
            ("127.0.0.1", "127.0.0.1:7420"),
            ("backup.example.org", "backup.example.org:7420"),
            ("::1", "[::1]:7420"),
            ("[::1]:80", "[::1]:80"),
            ("backup:9", "backup:9"),
        ] {
            assert_eq!(with_port(text), means, "{text}");
        }
        let any: SocketAddr = "[::]:7420".parse().unwrap();
        let one: SocketAddr = "10.1.2.3:99".parse().unwrap();
        assert_eq!(addresses(None, any, "backup"), ["backup:7420"]);
        assert_eq!(addresses(Some(vec![]), one, "backup"), ["10.1.2.3:99"]);
        assert_eq!(addresses(Some(vec!["a".into(), "b:1".into()]), one, "backup"), ["a:7420", "b:1"]);
    }

    #[test]
    fn a_configuration_with_a_mistake_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("server.toml");
        let read = |text: &str| {
            std::fs::write(&file, text).unwrap();
            Config::read(&file)
        };
        let good =
            read("listen = \"0.0.0.0:1\"\naddresses = [\"a:1\"]\nname = \"b\"\ncontact_grace_seconds = 90\n");
        assert_eq!(good.unwrap().contact_grace_seconds, Some(90));
        let by_age = read("verify_every_days = 7\nverify_bytes_per_second = 2000000\n").unwrap().by_age();
        assert_eq!((by_age.every_seconds, by_age.bytes_per_second), (7 * 86_400, 2_000_000));
        for wrong in [
            "lisen = \"x\"",
            "listen = 5",
            "contact_grace_seconds = 5",
            "name =",
            "verify_every_days = 9999",
            "verify_bytes_per_second = 5",
        ] {
            assert_eq!(read(wrong).unwrap_err().code, Code::Usage, "{wrong}");
        }
    }
}
