//! Every error that a person can meet: a stable code, its cause, its remedy, its exit status.
//!
//! Rooms keep error enums of their own; only at the edge an error becomes a [`Problem`]. This table is the one place
//! where codes are given out. A code is never reused; `stillpoint explain CODE` and `docs/error-codes.md` come from it.

use serde::{Deserialize, Serialize};

/// What the process returns to the shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum ExitStatus {
    /// Everything was done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// The command was wrong, or a name was ambiguous.
    Usage = 2,
    /// Done, with warnings.
    Warnings = 3,
    /// A named thing does not exist.
    NotFound = 4,
    /// Refused by policy, lock, missing approval or an existing target.
    Refused = 5,
    /// Stored data is damaged.
    Damaged = 6,
    /// No contact with the server or the agent.
    NoContact = 7,
    /// Another writer is at work.
    Busy = 8,
    /// A key is missing or wrong.
    Key = 9,
    /// No space.
    NoSpace = 10,
    /// Cancelled.
    Cancelled = 130,
}

macro_rules! codes {
    ($($variant:ident $number:literal $exit:ident $title:literal $cause:literal $remedy:literal)*) => {
        /// A stable error code, shown as `SP-` and four digits.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $(#[doc = $title] $variant,)*
        }

        impl Code {
            /// Every code, in order of number.
            pub const ALL: &'static [Code] = &[$(Code::$variant),*];

            /// The number behind `SP-`.
            pub fn number(self) -> u16 { match self { $(Code::$variant => $number,)* } }
            /// The exit status of a command that ends with it.
            pub fn exit_status(self) -> ExitStatus { match self { $(Code::$variant => ExitStatus::$exit,)* } }
            /// What it is, in a few words.
            pub fn title(self) -> &'static str { match self { $(Code::$variant => $title,)* } }
            /// What leads to it.
            pub fn cause(self) -> &'static str { match self { $(Code::$variant => $cause,)* } }
            /// What to do.
            pub fn remedy(self) -> &'static str { match self { $(Code::$variant => $remedy,)* } }
        }
    };
}

