//! Jobs: starting, following, what their end looks like.

use http::Method;
use http_body_util::BodyExt;
use model::{Code, ExitStatus, Problem};
use protocol::api::{Figures, Job, JobEvent, Plan, Started};
use serde::Serialize;

use crate::client::{Client, coded, cut};
use crate::output::{Output, bytes, printable, seconds};
use crate::program::Say;
use crate::words::JobArgs;

/// The longest line of an event; a job's end with all its damage fits well within.
const LINE_BYTES: usize = 64 << 20;

/// Starts a job and waits for it, or prints its plan or id.
pub async fn run<B: Serialize>(
    client: &Client,
    output: &Output,
    standalone: bool,
    path: &str,
    body: Option<&B>,
    args: JobArgs,
) -> Result<ExitStatus, Problem> {
    let method = if body.is_some() { Method::POST } else { Method::DELETE };
    run_as(client, output, standalone, method, path, body, args).await
}

async fn run_as<B: Serialize>(
    client: &Client,
    output: &Output,
    standalone: bool,
    method: Method,
    path: &str,
    body: Option<&B>,
    args: JobArgs,
) -> Result<ExitStatus, Problem> {
    if args.detach && standalone && !args.dry_run {
        return Err(Problem::new(Code::Usage, "Standalone there is nobody to go on with a detached job.")
            .hint("Leave --detach out, or run a server."));
    }
    let path = match (args.dry_run, path.contains('?')) {
        (false, _) => path.to_owned(),
        (true, false) => format!("{path}?dry_run=true"),
        (true, true) => format!("{path}&dry_run=true"),
    };
    if args.dry_run {
        let plan: Plan = if method == Method::DELETE {
            client.delete(&path).await?
        } else {
            client.post(&path, &body).await?
        };
        show_plan(output, &plan);
        return Ok(ExitStatus::Done);
    }
    let started: Started = if method == Method::DELETE {
        client.delete(&path).await?
    } else {
        client.post(&path, &body).await?
    };
    if started.job.state.ended() {
        return Ok(show_end(output, &started.job));
    }
    if args.detach {
        output.object("job", &started.job);
        output.text(&started.job.id.to_string());
        return Ok(ExitStatus::Done);
    }
    follow(client, output, standalone, &started.job.id.to_string()).await
}

/// Follows a job to its end.
pub async fn follow(
    client: &Client,
    output: &Output,
    standalone: bool,
    id: &str,
) -> Result<ExitStatus, Problem> {
    let answer = client.send(Method::GET, &format!("/jobs/{}/events", coded(id)), None, None).await?;
    let mut body = answer.into_body();
    let mut held: Vec<u8> = Vec::new();
    let mut asked = false;
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            signal = tokio::signal::ctrl_c(), if !asked => {
                asked = true;
                signal.map_err(|error| Problem::new(Code::Internal, format!("Ctrl-C cannot be heard: {error}.")))?;
                if !standalone && !output.ask(&format!("Job {id} goes on at the server. Cancel it? [y/N]")) {
                    output.end_progress();
                    output.message(&format!("Follow it again: stillpoint job watch {id}"));
                    return Ok(ExitStatus::Cancelled);
                }
                output.message("Cancelling; nothing of the job will be left.");
                let _: Job = client.post(&format!("/jobs/{}/cancel", coded(id)), &serde_json::json!({})).await?;
                continue;
            }
        };
        let Some(frame) = frame else { break };
        let Ok(data) = frame.map_err(cut)?.into_data() else { continue };
        held.extend_from_slice(&data);
        while let Some(end) = held.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = held.drain(..=end).collect();
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice::<JobEvent>(&line) {
                Ok(JobEvent::Progress(progress)) => output.progress(&progress),
                Ok(JobEvent::Log(entry)) if !output.json => output.message(&printable(&entry.message)),
                Ok(JobEvent::Log(_)) => {}
                Ok(JobEvent::Job(job)) => {
                    output.end_progress();
                    return Ok(show_end(output, &job));
                }
                Ok(JobEvent::Error(problem)) => {
                    output.end_progress();
                    return Err(problem.into());
                }
                // An event of a newer server: not needed for the end.
                Err(_) => {}
            }
        }
        if held.len() > LINE_BYTES {
            return Err(Problem::new(Code::ProtocolBroken, "The server's events have no end of line."));
        }
    }
    output.end_progress();
    let job: Job = client.get(&format!("/jobs/{}", coded(id))).await?;
    if job.state.ended() {
        return Ok(show_end(output, &job));
    }
    Err(Problem::new(Code::NoContact, format!("The job's events broke off. Job {id} goes on at the server."))
        .about(id)
        .hint(format!("Follow it again: `stillpoint job watch {id}`.")))
}

