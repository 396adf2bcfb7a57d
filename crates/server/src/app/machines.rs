//! `recover vm`: a whole machine of a recovery point.

use std::sync::Arc;

use block_io::Pace;
use jobs::machine::{StoredDisk, WholeMachine};
use jobs::{JobContext, LogLevel};
use model::{Code, HostId, Identity, Network, Place, PointState, Problem};
use protocol::api::{Figures, Job, JobKind, MachineTarget, Plan, RecoverMachine, Time};
use storage_pool::state::Point;

use super::runner::Done;
use super::work::TokenBucket;
use super::{App, StoredDatasource};

/// What a request means here.
struct Resolved {
    datasource: StoredDatasource,
    point: Point,
    state: PointState,
    host: Option<HostId>,
    whole: WholeMachine,
}

impl App {
    fn resolve(&self, datasource: &str, options: &RecoverMachine) -> Result<Resolved, Problem> {
        let datasource = self.find_datasource(datasource)?;
        let (point, state) = self.find_point(&options.point, Some(&datasource), options.min_consistency)?;
        let (host, place) = match &options.target {
            MachineTarget::Original { stop } => {
                if options.name.is_some() || options.identity == Some(Identity::New) {
                    return Err(Problem::new(
                        Code::Usage,
                        "The original keeps its name and its identity; only a machine of its own gets others.",
                    )
                    .hint("Leave out --name and --identity, or recover with --host."));
                }
                // Where it is now, which need not be where it was protected last.
                (self.host_now(&datasource)?, Place::Original { stop: *stop })
            }
            MachineTarget::Host { host, path, format } => {
                let host = self.find_host(host.as_deref())?.map(|host| host.0);
                if host.is_none() && !self.parts.hosts.is_standalone() {
                    return Err(Problem::new(Code::Usage, "To which host?")
                        .hint("Name an enrolled one: --host HOST. `stillpoint host list` shows them."));
                }
                let format = format.map(|format| format.word().to_owned());
                (host, Place::Elsewhere { folder: path.clone(), format })
            }
        };
        let is_original = matches!(place, Place::Original { .. });
        let pace = options
            .limit
            .map(|limit| -> Arc<dyn Pace> { Arc::new(TokenBucket::new(limit, self.parts.clock.clone())) });
        let (identity, network) = match is_original {
            true => (Identity::Keep, options.network.clone().unwrap_or(Network::Keep)),
            false => (
                options.identity.unwrap_or(Identity::New),
                options.network.clone().unwrap_or(Network::Disconnect),
            ),
        };
        let whole = WholeMachine {
            point: point.clone(),
            place,
            name: options.name.clone(),
            identity,
            network,
            start: options.start,
            min_consistency: options.min_consistency,
            pace,
            compress: host.map(|_| 1),
        };
        Ok(Resolved { datasource, point, state, host, whole })
    }

    /// The newest point that is there of a machine: what its host last sent.
    fn newest(&self, datasource: &StoredDatasource) -> Option<Point> {
        let points = self.points_of(Some(datasource.id));
        points.into_iter().rev().map(|(point, _)| point).find(|point| point.deleted.is_none())
    }

    pub(super) fn plan_machine_recovery(
        &self,
        plan: &mut Plan,
        datasource: &str,
        options: &RecoverMachine,
    ) -> Result<(), Problem> {
        let Resolved { datasource, point, state, whole, .. } = self.resolve(datasource, options)?;
        let newest = self.newest(&datasource);
        let mut needed = 0;
        for disk in point.machine_disks() {
            let stored = StoredDisk::of(&point, disk.index);
            let against = match (&whole.place, &newest) {
                (Place::Original { .. }, Some(newest)) => StoredDisk::of(newest, disk.index),
                _ => stored.without_data(),
            };
            let differing = jobs::machine::differing(self.pool(), stored, against);
            needed += differing.map_err(jobs::problem::pool)?.bytes();
        }
        plan.object = datasource.name;
        plan.bytes_needed = Some(needed);
        plan.bytes_moved = Some(needed);
        let taken = format!(
            "Take point {} of {} ({}, {}): {} disks and the definition.",
            point.id,
            point.captured.rfc3339(),
            point.consistency.word(),
            state.word(),
            point.machine_disks().count()
        );
        plan.steps = vec![taken];
        plan.steps.extend(match &whole.place {
            Place::Original { .. } => vec![
                "Stop the machine, if it runs and --stop says how.".to_owned(),
                "Compare its disks with the point, write what differs beside them, and verify it; that is at least what differs \
                 between the point and the newest one."
                    .to_owned(),
                "Swap disks and definition in one step; what they were is kept for 7 days.".to_owned(),
            ],
            Place::Elsewhere { .. } => vec![
                "Write its disks in full, read them back, compare.".to_owned(),
                format!(
                    "Define it, {}, {}.",
                    match whole.identity {
                        Identity::New => "with a new identity",
                        Identity::Keep => "with its own identity",
                    },
                    match &whole.network {
                        Network::Keep => "its network adapters as they were",
                        Network::Disconnect => "its network adapters disconnected",
                        Network::Map(_) => "its network adapters mapped",
                    }
                ),
            ],
        });
        if whole.start {
            plan.steps.push("Start it.".to_owned());
        }
        Ok(())
    }

    pub(super) fn start_machine_recovery(
        self: &Arc<Self>,
        datasource: &str,
        options: &RecoverMachine,
    ) -> Result<Job, Problem> {
        let Resolved { datasource, point, state, host, whole } = self.resolve(datasource, options)?;
        let newest = self.newest(&datasource);
        let app = self.clone();
        let about = Some((datasource.id, datasource.name.clone()));
        // A machine whose disks are replaced is not read meanwhile.
        let is_exclusive = matches!(whole.place, Place::Original { .. });
        self.start_reading(
            JobKind::RecoverMachine,
            about,
            is_exclusive,
            Box::new(move |job| {
                job.log(
                    LogLevel::Info,
                    format!(
                        "Recovering {} from point {} of {} ({}, {}).",
                        point.machine,
                        point.id,
                        point.captured.rfc3339(),
                        point.consistency.word(),
                        state.word()
                    ),
                );
                let host = app.parts.hosts.host(host)?;
                let recovered = jobs::machine::run(app.pool(), &*host, &whole, newest.as_ref(), job)?;
                let figures = Figures {
                    bytes_logical: Some(recovered.figures.bytes_logical),
                    bytes_read: Some(recovered.figures.bytes_read),
                    bytes_transferred: Some(recovered.figures.bytes_transferred),
                    bytes_written: Some(recovered.figures.bytes_transferred),
                    recovery_point: Some(point.id),
                    time: Some(Time(point.captured)),
                    consistency: Some(point.consistency),
                    target: Some(recovered.files.join(", ")),
                    notes: recovered.notes,
                    machine: Some(recovered.machine.name.clone()),
                    machine_id: Some(recovered.machine.id),
                    ..Figures::default()
                };
                Ok(Done { figures, warnings: Vec::new() })
            }),
        )
    }
}
