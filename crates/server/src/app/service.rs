//! The API's questions, answered.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use block_io::BlockDevice;
use model::{Code, Consistency, JobId, PointState, Problem, Timestamp};
use protocol::api::{
    AddImage, AddMachine, Alert, Datasource, Health, Host, HostState, Job, JobLogLine, JobRequest, JobState,
    KeyGeneration, KitFile, KitReport, ListedMachine, MakeToken, Page, PageQuery, Plan, PointDiff,
    PoolStatus, Recipient, RecipientKind, RecoveryPoint, Started, Status, TokenMade,
};

use super::folder::{open_kit, write_kit};
use super::{App, default_kit_path};
use crate::api::names::{self, Named};
use crate::api::{Caller, Credentials, JobEvents, JobFilter, Right, Service};

/// [`App`] as the API sees it.
pub struct AppService(pub Arc<App>);

/// A page of a list; `after` is the place of the next item.
fn page<T>(items: Vec<T>, query: &PageQuery) -> Result<Page<T>, Problem> {
    let (places, total) = (places(query)?, items.len());
    let items = items.into_iter().skip(places.start).take(places.len()).collect();
    Ok(page_of(items, places.start, total))
}

/// The places of a list's items that are asked for.
fn places(query: &PageQuery) -> Result<Range<usize>, Problem> {
    let from: usize = match &query.after {
        None => 0,
        Some(text) => text
            .parse()
            .map_err(|_| Problem::new(Code::Usage, format!("{text:?} is not the `next` of a page.")))?,
    };
    Ok(from..from.saturating_add(query.items() as usize))
}

/// The page of `items`, which begin at place `from` of a list of `total`.
fn page_of<T>(items: Vec<T>, from: usize, total: usize) -> Page<T> {
    let end = from.saturating_add(items.len());
    Page { next: (end < total && !items.is_empty()).then(|| end.to_string()), items }
}

impl AppService {
    fn app(&self) -> &App {
        &self.0
    }

    fn find_job(&self, text: &str) -> Result<Job, Problem> {
        // Whoever follows a job asks by its whole id, often: that is no reason to read the whole history.
        if let Some(job) = text.parse().ok().and_then(|id| self.app().runner.job(id)) {
            return Ok(job);
        }
        let mut jobs = self.app().runner.jobs();
        let ids: Vec<String> = jobs.iter().map(|job| job.id.to_string()).collect();
        let named: Vec<Named<'_>> = ids.iter().map(|id| Named { id, name: "", host: None }).collect();
        let at = names::resolve("job", text, &named)?;
        Ok(jobs.swap_remove(at))
    }

    fn now(&self) -> Timestamp {
        Timestamp(self.app().parts.clock.now_micros())
    }

    fn on_this_machine(&self) -> Result<(), Problem> {
        if self.app().parts.hosts.is_standalone() {
            return Ok(());
        }
        Err(Problem::new(
            Code::Unauthorised,
            "A server on the network does not touch its own files for a caller.",
        )
        .hint("Run the command on the server with --standalone, or `stillpoint recovery-kit` there."))
    }
}

impl Service for AppService {
    fn authorise(&self, credentials: &Credentials, _right: Right) -> Result<Caller, Problem> {
        let name = match credentials {
            Credentials::InProcess => Some("standalone".to_owned()),
            Credentials::Bearer(token) => self.app().parts.tokens.check(token),
            Credentials::Missing => None,
        };
        name.map(|name| Caller { name }).ok_or_else(|| Problem::new(Code::Unauthorised, "No valid token."))
    }

    fn status(&self) -> Result<Status, Problem> {
        let app = self.app();
        let now = self.now();
        let day_ago = Timestamp(now.0.saturating_sub(Timestamp::DAY));
        let datasources: Vec<Datasource> = app
            .stored_datasources()
            .iter()
            .filter(|datasource| !datasource.removed)
            .map(|datasource| app.api_datasource(datasource))
            .collect();
        let jobs = app.runner.jobs();
        let failed: Vec<Job> = jobs
            .iter()
            .filter(|job| job.state == JobState::Failed && job.created_at.0 >= day_ago)
            .cloned()
            .collect();
        let silent_hosts: Vec<String> = app
            .parts
            .hosts
            .list()?
            .into_iter()
            .filter(|host| host.state == HostState::Silent)
            .map(|host| host.name)
            .collect();
        let breached: Vec<String> = datasources
            .iter()
            .filter(|datasource| {
                datasource.state == protocol::api::DatasourceState::Protected && datasource.latest.is_none()
            })
            .map(|datasource| format!("{} has no good recovery point.", datasource.name))
            .collect();
        let open_alerts = app.parts.history.alerts().iter().filter(|alert| alert.stands()).count();
        let damaged = app.pool().has_known_damage() || !app.pool().state().unreadable.is_empty();
        let health = if damaged || !breached.is_empty() {
            Health::Critical
        } else if !failed.is_empty() || !silent_hosts.is_empty() || open_alerts > 0 {
            Health::Warning
        } else {
            Health::Ok
        };
        Ok(Status {
            health,
            pool: app.pool().id(),
            breached,
            datasources,
            running: app.runner.running(),
            failed,
            silent_hosts,
            open_alerts: open_alerts as u64,
            days_until_full: None,
            bytes_free: app.pool().space().map_err(jobs::problem::pool)?.free,
        })
    }

