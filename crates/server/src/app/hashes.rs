//! A look at a pool's folder of which nobody has the keys, as the job it would have been.

use std::sync::Arc;

use block_io::Pace;
use environment::{Clock, Files, Randomness};
use model::{Code, JobId, Problem, Timestamp};
use protocol::api::{Figures, Job, JobKind, JobState, RateLimit, Time};
use storage_pool::keyless;
use storage_pool::verify::{Depth, VerifyOptions, VerifyProgress};

use super::work::{TokenBucket, verify_threads};

/// Hashes the files of a pool: no key, no lock, no write.
pub fn verify_folder(
    files: &Arc<dyn Files>,
    limit: Option<RateLimit>,
    clock: Arc<dyn Clock>,
    randomness: &dyn Randomness,
    progress: &mut dyn VerifyProgress,
) -> Result<Job, Problem> {
    let mut id = [0u8; 16];
    randomness
        .fill(&mut id)
        .map_err(|error| Problem::new(Code::Internal, format!("No random bytes for a job id: {error}.")))?;
    let (began, from) = (Time(Timestamp(clock.now_micros())), clock.monotonic_micros());
    let bucket = limit.map(|limit| -> Arc<dyn Pace> { Arc::new(TokenBucket::new(limit, clock.clone())) });
    let options =
        VerifyOptions { threads: verify_threads(), pace: bucket, ..VerifyOptions::new(Depth::Hashes) };
    let report = keyless::verify_hashes(files, &options, progress).map_err(|error| {
        let problem = jobs::problem::pool(error);
        match problem.code {
            Code::DataFolderMissing => problem.hint("Give the folder that holds pool.stillpoint."),
            _ => problem,
        }
    })?;
    let mut figures = Figures {
        bytes_read: Some(report.bytes_read),
        seconds: Some(clock.monotonic_micros().saturating_sub(from) as f64 / 1e6),
        ..Figures::default()
    };
    super::mapping::list_damage(&mut figures, &report.damage);
    let sectors = report.repairable.iter().map(|repairable| repairable.sectors).sum::<u64>();
    figures.sectors_repaired = (sectors > 0).then_some(sectors);
    let mut warnings = match report.damage.len() {
        0 => Vec::new(),
        found => vec![super::mapping::damage_warning(format!(
            "{found} damages found in {} packs and {} records; without the keys nobody can tell which points they cost.",
            report.packs, report.records
        ))],
    };
    if sectors > 0 {
        warnings.push(super::mapping::damage_warning(format!(
            "Parity gives {sectors} sectors of {} packs back; a verify with the keys stores them again, a copy of the folder has \
             them whole.",
            report.repairable.len()
        )));
    }
    Ok(Job {
        id: JobId(id),
        kind: JobKind::Verify,
        state: if report.is_cancelled { JobState::Cancelled } else { JobState::Succeeded },
        datasource: None,
        datasource_name: None,
        created_at: began,
        started_at: Some(began),
        ended_at: Some(Time(Timestamp(clock.now_micros()))),
        warnings,
        problem: None,
        figures,
    })
}
