//! Servers that lie, stall and die, and the odd ones that are right.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod fake;

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use block_io::{BlockDevice, ByteRange, DeviceError, WritableDevice, conformance};
use fake::*;
use nbd::{Export, NbdError};

fn cause(error: DeviceError) -> NbdError {
    let DeviceError::Io { source, .. } = error else { panic!("not Io: {error}") };
    source.into_inner().unwrap().downcast_ref::<NbdError>().unwrap().clone()
}

fn read(export: &Export, offset: u64, length: usize) -> Result<Vec<u8>, NbdError> {
    let mut bytes = vec![0xAA; length];
    export.read_at(offset, &mut bytes).map(|()| bytes).map_err(cause)
}

/// A server that answers every request with `answer`; the read of 100 bytes at 1000 from it.
fn answered(
    answer: impl Fn(&Ask) -> Vec<u8> + Send + Sync + 'static,
) -> (Fake, Export, Result<Vec<u8>, NbdError>) {
    let fake = Fake::start(Offer::default(), move |ask| Act::Send(answer(ask)));
    let export = fake.open().unwrap();
    let found = read(&export, 1000, 100);
    (fake, export, found)
}

fn assert_protocol<T: std::fmt::Debug>(found: Result<T, NbdError>, what: &str) {
    assert!(matches!(found, Err(NbdError::Protocol { .. })), "{what}: {found:?}");
}

#[test]
fn what_is_no_newstyle_server_is_refused() {
    for greeting in [
        b"SSH-2.0-OpenSSH_9.2 and more bytes".to_vec(),
        [b"NBDMAGIC".as_slice(), &0x0000_4202_8186_1253u64.to_be_bytes(), &[0; 140]].concat(),
        b"NBDMAGICIHAVENOT\0\x01".to_vec(),
    ] {
        let fake = Fake::raw(move |mut stream| drop(stream.write_all(&greeting)));
        let found = fake.open().err().unwrap();
        assert!(matches!(found, NbdError::Handshake { .. }), "{found}");
    }
    let mute = Fake::raw(drop);
    assert!(matches!(mute.open().err().unwrap(), NbdError::Closed { .. }));
    let nowhere = nbd::Address::Unix("/nonexistent/socket".into());
    assert!(matches!(Export::connect(&nowhere, &options()).err().unwrap(), NbdError::Connect { .. }));
}

#[test]
fn handshake_replies_that_lie_are_refused() {
    let unknown = fake::reply(8, 1, &[]);
    for answer in [
        [&[0u8; 8][..], &unknown[8..]].concat(),
        fake::reply(9, 1, &[]),
        [&unknown[..16], &u32::MAX.to_be_bytes()].concat(),
        fake::reply(8, 4, b"what"),
    ] {
        let fake = Fake::raw(move |mut stream| {
            let _ = stream.write_all(b"NBDMAGICIHAVEOPT\0\x01");
            let _ = stream.write_all(&answer);
            std::thread::sleep(Duration::from_millis(200));
        });
        let found = fake.open().err().unwrap();
        assert!(matches!(found, NbdError::Handshake { .. }), "{found}");
    }
}

#[test]
fn a_context_that_is_not_offered() {
    let offer = Offer { contexts: vec![(1, "base:allocation")], ..Offer::default() };
    let fake = Fake::start(offer, |_| Act::Silence);
    let found = fake.open().err().unwrap();
    assert!(matches!(&found, NbdError::NoContext { name } if name == "qemu:dirty-bitmap:b"), "{found}");
    // Without structured replies there are none at all.
    let fake = Fake::start(Offer { structured: false, ..Offer::default() }, |_| Act::Silence);
    assert!(matches!(fake.open().err().unwrap(), NbdError::NoContext { .. }));
    // One that was not asked for when the export was opened.
    let fake = Fake::start(Offer::default(), |_| Act::Silence);
    let found = fake.open().unwrap().dirty("c").err().unwrap();
    assert!(matches!(&found, NbdError::NoContext { name } if name == "qemu:dirty-bitmap:c"), "{found}");
}

