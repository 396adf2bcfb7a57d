//! What commands get of the connection: data streams of their jobs, and the way to tell how far they are.

use super::commands::Commands;
use super::state::AgentIdentity;
use super::{ConnectionSettings, dial, is_final};
use futures::{FutureExt, StreamExt};
use model::{JobId, Problem};
use protocol::channel::{DataChannel, Doorway, OutboundPackets, data_channel};
use protocol::v0::{self, agent_client::AgentClient, packet};
use protocol::wire::{MESSAGE_BYTES, broken, from_status};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::oneshot;

/// With whom, where and as whom to connect now. Renewals and new address lists replace it.
#[derive(Clone)]
pub(super) struct Whereabouts {
    pub identity: Arc<AgentIdentity>,
    pub addresses: Vec<String>,
}

pub(super) struct LinkShared {
    pub settings: ConnectionSettings,
    pub whereabouts: Mutex<Whereabouts>,
    pub commands: Commands,
    pub open_streams: AtomicUsize,
    pub runtime: tokio::runtime::Handle,
}

impl LinkShared {
    pub(super) fn whereabouts(&self) -> Whereabouts {
        self.whereabouts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The connection as a command sees it. Blocking: for the command's own threads.
#[derive(Clone)]
pub struct ServerLink {
    pub(super) shared: Arc<LinkShared>,
    pub(super) command: u64,
}

impl ServerLink {
    /// The data channel of a job, on a connection of its own. [`DataChannel::reconnect`] opens the stream, the first
    /// time and after each cut.
    pub fn open_data(&self, job: JobId) -> DataChannel {
        // The channel and its redialling know each other; the doorway comes a moment later.
        let dialler = Arc::new(Dialler {
            shared: Arc::clone(&self.shared),
            job,
            attempt: AtomicU32::new(0),
            doorway: Mutex::new(None),
            dialling: Mutex::new(None),
        });
        let redial = {
            let dialler = Arc::clone(&dialler);
            Box::new(move || Dialler::redial(&dialler))
        };
        let (channel, doorway) = data_channel(redial);
        *dialler.doorway.lock().unwrap_or_else(PoisonError::into_inner) = Some(doorway);
        channel
    }

    /// Tells the server how far the command is. Lost while there is no session; a few times a second is enough.
    pub fn progress(&self, job: JobId, phase: &str, done_bytes: u64, total_bytes: u64, json: String) {
        self.shared.commands.tell(v0::agent_message::Kind::Progress(v0::Progress {
            id: self.command,
            job: job.0.to_vec().into(),
            phase: phase.to_owned(),
            done_bytes,
            total_bytes,
            json,
        }));
    }
}

struct Dialler {
    shared: Arc<LinkShared>,
    job: JobId,
    attempt: AtomicU32,
    doorway: Mutex<Option<Doorway>>,
    dialling: Mutex<Option<tokio::task::AbortHandle>>,
}

impl Drop for Dialler {
    fn drop(&mut self) {
        if let Some(task) = self.dialling.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

impl Dialler {
    fn redial(self: &Arc<Dialler>) {
        let Some(doorway) = self.doorway.lock().unwrap_or_else(PoisonError::into_inner).clone() else {
            return;
        };
        let attempt = self.attempt.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let (shared, job) = (Arc::clone(&self.shared), self.job);
        let task = self.shared.runtime.spawn(dial_until_open(shared, job, attempt, doorway)).abort_handle();
        let old = self.dialling.lock().unwrap_or_else(PoisonError::into_inner).replace(task);
        if let Some(old) = old {
            old.abort();
        }
    }
}

async fn dial_until_open(shared: Arc<LinkShared>, job: JobId, attempt: u32, doorway: Doorway) {
    let mut wait = shared.settings.backoff_first;
    while !doorway.is_closed() {
        let Whereabouts { identity, addresses } = shared.whereabouts();
        for address in &addresses {
            match open(&shared, &identity, address, job, attempt, &doorway).await {
                Ok(()) => return,
                Err(problem) if is_final(&problem) => return doorway.close(problem),
                Err(problem) => tracing::debug!(%address, %job, %problem, "no data stream"),
            }
        }
        tokio::time::sleep(shared.settings.jittered(wait)).await;
        wait = (wait * 2).min(shared.settings.backoff_most);
    }
}

async fn open(
    shared: &Arc<LinkShared>,
    identity: &AgentIdentity,
    address: &str,
    job: JobId,
    attempt: u32,
    doorway: &Doorway,
) -> Result<(), Problem> {
    let channel = dial::connect(&shared.settings, address, identity.server, Some(identity)).await?;
    let mut client = AgentClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(MESSAGE_BYTES);
    // The queue of the channel is joined on only when the server has taken the stream: until then nothing of the job
    // may count as sent.
    let open = packet::Kind::Open(v0::OpenData { job: job.0.to_vec().into(), attempt });
    let (join, joined) = oneshot::channel::<OutboundPackets>();
    let queue = joined.into_stream().flat_map(|joined| match joined {
        Ok(packets) => packets.left_stream(),
        Err(_) => futures::stream::empty().right_stream(),
    });
    let first = futures::stream::iter([v0::Packet { kind: Some(open) }]);
    let opened = client.data(first.chain(queue)).await.map_err(|status| from_status(&status))?;
    let mut packets = opened.into_inner();
    match packets.message().await.map_err(|status| from_status(&status))? {
        Some(v0::Packet { kind: Some(packet::Kind::Opened(_)) }) => {}
        _ => return Err(broken("The first packet of the server is not Opened.")),
    }
    let (outbound, pump) = doorway.enter()?;
    if join.send(outbound).is_err() {
        return Err(Problem::new(model::Code::NoContact, "The stream broke as it was opened."));
    }
    shared.open_streams.fetch_add(1, Ordering::Relaxed);
    let (shared, doorway) = (Arc::clone(shared), doorway.clone());
    // On its own: ending the dialling must not end the stream.
    tokio::spawn(async move {
        if let Err(problem) = pump.run(packets).await {
            tracing::debug!(%job, %problem, "data stream ended");
            if is_final(&problem) {
                doorway.close(problem);
            }
        }
        shared.open_streams.fetch_sub(1, Ordering::Relaxed);
    });
    Ok(())
}
