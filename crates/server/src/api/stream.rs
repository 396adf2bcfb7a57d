//! Answers that go on for a while: a job's events, a disk's bytes.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use block_io::{BlockDevice, DeviceError};
use model::{ByteRange, Code, JobId, Problem};
use protocol::api::{AllocatedPage, JobEvent, ProblemBody};

use super::input::{Failure, blocking};
use super::service::Service;

/// How long one question for events waits; then an empty line tells whether the listener is still there.
const EVENTS_WAIT: Duration = Duration::from_secs(2);
/// Bytes read at once of a disk: few enough for a slow listener's memory, enough to pay for the way.
const PIECE_BYTES: u64 = 1 << 20;
/// The most extents of one page of allocated ranges.
pub const EXTENTS_MAX: u32 = 65_536;

/// A job's events as lines of JSON until it ends.
pub fn events(service: Arc<dyn Service>, id: JobId, after: u64) -> Response {
    let lines = futures::stream::unfold(Some(after), move |at| {
        let service = service.clone();
        async move {
            let after = at?;
            let found = blocking(move || service.job_events(id, after, EVENTS_WAIT)).await;
            let (text, next) = match found {
                Ok(found) => {
                    let mut text = String::new();
                    for event in &found.events {
                        text.push_str(&serde_json::to_string(event).unwrap_or_default());
                        text.push('\n');
                    }
                    if found.events.is_empty() {
                        text.push('\n');
                    }
                    (text, (!found.ended).then_some(found.next))
                }
                Err(Failure(problem)) => {
                    let event = JobEvent::Error(ProblemBody::from(problem));
                    (format!("{}\n", serde_json::to_string(&event).unwrap_or_default()), None)
                }
            };
            Some((Ok::<Bytes, Infallible>(Bytes::from(text)), next))
        }
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

/// What a device's error is to a person.
pub fn problem_of(error: DeviceError, what: &str) -> Problem {
    let code = match &error {
        DeviceError::OutOfBounds { .. } => Code::Usage,
        DeviceError::Damaged { .. } => Code::PoolDamaged,
        _ => Code::PoolIo,
    };
    Problem::new(code, format!("{error}.")).about(what)
}

/// The bytes that `Range` asks for. `Ok(None)`: all.
fn wanted(headers: &HeaderMap, size: u64) -> Result<Option<ByteRange>, ()> {
    let Some(value) = headers.get(header::RANGE) else { return Ok(None) };
    let text = value.to_str().map_err(|_| ())?;
    let (first, last) = text.strip_prefix("bytes=").and_then(|range| range.split_once('-')).ok_or(())?;
    let number = |digits: &str| -> Result<u64, ()> {
        if digits.is_empty() || !digits.bytes().all(|c| c.is_ascii_digit()) {
            return Err(());
        }
        digits.parse().map_err(|_| ())
    };
    let range = match (first.is_empty(), last.is_empty()) {
        (true, true) => return Err(()),
        (true, false) => ByteRange { start: size.saturating_sub(number(last)?), end: size },
        (false, true) => ByteRange { start: number(first)?, end: size },
        (false, false) => {
            let end = number(last)?.checked_add(1).ok_or(())?;
            ByteRange { start: number(first)?, end: end.min(size) }
        }
    };
    if range.is_empty() { Err(()) } else { Ok(Some(range)) }
}

async fn piece(device: Arc<dyn BlockDevice>, at: u64, end: u64, what: String) -> Result<Bytes, Failure> {
    let length = PIECE_BYTES.min(end.saturating_sub(at)) as usize;
    blocking(move || {
        let mut buffer = vec![0u8; length];
        device.read_at(at, &mut buffer).map_err(|error| problem_of(error, &what))?;
        Ok(Bytes::from(buffer))
    })
    .await
}

/// A disk's bytes, all or one range of them.
///
/// The first piece is read before the answer begins, so damage at its start is a proper problem. Damage further on
/// breaks the answer off; asking again from there tells what it is.
pub async fn disk(
    device: Arc<dyn BlockDevice>,
    headers: &HeaderMap,
    what: String,
) -> Result<Response, Failure> {
    let size = device.size();
    let Ok(range) = wanted(headers, size) else {
        let problem = Problem::new(Code::Usage, format!("The range is not inside the disk of {size} bytes."))
            .about(&what);
        let body = axum::Json(ProblemBody::from(problem));
        return Ok((
            StatusCode::RANGE_NOT_SATISFIABLE,
            [(header::CONTENT_RANGE, format!("bytes */{size}"))],
            body,
        )
            .into_response());
    };
    let whole = ByteRange { start: 0, end: size };
    let ByteRange { start, end } = range.unwrap_or(whole);
    let first = piece(device.clone(), start, end, what.clone()).await?;
    let next = start.saturating_add(first.len() as u64);
    let pieces = futures::stream::unfold((Some(first), next), move |(held, at)| {
        let (device, what) = (device.clone(), what.clone());
        async move {
            if let Some(bytes) = held {
                return Some((Ok(bytes), (None, at)));
            }
            if at >= end {
                return None;
            }
            match piece(device, at, end, what).await {
                Ok(bytes) => {
                    let next = at.saturating_add(bytes.len() as u64);
                    Some((Ok(bytes), (None, next)))
                }
                Err(Failure(problem)) => Some((Err(std::io::Error::other(problem.to_string())), (None, end))),
            }
        }
    });
    let mut response = Body::from_stream(pieces).into_response();
    let out = response.headers_mut();
    out.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/octet-stream"));
    out.insert(header::ACCEPT_RANGES, header::HeaderValue::from_static("bytes"));
    out.insert(header::CONTENT_LENGTH, header::HeaderValue::from(end.saturating_sub(start)));
    if range.is_some() {
        let text = format!("bytes {start}-{}/{size}", end.saturating_sub(1));
        if let Ok(value) = header::HeaderValue::from_str(&text) {
            out.insert(header::CONTENT_RANGE, value);
        }
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    Ok(response)
}

/// One page of the ranges that may hold data.
pub fn allocated(
    device: &dyn BlockDevice,
    from: u64,
    limit: u32,
    what: &str,
) -> Result<AllocatedPage, Problem> {
    let mut page = AllocatedPage { bytes: device.size(), extents: Vec::new(), next: None };
    let mut at = from;
    while let Some(range) = device.next_allocated(at).map_err(|error| problem_of(error, what))? {
        if page.extents.len() >= limit.clamp(1, EXTENTS_MAX) as usize {
            page.next = Some(range.start);
            break;
        }
        if range.end <= at {
            return Err(Problem::new(Code::Internal, "The map of the disk does not advance.").about(what));
        }
        page.extents.push((range.start, range.len()));
        at = range.end;
    }
    Ok(page)
}
