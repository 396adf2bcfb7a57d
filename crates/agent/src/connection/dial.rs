//! One connection: TCP, TLS that proves the server, HTTP/2 with wide windows.

use super::{AgentIdentity, ConnectionSettings, DEFAULT_PORT};
use environment::Clock;
use hyper_util::rt::TokioIo;
use identity::Fingerprint;
use model::{Code, Problem};
use protocol::wire::{CONNECTION_WINDOW, FRAME_BYTES, STREAM_WINDOW};
use rustls::CertificateError;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

/// TCP and TLS must be done in this time, each.
const PATIENCE: Duration = Duration::from_secs(10);
/// A silent connection is asked for a sign of life this often ...
const PING_EVERY: Duration = Duration::from_secs(10);
/// ... and given up when none comes within this time.
const PING_ANSWER: Duration = Duration::from_secs(8);

struct TlsClock(Arc<dyn Clock>);

impl std::fmt::Debug for TlsClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsClock")
    }
}

impl rustls::time_provider::TimeProvider for TlsClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_micros(self.0.now_micros())))
    }
}

/// `HOST:PORT` of what a person or the server gave: with or without `https://`, a path, a port.
pub(super) fn normal(address: &str) -> String {
    let rest = address.trim();
    let rest = rest.strip_prefix("https://").unwrap_or(rest);
    let rest = rest.split('/').next().unwrap_or(rest);
    let has_port = rest.rsplit_once(':').is_some_and(|(before, port)| {
        port.parse::<u16>().is_ok() && (!before.contains(':') || before.ends_with(']'))
    });
    match (has_port, rest.contains(':') && !rest.starts_with('[')) {
        (true, _) => rest.to_owned(),
        (false, true) => format!("[{rest}]:{DEFAULT_PORT}"),
        (false, false) => format!("{rest}:{DEFAULT_PORT}"),
    }
}

/// Connects to `address` if the server there is `pinned`.
pub(super) async fn connect(
    settings: &ConnectionSettings,
    address: &str,
    pinned: Fingerprint,
    own: Option<&AgentIdentity>,
) -> Result<Channel, Problem> {
    let no_contact = |message: String| Problem::new(Code::NoContact, message).about(address);
    let own = own.map(|own| (CertificateDer::from(own.certificate.clone()), own.key.to_tls()));
    let tls = identity::agent_tls(pinned, own, Arc::new(TlsClock(Arc::clone(&settings.clock))))
        .map_err(|error| Problem::new(Code::Internal, format!("TLS cannot be set up: {error}.")))?;

    let tcp = tokio::time::timeout(PATIENCE, TcpStream::connect(normal(address)))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|error| no_contact(format!("{address}: {error}.")))?;
    let _ = tcp.set_nodelay(true);
    // The name proves nothing: see `identity::PinnedServer`.
    let name = ServerName::try_from("stillpoint.invalid")
        .map_err(|error| Problem::new(Code::Internal, format!("A fixed name is refused: {error}.")))?;
    let handshake = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, tcp);
    let stream = tokio::time::timeout(PATIENCE, handshake)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|error| tls_problem(address, pinned, &error))?;

    // The connector gives the connection that was just made, once; a second one would need all of the above.
    let once = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let stream = once.lock().unwrap_or_else(PoisonError::into_inner).take();
        std::future::ready(stream.ok_or(io::Error::from(io::ErrorKind::NotConnected)))
    });
    Endpoint::from_static("http://stillpoint.invalid")
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|error| no_contact(format!("{address}: {error}.")))
}

fn tls_problem(address: &str, pinned: Fingerprint, error: &io::Error) -> Problem {
    let certificate = match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(why)) => why,
        _ => return Problem::new(Code::NoContact, format!("{address}: {error}.")).about(address),
    };
    match certificate {
        CertificateError::Expired | CertificateError::NotValidYet => Problem::new(
            Code::ServerIdentity,
            format!("{address}: the server has the right key, but its TLS certificate is not valid now."),
        )
        .hint("Check the clocks of this host and of the server: they differ by more than a day."),
        _ => Problem::new(
            Code::ServerIdentity,
            format!("{address}: the server does not hold the identity key {pinned}. Nothing was sent to it."),
        ),
    }
    .about(address)
}

#[cfg(test)]
mod tests {
    use super::normal;

    #[test]
    fn addresses_are_written_in_many_ways() {
        for (given, expected) in [
            ("backup", "backup:7420"),
            ("https://backup.example:99/", "backup.example:99"),
            ("10.0.0.1:5", "10.0.0.1:5"),
            ("[::1]:5", "[::1]:5"),
            ("[::1]", "[::1]:7420"),
            ("fe80::1", "[fe80::1]:7420"),
        ] {
            assert_eq!(normal(given), expected, "{given}");
        }
    }
}
