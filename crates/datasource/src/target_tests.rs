#![allow(clippy::unwrap_used)]

use std::fs;

use block_io::BlockDevice;
use model::Code;

use super::*;

fn request(path: &Path, format: ImageFormat) -> TargetRequest {
    TargetRequest {
        path: path.to_owned(),
        format,
        new: NewDisk {
            size: 2 << 20,
            logical_sector_size: 512,
            fixed: false,
            ids: [[1; 16], [2; 16], [3; 16]],
            created: 0,
        },
        point: RecoveryPointId([4; 16]),
        disk: "disk0".to_owned(),
        overwrite: false,
        over: None,
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn code(result: Result<RecoveryTarget, ProviderError>) -> Code {
    match result {
        Ok(_) => panic!("it was opened"),
        Err(error) => error.code(),
    }
}

fn disk_in(path: &Path, format: ImageFormat) -> Vec<u8> {
    let file = Arc::new(block_io::FileDevice::open(path).unwrap());
    let disk = probe::open_reader(format, file, &disk_image::NoParents).unwrap();
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_recovery_is_continued_and_ends_under_its_name() {
    let folder = tempfile::tempdir().unwrap();
    for format in [ImageFormat::Raw, ImageFormat::Vhd, ImageFormat::Vhdx, ImageFormat::Qcow2] {
        let path = folder.path().join(format!("disk.{}", format.word()));
        let request = request(&path, format);
        let target = crate::images::target(&request).unwrap();
        assert!(target.fresh());
        target.device().write_at(65536, &[7; 65536]).unwrap();
        target.device().flush().unwrap();
        assert!(target.partial_path().exists() && !path.exists());
        drop(target);
        let target = crate::images::target(&request).unwrap();
        assert!(!target.fresh());
        let mut buf = [0; 65536];
        target.device().read_at(65536, &mut buf).unwrap();
        assert_eq!(buf, [7; 65536], "{format:?}");
        target.device().write_at(0, &[5; 512]).unwrap();
        target.finish(true).unwrap();
        let mut expected = vec![0; 2 << 20];
        expected[65536..131072].fill(7);
        expected[..512].fill(5);
        assert_eq!(disk_in(&path, format), expected, "{format:?}");
    }
    assert_eq!(names(folder.path()).len(), 4, "something was left: {:?}", names(folder.path()));
}

#[test]
fn holes_stay_holes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let target = crate::images::target(&request(&path, ImageFormat::Raw)).unwrap();
    target.device().write_at(1 << 20, &[1; 4096]).unwrap();
    target.finish(true).unwrap();
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 64 * 1024);
    }
}

#[test]
fn nothing_that_stands_there_is_written_over_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    fs::write(&path, b"precious").unwrap();
    let mut request = request(&path, ImageFormat::Raw);
    assert_eq!(code(crate::images::target(&request)), Code::TargetExists);
    assert_eq!(names(folder.path()), ["disk.raw"]);
    // It appears while the recovery runs.
    fs::remove_file(&path).unwrap();
    let target = crate::images::target(&request).unwrap();
    fs::write(&path, b"precious").unwrap();
    assert_eq!(target.finish(true).unwrap_err().code(), Code::TargetExists);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    request.overwrite = true;
    let target = crate::images::target(&request).unwrap();
    assert!(!target.fresh(), "the partial file was kept");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    target.finish(true).unwrap();
    assert_eq!(disk_in(&path, ImageFormat::Raw), vec![0; 2 << 20]);
    assert_eq!(names(folder.path()), ["disk.raw"]);
    // A folder is never replaced.
    request.path = folder.path().join("folder");
    fs::create_dir(&request.path).unwrap();
    assert_eq!(code(crate::images::target(&request)), Code::TargetExists);
}