codes! {
    // 10xx: the command and its words
    Usage 1001 Usage "The command is not right"
        "An option is missing, unknown or contradicts another."
        "Run the command with --help."
    Ambiguous 1002 Usage "A name means more than one thing"
        "Several datasources, points or hosts match what was typed."
        "Use one of the listed ids, or HOST/NAME."
    NotFound 1003 NotFound "No such thing"
        "Nothing of that name or id is known."
        "Run `stillpoint datasource list` or `stillpoint recovery-point list` to see what there is."
    DataFolderMissing 1004 NotFound "The data folder holds no Stillpoint data"
        "The folder is missing or empty: mistyped, or its file system is not mounted."
        "Check the path. A new data folder is made only by `datasource add-image`, `demo` and `server run`."
    OtherPool 1005 Refused "The data folder holds another pool"
        "--pool-id names a pool, and this folder holds a different one."
        "Check the path and the mount."
    TargetExists 1006 Refused "The target exists"
        "Recovery never writes over an existing file unless told to."
        "Choose another name or add --overwrite."
    NeedsYes 1007 Refused "Needs confirmation"
        "The command destroys something and was not confirmed."
        "Type the name when asked, or add --yes."
    Cancelled 1008 Cancelled "Cancelled"
        "The job was cancelled before it ended. Nothing of it is left behind."
        "Start it again when you want it."
    NameTaken 1009 Refused "The name is taken"
        "A datasource, host or file of this name exists and is something else."
        "Choose another name."
    Unsupported 1010 Failed "Not possible here"
        "The operating system, the file system or the format cannot do what was asked."
        "See the message for what is missing."
    Internal 1011 Failed "The program contradicts itself"
        "A state was met that the code holds to be impossible. Nothing was acknowledged."
        "Report it with the output of `stillpoint version` and the log."

    // 20xx: sources and targets on a host
    SourceMissing 2001 Failed "A disk image is missing"
        "The file of a protected disk does not exist or cannot be opened."
        "Bring the file back, or remove the datasource with `stillpoint datasource remove`."
    SourceFormat 2002 Failed "A disk image cannot be understood"
        "The file is truncated, damaged, of an unknown format, or uses a feature that is not supported."
        "Check the file with the program that made it (for example `qemu-img check`)."
    SourceUnsafe 2003 Refused "A disk image points outside what is allowed"
        "It names a backing file, parent or data file in a folder that was not allowed, or it is encrypted."
        "Allow the folder with --allow-backing DIR, or flatten the image first."
    SourceChanged 2004 Failed "A disk image changed while it was read"
        "Another program wrote to the image, so no consistent view could be had. Nothing was committed."
        "Stop the machine, or keep its images on a file system with reflinks (XFS, Btrfs) and run the job again."
    SourceRead 2005 Failed "A disk image cannot be read"
        "The storage below the image gave an error."
        "Check the disk and the system log; the message names the range."
    TargetWrite 2006 Failed "The target cannot be written"
        "The storage of the recovery target gave an error."
        "Check the target; the same command continues an interrupted recovery."
    TargetFull 2007 NoSpace "No space at the target"
        "The file system of the recovery target is full."
        "Free space or choose another target; the same command continues."
    TargetFormat 2008 Failed "The target format cannot hold this disk"
        "The chosen format has a smaller largest size or other sector sizes."
        "Choose another --format."
    ChangedExtents 2009 Usage "The list of changed extents is not right"
        "The file cannot be read, is not JSON [[offset,length],..], or names bytes outside the disk."
        "Correct the list, or leave it out: the disk is then read in full."
    SourceLocked 2010 Busy "A disk image is in use"
        "Another program holds a lock on the image and the file system has no reflinks to freeze it."
        "Stop the machine or move its images to a file system with reflinks."
    NotFrozen 2011 Failed "The guest's file systems could not be frozen"
        "No agent in the guest answers, it refused, or the freeze did not hold, and the datasource is set to make no point then."
        "Start the guest agent (qemu-guest-agent), or accept other points: `datasource add-machine NAME --without-freeze crash` or `pause`."
    Migrating 2012 Busy "The machine is on its way to another host"
        "A live migration runs; a checkpoint cannot be made meanwhile."
        "Wait for its end and run the job again. Jobs wait for an hour by themselves."

    // 30xx: the storage pool
    PoolDamaged 3001 Damaged "The storage pool is damaged"
        "Stored bytes do not match their hashes or cannot be read. The message names file, machine, disk and range."
        "Run `stillpoint pool verify --read-data`, then synchronise the machines it names: what the source still has is stored again."
    PoolBusy 3002 Busy "Another writer is using the pool"
        "A server or another command holds the pool's lock."
        "Wait for it, or add --wait."
    PoolFenced 3003 Busy "Another server took over the pool"
        "A newer owner wrote to the pool; this process may no longer write."
        "Stop this process; work goes on at the new owner."
    PoolFull 3004 NoSpace "The storage pool is full"
        "The pool's file system has no space left. Nothing was acknowledged that is not durable."
        "Free space: `stillpoint prune`, then `stillpoint pool reclaim`, or enlarge the volume."
    PoolIo 3005 Failed "The storage pool cannot be read or written"
        "The file system below the pool gave an error."
        "Check the disk and the system log."
    PoolTooNew 3006 Failed "The pool was written by a newer program"
        "A file needs a format version that this program does not know."
        "Upgrade Stillpoint."
    KeyMissing 3007 Key "A key is missing"
        "The pool's key file or the recovery kit is not there or cannot be read."
        "Use the recovery kit: `stillpoint recover disk --pool DIR --kit FILE ..`."
    KeyWrong 3008 Key "The key does not fit"
        "The key or kit belongs to another pool, or is damaged."
        "Use the kit that was written when this pool was created."
    PointNotUsable 3009 Damaged "The recovery point cannot be used as asked"
        "The point is damaged or suspect and --accept-damage was not given."
        "Choose another point, or add --accept-damage to get all that is good."
    ReclaimBreaker 3010 Refused "Reclaim would free an unusual share of the pool"
        "More would be deleted than the breaker allows; this is what a mistake or an attack looks like."
        "Check the list of expired points, then repeat with --breaker PERCENT."
    ReclaimStopped 3011 Failed "Reclaim stopped and changed nothing"
        "A record or map of the pool cannot be read, so what is still needed is not known."
        "Run `stillpoint pool verify`, mend what it names, then reclaim again."
    PointLocked 3012 Refused "The recovery point is protected"
        "The retention floor, a hold or a lock keeps it."
        "It can be deleted when the protection ends."
    PoolRolledBack 3013 Damaged "The pool is older than it was"
        "The pool's newest records are gone: an old copy was put back, or files were lost."
        "Find out what replaced the pool before anything is written; `stillpoint catalog rebuild` accepts the pool as it is now."
    KitNotWritten 3014 Failed "The recovery kit could not be written"
        "A pool is not created without a proved recovery kit outside its folder."
        "Name a writable place with --recovery-kit FILE."
    BelowConsistency 3015 Refused "The recovery point has a lower consistency than asked"
        "--min-consistency refuses points below a level, and the one that was named is below it."
        "Choose another point with `stillpoint recovery-point list`, or ask for less."
    NotACopy 3016 Refused "The folder is no place for this copy"
        "It holds other data, lies inside the pool or its data folder, or is the pool itself."
        "Name an empty folder, or one that holds a copy of this pool, with --to DIR."
    CopyDiverged 3017 Refused "The copy went its own way"
        "It holds records that the pool has not: a server took the copy over, or the pool was put back from an older state."
        "Decide which of the two is the pool. Go on with that one, and copy it to another, empty folder."
    RecipientKept 3018 Refused "The recipient is not removed"
        "It is not known, is the one at work, or no recovery kit would be left."
        "See `stillpoint recovery-kit list`; write another kit first with `stillpoint recovery-kit write --to FILE`."

    // 40xx: server, agents, network
    NoContact 4001 NoContact "No contact with the server"
        "Nothing answers at the address, or the connection broke."
        "Check that the server runs and the address is right."
    ServerIdentity 4002 NoContact "The server is not the one expected"
        "Its identity key does not match the fingerprint."
        "Check the address. If the server was rebuilt without its kit, enrol again."
    AgentUnreachable 4003 NoContact "The protection agent is unreachable"
        "The host's agent has no open session with this server."
        "Start the agent on the host: `stillpoint agent run`."
    TokenRefused 4004 Refused "The enrolment token is not valid"
        "It is expired, used up or mistyped."
        "Make a new one on the server: `stillpoint host token`."
    HostRevoked 4005 Refused "The host was revoked"
        "An administrator revoked this agent's certificate."
        "Enrol it again with a new token if that was a mistake."
    ProtocolVersion 4006 Failed "The other side speaks another version"
        "Server and agent have no protocol version in common."
        "Upgrade the older of the two."
    ProtocolBroken 4007 Failed "The other side broke the protocol"
        "A message was malformed, out of order or contradicted its own hashes. Nothing of it was stored."
        "Update the agent; if it is up to date, treat the host as hostile."
    Unauthorised 4008 Refused "Not allowed"
        "The token is missing, wrong, expired or has too few rights."
        "Use a token of this server: set STILLPOINT_TOKEN or STILLPOINT_TOKEN_FILE."
    CertificateExpired 4009 Refused "The agent's certificate is too old to renew"
        "It expired more than 90 days ago."
        "Enrol the agent again with a new token."

    // 50xx: jobs and state
    ReplicaNotReady 5001 Refused "The machine is not protected yet"
        "Its initial replication has not been verified."
        "Run `stillpoint protect` first."
    SourceBusy 5002 Busy "A job for this machine is running"
        "Two jobs that write the same replica cannot run at once."
        "Wait for it; `stillpoint job list` shows it."
    CatalogDamaged 5003 Failed "The catalog is damaged"
        "The server's database fails its check."
        "It is rebuilt from the pool at the next start; `stillpoint catalog rebuild` does it now."
    StateDamaged 5004 Failed "A state file is damaged"
        "A file of the agent or server fails its hash."
        "The message names the file and what it is rebuilt from."
    InitialReplicationBroken 5005 Failed "The initial replica did not verify"
        "What was stored does not equal what was read. The replica is not used."
        "Run the job again; if it repeats, check memory and disk of host and server."
    LowerConsistency 5006 Warnings "Lower consistency than asked"
        "The point was made, with the consistency that the message says."
        "See the message."
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SP-{:04}", self.number())
    }
}