    fn datasources(&self, query: &PageQuery) -> Result<Page<Datasource>, Problem> {
        let app = self.app();
        let all = app
            .stored_datasources()
            .iter()
            .filter(|datasource| !datasource.removed)
            .map(|datasource| app.api_datasource(datasource))
            .collect();
        page(all, query)
    }

    fn datasource(&self, name: &str) -> Result<Datasource, Problem> {
        let app = self.app();
        Ok(app.api_datasource(&app.find_datasource(name)?))
    }

    fn machines(&self, host: Option<&str>, query: &PageQuery) -> Result<Page<ListedMachine>, Problem> {
        page(self.app().listed_machines(host)?, query)
    }

    fn add_machine(&self, _by: &Caller, request: &AddMachine) -> Result<Datasource, Problem> {
        self.app().add_machine(request)
    }

    fn add_image(&self, _by: &Caller, request: &AddImage) -> Result<Datasource, Problem> {
        self.app().add(request)
    }

    fn start(&self, _by: &Caller, request: &JobRequest) -> Result<Started, Problem> {
        self.0.start_job(request)
    }

    fn plan(&self, request: &JobRequest) -> Result<Plan, Problem> {
        self.app().plan_job(request)
    }

    fn jobs(&self, filter: &JobFilter, query: &PageQuery) -> Result<Page<Job>, Problem> {
        let wanted = |job: &Job| {
            (!filter.failed || job.state == JobState::Failed)
                && filter.since.is_none_or(|since| job.created_at.0 >= since)
        };
        page(self.app().runner.jobs().into_iter().filter(wanted).collect(), query)
    }

    fn job(&self, id: &str) -> Result<Job, Problem> {
        self.find_job(id)
    }

    fn job_log(&self, id: JobId, query: &PageQuery) -> Result<Page<JobLogLine>, Problem> {
        let log =
            self.app().runner.log(id).ok_or_else(|| Problem::new(Code::NotFound, format!("No job {id}.")))?;
        page(log, query)
    }

    fn job_events(&self, id: JobId, after: u64, wait: Duration) -> Result<JobEvents, Problem> {
        self.app()
            .runner
            .events(id, after, wait)
            .ok_or_else(|| Problem::new(Code::NotFound, format!("No job {id}.")).about(id.to_string()))
    }

    fn cancel_job(&self, _by: &Caller, id: JobId) -> Result<Job, Problem> {
        self.app().runner.cancel(id);
        self.find_job(&id.to_string())
    }

    fn recovery_points(
        &self,
        datasource: Option<&str>,
        query: &PageQuery,
    ) -> Result<Page<RecoveryPoint>, Problem> {
        let app = self.app();
        let datasource = datasource.map(|text| app.find_datasource(text)).transpose()?;
        let places = places(query)?;
        let (some, total) =
            app.listed_points(datasource.as_ref().map(|datasource| datasource.id), places.clone());
        let unique = if app.is_counted() { app.unique_bytes() } else { super::points::UniqueBytes::new() };
        let floor = app.pool().floor(datasource.map(|datasource| datasource.id));
        let items = some
            .iter()
            .map(|(point, state)| app.api_point_over(&floor, point, *state, unique.get(&point.id).copied()))
            .collect();
        Ok(page_of(items, places.start, total))
    }

    fn recovery_point(
        &self,
        point: &str,
        datasource: Option<&str>,
        min_consistency: Option<Consistency>,
        is_counted: bool,
    ) -> Result<RecoveryPoint, Problem> {
        let app = self.app();
        let datasource = datasource.map(|text| app.find_datasource(text)).transpose()?;
        let (point, state) = app.find_point(point, datasource.as_ref(), min_consistency)?;
        let unique = if is_counted { app.unique_bytes().get(&point.id).copied() } else { None };
        Ok(app.api_point(&point, state, unique))
    }

