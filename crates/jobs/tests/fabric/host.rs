//! The host: disks in memory, the product's own agent end in threads, and faults at numbered messages.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender as Channel, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use block_io::{BlockDevice, DeviceError, MemoryDevice};
use jobs::port::{AgentEnd, TargetEnd};
use jobs::{
    DiskView, Machine, MachineView, ProtectedHost, ReceiveOrder, Receiving, SendOrder, Sending, SentView,
};
use model::{
    ByteRange, Cause, Code, CompletedMachine, Consistency, JobId, MachineRecovery, PreparedDisk,
    PreparedMachine, Problem, Unfrozen,
};
use transfer::message::{FromTarget, ToAgent, ToServer, ToTarget};
use transfer::{
    Connector, DiskOrder, Link, LinkError, Mode, Sender, SenderSettings, Steer, Target, TargetSettings, pair,
};

/// What goes wrong, once, in the next order.
#[derive(Clone)]
pub enum Fault {
    /// The link breaks at the server's message of this number, counted over all links.
    Cut(u64),
    /// The link breaks at every message whose number this divides, four times at most.
    CutEvery(u64),
    /// A person cancels when the server is given this message.
    Cancel(u64),
    /// Reading the frozen disk fails after so many reads.
    ReadFails(u64),
    /// The host dies: no more links after this message.
    Dies(u64),
    /// The view did not stand still.
    ViewChanged,
    /// The view that was sent has another number of disks than the one that was looked at.
    OtherView,
    /// A person cancels when everything has been transferred and is being proved.
    CancelAtConclude,
    /// Something happens between the look and the frozen moment.
    Before(Arc<dyn Fn(&FakeHost) + Send + Sync>),
    /// Something happens after the transfer, before the host's proof.
    After(Arc<dyn Fn() + Send + Sync>),
}

/// What the host's own tracker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tracker {
    /// There is none.
    #[default]
    None,
    /// It lists what differs from the view that it is asked for.
    Right,
    /// It has lost what it knew.
    Lost,
    /// It leaves everything out.
    Lying,
}

#[derive(Default)]
struct Shared {
    tracker: Mutex<Tracker>,
    /// Views that were sent; a disk's description is its view's place here.
    views: Mutex<Vec<Vec<Vec<u8>>>>,
    disks: Mutex<Vec<Vec<u8>>>,
    fault: Mutex<Option<Fault>>,
    sent: Mutex<Vec<(JobId, Vec<Vec<u8>>)>>,
    recovered: Mutex<Vec<u8>>,
    /// Steps of the recovery of a machine, as they were called.
    steps: Mutex<Vec<String>>,
    refuses_completion: Mutex<bool>,
    loses_answer: Mutex<bool>,
    is_thawed_for_good: Mutex<bool>,
    configuration: Mutex<Option<String>>,
    messages: AtomicU64,
}

#[derive(Default, Clone)]
pub struct FakeHost(Arc<Shared>);

impl FakeHost {
    pub fn add_disk(&self, bytes: Vec<u8>) {
        self.0.disks.lock().unwrap().push(bytes);
    }

    /// Changes the disks as a guest, or whoever owns them, does.
    pub fn change<T>(&self, edit: impl FnOnce(&mut Vec<Vec<u8>>) -> T) -> T {
        edit(&mut self.0.disks.lock().unwrap())
    }

    /// Writes content `number` (0 for zeros) to a block.
    pub fn write(&self, disk: usize, block: u64, number: u64) {
        self.change(|disks| {
            let start = block as usize * super::BLOCK;
            let end = (start + super::BLOCK).min(disks[disk].len());
            let bytes = if number == 0 { vec![0; super::BLOCK] } else { super::content(number) };
            disks[disk][start..end].copy_from_slice(&bytes[..end - start]);
        });
    }

    pub fn track(&self, tracker: Tracker) {
        *self.0.tracker.lock().unwrap() = tracker;
    }

    /// The order with what the tracker says in the place of the question, as an agent does it.
    fn resolved(&self, order: DiskOrder, disk: usize, now: &[u8]) -> DiskOrder {
        let Mode::Tracked { base, rotation } = &order.mode else { return order };
        let views = self.0.views.lock().unwrap();
        let then = base.parse::<usize>().ok().and_then(|view| views.get(view)?.get(disk));
        let full = |because: &str| DiskOrder {
            mode: Mode::Full { cause: Cause::new("full compare", [because]) },
            because: because.to_owned(),
            ..order.clone()
        };
        let tracker = *self.0.tracker.lock().unwrap();
        let Some(then) = then.filter(|then| tracker != Tracker::Lost && then.len() == now.len()) else {
            return full("the tracker does not know that view");
        };
        let size = super::BLOCK;
        let differs = then.chunks(size).zip(now.chunks(size)).zip(0u64..).filter(|((a, b), _)| a != b);
        let listed = match tracker {
            Tracker::Lying => Default::default(),
            _ => differs.map(|(_, block)| super::blocks(block..block + 1)).collect(),
        };
        let because = format!("the tracker's list since view {base}");
        DiskOrder { mode: Mode::Extents { listed, rotation: *rotation }, because, ..order }
    }

