//! Installing what build and tests need on a Debian machine.
//!
//! Looks first and calls apt only when something is missing, so it costs nothing on a machine that is ready. On any
//! other system it only tells which programs are missing.

use crate::run;
use std::process::{Command, Stdio};

/// What the machine is to be made ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Building the program and running `stillpoint demo`.
    Demo,
    /// Everything `cargo xtask test` runs on this machine.
    Test,
    /// Compiling C parts of dependencies for Windows.
    Windows,
}

/// One Debian package: its name, one program of it, and what for.
struct Package {
    name: &'static str,
    program: &'static str,
    groups: &'static [Group],
}

const fn package(name: &'static str, program: &'static str, groups: &'static [Group]) -> Package {
    Package { name, program, groups }
}

use Group::{Demo, Test, Windows};

// aws-lc, zstd and SQLite are compiled from C by the crates that bring them: a C compiler is all they need (aws-lc has
// ready-made bindings and assembly for x86_64 and arm64, so no cmake, perl, go or bindgen).
const PACKAGES: &[Package] = &[
    package("gcc", "gcc", &[Demo, Test, Windows]),
    package("libc6-dev", "", &[Demo, Test, Windows]),
    // The demo's disk: a partition table and an ext4 file system with files in it.
    package("fdisk", "sfdisk", &[Demo, Test]),
    package("e2fsprogs", "mkfs.ext4", &[Demo, Test]),
    // The other side of every image format.
    package("qemu-utils", "qemu-img", &[Test]),
    // Real disks of testbed/make-workload.py.
    package("python3", "python3", &[Test]),
    // The independent reader, testbed/pool-reader.py.
    package("python3-cryptography", "", &[Test]),
    package("python3-zstandard", "", &[Test]),
    package("mount", "losetup", &[Test]),
    package("ntfs-3g", "mkntfs", &[Test]),
    // File systems with reflinks, where the provider `images` freezes without a copy.
    package("xfsprogs", "mkfs.xfs", &[Test]),
    package("btrfs-progs", "mkfs.btrfs", &[Test]),
    // Mounting the file system of the fault rig FSX, where that is not root's.
    package("fuse3", "fusermount3", &[Test]),
    // Network namespaces for agent and server on different hosts.
    package("iproute2", "ip", &[Test]),
    package("gcc-mingw-w64-x86-64-win32", "x86_64-w64-mingw32-gcc", &[Windows]),
];

/// Makes this machine ready for `group`.
pub fn run(group: Group) -> Result<(), String> {
    components(group)?;
    packages(group)?;
    // A hypervisor's parts must fit each other, which a list of names cannot say.
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../testbed/hypervisor.sh");
    if group == Test && run::on_path("apt-get") { run::run(Command::new("bash").arg(script)) } else { Ok(()) }
}

fn packages(group: Group) -> Result<(), String> {
    let wanted = PACKAGES.iter().filter(|package| package.groups.contains(&group));
    if !run::on_path("dpkg-query") || !run::on_path("apt-get") {
        let missing: Vec<&str> =
            wanted.filter(|p| !p.program.is_empty() && !have(p.program)).map(|p| p.program).collect();
        return if missing.is_empty() {
            Ok(())
        } else {
            Err(format!("not a Debian system; install these programs yourself: {}", missing.join(" ")))
        };
    }
    let missing: Vec<&str> = wanted.filter(|package| !installed(package.name)).map(|p| p.name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("xtask: installing {}", missing.join(" "));
    let as_root = is_root()?;
    if !as_root && !run::on_path("sudo") {
        return Err(format!(
            "needs root or sudo to install packages; run as root: apt-get install --no-install-recommends {}",
            missing.join(" ")
        ));
    }
    run::run(apt(as_root).arg("update"))?;
    run::run(apt(as_root).args(["install", "--yes", "--no-install-recommends"]).args(&missing))
}

fn apt(as_root: bool) -> Command {
    // `env` after sudo, because sudo clears the environment.
    let mut command = if as_root { Command::new("env") } else { Command::new("sudo") };
    if !as_root {
        command.arg("env");
    }
    // A second apt on this machine (another run, unattended upgrades) is waited for.
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600"]);
    command
}

fn is_root() -> Result<bool, String> {
    Ok(run::output(Command::new("id").arg("-u"))?.trim() == "0")
}

fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Abbrev}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|out| out.status.success() && out.stdout.starts_with(b"ii"))
}

/// Programs for administrators are often not on a user's path.
fn have(program: &str) -> bool {
    run::on_path(program)
        || ["/sbin", "/usr/sbin"].iter().any(|dir| std::path::Path::new(dir).join(program).exists())
}

/// rustfmt and clippy are parts of the toolchain that a minimal rustup leaves out.
fn components(group: Group) -> Result<(), String> {
    if group != Group::Test {
        return Ok(());
    }
    let missing: Vec<&str> = [("fmt", "rustfmt"), ("clippy", "clippy")]
        .into_iter()
        .filter(|(verb, _)| {
            let quiet =
                run::cargo().args([verb, "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
            !quiet.is_ok_and(|status| status.success())
        })
        .map(|(_, component)| component)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    run::run(Command::new("rustup").args(["component", "add"]).args(&missing))
}