#[test]
fn a_partial_file_of_another_recovery_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let first = request(&path, ImageFormat::Raw);
    crate::images::target(&first).unwrap().device().write_at(0, &[9; 512]).unwrap();
    let others = [
        TargetRequest { point: RecoveryPointId([5; 16]), ..first.clone() },
        TargetRequest { disk: "disk1".to_owned(), ..first.clone() },
        TargetRequest { format: ImageFormat::Qcow2, ..first.clone() },
        TargetRequest { new: NewDisk { size: 4 << 20, ..first.new }, ..first.clone() },
    ];
    let before = fs::read(folder.path().join("disk.raw.partial.state")).unwrap();
    for other in &others {
        assert_eq!(code(crate::images::target(other)), Code::TargetExists);
    }
    assert_eq!(fs::read(folder.path().join("disk.raw.partial.state")).unwrap(), before);
    assert!(!crate::images::target(&first).unwrap().fresh());
    let target = crate::images::target(&TargetRequest { overwrite: true, ..others[0].clone() }).unwrap();
    assert!(target.fresh());
    let mut buf = [1; 512];
    target.device().read_at(0, &mut buf).unwrap();
    assert_eq!(buf, [0; 512]);
    assert_eq!(code(crate::images::target(&others[0])), Code::SourceBusy, "two recoveries of one file");
    target.discard().unwrap();
    assert_eq!(names(folder.path()), Vec::<String>::new());
}

#[test]
fn every_flipped_bit_of_the_state_file_stops_the_continuation() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let request = request(&path, ImageFormat::Raw);
    drop(crate::images::target(&request).unwrap());
    let state = folder.path().join("disk.raw.partial.state");
    let good = fs::read(&state).unwrap();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&state, &bad).unwrap();
        assert_eq!(code(crate::images::target(&request)), Code::TargetExists, "bit {bit}");
    }
    // A partial file that we know nothing about is somebody's.
    fs::remove_file(&state).unwrap();
    assert_eq!(code(crate::images::target(&request)), Code::TargetExists);
    assert_eq!(names(folder.path()), ["disk.raw.partial"]);
}

#[test]
fn a_crash_before_the_image_was_one_begins_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let request = request(&path, ImageFormat::Qcow2);
    let target = crate::images::target(&request).unwrap();
    let partial = target.partial_path().to_owned();
    drop(target);
    fs::write(&partial, b"QFI").unwrap();
    assert!(crate::images::target(&request).unwrap().fresh());
    fs::remove_file(&partial).unwrap();
    let target = crate::images::target(&request).unwrap();
    assert!(target.fresh());
    target.finish(true).unwrap();
    assert_eq!(names(folder.path()), ["disk.qcow2"]);
}

#[test]
fn what_a_format_cannot_hold_creates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(&folder.path().join("disk.vhd"), ImageFormat::Vhd);
    request.new.size = 3 << 40;
    assert_eq!(code(crate::images::target(&request)), Code::TargetFormat);
    request.new.size = 2 << 20;
    request.new.logical_sector_size = 4096;
    assert_eq!(code(crate::images::target(&request)), Code::TargetFormat);
    assert_eq!(names(folder.path()), Vec::<String>::new());
    request.path = folder.path().join("missing/disk.vhd");
    assert_eq!(code(crate::images::target(&request)), Code::TargetWrite);
    assert_eq!(names(folder.path()), Vec::<String>::new());
}

#[cfg(unix)]
#[test]
fn links_in_place_of_our_files_are_not_followed() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let (path, elsewhere) = (folder.path().join("disk.raw"), folder.path().join("elsewhere"));
    for name in ["disk.raw", "disk.raw.partial", "disk.raw.partial.state"] {
        let link = folder.path().join(name);
        symlink(&elsewhere, &link).unwrap();
        for overwrite in [false, true] {
            let request = TargetRequest { overwrite, ..request(&path, ImageFormat::Raw) };
            match crate::images::target(&request) {
                Err(error) => assert_eq!(error.code(), Code::TargetExists, "{name}: {error}"),
                // Told to replace the partial file, it replaces the link and not what it points at.
                Ok(target) => {
                    assert!(overwrite && name == "disk.raw.partial");
                    target.discard().unwrap();
                }
            }
            assert!(!elsewhere.exists(), "{name} was followed");
        }
        let _ = fs::remove_file(&link);
        let _ = fs::remove_file(folder.path().join("disk.raw.partial.state"));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_target_is_target_full_and_can_be_continued() {
    use std::process::Command;
    struct Mounted(tempfile::TempDir);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
        }
    }
    let mounted = Mounted(tempfile::tempdir().unwrap());
    let done =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(mounted.0.path()).status();
    assert!(done.unwrap().success(), "this test mounts a small file system and needs the rights to");
    let path = mounted.0.path().join("disk.raw");
    let request = request(&path, ImageFormat::Raw);
    let target = crate::images::target(&request).unwrap();
    let device = target.device();
    let error = (0..32).find_map(|i| device.write_at(i * 65536, &[1; 65536]).err()).unwrap();
    assert_eq!(ProviderError::from_target_device("disk.raw", &error).code(), Code::TargetFull);
    drop((device, target));
    assert!(!crate::images::target(&request).unwrap().fresh());
}

