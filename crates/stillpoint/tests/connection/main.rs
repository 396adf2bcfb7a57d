//! Server and agent over real sockets on the loopback: who gets in, who comes back, and what a cut does.
#![allow(clippy::unwrap_used)]

mod world;

use agent::connection::{ConnectionEvent, enrol, run};
use environment::FixedClock;
use identity::{HostKey, ServerIdentity, Token, TokenScope};
use model::{Code, JobId, Timestamp};
use protocol::channel::ChannelError;
use protocol::v0::{self, agent_client::AgentClient, command, enrollment_client::EnrollmentClient};
use server::session::SessionEvent;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use world::*;

fn clock() -> Arc<FixedClock> {
    Arc::new(FixedClock::new(NOW))
}

fn inspect(millis: u64) -> command::Kind {
    let machine = Some(v0::MachineSpec { provider: "images".into(), json: millis.to_string() });
    command::Kind::Inspect(v0::Inspect { machine })
}

fn send(job: JobId, total: u64, part: u64, ranges: Vec<v0::Range>) -> command::Kind {
    let mode = Some(v0::disk_read::Mode::Extents(v0::ChangedExtents { ranges, pages: 0 }));
    command::Kind::Send(v0::SendOrder {
        job: job.0.to_vec().into(),
        disks: vec![v0::DiskRead { replica_bytes: total, mode, ..Default::default() }],
        pacing: Some(v0::Pacing { window_bytes: part, bytes_per_second: 0 }),
        ..Default::default()
    })
}

fn receive(job: JobId) -> command::Kind {
    command::Kind::Receive(v0::ReceiveOrder { job: job.0.to_vec().into(), ..Default::default() })
}

#[test]
fn tokens_that_are_not_good_enrol_nobody() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(&clock, &Arc::default());
    let at = [server.address.clone()];
    let attempt = |name: &str, token: &Token| {
        runtime.block_on(enrol(&settings, &state(&folder.path().join(name)), &at, token))
    };

    let token = server.token(TokenScope::default());
    let host = attempt("a", &token).unwrap();
    assert_eq!(server.registry.connected(), []);
    let (kept, _) = state(&folder.path().join("a")).identity().unwrap();
    assert_eq!(kept.read.host, host);
    assert_eq!(attempt("b", &token).unwrap_err().code, Code::TokenRefused, "used up");

    let token = server.token(TokenScope::default());
    clock.advance(Duration::from_secs(901));
    let late = attempt("c", &token).unwrap_err();
    assert_eq!((late.code, late.message.contains("expired")), (Code::TokenRefused, true));

    let (unknown, _) =
        Token::issue(server.identity.fingerprint(), [3; 20], TokenScope::default(), Timestamp(NOW));
    assert_eq!(attempt("d", &unknown).unwrap_err().code, Code::TokenRefused);
    let mistyped = token.to_string().replace("sp0-", "sp0-a");
    assert!(mistyped.parse::<Token>().is_err());

    let batch = server.token(TokenScope { count: 2, ..TokenScope::default() });
    let hosts = [attempt("e", &batch).unwrap(), attempt("f", &batch).unwrap()];
    assert_ne!(hosts[0], hosts[1]);
    assert_eq!(attempt("g", &batch).unwrap_err().code, Code::TokenRefused);
}

#[test]
fn a_server_without_the_tokens_identity_is_told_nothing() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    let other = Server::start(&runtime, &clock);
    let folder = tempfile::tempdir().unwrap();
    let token = server.token(TokenScope::default());
    let settings = settings(&clock, &Arc::default());
    let at_other = [other.address.clone()];
    let refused = runtime.block_on(enrol(&settings, &state(folder.path()), &at_other, &token)).unwrap_err();
    assert_eq!(refused.code, Code::ServerIdentity);
    assert_eq!(other.register.asked.load(Ordering::SeqCst), 0);
    // The next address in the list is the right one; the token is still good.
    let both = [other.address.clone(), server.address.clone()];
    runtime.block_on(enrol(&settings, &state(folder.path()), &both, &token)).unwrap();
}

