//! The handshake against bytes that no socket is needed for.

use super::*;

/// What the server sends; what we send is dropped.
struct Script<'a>(&'a [u8]);

impl Read for Script<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Script<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open(bytes: &[u8]) -> Result<Agreed, NbdError> {
    let timeout = Duration::from_secs(1);
    Handshake::begin(Script(bytes), timeout)?.open("disk", true, &["b".to_owned()])
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for number in [option, kind, data.len() as u32] {
        bytes.extend_from_slice(&number.to_be_bytes());
    }
    bytes.extend_from_slice(data);
    bytes
}

fn greeting(flags: u16) -> Vec<u8> {
    [&wire::INIT_MAGIC.to_be_bytes()[..], &wire::OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn context(id: u32, name: &str) -> Vec<u8> {
    let data = [&id.to_be_bytes()[..], name.as_bytes()].concat();
    reply(wire::OPT_SET_META_CONTEXT, wire::REP_META_CONTEXT, &data)
}

fn info(kind: u16, data: &[u8]) -> Vec<u8> {
    reply(wire::OPT_GO, wire::REP_INFO, &[&kind.to_be_bytes()[..], data].concat())
}

fn export(size: u64, flags: u16) -> Vec<u8> {
    info(wire::INFO_EXPORT, &[&size.to_be_bytes()[..], &flags.to_be_bytes()].concat())
}

fn sizes(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    let numbers = [minimum, preferred, maximum].map(u32::to_be_bytes);
    info(wire::INFO_BLOCK_SIZE, &numbers.concat())
}

/// A whole handshake, the part of `GO` given.
fn whole(go: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = greeting(3);
    bytes.extend(reply(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]));
    bytes.extend(context(7, "qemu:dirty-bitmap:b"));
    bytes.extend(context(9, "base:allocation"));
    bytes.extend(reply(wire::OPT_SET_META_CONTEXT, wire::REP_ACK, &[]));
    for part in go {
        bytes.extend(part);
    }
    bytes.extend(reply(wire::OPT_GO, wire::REP_ACK, &[]));
    bytes
}

#[test]
fn a_good_handshake() {
    let agreed = open(&whole(&[export(1 << 20, 3), sizes(512, 4096, u32::MAX)])).expect("agreed");
    let blocks = BlockSizes { minimum: 512, preferred: 4096, maximum: 32 << 20 };
    let contexts = vec![(7, "qemu:dirty-bitmap:b".to_owned()), (9, "base:allocation".to_owned())];
    assert_eq!(agreed, Agreed { size: 1 << 20, flags: 3, blocks, structured: true, contexts });
}

#[test]
fn block_sizes_that_make_no_sense_are_refused() {
    for (minimum, preferred, maximum) in [
        (0, 4096, 65536),
        (3, 4096, 65536),
        (1 << 17, 1 << 17, 1 << 17),
        (512, 256, 4096),
        (512, 513, 4096),
        (512, 512, 700),
        (512, 512, 0),
    ] {
        let found = open(&whole(&[export(1 << 20, 3), sizes(minimum, preferred, maximum)]));
        assert!(matches!(found, Err(NbdError::Handshake { .. })), "{minimum} {preferred} {maximum}");
    }
    let small = open(&whole(&[export(1 << 20, 3), sizes(512, 4096, 1536)])).expect("a small maximum");
    assert_eq!(small.blocks.maximum, 1536);
    let odd = open(&whole(&[export(1 << 20, 3), sizes(512, 4096, 4096 + 512)])).expect("an odd maximum");
    assert_eq!(odd.blocks.maximum, 4096);
}

#[test]
fn sizes_and_flags_that_make_no_sense_are_refused() {
    for (size, flags) in [(1 << 63, 3), (u64::MAX, 3), (1000, 3), (1024, 2)] {
        let found = open(&whole(&[export(size, flags), sizes(512, 4096, u32::MAX)]));
        assert!(matches!(found, Err(NbdError::Handshake { .. })), "{size} {flags}: {found:?}");
    }
    assert!(matches!(open(&whole(&[])), Err(NbdError::Handshake { .. })), "no NBD_INFO_EXPORT");
}

#[test]
fn contexts_not_asked_for_or_twice_are_refused() {
    for lies in [
        vec![context(7, "other")],
        vec![context(7, "base:allocation"), context(7, "qemu:dirty-bitmap:b")],
        vec![context(7, "base:allocation"), context(8, "base:allocation")],
    ] {
        let mut bytes = greeting(3);
        bytes.extend(reply(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]));
        bytes.extend(lies.concat());
        let found = open(&bytes);
        assert!(matches!(found, Err(NbdError::Handshake { .. })), "{found:?}");
    }
}

#[test]
fn a_list_is_bounded_and_names_are_checked() {
    let list = |bytes: &[u8]| Handshake::begin(Script(bytes), Duration::from_secs(1))?.list();
    let entry = |data: &[u8]| reply(wire::OPT_LIST, wire::REP_SERVER, data);
    let mut bytes = greeting(1);
    bytes.extend(entry(b"\0\0\0\x02sdwhat\x1bit is"));
    bytes.extend(reply(wire::OPT_LIST, wire::REP_ACK, &[]));
    let listed = list(&bytes).expect("a list");
    assert_eq!(listed[0].name, "sd");
    assert_eq!(listed[0].description, "what\u{fffd}it is");

    let mut endless = greeting(1);
    for _ in 0..wire::MAX_OPTION_REPLIES + 1 {
        endless.extend(entry(b"\0\0\0\x01a"));
    }
    assert!(list(&endless).is_err());
    for lie in [&b"\0\0\0\x09ab"[..], b"\xff\xff\xff\xffab", b"\0\0", b"\0\0\0\x01\xff"] {
        assert!(list(&[greeting(1), entry(lie)].concat()).is_err(), "{lie:?}");
    }
}

#[test]
fn strings_that_are_too_long_are_not_sent() {
    let timeout = Duration::from_secs(1);
    for name in ["x".repeat(4097), "a\0b".to_owned()] {
        let bytes = greeting(3);
        let mut shake = Handshake::begin(Script(&bytes), timeout).expect("begun");
        assert!(matches!(shake.open(&name, false, &[]), Err(NbdError::Handshake { .. })));
    }
}

#[test]
fn changed_bytes_never_panic() {
    let good = whole(&[export(1 << 20, 3), sizes(512, 4096, u32::MAX)]);
    let mut seed = 1u64;
    let mut draw = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    for _ in 0..50_000 {
        let mut bytes = good.clone();
        for _ in 0..1 + draw(4) {
            match draw(4) {
                0 => bytes.truncate(draw(bytes.len() + 1)),
                1 if !bytes.is_empty() => {
                    let at = draw(bytes.len());
                    bytes.remove(at);
                }
                _ if !bytes.is_empty() => {
                    let at = draw(bytes.len());
                    bytes[at] = [0, 1, 0x7f, 0x80, 0xff, draw(256) as u8][draw(6)];
                }
                _ => {}
            }
        }
        let _ = open(&bytes);
        let _ = Handshake::begin(Script(&bytes), Duration::from_secs(1)).and_then(|mut shake| shake.list());
    }
}
