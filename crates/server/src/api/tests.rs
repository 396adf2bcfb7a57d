#![allow(clippy::unwrap_used)]
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use block_io::{BlockDevice, MemoryDevice};
use http_body_util::BodyExt;
use model::{Code, Consistency, JobId, PoolId, Problem};
use protocol::api::*;
use tower::ServiceExt;

use super::*;

/// Knows one token, one job and one disk; everything else is not found.
struct Fake;

const TOKEN: &str = "right";

fn nothing<T>() -> Result<T, Problem> {
    Err(Problem::new(Code::NotFound, "Nothing here."))
}

fn job(request: Option<&JobRequest>) -> Job {
    Job {
        id: JobId([7; 16]),
        kind: request.map_or(JobKind::Check, JobRequest::kind),
        state: JobState::Succeeded,
        datasource: None,
        datasource_name: None,
        created_at: Time(model::Timestamp(0)),
        started_at: None,
        ended_at: None,
        warnings: vec![],
        problem: None,
        figures: Figures::default(),
    }
}

impl Service for Fake {
    fn authorise(&self, credentials: &Credentials, _: Right) -> Result<Caller, Problem> {
        match credentials {
            Credentials::InProcess => Ok(Caller { name: "standalone".into() }),
            Credentials::Bearer(token) if token == TOKEN => Ok(Caller { name: "test".into() }),
            _ => Err(Problem::new(Code::Unauthorised, "No.")),
        }
    }
    fn status(&self) -> Result<Status, Problem> {
        panic!("a contradiction")
    }
    fn datasources(&self, page: &PageQuery) -> Result<Page<Datasource>, Problem> {
        assert!(page.items() <= 1_000);
        Ok(Page { items: vec![], next: page.after.clone() })
    }
    fn datasource(&self, name: &str) -> Result<Datasource, Problem> {
        Err(Problem::new(Code::NotFound, format!("There is no datasource {name:?}.")))
    }
    fn add_image(&self, _: &Caller, _: &AddImage) -> Result<Datasource, Problem> {
        nothing()
    }
    fn machines(&self, _: Option<&str>, _: &PageQuery) -> Result<Page<ListedMachine>, Problem> {
        Ok(Page { items: Vec::new(), next: None })
    }
    fn add_machine(&self, _: &Caller, _: &AddMachine) -> Result<Datasource, Problem> {
        nothing()
    }
    fn start(&self, _: &Caller, request: &JobRequest) -> Result<Started, Problem> {
        Ok(Started { job: job(Some(request)) })
    }
    fn plan(&self, request: &JobRequest) -> Result<Plan, Problem> {
        Err(Problem::new(Code::Unsupported, format!("plan of {}", request.kind().word())))
    }
    fn jobs(&self, _: &JobFilter, _: &PageQuery) -> Result<Page<Job>, Problem> {
        nothing()
    }
    fn job(&self, _: &str) -> Result<Job, Problem> {
        Ok(job(None))
    }
    fn job_log(&self, _: JobId, _: &PageQuery) -> Result<Page<JobLogLine>, Problem> {
        nothing()
    }
    fn job_events(&self, _: JobId, after: u64, _: Duration) -> Result<JobEvents, Problem> {
        Ok(match after {
            0 => JobEvents { events: vec![JobEvent::Progress(Progress::default())], next: 1, ended: false },
            1 => JobEvents { events: vec![], next: 2, ended: false },
            _ => JobEvents { events: vec![JobEvent::Job(Box::new(job(None)))], next: 3, ended: true },
        })
    }
    fn cancel_job(&self, _: &Caller, _: JobId) -> Result<Job, Problem> {
        Ok(job(None))
    }
    fn recovery_points(&self, _: Option<&str>, _: &PageQuery) -> Result<Page<RecoveryPoint>, Problem> {
        nothing()
    }
    fn recovery_point(
        &self,
        _: &str,
        _: Option<&str>,
        _: Option<Consistency>,
        _: bool,
    ) -> Result<RecoveryPoint, Problem> {
        nothing()
    }
    fn diff(&self, _: &str, _: &str) -> Result<PointDiff, Problem> {
        nothing()
    }
    fn delete_point(&self, _: &Caller, _: &str) -> Result<RecoveryPoint, Problem> {
        nothing()
    }
    fn undelete_point(&self, _: &Caller, _: &str) -> Result<RecoveryPoint, Problem> {
        nothing()
    }
    fn open_disk(&self, _: &Caller, point: &str, disk: u32) -> Result<Arc<dyn BlockDevice>, Problem> {
        if disk > 0 {
            return nothing();
        }
        let memory: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(disk_bytes()));
        Ok(if point == "damaged" { Arc::new(Damaged(memory)) } else { memory })
    }
    fn pool_status(&self) -> Result<PoolStatus, Problem> {
        Err(Problem::new(Code::PoolDamaged, "Damaged."))
    }
    fn hosts(&self, _: &PageQuery) -> Result<Page<Host>, Problem> {
        nothing()
    }
    fn make_token(&self, _: &Caller, _: &MakeToken) -> Result<TokenMade, Problem> {
        nothing()
    }
    fn revoke_host(&self, _: &Caller, _: &str) -> Result<Host, Problem> {
        nothing()
    }
    fn alerts(&self, _: bool, _: &PageQuery) -> Result<Page<Alert>, Problem> {
        nothing()
    }
    fn acknowledge_alert(&self, _: &Caller, _: u64) -> Result<Alert, Problem> {
        nothing()
    }
    fn recipients(&self) -> Result<Vec<Recipient>, Problem> {
        Ok(Vec::new())
    }
    fn rotate_keys(&self, _: &Caller, revoked: Option<&str>) -> Result<KeyGeneration, Problem> {
        Ok(KeyGeneration { generation: 1, revoked: revoked.map(str::to_owned), recipients: 2 })
    }
    fn write_kit(&self, _: &Caller, request: &KitFile) -> Result<KitReport, Problem> {
        let path = request.path.clone().unwrap_or_default();
        Ok(KitReport { path, pool: PoolId([1; 16]), recipient: "02".repeat(16), proved: true })
    }
    fn test_kit(&self, _: &Caller, _: &KitFile) -> Result<KitReport, Problem> {
        nothing()
    }
}