/// A stream of one message.
fn futures_of<T: Send + 'static>(message: T) -> impl futures::Stream<Item = T> {
    futures::stream::iter([message])
}

#[test]
fn versions_without_overlap_and_a_false_start_are_refused_in_words() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    let agent = Agent::enrol(&runtime, &server, &server.address);
    let (identity, _) = state(agent.folder.path()).identity().unwrap();
    let own = || Some((identity.certificate.clone().into(), identity.key.to_tls()));
    let hello = |lowest_version, highest_version| {
        let instance = vec![1; 16].into();
        let hello = v0::Hello { lowest_version, highest_version, instance, ..Default::default() };
        v0::AgentMessage { kind: Some(v0::agent_message::Kind::Hello(hello)) }
    };
    let attempt = |message: v0::AgentMessage| {
        runtime.block_on(async {
            let mut client = AgentClient::new(caller(&server, own()).await);
            let result = client.control(futures_of(message)).await;
            result.map(drop).map_err(|status| protocol::wire::from_status(&status).code)
        })
    };
    assert_eq!(attempt(hello(7, 9)), Err(Code::ProtocolVersion));
    assert_eq!(attempt(v0::AgentMessage::default()), Err(Code::ProtocolBroken));
    assert_eq!(attempt(hello(0, 9)), Ok(()));
}

#[test]
fn without_a_certificate_only_enrolment_is_open() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    let refusals = runtime.block_on(async {
        let channel = caller(&server, None).await;
        let mut agent = AgentClient::new(channel.clone());
        let control = agent.control(futures_of(v0::AgentMessage::default())).await.map(drop);
        let data = agent.data(futures_of(v0::Packet::default())).await.map(drop);
        let renew = EnrollmentClient::new(channel.clone()).renew(v0::RenewRequest::default()).await.map(drop);
        let enroll = EnrollmentClient::new(channel).enroll(v0::EnrollRequest::default()).await.map(drop);
        [control, data, renew, enroll].map(|result| protocol::wire::from_status(&result.unwrap_err()).code)
    });
    let no = Code::Unauthorised;
    // Enroll is open: what is wrong there is the request.
    assert_eq!(refusals, [no, no, no, Code::ProtocolBroken]);
    let folder = tempfile::tempdir().unwrap();
    // A certificate of the right form, signed by nobody we know: the handshake ends.
    let stranger = ServerIdentity::generate([2; 16]).unwrap();
    let key = HostKey::generate().unwrap();
    let forged = stranger
        .issue_host_certificate(&key.request().unwrap(), model::HostId([1; 16]), Timestamp(NOW), [1; 16])
        .unwrap();
    let state = state(folder.path());
    let identity =
        agent::connection::AgentIdentity::new(server.identity.fingerprint(), key, forged.to_vec()).unwrap();
    state.set_identity(&identity).unwrap();
    state.set_addresses(std::slice::from_ref(&server.address), &server.address).unwrap();
    let events: Arc<Mutex<Vec<ConnectionEvent>>> = Arc::default();
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    runtime.spawn(run(settings(&clock, &events), state, Arc::new(Worker), stopping));
    until("a failure", || {
        events.lock().unwrap().iter().find(|event| matches!(event, ConnectionEvent::Lost { .. })).cloned()
    });
    assert_eq!(server.registry.connected(), []);
    assert!(server.events.lock().unwrap().is_empty());
}

#[test]
fn commands_are_carried_out_once_and_survive_a_broken_session() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    let agent = Agent::started(&runtime, &server);
    let session = server.registry.host(agent.host).unwrap();
    assert_eq!(session.info().unwrap().host_name, "hv1");
    assert_eq!(session.command(inspect(0)).unwrap(), "\"inspected\"");
    let defect = session.command(command::Kind::ListInventory(v0::ListInventory::default())).unwrap_err();
    assert_eq!(defect.code, Code::Internal);

    // The session ends while the command runs: the certificate is renewed, the agent comes back, the result arrives.
    let pending = session.start(inspect(3_000)).unwrap();
    until("progress", || pending.progress());
    clock.advance(DAY * 5);
    until("the renewal", || {
        agent
            .events
            .lock()
            .unwrap()
            .iter()
            .find(|event| matches!(event, ConnectionEvent::Renewed { .. }))
            .cloned()
    });
    assert_eq!(pending.wait().unwrap(), "\"inspected\"");
    assert!(server.events.lock().unwrap().iter().any(|event| matches!(event, SessionEvent::Lost { .. })));
}

