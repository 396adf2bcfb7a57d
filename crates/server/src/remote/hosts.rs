//! Enrolled hosts, for the server's API and its jobs.

use std::sync::Arc;

use environment::{Clock, Randomness};
use jobs::ProtectedHost;
use model::{Code, HostId, Problem, Timestamp};
use protocol::api::{Host, HostState, MakeToken, Time, TokenMade};

use super::host::{RemoteHost, RemoteTimes};
use super::register::{PoolRegister, revoked};
use crate::app::Hosts;
use crate::session::SessionRegistry;

/// Hosts that are reached through their agents' sessions, and no others: a server on the network does not touch the
/// files of its own machine but through an agent that somebody enrolled there.
pub struct RemoteHosts {
    /// What is known of them.
    pub register: Arc<PoolRegister>,
    /// Who is connected.
    pub registry: SessionRegistry,
    /// What tokens are bound to.
    pub fingerprint: identity::Fingerprint,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Secrets of tokens.
    pub randomness: Arc<dyn Randomness>,
    /// How long to wait for a host.
    pub times: RemoteTimes,
}

impl RemoteHosts {
    fn now(&self) -> Timestamp {
        Timestamp(self.clock.now_micros())
    }
}

impl Hosts for RemoteHosts {
    fn host(&self, host: Option<HostId>) -> Result<Arc<dyn ProtectedHost>, Problem> {
        let Some(id) = host else {
            return Err(Problem::new(
                Code::Unsupported,
                "A server on the network reads and writes disks only through agents, also on its own machine.",
            )
            .hint("Enrol an agent there (`stillpoint host token`, then `stillpoint agent enroll`) and name the host."));
        };
        let record = self
            .register
            .host(id)
            .ok_or_else(|| Problem::new(Code::NotFound, format!("No host {id}.")).about(id.to_string()))?;
        if record.revoked.is_some() {
            return Err(revoked(&record));
        }
        Ok(Arc::new(RemoteHost::new(id, record.name, self.registry.clone(), self.times)))
    }

    fn list(&self) -> Result<Vec<Host>, Problem> {
        let connected = self.registry.connected();
        let hosts = self.register.hosts().into_iter().map(|(record, seen)| {
            let info = connected.iter().find(|(id, _)| *id == record.id).map(|(_, info)| info);
            let state = match (record.revoked, info) {
                (Some(_), _) => HostState::Revoked,
                (None, Some(_)) => HostState::Connected,
                (None, None) => HostState::Silent,
            };
            Host {
                id: record.id,
                name: record.name,
                state,
                version: info.map_or(record.version, |info| info.program_version.clone()),
                platform: info.map_or(record.platform, |info| info.platform.clone()),
                last_seen: if info.is_some() { Some(Time(self.now())) } else { seen.map(Time) },
                certificate_until: record.certificate_until.map(Time),
            }
        });
        let mut hosts: Vec<Host> = hosts.collect();
        hosts.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        Ok(hosts)
    }

    fn make_token(&self, request: &MakeToken) -> Result<TokenMade, Problem> {
        let mut secret = [0; 20];
        self.randomness
            .fill(&mut secret)
            .map_err(|error| Problem::new(Code::Internal, format!("No random numbers: {error}.")))?;
        let (token, record) = self.register.make_token(
            self.fingerprint,
            secret,
            request.count,
            request.valid_seconds,
            self.now(),
        )?;
        Ok(TokenMade {
            token: token.to_string(),
            count: record.uses_left,
            valid_until: Time(record.expires),
            fingerprint: self.fingerprint.to_string(),
        })
    }

    fn revoke(&self, host: HostId) -> Result<(), Problem> {
        self.register.revoke(host, self.now())?;
        let problem = match self.register.host(host) {
            Some(record) => revoked(&record),
            None => Problem::new(Code::HostRevoked, "The host was revoked."),
        };
        self.registry.end(host, &problem);
        Ok(())
    }

    fn is_standalone(&self) -> bool {
        false
    }
}