#[test]
fn a_state_file_whose_recovery_was_cut_off_after_the_rename_goes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let request = request(&path, ImageFormat::Raw);
    let target = crate::images::target(&request).unwrap();
    drop(target);
    // As a kill leaves it between the new name and the removal of the state.
    fs::rename(folder.path().join("disk.raw.partial"), &path).unwrap();
    assert_eq!(names(folder.path()), ["disk.raw", "disk.raw.partial.state"]);
    assert_eq!(code(crate::images::target(&request)), Code::TargetExists);
    assert_eq!(names(folder.path()), ["disk.raw"]);
    // Somebody's own file of that name is not ours to remove.
    fs::write(folder.path().join("disk.raw.partial.state"), b"mine").unwrap();
    assert_eq!(code(crate::images::target(&request)), Code::TargetExists);
    assert_eq!(names(folder.path()), ["disk.raw", "disk.raw.partial.state"]);
}

/// Recovery by difference.
#[cfg(unix)]
mod overlay {
    use std::os::unix::fs::FileExt;
    use std::process::{Command, Stdio};

    use block_io::FileDevice;
    use model::ByteRange;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn over(path: &Path, base: &Path, format: ImageFormat) -> TargetRequest {
        let base = BaseImage { path: base.to_owned(), format, allow_backing: Vec::new() };
        TargetRequest { over: Some(base), ..request(path, ImageFormat::Qcow2) }
    }

    fn tool(program: &str, folder: &Path, line: &str) -> String {
        let done = Command::new(program).current_dir(folder).args(line.split(' ')).output();
        let done = done.unwrap_or_else(|error| panic!("{program}: {error}; run the install chore first"));
        assert!(done.status.success(), "{program} {line}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    /// 2 MiB that are the same each time.
    fn noise() -> Vec<u8> {
        (0..2 * MIB).map(|at| at.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()[6] | 1).collect()
    }

    /// A folder under its true name with the raw image `base.raw` of `noise` in it.
    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(folder.path()).unwrap();
        fs::write(path.join("base.raw"), noise()).unwrap();
        (folder, path)
    }

    /// Writes over `path` at `offset` what is there, and turns its time stamp back.
    fn write_the_same(path: &Path, offset: u64) {
        let modified = fs::metadata(path).unwrap().modified().unwrap();
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&byte, offset).unwrap();
        file.set_modified(modified).unwrap();
    }

