//! Stored expectations: help, error texts, JSON shapes, exit codes, over a fake API.
#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use model::PoolId;
use protocol::api::Job;
use serde_json::{Value, json};

use super::*;
use crate::program::*;

/// Answers by method and path, and keeps what it was asked.
#[derive(Default, Clone)]
struct FakeApi {
    answers: Arc<BTreeMap<String, (u16, String)>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Transport for FakeApi {
    fn call(&self, request: Request<Bytes>) -> BoxFuture<'_, Result<Response<transport::Body>, Problem>> {
        let body = String::from_utf8_lossy(request.body()).into_owned();
        let key = format!("{} {}", request.method(), request.uri().to_string().trim_start_matches("/api/v1"));
        self.asked.lock().unwrap().push(format!("{key} {body}").trim().to_owned());
        let (status, text) = self.answers.get(&key).cloned().unwrap_or_else(|| {
            (
                404,
                json!({"code": "SP-1003", "message": format!("No answer to {key}."), "hint": ""}).to_string(),
            )
        });
        let body = Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync();
        Box::pin(async move { Ok(Response::builder().status(status).body(body).unwrap()) })
    }
}

struct FakeProgram {
    api: FakeApi,
    opened: Mutex<Vec<StandaloneOptions>>,
    glass: Mutex<Vec<BreakGlass>>,
    folders: Mutex<Vec<VerifyFolder>>,
}

impl Program for FakeProgram {
    fn version(&self) -> String {
        "9.9.9".into()
    }
    fn open_standalone(&self, options: &StandaloneOptions) -> Result<Standalone, Problem> {
        self.opened.lock().unwrap().push(options.clone());
        if options.folder.ends_with("missing") && options.create.is_none() {
            return Err(
                Problem::new(Code::DataFolderMissing, "There is no data in missing.").about("missing")
            );
        }
        let created_kit = options.create.as_ref().map(|_| PathBuf::from("/kit"));
        Ok(Standalone {
            transport: Arc::new(self.api.clone()),
            pool: PoolId([2; 16]),
            created_kit,
            guard: Box::new(()),
        })
    }
    fn demo(&self, _: &DemoOptions, say: &dyn Say) -> Result<(), Problem> {
        say.step("Step one.", "demo-step", json!({"bytes": 1}));
        Ok(())
    }
    fn server_run(&self, _: &ServerOptions, _: &dyn Say) -> Result<(), Problem> {
        Ok(())
    }
    fn agent_enroll(&self, _: &EnrollOptions, _: &dyn Say) -> Result<(), Problem> {
        Ok(())
    }
    fn agent_run(&self, _: &AgentOptions, _: &dyn Say) -> Result<(), Problem> {
        Ok(())
    }
    fn break_glass(&self, options: &BreakGlass, _: &dyn Say) -> Result<Job, Problem> {
        self.glass.lock().unwrap().push(options.clone());
        let mut job = job("recover-disk", "succeeded");
        job["warnings"] = json!([{"code": "SP-3001", "message": "Lost."}]);
        Ok(serde_json::from_value(job).unwrap())
    }
    fn verify_folder(&self, options: &VerifyFolder, _: &dyn Say) -> Result<Job, Problem> {
        self.folders.lock().unwrap().push(options.clone());
        Ok(serde_json::from_value(job("verify", "succeeded")).unwrap())
    }
    fn local_target(&self, _: &LocalTargetOptions) -> Result<Box<dyn LocalTarget>, Problem> {
        Err(Problem::new(Code::TargetExists, "It exists."))
    }
    fn this_host(&self) -> Option<String> {
        None
    }
    fn connect(&self, _: &str, _: &str) -> Result<Arc<dyn Transport>, Problem> {
        Ok(Arc::new(self.api.clone()))
    }
}

const POINT: &str = "33333333333333333333333333333333";
const JOB: &str = "44444444444444444444444444444444";

fn job(kind: &str, state: &str) -> Value {
    json!({"id": JOB, "kind": kind, "state": state, "datasource_name": "web", "created_at": "2026-11-22T10:00:00Z",
        "seconds": 2.5, "bytes_read": 5_000_000, "bytes_stored": 0, "cause": "full scan because: no list",
        "recovery_point": POINT})
}

