//! The catalog as the server uses it: jobs and alerts of before, derived tables, and copies of the pool's records.
//!
//! ```text
//! DIR/catalog/                  the database (see the `catalog` room)
//! DIR/catalog/records/          a copy of each record of the pool: gives one back whose file is damaged
//! ```
//!
//! Derived tables are a pure function of the pool (INV-6). They carry the head of the sequence: a pool that is behind it
//! was rolled back, and nothing may be written before somebody decided (`catalog rebuild` accepts the pool as it is).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use catalog::{AlertRow, Catalog, Derived, Filter, JobRow, Row, SqliteCatalog, Table};
use model::{Code, JobId, Problem, Timestamp};
use protocol::api::{Alert, Job, JobLogLine, Severity, Time};
use serde::{Deserialize, Serialize};
use storage_pool::{Damage, Pool};

/// Jobs and alerts that lists look at.
const MOST: usize = 20_000;

/// Keeps jobs, their logs and alerts, and what is derived from the pool.
pub struct History {
    inner: Mutex<Inner>,
    folder: PathBuf,
}

struct Inner {
    catalog: Option<SqliteCatalog>,
    /// A reader's copy of the database lies here and goes with it. It is made when something is asked of it: what the
    /// pool alone answers does not wait for a copy.
    copy: Option<Copy>,
    /// Whether a reader has not tried yet to make its copy.
    uncopied: bool,
    writes: bool,
    /// Ended jobs that the database did not take, above all a reader's: whoever follows one must still learn its end.
    unkept: BTreeMap<JobId, KeptJob>,
    /// Head of the sequence that the derived tables show.
    head: u64,
}

#[derive(Clone, Serialize, Deserialize)]
struct KeptJob {
    job: Job,
    log: Vec<JobLogLine>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    number: u64,
    hash: String,
}

const HEAD: &str = "pool/head";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn io_problem(path: &Path, action: &str, error: &std::io::Error) -> Problem {
    Problem::new(Code::PoolIo, format!("{}: cannot {action}: {error}.", path.display()))
        .about(path.display().to_string())
}

impl History {
    /// Opens the catalog of a pool; the lines are for people.
    ///
    /// A writer gives the pool back what the copies of its records still know, and makes the derived tables again where
    /// they are behind or were damaged. A reader looks at a copy and changes nothing.
    pub fn open(folder: &Path, pool: &Pool, writes: bool) -> Result<(History, Vec<String>), Problem> {
        let mut said = Vec::new();
        sweep_copies();
        if !writes {
            let inner = Inner {
                catalog: None,
                copy: None,
                uncopied: true,
                writes: false,
                unkept: BTreeMap::new(),
                head: 0,
            };
            return Ok((History { inner: Mutex::new(inner), folder: folder.to_owned() }, said));
        }
        let records = folder.join("records");
        if !records.is_dir() {
            // What is in these folders outlasts a power cut only if their own names do.
            let named = [Some(folder), folder.parent()];
            std::fs::create_dir_all(&records)
                .and_then(|()| named.iter().flatten().try_for_each(|above| sync_folder(above)))
                .map_err(|error| io_problem(&records, "create", &error))?;
        }
        let mut restored = false;
        let lost: Vec<u64> = pool.state().unreadable.iter().map(|record| record.number).collect();
        for number in lost {
            let copy = std::fs::read(record_path(folder, number)).unwrap_or_default();
            if pool.restore_record(number, &copy).map_err(jobs::problem::pool)? {
                restored = true;
                said.push(format!(
                    "record {number} of the pool was damaged and is restored from its copy in {}",
                    records.display()
                ));
            }
        }
        let opened = SqliteCatalog::open(folder).map_err(Problem::from)?;
        // A pool that was made just now has no catalog yet, and nothing to say about that.
        let is_new = pool.state().points.is_empty() && pool.state().documents.is_empty();
        if let Some(reason) = opened.rebuilt.as_ref().filter(|_| !is_new) {
            said.push(format!("the catalog is made again from the pool: {reason}"));
        }
        said.extend(opened.mended);
        let known = known_head(&opened.catalog)?;
        if let Some(known) = known.as_ref().filter(|known| is_ahead(known, pool)) {
            return Err(Problem::new(
                Code::PoolRolledBack,
                format!(
                    "The pool's last record is number {}, it had {} before: an old copy was put back, or files were lost.",
                    pool.state().head,
                    known.number
                ),
            )
            .about(pool.path()));
        }
        // A restored record changes what lies before the head.
        let head = known.filter(|_| !restored).map_or(0, |head| head.number);
        let inner = Inner {
            catalog: Some(opened.catalog),
            copy: None,
            uncopied: false,
            writes: true,
            unkept: BTreeMap::new(),
            head,
        };
        let history = History { inner: Mutex::new(inner), folder: folder.to_owned() };
        history.sync(pool)?;
        Ok((history, said))
    }

