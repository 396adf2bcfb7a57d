//! What comes in: who asks, paths, queries and bodies, each checked or refused with a [`Problem`].

use std::marker::PhantomData;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use model::{Code, ExitStatus, Problem};
use protocol::api::ProblemBody;
use serde::de::DeserializeOwned;

use super::service::{Caller, Credentials, Right, Service};

/// The largest body: a change list of three million extents. More is a mistake or an attack.
pub const BODY_BYTES: usize = 64 << 20;

/// Where requests come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// From this very process: standalone.
    InProcess,
    /// From the network: bearer tokens.
    Network,
}

impl FromRequestParts<Api> for Door {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(_: &mut Parts, api: &Api) -> Result<Door, Self::Rejection> {
        Ok(api.door)
    }
}

/// State of the router.
#[derive(Clone)]
pub struct Api {
    pub service: Arc<dyn Service>,
    pub door: Door,
}

/// A problem on its way out.
#[derive(Debug)]
pub struct Failure(pub Problem);

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Failure {
        Failure(problem)
    }
}

/// The HTTP status that fits a problem.
pub fn status_of(problem: &Problem) -> StatusCode {
    match (problem.code, problem.exit_status()) {
        (Code::Unauthorised, _) => StatusCode::UNAUTHORIZED,
        (Code::Unsupported, _) => StatusCode::NOT_IMPLEMENTED,
        (_, ExitStatus::Usage) => StatusCode::BAD_REQUEST,
        (_, ExitStatus::NotFound) => StatusCode::NOT_FOUND,
        (_, ExitStatus::Refused | ExitStatus::Cancelled | ExitStatus::Warnings) => StatusCode::CONFLICT,
        (_, ExitStatus::Damaged) => StatusCode::UNPROCESSABLE_ENTITY,
        (_, ExitStatus::NoContact) => StatusCode::BAD_GATEWAY,
        (_, ExitStatus::Busy) => StatusCode::LOCKED,
        (_, ExitStatus::NoSpace) => StatusCode::INSUFFICIENT_STORAGE,
        (_, ExitStatus::Failed | ExitStatus::Key | ExitStatus::Done) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = status_of(&self.0);
        let mut response = (status, Json(ProblemBody::from(self.0))).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A right, as a type, so that a handler cannot forget to name it.
pub trait Need: Send + Sync + 'static {
    const RIGHT: Right;
}

macro_rules! needs {
    ($($name:ident)*) => {$(
        #[doc = concat!("Needs [`Right::", stringify!($name), "`].")]
        pub struct $name;
        impl Need for $name { const RIGHT: Right = Right::$name; }
    )*};
}
needs! { Read Operate Recover Destroy Administer }

/// Proof that [`Service::authorise`] said yes, and the only way to the service.
pub struct Allowed<N: Need> {
    service: Arc<dyn Service>,
    caller: Caller,
    need: PhantomData<N>,
}

impl<N: Need> Allowed<N> {
    /// Asks the service on a thread that may block.
    pub async fn ask<T, F>(self, question: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Service, &Caller) -> Result<T, Problem> + Send + 'static,
    {
        blocking(move || question(&*self.service, &self.caller)).await
    }

    /// The service, for answers that go on after the handler.
    pub fn service(&self) -> Arc<dyn Service> {
        self.service.clone()
    }
}

/// Runs what blocks away from the runtime's threads. A panic in it is one failed request.
pub async fn blocking<T, F>(work: F) -> Result<T, Failure>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Problem> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(answer) => answer.map_err(Failure),
        Err(_) => Err(Failure(Problem::new(
            Code::Internal,
            "The request ended in a contradiction; see the server's log.",
        ))),
    }
}

impl<N: Need> FromRequestParts<Api> for Allowed<N> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Allowed<N>, Failure> {
        let credentials = match api.door {
            Door::InProcess => Credentials::InProcess,
            Door::Network => parts
                .headers
                .get(header::AUTHORIZATION)
                .and_then(|value| value.to_str().ok())
                .and_then(|value| value.split_once(' '))
                .filter(|(scheme, token)| scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty())
                .map_or(Credentials::Missing, |(_, token)| Credentials::Bearer(token.trim().to_owned())),
        };
        let service = api.service.clone();
        let asked = service.clone();
        let caller = blocking(move || asked.authorise(&credentials, N::RIGHT)).await?;
        Ok(Allowed { service, caller, need: PhantomData })
    }
}

fn usage(message: impl Into<String>) -> Failure {
    Failure(Problem::new(Code::Usage, message).hint("See docs/openapi.json for what the API takes."))
}

/// Parts of the path, decoded, without control characters.
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<Api> for Path<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Path<T>, Failure> {
        let coded = parts.uri.path().to_ascii_lowercase();
        if ["%00", "%0a", "%0d", "%1b"].iter().any(|bad| coded.contains(bad)) {
            return Err(usage("The path has control characters."));
        }
        axum::extract::Path::<T>::from_request_parts(parts, api)
            .await
            .map(|axum::extract::Path(value)| Path(value))
            .map_err(|rejection| usage(format!("The path is not right: {}.", rejection.body_text())))
    }
}

/// The query, every field known.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<Api> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Query<T>, Failure> {
        axum::extract::Query::<T>::from_request_parts(parts, api)
            .await
            .map(|axum::extract::Query(value)| Query(value))
            .map_err(|rejection| usage(format!("The query is not right: {}.", rejection.body_text())))
    }
}

/// A JSON body, every field known; no body is the empty object.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequest<Api> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, api: &Api) -> Result<Body<T>, Failure> {
        let json =
            request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).is_some_and(
                |value| value.split(';').next().unwrap_or_default().trim() == "application/json",
            );
        let bytes = Bytes::from_request(request, api).await.map_err(|rejection| match rejection {
            BytesRejection::FailedToBufferBody(_) => {
                usage(format!("The body is larger than {BODY_BYTES} bytes, or it broke off."))
            }
            _ => usage("The body cannot be read."),
        })?;
        if !bytes.is_empty() && !json {
            return Err(usage("The body is not marked as application/json."));
        }
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        serde_json::from_slice(text)
            .map(Body)
            .map_err(|error| usage(format!("The body is not right: {error}.")))
    }
}

/// Refuses a path that is not absolute or climbs. Both styles: the path may be for a host of another system.
pub fn check_path(path: &str) -> Result<(), Problem> {
    let mut letters = path.chars();
    let windows = path.starts_with("\\\\")
        || (letters.next().is_some_and(|c| c.is_ascii_alphabetic())
            && letters.next() == Some(':')
            && letters.next().is_some_and(|c| c == '\\' || c == '/'));
    let reason = if path.len() > 4_096 {
        "it is longer than 4096 bytes"
    } else if path.chars().any(char::is_control) {
        "it has control characters"
    } else if !path.starts_with('/') && !windows {
        "it is not absolute"
    } else if path.split(|c| c == '/' || (windows && c == '\\')).any(|part| part == "..") {
        "it has `..` in it"
    } else {
        return Ok(());
    };
    let shown: String = path.chars().take(120).collect();
    Err(Problem::new(Code::Usage, format!("{shown:?} is not a usable path: {reason}."))
        .about(shown)
        .hint("Give the full path of a file."))
}
