//! Machines of image files, whose content follows from a seed, and what a tracker would know of their changes.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use environment::{Randomness, SeededRandomness};

const SECTOR: u64 = 512;

/// A disk of a machine.
pub struct Disk {
    /// Its image.
    pub path: PathBuf,
    bytes: Vec<u8>,
    /// What was written since the last acknowledged point.
    pub dirty: Vec<(u64, u64)>,
    hash: Option<blake3::Hash>,
}

/// A machine.
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Whether the program knows it.
    pub is_added: bool,
    /// Whether it was asked to be removed.
    pub is_removed: bool,
}

impl Machine {
    /// A machine with its images in `folder`.
    pub fn new(folder: &Path, number: u64, random: &SeededRandomness) -> Machine {
        let name = format!("vm{number}");
        let count = if random.below(3) == 0 { 2 } else { 1 };
        let disks = (0..count)
            .map(|index| {
                let path = folder.join(format!("{name}-{index}.raw"));
                let size = [16u64, 16, 24, 32, 64][random.below(5) as usize] << 20;
                // Not always a whole number of blocks.
                let size = size + random.below(2) * 5 * SECTOR;
                fs::File::create_new(&path).unwrap().set_len(size).unwrap();
                Disk { path, bytes: vec![0; size as usize], dirty: Vec::new(), hash: None }
            })
            .collect();
        let mut machine = Machine { name, disks, is_added: false, is_removed: false };
        for _ in 0..4 {
            machine.change(random);
        }
        machine
    }

    /// Changes the disks as a running machine would.
    pub fn change(&mut self, random: &SeededRandomness) {
        for disk in &mut self.disks {
            let file = OpenOptions::new().write(true).open(&disk.path).unwrap();
            for _ in 0..=random.below(6) {
                let size = disk.bytes.len() as u64;
                let at = random.below(size / SECTOR) * SECTOR;
                let length = (1 + random.below(2048)) * SECTOR;
                let end = (at + length).min(size);
                let part = &mut disk.bytes[at as usize..end as usize];
                match random.below(8) {
                    0 => part.fill(0),
                    // What other machines have too, for the pool to find.
                    1 => SeededRandomness::new(random.below(3)).fill(part).unwrap(),
                    _ => random.fill(part).unwrap(),
                }
                file.write_all_at(part, at).unwrap();
                disk.dirty.push((at, end - at));
            }
            disk.hash = None;
        }
    }

    /// The hash of each disk as it is now.
    pub fn hashes(&mut self) -> Vec<blake3::Hash> {
        let hash = |disk: &mut Disk| *disk.hash.get_or_insert_with(|| blake3::hash(&disk.bytes));
        self.disks.iter_mut().map(hash).collect()
    }

    /// A point of it was acknowledged: a tracker begins anew.
    pub fn was_saved(&mut self) {
        self.disks.iter_mut().for_each(|disk| disk.dirty.clear());
    }

    /// A change list of each disk, written for the command line.
    pub fn lists(&self, folder: &Path) -> Vec<String> {
        let list = |(index, disk): (usize, &Disk)| {
            let path = folder.join(format!("list-{index}.json"));
            fs::write(&path, serde_json::to_string(&disk.dirty).unwrap()).unwrap();
            ["--changed-extents".to_owned(), format!("{index}={}", path.display())]
        };
        self.disks.iter().enumerate().flat_map(list).collect()
    }
}

/// The hash of the disk in an image.
pub fn hash_of(path: &Path) -> blake3::Hash {
    use block_io::BlockDevice;
    let format = match path.extension().and_then(|extension| extension.to_str()) {
        Some("qcow2") => disk_image::ImageFormat::Qcow2,
        Some("vhdx") => disk_image::ImageFormat::Vhdx,
        _ => disk_image::ImageFormat::Raw,
    };
    let file = block_io::FileDevice::open(path).unwrap();
    let disk = disk_image::probe::open_reader(format, std::sync::Arc::new(file), &disk_image::NoParents);
    let disk: Box<dyn BlockDevice> = disk.unwrap();
    let (mut hasher, mut at, mut buf) = (blake3::Hasher::new(), 0, vec![0; 1 << 20]);
    while at < disk.size() {
        let part = &mut buf[..(disk.size() - at).min(1 << 20) as usize];
        disk.read_at(at, part).unwrap();
        hasher.update(part);
        at += part.len() as u64;
    }
    hasher.finalize()
}