    /// Whether the catalog knows records that the pool does not have: the pool was rolled back.
    pub fn is_ahead(folder: &Path, pool: &Pool) -> Result<bool, Problem> {
        if !folder.exists() {
            return Ok(false);
        }
        let opened = SqliteCatalog::open(folder).map_err(Problem::from)?;
        let ahead = known_head(&opened.catalog)?.is_some_and(|known| is_ahead(&known, pool));
        opened.catalog.close().map_err(Problem::from)?;
        Ok(ahead)
    }

    /// Forgets what is derived, so that the next opening takes the pool as it is now. For `catalog rebuild` of a pool
    /// that was rolled back: whatever change lists are against may be gone, so none is trusted until everything was read.
    pub fn accept(folder: &Path, pool: &Pool) -> Result<(), Problem> {
        let head = pool.state().head;
        pool.put_document(jobs::synchronize::DOUBT_DOCUMENT, Some(head.to_string().as_bytes()))
            .map_err(jobs::problem::pool)?;
        let opened = SqliteCatalog::open(folder).map_err(Problem::from)?;
        opened.catalog.remove(Table::Settings, HEAD).map_err(Problem::from)?;
        // Copies of records that the pool does not have any more would stand in the way of new ones.
        let records = folder.join("records");
        if records.exists() {
            std::fs::remove_dir_all(&records).map_err(|error| io_problem(&records, "remove", &error))?;
        }
        opened.catalog.close().map_err(Problem::from)
    }

    /// Brings derived tables and copies of records up to the pool's head.
    pub fn sync(&self, pool: &Pool) -> Result<(), Problem> {
        let mut inner = self.inner();
        let head = pool.state().head;
        if !inner.writes || inner.head == head {
            return Ok(());
        }
        self.copy_records(pool, inner.head + 1, head);
        if let Some(catalog) = &inner.catalog {
            let rows = derived(pool, inner.head)?;
            // All but points are few; of those only the changed ones are written.
            let cleared = [Table::Datasources, Table::Replicas, Table::Hosts, Table::Settings];
            let all = if inner.head == 0 { &Table::ALL[..] } else { &cleared[..] };
            catalog.update_derived(all, &rows).map_err(Problem::from)?;
        }
        inner.head = head;
        Ok(())
    }

    fn copy_records(&self, pool: &Pool, from: u64, to: u64) {
        let records = self.folder.join("records");
        for number in from..=to {
            // A copy is a help, not a promise: what cannot be copied is simply not there.
            if let Ok(bytes) = pool.record_bytes(number)
                && pool.is_record(number, &bytes)
            {
                let _ = std::fs::create_dir_all(&records);
                let _ = std::fs::write(record_path(&self.folder, number), bytes);
            }
        }
    }

    /// The derived tables, and what they should be: equal text, equal tables.
    pub fn rebuild(&self, pool: &Pool) -> Result<Vec<String>, Problem> {
        let inner = self.inner();
        let Some(catalog) = &inner.catalog else { return Ok(Vec::new()) };
        let before = catalog.derived_dump().map_err(Problem::from)?;
        catalog.replace_derived(&derived(pool, 0)?).map_err(Problem::from)?;
        let after = catalog.derived_dump().map_err(Problem::from)?;
        Ok(vec![if before == after {
            "The derived tables were equal to what the pool says.".to_owned()
        } else {
            "The derived tables differed from what the pool says and are made again.".to_owned()
        }])
    }

    /// The derived tables as one text.
    pub fn dump(&self) -> Result<String, Problem> {
        match &self.known().catalog {
            Some(catalog) => catalog.derived_dump().map_err(Problem::from),
            None => Ok(String::new()),
        }
    }

