//! The generator's output, made once for all tests that run at the same time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use serde_json::Value;

use crate::program::tool;

/// What the generator works in: its lists are exact to this many bytes.
pub const BLOCK: u64 = 64 * 1024;

/// The days of the small machines.
pub struct Made {
    folder: tempfile::TempDir,
}

/// Offset and length.
pub type Extents = Vec<(u64, u64)>;

/// The workload: made by the first who asks, removed with the last who holds it.
pub fn made() -> Arc<Made> {
    static MADE: Mutex<Weak<Made>> = Mutex::new(Weak::new());
    let mut known = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = known.upgrade() {
        return made;
    }
    let folder = tempfile::tempdir().unwrap();
    tool(
        "python3",
        &[
            generator().as_os_str(),
            "make".as_ref(),
            folder.path().as_os_str(),
            "--small".as_ref(),
            "--vms".as_ref(),
            "vm1,vm3".as_ref(),
        ],
    );
    let made = Arc::new(Made { folder });
    *known = Arc::downgrade(&made);
    made
}

fn generator() -> PathBuf {
    Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../testbed/make-workload.py")
}

impl Made {
    fn words<'a>(&'a self, verb: &'a str, machine: &'a str, day: &'a str, disk: &'a Path) -> Command {
        let mut command = Command::new("python3");
        command.arg(generator()).arg(verb).arg(self.folder.path()).args([machine, day]).arg(disk);
        command
    }

    /// Writes a machine's disk of the first day.
    pub fn first_day(&self, machine: &str, disk: &Path) {
        let from = self.folder.path().join(machine).join("day1.raw");
        tool("cp", &["--sparse=always".as_ref(), from.as_os_str(), disk.as_os_str()]);
    }

    /// Turns a disk of the day before into `day`, in place.
    pub fn step(&self, machine: &str, day: u32, disk: &Path) {
        let output = self.words("step", machine, &day.to_string(), disk).output().unwrap();
        assert!(output.status.success(), "step: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Whether a disk is exactly that day's.
    #[track_caller]
    pub fn check(&self, machine: &str, day: u32, disk: &Path) {
        let output = self.words("check", machine, &day.to_string(), disk).output().unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{} is not {machine} of day {day}: {said}", disk.display());
    }

    fn list(&self, machine: &str, day: u32, name: &str) -> Extents {
        let path = self.folder.path().join(machine).join(format!("day{day}.json"));
        let day: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let extents = day[name].as_array().unwrap();
        extents.iter().map(|one| (one["start"].as_u64().unwrap(), one["length"].as_u64().unwrap())).collect()
    }

    /// What a change tracker reports for a day: all that changed, and a little that did not.
    pub fn dirty(&self, machine: &str, day: u32) -> Extents {
        self.list(machine, day, "dirty")
    }

    /// What truly changed on a day.
    pub fn changed(&self, machine: &str, day: u32) -> Extents {
        self.list(machine, day, "extents")
    }
}

/// Writes a list as `synchronize --changed-extents` reads it, and gives `0=FILE`.
pub fn write_list(extents: &Extents, path: &Path) -> String {
    std::fs::write(path, serde_json::to_vec(extents).unwrap()).unwrap();
    format!("0={}", path.display())
}

/// Bytes of a list, rounded out to blocks.
pub fn rounded(extents: &Extents) -> u64 {
    blocks(extents).len() as u64 * BLOCK
}

/// Blocks that a list touches.
pub fn blocks(extents: &Extents) -> std::collections::BTreeSet<u64> {
    extents.iter().flat_map(|(start, length)| start / BLOCK..(start + length).div_ceil(BLOCK)).collect()
}

/// Converts an image with qemu-img, the target replaced in place.
pub fn convert(from: &Path, format: &str, options: Option<&str>, to: &Path, to_format: &str) {
    let mut words = vec!["convert".as_ref(), "-f".as_ref(), format.as_ref()];
    if let Some(options) = options {
        words.extend(["-o".as_ref(), std::ffi::OsStr::new(options)]);
    }
    words.extend(["-O".as_ref(), to_format.as_ref(), from.as_os_str(), to.as_os_str()]);
    tool("qemu-img", &words);
}

/// Whether two files hold the same bytes.
pub fn is_same(a: &Path, b: &Path) -> bool {
    let (a, b) = (File::open(a).unwrap(), File::open(b).unwrap());
    let size = a.metadata().unwrap().len();
    if size != b.metadata().unwrap().len() {
        return false;
    }
    let (mut one, mut other) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < size {
        let part = usize::try_from((size - at).min(1 << 20)).unwrap();
        a.read_exact_at(&mut one[..part], at).unwrap();
        b.read_exact_at(&mut other[..part], at).unwrap();
        if one[..part] != other[..part] {
            return false;
        }
        at += part as u64;
    }
    true
}
