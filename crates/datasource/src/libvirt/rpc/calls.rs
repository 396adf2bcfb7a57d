//! The calls that are used, with their numbers.

use std::path::PathBuf;
use std::time::Duration;

use crate::libvirt::definition;

use super::xdr::{Reader, Writer};
use super::{ANSWER, CHANGE, Connection, LibvirtError, QEMU, REMOTE, WAIT};

/// A machine, as libvirt names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::libvirt) struct Domain {
    pub(in crate::libvirt) name: String,
    pub(in crate::libvirt) uuid: [u8; 16],
    /// Number of its running process; -1 if there is none.
    pub(in crate::libvirt) id: i32,
}

/// `virDomainState`, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::libvirt) enum State {
    /// Its processors run (or wait for something).
    Running,
    /// It has a process, and its processors stand still.
    Paused,
    /// It has no process.
    Off,
}

/// A checkpoint's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::libvirt) struct Checkpoint(pub(in crate::libvirt) String);

/// Which definition of a machine is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::libvirt) enum Kept {
    /// What it will be when it starts the next time.
    NextStart,
    /// What it is, as another host could take it over.
    Running,
}

/// Bytes of a disk as libvirt counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::libvirt) struct BlockInfo {
    /// Bytes that the guest sees.
    pub(in crate::libvirt) capacity: u64,
}

fn put(domain: &Domain) -> Writer {
    Writer::new().string(&domain.name).fixed(&domain.uuid).i32(domain.id)
}

fn get(reader: &mut Reader<'_>) -> Result<Domain, LibvirtError> {
    Ok(Domain {
        name: reader.string("machine name")?,
        uuid: reader.fixed("machine UUID")?,
        id: reader.i32("machine id")?,
    })
}

impl Connection {
    pub(super) fn authenticate(&mut self) -> Result<(), LibvirtError> {
        let answer = self.call((REMOTE, 66, "auth list"), Writer::new(), ANSWER)?;
        let mut reader = Reader::new(&answer);
        let mut kinds = Vec::new();
        for _ in 0..reader.count(4, "kinds of authentication")? {
            kinds.push(reader.i32("kind of authentication")?);
        }
        // 0 none, 1 SASL, 2 polkit; polkit lets root through without a question.
        if kinds.contains(&0) {
            return Ok(());
        }
        if kinds.contains(&2) {
            return self.call((REMOTE, 70, "auth polkit"), Writer::new(), ANSWER).map(drop);
        }
        Err(LibvirtError::Protocol(format!(
            "the socket asks for authentication of kind {kinds:?}; none (0) and polkit (2) are known here"
        )))
    }

    pub(super) fn open_driver(&mut self, uri: &str) -> Result<(), LibvirtError> {
        let arguments = Writer::new().optional(Some(uri)).u32(0);
        self.call((REMOTE, 1, "open"), arguments, ANSWER).map(drop)
    }

    /// All machines, running or not.
    pub(in crate::libvirt) fn domains(&mut self) -> Result<Vec<Domain>, LibvirtError> {
        let answer = self.call((REMOTE, 273, "list of machines"), Writer::new().i32(1).u32(0), ANSWER)?;
        let mut reader = Reader::new(&answer);
        (0..reader.count(24, "machines")?).map(|_| get(&mut reader)).collect()
    }

