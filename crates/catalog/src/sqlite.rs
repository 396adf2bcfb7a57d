//! [`Catalog`] on SQLite: write-ahead log, `synchronous=FULL`, one writer.
//!
//! Files in the folder: `catalog.db`; `catalog.digest`, there only after a clean close, BLAKE3 of the database;
//! `history.export`, BLAKE3 of the rest in its first line, then a line of JSON a row; `catalog.damaged-N`.
//!
//! The digest is removed, durably, before the first write of a run, so an old digest never meets a newer database.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

use crate::{AlertRow, Catalog, CatalogError, Derived, Filter, JobRow, LogRow, Row, Rows, SessionRow, Table};

/// The schema this program writes and the newest it reads.
const SCHEMA: i64 = 1;
const DATABASE: &str = "catalog.db";
const DIGEST: &str = "catalog.digest";
const EXPORT: &str = "history.export";

/// The catalog in a folder.
pub struct SqliteCatalog {
    folder: PathBuf,
    /// `None` once closed.
    connection: Mutex<Option<Connection>>,
}

/// A catalog just opened.
pub struct Opened {
    /// The catalog.
    pub catalog: SqliteCatalog,
    /// Why the derived tables are empty and must be replaced from the pool; `None` if they hold what they held.
    pub rebuilt: Option<String>,
    /// What else was found broken and was mended: the export of history.
    pub mended: Option<String>,
    /// Whether the last close was clean. Otherwise the caller compares the derived tables with the pool.
    pub clean: bool,
}

/// A row of the export.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum History {
    Job(JobRow),
    Log(LogRow),
    Alert(AlertRow),
    Session(SessionRow),
}

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> CatalogError {
    let path = path.to_owned();
    move |source| CatalogError::Io { path, action, source }
}

fn sync_folder(folder: &Path) -> Result<(), CatalogError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io(folder, "write"))
}

/// Whether an error means that the file is not what was written, and not that the disk is full or another is at work.
fn is_damage(error: &CatalogError) -> bool {
    match error {
        CatalogError::Row { .. } => true,
        CatalogError::Database(error) => !matches!(
            error.sqlite_error_code(),
            Some(
                rusqlite::ErrorCode::DatabaseBusy
                    | rusqlite::ErrorCode::DatabaseLocked
                    | rusqlite::ErrorCode::DiskFull
                    | rusqlite::ErrorCode::CannotOpen
                    | rusqlite::ErrorCode::PermissionDenied
                    | rusqlite::ErrorCode::ReadOnly
                    | rusqlite::ErrorCode::SystemIoFailure
                    | rusqlite::ErrorCode::OutOfMemory
            )
        ),
        _ => false,
    }
}

/// The rows of the export; an error if it does not match its seal, `None` if there is none.
fn intact_export(folder: &Path) -> Option<Result<String, ()>> {
    let bytes = match fs::read(folder.join(EXPORT)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        Err(_) => return Some(Err(())),
    };
    let text = String::from_utf8(bytes).unwrap_or_default();
    Some(match text.split_once('\n') {
        Some((seal, rest)) if seal == blake3::hash(rest.as_bytes()).to_hex().as_str() => Ok(rest.to_owned()),
        _ => Err(()),
    })
}

/// SQLite's integers are signed; ours fit or are cut at the largest.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn digest_of(path: &Path) -> Result<String, CatalogError> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(io(path, "read"))?;
    std::io::copy(&mut file, &mut hasher).map_err(io(path, "read"))?;
    Ok(hasher.finalize().to_hex().to_string())
}

impl SqliteCatalog {
    /// The database file of the catalog in `folder`.
    pub fn database(folder: &Path) -> PathBuf {
        folder.join(DATABASE)
    }

    /// Opens the catalog in `folder`, creating it if there is none. One process at a time: the pool's lock sees to it.
    pub fn open(folder: &Path) -> Result<Opened, CatalogError> {
        let database = SqliteCatalog::database(folder);
        let existed = database.exists();
        let (mut reason, mut clean) = (None, false);
        if existed {
            match SqliteCatalog::examine(folder) {
                Ok(was_clean) => clean = was_clean,
                Err(error) if !is_damage(&error) => return Err(error),
                Err(error) => {
                    reason = Some(error.to_string());
                    SqliteCatalog::move_aside(folder)?;
                }
            }
        } else {
            reason = Some(format!("{} is not there", database.display()));
            // What is left of a database that is gone must not meet the new one.
            SqliteCatalog::move_aside(folder)?;
        }
        let digest = folder.join(DIGEST);
        match fs::remove_file(&digest) {
            Ok(()) => sync_folder(folder)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(io(&digest, "write")(error)),
        }
        let connection = SqliteCatalog::connect(&database)?;
        connection.execute_batch(&schema())?;
        let catalog = SqliteCatalog { folder: folder.to_owned(), connection: Mutex::new(Some(connection)) };
        let mut mended = None;
        if reason.is_none() && matches!(intact_export(folder), Some(Err(()))) {
            catalog.export_history()?;
            mended = Some(format!("{EXPORT} did not match its seal and was written again"));
        }
        if let Some(why) = &mut reason {
            match catalog.salvage()? {
                Some(rows) => why.push_str(&format!("; {rows} rows of history were salvaged")),
                None if existed => why.push_str("; there is no intact export of history"),
                None => {}
            }
        }
        Ok(Opened { catalog, rebuilt: reason, mended, clean })
    }

