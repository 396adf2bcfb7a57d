//! Golden bytes of protocol version 0, limits, and hostile byte strings.

use super::*;
use crate::message::{Bitmap, ReadDisk, Report, Run};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Bytes {
    (0..hex.len() / 2).map(|n| u8::from_str_radix(&hex[n * 2..n * 2 + 2], 16).unwrap()).collect()
}

fn runs() -> Vec<Run> {
    vec![
        Run::Data { first: 5, hashes: vec![BlockHash([0xaa; 32]), BlockHash([0xbb; 32])] },
        Run::Zeros { first: 7, blocks: 1 << 33 },
    ]
}

fn payload() -> Payload {
    Payload::unproved(Codec::Zstd, Bytes::from_static(b"abc"), 2)
}

fn bits() -> Bitmap {
    Bitmap::new(vec![true, false, false, true, true, false, false, false, false, true])
}

fn text() -> String {
    "größer".to_owned()
}

/// Every message once; the bytes are those of protocol version 0 and never change again.
fn to_server() -> Vec<(ToServer, &'static str)> {
    vec![
        (
            ToServer::Hello {
                next: 7,
                disks: vec![
                    ReadDisk { size: 65_536, full: true, because: "checkpoint c1 is gone".to_owned() },
                    ReadDisk { size: 1 << 40, full: false, because: String::new() },
                ],
            },
            "0001070000000000000002000000010000000000011500636865636b706f696e7420633120697320676f6e650000000000010000000000",
        ),
        (
            ToServer::Announce { batch: 258, disk: 1, audited: true, runs: runs() },
            "00020201000000000000010000000102000005000000000000000200aaaaaaaaaaaaaaaaaaaaaaaa\
             aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\
             bbbbbbbbbbbbbbbbbbbbbbbb0107000000000000000000000002000000",
        ),
        (
            ToServer::Frame { batch: 3, indexes: vec![1, 258], payload: payload() },
            "00030300000000000000020001000201010203000000616263",
        ),
        (ToServer::FullBegins { batch: 4, reason: text() }, "0004040000000000000008006772c3b6c39f6572"),
        (
            ToServer::Finish {
                batch: 9,
                report: Report {
                    digest: [0xcc; 32],
                    bytes_listed: 1,
                    bytes_read: 2,
                    bytes_audited: 3,
                    bytes_again: 4,
                    next_rotations: vec![5],
                },
            },
            "00050900000000000000cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc\
             cccc0100000000000000020000000000000003000000000000000400000000000000010005000000\
             00000000",
        ),
        (ToServer::Abort { reason: text() }, "000608006772c3b6c39f6572"),
    ]
}

fn to_agent() -> Vec<(ToAgent, &'static str)> {
    vec![
        (
            ToAgent::Resume { next: 6, finished: true, open: vec![2, 4] },
            "0001060000000000000001020002000000000000000400000000000000",
        ),
        (ToAgent::Wanted { batch: 2, blocks: bits() }, "000202000000000000000a001902"),
        (ToAgent::Received { batch: 3 }, "00030300000000000000"),
        (ToAgent::Window { bytes: 1 << 25 }, "00040000000200000000"),
        (ToAgent::FullCompare { disk: 2, reason: text() }, "00050200000008006772c3b6c39f6572"),
        (ToAgent::Finished, "0006"),
        (ToAgent::Refused { reason: text() }, "000708006772c3b6c39f6572"),
    ]
}

fn to_target() -> Vec<(ToTarget, &'static str)> {
    vec![
        (ToTarget::Begin { size: 1 << 40, from: 3 }, "000100000000000100000300000000000000"),
        (ToTarget::Keep { after: 3, end: 1 << 33 }, "000203000000000000000000000002000000"),
        (
            ToTarget::Frame {
                after: 1,
                first: 2,
                hashes: vec![BlockHash([1; 32]), BlockHash([2; 32])],
                payload: payload(),
            },
            "00030100000000000000020000000000000002000101010101010101010101010101010101010101\
             01010101010101010101010102020202020202020202020202020202020202020202020202020202\
             02020202010203000000616263",
        ),
        (
            ToTarget::End { digest: [0xdd; 32], verify: true, sync: false },
            "0004dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd0100",
        ),
        (ToTarget::Closed, "0005"),
        (ToTarget::Refused { reason: text() }, "000608006772c3b6c39f6572"),
        (
            ToTarget::Zeros { after: 1, first: 2, blocks: 1 << 33 },
            "0007010000000000000002000000000000000000000002000000",
        ),
    ]
}

fn from_target() -> Vec<(FromTarget, &'static str)> {
    vec![
        (FromTarget::Hello { size: 1 << 40, next: 2, fresh: true }, "00010000000000010000020000000000000001"),
        (
            FromTarget::Announce { runs: runs() },
            "000202000005000000000000000200aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\
             aaaaaaaaaaaaaabbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb01\
             07000000000000000000000002000000",
        ),
        (FromTarget::Written { next: 4 }, "00030400000000000000"),
        (
            FromTarget::Done { digest: [0xee; 32] },
            "0004eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee",
        ),
        (FromTarget::Abort { reason: text() }, "000508006772c3b6c39f6572"),
    ]
}