    /// Damaged copies of records; each is made again.
    pub fn examine(&self, pool: &Pool) -> Vec<Damage> {
        let (inner, said) = self.loaded();
        let mut damage: Vec<Damage> = said
            .into_iter()
            .map(|reason| Damage::File {
                path: SqliteCatalog::database(&self.folder).display().to_string(),
                offset: 0,
                reason,
                derived: true,
            })
            .collect();
        for number in 1..=pool.state().head {
            let path = record_path(&self.folder, number);
            let Ok(bytes) = std::fs::read(&path) else {
                if inner.writes {
                    self.copy_records(pool, number, number);
                }
                continue;
            };
            if pool.is_record(number, &bytes) {
                continue;
            }
            // Copies are not synced: after a power cut one may not have been written to its end, which is no damage.
            let is_unfinished = pool
                .record_bytes(number)
                .is_ok_and(|good| pool.is_record(number, &good) && is_unfinished(&bytes, &good));
            if is_unfinished {
                if inner.writes {
                    self.copy_records(pool, number, number);
                }
                continue;
            }
            damage.push(Damage::File {
                path: path.display().to_string(),
                offset: 0,
                reason: "this copy of a record of the pool is damaged; it is copied again".to_owned(),
                derived: true,
            });
            if inner.writes
                && let Ok(good) = pool.record_bytes(number)
                && pool.is_record(number, &good)
            {
                let _ = std::fs::write(&path, good);
            }
        }
        damage
    }

    /// Closes the catalog in order. A reader's copy goes with it and does not come again: a thread that still answers somebody
    /// may hold all of this until the process is gone, and then nobody drops it.
    pub fn close(&self, pool: &Pool) -> Result<(), Problem> {
        self.sync(pool)?;
        let mut inner = self.inner();
        inner.uncopied = false;
        let (catalog, copy) = (inner.catalog.take(), inner.copy.take());
        drop(inner);
        let closed = catalog.map_or(Ok(()), |catalog| catalog.close().map_err(Problem::from));
        drop(copy);
        closed
    }

    /// Keeps an ended job with its log.
    pub fn keep(&self, job: Job, log: Vec<JobLogLine>) {
        let mut inner = self.inner();
        let kept = KeptJob { job, log };
        let Some(catalog) = inner.catalog.as_ref().filter(|_| inner.writes) else {
            inner.unkept.insert(kept.job.id, kept);
            return;
        };
        let row = JobRow {
            id: kept.job.id.to_string(),
            created: kept.job.created_at.0.0,
            state: kept.job.state.word().to_owned(),
            datasource: kept.job.datasource.map(|id| id.to_string()).unwrap_or_default(),
            json: serde_json::to_string(&kept).unwrap_or_default(),
        };
        if let Err(error) = catalog.put_job(&row) {
            tracing::warn!("job {} is not in the history: {error}", row.id);
            inner.unkept.insert(kept.job.id, kept);
        }
    }

    /// Ended jobs, newest first.
    pub fn jobs(&self) -> Vec<Job> {
        let inner = self.known();
        let mut jobs: Vec<Job> = inner.unkept.values().map(|kept| kept.job.clone()).collect();
        let Some(catalog) = &inner.catalog else { return jobs };
        let mut before: Option<(u64, String)> = None;
        while jobs.len() < MOST {
            let place = before.as_ref().map(|(time, id)| (*time, id.as_str()));
            let Ok(rows) = catalog.jobs(Filter::default(), place, 1000) else { break };
            let Some(last) = rows.last() else { break };
            before = Some((last.created, last.id.clone()));
            jobs.extend(
                rows.iter()
                    .filter_map(|row| serde_json::from_str::<KeptJob>(&row.json).ok())
                    .map(|kept| kept.job),
            );
        }
        jobs
    }

    fn kept(&self, id: JobId) -> Option<KeptJob> {
        // A reader that follows its own job needs no copy of the database for it.
        if let Some(kept) = self.inner().unkept.get(&id) {
            return Some(kept.clone());
        }
        let inner = self.known();
        let row = inner.catalog.as_ref()?.job(&id.to_string()).ok()??;
        serde_json::from_str(&row.json).ok()
    }

    /// An ended job.
    pub fn job(&self, id: JobId) -> Option<Job> {
        self.kept(id).map(|kept| kept.job)
    }

    /// The log of an ended job.
    pub fn log(&self, id: JobId) -> Option<Vec<JobLogLine>> {
        self.kept(id).map(|kept| kept.log)
    }

