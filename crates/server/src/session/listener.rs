//! The accept loop: TCP, TLS, then HTTP/2 or HTTP/1.1 on one port.

use super::agent_service::AgentService;
use super::enrollment::EnrollmentService;
use super::gate::Gate;
use super::registry::SessionRegistry;
use super::tls::{FreshLeaf, TlsClock};
use super::{SWEEP, SessionSettings};
use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use identity::PeerCertificate;
use protocol::v0::agent_server::AgentServer;
use protocol::v0::enrollment_server::EnrollmentServer;
use protocol::wire::{CONNECTION_WINDOW, FRAME_BYTES, MESSAGE_BYTES, STREAM_WINDOW};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

/// Connections at once. Each open one may hold a window of memory, so their number has a bound.
const CONNECTIONS: usize = 4096;
/// A caller that has not finished the handshake by then is hung up on.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A silent connection is asked for a sign of life this often ...
const PING_EVERY: Duration = Duration::from_secs(10);
/// ... and given up when none comes within this time.
const PING_ANSWER: Duration = Duration::from_secs(8);
/// Streams of one connection at once.
const STREAMS: u32 = 64;

/// Serves until `stop` becomes true or its sender is gone. `rest` answers everything that is not gRPC; its requests
/// carry a [`Gate`].
pub async fn serve(
    listener: TcpListener,
    settings: SessionSettings,
    registry: SessionRegistry,
    rest: Router,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let leaf = Arc::new(FreshLeaf::new(settings.clone()));
    let time = Arc::new(TlsClock(Arc::clone(&settings.clock)));
    let tls = identity::server_tls(settings.identity.certificate().clone(), leaf, time)
        .map_err(io::Error::other)?;
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let enrollment =
        EnrollmentServer::new(EnrollmentService::new(settings.clone())).max_decoding_message_size(64 * 1024);
    let agents = AgentServer::new(AgentService::new(settings.clone(), registry.clone()))
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(MESSAGE_BYTES);
    let router = rest
        .route_service("/stillpoint.v0.Enrollment/{*method}", enrollment)
        .route_service("/stillpoint.v0.Agent/{*method}", agents);
    let slots = Arc::new(Semaphore::new(CONNECTIONS));

    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let sweeper = tokio::spawn({
        let (settings, registry) = (settings.clone(), registry.clone());
        async move {
            loop {
                sweep.tick().await;
                let (settings, registry) = (settings.clone(), registry.clone());
                // One slow answer of the register must not hold the runtime.
                let _ = tokio::task::spawn_blocking(move || registry.sweep(&settings)).await;
            }
        }
    });

    loop {
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            accepted = listener.accept() => accepted,
        };
        let (tcp, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, or the caller has gone: neither ends the server.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            tracing::warn!(%remote, "refused: {CONNECTIONS} connections are open");
            continue;
        };
        let (acceptor, router, stop) = (acceptor.clone(), router.clone(), stop.clone());
        tokio::spawn(async move {
            connection(tcp, remote, acceptor, router, stop).await;
            drop(slot);
        });
    }
    sweeper.abort();
    registry.close_all();
    Ok(())
}

async fn connection(
    tcp: TcpStream,
    remote: SocketAddr,
    acceptor: tokio_rustls::TlsAcceptor,
    router: Router,
    mut stop: watch::Receiver<bool>,
) {
    let _ = tcp.set_nodelay(true);
    let tls = match tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            tracing::debug!(%remote, %error, "TLS handshake refused");
            return;
        }
        Err(_) => {
            tracing::debug!(%remote, "TLS handshake not finished in time");
            return;
        }
    };
    let shown = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let certificate = match shown.map(|certificate| PeerCertificate::read(certificate)).transpose() {
        Ok(certificate) => certificate.map(Arc::new),
        Err(error) => {
            tracing::warn!(%remote, %error, "connection refused");
            return;
        }
    };
    let gate = Gate { remote, certificate };
    let service = hyper::service::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(gate.clone());
        tower::ServiceExt::oneshot(router.clone(), request)
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HANDSHAKE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES)
        .max_send_buf_size(4 << 20)
        .max_concurrent_streams(STREAMS)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER);
    let serving = builder.serve_connection(TokioIo::new(tls), service);
    tokio::select! {
        served = serving => {
            if let Err(error) = served {
                tracing::debug!(%remote, %error, "connection ended");
            }
        }
        _ = stop.wait_for(|stop| *stop) => {}
    }
}
