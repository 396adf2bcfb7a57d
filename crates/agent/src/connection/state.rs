//! What the agent keeps between runs, in a folder of its own.
//!
//! | file | what | rebuilt from |
//! |---|---|---|
//! | `identity.N` | private key, certificate, fingerprint of the server | a new enrolment |
//! | `server.N` | addresses of the server | the next session; the first time, the enrolment |
//! | `name.N` | the name that this host was enrolled under | a new enrolment |
//! | `machines.N` | definitions of machines that were frozen here, to be swept at a start | the next job of each |
//! | `enrolling.N` | the key of an enrolment that has not ended | nothing: it is made again |
//!
//! Each file: `SPAGENT1`, JSON, 32 bytes of BLAKE3 of both. Files are never changed: N rises, the newest sound one
//! counts, the one before is kept. A newest file that is damaged is reported, and the one before used: an older
//! certificate of the same host still renews.

use environment::Removal;
use identity::{Fingerprint, HostKey, PeerCertificate};
use model::{Code, Problem};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"SPAGENT1";
const LARGEST: u64 = 4 * 1024 * 1024;
/// Addresses kept at most.
const ADDRESSES: usize = 16;

#[derive(Serialize, Deserialize)]
struct IdentityFile {
    server: Fingerprint,
    key: String,
    certificate: String,
}

