//! The deletion service: a process of its own, the only one that unlinks anything of a pool (INV-15).
//!
//! It is this same program under a word that no user types. It is started before the writer gives up the right to
//! remove, waits on its standard input, and ends when that is closed. For each line
//! `{"permit":N|null,"runs":[..],"ballast":false}` it
//! reads the permit from the pool by itself, unlinks exactly what that names, and answers with a line: empty for done, or
//! why not. Told nothing but numbers, it cannot be talked into more. `"copy":"DIR"` names a copy of the pool instead: there
//! too it is the sealed records, opened with the pool's own key, that say what may go.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use environment::FolderFiles;
use model::{Code, Problem};
use serde::{Deserialize, Serialize};
use server::app::{CopyDeletion, DataFolder, read_secret};
use storage_pool::PoolError;
use storage_pool::deletion::{DeletionService, give_up_ballast, run_deletion_service};

/// The first argument of a deletion service; the second is the data folder.
pub const WORD: &str = "__deletion-service";

#[derive(Serialize, Deserialize)]
struct Order {
    permit: Option<u64>,
    runs: Vec<u64>,
    /// Only the ballast goes.
    #[serde(default)]
    ballast: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    copy: Option<PathBuf>,
}

/// The process.
pub fn main() -> ExitCode {
    let Some(root) = std::env::args_os().nth(2).map(PathBuf::from) else { return ExitCode::from(2) };
    let mut answers = std::io::stdout();
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let answer = match carry_out(&root, &line) {
            Ok(()) => String::new(),
            Err(reason) => reason.replace('\n', " "),
        };
        if writeln!(answers, "{answer}").and_then(|()| answers.flush()).is_err() {
            break;
        }
    }
    ExitCode::SUCCESS
}

fn carry_out(root: &Path, line: &str) -> Result<(), String> {
    let order: Order = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let (recipient, _, _) = read_secret(root).map_err(|problem| problem.message)?;
    let folder = order.copy.unwrap_or_else(|| DataFolder::new(root).pool());
    let files = Arc::new(FolderFiles::new(folder));
    if order.ballast {
        return give_up_ballast(&*files).map_err(|error| error.to_string());
    }
    let world = crate::world::world_of(files.clone());
    run_deletion_service(&world, &*files, &recipient, order.permit, &order.runs)
        .map_err(|error| error.to_string())
}

struct Running {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// A running deletion service, as the writer talks to it.
pub struct ChildDeletion {
    root: PathBuf,
    running: Mutex<Option<Running>>,
}

impl ChildDeletion {
    /// The service of a data folder, started when there is something to remove: for a process that keeps its rights.
    pub fn when_needed(root: &Path) -> ChildDeletion {
        ChildDeletion { root: root.to_owned(), running: Mutex::new(None) }
    }

    /// Starts the service of a data folder now: for a process that is about to give up the right to remove.
    pub fn start(root: &Path) -> Result<ChildDeletion, Problem> {
        let running = Running::start(root).map_err(|error| {
            Problem::new(Code::Internal, format!("The deletion service cannot be started: {error}."))
        })?;
        Ok(ChildDeletion { root: root.to_owned(), running: Mutex::new(Some(running)) })
    }
}

impl Running {
    fn start(root: &Path) -> std::io::Result<Running> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(WORD)
            .arg(root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (orders, answers) = (child.stdin.take(), child.stdout.take());
        let answers = answers.ok_or_else(|| std::io::Error::other("no pipe"))?;
        Ok(Running { child, orders, answers: BufReader::new(answers) })
    }
}

impl DeletionService for ChildDeletion {
    fn carry_out(&self, permit: Option<u64>, runs: &[u64]) -> Result<(), PoolError> {
        self.order(&Order { permit, runs: runs.to_vec(), ballast: false, copy: None })
    }

