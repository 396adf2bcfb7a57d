//! Images made by QEMU's tools read as they do, to the byte and to the allocated range.
#![allow(clippy::unwrap_used)]

mod qcow2_common;

use std::path::Path;

use disk_image::BlockDevice;
use disk_image::qcow2::{Compression, Info};
use qcow2_common::{Draw, agrees, img, io, open};

/// Not a multiple of any cluster.
const SIZE: u64 = (9 << 20) + 3 * 512;

/// Writes, zeros, discards, all sizes and places.
const WRITES: [&str; 10] = [
    "write -P 0x11 0 65536",
    "write -P 0x22 1048576 4096",
    "write -P 0x33 1060864 512",
    "write -P 0x44 2097152 2500096",
    "write -z 2162688 655360",
    "write -z -u 3145728 131072",
    "write -z 6291456 262144",
    "write -P 0x55 6295552 1024",
    "discard 3670016 262144",
    "write -P 0x66 9437184 1536",
];

fn made(folder: &Path, options: &str) {
    img(folder, &format!("create -q -f qcow2 -o {options} image.qcow2 {SIZE}"));
    io(folder, "image.qcow2", &WRITES);
}

fn check_variants(variants: &[&str]) {
    for options in variants {
        let folder = tempfile::tempdir().unwrap();
        made(folder.path(), options);
        agrees(folder.path(), "image.qcow2", options);
    }
}

#[test]
fn versions_and_cluster_sizes() {
    check_variants(&[
        "compat=0.10",
        "compat=0.10,cluster_size=512",
        "compat=0.10,cluster_size=2M",
        "compat=1.1",
        "compat=1.1,cluster_size=512",
        "compat=1.1,cluster_size=1k",
        "compat=1.1,cluster_size=4k",
        "compat=1.1,cluster_size=2M",
    ]);
}

#[test]
fn extended_l2_entries() {
    check_variants(&[
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on,cluster_size=128k",
        "extended_l2=on,cluster_size=2M",
    ]);
    let folder = tempfile::tempdir().unwrap();
    made(folder.path(), "extended_l2=on");
    assert!(open(folder.path(), "image.qcow2").unwrap().info().extended_l2);
}

#[test]
fn refcount_widths_and_lazy_refcounts() {
    let folder = tempfile::tempdir().unwrap();
    for bits in [1u32, 2, 4, 8, 16, 32, 64] {
        img(folder.path(), &format!("create -q -f qcow2 -o refcount_bits={bits} image.qcow2 {SIZE}"));
        io(folder.path(), "image.qcow2", &WRITES);
        agrees(folder.path(), "image.qcow2", &format!("refcount_bits={bits}"));
        assert_eq!(open(folder.path(), "image.qcow2").unwrap().info().refcount_bits, bits);
    }
    made(folder.path(), "lazy_refcounts=on");
    agrees(folder.path(), "image.qcow2", "lazy_refcounts");
    assert!(open(folder.path(), "image.qcow2").unwrap().info().lazy_refcounts);
}

#[test]
fn an_image_that_was_not_closed_is_read() {
    let folder = tempfile::tempdir().unwrap();
    img(folder.path(), &format!("create -q -f qcow2 -o lazy_refcounts=on image.qcow2 {SIZE}"));
    // `abort` ends qemu-io without closing the image.
    qcow2_common::tool(
        "qemu-io",
        folder.path(),
        &["-f", "qcow2", "-c", "write -P 7 65536 131072", "-c", "flush", "-c", "abort", "image.qcow2"],
    );
    let reader = open(folder.path(), "image.qcow2").unwrap();
    assert!(reader.info().dirty, "qemu-io should have left the dirty bit");
    let ours = qcow2_common::bytes(&reader);
    assert_eq!(ours[65_536..196_608], vec![7; 131_072]);
    // QEMU repairs the image when it opens it for writing; what it reads then is the same.
    img(folder.path(), "check -q -r all image.qcow2");
    assert!(ours == qcow2_common::qemu_bytes(folder.path(), "image.qcow2"));
}

#[test]
fn preallocation() {
    for options in [
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "preallocation=metadata,compat=0.10,cluster_size=4k",
        "preallocation=metadata,extended_l2=on",
    ] {
        let folder = tempfile::tempdir().unwrap();
        img(folder.path(), &format!("create -q -f qcow2 -o {options} image.qcow2 {SIZE}"));
        agrees(folder.path(), "image.qcow2", &format!("{options}, empty"));
        io(folder.path(), "image.qcow2", &WRITES);
        agrees(folder.path(), "image.qcow2", options);
    }
}

