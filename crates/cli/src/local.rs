//! A disk of a remote server's point into a file of this machine.

use http::Method;
use http_body_util::BodyExt;
use model::{Code, ExitStatus, JobId, Problem};
use protocol::api::{
    AllocatedPage, DiskFormat, Figures, Job, JobKind, JobState, Progress, RateLimit, RecoveryPoint, Time,
};

use crate::client::{coded, cut};
use crate::jobs::show_end;
use crate::program::{LocalTargetOptions, Say};
use crate::room::Room;
use crate::words::RecoverDiskArgs;

/// The longest range asked for at once: what a broken connection costs again.
const ASK_BYTES: u64 = 64 << 20;

/// Recovers; ends like a job, with a job's figures. The id is zero: the server knows of no job.
pub async fn recover(
    room: &Room<'_>,
    args: &RecoverDiskArgs,
    point: &RecoveryPoint,
    limit: Option<RateLimit>,
) -> Result<ExitStatus, Problem> {
    let output = room.output;
    if args.job.detach || args.accept_damage {
        return Err(Problem::new(
            Code::Unsupported,
            "--detach and --accept-damage do not reach a file on this machine.",
        )
        .hint("Recover to HOST:FILE on an enrolled host."));
    }
    if !point.state.counts_as_latest() {
        return Err(Problem::new(
            Code::PointNotUsable,
            format!("Recovery point {} is {}.", point.id, point.state.word()),
        )
        .about(point.id.to_string()));
    }
    let disk = point.disks.iter().find(|disk| disk.disk == args.disk).ok_or_else(|| {
        Problem::new(Code::NotFound, format!("Recovery point {} has no disk {}.", point.id, args.disk))
            .about(point.id.to_string())
    })?;
    let path = room.program.absolute(std::path::Path::new(&args.to))?;
    let by_name = path.extension().and_then(|end| end.to_str()).and_then(|end| end.parse().ok());
    let format = args.format.or(by_name).unwrap_or(DiskFormat::Raw);
    if args.job.dry_run {
        output.object(
            "plan",
            &serde_json::json!({"kind": "recover-disk", "object": point.id, "bytes_needed": disk.bytes}),
        );
        output.text(&format!("Would write disk {} of point {} to {}", disk.disk, point.id, path.display()));
        return Ok(ExitStatus::Done);
    }
    let began = output.now();
    let mut target = room.program.local_target(&LocalTargetOptions {
        path: path.clone(),
        format,
        bytes: disk.bytes,
        sector_bytes: disk.sector_bytes,
        content: format!("{} {}", point.id, disk.disk),
        overwrite: args.overwrite,
    })?;
    let base = format!("/recovery-points/{}/disks/{}", coded(&point.id.to_string()), disk.disk);
    let mut written = 0u64;
    let mut from = Some(target.resume_at());
    while let Some(at) = from {
        let page: AllocatedPage = room.client.get(&format!("{base}/allocated?from={at}")).await?;
        for (offset, length) in page.extents {
            let end = offset.checked_add(length).filter(|end| *end <= disk.bytes).ok_or_else(|| {
                Problem::new(Code::ProtocolBroken, "The server's list of ranges leaves the disk.")
            })?;
            let mut at = offset;
            while at < end {
                let until = end.min(at.saturating_add(ASK_BYTES));
                let answer = room.client.send(Method::GET, &base, None, Some((at, until))).await?;
                let mut body = answer.into_body();
                while let Some(frame) = body.frame().await {
                    let Ok(data) = frame.map_err(cut)?.into_data() else { continue };
                    if at.saturating_add(data.len() as u64) > until {
                        return Err(Problem::new(
                            Code::ProtocolBroken,
                            "The server sent more than was asked for.",
                        ));
                    }
                    target.write_at(at, &data)?;
                    at += data.len() as u64;
                    written += data.len() as u64;
                    pace(room, limit, began, written).await;
                    let micros = output.now().since(began).max(1);
                    let rate = written.saturating_mul(1_000_000) / micros;
                    output.progress(&Progress {
                        phase: "recovering".to_owned(),
                        bytes_done: at,
                        bytes_total: Some(disk.bytes),
                        bytes_transferred: written,
                        bytes_per_second: rate,
                        seconds_left: Some(disk.bytes.saturating_sub(at) / rate.max(1)),
                        ..Progress::default()
                    });
                }
                if at != until {
                    return Err(Problem::new(
                        Code::NoContact,
                        format!("The disk's bytes broke off at {at}."),
                    )
                    .hint("The same command continues."));
                }
            }
        }
        from = page.next;
    }
    target.finish(!args.no_sync)?;
    output.end_progress();
    let ended = output.now();
    let job = Job {
        id: JobId([0; 16]),
        kind: JobKind::RecoverDisk,
        state: JobState::Succeeded,
        datasource: Some(point.datasource),
        datasource_name: Some(point.datasource_name.clone()),
        created_at: Time(began),
        started_at: Some(Time(began)),
        ended_at: Some(Time(ended)),
        warnings: Vec::new(),
        problem: None,
        figures: Figures {
            seconds: Some(ended.since(began) as f64 / 1e6),
            bytes_logical: Some(disk.bytes),
            bytes_transferred: Some(written),
            bytes_written: Some(written),
            recovery_point: Some(point.id),
            time: Some(point.time),
            consistency: Some(point.consistency),
            target: Some(path.display().to_string()),
            ..Figures::default()
        },
    };
    Ok(show_end(output, &job))
}

/// Sleeps until `written` bytes since `began` keep to the limit.
async fn pace(room: &Room<'_>, limit: Option<RateLimit>, began: model::Timestamp, written: u64) {
    let now = room.output.now();
    let Some(rate) = limit.and_then(|limit| limit.at(now)) else { return };
    let due = u128::from(written) * 1_000_000 / u128::from(rate.max(1));
    let wait = due.saturating_sub(u128::from(now.since(began)));
    tokio::time::sleep(std::time::Duration::from_micros(wait.min(5_000_000) as u64)).await;
}
