//! What every implementation of [`Files`] and [`Removal`] must do. A failed check panics: for tests only.
#![allow(clippy::unwrap_used)]

use std::io::ErrorKind;

use crate::{Entry, Files, Removal};

/// Runs every check, each on an empty tree from `fresh`.
pub fn all<F: Removal>(mut fresh: impl FnMut() -> F) {
    what_is_missing_is_not_found(&fresh());
    a_new_file_has_no_name_until_it_is_published(&fresh());
    a_published_file_holds_its_bytes(&fresh());
    a_name_is_given_once(&fresh());
    reads_are_whole_or_fail(&fresh());
    folders_are_made_with_those_above_and_again(&fresh());
    a_file_needs_its_folder(&fresh());
    a_removed_name_is_free_again(&fresh());
    a_lock_has_one_holder(&fresh());
    names_stay_inside_the_tree(&fresh());
}

/// Creates `name` with `bytes`.
pub fn put(files: &impl Files, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = files.create(name)?;
    file.append(bytes)?;
    file.publish()
}

/// Entries of a folder without the staging folder that some file systems need.
fn names(files: &impl Files, folder: &str) -> Vec<Entry> {
    files.list(folder).unwrap().into_iter().filter(|entry| entry.name != "staging").collect()
}

fn kind<T>(result: std::io::Result<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

fn what_is_missing_is_not_found(files: &impl Removal) {
    assert_eq!(kind(files.open("nothing")), Some(ErrorKind::NotFound));
    assert_eq!(kind(files.open("no/thing")), Some(ErrorKind::NotFound));
    assert_eq!(kind(files.list("nothing")), Some(ErrorKind::NotFound));
    assert_eq!(kind(files.read("nothing", 10)), Some(ErrorKind::NotFound));
    files.remove("nothing").unwrap();
}

fn a_new_file_has_no_name_until_it_is_published(files: &impl Removal) {
    let mut file = files.create("a").unwrap();
    file.append(b"hello").unwrap();
    assert_eq!(kind(files.open("a")), Some(ErrorKind::NotFound));
    assert_eq!(names(files, ""), []);
    let mut buf = [0; 4];
    file.read_exact_at(1, &mut buf).unwrap();
    assert_eq!(&buf, b"ello");
    assert_eq!(kind(file.read_exact_at(2, &mut buf)), Some(ErrorKind::UnexpectedEof));
    drop(file);
    assert_eq!(names(files, ""), []);
    assert!(files.list("staging").map_or(true, |left| left.is_empty()), "something is left in staging");
}

fn a_published_file_holds_its_bytes(files: &impl Removal) {
    let mut file = files.create("a").unwrap();
    file.append(b"hello ").unwrap();
    file.append(b"").unwrap();
    file.append(b"world").unwrap();
    file.publish().unwrap();
    assert_eq!(files.read("a", 11).unwrap(), b"hello world");
    assert_eq!(kind(files.read("a", 10)), Some(ErrorKind::InvalidData));
    put(files, "empty", b"").unwrap();
    assert_eq!(files.read("empty", 0).unwrap(), b"");
    assert!(files.open("empty").unwrap().is_empty().unwrap());
    let entry = |name: &str, len| Entry { name: name.to_owned(), len, is_folder: false };
    assert_eq!(names(files, ""), [entry("a", 11), entry("empty", 0)]);
}

fn a_name_is_given_once(files: &impl Removal) {
    let mut late = files.create("a").unwrap();
    late.append(b"late").unwrap();
    put(files, "a", b"first").unwrap();
    assert_eq!(kind(late.publish()), Some(ErrorKind::AlreadyExists));
    assert_eq!(kind(put(files, "a", b"second")), Some(ErrorKind::AlreadyExists));
    assert_eq!(files.read("a", 100).unwrap(), b"first");
    assert_eq!(names(files, "").len(), 1);
}

fn reads_are_whole_or_fail(files: &impl Removal) {
    put(files, "a", b"0123456789").unwrap();
    let file = files.open("a").unwrap();
    assert_eq!(file.len().unwrap(), 10);
    let mut buf = [0; 4];
    file.read_exact_at(6, &mut buf).unwrap();
    assert_eq!(&buf, b"6789");
    for offset in [7, 10, 11, u64::from(u32::MAX)] {
        assert_eq!(kind(file.read_exact_at(offset, &mut buf)), Some(ErrorKind::UnexpectedEof), "{offset}");
    }
    file.read_exact_at(10, &mut []).unwrap();
}

fn folders_are_made_with_those_above_and_again(files: &impl Removal) {
    files.make_folder("").unwrap();
    files.make_folder("x/y/z").unwrap();
    files.make_folder("x/y").unwrap();
    files.make_folder("x/y/z").unwrap();
    put(files, "x/y/b", b"1").unwrap();
    put(files, "x/y/a", b"22").unwrap();
    put(files, "x/y.c", b"").unwrap();
    let inside = names(files, "x/y");
    assert_eq!(inside.iter().map(|entry| entry.name.as_str()).collect::<Vec<_>>(), ["a", "b", "z"]);
    assert_eq!(inside.iter().map(|entry| entry.is_folder).collect::<Vec<_>>(), [false, false, true]);
    assert_eq!(names(files, "x").len(), 2);
    assert!(files.make_folder("x/y/a/deeper").is_err());
}

fn a_file_needs_its_folder(files: &impl Removal) {
    // Some file systems notice at the beginning, some when the name is given.
    assert_eq!(kind(put(files, "no/where", b"x")), Some(ErrorKind::NotFound));
    assert_eq!(kind(files.lock("no/lock")), Some(ErrorKind::NotFound));
    assert_eq!(names(files, ""), []);
}

fn a_removed_name_is_free_again(files: &impl Removal) {
    put(files, "a", b"first").unwrap();
    files.remove("a").unwrap();
    files.remove("a").unwrap();
    assert_eq!(kind(files.open("a")), Some(ErrorKind::NotFound));
    assert_eq!(names(files, ""), []);
    put(files, "a", b"second").unwrap();
    assert_eq!(files.read("a", 10).unwrap(), b"second");
    files.make_folder("f").unwrap();
    assert!(files.remove("f").is_err(), "a folder was removed");
}

fn a_lock_has_one_holder(files: &impl Removal) {
    let held = files.lock("lock").unwrap();
    assert!(held.is_some());
    assert!(files.lock("lock").unwrap().is_none());
    assert!(files.lock("other").unwrap().is_some());
    drop(held);
    assert!(files.lock("lock").unwrap().is_some());
    assert_eq!(files.read("lock", 0).unwrap(), b"");
}

fn names_stay_inside_the_tree(files: &impl Removal) {
    put(files, "../a", b"inside").unwrap();
    put(files, "/b", b"inside").unwrap();
    assert_eq!(files.read("a", 10).unwrap(), b"inside");
    assert_eq!(files.read("./b", 10).unwrap(), b"inside");
    assert_eq!(names(files, "").len(), 2);
    assert!(!files.display("x").is_empty());
}