#[test]
fn a_revoked_host_is_out_within_five_seconds_open_streams_included() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    let agent = Agent::started(&runtime, &server);
    let session = server.registry.host(agent.host).unwrap();
    let job = JobId([7; 16]);
    let channel = session.open_data(job);
    let pending = session.start(send(job, 1 << 40, 65536, vec![])).unwrap();
    channel.reconnect(SOON).unwrap();
    channel.send(0u64.to_le_bytes().to_vec().into()).unwrap();
    channel.receive().unwrap().unwrap();

    server.register.revoked.lock().unwrap().insert(agent.host);
    let revoked = Instant::now();
    let ended = loop {
        if let Err(ended) = channel.receive() {
            break ended;
        }
    };
    assert!(matches!(&ended, ChannelError::Closed(problem) if problem.code == Code::HostRevoked), "{ended}");
    assert_eq!(pending.wait().unwrap_err().code, Code::HostRevoked);
    assert!(revoked.elapsed() < Duration::from_secs(5), "{:?}", revoked.elapsed());
    assert!(server.registry.host(agent.host).is_none());
    agent.refused_with(Code::HostRevoked);
}

#[test]
fn an_expired_certificate_renews_and_one_too_old_does_not() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    for (away, returns) in [(DAY * 96, true), (DAY * 98, false)] {
        let mut agent = Agent::enrol(&runtime, &server, &server.address);
        clock.advance(away);
        agent.run(&runtime, &clock);
        if returns {
            until("the session", || server.registry.host(agent.host));
            let events = agent.events.lock().unwrap().clone();
            assert!(matches!(events[0], ConnectionEvent::Renewed { .. }), "{events:?}");
        } else {
            let problem = agent.refused_with(Code::CertificateExpired);
            assert!(problem.message.contains("90 days"), "{problem}");
            assert!(server.registry.host(agent.host).is_none());
        }
    }
}

#[test]
fn the_server_ends_what_outlives_its_certificate() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    // This agent's clock stands still: it does not see that its certificate ends.
    let mut agent = Agent::enrol(&runtime, &server, &server.address);
    agent.run(&runtime, &Arc::new(FixedClock::new(NOW)));
    until("the first session", || server.registry.host(agent.host));
    clock.advance(DAY * 7 + Duration::from_secs(1));
    until("the end of the session", || {
        server
            .events
            .lock()
            .unwrap()
            .iter()
            .find(|event| matches!(event, SessionEvent::Ended { .. }))
            .cloned()
    });
    // The server's leaf is now in the agent's future, within the tolerance only if it had been a day.
    until("the refusal by the agent", || {
        agent.events.lock().unwrap().iter().find_map(|event| match event {
            ConnectionEvent::Lost { problem, .. } if problem.code == Code::ServerIdentity => Some(()),
            _ => None,
        })
    });
}

#[test]
fn a_job_of_another_host_and_no_job_at_all_get_the_same_refusal() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    let owner = Agent::started(&runtime, &server);
    let thief = Agent::started(&runtime, &server);
    let job = JobId([7; 16]);
    let channel = server.registry.host(owner.host).unwrap().open_data(job);
    let session = server.registry.host(thief.host).unwrap();
    let stolen = session.command(receive(job)).unwrap_err();
    let nothing = session.command(receive(JobId([8; 16]))).unwrap_err();
    assert_eq!(stolen.code, Code::Unauthorised);
    assert_eq!(
        stolen.message.replace(&job.to_string(), "?"),
        nothing.message.replace(&JobId([8; 16]).to_string(), "?")
    );
    assert!(matches!(channel.reconnect(Duration::from_millis(50)), Err(ChannelError::TimedOut(_))));
    assert_eq!(server.registry.host(owner.host).unwrap().command(receive(job)).unwrap(), "\"open\"");
}

