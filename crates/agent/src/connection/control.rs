//! Enrolment, and the loop that keeps one control session with the server.

use super::commands::Commands;
use super::data::{LinkShared, ServerLink, Whereabouts};
use super::state::{AgentIdentity, AgentState};
use super::{ConnectionEvent, ConnectionSettings, Executor, about_host, dial, is_final};
use identity::{HostKey, Standing, Token};
use model::{Code, HostId, Problem};
use protocol::v0::{
    self, agent_client::AgentClient, agent_message, enrollment_client::EnrollmentClient, server_message,
};
use protocol::wire::{
    HIGHEST_VERSION, LIST_RANGES, LOWEST_VERSION, MESSAGE_BYTES, broken, from_status, put_pages, tame,
};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tonic::transport::Channel;

/// A call that is answered at once is given up after this time.
const CALL: Duration = Duration::from_secs(30);

/// Makes this host one of the server's: proves the server by the token's fingerprint, makes a key, gets a certificate,
/// keeps all of it in `state`. Nothing but a TLS greeting goes to a server that is not the token's.
pub async fn enrol(
    settings: &ConnectionSettings,
    state: &AgentState,
    servers: &[String],
    token: &Token,
) -> Result<HostId, Problem> {
    let key = state.enrolling_key()?;
    let request = v0::EnrollRequest {
        token_secret: token.secret().to_vec().into(),
        certificate_request: key.request()?.into(),
        host_name: settings.host_name.clone(),
        platform: settings.platform.clone(),
        program_version: settings.program_version.clone(),
    };
    let mut last = Problem::new(Code::Usage, "No address of a server was given.");
    for address in servers {
        let channel = match dial::connect(settings, address, token.server, None).await {
            Ok(channel) => channel,
            Err(problem) => {
                last = problem;
                continue;
            }
        };
        let call = EnrollmentClient::new(channel).enroll(request.clone()).into_inner_within(CALL).await;
        let reply = match call {
            Ok(reply) => reply,
            Err(problem) if is_final(&problem) => return Err(problem),
            Err(problem) => {
                last = problem;
                continue;
            }
        };
        let identity = AgentIdentity::new(token.server, key, reply.certificate.to_vec())?;
        let host = identity.read.host;
        // Addresses first: an identity without them could not be used, addresses without an identity do no harm.
        state.set_addresses(&reply.addresses, address)?;
        state.set_identity(&identity)?;
        state.end_enrolling()?;
        return Ok(host);
    }
    Err(last)
}

/// A call with an end.
trait Within<T> {
    async fn into_inner_within(self, limit: Duration) -> Result<T, Problem>;
}

impl<T, F: Future<Output = Result<tonic::Response<T>, tonic::Status>>> Within<T> for F {
    async fn into_inner_within(self, limit: Duration) -> Result<T, Problem> {
        match tokio::time::timeout(limit, self).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(from_status(&status)),
            Err(_) => {
                Err(Problem::new(Code::NoContact, format!("No answer within {} seconds.", limit.as_secs())))
            }
        }
    }
}

