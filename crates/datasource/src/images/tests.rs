#![allow(clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block_io::{BlockDevice, DiskFile, WritableDevice};
use disk_image::ImageFormat;
use disk_image::probe::{self, NewDisk};
use model::{Code, Consistency, DatasourceId, JobId, Problem};

use super::Images;
#[cfg(unix)]
use super::{MARK, scratch};
use crate::{
    FreezeMethod, FreezeRequest, FrozenView, ImageSource, ImagesSource, MachineSpec, Provider, ProviderError,
    Source,
};

fn machine(disks: &[&Path], allow: &[&Path]) -> MachineSpec {
    MachineSpec {
        id: DatasourceId([7; 16]),
        name: "web".to_owned(),
        source: Source::Images(ImagesSource {
            disks: disks
                .iter()
                .map(|path| ImageSource { path: path.to_path_buf(), format: None, sector: None })
                .collect(),
            allow_backing: allow.iter().map(|path| path.to_path_buf()).collect(),
        }),
    }
}

fn request() -> FreezeRequest {
    FreezeRequest {
        job: JobId([9; 16]),
        wanted: Consistency::Offline,
        unfrozen: model::Unfrozen::Crash,
        may_retry: false,
        scratch_bytes: 0,
        since: Vec::new(),
    }
}

fn freeze(provider: &Images, disks: &[&Path], allow: &[&Path]) -> Result<Box<dyn FrozenView>, ProviderError> {
    provider.freeze(&machine(disks, allow), &request())
}

fn code(result: Result<Box<dyn FrozenView>, ProviderError>) -> Code {
    match result {
        Ok(_) => panic!("it was frozen"),
        Err(error) => Problem::from(error).code,
    }
}

fn bytes_of(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; device.size() as usize];
    device.read_at(0, &mut bytes).unwrap();
    bytes
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8).collect()
}

fn new_disk(size: u64) -> NewDisk {
    NewDisk { size, logical_sector_size: 512, fixed: false, ids: [[1; 16], [2; 16], [3; 16]], created: 0 }
}

/// An image of `format` that holds `bytes`.
fn image(path: &Path, format: ImageFormat, bytes: &[u8]) {
    let file = DiskFile::create(path).unwrap();
    let writer = probe::create_writer(format, Arc::new(file), &new_disk(bytes.len() as u64)).unwrap();
    writer.write_at(0, bytes).unwrap();
    writer.flush().unwrap();
}