/// Half text that compresses, half noise that does not, and holes.
fn mixed(size: usize) -> Vec<u8> {
    let mut draw = Draw(7);
    let mut content = vec![0u8; size];
    for (index, piece) in content.chunks_mut(50_000).enumerate() {
        match index % 4 {
            0 => piece.iter_mut().for_each(|byte| *byte = draw.below(256) as u8),
            1 => piece.iter_mut().enumerate().for_each(|(at, byte)| *byte = b"still water "[at % 12]),
            2 => piece.iter_mut().for_each(|byte| *byte = b'a' + draw.below(4) as u8),
            _ => {}
        }
    }
    content
}

#[test]
fn compressed_clusters() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("disk.raw"), mixed(SIZE as usize)).unwrap();
    for options in [
        "compression_type=zlib",
        "compression_type=zstd",
        "compression_type=zlib,cluster_size=512",
        "compression_type=zstd,cluster_size=512",
        "compression_type=zlib,cluster_size=2M",
        "compression_type=zstd,cluster_size=2M",
        "compression_type=zstd,extended_l2=on",
        "compat=0.10",
    ] {
        img(folder.path(), &format!("convert -c -f raw -O qcow2 -o {options} disk.raw image.qcow2"));
        agrees(folder.path(), "image.qcow2", options);
        let compression = open(folder.path(), "image.qcow2").unwrap().info().compression;
        assert_eq!(compression == Compression::Zstd, options.contains("zstd"), "{options}");
        io(folder.path(), "image.qcow2", &WRITES);
        agrees(folder.path(), "image.qcow2", &format!("{options}, written over"));
    }
}

#[test]
fn internal_snapshots_show_the_active_state() {
    for options in ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=512"] {
        let folder = tempfile::tempdir().unwrap();
        made(folder.path(), options);
        img(folder.path(), "snapshot -c first image.qcow2");
        io(folder.path(), "image.qcow2", &["write -P 0x77 0 5000192", "write -z 1048576 65536"]);
        img(folder.path(), "snapshot -c second image.qcow2");
        io(folder.path(), "image.qcow2", &["write -P 0x78 262144 1048576"]);
        agrees(folder.path(), "image.qcow2", options);
        assert_eq!(open(folder.path(), "image.qcow2").unwrap().info().snapshots, 2);
    }
}

#[test]
fn backing_chains() {
    // Sizes of base and middle, options of all: shorter, equal and longer than the overlay of SIZE bytes.
    for (base, middle, options) in [
        (SIZE, SIZE, "compat=1.1"),
        (3 << 20, 5 << 20, "compat=1.1"),
        ((2 << 20) + 512, SIZE, "cluster_size=512"),
        (SIZE + (4 << 20), (3 << 20) + 1536, "extended_l2=on"),
        (SIZE, 1 << 20, "compat=0.10"),
        (1 << 20, SIZE + 512, "cluster_size=2M"),
    ] {
        let what = format!("base {base}, middle {middle}, {options}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        img(path, &format!("create -q -f qcow2 -o {options} base.qcow2 {base}"));
        io(path, "base.qcow2", &["write -P 1 0 1048576", "write -P 2 917504 65536"]);
        if base > 4 << 20 {
            io(path, "base.qcow2", &["write -P 3 4194304 2097152"]);
        }
        img(path, &format!("create -q -f qcow2 -b base.qcow2 -F qcow2 -o {options} middle.qcow2 {middle}"));
        io(path, "middle.qcow2", &["write -P 4 131072 4096", "write -z 524288 131072"]);
        img(path, &format!("create -q -f qcow2 -b middle.qcow2 -F qcow2 -o {options} top.qcow2 {SIZE}"));
        io(path, "top.qcow2", &["write -P 5 262144 2048", "write -z 0 65536", "write -P 6 8388608 512"]);
        agrees(path, "top.qcow2", &what);
        agrees(path, "middle.qcow2", &what);
    }
}

#[test]
fn raw_backing_files_stated_and_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    std::fs::write(path.join("base.raw"), mixed(5 << 20)).unwrap();
    img(path, &format!("create -q -f qcow2 -b base.raw -F raw top.qcow2 {SIZE}"));
    io(path, "top.qcow2", &["write -P 9 1000448 512", "write -z 65536 131072"]);
    agrees(path, "top.qcow2", "raw backing");

    // The same without a stated format: another type makes the header extension an unknown one. No magic: it is raw.
    let mut image = std::fs::read(path.join("top.qcow2")).unwrap();
    let at = image.windows(4).position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    image[at..at + 4].copy_from_slice(b"none");
    std::fs::write(path.join("unstated.qcow2"), image).unwrap();
    let unstated = open(path, "unstated.qcow2").unwrap();
    assert_eq!(unstated.info().backing.unwrap().format, None);
    block_io::conformance::examine(&unstated, &qcow2_common::qemu_bytes(path, "top.qcow2"));

    img(path, "rebase -u -f qcow2 -F raw -b ./base.raw top.qcow2");
    let error = open(path, "top.qcow2").err().unwrap();
    assert!(matches!(error, disk_image::ImageError::NotAllowed { .. }), "{error}");
}