#[test]
fn old_servers_with_simple_replies() {
    for (fixed, go, structured) in [(false, false, false), (true, false, false), (true, false, true)] {
        let contexts = vec![(3, "base:allocation")];
        let offer = Offer { fixed, go, structured, contexts, ..Offer::default() };
        let fake = Fake::start(offer, move |ask| {
            Act::Send(match structured {
                true => data(ask, true, ask.offset, &pattern(ask)),
                false => simple(
                    ask,
                    u32::from(ask.offset == 4096) * 5,
                    &pattern(ask)[usize::from(ask.offset == 4096) * 10..],
                ),
            })
        });
        let export = fake.open_with(|options| options.bitmaps.clear()).unwrap();
        assert_eq!(read(&export, 1000, 3).unwrap(), [232, 233, 234]);
        assert_eq!(export.tells_allocation(), structured);
        if !structured {
            let whole = ByteRange { start: 77, end: 1 << 20 };
            assert_eq!(export.next_allocated(77).unwrap(), Some(whole));
            assert!(matches!(read(&export, 4096, 10), Err(NbdError::Server { errno: 5, .. })));
            assert_eq!(read(&export, 1000, 3).unwrap(), [232, 233, 234], "an error ends one request only");
        }
    }
}

#[test]
fn replies_that_break_the_stream_end_the_connection() {
    type Lie = fn(&Ask) -> Vec<u8>;
    let lies: [(&str, Lie); 13] = [
        ("magic", |_| vec![9; 20]),
        ("cookie", |ask| chunk(ask.cookie + 1, true, 0, &[])),
        ("second reply", |ask| [data(ask, false, 1000, &[1; 50]), chunk(77, true, 0, &[])].concat()),
        ("too large", |ask| data(ask, true, 1000, &[1; 101])),
        ("huge", |ask| [&chunk(ask.cookie, true, 1, &[])[..16], &u32::MAX.to_be_bytes()].concat()),
        ("before", |ask| data(ask, true, 999, &[1; 100])),
        ("behind", |ask| data(ask, true, 1050, &[1; 51])),
        ("far behind", |ask| data(ask, true, u64::MAX - 3, &[1; 50])),
        ("hole outside", |ask| hole(ask, true, 1000, 101)),
        ("twice", |ask| [data(ask, false, 1000, &[1; 60]), hole(ask, true, 1050, 50)].concat()),
        ("half", |ask| data(ask, true, 1000, &[1; 60])),
        ("simple reply to a read", |ask| simple(ask, 0, &[1; 100])),
        ("status to a read", |ask| status(ask, true, 3, &[(100, 0)])),
    ];
    for (what, lie) in lies {
        let (_fake, export, found) = answered(lie);
        assert_protocol(found, what);
        let begun = Instant::now();
        assert!(matches!(read(&export, 0, 1), Err(NbdError::Closed { .. })), "{what}: later");
        assert!(matches!(cause(export.write_at(0, &[1]).unwrap_err()), NbdError::Closed { .. }));
        assert!(begun.elapsed() < Duration::from_secs(5), "{what}: at once");
    }
}

#[test]
fn data_and_holes_in_any_order() {
    let (_fake, _export, found) = answered(|ask| {
        [
            data(ask, false, 1090, &[9; 10]),
            hole(ask, false, 1010, 80),
            data(ask, false, 1000, &[1; 10]),
            chunk(ask.cookie, true, 0, &[]),
        ]
        .concat()
    });
    assert_eq!(found.unwrap(), [vec![1; 10], vec![0; 80], vec![9; 10]].concat());
}