    #[test]
    fn it_is_continued_and_qemu_reads_the_recovered_disk_from_it() {
        let (_held, folder) = folder();
        tool("qemu-img", &folder, "convert -c -f raw -O qcow2 base.raw packed.qcow2");
        tool("qemu-img", &folder, "bitmap --add -f qcow2 packed.qcow2 changes");
        tool("qemu-img", &folder, "create -q -f qcow2 -b packed.qcow2 -F qcow2 top.qcow2");
        tool("qemu-img", &folder, "convert -f raw -O vhdx base.raw base.vhdx");
        tool("qemu-img", &folder, "convert -f raw -O vpc -o force_size=on base.raw base.vhd");
        for (name, format, word) in [
            ("base.raw", ImageFormat::Raw, "raw"),
            ("packed.qcow2", ImageFormat::Qcow2, "qcow2"),
            ("top.qcow2", ImageFormat::Qcow2, "qcow2"),
            ("base.vhdx", ImageFormat::Vhdx, "vhdx"),
            ("base.vhd", ImageFormat::Vhd, "vpc"),
        ] {
            for size in [MIB, 2 * MIB, 3 * MIB] {
                let what = format!("{name} as {size} bytes");
                let before = fs::read(folder.join(name)).unwrap();
                let path = folder.join("disk.qcow2");
                let mut request = over(&path, &folder.join(name), format);
                request.new.size = size;
                let mut model = noise();
                model.resize(size as usize, 0);

                let target = crate::images::target(&request).unwrap();
                assert!(!target.fresh(), "{what}: it reads as the base");
                let device = target.device();
                assert_eq!(device.size(), size);
                let mut found = vec![0; size as usize];
                device.read_at(0, &mut found).unwrap();
                assert!(found == model, "{what}");
                device.write_at(65_000, &[7; 2000]).unwrap();
                device.flush().unwrap();
                drop((device, target));

                let target = crate::images::target(&request).unwrap();
                assert!(!target.fresh());
                model[65_000..67_000].fill(7);
                target.device().read_at(0, &mut found).unwrap();
                assert!(found == model, "{what}: continued");
                target.device().write_zeros(ByteRange { start: MIB / 2, end: MIB }).unwrap();
                target.device().write_at(size - 512, &[9; 512]).unwrap();
                model[MIB as usize / 2..MIB as usize].fill(0);
                model[size as usize - 512..].fill(9);
                target.finish(true).unwrap();

                tool("qemu-img", &folder, "check -q -f qcow2 disk.qcow2");
                tool("qemu-img", &folder, "convert -f qcow2 -O raw disk.qcow2 found.raw");
                assert!(fs::read(folder.join("found.raw")).unwrap() == model, "{what}");
                let info = tool("qemu-img", &folder, "info -f qcow2 --output=json disk.qcow2");
                let info: serde_json::Value = serde_json::from_str(&info).unwrap();
                assert_eq!(info["backing-filename"], *folder.join(name).to_str().unwrap(), "{what}");
                assert_eq!(info["backing-filename-format"], word, "{what}");
                assert_eq!(info["virtual-size"], size, "{what}");
                assert!(before == fs::read(folder.join(name)).unwrap(), "{what}: the base was written");
                fs::remove_file(&path).unwrap();
                fs::remove_file(folder.join("found.raw")).unwrap();
            }
        }
        assert_eq!(names(&folder), ["base.raw", "base.vhd", "base.vhdx", "packed.qcow2", "top.qcow2"]);
    }

    #[test]
    fn one_over_a_base_that_was_changed_is_never_continued() {
        let (_held, folder) = folder();
        let (path, base, other) = (folder.join("disk.qcow2"), folder.join("base.raw"), folder.join("other"));
        let request = over(&path, &base, ImageFormat::Raw);
        let changes: [&dyn Fn(); 3] = [
            &|| write_the_same(&base, 4711),
            &|| OpenOptions::new().write(true).open(&base).unwrap().set_len(3 * MIB).unwrap(),
            &|| {
                fs::copy(&base, &other).unwrap();
                fs::rename(&other, &base).unwrap();
            },
        ];
        for (number, change) in changes.iter().enumerate() {
            let target = crate::images::target(&request).unwrap();
            target.device().write_at(0, &[3; 512]).unwrap();
            target.device().flush().unwrap();
            drop(target);
            change();
            let error = crate::images::target(&request).err().unwrap();
            assert_eq!(error.code(), Code::TargetExists, "change {number}");
            assert!(error.to_string().contains("before somebody wrote to it"), "{error}");
            let target =
                crate::images::target(&TargetRequest { overwrite: true, ..request.clone() }).unwrap();
            let mut found = [0; 512];
            target.device().read_at(0, &mut found).unwrap();
            assert!(found == noise()[..512], "change {number}: begun anew");
            target.discard().unwrap();
        }
        assert_eq!(names(&folder), ["base.raw"]);
    }

