//! Against QEMU's own server. Its tools must be there (`qemu-utils`): a test that cannot compare fails.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use block_io::{Allocated, BlockDevice, ByteRange, DeviceError, WritableDevice, conformance};
use nbd::{Address, Export, NbdError, Options};

const SIZE: u64 = (40 << 20) + 3 * 512;

/// Runs a tool of QEMU in `folder`; must succeed.
fn tool(program: &str, folder: &Path, words: &[&str]) -> String {
    let done =
        Command::new(program).current_dir(folder).args(words).output().unwrap_or_else(|error| {
            panic!("{program} is needed for this test (package qemu-utils): {error}")
        });
    let mut text = String::from_utf8_lossy(&done.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && !text.contains("failed"), "{program} {words:?}: {text}");
    text
}

fn img(folder: &Path, line: &str) -> String {
    tool("qemu-img", folder, &line.split_whitespace().collect::<Vec<_>>())
}

fn io(folder: &Path, commands: &[&str]) {
    let mut words = vec!["-f", "qcow2"];
    for command in commands {
        words.extend(["-c", command]);
    }
    words.push("disk.qcow2");
    tool("qemu-io", folder, &words);
}

/// A server of one image; it ends with this value.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(folder: &Path, words: &[&str]) -> Server {
        let socket = folder.join("socket");
        let child = Command::new("qemu-nbd")
            .current_dir(folder)
            .args(["--persistent", "-k"])
            .arg(&socket)
            .args(words)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("qemu-nbd is needed for this test (package qemu-utils): {error}"));
        let mut server = Server { child, socket };
        let begun = Instant::now();
        while nbd::list(&server.address(), Duration::from_secs(10)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "qemu-nbd does not answer");
            assert!(server.child.try_wait().unwrap().is_none(), "qemu-nbd has ended");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn address(&self) -> Address {
        Address::Unix(self.socket.clone())
    }

    fn open(&self, change: impl FnOnce(&mut Options)) -> Export {
        self.try_open(change).unwrap()
    }

    fn try_open(&self, change: impl FnOnce(&mut Options)) -> Result<Export, NbdError> {
        let mut options = Options { export: "disk".to_owned(), ..Options::default() };
        change(&mut options);
        Export::connect(&self.address(), &options)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let id = self.child.id().to_string();
        // In order, so that it closes its image; by force if it does not.
        let _ = Command::new("kill").arg(&id).status();
        for _ in 0..500 {
            if self.child.try_wait().is_ok_and(|ended| ended.is_some()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const WRITES: [&str; 7] = [
    "write -P 0x11 0 65536",
    "write -P 0x22 1048576 4096",
    "write -P 0x33 2097152 2500096",
    "write -z 3145728 131072",
    "write -P 0x44 20971520 512",
    "discard 2162688 65536",
    "write -P 0x55 41943040 1536",
];

fn ranges(device: &dyn BlockDevice) -> Vec<ByteRange> {
    Allocated::new(device, ByteRange { start: 0, end: device.size() }).map(Result::unwrap).collect()
}

/// Ranges that `qemu-img map` does not call zeros, merged.
fn mapped(folder: &Path) -> Vec<ByteRange> {
    let number = |line: &str, key: &str| -> Option<u64> {
        let rest = line.split_once(&format!("\"{key}\": "))?.1;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let mut found: Vec<ByteRange> = Vec::new();
    for line in img(folder, "map -f qcow2 --output=json disk.qcow2").lines() {
        let (Some(start), Some(length)) = (number(line, "start"), number(line, "length")) else { continue };
        if line.contains("\"zero\": true") {
            continue;
        }
        match found.last_mut() {
            Some(last) if last.end == start => last.end += length,
            _ => found.push(ByteRange { start, end: start + length }),
        }
    }
    assert!(!found.is_empty());
    found
}

#[test]
fn an_image_with_holes_reads_as_qemu_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    img(path, &format!("create -q -f qcow2 disk.qcow2 {SIZE}"));
    io(path, &WRITES);
    img(path, "convert -f qcow2 -O raw disk.qcow2 disk.raw");
    let expected = std::fs::read(path.join("disk.raw")).unwrap();
    let allocated = mapped(path);
    let server = Server::start(path, &["-r", "-f", "qcow2", "-x", "disk", "-e", "8", "disk.qcow2"]);
    for connections in [1, 4] {
        let export = server.open(|options| {
            options.connections = connections;
            options.writable = true;
        });
        assert_eq!(export.size(), SIZE);
        assert!(export.is_read_only() && export.tells_allocation());
        assert!(export.block_sizes().maximum <= 32 << 20);
        assert_eq!(export.connections(), connections as usize);
        conformance::examine(&export, &expected);
        assert_eq!(ranges(&export), allocated);
        assert!(matches!(export.write_at(0, &[1; 512]), Err(DeviceError::ReadOnly { .. })));
    }
    let without = server.open(|options| options.allocation = false);
    assert_eq!(ranges(&without), [ByteRange { start: 0, end: SIZE }]);
    conformance::examine(&without, &expected);
    // Many at once over one connection.
    let export = server.open(|_| {});
    std::thread::scope(|scope| {
        for thread in 0..8usize {
            let (export, expected) = (&export, &expected);
            scope.spawn(move || {
                for turn in 0..40usize {
                    let start = (thread * 5_300_417 + turn * 1_000_003) % (expected.len() - 200_000);
                    let mut part = vec![0xAA; 7 + turn * 4_999];
                    export.read_at(start as u64, &mut part).unwrap();
                    assert!(part == expected[start..start + part.len()], "{} bytes at {start}", part.len());
                }
            });
        }
    });
    let listed = nbd::list(&server.address(), Duration::from_secs(10)).unwrap();
    assert_eq!(listed.iter().map(|entry| entry.name.as_str()).collect::<Vec<_>>(), ["disk"]);
    let missing = server.try_open(|options| options.export = "other".to_owned()).err().unwrap();
    assert!(matches!(&missing, NbdError::NoSuchExport { name, .. } if name == "other"), "{missing}");
    let missing = server.try_open(|options| options.bitmaps = vec!["none".to_owned()]).err().unwrap();
    assert!(matches!(&missing, NbdError::NoContext { .. }), "{missing}");
}

#[test]
fn a_persistent_bitmap_tells_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    img(path, &format!("create -q -f qcow2 disk.qcow2 {SIZE}"));
    io(path, &["write -P 9 0 10M"]);
    img(path, "bitmap --add -g 64k disk.qcow2 since");
    img(path, "bitmap --add -g 512 disk.qcow2 fine");
    img(path, "bitmap --add --disable disk.qcow2 empty");
    io(
        path,
        &[
            "write -P 1 0 512",
            "write -P 2 131071 2",
            "write -z 1048576 65536",
            "discard 5242880 131072",
            "write -P 3 20000000 70000",
            "write -P 4 41943040 1536",
        ],
    );
    let written = [
        (0, 512),
        (131_071, 2),
        (1_048_576, 65_536),
        (5_242_880, 131_072),
        (20_000_000, 70_000),
        (41_943_040, 1536),
    ]
    .into_iter()
    .map(|(start, length)| ByteRange { start, end: start + length })
    .collect::<model::RangeSet>();
    let server = Server::start(
        path,
        &["-r", "-f", "qcow2", "-x", "disk", "-B", "since", "-B", "fine", "-B", "empty", "disk.qcow2"],
    );
    let export = server.open(|options| {
        options.bitmaps = ["since", "fine", "empty"].map(str::to_owned).to_vec();
    });
    assert_eq!(export.dirty("since").unwrap(), written.rounded_out(65_536, SIZE));
    assert_eq!(export.dirty("fine").unwrap(), written.rounded_out(512, SIZE));
    assert!(export.dirty("empty").unwrap().is_empty());
    assert!(matches!(export.dirty("other"), Err(NbdError::NoContext { .. })));
    // Allocation goes on beside it.
    assert!(!ranges(&export).is_empty());
}

#[test]
fn what_is_written_arrives() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    img(path, &format!("create -q -f qcow2 disk.qcow2 {SIZE}"));
    let mut expected = vec![0u8; SIZE as usize];
    {
        let server = Server::start(path, &["-f", "qcow2", "-x", "disk", "disk.qcow2"]);
        let export = server.open(|options| options.writable = true);
        // The large one is more than one request.
        for (turn, (offset, length)) in
            [(0usize, 35 << 20), (36 << 20, 100_000), (SIZE as usize - 513, 513), (777, 3)]
                .into_iter()
                .enumerate()
        {
            let bytes: Vec<u8> = (0..length).map(|at| (at / 7 + turn) as u8 | 1).collect();
            export.write_at(offset as u64, &bytes).unwrap();
            expected[offset..offset + length].copy_from_slice(&bytes);
        }
        for (start, end) in [(65_536u64, 33 << 20), ((34 << 20) + 5, (34 << 20) + 70_001)] {
            export.write_zeros(ByteRange { start, end }).unwrap();
            expected[start as usize..end as usize].fill(0);
        }
        export.flush().unwrap();
        conformance::examine(&export, &expected);
        assert!(ranges(&export).iter().map(ByteRange::len).sum::<u64>() < 4 << 20, "zeros take no space");
    }
    std::fs::write(path.join("expected.raw"), &expected).unwrap();
    img(path, "compare -f qcow2 -F raw disk.qcow2 expected.raw");

    let next = std::cell::Cell::new(0);
    let servers = std::cell::RefCell::new(Vec::new());
    conformance::writes(1 << 20, || {
        next.set(next.get() + 1);
        let folder = path.join(next.get().to_string());
        std::fs::create_dir(&folder).unwrap();
        img(&folder, "create -q -f qcow2 disk.qcow2 1M");
        let server = Server::start(&folder, &["-f", "qcow2", "-x", "disk", "disk.qcow2"]);
        let export = server.open(|options| options.writable = true);
        servers.borrow_mut().push(server);
        export
    });
}

#[test]
fn over_tcp() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    img(path, "create -q -f qcow2 disk.qcow2 1M");
    io(path, &["write -P 7 4096 8192"]);
    // A free port, as the system gives it; another process may take it in between, so it is tried again.
    for _ in 0..10 {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut child = Command::new("qemu-nbd")
            .current_dir(path)
            .args([
                "--persistent",
                "-r",
                "-f",
                "qcow2",
                "-b",
                "127.0.0.1",
                "-p",
                &port.to_string(),
                "disk.qcow2",
            ])
            .spawn()
            .unwrap();
        let address = Address::Tcp(format!("127.0.0.1:{port}"));
        let begun = Instant::now();
        let found = loop {
            match Export::connect(&address, &Options::default()) {
                Err(_) if begun.elapsed() < Duration::from_secs(5) => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                found => break found,
            }
        };
        let right = found.map(|export| {
            let mut part = [0; 8192];
            export.read_at(4096, &mut part).unwrap();
            part == [7; 8192]
        });
        child.kill().unwrap();
        child.wait().unwrap();
        if let Ok(right) = right {
            assert!(right);
            return;
        }
    }
    panic!("no port was free");
}
