//! Replies made of bytes that no socket is needed for.

use super::*;

const OFFSET: u64 = 1 << 40;

fn read(length: u32) -> Gathering {
    let request = Request { command: Command::Read, flags: 0, offset: OFFSET, length };
    Gathering::new(request, true, &[], None)
}

fn status(length: u32) -> Gathering {
    let request = Request { command: Command::BlockStatus, flags: 0, offset: OFFSET, length };
    Gathering::new(request, true, &[5, 6], Some(6))
}

fn data(gathering: &mut Gathering, offset: u64, bytes: &[u8]) -> Result<bool, Broken> {
    let payload = [&offset.to_be_bytes()[..], bytes].concat();
    let length = payload.len() as u32;
    gathering.take(Head::Chunk { flags: 0, kind: wire::REPLY_OFFSET_DATA, length }, &mut payload.as_slice())
}

fn end(gathering: &mut Gathering) -> bool {
    let head = Head::Chunk { flags: wire::REPLY_FLAG_DONE, kind: wire::REPLY_NONE, length: 0 };
    gathering.take(head, &mut io::empty()).expect("the end")
}

fn descriptors(gathering: &mut Gathering, context: u32, pairs: &[(u32, u32)]) -> Result<bool, Broken> {
    let mut payload = context.to_be_bytes().to_vec();
    for (length, flags) in pairs {
        payload.extend_from_slice(&length.to_be_bytes());
        payload.extend_from_slice(&flags.to_be_bytes());
    }
    let length = payload.len() as u32;
    gathering.take(Head::Chunk { flags: 0, kind: wire::REPLY_BLOCK_STATUS, length }, &mut payload.as_slice())
}

#[test]
fn pieces_in_any_order_become_one() {
    let mut gathering = read(9);
    for (at, bytes) in [(6, b"ghi"), (0, b"abc"), (3, b"def")] {
        assert!(!data(&mut gathering, OFFSET + at, bytes).expect("a piece"));
    }
    assert!(end(&mut gathering));
    assert!(matches!(gathering.finish(), Ok(Ok(Answer::Data(all))) if all == b"abcdefghi"));
}

#[test]
fn a_piece_missing_is_no_success() {
    let mut gathering = read(9);
    data(&mut gathering, OFFSET, b"abc").expect("a piece");
    data(&mut gathering, OFFSET + 6, b"ghi").expect("a piece");
    end(&mut gathering);
    assert!(matches!(gathering.finish(), Err(NbdError::Protocol { .. })));
}

#[test]
fn pieces_that_overlap_or_lie_outside_break_the_stream() {
    for (at, length) in
        [(0u64, 4usize), (2, 2), (2, 1), (3, 4), (5, 5), (9, 1), (8, 2), (u64::MAX - OFFSET, 1)]
    {
        let mut gathering = read(9);
        data(&mut gathering, OFFSET + 2, b"cd").expect("a piece");
        data(&mut gathering, OFFSET + 6, b"gh").expect("a piece");
        let found = data(&mut gathering, OFFSET + at, &vec![b'x'; length]);
        assert!(matches!(found, Err(Broken::Protocol(_))), "{at}..+{length}");
    }
    assert!(data(&mut read(9), OFFSET - 1, b"ab").is_err());
    assert!(data(&mut read(9), 0, b"ab").is_err());
    assert!(data(&mut read(9), OFFSET, b"").is_err());
}

#[test]
fn pieces_kept_apart_are_bounded() {
    let mut gathering = read(1 << 20);
    let refused = (0..1u64 << 19).find(|at| data(&mut gathering, OFFSET + 2 * at, b"x").is_err());
    assert_eq!(refused, Some(MAX_PIECES as u64));
    let mut in_order = read(1 << 16);
    assert!((0..1u64 << 16).all(|at| data(&mut in_order, OFFSET + at, b"x").is_ok()));
}

#[test]
fn a_status_is_whole_and_of_a_known_context() {
    for wrong in [
        descriptors(&mut status(100), 7, &[(100, 0)]),
        descriptors(&mut status(100), 6, &[]),
        descriptors(&mut status(100), 6, &[(0, 0)]),
        descriptors(&mut status(100), 6, &[(50, 0), (0, 1)]),
        descriptors(&mut status(100), 6, &[(100, 0), (1, 1)]),
    ] {
        assert!(matches!(wrong, Err(Broken::Protocol(_))));
    }
    let mut twice = status(100);
    descriptors(&mut twice, 6, &[(100, 0)]).expect("descriptors");
    assert!(descriptors(&mut twice, 6, &[(100, 1)]).is_err());
    let mut other = status(100);
    descriptors(&mut other, 5, &[(100, 0)]).expect("descriptors");
    end(&mut other);
    assert!(matches!(other.finish(), Err(NbdError::Protocol { .. })), "the context asked for is left out");
    let mut good = status(100);
    descriptors(&mut good, 5, &[(100, 7)]).expect("descriptors");
    descriptors(&mut good, 6, &[(50, 1), (70, 0)]).expect("the last one may reach past the request");
    end(&mut good);
    let expected = [Extent { length: 50, flags: 1 }, Extent { length: 70, flags: 0 }];
    assert!(matches!(good.finish(), Ok(Ok(Answer::Extents(found))) if found == expected));
}

