//! Hosts with a libvirt of their own, each in its namespaces, and guests that check themselves.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::program::{Pool, Ran, finish, tool};

fn testbed(script: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testbed").join(script)
}

/// Kernel and memory disk of the guest: made once for each version of the script that makes them.
fn guest() -> PathBuf {
    let script = std::fs::read(testbed("make-guest.sh")).unwrap();
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(std::env::temp_dir);
    let folder = cache.join("stillpoint").join(format!("guest-{}", &blake3::hash(&script).to_hex()[..16]));
    if !folder.join("initrd").exists() {
        let making = folder.with_extension(format!("making-{}", std::process::id()));
        tool("bash", &[testbed("make-guest.sh").as_os_str(), making.as_os_str()]);
        // Whoever was quicker made the same.
        let _ = std::fs::rename(&making, &folder);
        let _ = std::fs::remove_dir_all(&making);
    }
    folder
}

/// Some hosts; they end with it.
pub struct Hosts {
    folder: tempfile::TempDir,
}

impl Hosts {
    pub fn start(names: &[&str]) -> Hosts {
        let folder = tempfile::Builder::new().prefix("lv").tempdir_in("/tmp").unwrap();
        let mut words =
            vec![testbed("libvirt-hosts.sh").into_os_string(), "start".into(), folder.path().into()];
        words.extend(names.iter().map(Into::into));
        // Its daemons outlive it and hold its output, so nobody waits for the end of that.
        let log = std::fs::File::create(folder.path().join("start.log")).unwrap();
        let status = Command::new("bash").args(&words).stdout(log.try_clone().unwrap()).stderr(log).status();
        let said = std::fs::read_to_string(folder.path().join("start.log")).unwrap();
        assert!(status.unwrap().success(), "{said}; it needs root, and what `cargo xtask install` installs");
        Hosts { folder }
    }

    pub fn host(&self, name: &str) -> Host {
        let folder = self.folder.path();
        Host {
            hosts: folder.to_owned(),
            name: name.to_owned(),
            pool: Pool::at(folder, &format!("pool-{name}")),
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let words = [testbed("libvirt-hosts.sh").into_os_string(), "stop".into(), self.folder.path().into()];
        let _ = Command::new("bash").args(words).output();
    }
}

/// One host, and a pool of this machine that its guests are protected in.
pub struct Host {
    hosts: PathBuf,
    name: String,
    pub pool: Pool,
}

impl Host {
    /// The words that run a program on this host.
    pub fn enter(&self) -> Vec<String> {
        let words = [testbed("libvirt-hosts.sh").into_os_string(), "enter".into(), self.hosts.clone().into()];
        let said = tool("bash", &[words.as_slice(), &[self.name.clone().into()]].concat());
        said.lines().map(str::to_owned).collect()
    }

    fn daemon(&self, verb: &str) {
        let words = [testbed("libvirt-hosts.sh").into_os_string(), verb.into(), self.hosts.clone().into()];
        // What it starts holds its output.
        let status = Command::new("bash").args(words).arg(&self.name).stdout(Stdio::null()).status().unwrap();
        assert!(status.success(), "{verb} of libvirtd");
    }

    /// Kills libvirt's daemon as a defect would.
    pub fn kill_daemon(&self) {
        self.daemon("kill");
    }

    /// Starts it again.
    pub fn restart_daemon(&self) {
        self.daemon("restart");
    }

    /// Kills the process of a guest.
    pub fn kill_guest(&self, guest: &str) {
        let pid = std::fs::read_to_string(self.hosts.join(&self.name).join(format!("run/qemu/{guest}.pid")))
            .unwrap();
        let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    /// Where all hosts see the same images.
    pub fn shared(&self) -> PathBuf {
        self.hosts.join("shared")
    }

    /// Its URI for another host's daemon or a client.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.socket().display())
    }

