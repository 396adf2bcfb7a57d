//! This machine as a protected host: the agent's own code, over links inside this process.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use agent::{Host, Receive, Wanted};
use jobs::port::{AgentEnd, TargetEnd};
use jobs::{
    DiskView, Machine, MachineView, ProtectedHost, ReceiveOrder, Receiving, SendOrder, Sending, SentView,
};
use model::{Code, CompletedMachine, HostId, MachineRecovery, PreparedMachine, Problem};
use server::app::Hosts;
use transfer::{Connector, Link, LinkError, SenderSettings};

/// Messages buffered each way. The transfer bounds its bytes itself.
const CAPACITY: usize = 64;

/// This machine.
pub struct LocalHost {
    host: Arc<Host>,
}

impl LocalHost {
    /// Orders go to `host`.
    pub fn new(host: Arc<Host>) -> LocalHost {
        LocalHost { host }
    }
}

/// Gives out one link and no other: inside a process nothing breaks but the other end's life.
struct OneLink<Out, In>(Option<Box<dyn Link<Out, In>>>);

impl<Out, In> Connector<Out, In> for OneLink<Out, In> {
    fn reconnect(&mut self) -> Result<Box<dyn Link<Out, In>>, LinkError> {
        self.0.take().ok_or_else(|| LinkError::Cut("the other end of the process gave up".to_owned()))
    }
}

fn view(description: &datasource::MachineDescription) -> Result<MachineView, Problem> {
    let disks = description.disks.iter().map(|disk| {
        Ok(DiskView {
            size: disk.size,
            sector: disk.sector,
            description: serde_json::to_string(disk).map_err(|error| {
                Problem::new(Code::Internal, format!("A disk cannot be described: {error}."))
            })?,
            tracked: disk.tracked,
        })
    });
    Ok(MachineView { disks: disks.collect::<Result<_, Problem>>()? })
}

/// A thread of the agent's end, and what it ended with.
struct Worker<T> {
    thread: Option<JoinHandle<Result<T, Problem>>>,
    outcome: Option<Result<T, Problem>>,
}

impl<T: Send + 'static> Worker<T> {
    fn start(
        name: &str,
        work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<Worker<T>, Problem> {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .map_err(|error| Problem::new(Code::Internal, format!("No thread for the agent: {error}.")))?;
        Ok(Worker { thread: Some(thread), outcome: None })
    }

    fn join(&mut self) -> Option<&Result<T, Problem>> {
        if let Some(thread) = self.thread.take() {
            let outcome = thread.join().unwrap_or_else(|_| {
                Err(Problem::new(Code::Internal, "The agent's thread stopped at an impossible state."))
            });
            self.outcome = Some(outcome);
        }
        self.outcome.as_ref()
    }

    fn failure(&mut self) -> Option<Problem> {
        self.join().and_then(|outcome| outcome.as_ref().err().cloned())
    }

    fn take(mut self) -> Result<T, Problem> {
        self.join();
        self.outcome.take().unwrap_or_else(|| Err(Problem::new(Code::Internal, "The agent gave no answer.")))
    }
}

struct LocalSending {
    link: Option<AgentEnd>,
    given: Option<AgentEnd>,
    worker: Worker<SentView>,
}

impl Sending for LocalSending {
    fn link(&mut self) -> Result<AgentEnd, LinkError> {
        let link = self.link.take().ok_or_else(|| LinkError::Cut("the agent ended".to_owned()))?;
        self.given = Some(link.clone());
        Ok(link)
    }

    fn failure(&mut self) -> Option<Problem> {
        // The transfer is over on this end; the other must not wait for more.
        if let Some(link) = &self.given {
            link.close(LinkError::Cut("the server gave up".to_owned()));
        }
        self.worker.failure()
    }

    fn conclude(mut self: Box<Self>) -> Result<SentView, Problem> {
        self.link = None;
        std::mem::replace(&mut self.worker, Worker { thread: None, outcome: None }).take()
    }
}

impl Drop for LocalSending {
    fn drop(&mut self) {
        for link in [self.link.take(), self.given.take()].into_iter().flatten() {
            link.close(LinkError::Cancelled);
        }
        self.worker.join();
    }
}

struct LocalReceiving {
    link: Option<TargetEnd>,
    given: Option<TargetEnd>,
    worker: Worker<()>,
}

impl Receiving for LocalReceiving {
    fn link(&mut self) -> Result<TargetEnd, LinkError> {
        let link = self.link.take().ok_or_else(|| LinkError::Cut("the agent ended".to_owned()))?;
        self.given = Some(link.clone());
        Ok(link)
    }