#[test]
fn a_length_is_checked_before_anything_is_read() {
    for (kind, length) in [
        (wire::REPLY_OFFSET_DATA, u32::MAX),
        (wire::REPLY_OFFSET_DATA, 18),
        (wire::REPLY_OFFSET_HOLE, 13),
        (wire::REPLY_NONE, 1),
        (wire::REPLY_BLOCK_STATUS, 12),
        (wire::REPLY_ERROR_BIT + 1, u32::MAX),
        (wire::REPLY_ERROR_OFFSET, 13),
        (3, 0),
    ] {
        let found = read(9).take(Head::Chunk { flags: 1, kind, length }, &mut io::empty());
        assert!(matches!(found, Err(Broken::Protocol(_))), "{kind} {length}");
    }
    for length in [0, 4, 13, u32::MAX - 3] {
        let head = Head::Chunk { flags: 1, kind: wire::REPLY_BLOCK_STATUS, length };
        assert!(matches!(status(9).take(head, &mut io::empty()), Err(Broken::Protocol(_))), "{length}");
    }
}

#[test]
fn error_chunks_say_what_and_where() {
    let mut payload = 5u32.to_be_bytes().to_vec();
    payload.extend_from_slice(&4u16.to_be_bytes());
    payload.extend_from_slice(b"disk");
    payload.extend_from_slice(&(OFFSET + 3).to_be_bytes());
    let length = payload.len() as u32;
    let head = Head::Chunk { flags: 1, kind: wire::REPLY_ERROR_OFFSET, length };
    let mut gathering = read(9);
    assert!(gathering.take(head, &mut payload.as_slice()).expect("an error chunk"));
    let Ok(Err(NbdError::Server { errno: 5, message, command: "read", offset: OFFSET, length: 9 })) =
        gathering.finish()
    else {
        panic!("not the error");
    };
    assert_eq!(message, format!("disk, at byte {}", OFFSET + 3));
    // An offset outside, a message longer than the chunk, no number.
    for (at, byte) in [(10, 1), (5, 200), (3, 0)] {
        let mut lie = payload.clone();
        lie[at] = byte;
        assert!(read(9).take(head, &mut lie.as_slice()).is_err(), "byte {at}");
    }
}

#[test]
fn error_chunks_are_bounded() {
    let payload = [0, 0, 0, 5, 0, 0];
    let head = Head::Chunk { flags: 0, kind: wire::REPLY_ERROR_BIT + 1, length: 6 };
    let mut gathering = read(9);
    let refused = (0..5000).find(|_| gathering.take(head, &mut &payload[..]).is_err());
    assert_eq!(refused, Some(wire::MAX_ERROR_CHUNKS));
}

#[test]
fn random_messages_never_panic_and_never_grow() {
    let mut seed = 3u64;
    let mut draw = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for _ in 0..30_000 {
        let command = [Command::Read, Command::BlockStatus, Command::Write][draw(3) as usize];
        let request = Request { command, flags: 0, offset: OFFSET, length: 1 + draw(600) as u32 };
        let mut gathering = Gathering::new(request, draw(5) != 0, &[0, 1], Some(draw(2) as u32));
        let mut bytes = Vec::new();
        for _ in 0..draw(6) {
            if draw(8) == 0 {
                bytes.extend_from_slice(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
                bytes.extend_from_slice(&(draw(2) as u32).to_be_bytes());
                bytes.extend_from_slice(&[0; 8]);
                continue;
            }
            let kind = [0, 1, 2, 5, 0x8001, 0x8002, 0x8003, draw(65_536) as u16][draw(8) as usize];
            let length = [0, 4, 6, 12, 14, 20, 28, draw(700) as u32][draw(8) as usize];
            bytes.extend_from_slice(&wire::STRUCTURED_REPLY_MAGIC.to_be_bytes());
            bytes.extend_from_slice(&(draw(2) as u16).to_be_bytes());
            bytes.extend_from_slice(&kind.to_be_bytes());
            bytes.extend_from_slice(&[0; 8]);
            bytes.extend_from_slice(&length.to_be_bytes());
            let payload = bytes.len();
            let offset = OFFSET + draw(600);
            bytes.extend_from_slice(&offset.to_be_bytes());
            bytes.resize(payload + length as usize, draw(3) as u8);
        }
        let mut from = bytes.as_slice();
        while let Ok(Ok((head, _))) = head(&mut from) {
            match gathering.take(head, &mut from) {
                Ok(false) => {}
                Ok(true) => {
                    let _ = gathering.finish();
                    break;
                }
                Err(_) => break,
            }
            assert!(gathering.buffer.len() <= 600 && gathering.extents.len() <= 100);
        }
    }
}
