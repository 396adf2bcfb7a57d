//! A server of this process that does what a test tells it, right or wrong.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use nbd::{Address, Export, NbdError, Options};

/// A request as the server sees it.
#[derive(Debug, Clone)]
pub struct Ask {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
    pub payload: Vec<u8>,
}

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISCONNECT: u16 = 2;
pub const FLUSH: u16 = 3;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;

/// What the server does next.
pub enum Act {
    Send(Vec<u8>),
    /// Sends, then ends the connection.
    Last(Vec<u8>),
    Silence,
}

/// What the server offers.
#[derive(Clone)]
pub struct Offer {
    pub size: u64,
    pub flags: u16,
    pub blocks: Option<[u32; 3]>,
    pub structured: bool,
    pub go: bool,
    pub fixed: bool,
    pub contexts: Vec<(u32, &'static str)>,
}

impl Default for Offer {
    fn default() -> Offer {
        Offer {
            size: 1 << 20,
            // Has flags, flush, write zeroes.
            flags: 1 | 4 | 64,
            blocks: None,
            structured: true,
            go: true,
            fixed: true,
            contexts: vec![(3, "base:allocation"), (4, "qemu:dirty-bitmap:b")],
        }
    }
}

/// A server; its threads end with their connections.
pub struct Fake {
    folder: tempfile::TempDir,
}

impl Fake {
    /// Runs `session` for each connection.
    pub fn raw(session: impl Fn(UnixStream) + Send + Sync + 'static) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let session = Arc::new(session);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let session = Arc::clone(&session);
                std::thread::spawn(move || session(stream));
            }
        });
        Fake { folder }
    }

    /// An honest handshake, then `answer` for each request.
    pub fn start(offer: Offer, answer: impl Fn(&Ask) -> Act + Send + Sync + 'static) -> Fake {
        Fake::raw(move |mut stream| {
            if handshake(&mut stream, &offer).is_none() {
                return;
            }
            while let Some(ask) = ask(&mut stream) {
                match answer(&ask) {
                    _ if ask.command == DISCONNECT => return,
                    Act::Send(bytes) => {
                        if stream.write_all(&bytes).is_err() {
                            return;
                        }
                    }
                    Act::Last(bytes) => {
                        let _ = stream.write_all(&bytes);
                        return;
                    }
                    Act::Silence => {}
                }
            }
        })
    }

    pub fn address(&self) -> Address {
        Address::Unix(self.folder.path().join("socket"))
    }

    pub fn open(&self) -> Result<Export, NbdError> {
        self.open_with(|_| {})
    }

    pub fn open_with(&self, change: impl FnOnce(&mut Options)) -> Result<Export, NbdError> {
        let mut options = options();
        change(&mut options);
        Export::connect(&self.address(), &options)
    }
}

/// With a bitmap, writable, and patient enough for a busy machine.
pub fn options() -> Options {
    Options {
        bitmaps: vec!["b".to_owned()],
        writable: true,
        timeout: Duration::from_secs(20),
        ..Options::default()
    }
}

fn take<const N: usize>(stream: &mut UnixStream) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

fn number(stream: &mut UnixStream) -> Option<u32> {
    take(stream).map(u32::from_be_bytes)
}

pub fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    for number in [option, kind, data.len() as u32] {
        bytes.extend_from_slice(&number.to_be_bytes());
    }
    bytes.extend_from_slice(data);
    bytes
}

