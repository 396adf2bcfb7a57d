#![allow(clippy::unwrap_used)]

use super::*;
use futures::StreamExt;
use model::Code;

fn payload(n: u8) -> v0::Packet {
    v0::Packet { kind: Some(packet::Kind::Payload(Bytes::from(vec![n; 3]))) }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap()
}

const SOON: Duration = Duration::from_secs(10);

#[test]
fn what_arrived_is_received_before_the_cut_and_the_next_stream_goes_on() {
    let runtime = runtime();
    let (channel, doorway) = data_channel(Box::new(|| {}));
    assert_eq!(channel.receive(), Err(ChannelError::Cut));
    let (_out, pump) = doorway.enter().unwrap();
    let stream =
        futures::stream::iter([Ok(payload(1)), Ok(payload(2)), Err(tonic::Status::unavailable("gone"))]);
    let pumped = runtime.spawn(pump.run(stream));
    channel.reconnect(SOON).unwrap();
    assert_eq!(channel.receive().unwrap().unwrap()[0], 1);
    assert_eq!(channel.receive().unwrap().unwrap()[0], 2);
    assert_eq!(channel.receive(), Err(ChannelError::Cut));
    assert_eq!(runtime.block_on(pumped).unwrap().unwrap_err().code, Code::NoContact);

    let (out, pump) = doorway.enter().unwrap();
    let end = v0::Packet { kind: Some(packet::Kind::End(v0::End {})) };
    runtime.spawn(pump.run(futures::stream::iter([Ok(payload(3)), Ok(end)])));
    channel.reconnect(SOON).unwrap();
    assert_eq!(channel.receive().unwrap().unwrap()[0], 3);
    assert_eq!(channel.receive(), Ok(None));
    channel.send(Bytes::from_static(b"xyz")).unwrap();
    channel.finish().unwrap();
    assert!(channel.send(Bytes::new()).is_err());
    let sent: Vec<_> = runtime.block_on(out.collect());
    assert_eq!(sent.len(), 2);
}

#[test]
fn a_full_queue_waits_and_a_newer_stream_frees_the_waiting_thread() {
    let runtime = runtime();
    let (channel, doorway) = data_channel(Box::new(|| {}));
    let (out, _pump) = doorway.enter().unwrap();
    channel.reconnect(SOON).unwrap();
    let channel = Arc::new(channel);
    let sender = Arc::clone(&channel);
    let waiting = std::thread::spawn(move || {
        (0..).find_map(|n| sender.send(Bytes::from(vec![0; 10])).err().map(|error| (n, error))).unwrap()
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(!waiting.is_finished(), "the queue must be bounded");
    let (_newer, _pump) = doorway.enter().unwrap();
    // The body of the old stream ends at once, whatever is queued.
    assert_eq!(runtime.block_on(out.collect::<Vec<_>>()).len(), 0);
    assert_eq!(waiting.join().unwrap(), (QUEUE, ChannelError::Cut));
    channel.reconnect(SOON).unwrap();
    channel.send(Bytes::new()).unwrap();
}

#[test]
fn closing_wakes_everyone_for_good_and_waiting_has_an_end() {
    let (channel, doorway) = data_channel(Box::new(|| {}));
    let short = Duration::from_millis(20);
    assert_eq!(channel.reconnect(short), Err(ChannelError::TimedOut(short)));
    let (_out, _pump) = doorway.enter().unwrap();
    channel.reconnect(SOON).unwrap();
    let channel = Arc::new(channel);
    let receiver = Arc::clone(&channel);
    let waiting = std::thread::spawn(move || receiver.receive());
    std::thread::sleep(Duration::from_millis(50));
    let problem = Problem::new(Code::Cancelled, "Stopped.");
    drop(_pump);
    doorway.close(problem.clone());
    let got = waiting.join().unwrap();
    assert!(matches!(got, Err(ChannelError::Closed(_)) | Err(ChannelError::Cut)));
    assert_eq!(channel.receive(), Err(ChannelError::Closed(problem.clone())));
    assert_eq!(channel.send(Bytes::new()), Err(ChannelError::Closed(problem.clone())));
    assert_eq!(channel.reconnect(SOON), Err(ChannelError::Closed(problem)));
    assert!(doorway.enter().is_err());
    let large = Bytes::from(vec![0; PAYLOAD_BYTES + 1]);
    assert_eq!(channel.send(large), Err(ChannelError::TooLarge(PAYLOAD_BYTES + 1)));
}

#[test]
fn foreign_packets_break_the_stream() {
    let runtime = runtime();
    let (channel, doorway) = data_channel(Box::new(|| {}));
    for bad in [
        v0::Packet { kind: None },
        v0::Packet { kind: Some(packet::Kind::Open(v0::OpenData::default())) },
        v0::Packet { kind: Some(packet::Kind::Payload(Bytes::from(vec![0; PAYLOAD_BYTES + 1]))) },
    ] {
        let (_out, pump) = doorway.enter().unwrap();
        channel.reconnect(SOON).unwrap();
        let outcome = runtime.block_on(pump.run(futures::stream::iter([Ok(bad)])));
        assert_eq!(outcome.unwrap_err().code, Code::ProtocolBroken);
        assert_eq!(channel.receive(), Err(ChannelError::Cut));
    }
}