fn check<M: Wire + PartialEq>(fixtures: Vec<(M, &'static str)>, wrong: &mut Vec<String>) {
    for (message, golden) in fixtures {
        let found = message.to_bytes();
        if hex(&found) != golden {
            wrong.push(format!("{golden} {}", hex(&found)));
            continue;
        }
        assert_eq!(M::from_bytes(bytes(golden)).unwrap(), message);
        // Every truncation and every byte behind the end is refused.
        for length in 0..found.len() {
            assert!(M::from_bytes(found.slice(..length)).is_err(), "{golden} cut at {length}");
        }
        let longer = [&found[..], &[0]].concat();
        assert!(matches!(M::from_bytes(longer.into()), Err(WireError::Trailing { .. })), "{golden}");
        // No other version, and no byte string at all, does worse than an error.
        let mut other = found.to_vec();
        other[0] = 1;
        assert_eq!(M::from_bytes(other.into()).unwrap_err(), WireError::Version { expected: 0, found: 1 });
        let mut draw = Draw(found.len() as u64);
        for _ in 0..4000 {
            let mut noise = found.to_vec();
            for _ in 0..=draw.below(3) {
                let at = draw.below(noise.len() as u64) as usize;
                noise[at] = match draw.below(3) {
                    0 => 0xff,
                    1 => 0,
                    _ => draw.next() as u8,
                };
            }
            noise.truncate(found.len() - draw.below(found.len() as u64 / 4 + 1) as usize);
            if let Ok(message) = M::from_bytes(Bytes::from(noise.clone())) {
                assert_eq!(hex(&message.to_bytes()), hex(&noise), "one message, one encoding");
            }
        }
    }
}

#[test]
fn golden_bytes() {
    let mut wrong = Vec::new();
    check(to_server(), &mut wrong);
    check(to_agent(), &mut wrong);
    check(to_target(), &mut wrong);
    check(from_target(), &mut wrong);
    assert!(wrong.is_empty(), "expected, found:\n{}", wrong.join("\n"));
}

#[test]
fn limits_hold_before_anything_is_allocated() {
    let long = Bytes::from(vec![0; message::MAX_MESSAGE_BYTES + 1]);
    assert!(matches!(ToServer::decode(long), Err(WireError::TooLong { .. })));
    // An announcement that claims 65535 hashes and has none.
    let claim = [&[0, 2][..], &[0; 12], &[0, 1, 0, 0], &[0; 8], &[0xff, 0xff]].concat();
    assert!(matches!(ToServer::decode(claim.into()), Err(WireError::Value { what: "hashes", .. })));
    // A payload that is said to be longer than its blocks.
    let frame = [&[0, 3][..], &[0; 8], &[1, 0, 0, 0], &[1, 1], &0x1_0000_u32.to_le_bytes()].concat();
    assert!(matches!(ToServer::decode(frame.into()), Err(WireError::Value { what: "length", .. })));
    // A text is cut at a character.
    let reason = format!("{}ß", "x".repeat(message::MAX_TEXT_BYTES - 1));
    let ToServer::Abort { reason } = ToServer::decode(ToServer::Abort { reason }.encode()).unwrap() else {
        panic!("another message");
    };
    assert_eq!(reason, "x".repeat(message::MAX_TEXT_BYTES - 1));
}

#[test]
fn the_largest_messages_fit() {
    let runs = vec![Run::Data { first: 0, hashes: vec![BlockHash([1; 32]); message::MAX_BATCH_BLOCKS] }];
    let largest = ToServer::Announce { batch: 1, disk: 0, audited: false, runs };
    assert!(ToServer::decode(largest.encode()).unwrap() == largest);
    let payload = Payload::unproved(Codec::Plain, vec![7; FRAME_BLOCKS * BLOCK].into(), FRAME_BLOCKS);
    let hashes = vec![BlockHash([1; 32]); FRAME_BLOCKS];
    let frame = ToTarget::Frame { after: 0, first: 0, hashes, payload };
    assert!(ToTarget::decode(frame.encode()).unwrap() == frame);
}

#[test]
fn a_proof_never_comes_from_a_wire() {
    let block = NumberedDisk::block(1, 2);
    let lie = BlockHash([9; 32]);
    let sent = crate::frame::Packer::new(None).pack(block.clone().into(), vec![lie]);
    assert!(sent.check(&[lie]).is_ok(), "in one process the hasher is believed");
    let message = ToServer::Frame { batch: 0, indexes: vec![0], payload: sent };
    let ToServer::Frame { payload, .. } = ToServer::decode(message.encode()).unwrap() else {
        panic!("another message");
    };
    assert!(payload.check(&[lie]).is_err());
    assert!(payload.check(&[hash_block(&block)]).is_ok());
}