fn point(state: &str) -> Value {
    json!({"id": POINT, "datasource": POINT, "datasource_name": "web", "time": "2026-11-22T09:00:00Z", "sequence": 4,
        "consistency": "crash", "state": state, "disks": [{"disk": 0, "bytes": 10, "format": "raw", "sector_bytes": 512}],
        "expires": null, "expires_why": "no policy", "bytes_unique": 2048})
}

struct Ran {
    status: u8,
    out: String,
    err: String,
    asked: Vec<String>,
    opened: Vec<StandaloneOptions>,
    glass: Vec<BreakGlass>,
    folders: Vec<VerifyFolder>,
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn ran(line: &str, answers: &[(&str, u16, Value)]) -> Ran {
    let answers = answers
        .iter()
        .map(|(key, status, body)| {
            let text = match body {
                Value::String(lines) => lines.clone(),
                other => other.to_string(),
            };
            (key.to_string(), (*status, text))
        })
        .collect();
    let api = FakeApi { answers: Arc::new(answers), asked: Arc::default() };
    let program =
        FakeProgram { api, opened: Mutex::default(), glass: Mutex::default(), folders: Mutex::default() };
    let (out, err) = (Sink::default(), Sink::default());
    let streams = Streams {
        stdout: Box::new(out.clone()),
        stderr: Box::new(err.clone()),
        terminal: false,
        zone: jiff::tz::TimeZone::fixed(jiff::tz::offset(2)),
        now: || Timestamp(1_795_345_200_000_000),
        answer: String::new,
    };
    let arguments = std::iter::once("stillpoint").chain(line.split_whitespace()).map(OsString::from);
    let status = run(arguments, &program, streams);
    let (opened, glass) = (program.opened.into_inner().unwrap(), program.glass.into_inner().unwrap());
    let asked = program.api.asked.lock().unwrap().clone();
    let folders = program.folders.into_inner().unwrap();
    Ran { status, out: out.text(), err: err.text(), asked, opened, glass, folders }
}

fn expect(name: &str, found: &str) {
    let path = format!("{}/src/expected/{name}", std::env::var("CARGO_MANIFEST_DIR").unwrap());
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::create_dir_all(std::path::Path::new(&path).parent().unwrap()).unwrap();
        std::fs::write(&path, found).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == found, "{name} changed: run with UPDATE_EXPECT=1 and look at the difference\n{found}");
}

/// Help of every listed command.
fn help_of(command: &mut clap::Command, path: &str, all: &mut String) {
    let help = command.clone().term_width(100).render_help();
    all.push_str(&format!("$ {path} --help\n{help}\n"));
    for sub in command.get_subcommands_mut().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
        let path = format!("{path} {}", sub.get_name());
        help_of(sub, &path, all);
    }
}

#[test]
fn help_is_as_kept_and_lists_no_verb_of_later() {
    let mut command = Words::command();
    command.build();
    let mut all = String::new();
    help_of(&mut command, "stillpoint", &mut all);
    // What the environment of the test run holds is no part of the help.
    let all: String = all.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    for later in ["incident", "support-bundle", "policy", "recover files", "hold "] {
        assert!(!all.contains(&format!("$ stillpoint {later}")), "{later}");
    }
    expect("help.txt", &all);
}

