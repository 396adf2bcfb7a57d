//! Makes the seeds: small valid images of every format by qemu-img and by our own writers, as inputs of the targets.
//!
//! Writes `corpus/TARGET/seed-NAME` below the folder given, or below this package. Fails without qemu-img.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block_io::{MemoryDevice, MemoryFile, WritableDevice};
use disk_image::vhd;

const SIZE: u64 = 3 << 20;
/// Inputs longer than this are cut by the targets' `-max_len`.
const MAX_INPUT: usize = 65_536;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let root =
        std::env::args_os().nth(1).map_or_else(|| PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default()), PathBuf::from);
    let corpus = root.join("corpus");
    let scratch = tempfile::tempdir()?;
    let raw = scratch.path().join("disk.raw");
    let mut content = vec![0u8; SIZE as usize];
    content[..700].fill(1);
    content[1 << 20..(1 << 20) + 512].fill(2);
    content[SIZE as usize - 512..].fill(3);
    std::fs::write(&raw, &content)?;
    put(&corpus, "probe", "raw", &content)?;

    let by_qemu: [(&str, &str, &str, &str); 12] = [
        ("vhd", "vpc", "fixed", "subformat=fixed,force_size=on"),
        ("vhd", "vpc", "dynamic", "subformat=dynamic,force_size=on"),
        ("vhd", "vpc", "dynamic-chs", "subformat=dynamic"),
        ("vhdx", "vhdx", "fixed", "subformat=fixed,block_size=1M,log_size=1M"),
        ("vhdx", "vhdx", "dynamic", "subformat=dynamic,block_size=1M,log_size=1M"),
        ("vhdx", "vhdx", "dynamic-32m", "subformat=dynamic,block_size=32M,log_size=1M"),
        ("qcow2", "qcow2", "v2", "compat=0.10"),
        ("qcow2", "qcow2", "v3", "compat=1.1,lazy_refcounts=on"),
        ("qcow2", "qcow2", "extended", "extended_l2=on,cluster_size=64k"),
        ("qcow2", "qcow2", "clusters-512", "cluster_size=512,refcount_bits=64"),
        ("qcow2", "qcow2", "zstd", "compression_type=zstd"),
        ("qcow2", "qcow2", "deflate", "compression_type=zlib"),
    ];
    for (target, format, name, options) in by_qemu {
        let path = scratch.path().join("image");
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-q", "-f", "raw", "-O", format, "-o", options]);
        if matches!(name, "zstd" | "deflate") {
            command.arg("-c");
        }
        succeed(command.arg(&raw).arg(&path))?;
        put(&corpus, target, &format!("qemu-{name}"), &std::fs::read(&path)?)?;
        if format == "qcow2" && name == "v3" {
            succeed(Command::new("qemu-img").args(["snapshot", "-c", "one"]).arg(&path))?;
            put(&corpus, target, "qemu-snapshot", &std::fs::read(&path)?)?;
            let child = scratch.path().join("child");
            succeed(
                Command::new("qemu-img")
                    .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
                    .arg(&path)
                    .arg(&child),
            )?;
            put(&corpus, target, "qemu-backing", &std::fs::read(&child)?)?;
            std::fs::remove_file(&child)?;
        }
        std::fs::remove_file(&path)?;
    }

    for (name, kind, block_size) in [
        ("fixed", vhd::Kind::Fixed, 2 << 20),
        ("dynamic", vhd::Kind::Dynamic, 4096),
        ("differencing", vhd::Kind::Differencing, 4096),
    ] {
        let file = Arc::new(MemoryFile::default());
        let options =
            vhd::CreateOptions { kind, block_size, ..vhd::CreateOptions::dynamic(64 << 10, [1; 16]) };
        let writer = if kind == vhd::Kind::Differencing {
            let link = vhd::ParentLink {
                disk: Arc::new(MemoryDevice::zeroed(64 << 10)),
                // The targets give the image itself as its parent.
                unique_id: [1; 16],
                time_stamp: 0,
                relative_name: ".\\a.vhd".to_owned(),
                absolute_name: Some("C:\\a.vhd".to_owned()),
            };
            vhd::Writer::create_child(file.clone(), &options, link)?
        } else {
            vhd::Writer::create(file.clone(), &options)?
        };
        writer.write_at(100, &[1; 600])?;
        writer.write_at(40_000, &[2; 9_000])?;
        writer.flush()?;
        put(&corpus, "vhd", &format!("own-{name}"), &file.to_vec())?;
    }
    for format in [disk_image::ImageFormat::Vhdx, disk_image::ImageFormat::Qcow2] {
        let file = Arc::new(MemoryFile::default());
        let new = disk_image::probe::NewDisk {
            size: SIZE,
            logical_sector_size: 512,
            fixed: false,
            ids: [[1; 16], [2; 16], [3; 16]],
            created: 0,
        };
        let writer = disk_image::probe::create_writer(format, file.clone(), &new)?;
        writer.write_at(100, &[1; 600])?;
        // Not flushed: a log that is in use, tables that lag behind.
        put(&corpus, format.word(), "own-not-flushed", &file.to_vec())?;
        writer.flush()?;
        put(&corpus, format.word(), "own", &file.to_vec())?;
        writer.write_at(1 << 20, &[1; 600])?;
        put(&corpus, format.word(), "own-open", &file.to_vec())?;
    }
    Ok(())
}

fn succeed(command: &mut Command) -> Result<(), Failure> {
    let status = command.status().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}

fn opens(target: &str, input: &[u8]) -> Result<(), Failure> {
    let input = stillpoint_fuzz::input(input).ok_or("too short")?;
    let parents = stillpoint_fuzz::parents(&input);
    disk_image::probe::open(target.parse()?, input.file, parents.as_ref())?;
    Ok(())
}

/// With and without parents, reading and writing.
fn put(corpus: &Path, target: &str, name: &str, image: &[u8]) -> Result<(), Failure> {
    for target in [target, "probe"] {
        let folder = corpus.join(target);
        std::fs::create_dir_all(&folder)?;
        for options in if target == "probe" { 0..1 } else { 0..4u8 } {
            let input = stillpoint_fuzz::encode(options, image);
            if input.len() > MAX_INPUT {
                return Err(format!("{target} {name}: the input has {} bytes", input.len()).into());
            }
            // A chain with itself ends in an error, as it must.
            let alone = !["qemu-backing", "own-differencing"].contains(&name);
            if target != "probe" && alone {
                opens(target, &input).map_err(|error| format!("{target} {name}: is no seed: {error}"))?;
            }
            std::fs::write(folder.join(format!("seed-{name}-{options}")), input)?;
        }
    }
    Ok(())
}