/// An empty qcow2 image over `backing`: the name is put into the header's first cluster, behind the extensions.
fn overlay(path: &Path, size: u64, backing: &str) {
    let file = DiskFile::create(path).unwrap();
    probe::create_writer(ImageFormat::Qcow2, Arc::new(file), &new_disk(size)).unwrap().flush().unwrap();
    let mut file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let at = 4096u64;
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(backing.as_bytes()).unwrap();
    file.seek(SeekFrom::Start(8)).unwrap();
    file.write_all(&at.to_be_bytes()).unwrap();
    file.write_all(&(backing.len() as u32).to_be_bytes()).unwrap();
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn an_image_at_rest_is_read_in_place() {
    let folder = tempfile::tempdir().unwrap();
    for format in [ImageFormat::Raw, ImageFormat::Vhd, ImageFormat::Vhdx, ImageFormat::Qcow2] {
        let path = folder.path().join(format!("disk.{}", format.word()));
        let bytes = pattern(3 << 20, 1);
        image(&path, format, &bytes);
        let view = freeze(&Images::without_reflinks(), &[&path], &[]).unwrap();
        assert_eq!(view.consistency(), Consistency::Offline);
        assert!(matches!(view.method(), FreezeMethod::InPlace { .. }));
        let disk = &view.disks()[0];
        assert_eq!(bytes_of(&disk.device), bytes, "{format:?}");
        assert_eq!(disk.description.format, format.word());
        assert_eq!((disk.description.size, disk.description.sector), (3 << 20, 512));
        assert_eq!(disk.description.file_name, path.file_name().unwrap().to_str().unwrap());
        assert_eq!((disk.description.key.as_str(), disk.description.chain), ("disk0", 1));
        assert_eq!(
            disk.description.properties.contains_key("disk_id"),
            matches!(format, ImageFormat::Vhd | ImageFormat::Vhdx)
        );
        view.verify_unchanged().unwrap();
        let text = serde_json::to_string(view.description()).unwrap();
        assert_eq!(&serde_json::from_str::<crate::MachineDescription>(&text).unwrap(), view.description());
        assert_eq!(&Images::new().inspect(&machine(&[&path], &[])).unwrap(), view.description());
    }
    assert_eq!(names(folder.path()).len(), 4, "something was left behind");
}

#[test]
fn a_spec_round_trips_and_a_raw_disk_may_have_other_sectors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    image(&path, ImageFormat::Raw, &pattern(8192, 1));
    let mut spec = machine(&[&path], &[folder.path()]);
    let Source::Images(images) = &mut spec.source else { panic!("images") };
    images.disks[0].sector = Some(4096);
    let text = serde_json::to_string(&spec).unwrap();
    assert!(text.contains(r#""provider":"images""#), "{text}");
    let spec: MachineSpec = serde_json::from_str(&text).unwrap();
    assert_eq!(Images::new().inspect(&spec).unwrap().disks[0].sector, 4096);
    let Source::Images(mut images) = spec.source else { panic!("images") };
    images.disks[0].sector = Some(1000);
    let spec = MachineSpec { source: Source::Images(images), ..machine(&[], &[]) };
    assert!(matches!(Images::new().inspect(&spec), Err(ProviderError::Format { .. })));
}

#[test]
fn a_write_during_the_read_is_source_changed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    image(&path, ImageFormat::Qcow2, &pattern(1 << 20, 1));
    let view = freeze(&Images::without_reflinks(), &[&path], &[]).unwrap();
    let disk = &view.disks()[0];
    view.verify_unchanged().unwrap();
    // The same length, and garbage in every table: what looks damaged is explained by the change.
    let length = fs::metadata(&path).unwrap().len();
    let mut file = OpenOptions::new().write(true).open(&path).unwrap();
    file.seek(SeekFrom::Start(512)).unwrap();
    file.write_all(&vec![0xff; length as usize - 512]).unwrap();
    let mut buf = vec![0; 1 << 20];
    if let Err(error) = disk.device.read_at(0, &mut buf) {
        assert_eq!(view.explain(&disk.description, &error).code(), Code::SourceChanged);
    }
    for _ in 0..2 {
        let error = view.verify_unchanged().unwrap_err();
        assert_eq!(error.code(), Code::SourceChanged);
        assert!(error.object().ends_with("disk.qcow2"), "{error}");
    }
    assert_eq!(names(folder.path()), ["disk.qcow2"]);
}

#[test]
fn one_changed_byte_is_seen_at_once_and_undoing_it_does_not_help() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    for round in 0..20 {
        let _ = fs::remove_file(&path);
        image(&path, ImageFormat::Raw, &pattern(8192, round));
        let view = freeze(&Images::without_reflinks(), &[&path], &[]).unwrap();
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mut byte = [0];
        (&file).read_exact(&mut byte).unwrap();
        (&file).seek(SeekFrom::Start(0)).unwrap();
        (&file).write_all(&byte).unwrap();
        file.set_modified(modified).unwrap();
        assert_eq!(view.verify_unchanged().unwrap_err().code(), Code::SourceChanged, "round {round}");
    }
}