#[test]
fn a_job_ends_with_its_line_and_status() {
    let end = |job: Value| {
        let mut event = json!({"type": "job"});
        event.as_object_mut().unwrap().extend(job.as_object().unwrap().clone());
        Value::String(format!(
            "{}\n\n{event}\n",
            json!({"type": "progress", "phase": "reading", "bytes_done": 1})
        ))
    };
    let start = "POST /datasources/web/synchronize";
    let events = format!("GET /jobs/{JOB}/events");
    let failed = {
        let mut job = job("synchronize", "failed");
        job["problem"] =
            json!({"code": "SP-2004", "message": "It changed.", "object": "a.img", "hint": "Stop it."});
        job
    };
    let warned = {
        let mut job = job("synchronize", "succeeded");
        job["warnings"] = json!([{"code": "SP-5006", "message": "Crash only."}]);
        job
    };
    let mut all = String::new();
    for (job_end, status) in [
        (job("synchronize", "succeeded"), 0),
        (failed, 1),
        (warned, 3),
        (job("synchronize", "cancelled"), 130),
    ] {
        for flag in ["--json", ""] {
            let started = json!({"job": job("synchronize", "running")});
            let ran = ran(
                &format!("--standalone d {flag} synchronize web"),
                &[(start, 202, started), (&events, 200, end(job_end.clone()))],
            );
            assert_eq!(ran.status, status, "{}{}", ran.out, ran.err);
            if flag == "--json" {
                let last: Value = serde_json::from_str(ran.out.lines().last().unwrap()).unwrap();
                let kind = if matches!(status, 0 | 3) { "job" } else { "error" };
                assert_eq!(last["type"], kind);
                let first = ran.out.lines().next().unwrap();
                assert!(
                    first.starts_with(&format!(r#"{{"type":"job","id":"{JOB}","kind":"synchronize""#)),
                    "{first}"
                );
            }
            all.push_str(&format!("--- {status} {flag}\n{}--- stderr\n{}", ran.out, ran.err));
        }
    }
    expect("synchronize.txt", &all);
}

#[test]
fn machines_of_a_host_are_shown_with_what_keeps_them_from_being_protected() {
    let disk = |name: &str, unprotected: Option<&str>| {
        json!({"name": name, "storage": format!("/srv/{name}.qcow2"), "format": "qcow2", "bus": "virtio",
            "bytes": 10_737_418_240_u64, "chain": 1, "unprotected": unprotected})
    };
    let machines = json!({"items": [
        {"id": JOB, "name": "db1", "host": "kvm1", "provider": "libvirt", "power": "running", "guest_agent": true,
            "is_datasource": true, "disks": [disk("vda", None), disk("vdb", Some("it is shared"))]},
        {"id": JOB, "name": "web\u{1b}[2J", "provider": "libvirt", "power": "off", "is_datasource": false,
            "disks": []},
    ]});
    let mut all = String::new();
    for flags in ["--json", ""] {
        let ran = ran(
            &format!("--standalone d {flags} host machines kvm1"),
            &[("GET /machines?host=kvm1&limit=10000", 200, machines.clone())],
        );
        assert_eq!(ran.status, 0, "{}", ran.err);
        all.push_str(&format!("--- {flags}\n{}", ran.out));
    }
    expect("host-machines.txt", &all);
}

#[test]
fn lists_are_item_lines_and_tables() {
    let points = json!({"items": [point("verified"), point("damaged")]});
    let mut all = String::new();
    for flags in ["--json", "", "--utc"] {
        let ran = ran(
            &format!("--standalone d {flags} rp list web"),
            &[("GET /recovery-points?datasource=web&limit=10000", 200, points.clone())],
        );
        assert_eq!(ran.status, 0, "{}", ran.err);
        if flags == "--json" {
            let types: Vec<Value> = ran
                .out
                .lines()
                .map(|line| serde_json::from_str::<Value>(line).unwrap()["type"].clone())
                .collect();
            assert_eq!(types, ["recovery-point", "recovery-point"]);
        }
        all.push_str(&format!("--- {flags}\n{}", ran.out));
    }
    expect("recovery-point-list.txt", &all);
}

#[test]
fn wrong_usage_ends_with_2_and_a_hint() {
    let mut all = String::new();
    for line in [
        "",
        "backup web",
        "forget web",
        "gc",
        "restore web",
        "--json backup",
        "protect",
        "protect web",
        "--standalone d --server https://x protect web",
        "--server https://x status",
        "--standalone d datasource remove web",
        "--standalone d prune --keep-last 0",
        "--standalone d recover disk web --point latest --disk 0 --to f --limit 50",
        "--standalone d recover disk web --point @soon --disk 0 --to f",
        "--standalone d synchronize web --changed-extents zero",
        "--standalone d protect web --detach",
        "--server https://x --fingerprint f datasource add-image web a.img",
    ] {
        let ran = ran(line, &[]);
        assert_eq!(ran.status, 2, "{line}: {}{}", ran.out, ran.err);
        all.push_str(&format!("$ stillpoint {line}\n{}{}\n", ran.out, ran.err));
    }
    expect("usage.txt", &all);
}

#[test]
fn only_three_commands_may_create_a_data_folder() {
    for line in ["status", "protect web", "datasource list", "recovery-kit test", "pool reclaim"] {
        let ran = ran(&format!("--standalone missing {line}"), &[]);
        assert_eq!(ran.status, 4, "{line}: {}", ran.err);
        assert!(ran.opened.iter().all(|options| options.create.is_none()));
    }
    let added = json!({"id": POINT, "name": "web", "provider": "images", "state": "unprotected", "disks": [],
        "recovery_points": 0});
    let ran = ran(
        "--standalone missing datasource add-image web a.img --floor-points 0 --reclaim-hold 0s",
        &[("POST /datasources/images", 201, added)],
    );
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert!(ran.err.contains(&PoolId([2; 16]).to_string()), "says so with the pool's id: {}", ran.err);
    let create = ran.opened[0].create.clone().unwrap();
    assert_eq!(
        (create.floor_points, create.reclaim_hold_seconds, create.soft_delete_seconds),
        (Some(0), Some(0), None)
    );
}

#[test]
fn readers_take_no_lock() {
    for (line, writes) in [
        ("status", false),
        ("pool verify --read-data", false),
        ("pool verify --due --every 7d", false),
        ("rp list", false),
        ("pool copy --to c", false),
        // It makes a recipient, so it writes.
        ("pool export-keys --to k", true),
        ("recovery-kit list", false),
        ("recovery-kit revoke ab --yes", true),
        ("recover disk web --point latest --disk 0 --to f", false),
        ("protect web", true),
        ("protect web --dry-run", false),
        ("pool reclaim", true),
    ] {
        let ran = ran(&format!("--standalone d --wait {line}"), &[]);
        assert_eq!((ran.opened[0].writes, ran.opened[0].wait), (writes, true), "{line}");
    }
}

#[test]
fn a_cap_on_processor_time_is_a_percentage_that_lets_something_through() {
    let capped = ran("--standalone d --cpu-limit 150 protect web", &[]);
    assert_eq!(capped.opened[0].cpu_limit, Some(150));
    assert_eq!(ran("--standalone d protect web", &[]).opened[0].cpu_limit, None);
    for wrong in ["0", "-1", "half", "100001"] {
        let refused = ran(&format!("--standalone d --cpu-limit={wrong} protect web"), &[]);
        assert_eq!((refused.status, refused.opened.len()), (2, 0), "{wrong}: {}", refused.err);
    }
}

#[test]
fn what_destroys_needs_yes() {
    for line in ["ds remove web --delete-data", "rp delete abcd", "prune web --keep-last 1", "host revoke h"]
    {
        let ran = ran(&format!("--standalone d {line}"), &[]);
        assert_eq!(ran.status, 5, "{line}: {}", ran.err);
        assert!(ran.asked.is_empty(), "{line} asked {:?}", ran.asked);
    }
    let started = json!({"job": job("prune", "succeeded")});
    let ran = ran("--standalone d prune web --keep-last 1 --yes", &[("POST /prune", 202, started)]);
    assert_eq!(ran.asked, [r#"POST /prune {"datasource":"web","keep_last":1}"#]);
    assert_eq!(ran.status, 0);
}

#[test]
fn recovery_resolves_first_and_says_what_it_takes() {
    let done = json!({"job": job("recover-disk", "succeeded")});
    let resolved =
        "GET /recovery-points/@2026-11-22T08%3A00%3A00Z?datasource=web&count=false&min_consistency=crash";
    let ran = ran(
        "--standalone d recover disk web --point @2026-11-22T10:00 --disk 0 --to /t.vhdx --min-consistency crash",
        &[(resolved, 200, point("verified")), ("POST /datasources/web/recover-disk", 202, done)],
    );
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert!(ran.err.contains("@2026-11-22T10:00 is 2026-11-22 10:00:00 +02:00"), "{}", ran.err);
    assert!(
        ran.err.contains(POINT)
            && ran.err.contains("11:00:00 +02:00")
            && ran.err.contains("consistency crash")
    );
    assert!(ran.asked[1].contains(&format!(r#""point":"{POINT}""#)) && ran.asked[1].contains("/t.vhdx"));
}

#[test]
fn break_glass_needs_no_server_and_ends_with_6_when_bytes_are_lost() {
    let ran = ran("--json recover disk --pool p --kit k --point latest --disk 0 --to f --accept-damage", &[]);
    assert_eq!(ran.status, 6, "{}{}", ran.out, ran.err);
    assert_eq!((ran.glass.len(), ran.opened.len()), (1, 0));
}

#[test]
fn a_folder_is_hashed_without_a_server_and_depths_exclude_each_other() {
    let hashed = ran("--json pool verify --hashes --pool p --limit 5MB/s", &[]);
    assert_eq!((hashed.status, hashed.folders.len(), hashed.opened.len()), (0, 1, 0), "{}", hashed.err);
    assert_eq!(hashed.folders[0].limit.unwrap().bytes_per_second, 5_000_000);
    for line in
        ["--hashes --read-data", "--due --read-data", "--pool p", "--read-data --pool p", "--every 7d"]
    {
        assert_eq!(ran(&format!("pool verify {line}"), &[]).status, 2, "{line}");
    }
}

#[test]
fn status_check_speaks_to_monitoring() {
    for (health, status) in [("ok", 0), ("warning", 1), ("critical", 2), ("unknown", 3)] {
        let body = json!({"health": health, "pool": POINT, "breached": [], "datasources": [], "running": [],
            "failed": [], "silent_hosts": [], "open_alerts": 0, "bytes_free": 5});
        assert_eq!(ran("--standalone d status --check", &[("GET /status", 200, body)]).status, status);
    }
    assert_eq!(ran("--standalone missing status --check", &[]).status, 3);
}

#[test]
fn every_problem_of_the_api_keeps_its_code_and_status() {
    for &code in Code::ALL {
        let body = json!({"code": code, "message": "M.", "object": "o", "hint": "h"});
        let ran = ran("--json --standalone d pool status", &[("GET /pool", 500, body)]);
        assert_eq!(ran.status, code.exit_status() as u8);
        assert_eq!(
            ran.out,
            format!(
                "{{\"type\":\"error\",\"code\":\"{code}\",\"message\":\"M.\",\"object\":\"o\",\"hint\":\"h\"}}\n"
            )
        );
    }
    let ran = ran("--json --standalone d pool status", &[("GET /pool", 502, Value::String("<html>".into()))]);
    assert!(ran.out.contains("SP-4007"), "{}", ran.out);
}

#[test]
fn explain_tells_cause_and_remedy() {
    let all = format!("{}{}", ran("explain SP-1002", &[]).out, ran("--json explain 1002", &[]).out);
    expect("explain.txt", &all);
    assert_eq!(ran("explain SP-9999", &[]).status, 4);
}

#[test]
fn guests_cannot_steer_the_terminal() {
    assert_eq!(output::printable("a\u{1b}[2Jb\u{202e}c\r"), "a\u{fffd}[2Jb\u{fffd}c\u{fffd}");
}

#[test]
fn sizes_and_durations_read_well() {
    for (count, text) in [
        (0, "0 B"),
        (1_023, "1023 B"),
        (1_024, "1.0 KiB"),
        (1 << 30, "1.0 GiB"),
        ((1 << 30) - 1, "1.0 GiB"),
        (u64::MAX, "16384.0 PiB"),
    ] {
        assert_eq!(output::bytes(count), text);
    }
    for (count, text) in [(59, "59 s"), (61, "1 min 1 s"), (3_700, "1 h 1 min"), (90_000, "1 d 1 h")] {
        assert_eq!(output::seconds(count), text);
    }
}

#[test]
fn the_page_of_error_codes_is_fresh() {
    let path = &(std::env::var("CARGO_MANIFEST_DIR").unwrap() + "/../../docs/error-codes.md");
    let made = error_codes_page();
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(path, &made).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        found == made,
        "docs/error-codes.md is old: run the test with UPDATE_EXPECT=1 and look at the difference"
    );
}