#[test]
fn an_error_after_data_fails_the_read_and_nothing_else() {
    let (_fake, export, found) = answered(|ask| {
        let mut answer = data(ask, false, ask.offset, &pattern(ask));
        if ask.offset == 1000 {
            answer.extend(error(ask, false, 5, "a bad \x1b[31msector"));
        }
        answer.extend(chunk(ask.cookie, true, 0, &[]));
        answer
    });
    let found = found.unwrap_err();
    let NbdError::Server { errno: 5, message, command: "read", offset: 1000, length: 100 } = &found else {
        panic!("{found}");
    };
    assert_eq!(message, "a bad \u{fffd}[31msector");
    assert_eq!(read(&export, 2000, 1).unwrap(), [208]);
}

#[test]
fn replies_out_of_order_reach_those_who_asked() {
    const THREADS: usize = 8;
    let held: Mutex<Vec<Ask>> = Mutex::default();
    let fake = Fake::start(Offer::default(), move |ask| {
        let mut held = held.lock().unwrap();
        held.push(ask.clone());
        if held.len() < THREADS {
            return Act::Silence;
        }
        // Last come, first served, the halves of all mixed.
        let mut bytes = Vec::new();
        for ask in held.iter().rev() {
            bytes.extend(data(ask, false, ask.offset + 50, &pattern(ask)[50..]));
        }
        for ask in held.drain(..) {
            bytes.extend(data(&ask, true, ask.offset, &pattern(&ask)[..50]));
        }
        Act::Send(bytes)
    });
    let export = fake.open().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS as u64 {
            let export = &export;
            scope.spawn(move || {
                for turn in 0..50 {
                    let offset = thread * 10_000 + turn * 100;
                    let expected: Vec<u8> = (offset..offset + 100).map(|at| at as u8).collect();
                    assert_eq!(read(export, offset, 100).unwrap(), expected);
                }
            });
        }
    });
}

#[test]
fn a_block_status_that_lies_is_an_error() {
    type Lie = fn(&Ask) -> Vec<u8>;
    let lies: [(&str, Lie); 10] = [
        ("no descriptor", |ask| status(ask, true, 4, &[])),
        ("empty descriptor", |ask| status(ask, true, 4, &[(0, 1)])),
        ("empty later", |ask| status(ask, true, 4, &[(512, 1), (0, 1)])),
        ("behind the request", |ask| status(ask, true, 4, &[(1 << 20, 0), (512, 1)])),
        ("behind the disk", |ask| status(ask, true, 4, &[(512, 1), (1 << 20, 0)])),
        ("unknown context", |ask| status(ask, true, 9, &[(1 << 20, 0)])),
        ("other context only", |ask| status(ask, true, 3, &[(1 << 20, 0)])),
        ("nothing", |ask| chunk(ask.cookie, true, 0, &[])),
        ("twice", |ask| [status(ask, false, 4, &[(512, 0)]), status(ask, true, 4, &[(512, 0)])].concat()),
        ("simple", |ask| simple(ask, 0, &[])),
    ];
    for (what, lie) in lies {
        let fake = Fake::start(Offer::default(), move |ask| Act::Send(lie(ask)));
        assert_protocol(fake.open().unwrap().dirty("b"), what);
    }
    let fake = Fake::start(Offer::default(), |ask| Act::Send(error(ask, true, 22, "")));
    let found = fake.open().unwrap().dirty("b").unwrap_err();
    assert!(found.to_string().contains("error 22: invalid argument"), "{found}");
}