    fn connect(database: &Path) -> Result<Connection, CatalogError> {
        let connection = Connection::open(database)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        connection
            .execute_batch("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA cell_size_check=ON;")?;
        Ok(connection)
    }

    /// `Ok(clean)` if the database is whole. Touches nothing.
    fn examine(folder: &Path) -> Result<bool, CatalogError> {
        let database = SqliteCatalog::database(folder);
        let digest = folder.join(DIGEST);
        let clean = match fs::read(&digest) {
            Ok(kept) => {
                if kept != digest_of(&database)?.as_bytes() {
                    return Err(CatalogError::Row {
                        table: "all",
                        reason: format!("{} does not have the digest in {DIGEST}", database.display()),
                    });
                }
                true
            }
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(error) => return Err(io(&digest, "read")(error)),
        };
        let connection = SqliteCatalog::connect(&database)?;
        let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if found > SCHEMA {
            return Err(CatalogError::TooNew { path: database, found, known: SCHEMA });
        }
        if !clean {
            let verdict: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
            if verdict != "ok" {
                return Err(CatalogError::Row { table: "all", reason: verdict });
            }
        }
        Ok(clean)
    }

    /// Moves the database, its log and its digest to names that are free.
    fn move_aside(folder: &Path) -> Result<(), CatalogError> {
        let number = (1u32..).find(|n| !folder.join(format!("catalog.damaged-{n}")).exists()).unwrap_or(0);
        for (name, end) in
            [(DATABASE, ""), ("catalog.db-wal", "-wal"), ("catalog.db-shm", "-shm"), (DIGEST, "-digest")]
        {
            let from = folder.join(name);
            match fs::rename(&from, folder.join(format!("catalog.damaged-{number}{end}"))) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(io(&from, "move aside")(error)),
            }
        }
        sync_folder(folder)
    }

    /// Rows of the last intact export, put in; `None` if there is no such export.
    fn salvage(&self) -> Result<Option<u64>, CatalogError> {
        let Some(Ok(rest)) = intact_export(&self.folder) else { return Ok(None) };
        let mut rows = 0;
        self.write(|connection| {
            for line in rest.lines() {
                match serde_json::from_str(line) {
                    Ok(History::Job(job)) => put_job(connection, &job)?,
                    Ok(History::Log(log)) => put_log(connection, &log)?,
                    Ok(History::Alert(alert)) => put_alert(connection, &alert).map(|_| ())?,
                    Ok(History::Session(session)) => put_session(connection, &session)?,
                    Err(error) => {
                        return Err(CatalogError::Row { table: "history.export", reason: error.to_string() });
                    }
                }
                rows += 1;
            }
            Ok(())
        })?;
        Ok(Some(rows))
    }

    fn locked(&self) -> Result<MutexGuard<'_, Option<Connection>>, CatalogError> {
        self.connection.lock().map_err(|_| CatalogError::Poisoned)
    }

    fn read<T>(&self, work: impl FnOnce(&Connection) -> Result<T, CatalogError>) -> Result<T, CatalogError> {
        work(self.locked()?.as_ref().ok_or(CatalogError::Poisoned)?)
    }

    fn write<T>(&self, work: impl FnOnce(&Connection) -> Result<T, CatalogError>) -> Result<T, CatalogError> {
        let mut held = self.locked()?;
        let transaction = held.as_mut().ok_or(CatalogError::Poisoned)?.transaction()?;
        let answer = work(&transaction)?;
        transaction.commit()?;
        Ok(answer)
    }

    /// Exports history, empties the write-ahead log, writes the digest. Dropping does the same and hides the error.
    pub fn close(self) -> Result<(), CatalogError> {
        self.end()
    }

    /// Whether the export is missing, a day behind the database, or costs nothing.
    fn is_export_due(&self) -> bool {
        let database = fs::metadata(self.folder.join(DATABASE));
        let export = fs::metadata(self.folder.join(EXPORT));
        let (Ok(database), Ok(export)) = (database, export) else { return true };
        let age = database
            .modified()
            .and_then(|newer| Ok(newer.duration_since(export.modified()?)))
            .map(|age| age.unwrap_or_default());
        database.len() < SMALL || age.is_ok_and(|age| age >= EXPORT_AGE)
    }

    fn end(&self) -> Result<(), CatalogError> {
        if self.locked()?.is_none() {
            return Ok(());
        }
        if self.is_export_due() {
            self.export_history()?;
        }
        let Some(connection) = self.locked()?.take() else { return Ok(()) };
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
        connection.close().map_err(|(_, error)| error)?;
        let digest = digest_of(&self.folder.join(DATABASE))?;
        replace_file(&self.folder, DIGEST, digest.as_bytes())
    }
}

