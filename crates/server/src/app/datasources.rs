//! Datasources as documents of the pool: what must survive the loss of the catalog.

use std::time::Duration;

use model::{Code, DatasourceId, HostId, Problem, Unfrozen};
use protocol::api::{
    AddImage, AddMachine, Datasource, DatasourceDisk, DatasourceState, DiskFormat, ListedDisk, ListedMachine,
    PointBrief, Time,
};
use protocol::machine::{ImageFile, images_definition, libvirt_definition};
use serde::{Deserialize, Serialize};

use super::App;
use crate::api::names::{self, Named};

/// A datasource as the pool keeps it, sealed and unread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredDatasource {
    /// The machine's identity.
    pub id: DatasourceId,
    /// Its present name.
    pub name: String,
    /// The host it is on; this machine if absent.
    #[serde(default)]
    pub host: Option<HostId>,
    /// That host's name.
    #[serde(default)]
    pub host_name: String,
    /// `images`.
    pub provider: String,
    /// The provider's definition of it.
    pub definition: String,
    /// Its disks when it was added or last seen.
    pub disks: Vec<DatasourceDisk>,
    /// Removed: its points are kept.
    #[serde(default)]
    pub removed: bool,
    /// What is made of it when it runs and cannot be frozen.
    #[serde(default)]
    pub unfrozen: Unfrozen,
    /// Seconds before each of two more attempts to freeze it.
    #[serde(default = "freeze_wait")]
    pub freeze_wait_seconds: u64,
}

/// Five minutes.
fn freeze_wait() -> u64 {
    300
}

fn document(id: DatasourceId) -> String {
    format!("datasource/{id}")
}

impl StoredDatasource {
    /// What jobs need of it.
    pub fn machine(&self) -> jobs::Machine {
        jobs::Machine {
            id: self.id,
            name: self.name.clone(),
            host: self.host_name.clone(),
            definition: self.definition.clone(),
            unfrozen: self.unfrozen,
            freeze_wait: Duration::from_secs(self.freeze_wait_seconds),
            news: None,
        }
    }
}

impl App {
    /// All datasources by name. A document that cannot be read is replaced by what the points say.
    pub(crate) fn stored_datasources(&self) -> Vec<StoredDatasource> {
        let pool = self.pool();
        let mut all: Vec<StoredDatasource> = pool
            .documents("datasource/")
            .values()
            .filter_map(|bytes| serde_json::from_slice(bytes).ok())
            .collect();
        let state = pool.state();
        for point in state.in_order().rev() {
            if all.iter().any(|known| known.id == point.datasource) {
                continue;
            }
            // Its own record is lost; the newest point knows the name and the definition.
            let details = point.details();
            all.push(StoredDatasource {
                id: point.datasource,
                name: point.machine.clone(),
                host: None,
                host_name: details.host,
                provider: "images".to_owned(),
                definition: details.definition,
                disks: point
                    .machine_disks()
                    .zip(&details.descriptions)
                    .map(|(disk, description)| DatasourceDisk {
                        disk: disk.index,
                        path: String::new(),
                        format: super::mapping::image_format(description),
                        bytes: disk.size,
                    })
                    .collect(),
                removed: false,
                unfrozen: Unfrozen::default(),
                freeze_wait_seconds: freeze_wait(),
            });
        }
        all.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        all
    }

    pub(crate) fn find_datasource(&self, text: &str) -> Result<StoredDatasource, Problem> {
        let mut all = self.stored_datasources();
        let ids: Vec<String> = all.iter().map(|datasource| datasource.id.to_string()).collect();
        let named: Vec<Named<'_>> = all
            .iter()
            .zip(&ids)
            .map(|(datasource, id)| Named {
                id,
                name: &datasource.name,
                host: Some(datasource.host_name.as_str()).filter(|host| !host.is_empty()),
            })
            .collect();
        // A removed datasource gives its name free; it is found by its id, or by a name that nobody else has.
        let living: Vec<Named<'_>> = named
            .iter()
            .zip(&all)
            .filter(|(_, datasource)| !datasource.removed)
            .map(|(named, _)| *named)
            .collect();
        let at = match names::resolve("datasource", text, &living) {
            Ok(at) => {
                let id = living.get(at).map(|named| named.id.to_owned());
                ids.iter().position(|known| Some(known) == id.as_ref()).unwrap_or(at)
            }
            Err(problem) if problem.code == Code::NotFound => names::resolve("datasource", text, &named)?,
            Err(problem) => return Err(problem),
        };
        Ok(all.swap_remove(at))
    }