#[test]
fn a_bitmap_is_walked_to_its_end() {
    // Half of what is asked each time, and both contexts.
    let size = 5 << 30;
    let asked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&asked);
    let fake = Fake::start(Offer { size, ..Offer::default() }, move |ask| {
        if ask.command == DISCONNECT {
            return Act::Silence;
        }
        count.fetch_add(1, Ordering::Relaxed);
        assert!(ask.offset + u64::from(ask.length) <= size && ask.flags == 0);
        let half = (ask.length / 2).max(1 << 16).min(ask.length);
        let first = status(ask, false, 3, &[(ask.length, 3)]);
        Act::Send([first, status(ask, true, 4, &[(half - 65_536 + 512, 0), (65_536 - 512, 1 | 8)])].concat())
    });
    let dirty = fake.open().unwrap().dirty("b").unwrap();
    assert_eq!(dirty.bytes() / (65_536 - 512), asked.load(Ordering::Relaxed));
    assert_eq!(dirty.as_slice().last().unwrap().end, size);
    let empty = Fake::start(Offer { size: 0, ..Offer::default() }, |_| Act::Silence);
    let export = empty.open().unwrap();
    assert!(export.dirty("b").unwrap().is_empty());
    assert_eq!(export.next_allocated(0).unwrap(), None);
}

#[test]
fn only_zeros_are_left_out_and_one_answer_serves_a_walk() {
    let asked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&asked);
    let fake = Fake::start(Offer { size: 4096 * 5, ..Offer::default() }, move |ask| {
        if ask.command != BLOCK_STATUS {
            return Act::Send(simple(ask, 0, &[]));
        }
        count.fetch_add(1, Ordering::Relaxed);
        // Data, hole that is not zero, zero that is no hole, both, data.
        let all = [(4096, 0), (4096, 1), (4096, 2), (4096, 3), (4096, 4)];
        let from = &all[(ask.offset / 4096) as usize..];
        Act::Send([status(ask, false, 3, from), status(ask, true, 4, &[(ask.length, 0)])].concat())
    });
    let export = fake.open().unwrap();
    let range = |start, end| Some(ByteRange { start, end });
    assert_eq!(export.next_allocated(0).unwrap(), range(0, 8192));
    assert_eq!(export.next_allocated(100).unwrap(), range(100, 8192));
    assert_eq!(export.next_allocated(8192).unwrap(), range(16_384, 20_480));
    assert_eq!(export.next_allocated(20_479).unwrap(), range(20_479, 20_480));
    assert_eq!(export.next_allocated(20_480).unwrap(), None);
    assert_eq!(export.next_allocated(u64::MAX).unwrap(), None);
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    export.write_at(0, &[1; 512]).unwrap();
    export.next_allocated(0).unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 2, "a write makes the answer old");
}

