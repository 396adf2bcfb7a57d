//! The golden pools of every format version.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::program::tool;
use crate::python::{restore_all, verify};

/// All `fixtures/golden-v*/NAME.tar` of the storage pool.
fn archives() -> Vec<PathBuf> {
    let fixtures = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("../storage-pool/fixtures");
    let listed = |folder: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let mut found: Vec<PathBuf> = listed(&fixtures)
        .iter()
        .filter(|folder| folder.file_name().unwrap().to_str().unwrap().starts_with("golden-v"))
        .flat_map(|folder| listed(folder))
        .filter(|path| path.extension().is_some_and(|extension| extension == "tar"))
        .collect();
    found.sort();
    found
}

/// Every disk of every point that `expected.txt` lists has the hash that stands there, nothing else is restored, and
/// the files that verify names are the damaged ones. The hashes come from what was stored, not from the pool.
pub fn every_golden_pool_is_restored() {
    let archives = archives();
    assert!(!archives.is_empty());
    for archive in &archives {
        let name = archive.display();
        let folder = tempfile::tempdir().unwrap();
        tool("tar", &["-xf".as_ref(), archive.as_os_str(), "-C".as_ref(), folder.path().as_os_str()]);
        let path = |name: &str| folder.path().join(name);
        let mut disks = BTreeMap::new();
        let mut damaged = BTreeSet::new();
        for line in std::fs::read_to_string(path("expected.txt")).unwrap().lines() {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["disk", point, index, size, hash] => {
                    let size: u64 = size.parse().unwrap();
                    disks.insert((point.to_owned(), index.parse::<u32>().unwrap()), (size, hash.to_owned()));
                }
                ["damaged", file] => {
                    damaged.insert(file.rsplit('/').next().unwrap().to_owned());
                }
                _ => panic!("{name}: {line}"),
            }
        }
        assert!(!disks.is_empty(), "{name}");
        let (read, restored) = restore_all(&path("pool"), &path("recovery-kit.txt"), &path("out"));
        // An expired point is there until its packs go, and nobody may count on it.
        let is_expired = |point: &str, index: u32| {
            read.said.lines().any(|line| line == format!("{point} {index} expired"))
        };
        let found: BTreeMap<_, _> = restored
            .into_iter()
            .filter(|((point, index), _)| !is_expired(point, *index))
            .map(|(disk, file)| {
                let bytes = std::fs::read(file).unwrap();
                (disk, (bytes.len() as u64, blake3::hash(&bytes).to_hex().to_string()))
            })
            .collect();
        assert_eq!(found, disks, "{name}: {read:#?}");
        let read = verify(&path("pool"), &path("recovery-kit.txt"));
        assert_eq!(read.named(), damaged, "{name}: {read:#?}");
        assert_eq!(read.status, i32::from(!damaged.is_empty()), "{name}: {read:#?}");
        eprintln!("{name}: {} disks restored", disks.len());
    }
}