#[test]
fn a_file_cut_grown_replaced_or_removed_is_source_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let other = folder.path().join("other.raw");
    let open = || OpenOptions::new().write(true).open(&path).unwrap();
    let changes: [&dyn Fn(); 4] = [
        &|| open().set_len(4096).unwrap(),
        &|| open().set_len(1 << 20).unwrap(),
        &|| {
            fs::copy(&path, &other).unwrap();
            fs::rename(&other, &path).unwrap();
        },
        &|| fs::remove_file(&path).unwrap(),
    ];
    for (number, change) in changes.iter().enumerate() {
        let _ = fs::remove_file(&path);
        image(&path, ImageFormat::Raw, &pattern(65536, 3));
        let view = freeze(&Images::without_reflinks(), &[&path], &[]).unwrap();
        change();
        let disk = &view.disks()[0];
        let mut buf = vec![0; 65536];
        if let Err(error) = disk.device.read_at(0, &mut buf) {
            assert_eq!(number, 0, "{error}");
            assert_eq!(view.explain(&disk.description, &error).code(), Code::SourceChanged);
        }
        assert_eq!(view.verify_unchanged().unwrap_err().code(), Code::SourceChanged, "change {number}");
    }
}

#[test]
fn what_is_no_image_is_refused_with_its_code() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let provider = Images::without_reflinks();
    assert_eq!(code(freeze(&provider, &[&at("none.raw")], &[])), Code::SourceMissing);
    assert_eq!(code(freeze(&provider, &[folder.path()], &[])), Code::Unsupported);
    assert_eq!(code(freeze(&provider, &[], &[])), Code::Unsupported);
    image(&at("a.raw"), ImageFormat::Raw, &pattern(4096, 1));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(at("a.raw"), at("b.raw")).unwrap();
        assert_eq!(code(freeze(&provider, &[&at("a.raw"), &at("b.raw")], &[])), Code::Unsupported);
    }
    fs::write(at("bad.qcow2"), pattern(65536, 2)).unwrap();
    assert_eq!(code(freeze(&provider, &[&at("bad.qcow2")], &[])), Code::SourceFormat);
    image(&at("cut.vhdx"), ImageFormat::Vhdx, &pattern(1 << 20, 2));
    OpenOptions::new().write(true).open(at("cut.vhdx")).unwrap().set_len(300_000).unwrap();
    assert_eq!(code(freeze(&provider, &[&at("cut.vhdx")], &[])), Code::SourceFormat);
}

#[test]
fn a_raw_disk_that_begins_like_qcow2_stays_raw() {
    let folder = tempfile::tempdir().unwrap();
    let (secret, disk) = (folder.path().join("secret"), folder.path().join("disk.img"));
    fs::write(&secret, pattern(65536, 4)).unwrap();
    overlay(&disk, 65536, "secret");
    let view = freeze(&Images::without_reflinks(), &[&disk], &[]).unwrap();
    assert_eq!(view.disks()[0].description.format, "raw");
    assert_eq!(bytes_of(&view.disks()[0].device), fs::read(&disk).unwrap());
}