    #[test]
    fn the_whole_disk_and_overlays_of_others_are_told_apart() {
        let (_held, folder) = folder();
        let (path, base) = (folder.join("disk.qcow2"), folder.join("base.raw"));
        fs::copy(&base, folder.join("other.raw")).unwrap();
        let whole = request(&path, ImageFormat::Qcow2);
        let first = over(&path, &base, ImageFormat::Raw);
        let second = over(&path, &folder.join("other.raw"), ImageFormat::Raw);
        let all = [&whole, &first, &second];
        for (number, one) in all.iter().enumerate() {
            drop(crate::images::target(one).unwrap());
            for (other_number, other) in all.iter().enumerate().filter(|(other, _)| *other != number) {
                let refused = code(crate::images::target(other));
                assert_eq!(refused, Code::TargetExists, "{number} and {other_number}");
            }
            crate::images::target(one).unwrap().discard().unwrap();
        }
        // The state of an overlay is of a version that a program without overlays does not continue.
        drop(crate::images::target(&first).unwrap());
        let state = fs::read_to_string(folder.join("disk.qcow2.partial.state")).unwrap();
        assert!(state.starts_with("{\"version\":2,"), "{state}");
    }

    #[test]
    fn a_write_to_the_base_meanwhile_keeps_the_overlay_from_its_name() {
        let (_held, folder) = folder();
        tool("qemu-img", &folder, "create -q -f qcow2 -b base.raw -F raw middle.qcow2");
        tool("qemu-img", &folder, "create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2");
        let path = folder.join("disk.qcow2");
        let request = over(&path, &folder.join("top.qcow2"), ImageFormat::Qcow2);
        for changed in ["top.qcow2", "middle.qcow2", "base.raw"] {
            let target = crate::images::target(&request).unwrap();
            write_the_same(&folder.join(changed), 0);
            let error = target.finish(true).unwrap_err();
            assert_eq!(error.code(), Code::SourceChanged, "{error}");
            assert!(
                error.object().ends_with(changed) && error.to_string().contains("was written to"),
                "{error}"
            );
            assert!(!path.exists(), "{changed}");
            assert_eq!(code(crate::images::target(&request)), Code::TargetExists, "{changed}");
            fs::remove_file(folder.join("disk.qcow2.partial")).unwrap();
        }
        // Replaced by a copy, and cut while it is read.
        let target = crate::images::target(&request).unwrap();
        fs::copy(folder.join("base.raw"), folder.join("copy")).unwrap();
        fs::rename(folder.join("copy"), folder.join("base.raw")).unwrap();
        assert_eq!(target.finish(true).unwrap_err().code(), Code::SourceChanged);
        fs::remove_file(folder.join("disk.qcow2.partial")).unwrap();
        let target = crate::images::target(&request).unwrap();
        OpenOptions::new().write(true).open(folder.join("base.raw")).unwrap().set_len(4096).unwrap();
        let error = target.device().write_at(MIB, &[1; 512]).unwrap_err();
        assert_eq!(ProviderError::from_target_device("disk.qcow2", &error).code(), Code::SourceChanged);
        assert_eq!(target.finish(true).unwrap_err().code(), Code::SourceChanged);
    }

    /// A QEMU that has an image open for writing until it is dropped.
    struct Writer(std::process::Child);

    impl Writer {
        fn of(path: &Path) -> Writer {
            use std::io::BufRead;
            let mut child = Command::new("qemu-io")
                .args(["-f", "raw"])
                .arg(path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
            let said = io::BufReader::new(child.stdout.as_mut().unwrap());
            assert!(said.lines().any(|line| line.unwrap().contains("MiB")), "it ended early");
            Writer(child)
        }
    }

    impl Drop for Writer {
        fn drop(&mut self) {
            drop(self.0.stdin.take());
            let _ = self.0.wait();
        }
    }

    #[test]
    fn nobody_may_have_the_base_open_for_writing() {
        let (_held, folder) = folder();
        let (path, base) = (folder.join("disk.qcow2"), folder.join("base.raw"));
        let request = over(&path, &base, ImageFormat::Raw);
        let writer = Writer::of(&base);
        let error = crate::images::target(&request).err().unwrap();
        assert_eq!(error.code(), Code::SourceLocked, "{error}");
        assert_eq!(names(&folder), ["base.raw"]);
        drop(writer);
        // It is started while the overlay is filled, and has not written yet.
        let target = crate::images::target(&request).unwrap();
        target.device().write_at(0, &[3; 512]).unwrap();
        let writer = Writer::of(&base);
        let error = target.finish(true).unwrap_err();
        assert_eq!(error.code(), Code::SourceLocked, "{error}");
        assert!(!path.exists());
        drop(writer);
        crate::images::target(&request).unwrap().finish(true).unwrap();
        assert!(fs::read(&base).unwrap() == noise());
        let file = Arc::new(FileDevice::open(&path).unwrap());
        let stated = qcow2::Info::read(&file).unwrap().backing.unwrap();
        assert_eq!((stated.name.as_str(), stated.format.as_deref()), (base.to_str().unwrap(), Some("raw")));
    }