    /// Starts a command of virsh that takes its time.
    pub fn virsh_begin(&self, words: &[&str]) -> Child {
        Command::new("virsh")
            .args(["-q", "-c", &self.uri()])
            .args(words)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// The same host, with the pool of another.
    pub fn with_pool_of(&self, other: &Host) -> Host {
        Host { hosts: self.hosts.clone(), name: self.name.clone(), pool: other.pool.clone() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its guests' images lie.
    pub fn images(&self) -> PathBuf {
        self.hosts.join(&self.name).join("images")
    }

    /// Its daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.hosts.join(&self.name).join("run/libvirt-sock")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillpoint"));
        command.env("STILLPOINT_LIBVIRT_SOCKET", self.socket()).env_remove("STILLPOINT_SERVER");
        command.arg("--json").arg("--standalone").arg(&self.pool.data).args(words).stdin(Stdio::null());
        command
    }

    /// Runs the program against this host's libvirt.
    pub fn run(&self, words: &[&str]) -> Ran {
        finish(self.command(words).output().unwrap(), words)
    }

    /// Runs the program where no libvirt is.
    pub fn run_without(&self, words: &[&str]) -> Ran {
        finish(
            self.command(words).env("STILLPOINT_LIBVIRT_SOCKET", "/nonexistent/sock").output().unwrap(),
            words,
        )
    }

    /// Posts a guard over a freeze of a guest, as the agent does; its input is the pipe.
    pub fn guard(&self, guest: &str, limit: Duration, note: &Path) -> Child {
        let id = self.virsh(&["domuuid", guest]).trim().replace('-', "");
        Command::new(env!("CARGO_BIN_EXE_stillpoint"))
            .args(["__thaw-guard", "frozen"])
            .arg(self.socket())
            .args([id, limit.as_millis().to_string()])
            .arg(note)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// What must be done without a warning.
    #[track_caller]
    pub fn done(&self, words: &[&str]) -> Ran {
        self.run(words).expect(0)
    }

    /// Starts the program and does not wait for it.
    pub fn begin(&self, words: &[&str]) -> Child {
        self.command(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    pub fn virsh_output(&self, words: &[&str]) -> Output {
        Command::new("virsh").args(["-q", "-c", &self.uri()]).args(words).output().unwrap()
    }

    #[track_caller]
    pub fn virsh(&self, words: &[&str]) -> String {
        let output = self.virsh_output(words);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "virsh {words:?}: {said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        said
    }

    /// Makes a definition of a guest with this disk; `load` KiB are written again and again.
    pub fn define(&self, guest: &str, disk: &Path, load: u32) {
        self.define_with(guest, &[disk], load, "");
    }

    /// The same with several disks, each of the format that its name says, and more of a definition.
    pub fn define_with(&self, guest_name: &str, disks: &[&Path], load: u32, more: &str) {
        let guest = guest();
        let disks: String = disks
            .iter()
            .zip('a'..)
            .map(|(disk, letter)| {
                // What libvirt calls them.
                let format = match disk.extension().unwrap().to_str().unwrap() {
                    "vhdx" => "vhd",
                    other => other,
                };
                format!(
                    "<disk type='file' device='disk'><driver name='qemu' type='{format}' cache='none' discard='unmap'/>
<source file='{}'/><target dev='vd{letter}' bus='virtio'/></disk>",
                    disk.display()
                )
            })
            .collect();
        let definition = format!(
            "<domain type='qemu'><name>{guest_name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{0}/vmlinux</kernel><initrd>{0}/initrd</initrd>
<cmdline>console=ttyS0 quiet panic=-1 {1}</cmdline></os><cpu mode='maximum'/><features><acpi/></features><devices>
{disks}<serial type='file'><source path='/var/log/libvirt/{guest_name}.serial'/></serial>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel><memballoon model='none'/>
{more}</devices></domain>",
            guest.display(),
            if load > 0 { format!("load={load}") } else { String::new() },
        );
        let file = self.hosts.join(format!("{guest_name}.xml"));
        std::fs::write(&file, definition).unwrap();
        self.virsh(&["define", &file.display().to_string()]);
    }

    /// Makes the disk of a new guest.
    pub fn disk(&self, name: &str) -> PathBuf {
        self.disk_of(name, "qcow2", 512)
    }

    /// The same in another format, of so many MiB.
    pub fn disk_of(&self, name: &str, format: &str, mib: u32) -> PathBuf {
        let (raw, disk) =
            (self.hosts.join(format!("{name}.raw")), self.images().join(format!("{name}.{format}")));
        tool("bash", &[testbed("make-guest-disk.sh").as_os_str(), raw.as_os_str(), mib.to_string().as_ref()]);
        let words = ["convert", "-f", "raw", "-O", format].map(std::ffi::OsStr::new);
        tool("qemu-img", &[words.as_slice(), &[raw.as_os_str(), disk.as_os_str()]].concat());
        std::fs::remove_file(raw).unwrap();
        disk
    }

    /// Starts a guest and waits until its agent answers; gives what its own check said.
    pub fn boot(&self, guest: &str) -> String {
        let text = self.virsh(&["dumpxml", guest]);
        let name = text.split("/var/log/libvirt/").nth(1).unwrap().split('\'').next().unwrap().to_owned();
        let serial = self.hosts.join(&self.name).join("log").join(name);
        let _ = std::fs::remove_file(&serial);
        self.virsh(&["start", guest]);
        self.is_up(guest, &serial)
    }

    /// Waits until a guest that was started is up; gives what its own check said.
    pub fn is_up(&self, guest: &str, serial: &Path) -> String {
        let said = || String::from_utf8_lossy(&std::fs::read(serial).unwrap_or_default()).into_owned();
        until(Duration::from_secs(180), &format!("{guest} is up"), || said().contains("GUEST-READY"));
        until(Duration::from_secs(60), "the agent answers", || {
            self.virsh_output(&["qemu-agent-command", guest, "{\"execute\":\"guest-ping\"}"]).status.success()
        });
        let said = said();
        said.lines().find_map(|line| line.trim().strip_prefix("GUEST-CHECK ")).unwrap_or("nothing").to_owned()
    }

    /// Where the serial port of a guest of this name writes.
    pub fn serial(&self, guest: &str) -> PathBuf {
        self.hosts.join(&self.name).join("log").join(format!("{guest}.serial"))
    }

    /// Ends a guest, and forgets it with what libvirt keeps of it.
    pub fn forget(&self, guest: &str) {
        let _ = self.virsh_output(&["destroy", guest]);
        self.virsh(&["undefine", guest, "--checkpoints-metadata", "--snapshots-metadata"]);
    }

    /// What a command in a guest prints.
    pub fn said(&self, guest: &str, command: &str) -> String {
        let request = serde_json::json!({"execute": "guest-exec", "arguments": {
            "path": "/bin/sh", "arg": ["-c", command], "capture-output": true}});
        let started = self.virsh(&["qemu-agent-command", guest, &request.to_string()]);
        let started: serde_json::Value = serde_json::from_str(&started).unwrap();
        let request = serde_json::json!({"execute": "guest-exec-status",
            "arguments": {"pid": started["return"]["pid"]}});
        let mut ended = serde_json::Value::Null;
        until(Duration::from_secs(60), command, || {
            let said = self.virsh(&["qemu-agent-command", guest, &request.to_string()]);
            ended = serde_json::from_str(&said).unwrap();
            ended["return"]["exited"] == true
        });
        let output = ended["return"]["out-data"].as_str().unwrap_or_default();
        String::from_utf8(base64::Engine::decode(&base64::engine::general_purpose::STANDARD, output).unwrap())
            .unwrap()
    }

    /// The number of the last complete file of the guest's load.
    pub fn sequence(&self, guest: &str) -> u64 {
        self.said(guest, "cat /data/seq").trim().parse().unwrap_or(0)
    }

    /// Runs a command in a guest and does not wait for its end.
    pub fn inside(&self, guest: &str, command: &str) {
        let request = serde_json::json!({"execute": "guest-exec",
            "arguments": {"path": "/bin/sh", "arg": ["-c", command]}});
        self.virsh(&["qemu-agent-command", guest, &request.to_string()]);
    }

    /// Whether file systems of a guest are frozen.
    pub fn is_frozen(&self, guest: &str) -> bool {
        let said = self.virsh(&["qemu-agent-command", guest, "{\"execute\":\"guest-fsfreeze-status\"}"]);
        said.contains("frozen")
    }

    /// Whether a guest says that no file system of it is frozen. After a restart of the daemon nobody can ask it for a moment.
    pub fn is_thawed(&self, guest: &str) -> bool {
        let said =
            self.virsh_output(&["qemu-agent-command", guest, "{\"execute\":\"guest-fsfreeze-status\"}"]);
        String::from_utf8_lossy(&said.stdout).contains("thawed")
    }

    /// Checkpoints of a guest.
    pub fn checkpoints(&self, guest: &str) -> Vec<String> {
        let said = self.virsh(&["checkpoint-list", guest, "--name", "--topological"]);
        said.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// What a backup left beside the images, and whether a job of one is there.
    pub fn leftovers(&self, guest: &str) -> Vec<String> {
        let mut found: Vec<String> = std::fs::read_dir(self.images())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name.contains("stillpoint") || name.contains(".partial"))
            .collect();
        if self.virsh_output(&["backup-dumpxml", guest]).status.success() {
            found.push("a backup job".to_owned());
        }
        found
    }
}

/// Waits for something.
#[track_caller]
pub fn until(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