#[test]
fn backing_files_lie_in_the_own_or_an_allowed_folder() {
    let root = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(root.path()).unwrap();
    let (own, outside) = (root.join("own"), root.join("outside"));
    for folder in [&own, &outside, &outside.join("deep"), &root.join("outside-too"), &own.join("sub")] {
        fs::create_dir(folder).unwrap();
    }
    let bytes = pattern(65536, 5);
    for base in [
        own.join("base.img"),
        outside.join("base.img"),
        outside.join("deep/base.img"),
        own.join("sub/base.img"),
        root.join("outside-too/base.img"),
    ] {
        fs::write(base, &bytes).unwrap();
    }
    let provider = Images::without_reflinks();
    let top = own.join("top.qcow2");
    let try_backing = |backing: &str, allow: &[&Path]| {
        let _ = fs::remove_file(&top);
        overlay(&top, 65536, backing);
        freeze(&provider, &[&top], allow)
    };
    let good = |backing: &str, allow: &[&Path]| {
        let view = try_backing(backing, allow).unwrap();
        assert_eq!(bytes_of(&view.disks()[0].device), bytes, "{backing}");
        assert_eq!(view.disks()[0].description.chain, 2);
        view
    };
    let absolute = |path: PathBuf| path.to_str().unwrap().to_owned();
    good("base.img", &[]);
    good("./base.img", &[]);
    good("../own/base.img", &[]);
    good(&absolute(own.join("base.img")), &[]);
    let escapes = [
        "../outside/base.img".to_owned(),
        "sub/base.img".to_owned(),
        absolute(outside.join("base.img")),
        "/etc/shadow".to_owned(),
        "../outside/missing.img".to_owned(),
        "nbd://host/export".to_owned(),
        "json:{\"driver\":\"file\"}".to_owned(),
        "deep/../../outside/base.img".to_owned(),
    ];
    for backing in &escapes {
        let refused = code(try_backing(backing, &[]));
        // What is no file name at all is refused by the format's reader already.
        let no_file = backing.contains(':') && refused == Code::SourceFormat;
        assert!(refused == Code::SourceUnsafe || no_file, "{backing}: {refused}");
    }
    good("../outside/base.img", &[&outside]);
    good("../outside/deep/base.img", &[&outside]);
    assert_eq!(code(try_backing("../outside-too/base.img", &[&outside])), Code::SourceUnsafe);
    assert_eq!(code(try_backing("missing.img", &[])), Code::SourceMissing);
    #[cfg(unix)]
    {
        use std::os::unix::fs::symlink;
        symlink(outside.join("base.img"), own.join("link.img")).unwrap();
        symlink(&outside, own.join("folder")).unwrap();
        symlink(own.join("base.img"), own.join("inside.img")).unwrap();
        symlink("/dev/zero", own.join("zero.img")).unwrap();
        assert_eq!(code(try_backing("link.img", &[])), Code::SourceUnsafe);
        assert_eq!(code(try_backing("folder/base.img", &[])), Code::SourceUnsafe);
        assert_eq!(code(try_backing("zero.img", &[])), Code::SourceUnsafe);
        good("inside.img", &[]);
        good("link.img", &[&outside]);
    }
    // A loop ends, and a change far down the chain is seen.
    assert_eq!(code(try_backing("top.qcow2", &[])), Code::SourceFormat);
    let view = good("base.img", &[]);
    fs::write(own.join("base.img"), &bytes).unwrap();
    let error = view.verify_unchanged().unwrap_err();
    assert!(error.object().ends_with("base.img"), "{error}");
}