    pub fn plan(&self, fault: Fault) {
        *self.0.fault.lock().unwrap() = Some(fault);
    }

    /// A plan that was not come to hits no other order.
    pub fn forget_plan(&self) {
        *self.0.fault.lock().unwrap() = None;
    }

    /// Messages that the server was given in the last order.
    pub fn messages(&self) -> u64 {
        self.0.messages.load(Ordering::SeqCst)
    }

    pub fn take_sent(&self) -> Vec<(JobId, Vec<Vec<u8>>)> {
        std::mem::take(&mut self.0.sent.lock().unwrap())
    }

    pub fn recovered(&self) -> Vec<u8> {
        self.0.recovered.lock().unwrap().clone()
    }

    /// Steps of the recovery of a machine since the last question.
    pub fn steps(&self) -> Vec<String> {
        std::mem::take(&mut self.0.steps.lock().unwrap())
    }

    pub fn configure(&self, text: &str) {
        *self.0.configuration.lock().unwrap() = Some(text.to_owned());
    }

    /// The machine cannot be frozen any more.
    pub fn stay_thawed(&self) {
        *self.0.is_thawed_for_good.lock().unwrap() = true;
    }

    pub fn refuse_completion(&self, refuses: bool) {
        *self.0.refuses_completion.lock().unwrap() = refuses;
    }

    pub fn lose_an_answer(&self) {
        *self.0.loses_answer.lock().unwrap() = true;
    }

    fn view(&self, disks: &[Vec<u8>]) -> MachineView {
        let tracked = *self.0.tracker.lock().unwrap() != Tracker::None;
        let description = match tracked {
            true => (self.0.views.lock().unwrap().len().saturating_sub(1)).to_string(),
            false => "{}".to_owned(),
        };
        let disk = |disk: &Vec<u8>| DiskView {
            size: disk.len() as u64,
            sector: 512,
            description: description.clone(),
            tracked,
        };
        MachineView { disks: disks.iter().map(disk).collect() }
    }
}

/// The server's end of a link, with its accidents.
struct Tap {
    below: Arc<dyn Link<ToAgent, ToServer>>,
    host: Arc<Shared>,
    fault: Option<Fault>,
    steer: Steer,
    dead: Arc<AtomicU64>,
}

impl Link<ToAgent, ToServer> for Tap {
    fn send(&self, message: ToAgent) -> Result<(), LinkError> {
        self.below.send(message)
    }

    fn receive(&self) -> Result<ToServer, LinkError> {
        let message = self.below.receive()?;
        let number = self.host.messages.fetch_add(1, Ordering::SeqCst);
        let cut = |why: &str| {
            self.below.close(LinkError::Cut(why.to_owned()));
            Err(LinkError::Cut(why.to_owned()))
        };
        match &self.fault {
            Some(Fault::Cut(at)) if *at == number => cut("cut"),
            Some(Fault::CutEvery(every)) if number % every == every - 1 && number < 4 * every => cut("cut"),
            Some(Fault::Dies(at)) if *at == number => {
                self.dead.store(1, Ordering::SeqCst);
                cut("the host died")
            }
            Some(Fault::Cancel(at)) if *at == number => {
                self.steer.cancel();
                Ok(message)
            }
            _ => Ok(message),
        }
    }

    fn close(&self, why: LinkError) {
        self.below.close(why);
    }
}

struct Dial {
    out: Channel<AgentEnd>,
    host: Arc<Shared>,
    fault: Option<Fault>,
    steer: Steer,
    dead: Arc<AtomicU64>,
}

impl Connector<ToServer, ToAgent> for Dial {
    fn reconnect(&mut self) -> Result<Box<dyn Link<ToServer, ToAgent>>, LinkError> {
        let gone = || LinkError::Cut("nobody listens".to_owned());
        if self.dead.load(Ordering::SeqCst) != 0 {
            return Err(gone());
        }
        let (agent, server) = pair::<ToServer, ToAgent>(8);
        let tap = Tap {
            below: Arc::new(server),
            host: self.host.clone(),
            fault: self.fault.clone(),
            steer: self.steer.clone(),
            dead: self.dead.clone(),
        };
        self.out.send(Arc::new(tap)).map_err(|_| gone())?;
        Ok(Box::new(agent))
    }
}

