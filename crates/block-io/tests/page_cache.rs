//! A disk that is read for a backup does not push out what the machines of its host use: which pages of a real file are in
//! the system's memory before and after.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{IoSliceMut, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use block_io::{BlockDevice, DeviceError, FileDevice};
use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

const PAGE: u64 = 4096;
const SIZE: u64 = 4 << 20;

fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at / PAGE * 7 + at % 251) as u8).collect()
}

/// Below the build folder: in a temporary folder that is memory itself, no page can be let go.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A file of which nothing is in memory, and one more opening of it that reads only what is asked.
fn cold(folder: &Path) -> (PathBuf, File) {
    let path = folder.join("disk.raw");
    let mut file = File::create(&path).unwrap();
    file.write_all(&content()).unwrap();
    file.sync_all().unwrap();
    let other = File::open(&path).unwrap();
    fadvise(&other, 0, None, Advice::Random).unwrap();
    fadvise(&other, 0, None, Advice::DontNeed).unwrap();
    (path, other)
}

/// The pages that are in memory. Asking for one that is not begins to bring it there: this can be asked once.
fn in_memory(file: &File) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    for page in 0..SIZE / PAGE {
        let mut byte = [0u8];
        match preadv2(file, &mut [IoSliceMut::new(&mut byte)], page * PAGE, ReadWriteFlags::NOWAIT) {
            Ok(_) => drop(found.insert(page)),
            Err(error) => assert_eq!(error, Errno::AGAIN),
        }
    }
    found
}

/// Dropping is advice: on a busy machine the kernel keeps a page that somebody has in hand just then. So one of three
/// readings must leave exactly what was there.
#[test]
fn a_disk_that_is_read_leaves_the_page_cache_as_it_was() {
    // The piece of page 20 begins with a page that was not in memory: of such a piece nothing is kept.
    let kept: BTreeSet<u64> = (32..70).chain([160]).collect();
    let left: Vec<BTreeSet<u64>> = (0..3).map(|_| left_by_a_reading()).collect();
    assert!(left.contains(&kept), "{left:?}");
    let all: BTreeSet<u64> = left.into_iter().reduce(|one, other| &one & &other).unwrap();
    assert_eq!(all, kept, "what the machines use stays each time");
}

fn left_by_a_reading() -> BTreeSet<u64> {
    let folder = folder();
    let (path, other) = cold(folder.path());
    // What the machines use: a stretch that begins and ends within pieces of 64 KiB, and one page at the start of a piece.
    for page in (20..70).chain([160]) {
        other.read_exact_at(&mut [0; PAGE as usize], page * PAGE).unwrap();
    }
    let device = FileDevice::open(&path).unwrap().sparing_cache();
    let mut read = vec![0; SIZE as usize];
    for (number, part) in read.chunks_mut(1 << 20).enumerate() {
        device.read_at((number as u64) << 20, part).unwrap();
    }
    assert_eq!(read, content());
    in_memory(&other)
}

#[test]
fn tables_of_an_image_stay_in_memory() {
    let folder = folder();
    let (path, other) = cold(folder.path());
    let device = FileDevice::open(&path).unwrap().sparing_cache();
    device.read_at(8192, &mut [0; 8192]).unwrap();
    assert_eq!(in_memory(&other), BTreeSet::from([2, 3]));
}

#[test]
fn without_sparing_it_the_disk_fills_the_cache() {
    let folder = folder();
    let (path, other) = cold(folder.path());
    let device = FileDevice::open(&path).unwrap();
    device.read_at(0, &mut vec![0; SIZE as usize]).unwrap();
    assert_eq!(in_memory(&other).len() as u64, SIZE / PAGE, "or the other tests prove nothing");
}

#[test]
fn a_file_that_was_cut_is_told_and_not_read_as_zeros() {
    let folder = folder();
    let (path, _other) = cold(folder.path());
    let device = FileDevice::open(&path).unwrap().sparing_cache();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(SIZE / 2).unwrap();
    let mut read = vec![0; 1 << 20];
    device.read_at(0, &mut read).unwrap();
    assert_eq!(read, content()[..1 << 20]);
    let error = device.read_at(SIZE / 2 - 65_536, &mut read).unwrap_err();
    assert!(matches!(error, DeviceError::Changed { .. }), "{error}");
}