    #[test]
    fn the_base_is_never_the_file_that_is_written() {
        let (_held, folder) = folder();
        tool("qemu-img", &folder, "create -q -f qcow2 -b base.raw -F raw top.qcow2");
        fs::hard_link(folder.join("base.raw"), folder.join("linked.qcow2")).unwrap();
        std::os::unix::fs::symlink(&folder, folder.join("here")).unwrap();
        fs::copy(folder.join("base.raw"), folder.join("a.partial")).unwrap();
        fs::copy(folder.join("base.raw"), folder.join("b.partial.state")).unwrap();
        let before = names(&folder);
        for (path, base, format) in [
            ("base.raw", "base.raw", ImageFormat::Raw),
            ("here/base.raw", "base.raw", ImageFormat::Raw),
            ("base.raw", "top.qcow2", ImageFormat::Qcow2),
            ("top.qcow2", "here/top.qcow2", ImageFormat::Qcow2),
            ("linked.qcow2", "base.raw", ImageFormat::Raw),
            ("a", "a.partial", ImageFormat::Raw),
            ("b", "b.partial.state", ImageFormat::Raw),
        ] {
            let request = over(&folder.join(path), &folder.join(base), format);
            let refused = code(crate::images::target(&TargetRequest { overwrite: true, ..request }));
            assert_eq!(refused, Code::TargetExists, "{path} over {base}");
        }
        assert_eq!(names(&folder), before);
        assert!(fs::read(folder.join("base.raw")).unwrap() == noise());
    }

    /// A file whose writer is killed at one of its writes.
    struct Killed {
        below: DiskFile,
        left: std::sync::atomic::AtomicU32,
    }