    pub(crate) fn store_datasource(&self, datasource: &StoredDatasource) -> Result<(), Problem> {
        let bytes = serde_json::to_vec(datasource).map_err(|error| {
            Problem::new(Code::Internal, format!("A datasource cannot be written down: {error}."))
        })?;
        self.pool().put_document(&document(datasource.id), Some(&bytes)).map_err(jobs::problem::pool)
    }

    pub(crate) fn api_datasource(&self, stored: &StoredDatasource) -> Datasource {
        let points = self.points_of(Some(stored.id));
        let latest = points.iter().rev().find(|(_, state)| state.counts_as_latest());
        let live = points.iter().filter(|(point, _)| point.deleted.is_none()).count();
        let is_running = self
            .runner
            .running()
            .iter()
            .any(|job| job.datasource == Some(stored.id) && job.kind == protocol::api::JobKind::Protect);
        let state = match (stored.removed, live > 0, is_running) {
            (true, ..) => DatasourceState::Removed,
            (_, true, _) => DatasourceState::Protected,
            (_, _, true) => DatasourceState::Replicating,
            _ => DatasourceState::Unprotected,
        };
        Datasource {
            id: stored.id,
            name: stored.name.clone(),
            host: Some(stored.host_name.clone()).filter(|host| !host.is_empty()),
            provider: stored.provider.clone(),
            state,
            group: (state == DatasourceState::Protected).then(|| "default".to_owned()),
            disks: stored.disks.clone(),
            recovery_points: live as u64,
            latest: latest.map(|(point, state)| PointBrief {
                id: point.id,
                time: Time(point.captured),
                consistency: point.consistency,
                state: *state,
            }),
        }
    }

    pub(crate) fn add(&self, request: &AddImage) -> Result<Datasource, Problem> {
        self.writable()?;
        names::check_name(&request.name)?;
        if request.images.is_empty() {
            return Err(Problem::new(Code::Usage, "A machine needs at least one image."));
        }
        let host = self.find_host(request.host.as_deref())?;
        let host_name = host.as_ref().map(|host| host.1.clone()).unwrap_or_default();
        let host = host.map(|host| host.0);
        let images: Vec<ImageFile> = request
            .images
            .iter()
            .enumerate()
            .map(|(at, path)| ImageFile {
                path: path.clone(),
                format: request.formats.get(at).map(|format: &DiskFormat| format.word().to_owned()),
            })
            .collect();
        let taken = self
            .stored_datasources()
            .into_iter()
            .find(|known| !known.removed && known.name == request.name && known.host == host);
        if let Some(known) = taken {
            let same =
                images_definition(known.id, &known.name, &images, &request.allow_backing) == known.definition;
            if same {
                return Ok(self.api_datasource(&known));
            }
            return Err(Problem::new(
                Code::NameTaken,
                format!("A datasource {} of other images exists.", request.name),
            )
            .about(request.name.clone()));
        }
        let id = DatasourceId(self.pool().random_id().map_err(jobs::problem::pool)?);
        let stored = StoredDatasource {
            id,
            name: request.name.clone(),
            host,
            host_name,
            provider: "images".to_owned(),
            definition: images_definition(id, &request.name, &images, &request.allow_backing),
            disks: Vec::new(),
            removed: false,
            unfrozen: Unfrozen::default(),
            freeze_wait_seconds: freeze_wait(),
        };
        self.store_new(stored, request.images.iter().cloned())
    }

    /// Machines that a host knows by itself.
    pub(crate) fn listed_machines(&self, host: Option<&str>) -> Result<Vec<ListedMachine>, Problem> {
        let host = self.find_host(host)?;
        let machines = self.parts.hosts.host(host.as_ref().map(|host| host.0))?.machines()?;
        let known = self.stored_datasources();
        let listed = machines.into_iter().map(|machine| ListedMachine {
            id: machine.id,
            name: machine.name,
            host: host.as_ref().map(|host| host.1.clone()),
            provider: machine.provider,
            power: machine.power.word().to_owned(),
            guest_agent: machine.guest_agent,
            is_datasource: known.iter().any(|known| known.id == machine.id && !known.removed),
            disks: machine
                .disks
                .into_iter()
                .map(|disk| ListedDisk {
                    name: disk.name,
                    storage: disk.storage,
                    format: disk.format,
                    bus: disk.bus,
                    bytes: disk.bytes,
                    chain: disk.chain,
                    unprotected: disk.unprotected,
                })
                .collect(),
        });
        Ok(listed.collect())
    }

