//! Calling the reader.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn script() -> PathBuf {
    Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../testbed/pool-reader.py")
}

/// A Python that has the modules: Debian's own first, because its packages are only there.
fn python() -> Option<&'static str> {
    ["/usr/bin/python3", "python3"].into_iter().find(|program| {
        let tried = Command::new(program).args(["-c", "import cryptography, zstandard"]).output();
        tried.is_ok_and(|output| output.status.success())
    })
}

/// Why the tests cannot run, if they cannot.
pub fn missing() -> Option<String> {
    python().is_none().then(|| {
        "no Python 3 with the modules cryptography and zstandard; `cargo xtask install` installs them"
            .to_owned()
    })
}

/// What one call gave.
#[derive(Debug)]
pub struct Read {
    pub status: i32,
    pub said: String,
    pub told: String,
}

impl Read {
    /// Names of files that findings speak of.
    pub fn named(&self) -> BTreeSet<String> {
        let words = self.told.split(|c: char| c.is_whitespace() || c == ':' || c == ',');
        let files = words.filter_map(|word| Path::new(word).file_name()?.to_str());
        files.filter(|file| file.contains('.')).map(str::to_owned).collect()
    }
}

pub fn read(words: &[&str]) -> Read {
    let output = Command::new(python().unwrap()).arg(script()).args(words).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let read = Read {
        status: output.status.code().unwrap_or(-1),
        said: text(&output.stdout),
        told: text(&output.stderr),
    };
    assert!(!read.told.contains("Traceback"), "{words:?}: {read:#?}");
    read
}

pub fn the_reader_knows_blake3() {
    let read = read(&["self-test"]);
    assert_eq!((read.status, read.told.as_str()), (0, ""), "{read:#?}");
}

/// Restores everything of a pool: the raw disks by point and index.
pub fn restore_all(pool: &Path, kit: &Path, to: &Path) -> (Read, BTreeMap<(String, u32), PathBuf>) {
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let read = read(&["restore-all", &path(pool), "--kit", &path(kit), "--to", &path(to)]);
    let mut disks = BTreeMap::new();
    for file in std::fs::read_dir(to).unwrap().map(|entry| entry.unwrap().path()) {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let (point, index) = name.split_once('-').unwrap();
        disks.insert((point.to_owned(), index.parse().unwrap()), file);
    }
    (read, disks)
}

/// Reads and hashes everything, and holds runs and bundles against packs and records.
pub fn verify(pool: &Path, kit: &Path) -> Read {
    read(&["verify", pool.to_str().unwrap(), "--kit", kit.to_str().unwrap(), "--index"])
}
