//! A store in memory, a link that misbehaves on purpose, and disks made from a seed.

#![allow(clippy::unwrap_used)]

mod messages;
mod protect;
mod recover;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block_io::{BlockDevice, DeviceError};
use bytes::Bytes;
use crossbeam_channel::{Receiver, unbounded};
use model::{BLOCK_BYTES, ByteRange};

use crate::message::{FromTarget, ToAgent, ToServer, ToTarget};
use crate::*;

/// Numbers from a seed.
pub(crate) struct Draw(pub u64);

impl Draw {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (self.0 ^ (self.0 >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ (mixed >> 32)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A disk with holes, blocks of zeros, text that compresses, noise that does not, and repeated blocks.
pub(crate) fn disk_bytes(seed: u64, size: usize) -> Vec<u8> {
    let mut draw = Draw(seed);
    let mut bytes = vec![0; size];
    for block in bytes.chunks_mut(BLOCK) {
        match draw.below(6) {
            0 | 1 => {}
            2 => block.fill(0x2a),
            3 => block.iter_mut().enumerate().for_each(|(n, byte)| *byte = (n % 251) as u8 ^ seed as u8),
            _ => block.chunks_mut(8).for_each(|eight| {
                let noise = draw.next().to_le_bytes();
                eight.copy_from_slice(&noise[..eight.len()]);
            }),
        }
    }
    bytes
}

pub(crate) fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

/// The model of a store: what each block holds, and which content this job brought.
#[derive(Default, Clone)]
pub(crate) struct MemoryStore {
    pub(crate) replica: HashMap<(u32, u64), BlockHash>,
    pub(crate) content: HashMap<BlockHash, Vec<u8>>,
    pub(crate) in_job: std::collections::HashSet<BlockHash>,
    /// Places that were written, in order.
    pub(crate) written: Vec<(u32, u64)>,
    /// Forgets what the job brought, as a store with little memory may.
    pub(crate) forgetful: bool,
}

impl MemoryStore {
    pub(crate) fn holding(disks: &[&[u8]]) -> MemoryStore {
        let mut store = MemoryStore::default();
        for (disk, bytes) in (0..).zip(disks) {
            for (place, block) in (0..).zip(padded(bytes).chunks(BLOCK)) {
                if block.iter().any(|&byte| byte != 0) {
                    store.replica.insert((disk, place), hash_block(block));
                    store.content.insert(hash_block(block), block.to_vec());
                }
            }
        }
        store
    }

    pub(crate) fn disk(&self, disk: u32, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size.next_multiple_of(BLOCK)];
        for (&(of, place), hash) in &self.replica {
            if of == disk {
                let at = place as usize * BLOCK;
                bytes[at..at + BLOCK].copy_from_slice(&self.content[hash]);
            }
        }
        assert!(bytes[size..].iter().all(|&byte| byte == 0));
        bytes.truncate(size);
        bytes
    }
}

impl Store for MemoryStore {
    fn announce(&mut self, disk: u32, block: u64, hash: &BlockHash) -> Result<Verdict, StoreError> {
        if self.replica.get(&(disk, block)) == Some(hash) {
            return Ok(Verdict::Unchanged);
        }
        if self.in_job.contains(hash) {
            self.replica.insert((disk, block), *hash);
            self.written.push((disk, block));
            return Ok(Verdict::InJob);
        }
        Ok(Verdict::Wanted)
    }

    fn equals(&mut self, disk: u32, block: u64, hash: &BlockHash) -> Result<bool, StoreError> {
        Ok(self.replica.get(&(disk, block)) == Some(hash))
    }

    fn zero(&mut self, disk: u32, blocks: Range<u64>) -> Result<u64, StoreError> {
        let before = self.replica.len();
        self.replica.retain(|(of, place), _| *of != disk || !blocks.contains(place));
        Ok((before - self.replica.len()) as u64)
    }

    fn occupied(&mut self, disk: u32, blocks: Range<u64>) -> Result<u64, StoreError> {
        Ok(self.replica.keys().filter(|(of, place)| *of == disk && blocks.contains(place)).count() as u64)
    }

    fn put(&mut self, disk: u32, places: &[u64], frame: Frame) -> Result<(), StoreError> {
        let payload = Payload::unproved(frame.codec, frame.bytes, places.len());
        // The store's own look: whatever was proved, these must be the bytes.
        let plain = payload.open_checked(&frame.hashes).unwrap();
        for ((place, hash), block) in places.iter().zip(frame.hashes).zip(plain.chunks(BLOCK)) {
            self.replica.insert((disk, *place), hash);
            self.content.insert(hash, block.to_vec());
            self.written.push((disk, *place));
            if !self.forgetful {
                self.in_job.insert(hash);
            }
        }
        Ok(())
    }
}

/// A sparse disk of numbered blocks: cheap to make, cheap to read.
pub(crate) struct NumberedDisk {
    pub(crate) size: u64,
    pub(crate) blocks: BTreeMap<u64, u64>,
    pub(crate) bytes_read: AtomicU64,
}

impl NumberedDisk {
    pub(crate) fn block(place: u64, version: u64) -> Vec<u8> {
        let mut block = vec![1; BLOCK];
        block[..8].copy_from_slice(&place.to_le_bytes());
        block[8..16].copy_from_slice(&version.to_le_bytes());
        block
    }
}

impl BlockDevice for NumberedDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        assert_eq!((offset % BLOCK_BYTES, buf.len() % BLOCK), (0, 0));
        self.bytes_read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        for (place, block) in (offset / BLOCK_BYTES..).zip(buf.chunks_mut(BLOCK)) {
            if let Some(&version) = self.blocks.get(&place) {
                block.copy_from_slice(&NumberedDisk::block(place, version));
            }
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        let found = self.blocks.range(from / BLOCK_BYTES..).next();
        Ok(found.map(|(&place, _)| ByteRange {
            start: (place * BLOCK_BYTES).max(from),
            end: (place + 1) * BLOCK_BYTES,
        }))
    }
}

/// What happens to a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Pass,
    /// The link breaks; the message is lost.
    Cut,
    /// The message arrives, then the link breaks.
    CutAfter,
    Twice,
    /// It arrives after the next one, if there soon is one.
    Late,
}