    /// The machine of this UUID, if the host has it.
    pub(in crate::libvirt) fn domain(&mut self, uuid: &[u8; 16]) -> Result<Option<Domain>, LibvirtError> {
        match self.call((REMOTE, 24, "look-up by UUID"), Writer::new().fixed(uuid), ANSWER) {
            Ok(answer) => get(&mut Reader::new(&answer)).map(Some),
            Err(error) if error.code() == Some(LibvirtError::NO_DOMAIN) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Its definition: of the running machine, or with `inactive` of the next start.
    pub(in crate::libvirt) fn definition(
        &mut self,
        domain: &Domain,
        inactive: bool,
    ) -> Result<String, LibvirtError> {
        // VIR_DOMAIN_XML_INACTIVE is 2.
        let arguments = put(domain).u32(if inactive { 2 } else { 0 });
        let answer = self.call((REMOTE, 14, "definition"), arguments, ANSWER)?;
        Reader::new(&answer).string("definition")
    }

    /// The definition to keep: that of the next start, with passwords.
    pub(in crate::libvirt) fn definition_to_keep(
        &mut self,
        domain: &Domain,
        form: Kept,
    ) -> Result<String, LibvirtError> {
        // VIR_DOMAIN_XML_SECURE is 1, INACTIVE 2, MIGRATABLE 8.
        let flags = match form {
            Kept::NextStart => 1 | 2,
            Kept::Running => 1 | 8,
        };
        let answer = self.call((REMOTE, 14, "definition"), put(domain).u32(flags), ANSWER)?;
        Reader::new(&answer).string("definition")
    }

    /// The machine of this name, if the host has it.
    pub(in crate::libvirt) fn domain_named(&mut self, name: &str) -> Result<Option<Domain>, LibvirtError> {
        match self.call((REMOTE, 23, "look-up by name"), Writer::new().string(name), ANSWER) {
            Ok(answer) => get(&mut Reader::new(&answer)).map(Some),
            Err(error) if error.code() == Some(LibvirtError::NO_DOMAIN) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes a definition over: of a new machine, or in the place of the one of the same UUID.
    pub(in crate::libvirt) fn define(&mut self, definition: &str) -> Result<Domain, LibvirtError> {
        let arguments = Writer::new().string(definition).u32(0);
        let answer = self.call((REMOTE, 350, "definition of a machine"), arguments, CHANGE)?;
        get(&mut Reader::new(&answer))
    }

    pub(in crate::libvirt) fn start(&mut self, domain: &Domain) -> Result<(), LibvirtError> {
        self.call((REMOTE, 196, "start"), put(domain).u32(0), CHANGE).map(drop)
    }

    /// Asks the guest to shut down; it need not.
    pub(in crate::libvirt) fn shut_down(&mut self, domain: &Domain) -> Result<(), LibvirtError> {
        self.call((REMOTE, 258, "shutdown"), put(domain).u32(0), ANSWER).map(drop)
    }

    /// Cuts its power.
    pub(in crate::libvirt) fn destroy(&mut self, domain: &Domain) -> Result<(), LibvirtError> {
        self.call((REMOTE, 234, "stop"), put(domain).u32(0), CHANGE).map(drop)
    }

    /// Its processors stand still.
    pub(in crate::libvirt) fn suspend(
        &mut self,
        domain: &Domain,
        limit: Duration,
    ) -> Result<(), LibvirtError> {
        self.call((REMOTE, 34, "pause"), put(domain), limit).map(drop)
    }

    /// And go on.
    pub(in crate::libvirt) fn resume(
        &mut self,
        domain: &Domain,
        limit: Duration,
    ) -> Result<(), LibvirtError> {
        self.call((REMOTE, 28, "resume"), put(domain), limit).map(drop)
    }

    /// Whether memory of the machine is saved, to be restored at its next start.
    pub(in crate::libvirt) fn has_saved_memory(&mut self, domain: &Domain) -> Result<bool, LibvirtError> {
        let answer = self.call((REMOTE, 183, "saved memory"), put(domain).u32(0), ANSWER)?;
        Ok(Reader::new(&answer).i32("saved memory")? != 0)
    }

    /// Whether the host starts it by itself.
    pub(in crate::libvirt) fn autostart(&mut self, domain: &Domain) -> Result<bool, LibvirtError> {
        let answer = self.call((REMOTE, 15, "autostart"), put(domain), ANSWER)?;
        Ok(Reader::new(&answer).i32("autostart")? != 0)
    }

    pub(in crate::libvirt) fn set_autostart(
        &mut self,
        domain: &Domain,
        is_on: bool,
    ) -> Result<(), LibvirtError> {
        let arguments = put(domain).i32(is_on.into());
        self.call((REMOTE, 29, "change of autostart"), arguments, ANSWER).map(drop)
    }

    /// Begins to write what is in `top` into `base`; the running machine's own image if `top` is absent.
    pub(in crate::libvirt) fn block_commit(
        &mut self,
        domain: &Domain,
        disk: &str,
        base: &str,
        top: Option<&str>,
    ) -> Result<(), LibvirtError> {
        // VIR_DOMAIN_BLOCK_COMMIT_ACTIVE is 4.
        let flags = if top.is_none() { 4 } else { 0 };
        let arguments = put(domain).string(disk).optional(Some(base)).optional(top).u64(0).u32(flags);
        self.call((REMOTE, 290, "commit of an image"), arguments, CHANGE).map(drop)
    }

    /// Bytes done and to do of a disk's block job; nothing if it has none.
    pub(in crate::libvirt) fn block_job(
        &mut self,
        domain: &Domain,
        disk: &str,
    ) -> Result<Option<(u64, u64)>, LibvirtError> {
        let answer = self.call((REMOTE, 238, "block job"), put(domain).string(disk).u32(0), ANSWER)?;
        let mut reader = Reader::new(&answer);
        let is_found = reader.i32("block job")? != 0;
        reader.i32("its kind")?;
        reader.u64("its bandwidth")?;
        let (done, end) = (reader.u64("bytes done")?, reader.u64("bytes to do")?);
        Ok(is_found.then_some((done, end)))
    }

    /// Gives a block job up.
    pub(in crate::libvirt) fn cancel_block_job(
        &mut self,
        domain: &Domain,
        disk: &str,
    ) -> Result<(), LibvirtError> {
        self.call((REMOTE, 237, "end of a block job"), put(domain).string(disk).u32(0), CHANGE).map(drop)
    }

    /// Whether its definition outlives its process.
    pub(in crate::libvirt) fn is_persistent(&mut self, domain: &Domain) -> Result<bool, LibvirtError> {
        let answer = self.call((REMOTE, 151, "persistence"), put(domain), ANSWER)?;
        Ok(Reader::new(&answer).i32("persistence")? != 0)
    }

    /// Lets the machine go on from the image that the job wrote to.
    pub(in crate::libvirt) fn pivot(&mut self, domain: &Domain, disk: &str) -> Result<(), LibvirtError> {
        // VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT is 2.
        self.call((REMOTE, 237, "end of a commit"), put(domain).string(disk).u32(2), CHANGE).map(drop)
    }

    /// The folder of a storage pool that is one.
    pub(in crate::libvirt) fn pool_folder(&mut self, name: &str) -> Result<PathBuf, LibvirtError> {
        let answer =
            self.call((REMOTE, 84, "look-up of a storage pool"), Writer::new().string(name), ANSWER)?;
        let mut reader = Reader::new(&answer);
        let (name, uuid) = (reader.string("name of a storage pool")?, reader.fixed("its UUID")?);
        let arguments = Writer::new().string(&name).fixed(&uuid).u32(0);
        let answer = self.call((REMOTE, 88, "definition of a storage pool"), arguments, ANSWER)?;
        let text = Reader::new(&answer).string("definition of a storage pool")?;
        let path = definition::text(&text, &["target", "path"]).filter(|path| path.starts_with('/'));
        path.map(PathBuf::from).ok_or_else(|| {
            LibvirtError::Protocol(format!("storage pool {name} has no folder; give a path of the host"))
        })
    }

    pub(in crate::libvirt) fn state(&mut self, domain: &Domain) -> Result<State, LibvirtError> {
        Ok(self.state_and_reason(domain)?.0)
    }

    /// Whether it is off because it was migrated to another host. libvirt forgets that when it is started anew, so a no proves nothing.
    pub(in crate::libvirt) fn has_left(&mut self, domain: &Domain) -> Result<bool, LibvirtError> {
        // VIR_DOMAIN_SHUTOFF_MIGRATED is 4.
        Ok(self.state_and_reason(domain)? == (State::Off, 4))
    }

    fn state_and_reason(&mut self, domain: &Domain) -> Result<(State, i32), LibvirtError> {
        let answer = self.call((REMOTE, 212, "state"), put(domain).u32(0), ANSWER)?;
        let mut reader = Reader::new(&answer);
        // 1 running, 2 blocked, 3 paused, 4 shutting down, 5 off, 6 crashed, 7 suspended by the guest.
        let state = match reader.i32("state")? {
            1 | 2 | 4 => State::Running,
            3 | 7 => State::Paused,
            _ => State::Off,
        };
        Ok((state, reader.i32("reason of the state")?))
    }

    pub(in crate::libvirt) fn block_info(
        &mut self,
        domain: &Domain,
        disk: &str,
    ) -> Result<BlockInfo, LibvirtError> {
        let arguments = put(domain).string(disk).u32(0);
        let answer = self.call((REMOTE, 194, "size of a disk"), arguments, ANSWER)?;
        let mut reader = Reader::new(&answer);
        reader.u64("allocation")?;
        Ok(BlockInfo { capacity: reader.u64("capacity")? })
    }

    /// Freezes all file systems of the guest; gives how many.
    pub(in crate::libvirt) fn freeze(
        &mut self,
        domain: &Domain,
        limit: Duration,
    ) -> Result<i32, LibvirtError> {
        let answer = self.call((REMOTE, 335, "freeze of file systems"), put(domain).u32(0).u32(0), limit)?;
        Reader::new(&answer).i32("frozen file systems")
    }

    /// Thaws them.
    pub(in crate::libvirt) fn thaw(&mut self, domain: &Domain, limit: Duration) -> Result<i32, LibvirtError> {
        let answer = self.call((REMOTE, 336, "thaw of file systems"), put(domain).u32(0).u32(0), limit)?;
        Reader::new(&answer).i32("thawed file systems")
    }

    /// Asks the guest's agent.
    pub(in crate::libvirt) fn agent(
        &mut self,
        domain: &Domain,
        command: &str,
        seconds: i32,
    ) -> Result<String, LibvirtError> {
        let limit = Duration::from_secs(u64::try_from(seconds).unwrap_or(5).saturating_add(5));
        let arguments = put(domain).string(command).i32(seconds).u32(0);
        let answer = self.call((QEMU, 3, "guest agent"), arguments, limit)?;
        Ok(Reader::new(&answer).optional("answer of the agent")?.unwrap_or_default())
    }

    /// Gives a command to QEMU's monitor; what QEMU refuses is an answer, too.
    pub(in crate::libvirt) fn monitor(
        &mut self,
        domain: &Domain,
        command: &str,
    ) -> Result<String, LibvirtError> {
        let arguments = put(domain).string(command).u32(0);
        let answer = self.call((QEMU, 1, "QEMU's monitor"), arguments, WAIT)?;
        Reader::new(&answer).string("answer of the monitor")
    }

    /// Makes a checkpoint known again whose bitmaps are in the images, and proves that they are.
    pub(in crate::libvirt) fn redefine_checkpoint(
        &mut self,
        domain: &Domain,
        definition: &str,
    ) -> Result<(), LibvirtError> {
        // VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE is 1, REDEFINE_VALIDATE 4.
        let arguments = put(domain).string(definition).u32(1 | 4);
        self.call((REMOTE, 411, "redefinition of a checkpoint"), arguments, WAIT).map(drop)
    }

    /// What the machine is busy with: `virDomainJobOperation`, 0 for nothing. libvirt refuses to tell at the target of a migration.
    pub(in crate::libvirt) fn operation(&mut self, domain: &Domain) -> Result<i32, LibvirtError> {
        let answer = self.call((REMOTE, 298, "running job"), put(domain).u32(0), ANSWER)?;
        let mut reader = Reader::new(&answer);
        reader.i32("kind of the job")?;
        for _ in 0..reader.count(12, "figures of a job")? {
            let name = reader.string("name of a figure")?;
            match reader.i32("kind of a figure")? {
                1 | 2 | 6 => {
                    let value = reader.i32("figure")?;
                    if name == "operation" {
                        return Ok(value);
                    }
                }
                3..=5 => drop(reader.u64("figure")?),
                7 => drop(reader.string("figure")?),
                kind => {
                    return Err(LibvirtError::Protocol(format!("a figure of kind {kind} is not known")));
                }
            }
        }
        Ok(0)
    }

    /// Begins a backup job, in the same moment with a checkpoint. The scratch files are there already.
    pub(in crate::libvirt) fn backup_begin(
        &mut self,
        domain: &Domain,
        backup: &str,
        checkpoint: Option<&str>,
        limit: Duration,
    ) -> Result<(), LibvirtError> {
        // VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL is 1: libvirt's own scratch files cannot lie over a VHDX image.
        let arguments = put(domain).string(backup).optional(checkpoint).u32(1);
        self.call((REMOTE, 421, "beginning of a backup"), arguments, limit).map(drop)
    }

    /// The running backup job, if there is one.
    pub(in crate::libvirt) fn backup(&mut self, domain: &Domain) -> Result<Option<String>, LibvirtError> {
        match self.call((REMOTE, 422, "backup job"), put(domain).u32(0), ANSWER) {
            Ok(answer) => Reader::new(&answer).string("backup job").map(Some),
            Err(error)
                if matches!(
                    error.code(),
                    Some(LibvirtError::NO_BACKUP | LibvirtError::INVALID | LibvirtError::NO_DOMAIN)
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Ends the machine's running job.
    pub(in crate::libvirt) fn abort_job(&mut self, domain: &Domain) -> Result<(), LibvirtError> {
        self.call((REMOTE, 164, "end of a job"), put(domain), ANSWER).map(drop)
    }

    /// Names of the machine's checkpoints, each after its parent.
    pub(in crate::libvirt) fn checkpoints(
        &mut self,
        domain: &Domain,
    ) -> Result<Vec<Checkpoint>, LibvirtError> {
        // VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL is 2.
        let arguments = put(domain).i32(1).u32(2);
        let answer = self.call((REMOTE, 413, "list of checkpoints"), arguments, ANSWER)?;
        let mut reader = Reader::new(&answer);
        (0..reader.count(28, "checkpoints")?)
            .map(|_| {
                let name = reader.string("checkpoint name")?;
                get(&mut reader)?;
                Ok(Checkpoint(name))
            })
            .collect()
    }

    pub(in crate::libvirt) fn checkpoint_definition(
        &mut self,
        domain: &Domain,
        checkpoint: &Checkpoint,
    ) -> Result<Option<String>, LibvirtError> {
        let dom = put(domain).done();
        let mut arguments = Writer::new().string(&checkpoint.0);
        arguments = arguments.append(&dom).u32(2); // VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        match self.call((REMOTE, 412, "definition of a checkpoint"), arguments, ANSWER) {
            Ok(answer) => Reader::new(&answer).string("definition of a checkpoint").map(Some),
            Err(error) if error.code() == Some(LibvirtError::NO_CHECKPOINT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a checkpoint and its bitmaps; those of others go on.
    pub(in crate::libvirt) fn delete_checkpoint(
        &mut self,
        domain: &Domain,
        checkpoint: &Checkpoint,
        only_metadata: bool,
    ) -> Result<(), LibvirtError> {
        let dom = put(domain).done();
        // VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY is 2.
        let arguments =
            Writer::new().string(&checkpoint.0).append(&dom).u32(if only_metadata { 2 } else { 0 });
        match self.call((REMOTE, 417, "removal of a checkpoint"), arguments, ANSWER) {
            Err(error) if error.code() == Some(LibvirtError::NO_CHECKPOINT) => Ok(()),
            other => other.map(drop),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What libvirt's own client said and its daemon of 9.0 answered, by procedure: arguments and payload in hex.
    const RECORDED: [(u32, &str, u32, &str); 9] = [
        (66, "", 0, "0000000100000000"),
        (1, "000000010000000e71656d753a2f2f2f73797374656d000000000000", 0, ""),
        (
            24,
            "f8855ba63d724ba6b23472e92536dc10",
            0,
            "0000000267310000f8855ba63d724ba6b23472e92536dc1000000001",
        ),
        (273, "0000000100000000", 0, "000000010000000267310000f8855ba63d724ba6b23472e92536dc1000000001"),
        (212, "0000000267310000f8855ba63d724ba6b23472e92536dc100000000100000000", 0, "0000000100000001"),
        (
            194,
            "0000000267310000f8855ba63d724ba6b23472e92536dc1000000001000000037664610000000000",
            0,
            "0000000001dd200000000000200000000000000001de0000",
        ),
        (335, "0000000267310000f8855ba63d724ba6b23472e92536dc10000000010000000000000000", 0, "00000001"),
        (417, "00000003636b31000000000267310000f8855ba63d724ba6b23472e92536dc100000000100000000", 0, ""),
        (
            422,
            "0000000267310000f8855ba63d724ba6b23472e92536dc100000000100000000",
            1,
            "000000680000000a00000001000000026e6f0000",
        ),
    ];

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    /// What becomes of the packet that answers a procedure.
    type Twist = fn(u32, Vec<u8>) -> Vec<u8>;

    /// A daemon that says what was recorded, or whatever `twist` makes of it.
    fn daemon(twist: Twist) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                loop {
                    let mut header = [0; 28];
                    if stream.read_exact(&mut header).is_err() {
                        break;
                    }
                    let word = |n: usize| u32::from_be_bytes(header[4 * n..4 * n + 4].try_into().unwrap());
                    let mut arguments = vec![0; word(0) as usize - 28];
                    stream.read_exact(&mut arguments).unwrap();
                    let (_, _, status, answer) = RECORDED
                        .iter()
                        .find(|(procedure, said, ..)| *procedure == word(3) && bytes(said) == arguments)
                        .unwrap_or_else(|| panic!("procedure {} says {arguments:x?}", word(3)));
                    let answer = bytes(answer);
                    let length = 28 + answer.len() as u32;
                    let mut packet = Vec::new();
                    for word in [length, word(1), word(2), word(3), 1, word(5), *status] {
                        packet.extend_from_slice(&word.to_be_bytes());
                    }
                    packet.extend_from_slice(&answer);
                    if stream.write_all(&twist(word(3), packet)).is_err() {
                        break;
                    }
                }
            }
        });
        (folder, path)
    }

    #[test]
    fn calls_are_those_that_were_recorded() {
        let (_folder, path) = daemon(|_, packet| packet);
        let mut connection = Connection::open(&path).unwrap();
        let uuid = bytes("f8855ba63d724ba6b23472e92536dc10").try_into().unwrap();
        let domain = connection.domain(&uuid).unwrap().unwrap();
        assert_eq!(domain, Domain { name: "g1".to_owned(), uuid, id: 1 });
        assert_eq!(connection.domains().unwrap().as_slice(), std::slice::from_ref(&domain));
        assert_eq!(connection.state(&domain).unwrap(), State::Running);
        assert_eq!(connection.block_info(&domain, "vda").unwrap().capacity, 512 << 20);
        assert_eq!(connection.freeze(&domain, ANSWER).unwrap(), 1);
        connection.delete_checkpoint(&domain, &Checkpoint("ck1".to_owned()), false).unwrap();
        assert_eq!(connection.backup(&domain).unwrap(), None);
    }

    #[test]
    fn an_answer_that_makes_no_sense_ends_the_conversation() {
        let twists: [Twist; 6] = [
            // Another serial, another procedure, a length of nothing, of everything, no end, an answer cut short.
            |procedure, mut packet| {
                if procedure == 24 {
                    packet[23] ^= 1;
                }
                packet
            },
            |procedure, mut packet| {
                if procedure == 24 {
                    packet[15] ^= 1;
                }
                packet
            },
            |procedure, mut packet| {
                if procedure == 24 {
                    packet[3] = 3;
                }
                packet
            },
            |procedure, mut packet| {
                if procedure == 24 {
                    packet[0] = 0x7f;
                }
                packet
            },
            |procedure, mut packet| {
                if procedure == 24 {
                    packet[30] = 0xff;
                }
                packet
            },
            |procedure, mut packet| {
                if procedure == 24 {
                    packet[3] -= 4;
                    packet.truncate(packet.len() - 4);
                }
                packet
            },
        ];
        for (number, twist) in twists.into_iter().enumerate() {
            let (_folder, path) = daemon(twist);
            let mut connection = Connection::open(&path).unwrap();
            let uuid = bytes("f8855ba63d724ba6b23472e92536dc10").try_into().unwrap();
            assert!(connection.domain(&uuid).is_err(), "twist {number}");
        }
    }

    #[test]
    fn a_daemon_that_says_nothing_is_given_up() {
        let (_folder, path) = daemon(|procedure, packet| if procedure == 335 { Vec::new() } else { packet });
        let mut connection = Connection::open(&path).unwrap();
        let uuid = bytes("f8855ba63d724ba6b23472e92536dc10").try_into().unwrap();
        let domain = connection.domain(&uuid).unwrap().unwrap();
        let late = connection.freeze(&domain, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(late, LibvirtError::TimedOut { .. }), "{late}");
        assert!(matches!(connection.state(&domain), Err(LibvirtError::Lost(_))));
        assert!(Connection::open(&path.join("nobody")).is_err());
    }
}
