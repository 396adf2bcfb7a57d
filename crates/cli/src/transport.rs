//! The way from the command line to an API: in this process, or over HTTPS to a pinned server.

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
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

/// The way to a server over HTTPS.
pub fn https(_server: &str, _fingerprint: &str) -> Result<std::sync::Arc<dyn Transport>, Problem> {
    Err(Problem::new(Code::Unsupported, "Servers on the network cannot be reached yet."))
}