fn disk_bytes() -> Vec<u8> {
    (0..3_000_000u32).map(|at| (at / 1_000) as u8).collect()
}

/// Cannot be read past two million.
struct Damaged(Arc<dyn BlockDevice>);

impl BlockDevice for Damaged {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), block_io::DeviceError> {
        let length = buf.len() as u64;
        if offset + length > 2_200_000 {
            let (object, reason) = ("point".to_owned(), "hash".to_owned());
            return Err(block_io::DeviceError::Damaged { object, offset, length, reason });
        }
        self.0.read_at(offset, buf)
    }
    fn next_allocated(&self, from: u64) -> Result<Option<model::ByteRange>, block_io::DeviceError> {
        self.0.next_allocated(from)
    }
}

fn network() -> Router {
    router(Arc::new(Fake), Door::Network)
}

struct Got {
    status: StatusCode,
    headers: axum::http::HeaderMap,
    bytes: Vec<u8>,
    broke: bool,
}

impl Got {
    fn problem(&self) -> Problem {
        serde_json::from_slice::<ProblemBody>(&self.bytes)
            .unwrap_or_else(|_| panic!("not a problem: {}", String::from_utf8_lossy(&self.bytes)))
            .into()
    }
}

async fn send(router: Router, request: Request<Body>) -> Got {
    let (parts, mut body) = router.oneshot(request).await.unwrap().into_parts();
    let (mut bytes, mut broke) = (Vec::new(), false);
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => bytes.extend_from_slice(&frame.into_data().unwrap_or_default()),
            Err(_) => broke = true,
        }
    }
    Got { status: parts.status, headers: parts.headers, bytes, broke }
}

fn request(method: &str, path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::builder()
        .method(method)
        .uri(format!("/api/v1{path}"))
        .header("authorization", format!("Bearer {TOKEN}"))
        .header("content-type", "application/json")
        .body(body.into())
        .unwrap()
}

