//! The commands of this host: which run, and the results that the server has not taken yet.

use model::{Code, Problem};
use protocol::v0::{self, agent_message, result};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// Commands that run at once, each on a thread of its own.
const RUNNING: usize = 256;

#[derive(Default)]
struct Book {
    running: BTreeSet<u64>,
    /// Results that the server has not taken yet.
    finished: BTreeMap<u64, v0::Result>,
    out: Option<mpsc::UnboundedSender<v0::AgentMessage>>,
}

/// The commands of this run of the agent. They outlive sessions.
#[derive(Default)]
pub(super) struct Commands {
    book: Mutex<Book>,
}

impl Commands {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message, if there is a session.
    pub(super) fn tell(&self, kind: agent_message::Kind) {
        if let Some(out) = &self.book().out {
            let _ = out.send(v0::AgentMessage { kind: Some(kind) });
        }
    }

    pub(super) fn open(&self) -> Vec<u64> {
        let book = self.book();
        book.running.iter().chain(book.finished.keys()).copied().collect()
    }

    /// The session `out` began: what was finished meanwhile is delivered.
    pub(super) fn attach(&self, out: mpsc::UnboundedSender<v0::AgentMessage>) {
        let mut book = self.book();
        for result in book.finished.values() {
            let _ = out.send(v0::AgentMessage { kind: Some(agent_message::Kind::Result(result.clone())) });
        }
        book.out = Some(out);
    }

    pub(super) fn detach(&self) {
        self.book().out = None;
    }

    /// Whether the command is new and may run.
    pub(super) fn begin(&self, id: u64) -> Result<bool, Problem> {
        let mut book = self.book();
        if book.running.contains(&id) || book.finished.contains_key(&id) {
            return Ok(false);
        }
        if book.running.len() >= RUNNING {
            return Err(Problem::new(
                Code::SourceBusy,
                format!("{RUNNING} commands run on this host already."),
            ));
        }
        Ok(book.running.insert(id))
    }

    pub(super) fn finish(&self, id: u64, outcome: Result<String, Problem>) {
        let outcome = Some(match outcome {
            Ok(json) => result::Outcome::Ok(json),
            Err(problem) => result::Outcome::Problem((&problem).into()),
        });
        let result = v0::Result { id, outcome };
        let mut book = self.book();
        book.running.remove(&id);
        book.finished.insert(id, result.clone());
        drop(book);
        self.tell(agent_message::Kind::Result(result));
    }

    /// The server has the result.
    pub(super) fn taken(&self, id: u64) {
        self.book().finished.remove(&id);
    }
}