/// A long history is exported once a day, not at the end of every command.
const EXPORT_AGE: std::time::Duration = std::time::Duration::from_secs(86_400);
/// A database of fewer bytes is exported at every clean close.
const SMALL: u64 = 1 << 20;

impl Drop for SqliteCatalog {
    fn drop(&mut self) {
        // Without a digest the next start checks more; nothing is lost.
        let _ = self.end();
    }
}

/// Writes a derived file beside its place and moves it there, durably.
fn replace_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), CatalogError> {
    let path = folder.join(name);
    let new = folder.join(format!("{name}.new"));
    let mut file = File::create(&new).map_err(io(&new, "write"))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io(&new, "write"))?;
    fs::rename(&new, &path).map_err(io(&path, "write"))?;
    sync_folder(folder)
}

fn schema() -> String {
    let mut text = String::from("BEGIN;");
    for table in Table::ALL {
        let name = table.name();
        text.push_str(&format!(
            "CREATE TABLE IF NOT EXISTS {name} (key TEXT PRIMARY KEY, owner TEXT NOT NULL, ord INTEGER NOT NULL, \
             json TEXT NOT NULL) STRICT, WITHOUT ROWID;\
             CREATE INDEX IF NOT EXISTS {name}_order ON {name} (ord, key);\
             CREATE INDEX IF NOT EXISTS {name}_owner ON {name} (owner, ord, key);"
        ));
    }
    text.push_str(
        "CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, created INTEGER NOT NULL, state TEXT NOT NULL, \
         datasource TEXT NOT NULL, json TEXT NOT NULL) STRICT, WITHOUT ROWID;\
         CREATE INDEX IF NOT EXISTS jobs_created ON jobs (created, id);\
         CREATE INDEX IF NOT EXISTS jobs_state ON jobs (state, created, id);\
         CREATE TABLE IF NOT EXISTS logs (job TEXT NOT NULL, line INTEGER NOT NULL, time INTEGER NOT NULL, \
         level TEXT NOT NULL, message TEXT NOT NULL, PRIMARY KEY (job, line)) STRICT, WITHOUT ROWID;\
         CREATE TABLE IF NOT EXISTS alerts (number INTEGER PRIMARY KEY, acknowledged INTEGER NOT NULL, \
         json TEXT NOT NULL) STRICT;\
         CREATE INDEX IF NOT EXISTS alerts_open ON alerts (acknowledged, number);\
         CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, json TEXT NOT NULL) STRICT, WITHOUT ROWID;",
    );
    text.push_str(&format!("PRAGMA user_version={SCHEMA}; COMMIT;"));
    text
}

fn put_row(connection: &Connection, table: Table, row: &Row) -> Result<(), CatalogError> {
    connection
        .prepare_cached(&format!("INSERT OR REPLACE INTO {} VALUES (?1, ?2, ?3, ?4)", table.name()))?
        .execute(params![row.key, row.owner, signed(row.order), row.json])?;
    Ok(())
}

fn put_job(connection: &Connection, job: &JobRow) -> Result<(), CatalogError> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO jobs VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![job.id, signed(job.created), job.state, job.datasource, job.json])?;
    Ok(())
}

fn put_log(connection: &Connection, log: &LogRow) -> Result<(), CatalogError> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO logs VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![log.job, signed(log.line), signed(log.time), log.level, log.message])?;
    Ok(())
}

fn put_alert(connection: &Connection, alert: &AlertRow) -> Result<u64, CatalogError> {
    let number = (alert.number > 0).then(|| signed(alert.number));
    connection.prepare_cached("INSERT OR REPLACE INTO alerts VALUES (?1, ?2, ?3)")?.execute(params![
        number,
        alert.acknowledged,
        alert.json
    ])?;
    Ok(number.map_or_else(|| unsigned(connection.last_insert_rowid()), unsigned))
}