    /// Makes a machine of a hypervisor a datasource, under its own identity.
    pub(crate) fn add_machine(&self, request: &AddMachine) -> Result<Datasource, Problem> {
        self.writable()?;
        let host = self.find_host(request.host.as_deref())?;
        let (host, host_name) = host.map_or((None, String::new()), |host| (Some(host.0), host.1));
        let machines = self.parts.hosts.host(host)?.machines()?;
        let ids: Vec<String> = machines.iter().map(|machine| machine.id.to_string()).collect();
        let named: Vec<Named<'_>> = machines
            .iter()
            .zip(&ids)
            .map(|(machine, id)| Named { id, name: &machine.name, host: None })
            .collect();
        let at = names::resolve("machine", &request.machine, &named)?;
        let machine = machines.get(at).ok_or_else(|| Problem::new(Code::NotFound, "No such machine."))?;
        if let Some(unknown) =
            request.exclude.iter().find(|name| !machine.disks.iter().any(|disk| disk.name == **name))
        {
            let has: Vec<&str> = machine.disks.iter().map(|disk| disk.name.as_str()).collect();
            return Err(Problem::new(
                Code::Usage,
                format!("{} has no disk {unknown}; it has {}.", machine.name, has.join(", ")),
            ));
        }
        let definition = libvirt_definition(
            machine.id,
            &machine.name,
            &request.exclude,
            request.keep_swap,
            self.pool().id(),
        );
        let others = self.stored_datasources();
        if let Some(known) = others.iter().find(|known| known.id == machine.id && !known.removed) {
            if known.definition == definition && known.host == host {
                let changed = StoredDatasource {
                    unfrozen: request.without_freeze.unwrap_or(known.unfrozen),
                    freeze_wait_seconds: request.freeze_wait_seconds.unwrap_or(known.freeze_wait_seconds),
                    ..known.clone()
                };
                if changed != *known {
                    self.store_datasource(&changed)?;
                }
                return Ok(self.api_datasource(&changed));
            }
            return Err(Problem::new(
                Code::NameTaken,
                format!(
                    "The machine {} is the datasource {} already, otherwise defined.",
                    machine.name, known.name
                ),
            )
            .about(known.name.clone())
            .hint("Remove it first: `datasource remove .. --keep-data` keeps its points."));
        }
        if others.iter().any(|known| !known.removed && known.name == machine.name && known.host == host) {
            return Err(Problem::new(
                Code::NameTaken,
                format!("Another datasource is called {} on this host.", machine.name),
            )
            .about(machine.name.clone()));
        }
        let stored = StoredDatasource {
            id: machine.id,
            name: machine.name.clone(),
            host,
            host_name,
            provider: machine.provider.clone(),
            definition,
            disks: Vec::new(),
            removed: false,
            unfrozen: request.without_freeze.unwrap_or_default(),
            freeze_wait_seconds: request.freeze_wait_seconds.unwrap_or_else(freeze_wait),
        };
        let protected = machine
            .disks
            .iter()
            .filter(|disk| disk.unprotected.is_none() && !request.exclude.contains(&disk.name));
        self.store_new(stored, protected.map(|disk| disk.storage.clone()))
    }

    /// Writes down a datasource whose host can see it; `paths` tells where its disks are, in their order.
    fn store_new(
        &self,
        mut stored: StoredDatasource,
        paths: impl Iterator<Item = String>,
    ) -> Result<Datasource, Problem> {
        let view = self.parts.hosts.host(stored.host)?.inspect(&stored.machine())?;
        stored.disks = view
            .disks
            .iter()
            .zip(paths)
            .zip(0u32..)
            .map(|((disk, path), index)| DatasourceDisk {
                disk: index,
                path,
                format: super::mapping::image_format(&disk.description),
                bytes: disk.size,
            })
            .collect();
        self.store_datasource(&stored)?;
        self.parts.history.sync(self.pool())?;
        Ok(self.api_datasource(&stored))
    }

    /// A host by what was typed: its id and name; `None` for this machine.
    pub(crate) fn find_host(&self, text: Option<&str>) -> Result<Option<(HostId, String)>, Problem> {
        let Some(text) = text else { return Ok(None) };
        let hosts = self.parts.hosts.list()?;
        let ids: Vec<String> = hosts.iter().map(|host| host.id.to_string()).collect();
        let named: Vec<Named<'_>> =
            hosts.iter().zip(&ids).map(|(host, id)| Named { id, name: &host.name, host: None }).collect();
        let at = names::resolve("host", text, &named)?;
        Ok(hosts.get(at).map(|host| (host.id, host.name.clone())))
    }
}