#[test]
fn a_server_rebuilt_elsewhere_after_thirty_days_gets_its_agent_back() {
    let runtime = runtime();
    let clock = clock();
    // The place where the server will come back is in the list from the beginning.
    let later = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let elsewhere = later.local_addr().unwrap().to_string();
    let identity = Arc::new(ServerIdentity::generate([1; 16]).unwrap());
    let first = Server::start_as(
        &runtime,
        &clock,
        Arc::clone(&identity),
        Arc::default(),
        std::slice::from_ref(&elsewhere),
    );
    let agent = Agent::started(&runtime, &first);
    let sealed = identity.to_bytes();
    let hosts = first.register.hosts.lock().unwrap().clone();
    first.stop();
    until("the end of the session", || first.registry.host(agent.host).is_none().then_some(()));
    drop((first, identity));
    clock.advance(DAY * 30);

    let register = Arc::new(Register::default());
    *register.hosts.lock().unwrap() = hosts;
    let rebuilt = Arc::new(ServerIdentity::from_bytes(&sealed).unwrap());
    let second = Server::start_on(&runtime, &clock, rebuilt, register, vec![elsewhere], later);
    let session = until("the agent's return", || second.registry.host(agent.host));
    assert_eq!(session.command(inspect(0)).unwrap(), "\"inspected\"");
    let (addresses, _) = state(agent.folder.path()).addresses().unwrap();
    assert_eq!(addresses, [second.address]);
}

#[test]
fn a_second_agent_with_a_copied_state_takes_over_with_a_warning() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    let agent = Agent::started(&runtime, &server);
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let events = Arc::default();
    runtime.spawn(run(settings(&clock, &events), state(agent.folder.path()), Arc::new(Worker), stopping));
    until("the warning", || {
        server
            .events
            .lock()
            .unwrap()
            .iter()
            .find(|event| matches!(event, SessionEvent::Duplicate { .. }))
            .cloned()
    });
}

/// Receives `total` bytes, checking each, over as many streams as it takes; gives the number of cuts.
fn take_all(channel: &protocol::channel::DataChannel, total: u64) -> usize {
    let (mut at, mut cuts) = (0u64, 0);
    loop {
        let mut round = || -> Result<(), ChannelError> {
            channel.reconnect(SOON)?;
            channel.send(at.to_le_bytes().to_vec().into())?;
            while let Some(payload) = channel.receive()? {
                let row: Vec<u8> = (0..256).map(pattern_row).collect();
                let shift = (at % 256) as usize;
                let right = payload.iter().zip(row.iter().cycle().skip(shift)).all(|(got, want)| got == want);
                assert!(right, "wrong bytes after {at}");
                at += payload.len() as u64;
            }
            channel.finish()
        };
        match round() {
            Ok(()) if at == total => return cuts,
            Ok(()) => panic!("End after {at} of {total} bytes"),
            Err(ChannelError::Cut) => cuts += 1,
            Err(other) => panic!("{other} after {at} bytes"),
        }
    }
}

#[test]
fn data_flows_at_a_sane_rate_and_long_lists_arrive_whole() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    let agent = Agent::started(&runtime, &server);
    let session = server.registry.host(agent.host).unwrap();
    let job = JobId([7; 16]);
    let channel = session.open_data(job);
    let ranges: Vec<_> = (0..100_000).map(|n| v0::Range { offset: n * 131_072, length: 65_536 }).collect();
    let total = 256 << 20;
    let pending = session.start(send(job, total, 512 * 1024, ranges)).unwrap();
    let start = Instant::now();
    assert_eq!(take_all(&channel, total), 0);
    let rate = total as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!("{rate:.0} MB/s");
    // Far below what it does, far above what a 64 KiB window or a copy per byte would do on a busy machine.
    assert!(rate > 20.0, "{rate:.0} MB/s");
    assert_eq!(pending.wait().unwrap(), "[0,100000]");
}