/// A frozen disk whose reads may fail.
struct Frozen {
    disk: MemoryDevice,
    /// Reads that are left, if they will end.
    left: Option<AtomicU64>,
    said: Arc<Mutex<Option<Problem>>>,
}

impl BlockDevice for Frozen {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        if let Some(left) = &self.left
            && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err()
        {
            *self.said.lock().unwrap() =
                Some(Problem::new(Code::SourceChanged, "The image cannot be read any more."));
            return Err(DeviceError::Damaged {
                object: "the frozen view".to_owned(),
                offset,
                length: buf.len() as u64,
                reason: "it went away".to_owned(),
            });
        }
        self.disk.read_at(offset, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.disk.next_allocated(from)
    }
}

struct FakeSending {
    links: Receiver<AgentEnd>,
    worker: Option<JoinHandle<Result<SentView, Problem>>>,
    stop: Steer,
    said: Arc<Mutex<Option<Problem>>>,
    job: Steer,
    fault: Option<Fault>,
}

impl Sending for FakeSending {
    fn link(&mut self) -> Result<AgentEnd, LinkError> {
        self.links.recv().map_err(|_| LinkError::Cut("the host ended".to_owned()))
    }

    fn failure(&mut self) -> Option<Problem> {
        self.said.lock().unwrap().clone()
    }

    fn conclude(mut self: Box<Self>) -> Result<SentView, Problem> {
        match &self.fault {
            Some(Fault::CancelAtConclude) => self.job.cancel(),
            Some(Fault::After(act)) => act(),
            _ => {}
        }
        // A farewell that was lost: the agent is told again that it is done.
        let worker = self.worker.take().unwrap();
        let farewell = std::mem::replace(&mut self.links, channel().1);
        let answer = std::thread::spawn(move || {
            while let Ok(link) = farewell.recv() {
                if let Ok(ToServer::Hello { next, .. }) = link.receive() {
                    let _ = link.send(ToAgent::Resume { next, finished: true, open: Vec::new() });
                    while link.receive().is_ok() {}
                }
            }
        });
        let result = worker.join().unwrap();
        answer.join().unwrap();
        result
    }
}

impl Drop for FakeSending {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

struct FakeReceiving {
    link: Option<TargetEnd>,
    worker: Option<JoinHandle<Result<(), Problem>>>,
}

struct One(Option<Box<dyn Link<FromTarget, ToTarget>>>);

impl Connector<FromTarget, ToTarget> for One {
    fn reconnect(&mut self) -> Result<Box<dyn Link<FromTarget, ToTarget>>, LinkError> {
        self.0.take().ok_or_else(|| LinkError::Cut("one link is all there is".to_owned()))
    }
}

impl Receiving for FakeReceiving {
    fn link(&mut self) -> Result<TargetEnd, LinkError> {
        self.link.take().ok_or_else(|| LinkError::Cut("one link is all there is".to_owned()))
    }

    fn failure(&mut self) -> Option<Problem> {
        None
    }

    fn conclude(mut self: Box<Self>) -> Result<(), Problem> {
        self.worker.take().unwrap().join().unwrap()
    }
}

impl ProtectedHost for FakeHost {
    fn machines(&self) -> Result<Vec<model::HostMachine>, Problem> {
        Ok(Vec::new())
    }

    fn inspect(&self, _machine: &Machine) -> Result<MachineView, Problem> {
        Ok(self.view(&self.0.disks.lock().unwrap()))
    }