#[test]
fn a_server_that_stalls_is_left() {
    let timeout = Duration::from_millis(300);
    let check = |fake: Fake, what: &str| {
        let begun = Instant::now();
        let export = fake.open_with(|options| options.timeout = timeout);
        let found = export.and_then(|export| {
            let found = read(&export, 0, 10);
            assert!(matches!(read(&export, 0, 1), Err(NbdError::Closed { .. })), "{what}: later");
            found
        });
        assert!(matches!(found, Err(NbdError::TimedOut { .. })), "{what}: {found:?}");
        assert!(begun.elapsed() >= timeout && begun.elapsed() < Duration::from_secs(20), "{what}");
    };
    check(
        Fake::raw(|stream| {
            std::thread::sleep(Duration::from_secs(30));
            drop(stream);
        }),
        "no greeting",
    );
    check(Fake::start(Offer::default(), |_| Act::Silence), "no reply");
    check(
        Fake::start(Offer::default(), |ask| Act::Send(data(ask, true, 0, &[1; 10])[..25].to_vec())),
        "half a reply",
    );
    // A byte now and then is not silence; ten timeouts are the end all the same.
    check(
        Fake::raw(|mut stream| {
            handshake(&mut stream, &Offer::default());
            let ask = ask(&mut stream).unwrap();
            let head = data(&ask, true, 0, &[1; 10]);
            for byte in head.iter().take(19).chain(std::iter::repeat(&0)) {
                if stream.write_all(&[*byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }),
        "a trickle",
    );
}

#[test]
fn a_server_that_takes_nothing_is_left() {
    let fake = Fake::raw(|mut stream| {
        handshake(&mut stream, &Offer { size: 64 << 20, ..Offer::default() });
        std::thread::sleep(Duration::from_secs(30));
    });
    let export = fake.open_with(|options| options.timeout = Duration::from_millis(300)).unwrap();
    let begun = Instant::now();
    let found = cause(export.write_at(0, &vec![1; 40 << 20]).unwrap_err());
    assert!(matches!(found, NbdError::TimedOut { .. }), "{found}");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_flush_may_take_longer_than_silence_may() {
    let fake = Fake::start(Offer::default(), |ask| {
        std::thread::sleep(Duration::from_millis(1500));
        Act::Send(simple(ask, 0, &[]))
    });
    let export = fake.open_with(|options| options.timeout = Duration::from_millis(500)).unwrap();
    export.flush().unwrap();
    assert!(matches!(cause(export.write_at(0, &[1]).unwrap_err()), NbdError::TimedOut { .. }));
}

#[test]
fn an_idle_connection_is_not_a_stalled_one() {
    let fake = Fake::start(Offer::default(), |ask| Act::Send(data(ask, true, ask.offset, &pattern(ask))));
    let export = fake.open_with(|options| options.timeout = Duration::from_millis(200)).unwrap();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(read(&export, 5, 1).unwrap(), [5]);
    }
}

#[test]
fn a_server_that_dies_fails_all_who_wait() {
    for whole in [true, false] {
        let asked = AtomicU64::new(0);
        let fake = Fake::start(Offer::default(), move |ask| {
            if asked.fetch_add(1, Ordering::Relaxed) < 3 {
                return Act::Silence;
            }
            let reply = data(ask, false, ask.offset, &pattern(ask));
            Act::Last(if whole { reply } else { reply[..60].to_vec() })
        });
        let export = fake.open().unwrap();
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let export = &export;
                scope.spawn(move || {
                    let found = read(export, thread * 1000, 100);
                    assert!(matches!(found, Err(NbdError::Closed { .. })), "{found:?}");
                });
            }
        });
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert!(matches!(read(&export, 0, 1), Err(NbdError::Closed { .. })));
    }
}

#[test]
fn a_server_that_shuts_down_is_asked_nothing_more() {
    let (_fake, export, found) = answered(|ask| error(ask, true, 108, "good bye"));
    assert!(matches!(found, Err(NbdError::Server { errno: 108, .. })), "{found:?}");
    assert!(matches!(read(&export, 0, 1), Err(NbdError::Closed { .. })));
}

/// An honest disk in memory that minds its block sizes.
fn memory(
    content: &[u8],
    blocks: Option<[u32; 3]>,
    flags: u16,
    can_zero: bool,
) -> (Fake, Arc<Mutex<Vec<u8>>>) {
    let disk = Arc::new(Mutex::new(content.to_vec()));
    let shared = Arc::clone(&disk);
    let offer = Offer { size: content.len() as u64, flags, blocks, ..Offer::default() };
    let [minimum, _, maximum] = blocks.unwrap_or([1, 4096, 32 << 20]);
    let fake = Fake::start(offer, move |ask| {
        let mut disk = shared.lock().unwrap();
        assert_eq!((ask.offset % u64::from(minimum), ask.length % minimum), (0, 0), "{ask:?}");
        assert!(ask.length <= maximum || ask.command >= WRITE_ZEROES, "{ask:?}");
        let range = ask.offset as usize..ask.offset as usize + ask.length as usize;
        Act::Send(match ask.command {
            READ => data(ask, true, ask.offset, &disk[range]),
            WRITE => {
                disk[range].copy_from_slice(&ask.payload);
                chunk(ask.cookie, true, 0, &[])
            }
            WRITE_ZEROES if !can_zero => simple(ask, 95, &[]),
            WRITE_ZEROES => {
                disk[range].fill(0);
                simple(ask, 0, &[])
            }
            FLUSH => simple(ask, 0, &[]),
            _ => {
                let found: Vec<(u32, u32)> = disk[range]
                    .chunks(4096)
                    .map(|part| (part.len() as u32, u32::from(part.iter().all(|&byte| byte == 0)) * 3))
                    .collect();
                [status(ask, false, 4, &[(ask.length, 0)]), status(ask, true, 3, &found)].concat()
            }
        })
    });
    (fake, disk)
}

