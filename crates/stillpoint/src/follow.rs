//! A job of this process, from its start to its end.

use std::sync::atomic::Ordering;
use std::time::Duration;

use cli::program::Say;
use model::Problem;
use protocol::api::{Job, JobEvent};
use server::api::{Caller, Service};

/// Follows a job of this process to its end; Ctrl-C cancels it.
pub fn follow(service: &dyn Service, job: Job, say: &dyn Say) -> Result<Job, Problem> {
    let by = Caller { name: "this process".to_owned() };
    let mut after = 0;
    let mut asked = false;
    loop {
        if say.cancelled().load(Ordering::SeqCst) && !asked {
            service.cancel_job(&by, job.id)?;
            asked = true;
        }
        let events = service.job_events(job.id, after, Duration::from_millis(200))?;
        after = events.next;
        for event in events.events {
            match event {
                JobEvent::Progress(progress) => say.progress(&progress),
                JobEvent::Log(line) => say.line(&line.message),
                JobEvent::Job(ended) => return Ok(*ended),
                JobEvent::Error(problem) => return Err(problem.into()),
            }
        }
    }
}