    fn diff(&self, a: &str, b: &str) -> Result<PointDiff, Problem> {
        let app = self.app();
        let (a, _) = app.find_point(a, None, None)?;
        let (b, _) = app.find_point(b, None, None)?;
        app.point_diff(&a, &b)
    }

    fn delete_point(&self, by: &Caller, point: &str) -> Result<RecoveryPoint, Problem> {
        let app = self.app();
        app.writable()?;
        let (point, _) = app.find_point(point, None, None)?;
        app.pool().make_room(&*app.parts.deletion).map_err(jobs::problem::pool)?;
        app.pool().delete_point(point.id, &format!("deleted by {}", by.name)).map_err(jobs::problem::pool)?;
        app.parts.history.sync(app.pool())?;
        let point = app.pool().point(point.id).map_err(jobs::problem::pool)?;
        let state = jobs::recover::state_of(app.pool(), &point, false);
        Ok(app.api_point(&point, state, None))
    }

    fn undelete_point(&self, _by: &Caller, point: &str) -> Result<RecoveryPoint, Problem> {
        let app = self.app();
        app.writable()?;
        let (point, _) = app.find_point(point, None, None)?;
        app.pool().undelete_point(point.id).map_err(jobs::problem::pool)?;
        app.parts.history.sync(app.pool())?;
        let point = app.pool().point(point.id).map_err(jobs::problem::pool)?;
        let state = jobs::recover::state_of(app.pool(), &point, app.damaged_points().contains(&point.id));
        Ok(app.api_point(&point, state, None))
    }

    fn open_disk(&self, _by: &Caller, point: &str, disk: u32) -> Result<Arc<dyn BlockDevice>, Problem> {
        let app = self.app();
        let (point, _) = app.find_point(point, None, None)?;
        Ok(Arc::new(app.pool().open_disk(point.id, disk).map_err(jobs::problem::pool)?))
    }

    fn pool_status(&self) -> Result<PoolStatus, Problem> {
        let app = self.app();
        let pool = app.pool();
        let space = pool.space().map_err(jobs::problem::pool)?;
        let points = app.points_of(None);
        let live: Vec<_> = points.iter().filter(|(_, state)| *state != PointState::SoftDeleted).collect();
        let machines: std::collections::BTreeSet<_> =
            live.iter().map(|(point, _)| point.datasource).collect();
        let settings = pool.settings();
        let stored = space.packs + space.index + space.sequence;
        Ok(PoolStatus {
            pool: pool.id(),
            path: pool.path(),
            bytes_total: space.total,
            bytes_free: space.free,
            bytes_stored: stored,
            bytes_logical: live
                .iter()
                .flat_map(|(point, _)| point.machine_disks())
                .map(|disk| disk.size)
                .sum(),
            bytes_quarantined: space.quarantined,
            datasources: machines.len() as u64,
            recovery_points: live.len() as u64,
            sequence: pool.state().head,
            days_until_full: None,
            floor_points: settings.floor_points,
            floor_seconds: settings.floor_age,
            soft_delete_seconds: settings.soft_delete,
            reclaim_hold_seconds: settings.reclaim_hold,
            parity_percent: settings.parity_percent,
            damaged: pool.has_known_damage() || !pool.state().unreadable.is_empty(),
            proved_since: pool.state().proofs.oldest().map(protocol::api::Time),
        })
    }

    fn hosts(&self, query: &PageQuery) -> Result<Page<Host>, Problem> {
        page(self.app().parts.hosts.list()?, query)
    }

    fn make_token(&self, _by: &Caller, request: &MakeToken) -> Result<TokenMade, Problem> {
        self.app().writable()?;
        self.app().parts.hosts.make_token(request)
    }

    fn revoke_host(&self, _by: &Caller, host: &str) -> Result<Host, Problem> {
        let app = self.app();
        app.writable()?;
        let found = app.find_host(Some(host))?;
        let Some((id, _)) = found else { return Err(Problem::new(Code::NotFound, "No host was named.")) };
        app.parts.hosts.revoke(id)?;
        app.parts
            .hosts
            .list()?
            .into_iter()
            .find(|host| host.id == id)
            .ok_or_else(|| Problem::new(Code::NotFound, format!("No host {id}.")))
    }

    fn alerts(&self, all: bool, query: &PageQuery) -> Result<Page<Alert>, Problem> {
        let mut alerts = self.app().parts.history.alerts();
        alerts.retain(|alert| all || alert.stands());
        alerts.reverse();
        page(alerts, query)
    }

