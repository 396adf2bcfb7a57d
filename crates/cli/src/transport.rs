//! The way from the command line to an API: in this process, or over HTTPS to a pinned server.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper_util::rt::TokioExecutor;
use model::{Code, Problem};
use tower::ServiceExt;

/// Any error of a body that is being read.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// The body of an answer, to be read piece by piece.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;

/// Carries one request to the API and brings the head of the answer back.
///
/// The URI of the request has a path and no host. An answer of any status is `Ok`; a problem means that there was
/// none. Calls may overlap.
pub trait Transport: Send + Sync {
    /// Sends and waits for the answer's head.
    fn call(&self, request: Request<Bytes>) -> BoxFuture<'_, Result<Response<Body>, Problem>>;
}

/// The API of this very process: any HTTP service, such as the server's router.
pub struct InProcess<S> {
    service: S,
}

impl<S> InProcess<S> {
    /// Calls go straight to `service`.
    pub fn new(service: S) -> InProcess<S> {
        InProcess { service }
    }
}

impl<S, B> Transport for InProcess<S>
where
    S: tower::Service<Request<Full<Bytes>>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Error: Into<BodyError>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BodyError>,
{
    fn call(&self, request: Request<Bytes>) -> BoxFuture<'_, Result<Response<Body>, Problem>> {
        let service = self.service.clone();
        Box::pin(async move {
            let answer = service.oneshot(request.map(Full::new)).await.map_err(|error| {
                Problem::new(
                    Code::Internal,
                    format!("The server in this process gave no answer: {}.", error.into()),
                )
            })?;
            Ok(answer.map(|body| body.map_err(Into::into).boxed_unsync()))
        })
    }
}

/// A server over HTTPS: a connection a call, HTTP/2 or 1.1 as the server likes.
///
/// Whom to trust is decided by the TLS configuration alone; the name in the URL is only where to dial.
pub struct Https {
    address: String,
    tls: tokio_rustls::TlsConnector,
}

/// The port of a server whose URL names none.
pub const DEFAULT_PORT: u16 = 7_420;
/// How long to wait for a connection.
const CONNECT: Duration = Duration::from_secs(20);
/// Wide enough for a disk's bytes over a long way; the default would stall there.
const WINDOW_BYTES: u32 = 16 << 20;

impl Https {
    /// `server` is `https://HOST[:PORT]`, or `HOST[:PORT]`. `tls` must verify the server's identity by itself.
    pub fn new(server: &str, tls: rustls::ClientConfig) -> Result<Https, Problem> {
        let wrong = |why: &str| {
            Problem::new(Code::Usage, format!("{server:?} is not a server's address: {why}."))
                .about(server)
                .hint("Write https://HOST:PORT.")
        };
        let rest = match server.split_once("://") {
            Some(("https", rest)) => rest,
            Some(_) => return Err(wrong("it does not begin with https")),
            None => server,
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let parsed: http::uri::Authority = authority.parse().map_err(|_| wrong("it is not HOST:PORT"))?;
        if authority.contains('@') || parsed.host().is_empty() {
            return Err(wrong("it is not HOST:PORT"));
        }
        let address = format!("{}:{}", parsed.host(), parsed.port_u16().unwrap_or(DEFAULT_PORT));
        let mut tls = tls;
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Https { address, tls: Arc::new(tls).into() })
    }

    fn silent(&self, error: impl std::fmt::Display) -> Problem {
        Problem::new(Code::NoContact, format!("{}: no contact: {error}.", self.address)).about(&self.address)
    }

    async fn connect(&self) -> Result<tokio_rustls::client::TlsStream<tokio::net::TcpStream>, Problem> {
        let tcp = tokio::net::TcpStream::connect(&self.address).await.map_err(|error| self.silent(error))?;
        let _ = tcp.set_nodelay(true);
        let host = self.address.rsplit_once(':').map_or(self.address.as_str(), |(host, _)| host);
        let name = rustls::pki_types::ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
            .map_err(|error| self.silent(error))?;
        self.tls.connect(name, tcp).await.map_err(|error| {
            let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            match inner {
                Some(rustls::Error::InvalidCertificate(_)) => Problem::new(
                    Code::ServerIdentity,
                    format!("{}: its identity is not the one expected: {error}.", self.address),
                )
                .about(&self.address),
                _ => self.silent(error),
            }
        })
    }

    async fn exchange(&self, request: Request<Bytes>) -> Result<Response<Body>, Problem> {
        let stream = tokio::time::timeout(CONNECT, self.connect())
            .await
            .map_err(|_| self.silent("nothing answers"))??;
        let two = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let io = hyper_util::rt::TokioIo::new(stream);
        let (mut parts, body) = request.into_parts();
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        if two {
            parts.uri = http::Uri::builder()
                .scheme("https")
                .authority(self.address.as_str())
                .path_and_query(path)
                .build()
                .map_err(|error| self.silent(error))?;
            let request = Request::from_parts(parts, Full::new(body));
            let (mut sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
                .initial_stream_window_size(WINDOW_BYTES)
                .initial_connection_window_size(WINDOW_BYTES)
                .handshake(io)
                .await
                .map_err(|error| self.silent(error))?;
            tokio::spawn(connection);
            let answer = sender.send_request(request).await.map_err(|error| self.silent(error))?;
            return Ok(answer.map(|body| body.map_err(Into::into).boxed_unsync()));
        }
        let host = http::HeaderValue::from_str(&self.address).map_err(|error| self.silent(error))?;
        parts.headers.insert(http::header::HOST, host);
        let request = Request::from_parts(parts, Full::new(body));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(io).await.map_err(|error| self.silent(error))?;
        tokio::spawn(connection);
        let answer = sender.send_request(request).await.map_err(|error| self.silent(error))?;
        Ok(answer.map(|body| body.map_err(Into::into).boxed_unsync()))
    }
}

impl Transport for Https {
    fn call(&self, request: Request<Bytes>) -> BoxFuture<'_, Result<Response<Body>, Problem>> {
        Box::pin(self.exchange(request))
    }
}