#[test]
fn a_cut_at_any_byte_ends_in_the_same_bytes() {
    let runtime = runtime();
    let clock = clock();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    // From the handshake to the middle of the data; fixed seed.
    let random = environment::SeededRandomness::new(41);
    let cuts: Vec<u64> =
        (0..12).map(|n| if n % 3 == 0 { random.below(6_000) } else { random.below(4 << 20) }).collect();
    let own = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let proxy = Proxy::start(&runtime, listener, own.local_addr().unwrap().to_string(), cuts);
    let identity = Arc::new(ServerIdentity::generate([1; 16]).unwrap());
    let told = vec![proxy.address.clone()];
    let server = Server::start_on(&runtime, &clock, identity, Arc::default(), told, own);
    // Enrolled past the proxy, and from then on through it alone.
    let mut agent = Agent::enrol(&runtime, &server, &server.address);
    state(agent.folder.path()).set_addresses(&[], &proxy.address).unwrap();
    agent.run(&runtime, &clock);
    let session = until("a session", || server.registry.host(agent.host));
    let job = JobId([7; 16]);
    let channel = session.open_data(job);
    let total = 24 << 20;
    let pending = session.start(send(job, total, 100_000, vec![])).unwrap();
    let seen = take_all(&channel, total);
    // Both ends saw the cuts, and the agent knows how it ended even though its session was cut, too.
    let told = pending.wait().unwrap();
    println!(
        "{} connections cut, {seen} cuts seen by the job; agent: {told}",
        proxy.cut.load(Ordering::SeqCst)
    );
    assert!(proxy.cut.load(Ordering::SeqCst) >= 6 && seen >= 3, "the test must cut");
}

#[test]
fn a_connection_that_only_looks_open_is_noticed_within_twenty_seconds() {
    let runtime = runtime();
    let clock = clock();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let own = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let proxy = Proxy::start(&runtime, listener, own.local_addr().unwrap().to_string(), vec![]);
    let identity = Arc::new(ServerIdentity::generate([1; 16]).unwrap());
    let told = vec![proxy.address.clone()];
    let server = Server::start_on(&runtime, &clock, identity, Arc::default(), told, own);
    let agent = Agent::started(&runtime, &server);
    // `started` enrolled past the proxy; from the greeting on the agent knows both addresses.
    let session = server.registry.host(agent.host).unwrap();
    let job = JobId([7; 16]);
    let channel = session.open_data(job);
    let _pending = session.start(send(job, 1 << 40, 65536, vec![])).unwrap();
    channel.reconnect(SOON).unwrap();
    channel.send(0u64.to_le_bytes().to_vec().into()).unwrap();
    channel.receive().unwrap().unwrap();
    proxy.swallow.store(true, Ordering::SeqCst);
    let silent = Instant::now();
    while channel.receive().is_ok() {}
    assert!(silent.elapsed() < Duration::from_secs(22), "{:?}", silent.elapsed());
    assert!(silent.elapsed() > Duration::from_secs(1), "the proxy must have swallowed, not cut");
    proxy.swallow.store(false, Ordering::SeqCst);
    channel.reconnect(Duration::from_secs(40)).unwrap();
}

#[test]
fn every_flipped_bit_of_the_agents_state_is_named_and_the_version_before_serves() {
    let runtime = runtime();
    let clock = clock();
    let server = Server::start(&runtime, &clock);
    let agent = Agent::enrol(&runtime, &server, &server.address);
    let kept = state(agent.folder.path());
    let path = agent.folder.path().join("identity.1");
    let good = std::fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&path, bad).unwrap();
        let problem = kept.identity().map(drop).unwrap_err();
        assert_eq!(problem.code, Code::StateDamaged);
        assert!(problem.message.contains("identity.1") && problem.message.contains("enrolment"), "{problem}");
    }
    std::fs::write(&path, &good).unwrap();
    let (identity, damage) = kept.identity().unwrap();
    assert_eq!(damage, None);
    kept.set_identity(&identity).unwrap();
    std::fs::write(agent.folder.path().join("identity.2"), b"SPAGENT1").unwrap();
    let (_, damage) = kept.identity().unwrap();
    assert!(damage.unwrap().message.contains("identity.2"));
    assert_eq!(
        state(&agent.folder.path().join("none")).identity().map(drop).unwrap_err().code,
        Code::NotFound
    );
}
