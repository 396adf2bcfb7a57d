//! Control and Data: the calls of enrolled hosts.

use super::gate::Gate;
use super::registry::{AgentInfo, SessionRegistry};
use super::{OPEN_COMMANDS, SessionSettings, blocking, require_good};
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use identity::PeerCertificate;
use model::{Code, Problem};
use protocol::v0::{self, agent_message, agent_server::Agent, packet, server_message};
use protocol::wire::{broken, choose_version, id, tame, to_status};
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status, Streaming};

/// A caller that has not sent its first message by then is hung up on.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// Most providers that are kept of a Hello.
const PROVIDERS: usize = 32;

pub(super) struct AgentService {
    settings: SessionSettings,
    registry: SessionRegistry,
}

impl AgentService {
    pub(super) fn new(settings: SessionSettings, registry: SessionRegistry) -> AgentService {
        AgentService { settings, registry }
    }

    /// The caller, if it is a host that may act now.
    async fn admit(&self, gate: Option<Gate>) -> Result<(Gate, Arc<PeerCertificate>), Problem> {
        let refuse =
            || Problem::new(Code::Unauthorised, "This call needs the certificate of an enrolled host.");
        let gate = gate.ok_or_else(refuse)?;
        let certificate = gate.certificate.clone().ok_or_else(refuse)?;
        let (register, asked) = (self.settings.register.clone(), Arc::clone(&certificate));
        blocking(move || register.admit(&asked)).await?;
        require_good(&certificate, self.settings.now())?;
        Ok((gate, certificate))
    }

    async fn hello(
        &self,
        gate: Option<Gate>,
        mut messages: Streaming<v0::AgentMessage>,
    ) -> Result<BoxStream<'static, Result<v0::ServerMessage, Status>>, Problem> {
        let (gate, certificate) = self.admit(gate).await?;
        let hello = match first(&mut messages).await?.kind {
            Some(agent_message::Kind::Hello(hello)) => hello,
            _ => return Err(broken("The first message of a session is not Hello.")),
        };
        let version = choose_version(hello.lowest_version, hello.highest_version)?;
        if hello.instance.len() != 16 || hello.open_commands.len() > OPEN_COMMANDS {
            return Err(broken("Hello names no instance, or more commands than can be open."));
        }
        let info = AgentInfo {
            host_name: tame(&hello.host_name),
            platform: tame(&hello.platform),
            program_version: tame(&hello.program_version),
            providers: hello.providers.iter().take(PROVIDERS).map(|name| tame(name)).collect(),
            protocol_version: version,
            remote: gate.remote,
            instance: hello.instance.to_vec(),
        };
        let greeting = v0::HelloReply {
            version,
            addresses: self.settings.addresses.clone(),
            server_name: self.settings.server_name.clone(),
            pool: self.settings.pool.0.to_vec().into(),
            server_time: self.settings.now().0,
        };
        let (registry, host) = (self.registry.clone(), certificate.host);
        let (queue, mut ending, number) = registry.attach(certificate, info, &hello.open_commands, greeting);
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    biased;
                    _ = ending.wait_for(|end| *end) => break,
                    message = messages.message() => message,
                };
                match message.map(|message| message.and_then(|message| message.kind)) {
                    Ok(Some(agent_message::Kind::Result(result))) => registry.take_result(host, result),
                    Ok(Some(agent_message::Kind::Progress(progress))) => {
                        registry.take_progress(host, progress)
                    }
                    Ok(Some(agent_message::Kind::Ping(ping))) => {
                        registry.reply(host, server_message::Kind::Pong(v0::Pong { number: ping.number }));
                    }
                    Ok(Some(agent_message::Kind::Pong(_))) => {}
                    Ok(Some(agent_message::Kind::Hello(_)) | None) | Err(_) => break,
                }
            }
            registry.detach(host, number);
        });
        // The queue ends when the registry lets go of the session.
        Ok(futures::stream::unfold(queue, |mut queue| async { Some((Ok(queue.recv().await?), queue)) })
            .boxed())
    }

    async fn open_data(
        &self,
        gate: Option<Gate>,
        mut packets: Streaming<v0::Packet>,
    ) -> Result<BoxStream<'static, Result<v0::Packet, Status>>, Problem> {
        let (_, certificate) = self.admit(gate).await?;
        let open = match first(&mut packets).await?.kind {
            Some(packet::Kind::Open(open)) => open,
            _ => return Err(broken("The first packet of a data stream is not OpenData.")),
        };
        let job = id("job", &open.job)?;
        let host = certificate.host;
        let (outbound, pump) = self.registry.enter_data(certificate, job)?;
        tokio::spawn(pump.run(packets).map(move |ended| {
            if let Err(problem) = ended {
                tracing::debug!(%host, %job, %problem, "data stream ended");
            }
        }));
        Ok(outbound.starting_with(packet::Kind::Opened(v0::Opened {})).map(Ok).boxed())
    }
}

async fn first<T>(messages: &mut Streaming<T>) -> Result<T, Problem> {
    match tokio::time::timeout(FIRST_MESSAGE, messages.message()).await {
        Ok(Ok(Some(message))) => Ok(message),
        Ok(Ok(None)) => Err(broken("The stream ended before its first message.")),
        Ok(Err(status)) => Err(protocol::wire::from_status(&status)),
        Err(_) => Err(broken("No first message came within 10 seconds.")),
    }
}

#[tonic::async_trait]
impl Agent for AgentService {
    type ControlStream = BoxStream<'static, Result<v0::ServerMessage, Status>>;
    type DataStream = BoxStream<'static, Result<v0::Packet, Status>>;

    async fn control(
        &self,
        request: Request<Streaming<v0::AgentMessage>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        let gate = request.extensions().get::<Gate>().cloned();
        let opened = self.hello(gate, request.into_inner()).await;
        opened.map(Response::new).map_err(|problem| to_status(&problem))
    }

    async fn data(
        &self,
        request: Request<Streaming<v0::Packet>>,
    ) -> Result<Response<Self::DataStream>, Status> {
        let gate = request.extensions().get::<Gate>().cloned();
        let opened = self.open_data(gate, request.into_inner()).await;
        opened.map(Response::new).map_err(|problem| to_status(&problem))
    }
}
