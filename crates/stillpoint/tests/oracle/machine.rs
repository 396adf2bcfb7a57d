//! A pool that the built program made, and damaged copies of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::program::{Numbers, Pool, files, tool};
use crate::python::{restore_all, verify};

const BLOCK: usize = 64 * 1024;
/// Two levels of the map, and a tail that fills no block.
const DISK: usize = (9 << 20) + 3 * 4096;

struct Made {
    folder: tempfile::TempDir,
    pool: Pool,
    /// What each point holds, deleted ones too.
    points: BTreeMap<String, Vec<u8>>,
    /// A point whose chunks were reclaimed.
    gone: String,
}

impl Made {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Two machines (raw and VHDX) that share blocks, increments by scan and by list, a deleted point, and one whose packs
/// were reclaimed after what others needed of them was rewritten.
fn make() -> Made {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let pool = Pool::at(folder.path(), "data");
    let mut numbers = Numbers(77);
    let mut points = BTreeMap::new();
    let mut put = |words: &[&str], disk: &[u8]| {
        let point = pool.done(words).text("recovery_point").to_owned();
        points.insert(point.clone(), disk.to_vec());
        point
    };

    let mut disk = vec![0; DISK];
    numbers.fill(&mut disk[..DISK / 16]);
    for (line, part) in disk[DISK / 16..DISK / 8].chunks_mut(64).enumerate() {
        let words = format!("{line:063}\n");
        part.copy_from_slice(&words.as_bytes()[..part.len()]);
    }
    numbers.fill(&mut disk[DISK - 4096..]);
    let image = path("one.raw");
    std::fs::write(&image, &disk).unwrap();
    let settings =
        ["--floor-points", "0", "--floor-age", "0s", "--soft-delete", "0s", "--reclaim-hold", "0s"];
    pool.done(&[&["datasource", "add-image", "one", image.to_str().unwrap()][..], &settings].concat());
    let gone = put(&["protect", "one"], &disk);

    // The second point shares most with the first; the first goes, and its packs with it.
    numbers.fill(&mut disk[..DISK / 32]);
    std::fs::write(&image, &disk).unwrap();
    put(&["synchronize", "one", "--full-scan"], &disk);
    pool.done(&["recovery-point", "delete", &gone, "--yes"]);
    for _ in 0..3 {
        pool.done(&["pool", "reclaim", "--breaker", "100", "--yes"]);
    }

    let other = path("two.vhdx");
    tool(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "vhdx", image.to_str().unwrap(), other.to_str().unwrap()],
    );
    pool.done(&["datasource", "add-image", "two", other.to_str().unwrap()]);
    put(&["protect", "two"], &disk);

    for round in 0..4usize {
        let start = (round * 31 + 5) * BLOCK;
        if round == 2 {
            disk[start..start + 9 * BLOCK].fill(0);
        } else {
            numbers.fill(&mut disk[start..start + 2 * BLOCK + 5000]);
        }
        std::fs::write(&image, &disk).unwrap();
        std::fs::write(path("list.json"), format!("[[{start},{}]]", 9 * BLOCK)).unwrap();
        let list = format!("0={}", path("list.json").display());
        let point = put(&["synchronize", "one", "--changed-extents", &list], &disk);
        if round == 1 {
            pool.done(&["recovery-point", "delete", &point, "--yes"]);
        }
    }
    Made { folder, pool, points, gone }
}

/// Whether the reader gave back exactly what was stored; returns the points that it did not give.
fn missing(made: &Made, restored: &BTreeMap<(String, u32), PathBuf>, case: &str) -> Vec<String> {
    for ((point, index), file) in restored {
        assert_eq!(*index, 0, "{case}");
        let found = std::fs::read(file).unwrap();
        assert!(found == made.points[point], "{case}: point {point} has other bytes");
    }
    let given = |point: &&String| !restored.contains_key(&((*point).clone(), 0));
    made.points.keys().filter(given).cloned().collect()
}

/// A place for one restore, emptied.
fn out(made: &Made) -> PathBuf {
    let out = made.path("out");
    let _ = std::fs::remove_dir_all(&out);
    out
}