/// Decides by the running number of the message, over all links and both directions.
pub(crate) struct Chaos {
    pub(crate) messages: AtomicU64,
    plan: Box<dyn Fn(u64) -> Act + Send + Sync>,
}

impl Chaos {
    pub(crate) fn new(plan: impl Fn(u64) -> Act + Send + Sync + 'static) -> Arc<Chaos> {
        Arc::new(Chaos { messages: AtomicU64::new(0), plan: Box::new(plan) })
    }

    fn act(&self) -> Act {
        (self.plan)(self.messages.fetch_add(1, Ordering::SeqCst))
    }
}

/// A link through [`Chaos`]: it acts on what this end receives from the other.
pub(crate) struct ChaosLink<Out, In> {
    below: Arc<dyn Link<Out, In>>,
    chaos: Arc<Chaos>,
    queue: Receiver<Result<In, LinkError>>,
    again: Mutex<VecDeque<In>>,
    dead: Mutex<bool>,
}

impl<Out: Send + 'static, In: Send + Clone + 'static> ChaosLink<Out, In> {
    pub(crate) fn over(below: Arc<dyn Link<Out, In>>, chaos: Arc<Chaos>) -> ChaosLink<Out, In> {
        let (into, queue) = unbounded();
        let pump = Arc::clone(&below);
        std::thread::spawn(move || {
            loop {
                let message = pump.receive();
                let last = message.is_err();
                if into.send(message).is_err() || last {
                    return;
                }
            }
        });
        ChaosLink { below, chaos, queue, again: Mutex::default(), dead: Mutex::new(false) }
    }

    fn cut(&self) -> LinkError {
        let why = LinkError::Cut("chaos".to_owned());
        *self.dead.lock().unwrap() = true;
        self.below.close(why.clone());
        why
    }
}