    fn give_up_ballast(&self) -> Result<(), PoolError> {
        self.order(&Order { permit: None, runs: Vec::new(), ballast: true, copy: None })
    }
}

impl CopyDeletion for ChildDeletion {
    fn carry_out_in(&self, folder: &Path, permit: Option<u64>) -> Result<(), PoolError> {
        let copy = Some(folder.to_owned());
        self.order(&Order { permit, runs: Vec::new(), ballast: false, copy })
    }
}

impl ChildDeletion {
    fn order(&self, order: &Order) -> Result<(), PoolError> {
        let failed = |source: std::io::Error| PoolError::Io {
            path: "the deletion service".to_owned(),
            action: "reach",
            source,
        };
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let running = match &mut *running {
            Some(running) => running,
            none => none.insert(Running::start(&self.root).map_err(failed)?),
        };
        let line = serde_json::to_string(order).map_err(|error| failed(std::io::Error::other(error)))?;
        let orders = running.orders.as_mut().ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
        writeln!(orders, "{line}").and_then(|()| orders.flush()).map_err(failed)?;
        let mut answer = String::new();
        if running.answers.read_line(&mut answer).map_err(failed)? == 0 {
            return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
        }
        match answer.trim() {
            "" => Ok(()),
            reason => Err(PoolError::Misuse(format!("the deletion service refused: {reason}"))),
        }
    }
}

impl Drop for ChildDeletion {
    fn drop(&mut self) {
        if let Some(running) = self.running.get_mut().unwrap_or_else(PoisonError::into_inner) {
            running.orders = None;
            let _ = running.child.wait();
        }
    }
}

/// For processes that never reclaim.
pub struct NoDeletion;

impl DeletionService for NoDeletion {
    fn carry_out(&self, _permit: Option<u64>, _runs: &[u64]) -> Result<(), PoolError> {
        Err(PoolError::ReadOnly)
    }
}

/// Takes from this thread, and every one it starts later, the right to remove or truncate anything outside `allowed`.
/// Returns whether the kernel enforces it; where it cannot, the caller says so.
///
/// For a server on the network, which has no other business with files. Standalone the agent shares the process and
/// must remove its own scratch files wherever images lie, so there the separate process is the only wall.
#[cfg(target_os = "linux")]
pub fn give_up_removal(allowed: &[PathBuf]) -> bool {
    use landlock::{
        ABI, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    };
    let removal =
        AccessFs::RemoveFile | AccessFs::RemoveDir | (AccessFs::from_write(ABI::V3) & AccessFs::Truncate);
    let restrict = || -> Result<bool, landlock::RulesetError> {
        let mut rules = Ruleset::default().handle_access(removal)?.create()?;
        for path in allowed {
            // A folder that is not there yet needs no right.
            if let Ok(fd) = PathFd::new(path) {
                rules = rules.add_rule(PathBeneath::new(fd, removal))?;
            }
        }
        Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
    };
    restrict().unwrap_or(false)
}

/// Not on this system.
#[cfg(not(target_os = "linux"))]
pub fn give_up_removal(_allowed: &[PathBuf]) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// INV-15: whoever gave the right up cannot remove, rename away or cut a file of the pool; only what was left to
    /// it. The restriction is a thread's, so the test's own thread keeps its rights.
    #[test]
    fn who_gave_up_removal_cannot_remove() {
        let folder = tempfile::tempdir().unwrap();
        let (pool, scratch) = (folder.path().join("pool"), folder.path().join("scratch"));
        std::fs::create_dir_all(&pool).unwrap();
        std::fs::create_dir_all(&scratch).unwrap();
        std::fs::write(pool.join("pack"), b"bytes").unwrap();
        std::fs::write(scratch.join("file"), b"bytes").unwrap();
        let (inside, outside) = (pool.clone(), scratch.clone());
        let enforced = std::thread::spawn(move || {
            if !give_up_removal(std::slice::from_ref(&outside)) {
                return false;
            }
            assert!(std::fs::remove_file(inside.join("pack")).is_err(), "a pack was removed");
            assert!(
                std::fs::rename(inside.join("pack"), outside.join("pack")).is_err(),
                "a pack was moved away"
            );
            assert!(std::fs::File::create(inside.join("pack")).is_err(), "a pack was cut");
            assert!(std::fs::remove_dir_all(&inside).is_err(), "the pool was removed");
            std::fs::write(inside.join("new"), b"a new file is fine").unwrap();
            std::fs::remove_file(outside.join("file")).unwrap();
            true
        })
        .join()
        .unwrap();
        if enforced {
            assert_eq!(std::fs::read(pool.join("pack")).unwrap(), b"bytes");
        } else {
            // The server says so at its start; there is nothing to prove on this kernel.
            eprintln!("this kernel has no Landlock");
        }
    }
}
