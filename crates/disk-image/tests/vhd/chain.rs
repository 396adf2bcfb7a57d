//! Differencing disks.

use std::sync::Arc;

use block_io::{BlockDevice, ByteRange, MemoryDevice, MemoryFile, WritableDevice, conformance};
use disk_image::vhd::{CreateOptions, Kind, ParentLink, Reader, Writer};
use disk_image::{ImageError, NoParents};

use crate::{ID, Named, image_of, open, read_all, small};

const CHILD: [u8; 16] = [0xC1; 16];

fn link(disk: Arc<dyn BlockDevice>, id: [u8; 16], name: &str) -> ParentLink {
    ParentLink {
        disk,
        unique_id: id,
        time_stamp: 5,
        relative_name: format!(".\\{name}"),
        absolute_name: Some(format!("C:\\disks\\{name}")),
    }
}

fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|at| if at / 3000 % 3 == 0 { 0 } else { (at % 253) as u8 + 1 }).collect()
}

#[test]
fn a_chain_of_three_reads_through() {
    for block_size in [512, 4096, 65_536] {
        let base = pattern(100 << 10);
        let size = base.len() as u64;
        let base_image = Arc::new(MemoryDevice::new(image_of(&base, &CreateOptions::fixed(size, ID))));
        let mut parents = Named::default();
        parents.0.insert(".\\base.vhd".to_owned(), base_image.clone());

        let middle_file = Arc::new(MemoryFile::default());
        let base_disk = Arc::new(Reader::open(base_image, &NoParents).unwrap());
        let options = CreateOptions { unique_id: CHILD, ..small(size, block_size) };
        let middle =
            Writer::create_child(middle_file.clone(), &options, link(base_disk, ID, "base.vhd")).unwrap();
        let mut expected = base.clone();
        let write = |writer: &Writer, expected: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            writer.write_at(at as u64, bytes).unwrap();
            expected[at..at + bytes.len()].copy_from_slice(bytes);
        };
        write(&middle, &mut expected, 700, &[0xA1; 3000]);
        write(&middle, &mut expected, 50_000, &[0xA2; 1]);
        middle.write_zeros(ByteRange { start: 20_001, end: 33_333 }).unwrap();
        expected[20_001..33_333].fill(0);
        conformance::examine(&middle, &expected);
        middle.flush().unwrap();
        let middle_image = Arc::new(MemoryDevice::new(middle_file.to_vec()));
        let reader = Reader::open(middle_image.clone(), &parents).unwrap();
        conformance::examine(&reader, &expected);
        assert_eq!(reader.info().kind, Kind::Differencing);
        assert_eq!(reader.info().parent_unique_id, Some(ID));
        assert_eq!(reader.info().parent_names, [".\\base.vhd", "C:\\disks\\base.vhd", "base.vhd"]);

        parents.0.insert(".\\middle.vhd".to_owned(), middle_image);
        let top_file = Arc::new(MemoryFile::default());
        let options = CreateOptions { unique_id: [3; 16], ..small(size, 4096) };
        let middle_link = link(Arc::new(reader), CHILD, "middle.vhd");
        drop(Writer::create_child(top_file.clone(), &options, middle_link).unwrap());
        let top = Writer::open(top_file.clone(), &parents).unwrap();
        write(&top, &mut expected, 25_000, &[0xB1; 20_000]);
        top.flush().unwrap();
        conformance::examine(&top, &expected);
        let reader = Reader::open(Arc::new(MemoryDevice::new(top_file.to_vec())), &parents).unwrap();
        conformance::examine(&reader, &expected);
        assert_eq!(reader.parent().unwrap().parent().unwrap().info().kind, Kind::Fixed);
    }
}

fn child_of(base: &[u8], id: [u8; 16], size: u64) -> Vec<u8> {
    let file = Arc::new(MemoryFile::default());
    let disk = Arc::new(MemoryDevice::new(base.to_vec()));
    let options = CreateOptions { unique_id: CHILD, ..small(size, 4096) };
    Writer::create_child(file.clone(), &options, link(disk, id, "base.vhd")).unwrap();
    file.to_vec()
}

#[test]
fn a_parent_of_another_identity_is_refused() {
    let base = pattern(8192);
    let child = Arc::new(MemoryDevice::new(child_of(&base, ID, 8192)));
    let mut parents = Named::default();
    let other = CreateOptions::fixed(8192, [0xDD; 16]);
    parents.0.insert(".\\base.vhd".to_owned(), Arc::new(MemoryDevice::new(image_of(&base, &other))));
    let error = Reader::open(child, &parents).err().unwrap();
    assert!(matches!(&error, ImageError::ParentMismatch { .. }), "{error}");
    assert!(error.to_string().contains("dddddddd"), "{error}");
}

#[test]
fn a_parent_that_is_not_allowed_is_refused() {
    let error = open(child_of(&pattern(8192), ID, 8192)).err().unwrap();
    assert!(
        matches!(&error, ImageError::NotAllowed { reference, .. } if reference == ".\\base.vhd"),
        "{error}"
    );
}

#[test]
fn an_image_that_is_its_own_parent_ends() {
    let image: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(child_of(&pattern(8192), CHILD, 8192)));
    let mut parents = Named::default();
    parents.0.insert(".\\base.vhd".to_owned(), image.clone());
    let error = Reader::open(image, &parents).err().unwrap();
    assert!(matches!(&error, ImageError::NotAllowed { reason, .. } if reason.contains("loop")), "{error}");
}

#[test]
fn a_parent_of_another_size_counts_as_zeros_or_is_cut() {
    let base = pattern(8192);
    let mut parents = Named::default();
    let image = image_of(&base, &CreateOptions::fixed(8192, ID));
    parents.0.insert(".\\base.vhd".to_owned(), Arc::new(MemoryDevice::new(image)));
    for size in [4096usize, 20_480] {
        let child = Arc::new(MemoryDevice::new(child_of(&base, ID, size as u64)));
        let mut expected = base.clone();
        expected.resize(size, 0);
        conformance::examine(&Reader::open(child, &parents).unwrap(), &expected);
    }
}

#[test]
fn zeros_over_a_parent_are_kept_and_cost_nothing_where_it_has_none() {
    let mut base = vec![0u8; 1 << 20];
    base[..4096].fill(1);
    let file = Arc::new(MemoryFile::default());
    let disk = Arc::new(MemoryDevice::new(base));
    let writer = Writer::create_child(file.clone(), &small(1 << 20, 4096), link(disk, ID, "b")).unwrap();
    writer.write_zeros(ByteRange { start: 0, end: 1 << 20 }).unwrap();
    writer.flush().unwrap();
    assert_eq!(read_all(&writer), vec![0; 1 << 20]);
    assert!(file.to_vec().len() < 20_000, "one block only");
}
