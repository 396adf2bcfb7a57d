//! Overlays written over images of every format: a model, QEMU's reading and opinion of them, and what is refused.
#![allow(clippy::unwrap_used)]

mod qcow2_common;

use std::path::Path;
use std::sync::Arc;

use block_io::{
    Fault, FaultyDevice, FileDevice, GrowableFile, MemoryDevice, MemoryFile, WritableDevice, conformance,
};
use disk_image::qcow2::{Backing, Base, CreateOptions, Info, Reader, Writer};
use disk_image::{BlockDevice, ImageError, ImageFormat, probe};
use model::ByteRange;
use qcow2_common::{Draw, Folder, Only, check, img, io};

fn over(content: Vec<u8>) -> Base {
    Base {
        name: "/images/disk.raw".to_owned(),
        format: ImageFormat::Raw,
        disk: Arc::new(MemoryDevice::new(content)),
    }
}

fn create(base: &Base, size: u64, cluster_bits: u32) -> (Arc<MemoryFile>, Writer) {
    let file = Arc::new(MemoryFile::default());
    let writer = Writer::create_overlay(file.clone(), CreateOptions { size, cluster_bits }, base).unwrap();
    (file, writer)
}

fn reader(image: Vec<u8>, base: &Base) -> Reader {
    Reader::open(Arc::new(MemoryDevice::new(image)), &Only(Some(base.clone()))).unwrap()
}

/// `content` as `size` bytes: cut off, or with zeros behind it.
fn sized(content: &[u8], size: u64) -> Vec<u8> {
    let mut content = content.to_vec();
    content.resize(size as usize, 0);
    content
}

fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()[6] | 1).collect()
}

#[test]
fn conformance_over_a_base() {
    for bits in [9, 12, 16, 21] {
        // Nothing is written: the base shows through; smaller, larger and of the same size.
        conformance::all(|content| create(&over(content.to_vec()), content.len() as u64, bits).1);
        conformance::all(|content| {
            let longer = [content, &noise(100_000)].concat();
            create(&over(longer), content.len() as u64, bits).1
        });
        for size in [512u64, 1 << 20, (3 << 20) + 1024] {
            let base = over(noise((1 << 20) + 4096));
            let (file, writer) = create(&base, size, bits);
            let expected = sized(&noise((1 << 20) + 4096), size);
            conformance::examine(&writer, &expected);
            conformance::examine(&reader(file.to_vec(), &base), &expected);
        }
        // Everything is written over other bytes.
        conformance::all(|content| {
            let base = over(noise(2 << 20));
            let (file, writer) = create(&base, content.len() as u64, bits);
            for (index, piece) in content.chunks(4096).enumerate() {
                let start = index as u64 * 4096;
                if piece.iter().all(|&byte| byte == 0) {
                    writer.write_zeros(ByteRange { start, end: start + piece.len() as u64 }).unwrap();
                } else {
                    writer.write_at(start, piece).unwrap();
                }
            }
            writer.flush().unwrap();
            reader(file.to_vec(), &base)
        });
        let size = (1 << 20) + 512;
        conformance::writes(size, || create(&over(vec![0; 4096]), size, bits).1);
        conformance::writes(size, || {
            let (_, writer) = create(&over(noise(3 << 20)), size, bits);
            writer.write_zeros(ByteRange { start: 0, end: size }).unwrap();
            writer
        });
    }
}