#[test]
fn backing_files_of_other_formats() {
    for (format, options) in [("vpc", "force_size=on"), ("vhdx", "block_size=1M")] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        std::fs::write(path.join("disk.raw"), mixed(5 << 20)).unwrap();
        img(path, &format!("convert -f raw -O {format} -o {options} disk.raw base.{format}"));
        img(path, &format!("create -q -f qcow2 -b base.{format} -F {format} top.qcow2 {SIZE}"));
        io(path, "top.qcow2", &["write -P 9 1000448 512", "write -z 65536 131072"]);
        // Not compared by `map`: QEMU does not look at the sector bitmaps of a VHD and calls whole blocks data.
        let top = open(path, "top.qcow2").unwrap();
        block_io::conformance::examine(&top, &qcow2_common::qemu_bytes(path, "top.qcow2"));
    }
}

#[test]
fn info_says_what_qemu_made() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    img(path, "create -q -f raw base.raw 1M");
    img(
        path,
        "create -q -f qcow2 -b base.raw -F raw -o compat=1.1,cluster_size=128k,compression_type=zstd,extended_l2=on image.qcow2 70G",
    );
    let file = block_io::FileDevice::open(&path.join("image.qcow2")).unwrap();
    let info = Info::read(&file).unwrap();
    assert_eq!((info.version, info.virtual_size, info.cluster_size), (3, 70 << 30, 128 << 10));
    assert_eq!((info.compression, info.extended_l2, info.snapshots), (Compression::Zstd, true, 0));
    let backing = info.backing.unwrap();
    assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("base.raw", Some("raw")));
    assert!(!info.dirty && !info.corrupt && !info.lazy_refcounts);
}

#[test]
fn a_huge_sparse_disk_is_walked_at_once() {
    let folder = tempfile::tempdir().unwrap();
    img(folder.path(), "create -q -f qcow2 -o cluster_size=64k image.qcow2 500T");
    io(folder.path(), "image.qcow2", &["write -P 1 400T 64k"]);
    let reader = open(folder.path(), "image.qcow2").unwrap();
    assert_eq!(qcow2_common::ranges(&reader), qcow2_common::qemu_ranges(folder.path(), "image.qcow2"));
    let mut byte = [0];
    reader.read_at(400 << 40, &mut byte).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn random_writes_over_random_options() {
    let mut draw = Draw(2);
    for case in 0..24 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let options = [
            "cluster_size=512",
            "cluster_size=2k",
            "cluster_size=64k",
            "cluster_size=1M",
            "extended_l2=on,cluster_size=16k",
            "extended_l2=on,cluster_size=64k,compression_type=zstd",
            "compat=0.10,cluster_size=4k",
            "refcount_bits=1,cluster_size=32k",
        ][case % 8];
        let size = (1 + draw.below(12_000)) * 512;
        let mut words = |count: u64| -> Vec<String> {
            (0..count)
                .map(|turn| {
                    let start = draw.below(size / 512) * 512;
                    let length = (draw.below(800) + 1) * 512;
                    let length = length.min(size - start);
                    match draw.below(7) {
                        0 => format!("write -z {start} {length}"),
                        1 => format!("write -z -u {start} {length}"),
                        2 => format!("discard {start} {length}"),
                        _ => format!("write -P {} {start} {length}", turn % 254 + 1),
                    }
                })
                .collect()
        };
        let (below, first, second) = (words(12), words(12), words(6));
        let apply = |image: &str, words: &[String]| {
            io(path, image, &words.iter().map(String::as_str).collect::<Vec<_>>());
        };
        let mut backing = String::new();
        if case % 3 == 0 {
            img(path, &format!("create -q -f qcow2 -o {options} base.qcow2 {size}"));
            apply("base.qcow2", &below);
            backing = "-b base.qcow2 -F qcow2".to_owned();
        }
        img(path, &format!("create -q -f qcow2 {backing} -o {options} image.qcow2 {size}"));
        apply("image.qcow2", &first);
        if case % 2 == 0 && !options.contains("refcount_bits=1") {
            img(path, "snapshot -c one image.qcow2");
            apply("image.qcow2", &second);
        }
        agrees(path, "image.qcow2", &format!("case {case}, {options}, {size} bytes {backing}"));
    }
}