/// Keeps the connection until `stop` becomes true or its sender is gone. Returns early only with a state that cannot
/// be used: not enrolled, damaged.
pub async fn run(
    settings: ConnectionSettings,
    state: AgentState,
    host: Arc<dyn Executor>,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Problem> {
    let (identity, damaged_identity) = state.identity()?;
    let (addresses, damaged_addresses) = state.addresses()?;
    for problem in [damaged_identity, damaged_addresses].into_iter().flatten() {
        (settings.report)(ConnectionEvent::Warning { problem });
    }
    let mut instance = [0; 16];
    settings
        .randomness
        .fill(&mut instance)
        .map_err(|error| Problem::new(Code::Internal, format!("No random numbers: {error}.")))?;
    let shared = Arc::new(LinkShared {
        whereabouts: Mutex::new(Whereabouts { identity: Arc::new(identity), addresses }),
        commands: Commands::default(),
        open_streams: AtomicUsize::new(0),
        runtime: tokio::runtime::Handle::current(),
        settings,
    });
    let agent = Agent { shared, state, host, instance };
    tokio::select! {
        _ = stop.wait_for(|stop| *stop) => Ok(()),
        never = agent.keep_connected() => match never {},
    }
}

struct Agent {
    shared: Arc<LinkShared>,
    state: AgentState,
    host: Arc<dyn Executor>,
    instance: [u8; 16],
}

enum Ending {
    /// Connect again at once: there is a new certificate.
    Again,
    /// It broke after it had been open.
    Broke(Problem),
}

impl Agent {
    fn report(&self, event: ConnectionEvent) {
        (self.shared.settings.report)(event);
    }

    fn settings(&self) -> &ConnectionSettings {
        &self.shared.settings
    }

    async fn keep_connected(&self) -> std::convert::Infallible {
        let mut wait = self.settings().backoff_first;
        loop {
            let mut refused = false;
            let mut renewals = 0;
            let addresses = self.shared.whereabouts().addresses;
            let mut left = addresses.iter();
            let mut next = left.next();
            while let Some(address) = next {
                let ending = self.session(address).await;
                self.shared.commands.detach();
                match ending {
                    // Twice in a row would mean that the server does not like what it has just issued.
                    Ok(Ending::Again) if renewals < 2 => {
                        renewals += 1;
                        continue;
                    }
                    Ok(Ending::Again) => {}
                    Ok(Ending::Broke(problem)) => {
                        wait = self.settings().backoff_first;
                        self.report(ConnectionEvent::Lost { address: address.clone(), problem });
                        // From the top: the list may have changed.
                        break;
                    }
                    Err(problem) if is_final(&problem) || problem.code == Code::CertificateExpired => {
                        refused = true;
                        self.report(ConnectionEvent::Refused { problem });
                    }
                    Err(problem) => self.report(ConnectionEvent::Lost { address: address.clone(), problem }),
                }
                next = left.next();
            }
            if refused {
                wait = self.settings().backoff_most;
            }
            tokio::time::sleep(self.settings().jittered(wait)).await;
            wait = (wait * 2).min(self.settings().backoff_most);
        }
    }

    /// A new certificate, over a new key; both are kept before the old ones are let go.
    async fn renew(&self, channel: &Channel) -> Result<(), Problem> {
        let old = self.shared.whereabouts().identity;
        let key = HostKey::generate()?;
        let request = v0::RenewRequest { certificate_request: key.request()?.into() };
        let reply = EnrollmentClient::new(channel.clone())
            .renew(request)
            .into_inner_within(CALL)
            .await
            .map_err(|problem| about_host(problem, old.read.host))?;
        let identity = AgentIdentity::new(old.server, key, reply.certificate.to_vec())?;
        if identity.read.host != old.read.host {
            return Err(broken("The server renewed the certificate of another host."));
        }
        self.state.set_identity(&identity)?;
        let not_after = identity.read.not_after;
        self.shared.whereabouts.lock().unwrap_or_else(PoisonError::into_inner).identity = Arc::new(identity);
        self.report(ConnectionEvent::Renewed { not_after });
        Ok(())
    }

    /// One session at `address`, from dialling to its end.
    async fn session(&self, address: &str) -> Result<Ending, Problem> {
        let identity = self.shared.whereabouts().identity;
        let channel = dial::connect(self.settings(), address, identity.server, Some(&identity)).await?;
        let now = self.settings().now();
        if identity.read.standing(now) != Standing::Good || identity.read.renewal_due(now) {
            match self.renew(&channel).await {
                Ok(()) => return Ok(Ending::Again),
                // A good certificate can wait for its renewal.
                Err(problem) if identity.read.standing(now) == Standing::Good => {
                    self.report(ConnectionEvent::Warning { problem });
                }
                Err(problem) => return Err(problem),
            }
        }
        let (out, queue) = mpsc::unbounded_channel();
        let hello = v0::Hello {
            lowest_version: LOWEST_VERSION,
            highest_version: HIGHEST_VERSION,
            program_version: self.settings().program_version.clone(),
            host_name: self.settings().host_name.clone(),
            platform: self.settings().platform.clone(),
            providers: self.host.providers(),
            instance: self.instance.to_vec().into(),
            open_commands: self.shared.commands.open(),
        };
        let _ = out.send(v0::AgentMessage { kind: Some(agent_message::Kind::Hello(hello)) });
        let outbound =
            futures::stream::unfold(queue, |mut queue| async { Some((queue.recv().await?, queue)) });
        let mut client = AgentClient::new(channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES);
        let mut messages = match client.control(outbound).into_inner_within(CALL).await {
            Ok(messages) => messages,
            // Our clock says that the certificate is good, the server's that it is not: the server's counts.
            Err(problem) if problem.code == Code::CertificateExpired => {
                return self.renew(&channel).await.map(|()| Ending::Again);
            }
            Err(problem) => return Err(about_host(problem, identity.read.host)),
        };
        let greeting = match next(&mut messages, CALL).await? {
            server_message::Kind::HelloReply(greeting) => greeting,
            server_message::Kind::Goodbye(problem) => return Err(problem.into()),
            _ => return Err(broken("The server's first message is not HelloReply.")),
        };
        if !(LOWEST_VERSION..=HIGHEST_VERSION).contains(&greeting.version) {
            return Err(broken(format!(
                "The server chose protocol version {}, which was not offered.",
                greeting.version
            )));
        }
        match self.state.set_addresses(&greeting.addresses, address) {
            Ok(addresses) => {
                self.shared.whereabouts.lock().unwrap_or_else(PoisonError::into_inner).addresses = addresses;
            }
            Err(problem) => self.report(ConnectionEvent::Warning { problem }),
        }
        self.shared.commands.attach(out);
        self.report(ConnectionEvent::Connected {
            address: address.to_owned(),
            server_name: tame(&greeting.server_name),
        });
        Ok(self.serve(&channel, messages).await)
    }

    async fn serve(&self, channel: &Channel, mut messages: tonic::Streaming<v0::ServerMessage>) -> Ending {
        let mut pages: Vec<v0::ListPage> = Vec::new();
        let mut listed = 0usize;
        let mut check = tokio::time::interval(self.settings().renewal_check);
        check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                message = messages.message() => message,
                _ = check.tick() => {
                    let identity = self.shared.whereabouts().identity;
                    if identity.read.renewal_due(self.settings().now()) {
                        match self.renew(channel).await {
                            // Streams in use go on until the old certificate ends; the server ends them then.
                            Ok(()) if self.shared.open_streams.load(Ordering::Relaxed) == 0 => return Ending::Again,
                            Ok(()) => {}
                            Err(problem) => self.report(ConnectionEvent::Warning { problem }),
                        }
                    }
                    continue;
                }
            };
            match message {
                Ok(Some(v0::ServerMessage { kind: Some(kind) })) => match kind {
                    server_message::Kind::Command(command) => {
                        listed = 0;
                        self.begin(command, std::mem::take(&mut pages));
                    }
                    server_message::Kind::ListPage(page) => {
                        listed = listed.saturating_add(page.ranges.len().max(1));
                        if listed > LIST_RANGES {
                            let message = format!("A list has more than {LIST_RANGES} ranges.");
                            return Ending::Broke(broken(message));
                        }
                        pages.push(page);
                    }
                    server_message::Kind::ResultTaken(taken) => {
                        self.shared.commands.taken(taken.id);
                    }
                    server_message::Kind::Ping(ping) => {
                        self.shared
                            .commands
                            .tell(agent_message::Kind::Pong(v0::Pong { number: ping.number }));
                    }
                    server_message::Kind::Pong(_) => {}
                    server_message::Kind::Goodbye(problem) => return Ending::Broke(problem.into()),
                    server_message::Kind::HelloReply(_) => {
                        return Ending::Broke(broken("The server said hello twice."));
                    }
                },
                // A kind of message that a later server knows; nothing here waits for it.
                Ok(Some(v0::ServerMessage { kind: None })) => {}
                Ok(None) => {
                    return Ending::Broke(Problem::new(Code::NoContact, "The server ended the session."));
                }
                Err(status) => return Ending::Broke(from_status(&status)),
            }
        }
    }

    fn begin(&self, mut command: v0::Command, pages: Vec<v0::ListPage>) {
        let id = command.id;
        match self.shared.commands.begin(id) {
            Ok(true) => {}
            Ok(false) => return,
            Err(problem) => return self.shared.commands.finish(id, Err(problem)),
        }
        if let Err(problem) = put_pages(&mut command, pages) {
            return self.shared.commands.finish(id, Err(problem));
        }
        let Some(kind) = command.kind else {
            let problem = Problem::new(Code::ProtocolVersion, "This agent does not know the command.");
            return self.shared.commands.finish(id, Err(problem));
        };
        let link = ServerLink { shared: Arc::clone(&self.shared), command: id };
        let host = Arc::clone(&self.host);
        let started = std::thread::Builder::new().name(format!("command-{id}")).spawn(move || {
            let finishing = Finishing { link: &link, outcome: None };
            finishing.with(host.command(id, kind, &link));
        });
        if let Err(error) = started {
            let problem = Problem::new(Code::Internal, format!("No thread for the command: {error}."));
            self.shared.commands.finish(id, Err(problem));
        }
    }
}

/// Delivers a result even if the command panics: the server must not wait for ever.
struct Finishing<'a> {
    link: &'a ServerLink,
    outcome: Option<Result<String, Problem>>,
}

impl Finishing<'_> {
    fn with(mut self, outcome: Result<String, Problem>) {
        self.outcome = Some(outcome);
    }
}

impl Drop for Finishing<'_> {
    fn drop(&mut self) {
        let outcome = self.outcome.take().unwrap_or_else(|| {
            Err(Problem::new(Code::Internal, "The command stopped unexpectedly; see the log of the agent."))
        });
        self.link.shared.commands.finish(self.link.command, outcome);
    }
}

async fn next(
    messages: &mut tonic::Streaming<v0::ServerMessage>,
    limit: Duration,
) -> Result<server_message::Kind, Problem> {
    match tokio::time::timeout(limit, messages.message()).await {
        Ok(Ok(Some(v0::ServerMessage { kind: Some(kind) }))) => Ok(kind),
        Ok(Ok(_)) => Err(broken("The server ended the session without a word.")),
        Ok(Err(status)) => Err(from_status(&status)),
        Err(_) => Err(Problem::new(Code::NoContact, "The server did not answer the greeting.")),
    }
}