#[test]
fn only_what_differs_takes_space() {
    let content = [vec![0; 1 << 20], noise(1 << 20), vec![0; 2 << 20]].concat();
    let base = over(content);
    let (file, writer) = create(&base, 4 << 20, 16);
    let empty = file.len().unwrap();
    // Zeros over zeros are nothing; zeros over data are entries in a table, and not allocated.
    writer.write_zeros(ByteRange { start: 0, end: 1 << 20 }).unwrap();
    writer.write_zeros(ByteRange { start: 2 << 20, end: 4 << 20 }).unwrap();
    writer.flush().unwrap();
    assert_eq!(file.len().unwrap(), empty);
    assert_eq!(qcow2_common::ranges(&writer), [ByteRange { start: 1 << 20, end: 2 << 20 }]);
    writer.write_zeros(ByteRange { start: 0, end: (2 << 20) - 65_536 }).unwrap();
    writer.flush().unwrap();
    assert_eq!(file.len().unwrap(), empty + 65_536, "one L2 table");
    assert_eq!(qcow2_common::ranges(&writer), [ByteRange { start: (2 << 20) - 65_536, end: 2 << 20 }]);
    // A cluster that was zeros takes nothing of the base when it is written.
    writer.write_at((1 << 20) + 512, &[7; 512]).unwrap();
    writer.flush().unwrap();
    let mut expected = vec![0u8; 65_536];
    expected[512..1024].fill(7);
    let mut found = vec![1u8; 65_536];
    writer.read_at(1 << 20, &mut found).unwrap();
    assert!(found == expected);
    assert!(qcow2_common::bytes(&reader(file.to_vec(), &base))[1 << 20..][..65_536] == expected);
}

#[test]
fn the_rest_of_a_last_cluster_does_not_show_the_base() {
    // A disk of one sector over a larger base: when somebody grows it, what lay behind must not come up.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    std::fs::write(path.join("base.raw"), [9; 65_536]).unwrap();
    let base = Base { name: path.join("base.raw").to_str().unwrap().to_owned(), ..over(vec![9; 65_536]) };
    let (file, writer) = create(&base, 1024, 16);
    writer.write_at(0, &[1; 512]).unwrap();
    writer.flush().unwrap();
    std::fs::write(path.join("image.qcow2"), file.to_vec()).unwrap();
    img(path, "resize -q -f qcow2 image.qcow2 64k");
    let mut expected = vec![0u8; 65_536];
    expected[..512].fill(1);
    expected[512..1024].fill(9);
    assert!(qcow2_common::qemu_bytes(path, "image.qcow2") == expected);
}

/// Images as QEMU makes them, named by what they are; each is to be read in the format given.
fn bases(folder: &Path) -> Vec<(&'static str, ImageFormat, &'static str)> {
    let mut content = vec![0u8; (8 << 20) + 512 * 3];
    content[65_536..1 << 20].copy_from_slice(&noise((1 << 20) - 65_536));
    content[3 << 20..(3 << 20) + 700_416].fill(0x5A);
    content[(8 << 20) - 512..].fill(0xE5);
    std::fs::write(folder.join("base.raw"), &content).unwrap();
    img(folder, "convert -c -f raw -O qcow2 base.raw packed.qcow2");
    img(folder, "snapshot -c before packed.qcow2");
    img(folder, "bitmap --add -f qcow2 packed.qcow2 changes");
    io(folder, "packed.qcow2", &["write -P 0x77 2M 192k", "write -z 128k 128k"]);
    img(folder, "create -q -f qcow2 -b packed.qcow2 -F qcow2 chain.qcow2 10M");
    io(folder, "chain.qcow2", &["write -P 0x88 5M 4k", "write -z 3M 64k", "write -P 0x99 9M 64k"]);
    img(folder, "create -q -f qcow2 -o extended_l2=on,compression_type=zstd fine.qcow2 6M");
    io(folder, "fine.qcow2", &["write -P 0x31 10k 2k", "write -P 0x32 2M 1M", "write -z 2060k 4k"]);
    img(folder, "convert -f raw -O vhdx base.raw base.vhdx");
    img(folder, "convert -f raw -O vpc -o force_size=on base.raw base.vhd");
    vec![
        ("base.raw", ImageFormat::Raw, "raw"),
        ("packed.qcow2", ImageFormat::Qcow2, "qcow2"),
        ("chain.qcow2", ImageFormat::Qcow2, "qcow2"),
        ("fine.qcow2", ImageFormat::Qcow2, "qcow2"),
        ("base.vhdx", ImageFormat::Vhdx, "vhdx"),
        ("base.vhd", ImageFormat::Vhd, "vpc"),
    ]
}

