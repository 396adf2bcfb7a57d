//! Golden bytes of every message of `proto/stillpoint.proto`.
//!
//! A change here is a change of the protocol: programs in the field stop understanding each other. Recipe of
//! `golden_bytes.txt`: run this test with `STILLPOINT_WRITE_GOLDEN=1` and read the difference.
#![allow(clippy::unwrap_used)]

use prost::Message;
use protocol::v0::*;
use std::collections::BTreeMap;

const STORED: &str = include_str!("golden_bytes.txt");
const PROTO: &str = include_str!("../proto/stillpoint.proto");

fn text(text: &str) -> String {
    text.to_owned()
}

/// An example of every message with every field set, and the check that it reads back as it was written.
fn examples() -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    fn add<M: Message + Default + PartialEq + std::fmt::Debug>(
        all: &mut BTreeMap<String, Vec<u8>>,
        name: &str,
        message: M,
    ) {
        let bytes = message.encode_to_vec();
        assert_eq!(M::decode(&bytes[..]).unwrap(), message, "{name}");
        assert!(all.insert(name.to_owned(), bytes).is_none(), "{name} is there twice");
    }
    let job = || vec![0xA1; 16].into();
    let range = Range { offset: 65536, length: 131072 };
    let machine = || Some(MachineSpec { provider: text("images"), json: text("{}") });
    let limits = Pacing { bytes_per_second: 50_000_000, window_bytes: 67_108_864 };
    let pacing = Some(limits);
    let problem = || Problem { code: 4003, message: text("m"), object: text("hv1"), hint: text("Start it.") };
    let hello = || Hello {
        lowest_version: 1,
        highest_version: 2,
        program_version: text("0.1.0"),
        host_name: text("hv1"),
        platform: text("linux x86_64"),
        providers: vec![text("images"), text("libvirt")],
        instance: vec![7; 16].into(),
        open_commands: vec![1, 300],
    };
    let reply = || HelloReply {
        version: 1,
        addresses: vec![text("backup.example:8443")],
        server_name: text("backup"),
        pool: vec![9; 16].into(),
        server_time: 1_795_384_587_000_000,
    };
    let result = || Result { id: 5, outcome: Some(result::Outcome::Ok(text("{}"))) };
    let progress = || Progress {
        id: 5,
        job: job(),
        phase: text("read"),
        done_bytes: 1,
        total_bytes: 2,
        json: text("{}"),
    };
    let extents = || ChangedExtents { ranges: vec![range], pages: 2 };
    let whole = WholeDisk { ignore_allocation: true };
    let disk = |mode| DiskRead {
        disk: 1,
        replica_bytes: 1 << 40,
        mode: Some(mode),
        rotation: 77,
        audit_bytes: 8 << 20,
        heal: vec![range],
    };
    let send = || SendOrder {
        job: job(),
        attempt: 3,
        machine: machine(),
        disks: vec![disk(disk_read::Mode::Extents(extents())), disk(disk_read::Mode::Full(whole))],
        wanted: Consistency::Application.into(),
        least: Consistency::Crash.into(),
        pacing,
        unfrozen: Unfrozen::Pause.into(),
        may_retry: true,
        scratch_bytes: 1 << 30,
    };
    let receive = || ReceiveOrder {
        job: job(),
        attempt: 3,
        target_path: text("/vm/disk.vhdx"),
        format: text("vhdx"),
        disk_bytes: 1 << 40,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
        overwrite: true,
        durable: true,
        image_json: text("{}"),
        pacing,
        point: vec![0xB2; 16].into(),
        disk: 1,
        over_json: text("{}"),
    };
    let page = || ListPage { command: 5, disk: 1, page: 2, ranges: vec![range] };

    add(
        &mut all,
        "EnrollRequest",
        EnrollRequest {
            token_secret: vec![1; 20].into(),
            certificate_request: vec![2; 4].into(),
            host_name: text("hv1"),
            platform: text("linux x86_64"),
            program_version: text("0.1.0"),
        },
    );
    add(
        &mut all,
        "EnrollReply",
        EnrollReply {
            host: vec![3; 16].into(),
            certificate: vec![4; 4].into(),
            addresses: vec![text("a:1"), text("b:2")],
            server_name: text("backup"),
        },
    );
    add(&mut all, "RenewRequest", RenewRequest { certificate_request: vec![2; 4].into() });
    add(&mut all, "RenewReply", RenewReply { certificate: vec![4; 4].into(), addresses: vec![text("a:1")] });
    for (name, kind) in [
        ("hello", agent_message::Kind::Hello(hello())),
        ("ping", agent_message::Kind::Ping(Ping { number: 8 })),
        ("pong", agent_message::Kind::Pong(Pong { number: 8 })),
        ("result", agent_message::Kind::Result(result())),
        ("progress", agent_message::Kind::Progress(progress())),
    ] {
        add(&mut all, &format!("AgentMessage.{name}"), AgentMessage { kind: Some(kind) });
    }
    for (name, kind) in [
        ("hello_reply", server_message::Kind::HelloReply(reply())),
        ("ping", server_message::Kind::Ping(Ping { number: 8 })),
        ("pong", server_message::Kind::Pong(Pong { number: 8 })),
        ("command", server_message::Kind::Command(Command { id: 5, kind: None })),
        ("list_page", server_message::Kind::ListPage(page())),
        ("result_taken", server_message::Kind::ResultTaken(ResultTaken { id: 5 })),
        ("goodbye", server_message::Kind::Goodbye(problem())),
    ] {
        add(&mut all, &format!("ServerMessage.{name}"), ServerMessage { kind: Some(kind) });
    }
    add(&mut all, "Hello", hello());
    add(&mut all, "HelloReply", reply());
    add(&mut all, "Ping", Ping { number: 8 });
    add(&mut all, "Pong", Pong { number: 8 });
    for (name, kind) in [
        ("inspect", command::Kind::Inspect(Inspect { machine: machine() })),
        ("send", command::Kind::Send(send())),
        ("receive", command::Kind::Receive(receive())),
        ("cancel_job", command::Kind::CancelJob(CancelJob { job: job() })),
        ("list_inventory", command::Kind::ListInventory(ListInventory { provider: text("images") })),
        ("recover_machine", command::Kind::RecoverMachine(RecoverMachine { step_json: text("{}") })),
    ] {
        add(&mut all, &format!("Command.{name}"), Command { id: 5, kind: Some(kind) });
    }
    add(&mut all, "MachineSpec", machine().unwrap());
    add(&mut all, "Inspect", Inspect { machine: machine() });
    add(&mut all, "ListInventory", ListInventory { provider: text("images") });
    add(&mut all, "RecoverMachine", RecoverMachine { step_json: text("{}") });
    add(&mut all, "CancelJob", CancelJob { job: job() });
    add(&mut all, "Range", range);
    add(&mut all, "Pacing", limits);
    add(&mut all, "SendOrder", send());
    add(&mut all, "DiskRead", disk(disk_read::Mode::Full(whole)));
    let tracked = Tracked { base_json: text("{\"key\":\"disk-vda\"}") };
    add(&mut all, "DiskRead.tracked", disk(disk_read::Mode::Tracked(tracked.clone())));
    add(&mut all, "Tracked", tracked);
    add(&mut all, "WholeDisk", whole);
    add(&mut all, "ChangedExtents", extents());
    add(&mut all, "ListPage", page());
    add(&mut all, "ReceiveOrder", receive());
    add(&mut all, "Result", result());
    add(&mut all, "Result.problem", Result { id: 5, outcome: Some(result::Outcome::Problem(problem())) });
    add(&mut all, "ResultTaken", ResultTaken { id: 5 });
    add(&mut all, "Problem", problem());
    add(&mut all, "Progress", progress());
    let open = OpenData { job: job(), attempt: 3 };
    for (name, kind) in [
        ("open", packet::Kind::Open(open.clone())),
        ("opened", packet::Kind::Opened(Opened {})),
        ("payload", packet::Kind::Payload(vec![0xDA; 5].into())),
        ("end", packet::Kind::End(End {})),
    ] {
        add(&mut all, &format!("Packet.{name}"), Packet { kind: Some(kind) });
    }
    add(&mut all, "OpenData", open);
    add(&mut all, "Opened", Opened {});
    add(&mut all, "End", End {});
    all
}