/// The end of a job, for a person or a script, and the status to end with.
pub fn show_end(output: &Output, job: &Job) -> ExitStatus {
    output.object("job", job);
    let name =
        job.datasource_name.as_deref().map(printable).map_or_else(String::new, |name| format!(" of {name}"));
    let time = job.figures.seconds.map_or_else(String::new, |s| format!(" in {s:.1} s"));
    let word = if job.figures.already == Some(true) { "was done before" } else { job.state.word() };
    output.text(&format!("{}{name} {word}{time}", job.kind.word()));
    for line in figure_lines(output, &job.figures) {
        output.text(&format!("  {line}"));
    }
    for warning in &job.warnings {
        output.message(&format!("warning: {}: {}", warning.code, printable(&warning.message)));
    }
    match &job.problem {
        Some(problem) => output.problem(problem),
        None if job.state == protocol::api::JobState::Cancelled => {
            output.problem(&Problem::new(Code::Cancelled, format!("Job {} was cancelled.", job.id)));
        }
        None => {}
    }
    job.exit_status()
}

/// What a job counted, one line a figure.
pub fn figure_lines(output: &Output, figures: &Figures) -> Vec<String> {
    let sizes = [
        ("logical", figures.bytes_logical),
        ("listed as changed", figures.bytes_listed),
        ("read", figures.bytes_read),
        ("audited", figures.bytes_audited),
        ("changed", figures.bytes_changed),
        ("transferred", figures.bytes_transferred),
        ("stored", figures.bytes_stored),
        ("written", figures.bytes_written),
        ("lost", figures.bytes_lost),
        ("freed", figures.bytes_freed),
    ];
    let mut lines: Vec<String> = sizes
        .iter()
        .filter_map(|(name, size)| size.map(|size| format!("{:18} {}", name, bytes(size))))
        .collect();
    if let Some(sectors) = figures.sectors_repaired {
        lines.push(format!("{:18} {sectors} sectors, from parity", "repaired"));
    }
    if let Some(removed) = figures.points_removed {
        lines.push(format!("{:18} {removed}", "points removed"));
    }
    if let Some(kept) = figures.points_kept {
        lines.push(format!("{:18} {kept}", "points kept"));
    }
    if let Some(size) = figures.bytes_returning {
        let when = figures.returns_at.map_or_else(|| "at the next reclaim".to_owned(), |at| output.time(at));
        lines.push(format!("{:18} {} at the earliest {when}", "space returns", bytes(size)));
    }
    if let Some(cause) = &figures.cause {
        lines.push(format!("{:18} {}", "cause", printable(cause)));
    }
    for note in &figures.notes {
        lines.push(format!("{:18} {}", "note", printable(note)));
    }
    if let Some(machine) = &figures.machine {
        let id = figures.machine_id.map(|id| format!(" ({id})")).unwrap_or_default();
        lines.push(format!("{:18} {}{id}", "machine", printable(machine)));
    }
    if let Some(target) = &figures.target {
        lines.push(format!("{:18} {}", "target", printable(target)));
    }
    if let Some(point) = figures.recovery_point {
        lines.push(format!("{:18} {point}", "recovery point"));
    }
    if let Some(time) = figures.time {
        lines.push(format!("{:18} {}", "taken", output.time(time)));
    }
    if let Some(level) = figures.consistency {
        lines.push(format!("{:18} {}", "consistency", level.word()));
    }
    for damage in &figures.damage {
        lines.push(format!("damaged: {}", damage_line(damage)));
    }
    if let Some(more) = figures.damage_unlisted {
        lines.push(format!("damaged: {more} more, see the job's log"));
    }
    lines
}

fn damage_line(damage: &protocol::api::Damage) -> String {
    let mut parts = Vec::new();
    if !damage.datasource.is_empty() {
        parts.push(printable(&damage.datasource));
    }
    if let Some(point) = damage.recovery_point {
        parts.push(format!("point {point}"));
    }
    if let Some(disk) = damage.disk {
        parts.push(format!("disk {disk}"));
    }
    if damage.length > 0 {
        parts.push(format!("bytes {}..+{}", damage.offset, damage.length));
    }
    if !damage.file.is_empty() {
        parts.push(printable(&damage.file));
    }
    format!("{}: {}", parts.join(", "), printable(&damage.reason))
}

/// A plan, for a person or a script.
pub fn show_plan(output: &Output, plan: &Plan) {
    output.object("plan", plan);
    output.text(&format!(
        "Plan of {} {}: nothing is changed now.",
        plan.kind.word(),
        printable(&plan.object)
    ));
    if !plan.cause.is_empty() {
        output.text(&format!("  {}", printable(&plan.cause)));
    }
    for step in &plan.steps {
        output.text(&format!("  - {}", printable(step)));
    }
    let sizes = [
        ("to read", plan.bytes_read),
        ("to move", plan.bytes_moved),
        ("space needed", plan.bytes_needed),
        ("space returned", plan.bytes_freed),
    ];
    for (name, size) in sizes {
        if let Some(size) = size {
            output.text(&format!("  {name:18} {}", bytes(size)));
        }
    }
    if let Some(time) = plan.seconds {
        output.text(&format!("  {:18} {}", "takes about", seconds(time)));
    }
    for (word, points) in [("keep", &plan.kept), ("remove", &plan.removed)] {
        for point in points {
            output.text(&format!(
                "  {word:8} {} {} {}: {}",
                point.id,
                printable(&point.datasource),
                output.time(point.time),
                printable(&point.why)
            ));
        }
    }
}