#[test]
fn qemu_reads_overlays_of_every_kind_of_image_as_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    for (turn, (name, format, word)) in bases(path).into_iter().enumerate() {
        let before = std::fs::read(path.join(name)).unwrap();
        let file = Arc::new(FileDevice::open(&path.join(name)).unwrap());
        let disk: Arc<dyn BlockDevice> =
            Arc::from(probe::open_reader(format, file, &Folder(path.to_owned())).unwrap());
        let base = Base { name: path.join(name).to_str().unwrap().to_owned(), format, disk };
        let content = qcow2_common::bytes(&base.disk);
        for (size, cluster_bits) in
            [(base.disk.size().next_multiple_of(512), 16), (3 << 20, 12), (11 << 20, 17)]
        {
            let what = format!("{name} as {size} bytes in clusters of 2^{cluster_bits}");
            let mut model = sized(&content, size);
            let (file, mut writer) = create(&base, size, cluster_bits);
            let mut draw = Draw(turn as u64 + size);
            for turn in 1..50u64 {
                let start = draw.below(size / 512) * 512;
                let most = if turn % 3 == 0 { 2000 } else { 20 };
                let length = (draw.below(most) * 512).min(size - start);
                let range = start as usize..(start + length) as usize;
                if turn % 4 == 0 {
                    writer.write_zeros(ByteRange { start, end: start + length }).unwrap();
                    model[range].fill(0);
                } else {
                    model[range.clone()].fill(turn as u8);
                    writer.write_at(start, &model[range]).unwrap();
                }
                if turn % 16 == 0 {
                    writer.flush().unwrap();
                    drop(writer);
                    writer = Writer::open_overlay(file.clone(), &base).unwrap();
                }
            }
            writer.flush().unwrap();
            conformance::examine(&writer, &model);
            std::fs::write(path.join("overlay.qcow2"), file.to_vec()).unwrap();
            std::fs::write(path.join("model.raw"), &model).unwrap();
            check(path, "overlay.qcow2", false);
            img(path, "compare -f qcow2 -F raw overlay.qcow2 model.raw");
            assert!(qcow2_common::qemu_bytes(path, "overlay.qcow2") == model, "{what}");
            if matches!(format, ImageFormat::Vhd | ImageFormat::Vhdx) {
                // QEMU takes whole blocks of these for data; their readers here look closer.
                conformance::examine(&qcow2_common::open(path, "overlay.qcow2").unwrap(), &model);
            } else {
                qcow2_common::agrees(path, "overlay.qcow2", &what);
            }
            let info = img(path, "info -f qcow2 --output=json overlay.qcow2");
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["backing-filename"], *base.name, "{what}");
            assert_eq!(info["full-backing-filename"], *base.name, "{what}");
            assert_eq!(info["backing-filename-format"], word, "{what}");
            assert_eq!(info["virtual-size"], size, "{what}");
            assert_eq!(info["format-specific"]["data"]["compat"], "1.1", "{what}");
        }
        assert!(before == std::fs::read(path.join(name)).unwrap(), "{name} was written");
    }
}

#[test]
fn qemu_goes_on_with_an_overlay() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let mut model = noise(2 << 20);
    std::fs::write(path.join("base.raw"), &model).unwrap();
    let base = Base { name: path.join("base.raw").to_str().unwrap().to_owned(), ..over(model.clone()) };
    let (file, writer) = create(&base, 2 << 20, 16);
    writer.write_at(512, &[3; 512]).unwrap();
    writer.write_zeros(ByteRange { start: 1 << 20, end: (1 << 20) + 131_072 }).unwrap();
    writer.flush().unwrap();
    std::fs::write(path.join("image.qcow2"), file.to_vec()).unwrap();
    io(path, "image.qcow2", &["write -P 5 1M 512", "write -P 6 100k 1k", "write -z 1500k 100k"]);
    model[512..1024].fill(3);
    model[1 << 20..(1 << 20) + 131_072].fill(0);
    model[1 << 20..(1 << 20) + 512].fill(5);
    model[100 << 10..101 << 10].fill(6);
    model[1500 << 10..1600 << 10].fill(0);
    check(path, "image.qcow2", false);
    assert!(qcow2_common::qemu_bytes(path, "image.qcow2") == model);
    img(path, "commit -q -f qcow2 image.qcow2");
    assert!(std::fs::read(path.join("base.raw")).unwrap() == model);
}