/// Plays the server's part; `None` if the client left.
pub fn handshake(stream: &mut UnixStream, offer: &Offer) -> Option<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT").ok()?;
    stream.write_all(&[0, u8::from(offer.fixed)]).ok()?;
    number(stream)?;
    loop {
        assert_eq!(&take::<8>(stream)?, b"IHAVEOPT");
        let option = number(stream)?;
        let mut data = vec![0; number(stream)? as usize];
        stream.read_exact(&mut data).ok()?;
        assert!(offer.fixed || option == 1, "only NBD_OPT_EXPORT_NAME is for a server that is not fixed");
        let mut answer = Vec::new();
        let unsupported = reply(option, (1 << 31) + 1, b"no");
        match option {
            1 => {
                answer.extend_from_slice(&offer.size.to_be_bytes());
                answer.extend_from_slice(&offer.flags.to_be_bytes());
                answer.extend_from_slice(&[0; 124]);
            }
            2 => return None,
            7 if offer.go => {
                let mut export = vec![0, 0];
                export.extend_from_slice(&offer.size.to_be_bytes());
                export.extend_from_slice(&offer.flags.to_be_bytes());
                answer.extend(reply(option, 3, &export));
                if let Some(blocks) = offer.blocks {
                    answer.extend(reply(
                        option,
                        3,
                        &[&[0, 3][..], &blocks.map(u32::to_be_bytes).concat()].concat(),
                    ));
                }
                answer.extend(reply(option, 3, b"\0\x02a description nobody asked for"));
                answer.extend(reply(option, 1, &[]));
            }
            8 if offer.structured => answer = reply(option, 1, &[]),
            10 if offer.structured => {
                for (id, name) in &offer.contexts {
                    answer.extend(reply(option, 4, &[&id.to_be_bytes()[..], name.as_bytes()].concat()));
                }
                answer.extend(reply(option, 1, &[]));
            }
            _ => answer = unsupported,
        }
        stream.write_all(&answer).ok()?;
        if option == 1 || (option == 7 && offer.go) {
            return Some(());
        }
    }
}

/// The next request; `None` at the end.
pub fn ask(stream: &mut UnixStream) -> Option<Ask> {
    let head = take::<28>(stream)?;
    assert_eq!(head[..4], 0x2560_9513u32.to_be_bytes());
    let mut ask = Ask {
        flags: u16::from_be_bytes(head[4..6].try_into().unwrap()),
        command: u16::from_be_bytes(head[6..8].try_into().unwrap()),
        cookie: u64::from_be_bytes(head[8..16].try_into().unwrap()),
        offset: u64::from_be_bytes(head[16..24].try_into().unwrap()),
        length: u32::from_be_bytes(head[24..28].try_into().unwrap()),
        payload: Vec::new(),
    };
    if ask.command == WRITE {
        ask.payload = vec![0; ask.length as usize];
        stream.read_exact(&mut ask.payload).ok()?;
    }
    Some(ask)
}

pub fn simple(ask: &Ask, errno: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x6744_6698u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&errno.to_be_bytes());
    bytes.extend_from_slice(&ask.cookie.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

pub fn chunk(cookie: u64, done: bool, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33efu32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&u16::from(done).to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

pub fn data(ask: &Ask, done: bool, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(ask.cookie, done, 1, &[&offset.to_be_bytes()[..], bytes].concat())
}

pub fn hole(ask: &Ask, done: bool, offset: u64, length: u32) -> Vec<u8> {
    chunk(ask.cookie, done, 2, &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat())
}

pub fn error(ask: &Ask, done: bool, errno: u32, message: &str) -> Vec<u8> {
    let length = message.len() as u16;
    let payload = [&errno.to_be_bytes()[..], &length.to_be_bytes(), message.as_bytes()].concat();
    chunk(ask.cookie, done, 0x8001, &payload)
}

pub fn status(ask: &Ask, done: bool, context: u32, descriptors: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    for (length, flags) in descriptors {
        payload.extend_from_slice(&length.to_be_bytes());
        payload.extend_from_slice(&flags.to_be_bytes());
    }
    chunk(ask.cookie, done, 5, &payload)
}

/// All of a read, each byte the low byte of its offset. Not of a block status, which may ask for much more.
pub fn pattern(ask: &Ask) -> Vec<u8> {
    if ask.command == BLOCK_STATUS {
        return vec![1; 64];
    }
    (ask.offset..ask.offset + u64::from(ask.length)).map(|at| at as u8).collect()
}