#[test]
fn names_of_windows_parents_are_looked_for_beside_the_image() {
    use super::parents::{Chain, Opener};
    use disk_image::{ImageError, ParentReference, Parents};
    struct Names(std::sync::Mutex<Vec<PathBuf>>);
    impl Opener for Names {
        fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>, ProviderError> {
            self.0.lock().unwrap().push(path.to_owned());
            Ok(Arc::new(block_io::MemoryDevice::new(Vec::new())))
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = fs::canonicalize(folder.path()).unwrap();
    fs::write(folder.join("parent.vhdx"), b"").unwrap();
    let names = Arc::new(Names(Default::default()));
    let chain = Chain::new(names.clone(), &folder.join("child.vhdx"), &[]);
    let open = |given: &[&str]| {
        chain
            .parents()
            .open(&ParentReference {
                child: ImageFormat::Vhdx,
                names: given.iter().map(|name| (*name).to_owned()).collect(),
                format: None,
                depth: 1,
            })
            .map(|_| ())
    };
    for good in [r".\parent.vhdx", r"C:\vms\parent.vhdx", r"\\server\share\parent.vhdx", "parent.vhdx"] {
        open(&[good]).unwrap();
        assert_eq!(names.0.lock().unwrap().pop(), Some(folder.join("parent.vhdx")), "{good}");
    }
    open(&[r"..\gone.vhdx", r"D:\gone.vhdx", r"C:\x\parent.vhdx"]).unwrap();
    for bad in [r"..\..\etc\passwd", "", "C:", r"C:\", "x\0y"] {
        assert!(matches!(open(&[bad]), Err(ImageError::NotAllowed { .. })), "{bad}");
    }
    assert!(matches!(open(&[]), Err(ImageError::Device(_))));
}

#[cfg(unix)]
#[test]
fn a_sweep_removes_dead_leftovers_only() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    image(&at("disk.raw"), ImageFormat::Raw, &pattern(4096, 1));
    let dead = scratch::name(JobId([1; 16]), 0);
    let alive = scratch::name(JobId([2; 16]), 3);
    let foreign = format!("{MARK}of-somebody-else");
    fs::write(at(&dead), b"x").unwrap();
    fs::write(at(&foreign), b"x").unwrap();
    fs::create_dir(at(&scratch::name(JobId([3; 16]), 1))).unwrap();
    let held = File::create(at(&alive)).unwrap();
    held.try_lock().unwrap();
    let spec = machine(&[&at("disk.raw"), &at("gone/away.raw")], &[&at("nowhere")]);
    let swept = Images::new().sweep(std::slice::from_ref(&spec)).unwrap();
    assert_eq!(swept.removed.len(), 1, "{swept:?}");
    assert!(swept.removed[0].ends_with(&dead));
    assert_eq!(swept.in_use.len(), 1);
    assert!(at(&alive).exists() && at(&foreign).exists() && at("disk.raw").exists());
    drop(held);
    assert_eq!(Images::new().sweep(&[spec]).unwrap().removed.len(), 1);
}

#[cfg(target_os = "linux")]
mod linux {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    /// A file system in a file, mounted until dropped.
    struct Volume {
        folder: tempfile::TempDir,
    }

    fn run(program: &str, arguments: &[&str]) {
        let done = Command::new(program).args(arguments).output();
        let done = done.unwrap_or_else(|error| panic!("{program}: {error}; run the install chore first"));
        assert!(done.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    impl Volume {
        fn new(make: &str) -> Volume {
            let folder = tempfile::tempdir().unwrap();
            let image = folder.path().join("volume");
            File::create(&image).unwrap().set_len(512 << 20).unwrap();
            let root = folder.path().join("root");
            fs::create_dir(&root).unwrap();
            run(make, &["-q", image.to_str().unwrap()]);
            run("mount", &["-o", "loop", image.to_str().unwrap(), root.to_str().unwrap()]);
            Volume { folder }
        }

        fn root(&self) -> PathBuf {
            fs::canonicalize(self.folder.path().join("root")).unwrap()
        }
    }

    impl Drop for Volume {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(self.folder.path().join("root")).status();
        }
    }

    fn on_reflinks(check: impl Fn(&Path)) {
        for make in ["mkfs.xfs", "mkfs.btrfs"] {
            let volume = Volume::new(make);
            check(&volume.root());
        }
    }

    /// A process that is killed at the end.
    struct Helper(Child);

    impl Helper {
        /// Runs a shell command that says `ready` when it has done its part.
        fn shell(script: &str) -> Helper {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("{script}; echo ready; exec sleep 60")]);
            Helper::start(command)
        }

        fn start(mut command: Command) -> Helper {
            let mut child = command.stdout(Stdio::piped()).stdin(Stdio::piped()).spawn().unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.any(|line| line.unwrap().contains("ready")), "the helper died");
            // The pipe stays open, or the helper may die of it.
            std::thread::spawn(move || lines.count());
            Helper(child)
        }
    }

    impl Drop for Helper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_reflink_keeps_the_moment_while_the_machine_goes_on() {
        on_reflinks(|root| {
            let (base, top, second) = (root.join("base.img"), root.join("top.qcow2"), root.join("data.raw"));
            let bytes = pattern(1 << 20, 6);
            fs::write(&base, &bytes).unwrap();
            overlay(&top, 1 << 20, "base.img");
            fs::write(&second, pattern(1 << 20, 7)).unwrap();
            let before = names(root);
            let view = freeze(&Images::new(), &[&top, &second], &[]).unwrap();
            assert_eq!(view.method(), &FreezeMethod::Reflink);
            assert_eq!(view.consistency(), Consistency::Offline);
            assert_eq!(names(root), before, "the clones have names");
            fs::write(&base, pattern(1 << 20, 8)).unwrap();
            fs::write(&second, b"gone").unwrap();
            assert_eq!(bytes_of(&view.disks()[0].device), bytes);
            assert_eq!(bytes_of(&view.disks()[1].device), pattern(1 << 20, 7));
            view.verify_unchanged().unwrap();
            drop(view);
            assert_eq!(names(root), before);
        });
    }

    #[test]
    fn a_reflink_of_a_file_in_use_is_crash_consistent_and_in_place_it_is_refused() {
        on_reflinks(|root| {
            let path = root.join("disk.raw");
            fs::write(&path, pattern(65536, 1)).unwrap();
            let user = Helper::shell(&format!("exec 3>>{}", path.display()));
            let view = freeze(&Images::new(), &[&path], &[]).unwrap();
            assert_eq!((view.consistency(), view.method()), (Consistency::Crash, &FreezeMethod::Reflink));
            let refused = freeze(&Images::without_reflinks(), &[&path], &[]).err().unwrap();
            assert_eq!(refused.code(), Code::SourceLocked);
            assert!(refused.to_string().contains("open for writing"), "{refused}");
            drop(user);
            let view = freeze(&Images::without_reflinks(), &[&path], &[]).unwrap();
            assert_eq!(view.consistency(), Consistency::Offline);
        });
    }

    #[test]
    fn several_disks_show_one_moment_or_there_is_no_view() {
        let volume = Volume::new("mkfs.xfs");
        let (a, b) = (volume.root().join("a.raw"), volume.root().join("b.raw"));
        for path in [&a, &b] {
            fs::write(path, [0; 4096]).unwrap();
        }
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let rests = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let writer = {
            let (a, b, stop, rests) = (a.clone(), b.clone(), stop.clone(), rests.clone());
            std::thread::spawn(move || {
                use std::os::unix::fs::FileExt;
                let open = |path| OpenOptions::new().write(true).open(path).unwrap();
                let (a, b) = (open(&a), open(&b));
                let mut number = 0u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    // First a, then b: b is never ahead, and never more than one behind.
                    number += 1;
                    a.write_all_at(&number.to_le_bytes(), 0).unwrap();
                    b.write_all_at(&number.to_le_bytes(), 0).unwrap();
                    // First without pause, then in bursts with rests in which a view can be had.
                    if number.is_multiple_of(50) && rests.load(std::sync::atomic::Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_millis(40));
                    }
                }
            })
        };
        let (mut views, mut refusals) = (0, 0);
        for round in 0..12 {
            rests.store(round >= 4, std::sync::atomic::Ordering::Relaxed);
            match freeze(&Images::new(), &[&a, &b], &[]) {
                Ok(view) => {
                    let number = |disk: usize| {
                        let mut buf = [0; 8];
                        view.disks()[disk].device.read_at(0, &mut buf).unwrap();
                        u64::from_le_bytes(buf)
                    };
                    let (a, b) = (number(0), number(1));
                    assert!(a == b || a == b + 1, "a is {a}, b is {b}");
                    views += 1;
                }
                Err(error) => {
                    assert_eq!(error.code(), Code::SourceChanged);
                    refusals += 1;
                }
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        writer.join().unwrap();
        assert!(views > 0 && refusals > 0, "{views} views, {refusals} refusals");
    }

    #[test]
    fn one_disk_under_constant_writing_can_still_be_cloned() {
        let volume = Volume::new("mkfs.btrfs");
        let path = volume.root().join("disk.raw");
        fs::write(&path, [0; 4096]).unwrap();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let writer = {
            let (path, stop) = (path.clone(), stop.clone());
            std::thread::spawn(move || {
                use std::os::unix::fs::FileExt;
                let file = OpenOptions::new().write(true).open(path).unwrap();
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    file.write_all_at(b"x", 100).unwrap();
                }
            })
        };
        let reflinked = freeze(&Images::new(), &[&path], &[]).map(|view| view.consistency());
        let in_place = freeze(&Images::without_reflinks(), &[&path], &[]);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        writer.join().unwrap();
        assert_eq!(reflinked.unwrap(), Consistency::Crash);
        assert_eq!(code(in_place), Code::SourceChanged);
    }

    #[test]
    fn an_exclusive_lock_of_another_refuses_the_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        fs::write(&path, pattern(65536, 1)).unwrap();
        let other = File::open(&path).unwrap();
        other.try_lock().unwrap();
        assert_eq!(code(freeze(&Images::without_reflinks(), &[&path], &[])), Code::SourceLocked);
        drop(other);
        let view = freeze(&Images::without_reflinks(), &[&path], &[]).unwrap();
        let other = File::open(&path).unwrap();
        assert!(other.try_lock().is_err(), "the view holds a lock as long as it lives");
        other.try_lock_shared().unwrap();
        other.unlock().unwrap();
        drop(view);
        other.try_lock().unwrap();
    }

    #[test]
    fn the_locks_of_a_running_qemu_are_seen() {
        let check = |root: &Path| {
            let path = root.join("disk.raw");
            fs::write(&path, pattern(1 << 20, 1)).unwrap();
            let qemu = |arguments: &[&str]| {
                let mut command = Command::new("qemu-io");
                // It reads commands: one to be sure that the image is open, then it waits for more.
                command.args(arguments).arg("-f").arg("raw").arg(&path);
                command.stdin(Stdio::piped()).stdout(Stdio::piped());
                let child = command.spawn();
                let mut child =
                    child.unwrap_or_else(|error| panic!("qemu-io: {error}; run the install chore first"));
                child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
                let mut said = [0; 1];
                let mut all = Vec::new();
                while !String::from_utf8_lossy(&all).contains("MiB") {
                    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
                    all.extend(said);
                }
                Helper(child)
            };
            let reader = qemu(&["-r"]);
            freeze(&Images::without_reflinks(), &[&path], &[]).unwrap();
            drop(reader);
            let writer = qemu(&[]);
            let lock = super::super::sys::writer_of(&[&super::super::sys::OpenSource {
                path: path.clone(),
                file: File::open(&path).unwrap(),
            }]);
            assert!(lock.unwrap().unwrap().contains("QEMU"), "found by its lock, before its open file");
            assert_eq!(code(freeze(&Images::without_reflinks(), &[&path], &[])), Code::SourceLocked);
            drop(writer);
            freeze(&Images::without_reflinks(), &[&path], &[]).unwrap();
        };
        check(tempfile::tempdir().unwrap().path());
        // Btrfs shows another device number in the list of locks than `stat` does.
        check(&Volume::new("mkfs.btrfs").root());
    }

    #[test]
    fn lines_of_the_lock_list_are_told_apart() {
        use super::super::sys::LockLine;
        let writer = |line: &str| LockLine::parse(line).and_then(|line| line.writer());
        assert!(writer("1: OFDLCK ADVISORY  READ -1 08:02:77 101 101").is_some());
        assert!(writer("1: OFDLCK ADVISORY  READ -1 08:02:77 100 103").is_some());
        assert!(writer("1: OFDLCK ADVISORY  READ -1 08:02:77 100 100").is_none());
        assert!(writer("1: OFDLCK ADVISORY  READ -1 08:02:77 201 203").is_none());
        assert!(writer("2: FLOCK  ADVISORY  WRITE 5 08:02:77 0 EOF").unwrap().contains("process 5"));
        assert!(writer("2: FLOCK  ADVISORY  READ 5 08:02:77 0 EOF").is_none());
        assert!(writer("3: POSIX  ADVISORY  WRITE 5 08:02:77 0 EOF").is_some());
        assert!(writer("3: -> POSIX  ADVISORY  WRITE 5 08:02:77 0 EOF").is_none());
        for broken in ["", "1:", "1: POSIX ADVISORY WRITE x y z", "1: POSIX ADVISORY WRITE 5 08:02:77 -1"] {
            assert!(LockLine::parse(broken).is_none(), "{broken}");
        }
    }

    const HELPER_IMAGE: &str = "DATASOURCE_TEST_IMAGE";

    /// Not a test: the process that [`a_killed_freeze_leaves_nothing_after_the_next_start`] kills.
    #[test]
    fn frozen_until_killed() {
        let Some(path) = std::env::var_os(HELPER_IMAGE) else { return };
        let path = PathBuf::from(path);
        let view = freeze(&Images::new(), &[&path], &[]).unwrap();
        assert_eq!(view.method(), &FreezeMethod::Reflink);
        // And the state between the two calls on file systems without unnamed files.
        let named = scratch::create_named(path.parent().unwrap(), JobId([8; 16]), 0).unwrap();
        println!("ready");
        std::thread::sleep(Duration::from_secs(60));
        drop((view, named));
    }

    #[test]
    fn a_killed_freeze_leaves_nothing_after_the_next_start() {
        let volume = Volume::new("mkfs.xfs");
        let path = volume.root().join("disk.raw");
        fs::write(&path, pattern(65536, 1)).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "images::tests::linux::frozen_until_killed", "--nocapture"]);
        command.env(HELPER_IMAGE, &path);
        let helper = Helper::start(command);
        let spec = machine(&[&path], &[]);
        let swept = Images::new().sweep(std::slice::from_ref(&spec)).unwrap();
        assert_eq!((swept.removed.len(), swept.in_use.len()), (0, 1), "a living job's file was swept");
        drop(helper);
        assert_eq!(names(&volume.root()).len(), 2);
        assert_eq!(Images::new().sweep(&[spec]).unwrap().removed.len(), 1);
        assert_eq!(names(&volume.root()), ["disk.raw"]);
    }
}