impl std::str::FromStr for Code {
    type Err = String;
    fn from_str(text: &str) -> Result<Code, String> {
        let digits = text.strip_prefix("SP-").or_else(|| text.strip_prefix("sp-")).unwrap_or(text);
        Code::ALL
            .iter()
            .copied()
            .find(|code| digits.parse() == Ok(code.number()))
            .ok_or_else(|| format!("{text:?} is not an error code of this version"))
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Code {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Code, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// An error as a person meets it. The last line of a failed `--json` command is exactly this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The stable code.
    pub code: Code,
    /// What happened, where, what was expected: one sentence.
    pub message: String,
    /// The thing it is about: a path, a machine, a point; empty if none.
    #[serde(default)]
    pub object: String,
    /// What to do next, with a command that works.
    #[serde(default)]
    pub hint: String,
}

impl Problem {
    /// A problem with the code's own remedy as the hint.
    pub fn new(code: Code, message: impl Into<String>) -> Problem {
        Problem { code, message: message.into(), object: String::new(), hint: code.remedy().to_owned() }
    }

    /// Names what it is about.
    pub fn about(mut self, object: impl Into<String>) -> Problem {
        self.object = object.into();
        self
    }

    /// Says something more to the point than the code's remedy.
    pub fn hint(mut self, hint: impl Into<String>) -> Problem {
        self.hint = hint.into();
        self
    }

    /// The exit status of a command that ends with it.
    pub fn exit_status(&self) -> ExitStatus {
        self.code.exit_status()
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_round_trip() {
        let mut last = 0;
        for &code in Code::ALL {
            assert!(code.number() > last, "{code} is out of order or twice");
            last = code.number();
            assert_eq!(code.to_string().parse(), Ok(code));
            assert!(code.remedy().ends_with('.') && code.cause().ends_with('.'), "{code}");
        }
    }
}
