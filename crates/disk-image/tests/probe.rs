//! Which format a file is, and the doors that open all of them.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use block_io::{MemoryDevice, MemoryFile, conformance};
use disk_image::probe::{self, NewDisk, Reason};
use disk_image::{ImageError, ImageFormat, NoParents};

const FORMATS: [ImageFormat; 4] = [ImageFormat::Raw, ImageFormat::Vhd, ImageFormat::Vhdx, ImageFormat::Qcow2];

fn new_disk(size: u64) -> NewDisk {
    NewDisk { size, logical_sector_size: 512, fixed: false, ids: [[1; 16], [2; 16], [3; 16]], created: 4 }
}

fn image(format: ImageFormat, fixed: bool) -> Vec<u8> {
    let file = Arc::new(MemoryFile::default());
    let disk = probe::create_writer(format, file.clone(), &NewDisk { fixed, ..new_disk(1 << 20) }).unwrap();
    disk.write_at(512, &[7; 512]).unwrap();
    disk.flush().unwrap();
    file.to_vec()
}

fn decide(name: &str, explicit: Option<ImageFormat>, bytes: &[u8]) -> Result<probe::Decision, ImageError> {
    probe::format_of(name, explicit, &MemoryDevice::new(bytes.to_vec()))
}

#[test]
fn name_and_magic_together_decide() {
    for (format, names) in [
        (ImageFormat::Vhd, ["disk.vhd", "C:\\vm.d\\DISK.AVHD"]),
        (ImageFormat::Vhdx, ["a/b.vhdx", "disk.raw.avhdx"]),
        (ImageFormat::Qcow2, ["disk.qcow2", "x.QCOW2"]),
    ] {
        for name in names {
            for fixed in [false, true] {
                let decision = decide(name, None, &image(format, fixed)).unwrap();
                assert_eq!((decision.format, decision.reason), (format, Reason::NameAndMagic), "{name}");
            }
        }
    }
}

/// INV-25: what a guest can write decides nothing.
#[test]
fn a_raw_disk_with_the_magic_of_a_container_stays_raw() {
    for format in [ImageFormat::Vhd, ImageFormat::Vhdx, ImageFormat::Qcow2] {
        for name in
            ["disk.raw", "disk.img", "disk", "disk.vhd.bak", "/dev/vg/disk", "qcow2", ".", "", "disk."]
        {
            let decision = decide(name, None, &image(format, false)).unwrap();
            assert_eq!(decision.format, ImageFormat::Raw, "{name}");
            assert_eq!(decision.looks_like, Some(format), "a person is to be warned: {name}");
        }
    }
    assert_eq!(decide("disk.img", None, &[0; 4096]).unwrap().looks_like, None);
}

#[test]
fn a_name_without_its_magic_is_refused_and_says_what_to_do() {
    for (name, format) in
        [("disk.vhd", ImageFormat::Vhd), ("disk.vhdx", ImageFormat::Vhdx), ("disk.qcow2", ImageFormat::Qcow2)]
    {
        for bytes in [vec![], vec![0; 3], vec![0; 4096], b"QFI\xf0vhdxfilfconectiy".to_vec()] {
            let error = decide(name, None, &bytes).unwrap_err();
            assert!(matches!(&error, ImageError::NotThisFormat { format: f, .. } if *f == format), "{error}");
            assert!(error.to_string().contains("give the format explicitly"), "{error}");
        }
        // The magic of another container is not the magic of this one.
        for other in [ImageFormat::Vhd, ImageFormat::Vhdx, ImageFormat::Qcow2] {
            assert_eq!(decide(name, None, &image(other, false)).is_ok(), other == format, "{name}");
        }
    }
}

#[test]
fn the_explicit_word_rules() {
    for format in FORMATS {
        let decision = decide("disk.qcow2", Some(format), &[0; 512]).unwrap();
        assert_eq!((decision.format, decision.reason), (format, Reason::Explicit));
    }
    // And then the reader of the format finds out whether it was true.
    for format in [ImageFormat::Vhd, ImageFormat::Vhdx, ImageFormat::Qcow2] {
        let file = Arc::new(MemoryDevice::zeroed(1 << 20));
        let error = probe::open(format, file, &NoParents).err().unwrap();
        assert!(matches!(error, ImageError::NotThisFormat { .. }), "{error}");
    }
}

#[test]
fn containers_that_are_not_read_do_not_pass_as_raw() {
    for name in ["disk.vmdk", "disk.VDI", "disk.vhds"] {
        let error = decide(name, None, &[0; 4096]).unwrap_err();
        assert!(error.to_string().contains("raw explicitly"), "{error}");
        assert!(decide(name, Some(ImageFormat::Raw), &[0; 4096]).is_ok());
    }
}

#[test]
fn one_door_for_every_format() {
    for format in FORMATS {
        for fixed in [false, true] {
            let size = 3 << 20;
            conformance::writes(size, || {
                let file = Arc::new(MemoryFile::default());
                probe::create_writer(format, file, &NewDisk { fixed, ..new_disk(size) }).unwrap()
            });
            let mut expected = vec![0; 1 << 20];
            expected[512..1024].fill(7);
            let bytes = image(format, fixed);
            let opened = probe::open(format, Arc::new(MemoryDevice::new(bytes.clone())), &NoParents).unwrap();
            conformance::examine(opened.disk.as_ref(), &expected);
            assert_eq!((opened.info.format, opened.info.size), (format, 1 << 20));
            let kind = match format {
                ImageFormat::Raw => "raw",
                ImageFormat::Qcow2 => "v3",
                _ if fixed => "fixed",
                _ => "dynamic",
            };
            assert_eq!(opened.info.kind, kind);
            let id = matches!(format, ImageFormat::Vhd | ImageFormat::Vhdx).then_some([1; 16]);
            assert_eq!(opened.info.disk_id, id);
            assert!(opened.info.parents.is_empty());

            let file = Arc::new(MemoryFile::new(bytes));
            let writer = probe::open_writer(format, file.clone(), 512).unwrap();
            writer.write_at(4096, &[8; 4096]).unwrap();
            writer.flush().unwrap();
            drop(writer);
            expected[4096..8192].fill(8);
            let disk = probe::open_reader(format, Arc::new(MemoryDevice::new(file.to_vec())), &NoParents);
            conformance::examine(disk.unwrap().as_ref(), &expected);
        }
    }
}

#[test]
fn sectors_of_4096_bytes_where_the_format_holds_them() {
    for format in FORMATS {
        let new = NewDisk { logical_sector_size: 4096, ..new_disk(1 << 20) };
        let made = probe::create_writer(format, Arc::new(MemoryFile::default()), &new);
        match format {
            ImageFormat::Vhd => assert!(matches!(made, Err(ImageError::CannotHold { .. }))),
            ImageFormat::Qcow2 => assert!(made.is_ok()),
            ImageFormat::Raw | ImageFormat::Vhdx => assert_eq!(made.unwrap().logical_sector_size(), 4096),
        }
        let new = NewDisk { logical_sector_size: 1024, ..new };
        assert!(probe::create_writer(format, Arc::new(MemoryFile::default()), &new).is_err());
    }
}