    impl block_io::GrowableFile for Killed {
        fn len(&self) -> Result<u64, block_io::DeviceError> {
            self.below.len()
        }
        fn set_len(&self, length: u64) -> Result<(), block_io::DeviceError> {
            self.below.set_len(length)
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), block_io::DeviceError> {
            self.below.read_at(offset, buf)
        }
        fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), block_io::DeviceError> {
            if self.left.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) == 0 {
                return Err(block_io::DeviceError::ReadOnly { object: "killed".to_owned() });
            }
            self.below.write_at(offset, buf)
        }
        fn punch(&self, range: ByteRange) -> Result<(), block_io::DeviceError> {
            self.below.punch(range)
        }
        fn flush(&self) -> Result<(), block_io::DeviceError> {
            self.below.flush()
        }
    }

    /// An image as a kill leaves it between the writing of its log and that of its tables.
    fn vhdx_with_a_log(path: &Path) {
        for writes in 1..100 {
            let _ = fs::remove_file(path);
            let file = Killed { below: DiskFile::create(path).unwrap(), left: writes.into() };
            let new = request(path, ImageFormat::Vhdx).new;
            if let Ok(writer) = probe::create_writer(ImageFormat::Vhdx, Arc::new(file), &new) {
                let _ = writer.write_at(0, &[5; 65_536]).and_then(|()| writer.flush());
            }
            let file = Arc::new(FileDevice::open(path).unwrap());
            let opened = probe::open(ImageFormat::Vhdx, file, &disk_image::NoParents);
            if opened.is_ok_and(|opened| opened.info.not_closed) {
                return;
            }
        }
        panic!("no write of it left a log");
    }

    /// Makes `child.vhdx` and `child.vhd` over images beside them.
    fn differencing(folder: &Path) {
        use disk_image::{NoParents, vhd, vhdx};
        let file = |name: &str| Arc::new(DiskFile::create(&folder.join(name)).unwrap());
        let read = |name: &str| Arc::new(FileDevice::open(&folder.join(name)).unwrap());
        let new = request(folder, ImageFormat::Vhdx).new;
        drop(probe::create_writer(ImageFormat::Vhdx, file("parent.vhdx"), &new).unwrap());
        let parent = Arc::new(vhdx::Reader::open(read("parent.vhdx"), &NoParents).unwrap());
        let options = vhdx::ChildOptions {
            block_size: 1 << 20,
            file_write: [4; 16],
            data_write: [5; 16],
            relative_path: Some(".\\parent.vhdx".to_owned()),
            volume_path: None,
            absolute_win32_path: None,
        };
        vhdx::Writer::create_child(file("child.vhdx"), parent, options).unwrap();
        drop(probe::create_writer(ImageFormat::Vhd, file("parent.vhd"), &new).unwrap());
        let parent = vhd::Reader::open(read("parent.vhd"), &NoParents).unwrap();
        let link = vhd::ParentLink {
            unique_id: parent.info().unique_id,
            time_stamp: parent.info().time_stamp,
            relative_name: ".\\parent.vhd".to_owned(),
            absolute_name: None,
            disk: Arc::new(parent),
        };
        let options = vhd::CreateOptions::dynamic(2 * MIB, [6; 16]);
        vhd::Writer::create_child(file("child.vhd"), &options, link).unwrap();
    }

    #[test]
    fn only_what_qemu_can_read_below_and_was_allowed() {
        let (_held, folder) = folder();
        let path = folder.join("disk.qcow2");
        let refused = |request: &TargetRequest| {
            let before = names(&folder);
            let refused = code(crate::images::target(request));
            assert_eq!(names(&folder), before);
            refused
        };
        let good = over(&path, &folder.join("base.raw"), ImageFormat::Raw);
        for format in [ImageFormat::Raw, ImageFormat::Vhd, ImageFormat::Vhdx] {
            assert_eq!(refused(&TargetRequest { format, ..good.clone() }), Code::TargetFormat);
        }
        let mut odd = good.clone();
        odd.new.size = 1000;
        assert_eq!(refused(&odd), Code::TargetFormat);
        assert_eq!(refused(&over(&path, &folder.join("gone.raw"), ImageFormat::Raw)), Code::SourceMissing);
        assert_eq!(refused(&over(&path, &folder, ImageFormat::Raw)), Code::Unsupported);
        assert_eq!(refused(&over(&path, &folder.join("base.raw"), ImageFormat::Qcow2)), Code::SourceFormat);
        // QEMU knows no parents of VHDX and VHD.
        differencing(&folder);
        for (name, format) in [("child.vhdx", ImageFormat::Vhdx), ("child.vhd", ImageFormat::Vhd)] {
            assert_eq!(refused(&over(&path, &folder.join(name), format)), Code::Unsupported);
        }
        // Backing files lie beside the image or where they were allowed.
        let elsewhere = tempfile::tempdir().unwrap();
        let elsewhere = fs::canonicalize(elsewhere.path()).map(|path| (elsewhere, path)).unwrap();
        fs::copy(folder.join("base.raw"), elsewhere.1.join("base.raw")).unwrap();
        let below = elsewhere.1.join("base.raw");
        let line = format!("create -q -f qcow2 -b {} -F raw top.qcow2", below.display());
        tool("qemu-img", &folder, &line);
        let mut request = over(&path, &folder.join("top.qcow2"), ImageFormat::Qcow2);
        assert_eq!(refused(&request), Code::SourceUnsafe);
        request.over.as_mut().unwrap().allow_backing.push(elsewhere.1);
        crate::images::target(&request).unwrap().discard().unwrap();
        // Whoever wrote it was killed: QEMU opens it below another image only when its log was replayed.
        vhdx_with_a_log(&folder.join("log.vhdx"));
        let qemu_reads = |name: &str| {
            let mut read = Command::new("qemu-io");
            read.current_dir(&folder).args(["-r", "-f", "vhdx", "-c", "read 0 64k", name]);
            read.output().unwrap().status.success()
        };
        let request = over(&path, &folder.join("log.vhdx"), ImageFormat::Vhdx);
        assert_eq!(refused(&request), Code::Unsupported);
        assert!(!qemu_reads("log.vhdx") && !qemu_reads("child.vhdx") && qemu_reads("parent.vhdx"));
        tool("qemu-img", &folder, "check -q -r all log.vhdx");
        crate::images::target(&request).unwrap().discard().unwrap();
    }
}