#[test]
fn every_message_has_its_golden_bytes() {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let now: Vec<String> = examples().iter().map(|(name, bytes)| format!("{name} {}", hex(bytes))).collect();
    if std::env::var_os("STILLPOINT_WRITE_GOLDEN").is_some() {
        let file = std::path::Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap())
            .join("tests/golden_bytes.txt");
        std::fs::write(file, now.join("\n") + "\n").unwrap();
        return;
    }
    assert_eq!(now, STORED.lines().collect::<Vec<_>>());
}

#[test]
fn no_message_and_no_choice_of_the_proto_is_left_out() {
    let examples = examples();
    let mut message = "";
    let mut in_choice = false;
    let mut counted = 0;
    for line in PROTO.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("message ") {
            message = rest.split(' ').next().unwrap();
            let found = examples.keys().any(|name| name.split('.').next() == Some(message));
            assert!(found, "no example of {message}");
            counted += 1;
        }
        if line.starts_with("oneof kind") {
            in_choice = true;
        } else if line == "}" {
            in_choice = false;
        } else if in_choice && line.ends_with(';') {
            let field = line.split(' ').nth(1).unwrap();
            assert!(examples.contains_key(&format!("{message}.{field}")), "no example of {message}.{field}");
        }
    }
    assert!(counted > 25, "{counted} messages found: is the proto still read right?");
}
