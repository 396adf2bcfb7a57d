//! Questions to the API and their answers, as types.

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body_util::BodyExt;
use model::{Code, Problem};
use protocol::api::{BASE, Direct, PAGE_ITEMS_MAX, Page, ProblemBody};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::transport::{Body, Transport};

/// The largest answer that is read whole. Lists come in pages, so more is not an answer of ours.
const ANSWER_BYTES: usize = 256 << 20;

/// What an API answers with: from its text, or in the same process as it is.
pub trait Answer: DeserializeOwned + Send + Sync + 'static {}

impl<T: DeserializeOwned + Send + Sync + 'static> Answer for T {}

/// Speaks to one API.
#[derive(Clone)]
pub struct Client {
    transport: Arc<dyn Transport>,
    token: Option<String>,
}

/// Encodes a part of a path or query.
pub fn coded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~' | b'@') {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn broken(what: impl std::fmt::Display) -> Problem {
    Problem::new(Code::ProtocolBroken, format!("The server's answer cannot be understood: {what}."))
        .hint("Check that the address is a Stillpoint server of this version.")
}

impl Client {
    /// Through `transport`, with `token` if it needs one.
    pub fn new(transport: Arc<dyn Transport>, token: Option<String>) -> Client {
        Client { transport, token }
    }

    /// Sends; an answer that is a problem becomes one.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        range: Option<(u64, u64)>,
    ) -> Result<Response<Body>, Problem> {
        let mut request = Request::builder().method(method).uri(format!("{BASE}{path}"));
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some((start, end)) = range {
            request = request.header(header::RANGE, format!("bytes={start}-{}", end.saturating_sub(1)));
        }
        let request = request
            .body(Bytes::from(body.unwrap_or_default()))
            .map_err(|error| Problem::new(Code::Usage, format!("This cannot be asked for: {error}.")))?;
        let answer = self.transport.call(request).await?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let bytes = whole(answer.into_body()).await?;
        Err(serde_json::from_slice::<ProblemBody>(&bytes).map_or_else(|_| broken(status), Problem::from))
    }

    async fn ask<T: Answer>(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<T, Problem> {
        let mut answer = self.send(method, path, body, None).await?;
        if let Some(direct) = answer.extensions_mut().remove::<Direct>() {
            return direct.take().ok_or_else(|| broken("it is of another kind than was asked for"));
        }
        serde_json::from_slice(&whole(answer.into_body()).await?).map_err(broken)
    }

    /// GET.
    pub async fn get<T: Answer>(&self, path: &str) -> Result<T, Problem> {
        self.ask(Method::GET, path, None).await
    }

    /// POST with a JSON body.
    pub async fn post<B: Serialize, T: Answer>(&self, path: &str, body: &B) -> Result<T, Problem> {
        let body = serde_json::to_vec(body).map_err(broken)?;
        self.ask(Method::POST, path, Some(body)).await
    }

    /// DELETE.
    pub async fn delete<T: Answer>(&self, path: &str) -> Result<T, Problem> {
        self.ask(Method::DELETE, path, None).await
    }

    /// All pages of a list, one after the other; `path` may have a query.
    pub async fn each<T: Answer>(&self, path: &str, mut take: impl FnMut(T)) -> Result<(), Problem> {
        let joint = if path.contains('?') { '&' } else { '?' };
        let mut next: Option<String> = None;
        loop {
            let path = match &next {
                Some(after) => format!("{path}{joint}limit={PAGE_ITEMS_MAX}&after={}", coded(after)),
                None => format!("{path}{joint}limit={PAGE_ITEMS_MAX}"),
            };
            let page: Page<T> = self.get(&path).await?;
            page.items.into_iter().for_each(&mut take);
            match page.next {
                Some(after) if next.as_ref() != Some(&after) => next = Some(after),
                Some(_) => return Err(broken("a list that does not advance")),
                None => return Ok(()),
            }
        }
    }
}

/// The whole body.
pub async fn whole(mut body: Body) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(cut)?;
        if let Ok(data) = frame.into_data() {
            bytes.extend_from_slice(&data);
            if bytes.len() > ANSWER_BYTES {
                return Err(broken("it is too large"));
            }
        }
    }
    Ok(bytes)
}

/// An answer that broke off.
pub fn cut(error: crate::transport::BodyError) -> Problem {
    Problem::new(Code::NoContact, format!("The answer broke off: {error}."))
}
