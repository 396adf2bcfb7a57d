//! Whoever freezes a guest's file systems has somebody beside him who thaws them: at the limit, and when he is gone.
//!
//! The guard is a process of its own where the program is known (it outlives a kill of the agent), else a thread. Both are told
//! by a pipe: a byte means that all is thawed and the guard may go; the end of the pipe means that the agent died.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use model::DatasourceId;

use super::rpc::{Connection, LibvirtError, State};

/// The hidden subcommand that carries a guard.
pub const SUBCOMMAND: &str = "__thaw-guard";
/// How long one attempt to thaw may take.
const ATTEMPT: Duration = Duration::from_secs(10);
/// For so long a freeze that was not answered may still come about: libvirt lets a call to an agent wait for others for 30 s,
/// and a thaw that was sent later may overtake it.
const LATE: Duration = Duration::from_secs(40);
/// After so many thaws in a row that the agent answered, half a second apart, no freeze waits behind another call any more.
const IN_A_ROW: u32 = 6;

/// What ends a machine's standing still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Its file systems are thawed.
    Thaw,
    /// Its processors go on.
    Resume,
}

impl Act {
    /// The word for what the machine is before.
    pub(super) fn state(self) -> &'static str {
        match self {
            Act::Thaw => "frozen",
            Act::Resume => "paused",
        }
    }
}

/// What a guard needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// What it does at the limit.
    pub act: Act,
    /// libvirt's socket.
    pub socket: PathBuf,
    /// The machine, by its UUID.
    pub machine: DatasourceId,
    /// How long file systems may be frozen.
    pub limit: Duration,
    /// The note that says that they may be frozen; taken away once they are thawed.
    pub note: PathBuf,
}

impl Watch {
    /// As words of a command line.
    pub fn words(&self) -> Vec<std::ffi::OsString> {
        vec![
            SUBCOMMAND.into(),
            self.act.state().into(),
            self.socket.clone().into(),
            self.machine.to_string().into(),
            self.limit.as_millis().to_string().into(),
            self.note.clone().into(),
        ]
    }

    /// From the words after the subcommand.
    pub fn from_words(words: &[std::ffi::OsString]) -> Option<Watch> {
        let [state, socket, machine, limit, note] = words else { return None };
        Some(Watch {
            act: [Act::Thaw, Act::Resume].into_iter().find(|act| state == act.state())?,
            socket: socket.into(),
            machine: machine.to_str()?.parse().ok()?,
            limit: Duration::from_millis(limit.to_str()?.parse().ok()?),
            note: note.into(),
        })
    }
}

/// Stands guard until told to go; thaws at the limit or when the pipe ends. True if it had to.
pub fn stand(watch: &Watch, mut pipe: impl Read + Send + 'static) -> bool {
    let (told, tells) = mpsc::channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        let may_go = matches!(pipe.read(&mut byte), Ok(1));
        // Nobody listens once the limit has passed.
        let _ = told.send(may_go);
    });
    if let Ok(true) = tells.recv_timeout(watch.limit) {
        return false;
    }
    release(watch, false, || matches!(tells.try_recv(), Ok(true)));
    true
}