#[test]
fn block_sizes_are_honoured() {
    let held = Mutex::new(Vec::new());
    let keep = |fake: Fake| {
        let export = fake.open().unwrap();
        held.lock().unwrap().push(fake);
        export
    };
    for blocks in [
        None,
        Some([1, 1, 512]),
        Some([512, 4096, 65_536]),
        Some([512, 65_536, 4096]),
        Some([512, 4096, 1 << 31]),
    ] {
        conformance::all(|content| keep(memory(content, blocks, 69, true).0));
        conformance::writes(1 << 20, || keep(memory(&vec![0; 1 << 20], blocks, 69, true).0));
    }
    for (flags, can_zero) in [(69, false), (5, false)] {
        let blocks = Some([4096, 4096, 65_536]);
        conformance::writes(1 << 20, || keep(memory(&vec![0; 1 << 20], blocks, flags, can_zero).0));
    }
}

#[test]
fn writes_in_one_block_from_many_threads_lose_nothing() {
    let (fake, disk) = memory(&vec![0; 1 << 16], Some([4096, 4096, 65_536]), 69, true);
    let export = fake.open().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8usize {
            let export = &export;
            scope.spawn(move || {
                for turn in 0..64 {
                    export.write_at(((turn * 8 + thread) * 16) as u64, &[thread as u8 + 1; 16]).unwrap();
                }
            });
        }
    });
    let disk = disk.lock().unwrap();
    assert!((0..512).all(|part| disk[part * 16..][..16] == [(part % 8) as u8 + 1; 16]));
}

#[test]
fn what_may_not_be_written_is_read_only() {
    for (flags, writable) in [(69 | 2, true), (69, false)] {
        let (fake, _) = memory(&[0; 4096], None, flags, true);
        let export = fake.open_with(|options| options.writable = writable).unwrap();
        assert_eq!(export.is_read_only(), flags & 2 != 0);
        for found in
            [export.write_at(0, &[1]), export.write_zeros(ByteRange { start: 0, end: 1 }), export.flush()]
        {
            assert!(matches!(found, Err(DeviceError::ReadOnly { .. })), "{found:?}");
        }
    }
}

#[test]
fn a_failed_flush_is_final_and_none_is_no_success() {
    let asked = AtomicU64::new(0);
    let fake = Fake::start(Offer::default(), move |ask| {
        Act::Send(simple(ask, if asked.fetch_add(1, Ordering::Relaxed) == 0 { 5 } else { 0 }, &[]))
    });
    let export = fake.open().unwrap();
    assert!(export.flush().is_err());
    assert!(export.flush().is_err(), "INV-5");
    let (fake, _) = memory(&[0; 4096], None, 1, true);
    assert!(fake.open().unwrap().flush().is_err(), "the server has no flush");
    // With FUA every write is durable at once.
    let fake = Fake::start(Offer { flags: 1 | 8, ..Offer::default() }, |ask| {
        assert_eq!((ask.command, ask.flags), (WRITE, 1));
        Act::Send(simple(ask, 0, &[]))
    });
    let export = fake.open().unwrap();
    export.write_at(0, &[1]).unwrap();
    export.flush().unwrap();
}

#[test]
fn several_connections_where_the_server_can() {
    for (flags, expected) in [(69u16, 1), (69 | 256, 4)] {
        let (fake, _) = memory(&vec![7; 1 << 16], None, flags, true);
        let export = fake.open_with(|options| options.connections = 4).unwrap();
        assert_eq!(export.connections(), expected);
        for at in 0..16 {
            assert_eq!(read(&export, at, 2).unwrap(), [7, 7]);
        }
    }
}

