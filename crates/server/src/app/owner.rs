//! Which host a machine runs on now (S105): live migration takes it away without a word to us.

use std::sync::Arc;
use std::time::Duration;

use jobs::decide::Wish;
use jobs::synchronize::{self, Outcome};
use jobs::{JobContext, LogLevel, ProtectedHost};
use model::{Code, HostId, HostMachine, Power, Problem, Timestamp};
use protocol::api::HostState;

use super::runner::RunningJob;
use super::{App, StoredDatasource};

/// How long a job waits for the end of a live migration.
const MIGRATION: Duration = Duration::from_secs(3600);
/// How often it looks.
const LOOK: Duration = Duration::from_secs(10);

/// Where a machine is.
struct Owner {
    host: Arc<dyn ProtectedHost>,
    datasource: StoredDatasource,
    /// That it moved, for the cause.
    news: Option<String>,
}

impl App {
    /// Runs a wish on the host that has the machine now, after the end of a live migration.
    pub(super) fn synchronized(
        &self,
        datasource: &StoredDatasource,
        wish: &Wish,
        job: &RunningJob,
    ) -> Result<Outcome, Problem> {
        let now = || Timestamp(self.parts.clock.now_micros());
        let began = self.parts.clock.monotonic_micros();
        let mut news = None;
        let mut datasource = datasource.clone();
        loop {
            let owner = self.owner(&datasource)?;
            if let Some(moved) = &owner.news {
                job.log(LogLevel::Info, format!("{} {moved}.", datasource.name));
                news = Some(moved.clone());
            }
            datasource = owner.datasource;
            let machine = jobs::Machine { news: news.clone(), ..datasource.machine() };
            match synchronize::run(self.pool(), &*owner.host, &machine, wish, &now, job) {
                Err(problem) if problem.code == Code::Migrating => {
                    let waited = self.parts.clock.monotonic_micros().saturating_sub(began);
                    if waited >= MIGRATION.as_micros() as u64 {
                        return Err(problem);
                    }
                    job.log(LogLevel::Info, format!("{} Waiting for its end.", problem.message));
                    job.phase("waiting for a live migration", None);
                    job.wait(LOOK)?;
                }
                other => return other,
            }
        }
    }

    /// The host that has a machine now.
    pub(super) fn host_now(&self, datasource: &StoredDatasource) -> Result<Option<HostId>, Problem> {
        Ok(self.owner(datasource)?.datasource.host)
    }

    /// The host of a machine: the one that runs it, or the one where it was last if nobody does.
    fn owner(&self, datasource: &StoredDatasource) -> Result<Owner, Problem> {
        let hosts = &self.parts.hosts;
        let home = || {
            let host = hosts.host(datasource.host)?;
            Ok(Owner { host, datasource: datasource.clone(), news: None })
        };
        // Image files do not move by themselves, and standalone there is nowhere to go.
        let Some(host) = datasource.host.filter(|_| datasource.provider != "images") else { return home() };
        let all = hosts.list()?;
        let is_connected =
            |id: HostId| all.iter().any(|host| host.id == id && host.state == HostState::Connected);
        let at = |id: HostId| -> Result<Option<HostMachine>, Problem> {
            let machines = hosts.host(Some(id))?.machines()?;
            Ok(machines.into_iter().find(|machine| machine.id == datasource.id))
        };
        // One that is silent is waited for a little: a server that was just started is found within seconds.
        let here = at(host);
        if let Ok(Some(machine)) = &here
            && machine.power != Power::Off
        {
            return home();
        }
        let mut elsewhere = None;
        let mut silent = Vec::new();
        for other in all.iter().filter(|other| other.id != host && other.state != HostState::Revoked) {
            if !is_connected(other.id) {
                silent.push(other.name.clone());
                continue;
            }
            let machine = match at(other.id) {
                Ok(Some(machine)) => machine,
                Ok(None) => continue,
                // A host without a hypervisor says that it has none.
                Err(problem) if problem.code == Code::Unsupported => continue,
                Err(_) => {
                    silent.push(other.name.clone());
                    continue;
                }
            };
            match machine.power {
                Power::Off => elsewhere = elsewhere.or(Some((other, false))),
                Power::Running | Power::Paused => {
                    elsewhere = Some((other, true));
                    break;
                }
            }
        }
        // Off on another host proves that it moved only where it is not at home any more, and nobody else could run it.
        let elsewhere =
            elsewhere.filter(|(_, runs)| *runs || (matches!(here, Ok(None)) && silent.is_empty()));
        match (here, elsewhere) {
            (Ok(Some(_)), None) => home(),
            (_, Some((other, _))) => {
                // What was changed meanwhile stays.
                let moved = StoredDatasource {
                    host: Some(other.id),
                    host_name: other.name.clone(),
                    ..self.find_datasource(&datasource.id.to_string())?
                };
                self.store_datasource(&moved)?;
                Ok(Owner {
                    host: hosts.host(Some(other.id))?,
                    datasource: moved,
                    news: Some(format!("moved from host {} to host {}", datasource.host_name, other.name)),
                })
            }
            (Err(problem), None) => Err(problem),
            (Ok(None), None) if !silent.is_empty() => Err(Problem::new(
                Code::AgentUnreachable,
                format!(
                    "{} is not on host {} any more, and it may be on a host whose protection agent is unreachable: {}.",
                    datasource.name,
                    datasource.host_name,
                    silent.join(", ")
                ),
            )
            .about(datasource.name.clone())),
            // It says what is not there, better than we could.
            (Ok(None), None) => home(),
        }
    }
}
