//! Server and agent in this one process, on a data folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use agent::Host;
use agent::cpu::Restraint;
use cli::program::Say;
use environment::{Clock, FolderFiles, SystemClock, SystemRandomness};
use model::{Code, PoolId, Problem};
use protocol::api::{Job, Progress, RateLimit};
use server::app::{
    App, AppService, Copies, DataFolder, FolderOptions, History, NewPool, NoTokens, Opened, Parts,
};
use storage_pool::Settings;

use crate::deletion::{ChildDeletion, NoDeletion};
use crate::local_host::OnlyThisMachine;
use crate::world::{machine_name, world_of};

/// How long `--wait` waits between two tries.
const RETRY: Duration = Duration::from_millis(200);
/// After so many bytes a look at a folder tells how far it is.
const SHOWN_BYTES: u64 = 64 << 20;

/// Settings of a new pool: the safe defaults, changed only where somebody said so.
pub fn settings(create: &cli::program::PoolCreation) -> NewPool {
    let default = Settings::default();
    NewPool {
        settings: Settings {
            soft_delete: create.soft_delete_seconds.unwrap_or(default.soft_delete),
            reclaim_hold: create.reclaim_hold_seconds.unwrap_or(default.reclaim_hold),
            floor_points: create.floor_points.unwrap_or(default.floor_points),
            floor_age: create.floor_seconds.unwrap_or(default.floor_age),
            // Whoever holds nothing back has chosen to: the breaker would only stand in the way of tests.
            breaker_percent: if create.soft_delete_seconds == Some(0)
                && create.reclaim_hold_seconds == Some(0)
            {
                100
            } else {
                default.breaker_percent
            },
            zstd_level: default.zstd_level,
            reserve: create.reserve_bytes,
            parity_percent: create.parity_percent.unwrap_or(default.parity_percent),
        },
        kit: create.recovery_kit.clone(),
    }
}

/// A data folder opened in this process.
pub struct Running {
    /// The server.
    pub app: Arc<App>,
    /// The kit that was written, if the pool was made just now.
    pub created_kit: Option<PathBuf>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.app.runner().stop();
        self.app.close();
    }
}

/// Opens a data folder, or makes it.
pub fn open(
    root: &Path,
    create: Option<NewPool>,
    pool: Option<PoolId>,
    writes: bool,
    wait: bool,
    accepts_older_pool: bool,
    restraint: Restraint,
) -> Result<Running, Problem> {
    let folder = DataFolder::new(root);
    let world = world_of(Arc::new(FolderFiles::new(folder.pool())));
    let options = FolderOptions { create, pool, writes };
    let name = machine_name();
    let opened = loop {
        match folder.open(&world, &options, &name) {
            Err(problem) if wait && problem.code == Code::PoolBusy => SystemClock.sleep(RETRY),
            other => break other?,
        }
    };
    if accepts_older_pool && writes && History::is_ahead(&folder.catalog(), &opened.pool)? {
        History::accept(&folder.catalog(), &opened.pool)?;
        eprintln!(
            "warning: the pool is older than it was and is taken as it is now; every machine is read in full next time."
        );
    }
    start(folder, opened, writes, restraint)
}

/// Puts a server together over an opened folder.
fn start(folder: DataFolder, opened: Opened, writes: bool, restraint: Restraint) -> Result<Running, Problem> {
    let clock = Arc::new(SystemClock);
    let randomness = Arc::new(SystemRandomness);
    let child = Arc::new(ChildDeletion::when_needed(&folder.root));
    let deletion: Arc<dyn storage_pool::reclaim::DeletionService + Send + Sync> =
        if writes { child.clone() } else { Arc::new(NoDeletion) };
    let (history, said) = History::open(&folder.catalog(), &opened.pool, writes)?;
    let app = App::new(Parts {
        folder,
        pool: opened.pool,
        hosts: Arc::new(OnlyThisMachine::new(Arc::new(
            Host::new(clock.clone(), randomness.clone())
                .restrained(restraint)
                .with_libvirt(crate::world::libvirt()),
        ))),
        tokens: Arc::new(NoTokens),
        deletion,
        copies: Copies { folders: Vec::new(), deletion: child },
        history: Arc::new(history),
        clock,
        randomness,
    });
    for line in opened.damage.iter().map(describe).chain(said) {
        eprintln!("warning: {line}");
    }
    Ok(Running { app, created_kit: opened.created_kit })
}

/// The folder with the pool's files. Both it and a data folder around it are understood: this is no time for fine points.
fn pool_folder(pool: &Path) -> std::path::PathBuf {
    let inside = pool.join("pool");
    if !pool.join("pool.stillpoint").exists() && inside.join("pool.stillpoint").exists() {
        inside
    } else {
        pool.to_owned()
    }
}

/// Hashes the files of a pool without any key; Ctrl-C ends it.
pub fn verify_folder(pool: &Path, limit: Option<RateLimit>, say: &dyn Say) -> Result<Job, Problem> {
    let files: Arc<dyn environment::Files> = Arc::new(FolderFiles::new(pool_folder(pool)));
    let mut last = 0;
    let mut progress = |done: u64, total: u64| {
        if done - last >= SHOWN_BYTES {
            last = done;
            say.progress(&Progress {
                phase: "verifying".to_owned(),
                bytes_done: done,
                bytes_total: Some(total),
                ..Progress::default()
            });
        }
        !say.cancelled().load(Ordering::SeqCst)
    };
    server::app::verify_folder(&files, limit, Arc::new(SystemClock), &SystemRandomness, &mut progress)
}

/// A pool alone, for recovery with a kit: nothing is written anywhere.
pub fn break_glass(pool: &Path, kit_path: &Path) -> Result<Running, Problem> {
    let kit = server::app::open_kit(kit_path)?;
    let root = pool_folder(pool);
    let world = world_of(Arc::new(FolderFiles::new(&root)));
    let opened =
        storage_pool::Pool::open(world, &kit.recipient, storage_pool::Access::Read).map_err(|error| {
            let problem = jobs::problem::pool(error);
            match problem.code {
                Code::DataFolderMissing => problem.hint("Give the folder that holds pool.stillpoint."),
                // Here the kit is what was chosen, and it is the wrong one.
                Code::OtherPool => Problem::new(
                    Code::KeyWrong,
                    format!(
                        "{}: the recovery kit is of another pool: {}",
                        kit_path.display(),
                        problem.message
                    ),
                )
                .about(kit_path.display().to_string()),
                _ => problem,
            }
        })?;
    if let Some(damage) = &kit.damage {
        eprintln!("warning: the recovery kit is damaged but still serves: {damage}");
    }
    let damage = opened.notes().to_vec();
    start(
        DataFolder::new(root),
        Opened { pool: Arc::new(opened), recipient: kit.recipient, created_kit: None, damage },
        false,
        Restraint::default(),
    )
}

/// A damage in words.
pub fn describe(damage: &storage_pool::Damage) -> String {
    match damage {
        storage_pool::Damage::File { path, offset, reason, derived: true } => {
            format!("{path}: byte {offset}: {reason}; it is made again.")
        }
        storage_pool::Damage::File { path, offset, reason, derived: false } => {
            format!("{path}: byte {offset}: {reason}.")
        }
        storage_pool::Damage::Point { point, machine, disk, range, reason } => {
            format!(
                "point {point} of {machine}: disk {disk}: bytes {}..{}: {reason}.",
                range.start, range.end
            )
        }
    }
}

/// The API of a running server.
pub fn service(running: &Running) -> Arc<AppService> {
    Arc::new(AppService(running.app.clone()))
}