    fn failure(&mut self) -> Option<Problem> {
        if let Some(link) = &self.given {
            link.close(LinkError::Cut("the server gave up".to_owned()));
        }
        self.worker.failure()
    }

    fn conclude(mut self: Box<Self>) -> Result<(), Problem> {
        self.link = None;
        std::mem::replace(&mut self.worker, Worker { thread: None, outcome: None }).take()
    }
}

impl Drop for LocalReceiving {
    fn drop(&mut self) {
        for link in [self.link.take(), self.given.take()].into_iter().flatten() {
            link.close(LinkError::Cancelled);
        }
        self.worker.join();
    }
}

impl ProtectedHost for LocalHost {
    fn machines(&self) -> Result<Vec<model::HostMachine>, Problem> {
        self.host.inventory()
    }

    fn inspect(&self, machine: &Machine) -> Result<MachineView, Problem> {
        view(&self.host.inspect(&agent::host::machine(&machine.definition)?)?)
    }

    fn send(&self, order: SendOrder) -> Result<Box<dyn Sending>, Problem> {
        let machine = agent::host::machine(&order.machine.definition)?;
        // What a killed run left beside the images goes before anything new is put there (S32).
        self.host.sweep(std::slice::from_ref(&machine))?;
        let (agent_end, server_end) = transfer::pair(CAPACITY);
        let host = self.host.clone();
        let worker = Worker::start("agent-send", move || {
            let mut connector = OneLink(Some(Box::new(agent_end)));
            let sent = host.send(
                order.job,
                &machine,
                order.disks,
                Wanted {
                    consistency: order.wanted,
                    unfrozen: order.machine.unfrozen,
                    may_retry: order.may_retry,
                    scratch_bytes: order.scratch_bytes,
                },
                SenderSettings::default(),
                &mut connector,
            )?;
            Ok(SentView {
                view: view(&sent.description)?,
                consistency: sent.consistency,
                evidence: sent.evidence,
                configuration: sent.configuration,
            })
        })?;
        Ok(Box::new(LocalSending { link: Some(Arc::new(server_end)), given: None, worker }))
    }

    fn receive(&self, order: ReceiveOrder) -> Result<Box<dyn Receiving>, Problem> {
        let (agent_end, server_end) = transfer::pair(CAPACITY);
        let host = self.host.clone();
        let order = Receive {
            job: order.job,
            point: order.point,
            disk: order.disk,
            path: PathBuf::from(order.path),
            format: order.format,
            size: order.size,
            sector: order.sector,
            description: order.description,
            over: order.over,
            overwrite: order.overwrite,
            sync: order.sync,
        };
        let worker = Worker::start("agent-receive", move || {
            host.receive(&order, &mut OneLink(Some(Box::new(agent_end))))
        })?;
        Ok(Box::new(LocalReceiving { link: Some(Arc::new(server_end)), given: None, worker }))
    }

    fn prepare_machine(&self, recovery: &MachineRecovery) -> Result<PreparedMachine, Problem> {
        self.host.prepare_machine(recovery)
    }

    fn complete_machine(
        &self,
        recovery: &MachineRecovery,
        prepared: &PreparedMachine,
    ) -> Result<CompletedMachine, Problem> {
        self.host.complete_machine(recovery, prepared)
    }

    fn abandon_machine(&self, recovery: &MachineRecovery, prepared: &PreparedMachine) -> Result<(), Problem> {
        self.host.abandon_machine(recovery, prepared)
    }
}

/// Hosts of a standalone process: this machine and no other.
pub struct OnlyThisMachine {
    host: Arc<LocalHost>,
}

impl OnlyThisMachine {
    /// The one host.
    pub fn new(host: Arc<Host>) -> OnlyThisMachine {
        OnlyThisMachine { host: Arc::new(LocalHost::new(host)) }
    }
}

fn needs_server() -> Problem {
    Problem::new(Code::Unsupported, "Standalone, this machine is the only host; there are no enrolled ones.")
        .hint("Run a server: `stillpoint server run --data DIR`.")
}

impl Hosts for OnlyThisMachine {
    fn host(&self, host: Option<HostId>) -> Result<Arc<dyn ProtectedHost>, Problem> {
        match host {
            None => Ok(self.host.clone()),
            Some(_) => Err(needs_server()),
        }
    }

    fn list(&self) -> Result<Vec<protocol::api::Host>, Problem> {
        Ok(Vec::new())
    }

    fn make_token(&self, _request: &protocol::api::MakeToken) -> Result<protocol::api::TokenMade, Problem> {
        Err(needs_server())
    }

    fn revoke(&self, _host: HostId) -> Result<(), Problem> {
        Err(needs_server())
    }

    fn is_standalone(&self) -> bool {
        true
    }
}