    fn send(&self, order: SendOrder) -> Result<Box<dyn Sending>, Problem> {
        if *self.0.is_thawed_for_good.lock().unwrap()
            && (order.may_retry || order.machine.unfrozen == Unfrozen::Fail)
        {
            return Err(Problem::new(Code::NotFrozen, "No agent answers."));
        }
        let fault = self.0.fault.lock().unwrap().take();
        if let Some(Fault::Before(act)) = &fault {
            act(self);
        }
        self.0.messages.store(0, Ordering::SeqCst);
        let frozen = self.0.disks.lock().unwrap().clone();
        let orders: Vec<DiskOrder> = (0..)
            .zip(order.disks)
            .map(|(disk, order)| match frozen.get(disk) {
                Some(now) => self.resolved(order, disk, now),
                None => order,
            })
            .collect();
        self.0.views.lock().unwrap().push(frozen.clone());
        let mut view = self.view(&frozen);
        self.0.sent.lock().unwrap().push((order.job, frozen.clone()));
        if frozen.len() != orders.len() {
            return Err(Problem::new(Code::SourceChanged, "The machine has other disks now."));
        }
        let said: Arc<Mutex<Option<Problem>>> = Arc::default();
        let disks = frozen.into_iter().zip(orders).map(|(bytes, order)| {
            let left = match &fault {
                Some(Fault::ReadFails(after)) => Some(AtomicU64::new(*after)),
                _ => None,
            };
            let disk = Frozen { disk: MemoryDevice::new(bytes), left, said: said.clone() };
            (Arc::new(disk) as Arc<dyn BlockDevice>, order)
        });
        let settings = SenderSettings { level: None, batch_blocks: 4, workers: 1, ..Default::default() };
        let sender = Sender::new(disks.collect(), settings);
        let stop = sender.steer();
        let (out, links) = channel();
        let mut dial = Dial {
            out,
            host: self.0.clone(),
            fault: fault.clone(),
            steer: order.steer.clone(),
            dead: Arc::default(),
        };
        let fate = fault.clone();
        let configuration = self.0.configuration.lock().unwrap().clone().unwrap_or_default();
        let worker = std::thread::spawn(move || {
            sender
                .run(&mut dial)
                .map_err(|error| Problem::new(Code::AgentUnreachable, format!("{error}.")))?;
            match fate {
                Some(Fault::ViewChanged) => {
                    return Err(Problem::new(Code::SourceChanged, "Somebody wrote to the image."));
                }
                Some(Fault::OtherView) => drop(view.disks.pop()),
                _ => {}
            }
            Ok(SentView {
                view,
                consistency: Consistency::Offline,
                evidence: "the test".to_owned(),
                configuration,
            })
        });
        Ok(Box::new(FakeSending { links, worker: Some(worker), stop, said, job: order.steer, fault }))
    }

    fn receive(&self, order: ReceiveOrder) -> Result<Box<dyn Receiving>, Problem> {
        let (agent, server) = pair::<FromTarget, ToTarget>(8);
        let shared = self.0.clone();
        let worker = std::thread::spawn(move || {
            let device = MemoryDevice::zeroed(order.size as usize);
            let result = Target::new(&device, TargetSettings { fresh: true }, Steer::new())
                .run(&mut One(Some(Box::new(agent))));
            *shared.recovered.lock().unwrap() = device.to_vec();
            result.map(drop).map_err(|error| Problem::new(Code::AgentUnreachable, format!("{error}.")))
        });
        Ok(Box::new(FakeReceiving { link: Some(Arc::new(server)), worker: Some(worker) }))
    }

    fn prepare_machine(&self, recovery: &MachineRecovery) -> Result<PreparedMachine, Problem> {
        let blocks = |bytes: u64| bytes / model::BLOCK_BYTES;
        let needs = recovery.disks.iter().map(|disk| (blocks(disk.data_bytes), blocks(disk.changed_bytes)));
        let needs: Vec<(u64, u64)> = needs.collect();
        self.0.steps.lock().unwrap().push(format!("prepare {} {needs:?}", recovery.configuration));
        let disks = recovery.disks.iter().map(|disk| PreparedDisk {
            disk: disk.disk,
            path: format!("/disks/{}", disk.disk),
            format: "raw".to_owned(),
            over: None,
            is_done: false,
        });
        Ok(PreparedMachine {
            id: recovery.machine,
            name: recovery.machine_name.clone(),
            disks: disks.collect(),
            stopped: false,
            notes: Vec::new(),
        })
    }

    fn complete_machine(
        &self,
        _recovery: &MachineRecovery,
        prepared: &PreparedMachine,
    ) -> Result<CompletedMachine, Problem> {
        self.0.steps.lock().unwrap().push("complete".to_owned());
        if std::mem::take(&mut *self.0.loses_answer.lock().unwrap()) {
            return Err(Problem::new(Code::AgentUnreachable, "The agent restarted."));
        }
        if *self.0.refuses_completion.lock().unwrap() {
            return Err(Problem::new(Code::TargetWrite, "The definition was refused."));
        }
        let (id, name) = (prepared.id, prepared.name.clone());
        Ok(CompletedMachine { id, name, started: false, notes: Vec::new() })
    }

    fn abandon_machine(
        &self,
        _recovery: &MachineRecovery,
        _prepared: &PreparedMachine,
    ) -> Result<(), Problem> {
        self.0.steps.lock().unwrap().push("abandon".to_owned());
        Ok(())
    }
}