fn put_session(connection: &Connection, session: &SessionRow) -> Result<(), CatalogError> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO sessions VALUES (?1, ?2)")?
        .execute(params![session.id, session.json])?;
    Ok(())
}

fn row_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    Ok(Row { key: row.get(0)?, owner: row.get(1)?, order: unsigned(row.get(2)?), json: row.get(3)? })
}

fn job_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<JobRow> {
    let created = unsigned(row.get(1)?);
    Ok(JobRow { id: row.get(0)?, created, state: row.get(2)?, datasource: row.get(3)?, json: row.get(4)? })
}

fn log_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<LogRow> {
    let (line, time) = (unsigned(row.get(1)?), unsigned(row.get(2)?));
    Ok(LogRow { job: row.get(0)?, line, time, level: row.get(3)?, message: row.get(4)? })
}

fn alert_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<AlertRow> {
    Ok(AlertRow { number: unsigned(row.get(0)?), acknowledged: row.get(1)?, json: row.get(2)? })
}

fn session_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<SessionRow> {
    Ok(SessionRow { id: row.get(0)?, json: row.get(1)? })
}

fn all<T>(
    connection: &Connection,
    sql: &str,
    values: impl rusqlite::Params,
    read: fn(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, CatalogError> {
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map(values, read)?;
    Ok(rows.collect::<Result<Vec<T>, _>>()?)
}

impl Catalog for SqliteCatalog {
    fn replace_derived(&self, derived: &Derived) -> Result<(), CatalogError> {
        self.update_derived(&Table::ALL, derived)
    }

    fn update_derived(&self, cleared: &[Table], rows: &Derived) -> Result<(), CatalogError> {
        self.write(|connection| {
            for table in cleared {
                connection.execute(&format!("DELETE FROM {}", table.name()), [])?;
            }
            rows.rows.iter().try_for_each(|(table, row)| put_row(connection, *table, row))
        })
    }

    fn put(&self, table: Table, rows: &[Row]) -> Result<(), CatalogError> {
        self.write(|connection| rows.iter().try_for_each(|row| put_row(connection, table, row)))
    }

    fn remove(&self, table: Table, key: &str) -> Result<(), CatalogError> {
        self.write(|connection| {
            connection.execute(&format!("DELETE FROM {} WHERE key = ?1", table.name()), [key])?;
            Ok(())
        })
    }

    fn get(&self, table: Table, key: &str) -> Result<Option<Row>, CatalogError> {
        self.read(|connection| {
            let sql = format!("SELECT key, owner, ord, json FROM {} WHERE key = ?1", table.name());
            Ok(connection.prepare_cached(&sql)?.query_row([key], row_of).optional()?)
        })
    }

    fn list(
        &self,
        table: Table,
        owner: Option<&str>,
        after: Option<(u64, &str)>,
        limit: u32,
    ) -> Result<Rows, CatalogError> {
        let (order, key) = after.map_or((-1, ""), |(order, key)| (signed(order), key));
        self.read(|connection| {
            let name = table.name();
            match owner {
                Some(owner) => all(
                    connection,
                    &format!(
                        "SELECT key, owner, ord, json FROM {name} WHERE owner = ?1 AND (ord, key) > (?2, ?3) \
                         ORDER BY ord, key LIMIT ?4"
                    ),
                    params![owner, order, key, limit],
                    row_of,
                ),
                None => all(
                    connection,
                    &format!(
                        "SELECT key, owner, ord, json FROM {name} WHERE (ord, key) > (?1, ?2) \
                         ORDER BY ord, key LIMIT ?3"
                    ),
                    params![order, key, limit],
                    row_of,
                ),
            }
        })
    }

    fn derived_dump(&self) -> Result<String, CatalogError> {
        self.read(|connection| {
            let mut text = String::new();
            for table in Table::ALL {
                let sql = format!("SELECT key, owner, ord, json FROM {} ORDER BY key", table.name());
                for row in all(connection, &sql, [], row_of)? {
                    let cells = (table.name(), &row.key, &row.owner, row.order, &row.json);
                    let line = serde_json::to_string(&cells).map_err(|error| CatalogError::Row {
                        table: table.name(),
                        reason: error.to_string(),
                    })?;
                    text.push_str(&line);
                    text.push('\n');
                }
            }
            Ok(text)
        })
    }

    fn put_job(&self, job: &JobRow) -> Result<(), CatalogError> {
        self.write(|connection| put_job(connection, job))
    }

    fn job(&self, id: &str) -> Result<Option<JobRow>, CatalogError> {
        self.read(|connection| {
            Ok(connection
                .prepare_cached("SELECT * FROM jobs WHERE id = ?1")?
                .query_row([id], job_of)
                .optional()?)
        })
    }

    fn jobs_with_prefix(&self, prefix: &str) -> Result<Vec<String>, CatalogError> {
        // `~` sorts after every digit and letter of an id.
        let sql = "SELECT id FROM jobs WHERE id >= ?1 AND id < ?1 || '~' ORDER BY id LIMIT 2";
        self.read(|connection| all(connection, sql, [prefix], |row| row.get(0)))
    }

    fn jobs(
        &self,
        filter: Filter,
        before: Option<(u64, &str)>,
        limit: u32,
    ) -> Result<Vec<JobRow>, CatalogError> {
        let (created, id) = before.map_or((i64::MAX, "~"), |(created, id)| (signed(created), id));
        let failed = if filter.failed { "state = 'failed' AND " } else { "" };
        let sql = format!(
            "SELECT * FROM jobs WHERE {failed}created >= ?1 AND (created, id) < (?2, ?3) \
             ORDER BY created DESC, id DESC LIMIT ?4"
        );
        self.read(|connection| {
            all(connection, &sql, params![signed(filter.since), created, id, limit], job_of)
        })
    }

    fn log(&self, job: &str, time: u64, level: &str, message: &str) -> Result<u64, CatalogError> {
        self.write(|connection| {
            let last: i64 = connection
                .prepare_cached("SELECT coalesce(max(line), 0) FROM logs WHERE job = ?1")?
                .query_row([job], |row| row.get(0))?;
            let line = unsigned(last).saturating_add(1);
            let (job, level, message) = (job.to_owned(), level.to_owned(), message.to_owned());
            put_log(connection, &LogRow { job, line, time, level, message })?;
            Ok(line)
        })
    }

    fn log_lines(&self, job: &str, after: u64, limit: u32) -> Result<Vec<LogRow>, CatalogError> {
        let sql = "SELECT * FROM logs WHERE job = ?1 AND line > ?2 ORDER BY line LIMIT ?3";
        self.read(|connection| all(connection, sql, params![job, signed(after), limit], log_of))
    }

    fn put_alert(&self, alert: &AlertRow) -> Result<u64, CatalogError> {
        self.write(|connection| put_alert(connection, alert))
    }

    fn alert(&self, number: u64) -> Result<Option<AlertRow>, CatalogError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT * FROM alerts WHERE number = ?1")?;
            Ok(statement.query_row([signed(number)], alert_of).optional()?)
        })
    }

    fn alerts(&self, every: bool, before: Option<u64>, limit: u32) -> Result<Vec<AlertRow>, CatalogError> {
        let open = if every { "" } else { "acknowledged = 0 AND " };
        let sql = format!("SELECT * FROM alerts WHERE {open}number < ?1 ORDER BY number DESC LIMIT ?2");
        let before = before.map_or(i64::MAX, signed);
        self.read(|connection| all(connection, &sql, params![before, limit], alert_of))
    }

    fn put_session(&self, session: &SessionRow) -> Result<(), CatalogError> {
        self.write(|connection| put_session(connection, session))
    }

    fn sessions(&self) -> Result<Vec<SessionRow>, CatalogError> {
        self.read(|connection| all(connection, "SELECT * FROM sessions ORDER BY id", [], session_of))
    }

    fn export_history(&self) -> Result<(), CatalogError> {
        let rows = self.read(|connection| {
            let mut rows = Vec::new();
            rows.extend(all(connection, "SELECT * FROM jobs", [], job_of)?.into_iter().map(History::Job));
            rows.extend(all(connection, "SELECT * FROM logs", [], log_of)?.into_iter().map(History::Log));
            rows.extend(
                all(connection, "SELECT * FROM alerts", [], alert_of)?.into_iter().map(History::Alert),
            );
            rows.extend(
                all(connection, "SELECT * FROM sessions", [], session_of)?.into_iter().map(History::Session),
            );
            Ok(rows)
        })?;
        let mut text = String::new();
        for row in &rows {
            let line = serde_json::to_string(row)
                .map_err(|error| CatalogError::Row { table: "history.export", reason: error.to_string() })?;
            text.push_str(&line);
            text.push('\n');
        }
        let sealed = format!("{}\n{text}", blake3::hash(text.as_bytes()).to_hex());
        replace_file(&self.folder, EXPORT, sealed.as_bytes())
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