    /// Raises an alert, unless the same one stands open.
    pub fn raise(&self, severity: Severity, problem: &Problem, now: Timestamp) {
        let stands = self.alerts().iter().any(|alert| {
            alert.stands() && alert.code == Some(problem.code) && alert.message == problem.message
        });
        if stands {
            return;
        }
        self.put_alert(Alert {
            id: 0,
            severity,
            code: Some(problem.code),
            message: problem.message.clone(),
            object: problem.object.clone(),
            raised_at: Time(now),
            acknowledged_at: None,
            resolved_at: None,
        });
    }

    /// Ends an alert whose cause is gone.
    pub fn resolve(&self, problem: &Problem, now: Timestamp) {
        let is_of = |alert: &Alert| alert.code == Some(problem.code) && alert.message == problem.message;
        for alert in self.alerts().into_iter().filter(|alert| alert.stands() && is_of(alert)) {
            self.put_alert(Alert { resolved_at: Some(Time(now)), ..alert });
        }
    }

    fn put_alert(&self, alert: Alert) {
        let inner = self.inner();
        let Some(catalog) = inner.catalog.as_ref().filter(|_| inner.writes) else { return };
        let row = AlertRow {
            number: alert.id,
            acknowledged: !alert.stands(),
            json: serde_json::to_string(&alert).unwrap_or_default(),
        };
        if let Err(error) = catalog.put_alert(&row) {
            tracing::warn!("an alert is not in the history: {error}: {}", alert.message);
        }
    }

    /// Alerts, oldest first.
    pub fn alerts(&self) -> Vec<Alert> {
        let inner = self.known();
        let Some(catalog) = &inner.catalog else { return Vec::new() };
        let rows = catalog.alerts(true, None, MOST as u32).unwrap_or_default();
        let mut alerts: Vec<Alert> = rows
            .iter()
            .filter_map(|row| {
                let alert: Alert = serde_json::from_str(&row.json).ok()?;
                Some(Alert { id: row.number, ..alert })
            })
            .collect();
        alerts.reverse();
        alerts
    }

    /// Takes note of an alert.
    pub fn acknowledge(&self, id: u64, now: Timestamp) -> Option<Alert> {
        let mut alert = self.alerts().into_iter().find(|alert| alert.id == id)?;
        if alert.acknowledged_at.is_none() {
            alert.acknowledged_at = Some(Time(now));
            self.put_alert(alert.clone());
        }
        Some(alert)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same with a reader's copy made, and what there was to say of it.
    fn loaded(&self) -> (MutexGuard<'_, Inner>, Vec<String>) {
        let mut inner = self.inner();
        let mut said = Vec::new();
        if std::mem::take(&mut inner.uncopied) {
            (inner.catalog, inner.copy) = open_copy(&self.folder, &mut said);
        }
        (inner, said)
    }

    /// The same for lists, where what there is to say goes to the log.
    fn known(&self) -> MutexGuard<'_, Inner> {
        let (inner, said) = self.loaded();
        for line in said {
            tracing::warn!("{line}");
        }
        inner
    }
}

fn known_head(catalog: &SqliteCatalog) -> Result<Option<Head>, Problem> {
    let row = catalog.get(Table::Settings, HEAD).map_err(Problem::from)?;
    Ok(row.and_then(|row| serde_json::from_str(&row.json).ok()))
}

fn is_ahead(known: &Head, pool: &Pool) -> bool {
    let state = pool.state();
    let is_damaged = state.unreadable.iter().any(|record| record.number == state.head);
    known.number > state.head
        || known.number == state.head && known.hash != hex(&state.head_hash) && !is_damaged
}

#[cfg(unix)]
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    std::fs::File::open(folder)?.sync_all()
}

/// Folders cannot be synced on Windows; there a name is durable when it is there.
#[cfg(not(unix))]
fn sync_folder(_: &Path) -> std::io::Result<()> {
    Ok(())
}

/// Whether `copy` is what a power cut may leave of `good` that was never synced: cut off, or pages of zeros in it.
fn is_unfinished(copy: &[u8], good: &[u8]) -> bool {
    let pages = copy.chunks(4096).zip(good.chunks(4096));
    copy.len() <= good.len()
        && pages
            .map(|(copy, good)| (copy, &good[..copy.len()]))
            .all(|(copy, good)| copy == good || copy.iter().all(|&byte| byte == 0))
}

fn record_path(folder: &Path, number: u64) -> PathBuf {
    folder.join("records").join(format!("{number:016x}.record"))
}