/// A machine of two raw images.
struct TwoImages {
    folder: tempfile::TempDir,
    provider: Images,
}

impl crate::conformance::Rig for TwoImages {
    fn provider(&self) -> &dyn Provider {
        &self.provider
    }

    fn machine(&self) -> MachineSpec {
        machine(&[&self.folder.path().join("a.raw"), &self.folder.path().join("b.raw")], &[])
    }

    fn absent(&self) -> MachineSpec {
        machine(&[&self.folder.path().join("c.raw")], &[])
    }

    fn foreign(&self) -> MachineSpec {
        MachineSpec { source: Source::Libvirt(crate::LibvirtSource::default()), ..self.machine() }
    }

    fn fill(&self, range: block_io::ByteRange, byte: u8) {
        let mut file = OpenOptions::new().write(true).open(self.folder.path().join("b.raw")).unwrap();
        file.seek(SeekFrom::Start(range.start)).unwrap();
        file.write_all(&vec![byte; range.len() as usize]).unwrap();
        file.sync_all().unwrap();
    }

    fn tracks(&self) -> bool {
        false
    }

    fn leftovers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        names.filter(|name| name != "a.raw" && name != "b.raw").collect()
    }

    fn folder(&self) -> String {
        self.folder.path().display().to_string()
    }
}

#[test]
fn the_provider_conforms() {
    for provider in [Images::new(), Images::without_reflinks()] {
        let rig = TwoImages { folder: tempfile::tempdir().unwrap(), provider };
        fs::write(rig.folder.path().join("a.raw"), pattern(1 << 20, 3)).unwrap();
        fs::write(rig.folder.path().join("b.raw"), pattern(8 << 20, 5)).unwrap();
        crate::conformance::all(&rig);
    }
}