/// Thaws a machine's file systems until some were thawed, nothing can be frozen any more, or `may_stop` says that somebody else
/// did; then the note goes. False if it could not be done. Where the freeze `is_answered`, nothing can overtake the thaw. A paused
/// machine goes on in the same way.
pub(super) fn release(watch: &Watch, is_answered: bool, may_stop: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    let (mut is_thawed, mut in_a_row) = (false, 0);
    while began.elapsed() < LATE && !may_stop() {
        let thawed = Connection::open(&watch.socket).and_then(|mut connection| {
            match connection.domain(&watch.machine.0)? {
                // A machine that is gone or off has nothing frozen.
                None => Ok(1),
                Some(domain) if domain.id < 0 => Ok(1),
                Some(domain) => match watch.act {
                    Act::Thaw => connection.thaw(&domain, ATTEMPT),
                    Act::Resume if connection.state(&domain)? == State::Paused => {
                        connection.resume(&domain, ATTEMPT).map(|()| 1)
                    }
                    Act::Resume => Ok(0),
                },
            }
        });
        is_thawed = thawed.is_ok();
        in_a_row = if is_thawed { in_a_row + 1 } else { 0 };
        // A machine's state is told at once, also while an order to pause it waits behind another job: that is watched to the end.
        if in_a_row >= IN_A_ROW && watch.act == Act::Thaw {
            break;
        }
        if thawed.is_ok_and(|count| count > 0 || is_answered) {
            break;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    if is_thawed || may_stop() {
        // A note that stays is looked at again by the next sweep.
        let _ = std::fs::remove_file(&watch.note);
        return true;
    }
    false
}

enum Carrier {
    Process(Child),
    Thread,
}

/// A guard at work.
pub(super) struct Guard {
    carrier: Carrier,
    pipe: Option<Box<dyn Write + Send>>,
    began: Instant,
    limit: Duration,
}

impl Guard {
    /// Posts a guard. `program` is this program, where it has the subcommand.
    pub(super) fn post(watch: &Watch, program: Option<&Path>) -> Result<Guard, LibvirtError> {
        let failed = |error: std::io::Error| LibvirtError::Lost(format!("no guard for the thaw: {error}"));
        let (carrier, pipe): (Carrier, Box<dyn Write + Send>) = match program {
            Some(program) => {
                let mut child = Command::new(program)
                    .args(watch.words())
                    // A hang-up or an interrupt of the agent's terminal is none of the guard's.
                    .process_group(0)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .map_err(failed)?;
                let pipe = child.stdin.take();
                let pipe = pipe.ok_or_else(|| LibvirtError::Lost("the guard has no pipe".to_owned()))?;
                (Carrier::Process(child), Box::new(pipe))
            }
            None => {
                let (near, far) = UnixStream::pair().map_err(failed)?;
                let watch = watch.clone();
                std::thread::spawn(move || stand(&watch, far));
                (Carrier::Thread, Box::new(near))
            }
        };
        Ok(Guard { carrier, pipe: Some(pipe), began: Instant::now(), limit: watch.limit })
    }

    /// Lets the guard go: everything is thawed. False if it was too late.
    pub(super) fn dismiss(mut self) -> bool {
        let in_time = self.began.elapsed() < self.limit;
        let told =
            self.pipe.take().is_some_and(|mut pipe| pipe.write_all(&[1]).and_then(|()| pipe.flush()).is_ok());
        if let Carrier::Process(child) = &mut self.carrier {
            // It ends by itself: at once, or when it has thawed.
            let _ = child.wait();
        }
        in_time && told
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The end of the pipe makes the guard thaw; then it must have ended before anybody goes on.
        if self.pipe.take().is_some()
            && let Carrier::Process(child) = &mut self.carrier
        {
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_travels_as_words() {
        let watch = Watch {
            act: Act::Thaw,
            socket: "/run/libvirt/libvirt-sock".into(),
            machine: DatasourceId(*b"0123456789abcdef"),
            limit: Duration::from_millis(3000),
            note: "/run/stillpoint/frozen".into(),
        };
        let words = watch.words();
        assert_eq!(words[0], SUBCOMMAND);
        assert_eq!(Watch::from_words(&words[1..]), Some(watch));
        assert_eq!(Watch::from_words(&words), None);
        let wrong: Vec<std::ffi::OsString> = ["s", "zz", "1", "n"].map(Into::into).to_vec();
        assert_eq!(Watch::from_words(&wrong), None);
    }

    #[test]
    fn a_guard_that_is_told_does_nothing() {
        let watch = Watch {
            act: Act::Thaw,
            socket: "/nonexistent".into(),
            machine: DatasourceId([0; 16]),
            limit: Duration::from_secs(60),
            note: "/nonexistent".into(),
        };
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&[1]).unwrap();
        assert!(!stand(&watch, far));
        assert!(Guard::post(&watch, None).unwrap().dismiss());
    }
}