/// Readers' copies of a catalog, in the system's temporary folder: recognised by name, alive while its lock is held.
const COPY_PREFIX: &str = "stillpoint-catalog-";
const COPY_LOCK: &str = "in-use";
/// A copy whose lock file has not got its name yet is just being made, or was killed right then.
const COPY_BEGINS: std::time::Duration = std::time::Duration::from_secs(60);

/// A reader's own copy of the database, so that it neither disturbs a writer nor writes beside a read-only pool. It goes with
/// the reader; what a killed one leaves, the next opening of any catalog removes.
struct Copy {
    folder: tempfile::TempDir,
    _lock: std::fs::File,
}

impl Copy {
    fn of(catalog: &Path) -> std::io::Result<Copy> {
        let folder = tempfile::Builder::new().prefix(COPY_PREFIX).tempdir()?;
        // Locked before it has the name by which others look: an unlocked one is a dead one.
        let unnamed = folder.path().join("locking");
        let lock = std::fs::File::create_new(&unnamed)?;
        lock.try_lock().map_err(std::io::Error::from)?;
        std::fs::rename(&unnamed, folder.path().join(COPY_LOCK))?;
        for entry in std::fs::read_dir(catalog)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                std::fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
            }
        }
        Ok(Copy { folder, _lock: lock })
    }
}

