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
        let target = RecoveryTarget::open(&request).unwrap();
        assert!(target.fresh());
        target.device().write_at(65536, &[7; 65536]).unwrap();
        target.device().flush().unwrap();
        assert!(target.partial_path().exists() && !path.exists());
        drop(target);
        let target = RecoveryTarget::open(&request).unwrap();
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
    let target = RecoveryTarget::open(&request(&path, ImageFormat::Raw)).unwrap();
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
    assert_eq!(code(RecoveryTarget::open(&request)), Code::TargetExists);
    assert_eq!(names(folder.path()), ["disk.raw"]);
    // It appears while the recovery runs.
    fs::remove_file(&path).unwrap();
    let target = RecoveryTarget::open(&request).unwrap();
    fs::write(&path, b"precious").unwrap();
    assert_eq!(target.finish(true).unwrap_err().code(), Code::TargetExists);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    request.overwrite = true;
    let target = RecoveryTarget::open(&request).unwrap();
    assert!(!target.fresh(), "the partial file was kept");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    target.finish(true).unwrap();
    assert_eq!(disk_in(&path, ImageFormat::Raw), vec![0; 2 << 20]);
    assert_eq!(names(folder.path()), ["disk.raw"]);
    // A folder is never replaced.
    request.path = folder.path().join("folder");
    fs::create_dir(&request.path).unwrap();
    assert_eq!(code(RecoveryTarget::open(&request)), Code::TargetExists);
}

#[test]
fn a_partial_file_of_another_recovery_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let first = request(&path, ImageFormat::Raw);
    RecoveryTarget::open(&first).unwrap().device().write_at(0, &[9; 512]).unwrap();
    let others = [
        TargetRequest { point: RecoveryPointId([5; 16]), ..first.clone() },
        TargetRequest { disk: "disk1".to_owned(), ..first.clone() },
        TargetRequest { format: ImageFormat::Qcow2, ..first.clone() },
        TargetRequest { new: NewDisk { size: 4 << 20, ..first.new }, ..first.clone() },
    ];
    let before = fs::read(folder.path().join("disk.raw.partial.state")).unwrap();
    for other in &others {
        assert_eq!(code(RecoveryTarget::open(other)), Code::TargetExists);
    }
    assert_eq!(fs::read(folder.path().join("disk.raw.partial.state")).unwrap(), before);
    assert!(!RecoveryTarget::open(&first).unwrap().fresh());
    let target = RecoveryTarget::open(&TargetRequest { overwrite: true, ..others[0].clone() }).unwrap();
    assert!(target.fresh());
    let mut buf = [1; 512];
    target.device().read_at(0, &mut buf).unwrap();
    assert_eq!(buf, [0; 512]);
    assert_eq!(code(RecoveryTarget::open(&others[0])), Code::SourceBusy, "two recoveries of one file");
    target.discard().unwrap();
    assert_eq!(names(folder.path()), Vec::<String>::new());
}

#[test]
fn every_flipped_bit_of_the_state_file_stops_the_continuation() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let request = request(&path, ImageFormat::Raw);
    drop(RecoveryTarget::open(&request).unwrap());
    let state = folder.path().join("disk.raw.partial.state");
    let good = fs::read(&state).unwrap();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&state, &bad).unwrap();
        assert_eq!(code(RecoveryTarget::open(&request)), Code::TargetExists, "bit {bit}");
    }
    // A partial file that we know nothing about is somebody's.
    fs::remove_file(&state).unwrap();
    assert_eq!(code(RecoveryTarget::open(&request)), Code::TargetExists);
    assert_eq!(names(folder.path()), ["disk.raw.partial"]);
}

#[test]
fn a_crash_before_the_image_was_one_begins_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let request = request(&path, ImageFormat::Qcow2);
    let target = RecoveryTarget::open(&request).unwrap();
    let partial = target.partial_path().to_owned();
    drop(target);
    fs::write(&partial, b"QFI").unwrap();
    assert!(RecoveryTarget::open(&request).unwrap().fresh());
    fs::remove_file(&partial).unwrap();
    let target = RecoveryTarget::open(&request).unwrap();
    assert!(target.fresh());
    target.finish(true).unwrap();
    assert_eq!(names(folder.path()), ["disk.qcow2"]);
}

#[test]
fn what_a_format_cannot_hold_creates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(&folder.path().join("disk.vhd"), ImageFormat::Vhd);
    request.new.size = 3 << 40;
    assert_eq!(code(RecoveryTarget::open(&request)), Code::TargetFormat);
    request.new.size = 2 << 20;
    request.new.logical_sector_size = 4096;
    assert_eq!(code(RecoveryTarget::open(&request)), Code::TargetFormat);
    assert_eq!(names(folder.path()), Vec::<String>::new());
    request.path = folder.path().join("missing/disk.vhd");
    assert_eq!(code(RecoveryTarget::open(&request)), Code::TargetWrite);
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
            match RecoveryTarget::open(&request) {
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
    let target = RecoveryTarget::open(&request).unwrap();
    let device = target.device();
    let error = (0..32).find_map(|i| device.write_at(i * 65536, &[1; 65536]).err()).unwrap();
    assert_eq!(ProviderError::from_target_device("disk.raw", &error).code(), Code::TargetFull);
    drop((device, target));
    assert!(!RecoveryTarget::open(&request).unwrap().fresh());
}

#[test]
fn a_state_file_whose_recovery_was_cut_off_after_the_rename_goes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let request = request(&path, ImageFormat::Raw);
    let target = RecoveryTarget::open(&request).unwrap();
    drop(target);
    // As a kill leaves it between the new name and the removal of the state.
    fs::rename(folder.path().join("disk.raw.partial"), &path).unwrap();
    assert_eq!(names(folder.path()), ["disk.raw", "disk.raw.partial.state"]);
    assert_eq!(code(RecoveryTarget::open(&request)), Code::TargetExists);
    assert_eq!(names(folder.path()), ["disk.raw"]);
    // Somebody's own file of that name is not ours to remove.
    fs::write(folder.path().join("disk.raw.partial.state"), b"mine").unwrap();
    assert_eq!(code(RecoveryTarget::open(&request)), Code::TargetExists);
    assert_eq!(names(folder.path()), ["disk.raw", "disk.raw.partial.state"]);
}