impl<Out: Send + 'static, In: Send + Clone + 'static> Link<Out, In> for ChaosLink<Out, In> {
    fn send(&self, message: Out) -> Result<(), LinkError> {
        self.below.send(message)
    }

    fn receive(&self) -> Result<In, LinkError> {
        if let Some(message) = self.again.lock().unwrap().pop_front() {
            return Ok(message);
        }
        if *self.dead.lock().unwrap() {
            return Err(LinkError::Cut("chaos".to_owned()));
        }
        let message = self.queue.recv().unwrap_or_else(|_| Err(LinkError::Cut("gone".to_owned())))?;
        match self.chaos.act() {
            Act::Pass => Ok(message),
            Act::Cut => Err(self.cut()),
            Act::CutAfter => {
                self.cut();
                Ok(message)
            }
            Act::Twice => {
                self.again.lock().unwrap().push_back(message.clone());
                Ok(message)
            }
            Act::Late => match self.queue.recv_timeout(Duration::from_millis(3)) {
                Ok(Ok(next)) => {
                    self.again.lock().unwrap().push_back(message);
                    Ok(next)
                }
                _ => Ok(message),
            },
        }
    }

    fn close(&self, why: LinkError) {
        self.below.close(why);
    }
}

impl<Out, In> Drop for ChaosLink<Out, In> {
    fn drop(&mut self) {
        self.below.close(LinkError::Cut("dropped".to_owned()));
    }
}

/// What a message needs to travel as bytes.
pub(crate) trait Wire: Sized + Send + Clone + std::fmt::Debug + 'static {
    fn to_bytes(&self) -> Bytes;
    fn from_bytes(bytes: Bytes) -> Result<Self, WireError>;
}

macro_rules! wire {
    ($($message:ty),*) => {$(
        impl Wire for $message {
            fn to_bytes(&self) -> Bytes { self.encode() }
            fn from_bytes(bytes: Bytes) -> Result<Self, WireError> { <$message>::decode(bytes) }
        }
    )*};
}
wire!(ToServer, ToAgent, ToTarget, FromTarget);

/// A link of bytes as a link of messages.
struct EncodedLink<L>(L);

impl<Out: Wire, In: Wire, L: Link<Bytes, Bytes>> Link<Out, In> for EncodedLink<L> {
    fn send(&self, message: Out) -> Result<(), LinkError> {
        let bytes = message.to_bytes();
        assert!(bytes.len() <= message::MAX_MESSAGE_BYTES, "{} bytes", bytes.len());
        self.0.send(bytes)
    }

    fn receive(&self) -> Result<In, LinkError> {
        Ok(In::from_bytes(self.0.receive()?).unwrap())
    }

    fn close(&self, why: LinkError) {
        self.0.close(why);
    }
}

/// How the two ends are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Road {
    Values,
    Bytes,
}

/// Two ends, the messages of both directions passing through `chaos`.
#[allow(clippy::type_complexity)]
pub(crate) fn ends<A: Wire, B: Wire>(
    road: Road,
    chaos: &Arc<Chaos>,
) -> (Box<dyn Link<A, B>>, Arc<dyn Link<B, A>>) {
    let (near, far): (Arc<dyn Link<A, B>>, Arc<dyn Link<B, A>>) = match road {
        Road::Values => {
            let (near, far) = pair::<A, B>(8);
            (Arc::new(near), Arc::new(far))
        }
        Road::Bytes => {
            let (near, far) = pair::<Bytes, Bytes>(8);
            (Arc::new(EncodedLink(near)), Arc::new(EncodedLink(far)))
        }
    };
    (Box::new(ChaosLink::over(near, Arc::clone(chaos))), Arc::new(ChaosLink::over(far, Arc::clone(chaos))))
}

/// A connector from a closure.
pub(crate) struct Dial<F>(pub F);

impl<Out, In, F> Connector<Out, In> for Dial<F>
where
    F: FnMut() -> Result<Box<dyn Link<Out, In>>, LinkError> + Send,
{
    fn reconnect(&mut self) -> Result<Box<dyn Link<Out, In>>, LinkError> {
        (self.0)()
    }
}