#[derive(Serialize, Deserialize)]
struct ServerFile {
    addresses: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct NameFile {
    name: String,
}

#[derive(Serialize, Deserialize)]
struct MachinesFile {
    definitions: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct EnrollingFile {
    key: String,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> =
        text.chars().map(|digit| digit.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

/// Who this agent is, and whom it trusts.
#[derive(Debug)]
pub struct AgentIdentity {
    /// The identity of its server.
    pub server: Fingerprint,
    /// Its key.
    pub key: HostKey,
    /// Its certificate, DER.
    pub certificate: Vec<u8>,
    /// The certificate, read.
    pub read: PeerCertificate,
}

impl AgentIdentity {
    /// Key and certificate, checked to belong together.
    pub fn new(server: Fingerprint, key: HostKey, certificate: Vec<u8>) -> Result<AgentIdentity, Problem> {
        let read = PeerCertificate::read(&certificate)?;
        if read.key != key.fingerprint() {
            return Err(protocol::wire::broken("The certificate that the server issued is for another key."));
        }
        Ok(AgentIdentity { server, key, certificate, read })
    }
}

/// The state folder of an agent.
#[derive(Clone)]
pub struct AgentState {
    files: Arc<dyn Removal>,
}

/// What was read, and the damage that was found on the way.
type Found<T> = (Option<T>, Option<Problem>);

impl AgentState {
    /// The state in this folder.
    pub fn new(files: Arc<dyn Removal>) -> AgentState {
        AgentState { files }
    }

    fn io(&self, name: &str, doing: &str, error: &std::io::Error) -> Problem {
        let path = self.files.display(name);
        Problem::new(Code::StateDamaged, format!("{path}: {doing}: {error}."))
            .about(path)
            .hint("Check that the agent's folder can be read and written.")
    }

    /// The numbers of the files called `kind`, newest first.
    fn versions(&self, kind: &str) -> Result<Vec<u64>, Problem> {
        let entries = match self.files.list("") {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(self.io("", "listing the folder", &error)),
        };
        let mut numbers: Vec<u64> = entries
            .iter()
            .filter_map(|entry| entry.name.strip_prefix(kind)?.strip_prefix('.')?.parse().ok())
            .collect();
        numbers.sort_unstable_by(|a, b| b.cmp(a));
        Ok(numbers)
    }

    fn read<T: DeserializeOwned>(&self, kind: &str, rebuilt_from: &str) -> Result<Found<T>, Problem> {
        let mut damage = None;
        for number in self.versions(kind)? {
            let name = format!("{kind}.{number}");
            let bytes = match self.files.read(&name, LARGEST) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(self.io(&name, "reading", &error)),
            };
            let sound = bytes
                .split_last_chunk::<32>()
                .filter(|(body, hash)| blake3::hash(body) == blake3::Hash::from_bytes(**hash))
                .and_then(|(body, _)| serde_json::from_slice(body.strip_prefix(MAGIC)?).ok());
            if let Some(value) = sound {
                return Ok((Some(value), damage));
            }
            let path = self.files.display(&name);
            damage.get_or_insert_with(|| {
                Problem::new(
                    Code::StateDamaged,
                    format!("{path} fails its hash; it is rebuilt from {rebuilt_from}."),
                )
                .about(path)
            });
        }
        Ok((None, damage))
    }

    fn write<T: Serialize>(&self, kind: &str, value: &T) -> Result<(), Problem> {
        self.files.make_folder("").map_err(|error| self.io("", "making the folder", &error))?;
        let before = self.versions(kind)?;
        let name = format!("{kind}.{}", before.first().map_or(1, |newest| newest.saturating_add(1)));
        let json = serde_json::to_vec(value).map_err(|error| {
            Problem::new(Code::Internal, format!("{name} cannot be written as JSON: {error}."))
        })?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&json);
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        let written = self.files.create(&name).and_then(|mut file| {
            file.append(&bytes)?;
            file.publish()
        });
        written.map_err(|error| self.io(&name, "writing", &error))?;
        for old in before.iter().skip(1) {
            let old = format!("{kind}.{old}");
            self.files.remove(&old).map_err(|error| self.io(&old, "removing", &error))?;
        }
        Ok(())
    }

    /// Who this agent is. The second value is damage that was found and passed over.
    pub fn identity(&self) -> Result<(AgentIdentity, Option<Problem>), Problem> {
        let (file, damage) =
            self.read::<IdentityFile>("identity", "a new enrolment (`stillpoint agent enroll`)")?;
        let Some(file) = file else {
            return Err(damage.unwrap_or_else(|| {
                Problem::new(Code::NotFound, "This agent is not enrolled.")
                    .about(self.files.display(""))
                    .hint("Run `stillpoint agent enroll --server URL --token TOKEN`.")
            }));
        };
        let damaged = || {
            Problem::new(Code::StateDamaged, "The agent's key or certificate cannot be read.")
                .about(self.files.display("identity"))
                .hint("Enrol the agent again: `stillpoint agent enroll --server URL --token TOKEN`.")
        };
        let key = HostKey::from_pkcs8(&unhex(&file.key).ok_or_else(damaged)?).map_err(|_| damaged())?;
        let certificate = unhex(&file.certificate).ok_or_else(damaged)?;
        let identity = AgentIdentity::new(file.server, key, certificate).map_err(|_| damaged())?;
        Ok((identity, damage))
    }

    /// Keeps an identity.
    pub fn set_identity(&self, identity: &AgentIdentity) -> Result<(), Problem> {
        let file = IdentityFile {
            server: identity.server,
            key: hex(&identity.key.to_pkcs8()),
            certificate: hex(&identity.certificate),
        };
        self.write("identity", &file)
    }

    /// Where the server can be. The second value is damage that was found and passed over.
    pub fn addresses(&self) -> Result<(Vec<String>, Option<Problem>), Problem> {
        let (file, damage) =
            self.read::<ServerFile>("server", "a new enrolment (`stillpoint agent enroll --server URL`)")?;
        match (file, damage) {
            (Some(file), damage) => Ok((file.addresses, damage)),
            (None, Some(damage)) => Err(damage),
            (None, None) => Ok((Vec::new(), None)),
        }
    }

    /// Keeps the addresses that the server told, and `reached`, the one that worked. Nothing is written if nothing is
    /// new.
    pub fn set_addresses(&self, told: &[String], reached: &str) -> Result<Vec<String>, Problem> {
        let mut addresses: Vec<String> = Vec::new();
        for address in told.iter().take(ADDRESSES - 1).map(String::as_str).chain([reached]) {
            let tame = !address.is_empty() && address.len() < 256 && !address.contains(char::is_whitespace);
            if tame && !addresses.iter().any(|known| known == address) {
                addresses.push(address.to_owned());
            }
        }
        if self.addresses().ok().is_none_or(|(known, damage)| known != addresses || damage.is_some()) {
            self.write("server", &ServerFile { addresses: addresses.clone() })?;
        }
        Ok(addresses)
    }

    /// The name that this host was enrolled under, if any.
    pub fn name(&self) -> Result<Option<String>, Problem> {
        let (file, _) = self.read::<NameFile>("name", "a new enrolment (`stillpoint agent enroll`)")?;
        Ok(file.map(|file| file.name))
    }

    /// Keeps the name.
    pub fn set_name(&self, name: &str) -> Result<(), Problem> {
        self.write("name", &NameFile { name: name.to_owned() })
    }

    /// Definitions of machines that were frozen here. The second value is damage that was found and passed over.
    pub fn machines(&self) -> Result<(Vec<String>, Option<Problem>), Problem> {
        let (file, damage) = self.read::<MachinesFile>("machines", "the next job of each machine")?;
        Ok((file.map(|file| file.definitions).unwrap_or_default(), damage))
    }

    /// Keeps the list; of one that is too long for a file, the end.
    pub fn set_machines(&self, mut definitions: Vec<String>) -> Result<(), Problem> {
        let mut room = LARGEST as usize / 4;
        let fits = |text: &&String| {
            let before = room;
            room = room.saturating_sub(text.len().saturating_add(64));
            room > 0 || before == LARGEST as usize / 4
        };
        let kept = definitions.iter().rev().take_while(fits).count();
        let definitions = definitions.split_off(definitions.len() - kept);
        self.write("machines", &MachinesFile { definitions })
    }

    /// The key of the enrolment under way: a second try after a lost reply must come with the same key.
    pub(super) fn enrolling_key(&self) -> Result<HostKey, Problem> {
        let (file, _) = self.read::<EnrollingFile>("enrolling", "a new key")?;
        if let Some(key) = file.and_then(|file| HostKey::from_pkcs8(&unhex(&file.key)?).ok()) {
            return Ok(key);
        }
        let key = HostKey::generate()?;
        self.write("enrolling", &EnrollingFile { key: hex(&key.to_pkcs8()) })?;
        Ok(key)
    }

    pub(super) fn end_enrolling(&self) -> Result<(), Problem> {
        for number in self.versions("enrolling")? {
            let name = format!("enrolling.{number}");
            self.files.remove(&name).map_err(|error| self.io(&name, "removing", &error))?;
        }
        Ok(())
    }
}