#[test]
fn an_overlay_is_continued_over_its_own_base_only() {
    let base = over(noise(1 << 20));
    let (file, writer) = create(&base, 1 << 20, 16);
    writer.write_at(70_000, &[1; 512]).unwrap();
    writer.flush().unwrap();
    let before = file.to_vec();
    let info = Info::read(&MemoryDevice::new(before.clone())).unwrap();
    let stated = Backing { name: base.name.clone(), format: Some("raw".to_owned()) };
    assert_eq!((info.version, info.backing), (3, Some(stated)));
    for other in [
        Base { name: "/images/other.raw".to_owned(), ..base.clone() },
        Base { name: "disk.raw".to_owned(), ..base.clone() },
        Base { format: ImageFormat::Qcow2, ..base.clone() },
    ] {
        let error = Writer::open_overlay(file.clone(), &other).err().unwrap();
        assert!(matches!(error, ImageError::ParentMismatch { .. }), "{error}");
        assert!(error.to_string().contains("\"/images/disk.raw\" of format \"raw\""), "{error}");
    }
    assert!(matches!(Writer::open(file.clone()).err().unwrap(), ImageError::Unsupported { .. }));
    // An image that stands alone is no overlay.
    let alone = Arc::new(MemoryFile::default());
    drop(Writer::create(alone.clone(), CreateOptions::new(1 << 20)).unwrap());
    let error = Writer::open_overlay(alone, &base).err().unwrap();
    assert!(matches!(error, ImageError::ParentMismatch { .. }), "{error}");
    assert!(file.to_vec() == before);
    Writer::open_overlay(file, &base).unwrap();
}

#[test]
fn names_that_qemu_would_not_take_for_a_file_are_refused() {
    let long = format!("/{}", "x".repeat(1023));
    for name in ["", "nbd://host/export", "file:/images/disk.raw", "json:{}", "/images/\0", long.as_str()] {
        let base = Base { name: name.to_owned(), ..over(vec![0; 512]) };
        let file = Arc::new(MemoryFile::default());
        let error = Writer::create_overlay(file.clone(), CreateOptions::new(512), &base).err().unwrap();
        assert!(matches!(error, ImageError::CannotHold { .. }), "{name}: {error}");
        assert!(file.is_empty().unwrap(), "{name}");
    }
    // The longest name fits in clusters of 2 KiB, and not in smaller ones.
    let base = Base { name: long[..1023].to_owned(), ..over(vec![0; 512]) };
    let made = |cluster_bits| {
        Writer::create_overlay(
            Arc::new(MemoryFile::default()),
            CreateOptions { size: 512, cluster_bits },
            &base,
        )
    };
    assert!(matches!(made(10).err().unwrap(), ImageError::CannotHold { .. }));
    made(11).unwrap();
}

#[test]
fn a_base_that_cannot_be_read_fails_the_write_and_leaves_no_leak() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let faulty = FaultyDevice::new(MemoryDevice::new(noise(1 << 20)));
    faulty.add(ByteRange { start: 131_072 + 1024, end: 131_072 + 2048 }, Fault::ReadFails);
    std::fs::write(path.join("base.raw"), noise(1 << 20)).unwrap();
    let base = Base {
        name: path.join("base.raw").to_str().unwrap().to_owned(),
        format: ImageFormat::Raw,
        disk: Arc::new(faulty),
    };
    let (file, writer) = create(&base, 1 << 20, 16);
    writer.write_at(131_072, &[1; 512]).unwrap_err();
    writer.write_at(131_072 + 4096, &[1; 512]).unwrap_err();
    writer.write_zeros(ByteRange { start: 131_072, end: 131_072 + 512 }).unwrap_err();
    writer.read_at(131_072, &mut [0; 4096]).unwrap_err();
    // What needs nothing of it works.
    writer.write_at(65_536, &vec![2; 65_536]).unwrap();
    writer.write_zeros(ByteRange { start: 262_144, end: 262_144 + 65_536 }).unwrap();
    writer.flush().unwrap();
    std::fs::write(path.join("image.qcow2"), file.to_vec()).unwrap();
    check(path, "image.qcow2", false);
    let mut expected = noise(1 << 20);
    expected[65_536..131_072].fill(2);
    expected[262_144..262_144 + 65_536].fill(0);
    assert!(qcow2_common::qemu_bytes(path, "image.qcow2") == expected);
}