    fn acknowledge_alert(&self, _by: &Caller, id: u64) -> Result<Alert, Problem> {
        self.app()
            .parts
            .history
            .acknowledge(id, self.now())
            .ok_or_else(|| Problem::new(Code::NotFound, format!("No alert {id}.")))
    }

    fn recipients(&self) -> Result<Vec<Recipient>, Problem> {
        let found = self.app().pool().recipients().map_err(jobs::problem::pool)?;
        let shown = |known: &storage_pool::recipients::KnownRecipient| Recipient {
            id: known.id.to_string(),
            kind: match known.kind {
                storage_pool::recipients::RecipientKind::Server => RecipientKind::Server,
                storage_pool::recipients::RecipientKind::Kit => RecipientKind::RecoveryKit,
            },
            revoked: known.is_removed,
            own: known.is_own,
        };
        Ok(found.iter().map(shown).collect())
    }

    fn rotate_keys(&self, _by: &Caller, revoked: Option<&str>) -> Result<KeyGeneration, Problem> {
        let app = self.app();
        app.writable()?;
        let all = app.pool().recipients().map_err(jobs::problem::pool)?;
        let id = match revoked {
            None => None,
            Some(text) => {
                let ids: Vec<String> = all.iter().map(|known| known.id.to_string()).collect();
                let named: Vec<Named<'_>> = ids.iter().map(|id| Named { id, name: "", host: None }).collect();
                let at = names::resolve("recipient", text, &named)?;
                all.get(at).map(|known| known.id)
            }
        };
        let generation = app.pool().rotate_keys(id.as_slice()).map_err(|error| match error {
            storage_pool::PoolError::Busy { .. } => {
                Problem::new(Code::PoolBusy, "Backups or a reclaim are under way; the keys are as they were.")
                    .hint("Run it again when `stillpoint job list` shows none of them running.")
            }
            error => jobs::problem::pool(error),
        })?;
        app.parts.history.sync(app.pool())?;
        let left = app.pool().recipients().map_err(jobs::problem::pool)?;
        Ok(KeyGeneration {
            generation: u32::from(generation),
            revoked: id.map(|id| id.to_string()),
            recipients: left.iter().filter(|known| !known.is_removed).count() as u64,
        })
    }

    fn write_kit(&self, _by: &Caller, request: &KitFile) -> Result<KitReport, Problem> {
        self.on_this_machine()?;
        let app = self.app();
        app.writable()?;
        let path = self.kit_path(request);
        let problem = std::cell::RefCell::new(None);
        let place = app.pool().path();
        let recipient = app
            .pool()
            .add_kit(&mut |recipient| {
                write_kit(&path, recipient, &place, request.overwrite).map_err(|error| {
                    let message = error.message.clone();
                    problem.borrow_mut().replace(error);
                    storage_pool::PoolError::Misuse(message)
                })
            })
            .map_err(|error| problem.into_inner().unwrap_or_else(|| jobs::problem::pool(error)))?;
        let recipient = recipient.to_string();
        Ok(KitReport { path: path.display().to_string(), pool: app.pool().id(), recipient, proved: true })
    }

    fn test_kit(&self, _by: &Caller, request: &KitFile) -> Result<KitReport, Problem> {
        self.on_this_machine()?;
        let app = self.app();
        let path = self.kit_path(request);
        let kit = open_kit(&path)?;
        let about = path.display().to_string();
        if kit.recipient.pool != app.pool().id() {
            return Err(Problem::new(
                Code::KeyWrong,
                format!(
                    "{about} is the kit of pool {}, this one is {}.",
                    kit.recipient.pool,
                    app.pool().id()
                ),
            )
            .about(about));
        }
        app.pool().prove(&kit.recipient).map_err(jobs::problem::pool)?;
        if let Some(damage) = kit.damage {
            return Err(Problem::new(
                Code::KeyWrong,
                format!("{about} still opens the pool, but is damaged: {damage}."),
            )
            .about(about)
            .hint("Write a new one: `stillpoint recovery-kit write --to FILE`."));
        }
        let recipient = kit.recipient.id.to_string();
        Ok(KitReport { path: about, pool: app.pool().id(), recipient, proved: true })
    }
}

impl AppService {
    fn kit_path(&self, request: &KitFile) -> std::path::PathBuf {
        request
            .path
            .as_ref()
            .map_or_else(|| default_kit_path(&self.app().parts.folder.root), std::path::PathBuf::from)
    }
}