/// Removes copies of readers that were killed, our own user's only. What cannot be removed is nobody's trouble.
fn sweep_copies() {
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(COPY_PREFIX) {
            continue;
        }
        let Ok(found) = entry.metadata() else { continue };
        if !found.is_dir() || !is_ours(&found) {
            continue;
        }
        let is_dead = match std::fs::File::open(entry.path().join(COPY_LOCK)) {
            Ok(lock) => lock.try_lock().is_ok(),
            Err(_) => found.modified().is_ok_and(|at| at.elapsed().is_ok_and(|age| age > COPY_BEGINS)),
        };
        if is_dead {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(unix)]
fn is_ours(found: &std::fs::Metadata) -> bool {
    std::os::unix::fs::MetadataExt::uid(found) == rustix::process::geteuid().as_raw()
}

#[cfg(not(unix))]
fn is_ours(_found: &std::fs::Metadata) -> bool {
    true
}

fn open_copy(folder: &Path, said: &mut Vec<String>) -> (Option<SqliteCatalog>, Option<Copy>) {
    // The digest is there only while nobody has the catalog open: what fails beside a writer was torn, not damaged.
    let digest = folder.join("catalog.digest");
    let was_closed = digest.exists();
    // Without a catalog, or while a writer changes it under the copy, lists of jobs are empty: everything else comes from
    // the pool.
    let Ok(copy) = Copy::of(folder) else { return (None, None) };
    let is_closed = was_closed && digest.exists();
    let Ok(opened) = SqliteCatalog::open(copy.folder.path()) else { return (None, None) };
    let database = folder.join("catalog.db");
    if is_closed && opened.rebuilt.is_some() {
        said.push(format!(
            "{} does not have the digest in catalog.digest; the next command that writes makes it again from the pool",
            database.display()
        ));
    }
    if is_closed && opened.mended.is_some() {
        said.push(format!(
            "{} does not match its seal; the next command that writes makes it again",
            folder.join("history.export").display()
        ));
    }
    (Some(opened.catalog), Some(copy))
}

/// The derived tables as a pure function of the pool; of points only those that changed after record `since`.
fn derived(pool: &Pool, since: u64) -> Result<Derived, Problem> {
    let state = pool.state();
    let internal =
        |error: serde_json::Error| Problem::new(Code::Internal, format!("A row cannot be written: {error}."));
    let mut rows = Vec::new();
    for (name, bytes) in &state.documents {
        let table = match name.split('/').next() {
            Some("datasource") => Table::Datasources,
            Some("host") => Table::Hosts,
            // Keys and tokens stay in the pool, sealed; the catalog is not.
            Some("server" | "token" | "api-token") => continue,
            _ => Table::Settings,
        };
        let key = name.split_once('/').map_or(name.as_str(), |(_, key)| key).to_owned();
        let json = String::from_utf8_lossy(bytes).into_owned();
        rows.push((table, Row { key, owner: String::new(), order: 0, json }));
    }
    let mut newest = BTreeMap::new();
    for point in state.in_order() {
        newest.insert(point.datasource.to_string(), point.id.to_string());
        if point.changed <= since {
            continue;
        }
        let details = point.details();
        let json = serde_json::json!({
            "machine": point.machine,
            "host": details.host,
            "captured": point.captured,
            "consistency": point.consistency,
            "base": point.base,
            "cause": details.cause,
            "disks": point.machine_disks().map(|disk| serde_json::json!({
                "index": disk.index, "size": disk.size, "sector": disk.sector, "full_compare": disk.full_compare,
            })).collect::<Vec<_>>(),
            "figures": details.figures,
            "deleted": point.deleted,
            "suspect": point.suspect,
            "verified": point.verified,
            "incomplete": point.incomplete,
        });
        let json = serde_json::to_string(&json).map_err(internal)?;
        let (key, owner) = (point.id.to_string(), point.datasource.to_string());
        rows.push((Table::Points, Row { key, owner, order: point.number, json }));
    }
    for (datasource, point) in newest {
        rows.push((
            Table::Replicas,
            Row {
                key: datasource.clone(),
                owner: datasource,
                order: 0,
                json: format!("{{\"point\":\"{point}\"}}"),
            },
        ));
    }
    let head = Head { number: state.head, hash: hex(&state.head_hash) };
    rows.push((
        Table::Settings,
        Row {
            key: HEAD.to_owned(),
            owner: String::new(),
            order: 0,
            json: serde_json::to_string(&head).map_err(internal)?,
        },
    ));
    Ok(Derived { rows })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{COPY_LOCK, Copy, History, is_unfinished, sweep_copies};
    use crate::app::{DataFolder, FolderOptions, NewPool};
    use environment::{FolderFiles, SystemClock, SystemRandomness};
    use std::sync::Arc;
    use storage_pool::{Settings, World};

    /// Whoever still holds the history when the process ends keeps no copy of the database lying about.
    #[test]
    fn a_closed_reader_leaves_no_copy_though_it_is_held() {
        let root = tempfile::tempdir().unwrap();
        let folder = DataFolder::new(root.path().join("data"));
        let files = Arc::new(FolderFiles::new(folder.pool()));
        let world = World { files, clock: Arc::new(SystemClock), randomness: Arc::new(SystemRandomness) };
        let create = Some(NewPool { settings: Settings::without_safety(), kit: None });
        let options = FolderOptions { create, pool: None, writes: true };
        let opened = folder.open(&world, &options, "test").unwrap();
        let (writer, _) = History::open(&folder.catalog(), &opened.pool, true).unwrap();
        writer.close(&opened.pool).unwrap();

        let (reader, _) = History::open(&folder.catalog(), &opened.pool, false).unwrap();
        assert!(reader.jobs().is_empty());
        let copy = reader.inner().copy.as_ref().unwrap().folder.path().to_owned();
        assert!(copy.join("catalog.db").exists());
        reader.close(&opened.pool).unwrap();
        assert!(!copy.exists());
        assert!(reader.jobs().is_empty() && reader.inner().copy.is_none(), "nor another one");
    }

    /// What a killed reader left goes with the next command, also with one that makes no copy itself; a living one's stays.
    #[test]
    fn the_next_opening_removes_the_copy_of_a_killed_reader() {
        let empty = tempfile::tempdir().unwrap();
        let Copy { folder, _lock: lock } = Copy::of(empty.path()).unwrap();
        // While it is locked: another test of this machine may clear up as soon as it is not.
        assert!(folder.path().join(COPY_LOCK).exists());
        let killed = folder.keep();
        drop(lock);
        let living = Copy::of(empty.path()).unwrap();
        sweep_copies();
        assert!(!killed.exists() && living.folder.path().exists());
    }

    #[test]
    fn a_copy_that_was_not_written_to_its_end_is_told_from_damage() {
        let good: Vec<u8> = (0..10_000).map(|at| (at % 251 + 1) as u8).collect();
        let mut page_missing = good.clone();
        page_missing[4096..8192].fill(0);
        assert!(is_unfinished(&[], &good));
        assert!(is_unfinished(&good[..5000], &good));
        assert!(is_unfinished(&vec![0; good.len()], &good));
        assert!(is_unfinished(&page_missing, &good));
        let mut flipped = good.clone();
        flipped[4100] ^= 4;
        assert!(!is_unfinished(&flipped, &good));
        flipped[4100] = 0;
        assert!(!is_unfinished(&flipped, &good));
        assert!(!is_unfinished(&[good.clone(), vec![0]].concat(), &good));
    }
}