pub fn a_pool_of_the_program_is_restored() {
    let made = make();
    let (folder, kit) = (made.pool.data.join("pool"), &made.pool.kit);
    let (read, restored) = restore_all(&folder, kit, &out(&made));
    assert_eq!((read.status, read.told.as_str()), (0, ""), "{read:#?}");
    assert_eq!(missing(&made, &restored, "as made"), std::slice::from_ref(&made.gone), "{read:#?}");
    let read = verify(&folder, kit);
    assert_eq!(read.status, 0, "{read:#?}");

    // Without anything that is derived, nothing is missing.
    std::fs::remove_dir_all(folder.join("index")).unwrap();
    let (read, restored) = restore_all(&folder, kit, &out(&made));
    assert_eq!(read.status, 0, "{read:#?}");
    assert_eq!(missing(&made, &restored, "without index"), std::slice::from_ref(&made.gone));
}

/// A flipped bit in each file of the pool: named where it was read, and never other bytes; and what the next writer
/// mended is read by the page's rules for it (records of kind 13, chunks stored again).
pub fn damage_is_told_and_never_believed() {
    let made = make();
    let (folder, kit) = (made.pool.data.join("pool"), &made.pool.kit);
    let mut numbers = Numbers(5);
    let (mut cases, mut lost) = (0, 0);
    for (turn, path) in files(&folder).into_iter().enumerate() {
        let whole = std::fs::read(&path).unwrap();
        // Of records and packs, which are many, every sixth.
        let is_one_of_many = path.extension().is_some_and(|kind| kind == "record" || kind == "pack");
        // The ballast is room and nothing else: no reader looks at it.
        let is_ballast = path.extension().is_some_and(|kind| kind == "ballast");
        if whole.is_empty() || is_ballast || (is_one_of_many && turn % 6 != 0) {
            continue;
        }
        let at = usize::try_from(numbers.below(whole.len() as u64)).unwrap();
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << numbers.below(8);
        std::fs::write(&path, bytes).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let case = format!("{name}, byte {at}");
        let (read, restored) = restore_all(&folder, kit, &out(&made));
        let without = missing(&made, &restored, &case);
        assert!(
            without.contains(&made.gone) && (without.len() == 1 || read.status == 1),
            "{case}: {read:#?}"
        );
        let checked = verify(&folder, kit);
        // Keys of other recipients are of no use to this one.
        let is_read = !name.ends_with(".key") || name.starts_with(&recipient(kit));
        assert_eq!(checked.named().contains(name), is_read, "{case}: {checked:#?}");
        std::fs::write(&path, whole).unwrap();
        cases += 1;
        lost += usize::from(without.len() > 1);
    }
    assert!(cases > 10 && lost > 0, "{cases} cases, {lost} with lost points");

    // The last point's record and a frame of its blocks: the next runs mend both.
    let newest = |folder: &Path| files(folder).pop().unwrap();
    let record = newest(&folder.join("sequence"));
    flip(&record, 60);
    let ran = made.pool.done(&["synchronize", "one", "--full-scan"]);
    let point = ran.text("recovery_point").to_owned();
    let mut made = made;
    let disk = std::fs::read(made.path("one.raw")).unwrap();
    made.points.insert(point, disk);
    let (read, restored) = restore_all(&folder, kit_of(&made), &out(&made));
    assert_eq!(read.status, 0, "{read:#?}");
    assert_eq!(missing(&made, &restored, "a restored record"), std::slice::from_ref(&made.gone));
    let checked = verify(&folder, kit_of(&made));
    assert_eq!(checked.status, 0, "{checked:#?}");
    let name = record.file_name().unwrap().to_str().unwrap();
    assert!(
        checked.said.lines().any(|line| line.starts_with("mended") && line.contains(name)),
        "{checked:#?}"
    );

    for pack in files(&folder.join("packs")) {
        flip(&pack, 64 + 32 + 100);
    }
    made.pool.run(&["pool", "verify", "--read-data"]).expect(6);
    let ran = made.pool.run(&["synchronize", "one", "--full-scan"]);
    let point = ran.text("recovery_point").to_owned();
    let disk = std::fs::read(made.path("one.raw")).unwrap();
    made.points.insert(point.clone(), disk);
    let (read, restored) = restore_all(&folder, kit_of(&made), &out(&made));
    let without = missing(&made, &restored, "stored again");
    assert!(!without.contains(&point), "{read:#?}");
}

fn kit_of(made: &Made) -> &Path {
    &made.pool.kit
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

/// The recipient of a kit.
fn recipient(kit: &Path) -> String {
    let text = std::fs::read_to_string(kit).unwrap();
    text.lines().find_map(|line| line.strip_prefix("recipient: ")).unwrap().to_owned()
}