#[tokio::test]
async fn every_route_of_the_document_denies_without_a_right_token() {
    let document = serde_json::to_value(openapi()).unwrap();
    let mut routes = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys().filter(|key| *key != "parameters") {
            for token in [None, Some("wrong"), Some("")] {
                let path = path.replace(['{', '}'], "");
                let mut ask = Request::builder().method(method.to_uppercase().as_str()).uri(&path);
                if let Some(token) = token {
                    ask = ask.header("authorization", format!("Bearer {token}"));
                }
                // A broken body must not be looked at before the token.
                let got = send(network(), ask.body(Body::from("{")).unwrap()).await;
                if path == "/api/v1/version" {
                    assert_eq!(got.status, StatusCode::OK);
                } else {
                    assert_eq!(got.status, StatusCode::UNAUTHORIZED, "{method} {path}");
                    assert_eq!(got.problem().code, Code::Unauthorised);
                }
            }
            routes += 1;
        }
    }
    assert_eq!(routes, 41);
}

#[tokio::test]
async fn wrong_inputs_are_told_what_is_wrong() {
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    for (method, path, body, status, code, says) in [
        ("GET", "/nothing", "", 404, Code::NotFound, "no such path"),
        ("PUT", "/status", "", 405, Code::Usage, "method"),
        ("GET", "/datasources?limit=x", "", 400, Code::Usage, "query"),
        ("GET", "/datasources?limits=1", "", 400, Code::Usage, "limits"),
        ("GET", "/datasources/a%00b", "", 400, Code::Usage, "control"),
        ("GET", "/datasources/a%ff", "", 400, Code::Usage, "path"),
        ("GET", "/datasources/..%2f..%2fetc", "", 404, Code::NotFound, "../../etc"),
        ("DELETE", "/datasources/web", "", 400, Code::Usage, "data"),
        ("POST", "/datasources/web/synchronize", "{", 400, Code::Usage, "line 1"),
        ("POST", "/datasources/web/synchronize", deep.as_str(), 400, Code::Usage, "body"),
        ("POST", "/datasources/web/synchronize", r#"{"changed":[]}"#, 400, Code::Usage, "changed"),
        (
            "POST",
            "/datasources/web/synchronize",
            r#"{"changed_extents":[{"disk":0,"extents":[[-1,2]]}]}"#,
            400,
            Code::Usage,
            "-1",
        ),
        (
            "POST",
            "/datasources/web/synchronize",
            r#"{"changed_extents":[{"disk":0,"extents":[[18446744073709551615,2]]}]}"#,
            400,
            Code::ChangedExtents,
            "largest",
        ),
        (
            "POST",
            "/datasources/web/synchronize",
            r#"{"changed_extents":[{"disk":0,"extents":[]},{"disk":0,"extents":[]}]}"#,
            400,
            Code::ChangedExtents,
            "two lists",
        ),
        ("POST", "/datasources/images", r#"{"name":"a/b","images":["/x"]}"#, 400, Code::Usage, "slash"),
        ("POST", "/datasources/images", r#"{"name":"a","images":[]}"#, 400, Code::Usage, "image"),
        ("POST", "/datasources/images", r#"{"name":"a","images":["/x/../y"]}"#, 400, Code::Usage, ".."),
        ("POST", "/datasources/images", r#"{"name":"a","images":["x"]}"#, 400, Code::Usage, "absolute"),
        (
            "POST",
            "/datasources/web/recover-disk",
            r#"{"point":"latest","disk":0,"target":{"on":"host","host":"h","path":"C:\\a\\..\\b"}}"#,
            400,
            Code::Usage,
            "..",
        ),
        ("POST", "/datasources/web/check?dry_run=true", "", 501, Code::Unsupported, "plan of check"),
        ("POST", "/prune", r#"{"keep_last":0}"#, 400, Code::Usage, "none"),
        ("POST", "/pool/reclaim", r#"{"breaker_percent":101}"#, 400, Code::Usage, "100"),
        ("POST", "/hosts/tokens", r#"{"count":0}"#, 400, Code::Usage, "hosts"),
        ("POST", "/alerts/x/ack", "", 400, Code::Usage, "path"),
        ("POST", "/recovery-kit/write", r#"{"path":"kit"}"#, 400, Code::Usage, "absolute"),
        ("GET", "/pool", "", 422, Code::PoolDamaged, "Damaged"),
        ("GET", "/status", "", 500, Code::Internal, "contradiction"),
    ] {
        let got = send(network(), request(method, path, body.to_owned())).await;
        let problem = got.problem();
        assert_eq!(
            (got.status.as_u16(), problem.code),
            (status, code),
            "{method} {path} {body:.80}: {problem}"
        );
        assert!(problem.message.contains(says), "{method} {path}: {problem}");
    }
}

#[tokio::test]
async fn huge_and_unmarked_bodies_are_refused() {
    let huge = vec![b' '; input::BODY_BYTES + 1];
    let got = send(network(), request("POST", "/prune", huge)).await;
    assert_eq!(got.problem().code, Code::Usage);
    assert!(got.problem().message.contains("larger"), "{}", got.problem());
    let mut unmarked = request("POST", "/prune", "{}");
    unmarked.headers_mut().remove("content-type");
    let got = send(network(), unmarked).await;
    assert!(got.problem().message.contains("application/json"));
}

#[tokio::test]
async fn jobs_start_with_202_and_their_events_end_with_the_job() {
    let got = send(network(), request("POST", "/datasources/web/protect", "")).await;
    assert_eq!(got.status, StatusCode::ACCEPTED);
    assert_eq!(serde_json::from_slice::<Started>(&got.bytes).unwrap().job.kind, JobKind::Protect);
    let got = send(network(), request("GET", "/jobs/0707/events", "")).await;
    let text = String::from_utf8(got.bytes).unwrap();
    let types: Vec<String> = text
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["type"].to_string())
        .collect();
    assert_eq!(types, [r#""progress""#, r#""job""#]);
}

#[tokio::test]
async fn ranges_of_a_disk_are_exact() {
    let all = disk_bytes();
    for (range, status, slice) in [
        (None, 200, 0..3_000_000),
        (Some("bytes=0-0"), 206, 0..1),
        (Some("bytes=1048575-2097153"), 206, 1_048_575..2_097_154),
        (Some("bytes=2999999-9999999"), 206, 2_999_999..3_000_000),
        (Some("bytes=-5"), 206, 2_999_995..3_000_000),
        (Some("bytes=1500000-"), 206, 1_500_000..3_000_000),
        (Some("bytes=3000000-"), 416, 0..0),
        (Some("bytes=5-4"), 416, 0..0),
        (Some("bytes=0-1,4-5"), 416, 0..0),
        (Some("lines=0-1"), 416, 0..0),
        (Some("bytes=0-18446744073709551615"), 416, 0..0),
    ] {
        let mut ask = request("GET", "/recovery-points/p/disks/0", "");
        if let Some(range) = range {
            ask.headers_mut().insert("range", range.parse().unwrap());
        }
        let got = send(network(), ask).await;
        assert_eq!(got.status.as_u16(), status, "{range:?}");
        if status < 400 {
            assert!(got.bytes == all[slice.clone()], "{range:?}");
            assert_eq!(got.headers["content-length"], slice.len().to_string().as_str());
        } else {
            assert_eq!(got.problem().code, Code::Usage);
        }
    }
}

#[tokio::test]
async fn damage_breaks_the_answer_off_and_the_next_question_tells_it() {
    let got = send(network(), request("GET", "/recovery-points/damaged/disks/0", "")).await;
    assert!(got.broke, "never a short answer that looks whole");
    assert_eq!(got.bytes.len(), 2 << 20);
    let mut again = request("GET", "/recovery-points/damaged/disks/0", "");
    again.headers_mut().insert("range", "bytes=2097152-".parse().unwrap());
    let got = send(network(), again).await;
    assert_eq!((got.status.as_u16(), got.problem().code), (422, Code::PoolDamaged));
}

#[tokio::test]
async fn allocated_ranges_come_in_pages() {
    let got = send(network(), request("GET", "/recovery-points/p/disks/0/allocated?limit=1", "")).await;
    let page: AllocatedPage = serde_json::from_slice(&got.bytes).unwrap();
    assert_eq!(page.bytes, 3_000_000);
    assert_eq!(page.extents.len(), 1);
}

#[test]
fn the_checked_in_document_is_fresh() {
    let path = &(std::env::var("CARGO_MANIFEST_DIR").unwrap() + "/../../docs/openapi.json");
    let made = openapi().to_pretty_json().unwrap() + "\n";
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(path, &made).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        found == made,
        "docs/openapi.json is old: run the test with UPDATE_EXPECT=1 and look at the difference"
    );
}
