//! The moment of a checkpoint: how a running machine stands still for it, and what proves that it did.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use model::{Consistency, DatasourceId, Unfrozen};

use super::Settings;
use super::guard::{Act, Guard, Watch, release};
use super::rpc::{Connection, Domain, LibvirtError, State};
use crate::FreezeRequest;

/// Whether the machine stood still over the checkpoint, and the words for it.
pub(super) struct Stillness {
    pub(super) consistency: Consistency,
    pub(super) evidence: String,
}

/// What came of it.
pub(super) enum Begun {
    /// The job has begun.
    Still(Stillness),
    /// The file systems could not be frozen, and no other view is wanted. What has begun is to be ended.
    NotFrozen(String),
}

/// A machine about to be given a checkpoint.
pub(super) struct Moment<'a> {
    pub(super) connection: Connection,
    pub(super) domain: &'a Domain,
    pub(super) settings: &'a Settings,
}

fn crash(evidence: String) -> Begun {
    Begun::Still(Stillness { consistency: Consistency::Crash, evidence })
}

impl Moment<'_> {
    fn machine(&self) -> DatasourceId {
        DatasourceId(self.domain.uuid)
    }

    fn renew(&mut self) -> Result<(), LibvirtError> {
        self.connection = self.connection.another()?;
        Ok(())
    }

    /// Begins the job by `start`, with the guest's file systems frozen if they can be.
    pub(super) fn begin(
        &mut self,
        state: State,
        request: &FreezeRequest,
        mut start: impl FnMut(&mut Connection) -> Result<(), LibvirtError>,
    ) -> Result<Begun, LibvirtError> {
        if state == State::Paused {
            start(&mut self.connection)?;
            return Ok(crash("the machine was paused; nothing was written, nothing was flushed".to_owned()));
        }
        match self.connection.agent(self.domain, "{\"execute\":\"guest-fsfreeze-status\"}", 5) {
            Err(error) => {
                // A time limit that passed ends the conversation.
                if error.code().is_none() {
                    self.renew()?;
                }
                let why = format!("no guest agent answers ({error}), so no file system was frozen");
                return self.otherwise(why, request, start);
            }
            // Whoever froze it thaws it.
            Ok(status) if status.contains("frozen") => {
                let why = "somebody else has the file systems frozen already".to_owned();
                return self.otherwise(why, request, start);
            }
            Ok(_) => {}
        }
        let watch = self.watch(Act::Thaw);
        let guard = match self.post(&watch) {
            Ok(guard) => guard,
            Err(why) => return self.otherwise(format!("nothing was frozen: {why}"), request, start),
        };
        let began = Instant::now();
        let frozen = self.connection.freeze(self.domain, self.settings.freeze_limit);
        let started = match &frozen {
            Ok(_) => start(&mut self.connection),
            Err(_) => Ok(()),
        };
        // Thawed whatever happened: also a freeze that seemed to fail may have come about.
        let thawed = self.connection.thaw(self.domain, self.settings.freeze_limit);
        let held = began.elapsed();
        // A freeze without an answer may come about after a thaw; then thawing goes on until it cannot any more.
        let is_answered = match &frozen {
            Ok(_) => true,
            Err(error) => error.code().is_some(),
        };
        let is_thawed = (is_answered && thawed.is_ok()) || release(&watch, is_answered, || false);
        let in_time = end(guard, is_thawed, &watch);
        if !is_thawed {
            return Err(LibvirtError::Lost(
                "file systems of the guest may still be frozen and could not be thawed: thaw them in the guest \
                 (`fsfreeze -u`), or start it anew"
                    .to_owned(),
            ));
        }
        if frozen.is_err() || thawed.is_err() {
            self.renew()?;
        }
        started?;
        let limit = self.settings.freeze_limit.as_secs_f32();
        let (frozen, thawed) = match (frozen, thawed) {
            (Err(error), _) => {
                let why = format!("the freeze of the file systems failed: {error}");
                return self.otherwise(why, request, start);
            }
            (Ok(_), Err(error)) => {
                return Ok(not_held(format!("the freeze is not proved to have held: {error}"), request));
            }
            (Ok(frozen), Ok(thawed)) => (frozen, thawed),
        };
        if in_time && frozen > 0 && thawed >= frozen {
            return Ok(Begun::Still(Stillness {
                consistency: Consistency::File,
                evidence: format!(
                    "the guest agent froze {frozen} file systems for {} ms; the checkpoint was made meanwhile",
                    held.as_millis()
                ),
            }));
        }
        let why = format!(
            "the freeze did not hold: {frozen} file systems were frozen, {thawed} of them still after {} ms (limit {limit} s)",
            held.as_millis()
        );
        Ok(not_held(why, request))
    }

    /// Begins the job without a freeze, as far as that is wanted.
    fn otherwise(
        &mut self,
        why: String,
        request: &FreezeRequest,
        mut start: impl FnMut(&mut Connection) -> Result<(), LibvirtError>,
    ) -> Result<Begun, LibvirtError> {
        if request.may_retry {
            return Ok(Begun::NotFrozen(why));
        }
        match request.unfrozen {
            Unfrozen::Fail => Ok(Begun::NotFrozen(why)),
            Unfrozen::Crash => {
                start(&mut self.connection)?;
                Ok(crash(why))
            }
            Unfrozen::Pause => self.paused(&why, start),
        }
    }

    /// Begins the job with the processors standing still: all disks of one moment, nothing of the guest's memory on them (S24).
    fn paused(
        &mut self,
        why: &str,
        mut start: impl FnMut(&mut Connection) -> Result<(), LibvirtError>,
    ) -> Result<Begun, LibvirtError> {
        let watch = self.watch(Act::Resume);
        let guard = match self.post(&watch) {
            Ok(guard) => guard,
            Err(reason) => {
                start(&mut self.connection)?;
                return Ok(crash(format!("{why}; it was not paused either: {reason}")));
            }
        };
        let limit = Duration::from_secs(10);
        let began = Instant::now();
        let paused = self.connection.suspend(self.domain, limit);
        let started = match &paused {
            Ok(()) => start(&mut self.connection),
            Err(_) => Ok(()),
        };
        let resumed = self.connection.resume(self.domain, limit);
        let downtime = began.elapsed();
        let is_answered = paused.is_ok() || paused.as_ref().is_err_and(|error| error.code().is_some());
        let goes_on = resumed.is_ok() || release(&watch, is_answered, || false);
        end(guard, goes_on, &watch);
        if !goes_on {
            return Err(LibvirtError::Lost(
                "the machine was paused for its checkpoint and could not be resumed: `virsh resume` it"
                    .to_owned(),
            ));
        }
        if paused.is_err() || resumed.is_err() {
            self.renew()?;
        }
        started?;
        if let Err(error) = paused {
            start(&mut self.connection)?;
            return Ok(crash(format!("{why}; it could not be paused either: {error}")));
        }
        Ok(crash(format!("{why}; the machine was paused for {} ms for the checkpoint", downtime.as_millis())))
    }

    fn watch(&self, act: Act) -> Watch {
        Watch {
            act,
            socket: self.settings.socket.clone(),
            machine: self.machine(),
            limit: self.settings.freeze_limit,
            note: note(self.settings, self.machine(), act),
        }
    }

    /// Leaves a note and posts a guard before anything stands still.
    fn post(&self, watch: &Watch) -> Result<Guard, String> {
        std::fs::create_dir_all(&self.settings.notes)
            .and_then(|()| std::fs::write(&watch.note, b""))
            .map_err(|error| {
                format!("no note of it could be left in {}: {error}", self.settings.notes.display())
            })?;
        Guard::post(watch, self.settings.program.as_deref()).map_err(|error| {
            // Nothing stands still, so nothing may say so.
            let _ = std::fs::remove_file(&watch.note);
            error.to_string()
        })
    }
}

/// The note that says that a machine may stand still.
pub(super) fn note(settings: &Settings, machine: DatasourceId, act: Act) -> PathBuf {
    settings.notes.join(format!("{}-{machine}", act.state()))
}

/// A freeze that may have ended too soon is none.
fn not_held(why: String, request: &FreezeRequest) -> Begun {
    match request.may_retry || request.unfrozen == Unfrozen::Fail {
        true => Begun::NotFrozen(why),
        false => crash(why),
    }
}

/// Lets the guard go if nothing stands still any more; true if that was in time.
fn end(guard: Guard, goes_on: bool, watch: &Watch) -> bool {
    if !goes_on {
        drop(guard);
        return false;
    }
    let _ = std::fs::remove_file(&watch.note);
    guard.dismiss()
}