#[test]
fn a_farewell_is_said() {
    let (said, heard) = std::sync::mpsc::channel();
    let said = Mutex::new(said);
    let fake = Fake::start(Offer::default(), move |ask| {
        said.lock().unwrap().send((ask.command, ask.offset, ask.length)).unwrap();
        Act::Silence
    });
    drop(fake.open().unwrap());
    assert_eq!(heard.recv_timeout(Duration::from_secs(10)).unwrap(), (DISCONNECT, 0, 0));
}

/// Largest memory of this process so far, in KiB.
fn peak_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[test]
fn random_sessions_end_without_panic_and_without_much_memory() {
    let timeout = Duration::from_millis(250);
    let begun = Instant::now();
    for seed in 0..400u64 {
        let fake = Fake::raw(move |mut stream| {
            let state = Mutex::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
            let draw = |below: u64| {
                let mut state = state.lock().unwrap();
                *state =
                    state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (*state >> 33) % below
            };
            if draw(4) == 0 {
                // A broken handshake.
                let mut bytes = b"NBDMAGICIHAVEOPT\0\x01".to_vec();
                bytes.extend(fake::reply(8, 1, &[]));
                bytes.extend(fake::reply(10, 4, b"\0\0\0\x04qemu:dirty-bitmap:b"));
                bytes.extend(fake::reply(10, 1, &[]));
                bytes.extend(fake::reply(7, 3, &[0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 3]));
                bytes.extend(fake::reply(7, 1, &[]));
                for _ in 0..1 + draw(3) {
                    let at = draw(bytes.len() as u64) as usize;
                    bytes[at] = draw(256) as u8;
                }
                let _ = stream.write_all(&bytes);
                return;
            }
            let offer = Offer { size: 1 << (9 + draw(50)), flags: draw(1024) as u16 | 1, ..Offer::default() };
            if handshake(&mut stream, &offer).is_none() {
                return;
            }
            while let Some(ask) = ask(&mut stream) {
                let mut bytes = match draw(6) {
                    0 => data(&ask, draw(2) == 0, ask.offset, &pattern(&ask)),
                    1 => hole(&ask, draw(2) == 0, ask.offset, ask.length),
                    2 => [status(&ask, false, 3, &[(512, 3)]), status(&ask, true, 4, &[(512, 1)])].concat(),
                    3 => error(&ask, draw(2) == 0, 5, "no"),
                    4 => simple(&ask, draw(2) as u32, &[]),
                    _ => [status(&ask, false, 4, &[(1 << 20, 1)]), status(&ask, true, 3, &[(1, 2)])].concat(),
                };
                if draw(3) == 0 && !bytes.is_empty() {
                    let at = draw(bytes.len().min(40) as u64) as usize;
                    bytes[at] = [0, 1, 0xff, draw(256) as u8][draw(4) as usize];
                }
                // Some answers, then the end: otherwise an honest walk over a vast disk goes on and on.
                if stream.write_all(&bytes).is_err() || draw(60) == 0 {
                    return;
                }
            }
        });
        let session = Instant::now();
        if let Ok(export) = fake.open_with(|options| options.timeout = timeout) {
            let _ = export.dirty("b");
            let _ = export.next_allocated(0);
            let _ = export.read_at(0, &mut [0; 300]);
            let _ = export.write_at(100, &[1; 200]);
            let _ = export.write_zeros(ByteRange { start: 0, end: 512 });
            let _ = export.flush();
        }
        assert!(session.elapsed() < Duration::from_secs(30), "seed {seed}");
    }
    assert!(begun.elapsed() < Duration::from_secs(240));
    if let Some(peak) = peak_memory() {
        assert!(peak < 256 * 1024, "{peak} KiB");
    }
}
