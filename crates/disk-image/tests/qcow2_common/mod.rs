//! What the qcow2 tests share: QEMU's tools, and the comparison with them. They must be there (`qemu-utils`): a test
//! that cannot compare fails.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block_io::{Allocated, FileDevice};
use disk_image::qcow2::{Base, Reader};
use disk_image::{BlockDevice, ImageError, ImageFormat, ParentReference, Parents};
use model::ByteRange;

/// Runs a tool of QEMU in `folder`; its words are split at spaces. Gives its output and whether it succeeded.
pub fn tool(program: &str, folder: &Path, words: &[&str]) -> (bool, String) {
    let done =
        Command::new(program).current_dir(folder).args(words).output().unwrap_or_else(|error| {
            panic!("{program} is needed for this test (package qemu-utils): {error}")
        });
    let mut text = String::from_utf8_lossy(&done.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&done.stderr));
    (done.status.success(), text)
}

/// Runs `qemu-img` with words split at spaces; must succeed.
pub fn img(folder: &Path, line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (good, text) = tool("qemu-img", folder, &words);
    assert!(good, "qemu-img {line}: {text}");
    text
}

/// Runs `qemu-io` commands on an image; must succeed.
pub fn io(folder: &Path, image: &str, commands: &[&str]) {
    let mut words = vec!["-f", "qcow2"];
    for command in commands {
        words.extend(["-c", command]);
    }
    words.push(image);
    let (good, text) = tool("qemu-io", folder, &words);
    assert!(good && !text.contains("failed"), "qemu-io {commands:?}: {text}");
}

/// `qemu-img check` of an image: it is clean, `leaks` allowed or not.
pub fn check(folder: &Path, image: &str, leaks: bool) {
    let (good, text) = tool("qemu-img", folder, &["check", "-f", "qcow2", image]);
    let only_leaks = text.contains("leaked clusters were found") && !text.contains("errors were found");
    assert!(good || leaks && only_leaks, "qemu-img check: {text}");
}

/// Allows the base of an overlay under its very name, and nothing else.
pub struct Only(pub Option<Base>);

impl Parents for Only {
    fn open(
        &self,
        reference: &ParentReference,
    ) -> Result<(Arc<dyn BlockDevice>, Arc<dyn Parents>), ImageError> {
        let base = self.0.as_ref().unwrap();
        assert_eq!((&reference.names, reference.format), (&vec![base.name.clone()], Some(base.format)));
        Ok((base.disk.clone(), Arc::new(Only(None))))
    }
}

/// Allows the files of one folder.
pub struct Folder(pub PathBuf);

impl Parents for Folder {
    fn open(
        &self,
        reference: &ParentReference,
    ) -> Result<(Arc<dyn BlockDevice>, Arc<dyn Parents>), ImageError> {
        let name = Path::new(&reference.names[0]);
        let name = name.strip_prefix(&self.0).unwrap_or(name);
        if name.components().count() != 1 {
            return Err(ImageError::NotAllowed {
                format: ImageFormat::Qcow2,
                reference: reference.names[0].clone(),
                reason: "only files beside the image".to_owned(),
            });
        }
        let file = FileDevice::open(&self.0.join(name)).unwrap();
        Ok((Arc::new(file), Arc::new(Folder(self.0.clone()))))
    }
}

/// Opens an image with the backing files beside it.
pub fn open(folder: &Path, image: &str) -> Result<Reader, ImageError> {
    let file = FileDevice::open(&folder.join(image)).unwrap();
    Reader::open(Arc::new(file), &Folder(folder.to_owned()))
}

/// All bytes of a device.
pub fn bytes(device: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0xAA; device.size() as usize];
    device.read_at(0, &mut all).unwrap();
    all
}

/// Allocated ranges of a device, merged.
pub fn ranges(device: &dyn BlockDevice) -> Vec<ByteRange> {
    Allocated::new(device, ByteRange { start: 0, end: device.size() }).map(Result::unwrap).collect()
}

/// Ranges that `qemu-img map` calls data, merged.
pub fn qemu_ranges(folder: &Path, image: &str) -> Vec<ByteRange> {
    let text = img(folder, &format!("map -f qcow2 --output=json {image}"));
    let number = |line: &str, key: &str| -> Option<u64> {
        let rest = line.split_once(&format!("\"{key}\": "))?.1;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let mut found: Vec<ByteRange> = Vec::new();
    let mut lines = 0;
    for line in text.lines() {
        let (Some(start), Some(length)) = (number(line, "start"), number(line, "length")) else { continue };
        lines += 1;
        if !line.contains("\"data\": true") {
            continue;
        }
        match found.last_mut() {
            Some(last) if last.end == start => last.end += length,
            _ => found.push(ByteRange { start, end: start + length }),
        }
    }
    assert!(lines > 0, "qemu-img map said nothing: {text}");
    found
}

/// Bytes as `qemu-img convert` reads them.
pub fn qemu_bytes(folder: &Path, image: &str) -> Vec<u8> {
    img(folder, &format!("convert -f qcow2 -O raw {image} converted.raw"));
    let all = std::fs::read(folder.join("converted.raw")).unwrap();
    std::fs::remove_file(folder.join("converted.raw")).unwrap();
    all
}

/// The whole comparison: bytes in one read and in odd pieces, allocated ranges, and the conformance examination.
pub fn agrees(folder: &Path, image: &str, what: &str) {
    let reader = open(folder, image).unwrap_or_else(|error| panic!("{what}: {error}"));
    let expected = qemu_bytes(folder, image);
    assert_eq!(reader.size(), expected.len() as u64, "{what}: size");
    let found = bytes(&reader);
    if let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) {
        panic!("{what}: byte {at} is {:#x}, qemu-img reads {:#x}", found[at], expected[at]);
    }
    for (turn, start) in (0..expected.len()).step_by(99_991).enumerate() {
        let end = expected.len().min(start + 7 + turn * 1_337);
        let mut part = vec![0u8; end - start];
        reader.read_at(start as u64, &mut part).unwrap();
        assert!(part == expected[start..end], "{what}: bytes {start}..{end}");
    }
    assert_eq!(ranges(&reader), qemu_ranges(folder, image), "{what}: allocated ranges");
    block_io::conformance::examine(&reader, &expected);
}

/// Numbers that look random and are the same each time.
pub struct Draw(pub u64);

impl Draw {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}
