//! The public examination that every [`Provider`] must pass, on machines of a real host.
//!
//! A provider's tests give a [`Rig`] and call [`all`]. It panics with what is wrong: it is made for tests.

use std::sync::atomic::{AtomicU64, Ordering};

use block_io::{BlockDevice, ByteRange};
use disk_image::probe::NewDisk;
use model::{
    Consistency, DatasourceId, Identity, JobId, MachineRecovery, Network, Place, PreparedMachine,
    RecoveredDisk, RecoveryPointId, Stop, Unfrozen,
};

use crate::{
    BaseImage, Changed, DiskDescription, FreezeRequest, FrozenView, MachineSpec, Provider, ProviderError,
    TargetRequest,
};

/// One machine of a provider, which can be written to as its user would.
pub trait Rig {
    /// The provider.
    fn provider(&self) -> &dyn Provider;
    /// The machine. Its last disk is the one that is written to, and is at least 8 MiB large.
    fn machine(&self) -> MachineSpec;
    /// A machine that the host does not have.
    fn absent(&self) -> MachineSpec;
    /// A machine of another provider.
    fn foreign(&self) -> MachineSpec;
    /// Writes `byte` all over a range of the last disk, by whatever runs the machine. Multiples of 4096.
    fn fill(&self, range: ByteRange, byte: u8);
    /// Whether the provider tracks changes of this machine: then a list is missing nowhere.
    fn tracks(&self) -> bool;
    /// What of ours is on the host and is needed by no view and no list of changes.
    fn leftovers(&self) -> Vec<String>;
    /// A folder of the host for recovered machines.
    fn folder(&self) -> String;
}

const MIB: u64 = 1 << 20;
/// What the rig writes at least.
const PAGE: usize = 4096;

/// A job that never was, as every run of one is: marks carry its name.
fn job() -> JobId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    JobId(u128::from(NEXT.fetch_add(1, Ordering::Relaxed)).to_be_bytes())
}

fn request(since: Vec<Option<DiskDescription>>) -> FreezeRequest {
    FreezeRequest {
        job: job(),
        wanted: Consistency::Crash,
        unfrozen: Unfrozen::Crash,
        may_retry: false,
        scratch_bytes: 0,
        since,
    }
}

fn view(rig: &dyn Rig, since: Vec<Option<DiskDescription>>) -> Box<dyn FrozenView> {
    let made = rig.provider().freeze(&rig.machine(), &request(since));
    made.unwrap_or_else(|error| panic!("no view: {error}"))
}

fn since(view: &dyn FrozenView) -> Vec<Option<DiskDescription>> {
    view.description().disks.iter().cloned().map(Some).collect()
}

fn content(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; device.size() as usize];
    device.read_at(0, &mut bytes).unwrap_or_else(|error| panic!("a view cannot be read: {error}"));
    bytes
}

fn last(view: &dyn FrozenView) -> Vec<u8> {
    let disk = view.disks().last().unwrap_or_else(|| panic!("a view without disks"));
    content(&*disk.device)
}

fn nothing_left(rig: &dyn Rig, after: &str) {
    let left = rig.leftovers();
    assert!(left.is_empty(), "after {after} there is still: {left:?}");
}

/// Runs every check. The machine may be running or not; it is written to.
pub fn all(rig: &dyn Rig) {
    a_machine_is_described(rig);
    what_is_not_there_is_refused(rig);
    a_view_is_what_it_says(rig);
    a_view_stands_still_or_says_so(rig);
    a_list_has_every_change(rig);
    a_list_is_for_the_disk_that_was_seen(rig);
    two_views_do_not_disturb_each_other(rig);
    a_sweep_leaves_the_living_alone(rig);
    a_machine_is_made_of_what_is_there(rig);
    a_machine_goes_back_or_stays(rig);
}

/// Looking changes nothing and finds the same twice.
pub fn a_machine_is_described(rig: &dyn Rig) {
    let look = || rig.provider().inspect(&rig.machine()).unwrap_or_else(|error| panic!("no look: {error}"));
    let (found, again) = (look(), look());
    assert_eq!(found, again, "two looks");
    assert_eq!((found.id, &*found.provider), (rig.machine().id, rig.provider().name()));
    let mut keys: Vec<&str> = found.disks.iter().map(|disk| &*disk.key).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), found.disks.len(), "a key names one disk");
    assert!(found.disks.iter().all(|disk| disk.size > 0 && matches!(disk.sector, 512 | 4096)), "{found:?}");
    nothing_left(rig, "a look");
}

/// A machine that is not there, or is another provider's, is refused by every call.
pub fn what_is_not_there_is_refused(rig: &dyn Rig) {
    let absent = rig.absent();
    let told = rig.provider().inspect(&absent).err();
    assert!(matches!(told, Some(ProviderError::Missing { .. })), "{told:?}");
    let told = rig.provider().freeze(&absent, &request(Vec::new())).err();
    assert!(matches!(told, Some(ProviderError::Missing { .. })), "{told:?}");

    let foreign = rig.foreign();
    let told = rig.provider().inspect(&foreign).err();
    assert!(matches!(told, Some(ProviderError::Unsupported { .. })), "{told:?}");
    let told = rig.provider().freeze(&foreign, &request(Vec::new())).err();
    assert!(matches!(told, Some(ProviderError::Unsupported { .. })), "{told:?}");
    nothing_left(rig, "refusals");
}

/// Devices are as described, read as devices must, and no more is claimed than was proved.
pub fn a_view_is_what_it_says(rig: &dyn Rig) {
    let view = view(rig, Vec::new());
    assert_eq!(view.description().id, rig.machine().id);
    assert_ne!(view.consistency(), Consistency::Application, "nobody in the machine said so");
    let described: Vec<&DiskDescription> = view.disks().iter().map(|disk| &disk.description).collect();
    assert_eq!(described, view.description().disks.iter().collect::<Vec<_>>());
    for disk in view.disks() {
        let (device, told) = (&*disk.device, &disk.description);
        assert_eq!((device.size(), device.logical_sector_size()), (told.size, told.sector), "{}", told.key);
        let first = content(device);
        block_io::conformance::examine(device, &first);
        let Changed::Unknown { because } = &disk.changed else {
            panic!("{}: changes since nothing are listed", told.key)
        };
        assert!(!because.is_empty());
    }
    for _ in 0..2 {
        view.verify_unchanged().unwrap_or_else(|error| panic!("nobody wrote: {error}"));
    }
    drop(view);
    nothing_left(rig, "a view");
}

/// What is written meanwhile is not in the view; or it is no view any more, and stays none (S17).
pub fn a_view_stands_still_or_says_so(rig: &dyn Rig) {
    let place = ByteRange { start: 3 * MIB, end: 4 * MIB };
    rig.fill(place, 0x11);
    let view = view(rig, Vec::new());
    let before = last(&*view);
    rig.fill(place, 0x22);
    let after = last(&*view);
    match view.verify_unchanged() {
        Ok(()) => assert!(before == after, "the view changed and does not say so"),
        Err(told) => {
            assert!(matches!(told, ProviderError::Changed { .. }), "{told:?}");
            assert!(view.verify_unchanged().is_err(), "what failed once goes on failing");
        }
    }
    drop(view);
    nothing_left(rig, "a view that was written under");
}

/// A list of changes may name too much, never too little; also where a view in between came to nothing (INV-22).
pub fn a_list_has_every_change(rig: &dyn Rig) {
    let first = view(rig, Vec::new());
    let (known, before) = (since(&*first), last(&*first));
    drop(first);
    rig.fill(ByteRange { start: 5 * MIB, end: 5 * MIB + 8192 }, 0x33);
    let second = view(rig, known.clone());
    covers(rig, &*second, &before);
    drop(second);
    // The point of the second view was never made.
    rig.fill(ByteRange { start: 6 * MIB, end: 6 * MIB + 4096 }, 0x44);
    let third = view(rig, known);
    let now = last(&*third);
    assert!(now[5 * MIB as usize] == 0x33 && now[6 * MIB as usize] == 0x44, "writes are in the view");
    covers(rig, &*third, &before);
    // And from one view to the next.
    let known = since(&*third);
    drop(third);
    rig.fill(ByteRange { start: 7 * MIB, end: 7 * MIB + 4096 }, 0x55);
    covers(rig, &*view(rig, known), &now);
    nothing_left(rig, "views with lists");
}

fn covers(rig: &dyn Rig, view: &dyn FrozenView, before: &[u8]) {
    let Some(disk) = view.disks().last() else { return };
    let now = content(&*disk.device);
    assert_eq!(now.len(), before.len());
    match &disk.changed {
        Changed::Unknown { because } => assert!(!because.is_empty() && !rig.tracks(), "no list: {because}"),
        Changed::Listed { ranges, because } => {
            assert!(!because.is_empty(), "it is not said by what");
            for (at, (now, before)) in now.chunks(PAGE).zip(before.chunks(PAGE)).enumerate() {
                let (start, end) = ((at * PAGE) as u64, (at * PAGE + now.len()) as u64);
                let is_listed = ranges.contains(start) && ranges.contains(end - 1);
                assert!(
                    now == before || is_listed,
                    "what is at {start} changed and is not listed ({because})"
                );
            }
        }
    }
}

/// A description of something else gets no list.
pub fn a_list_is_for_the_disk_that_was_seen(rig: &dyn Rig) {
    let first = view(rig, Vec::new());
    let known = since(&*first);
    drop(first);
    let larger = known.iter().flatten().map(|disk| {
        let size = disk.size + MIB;
        Some(DiskDescription { size, ..disk.clone() })
    });
    let nameless = known.iter().flatten().map(|disk| {
        let properties = disk.properties.keys().map(|name| (name.clone(), "another".to_owned())).collect();
        Some(DiskDescription { properties, ..disk.clone() })
    });
    for wrong in [larger.collect::<Vec<_>>(), nameless.collect()] {
        let view = view(rig, wrong);
        let listed = view.disks().iter().find(|disk| matches!(disk.changed, Changed::Listed { .. }));
        assert!(listed.is_none(), "a list since a disk that never was");
    }
    // More of them than disks.
    let many = known.iter().chain(&known).cloned().collect();
    drop(view(rig, many));
    nothing_left(rig, "descriptions of other disks");
}

/// Two at once: refused as in use, or both are right.
pub fn two_views_do_not_disturb_each_other(rig: &dyn Rig) {
    let first = view(rig, Vec::new());
    let before = last(&*first);
    match rig.provider().freeze(&rig.machine(), &request(Vec::new())) {
        Ok(second) => drop(second),
        Err(ProviderError::Locked { .. }) => {}
        Err(other) => panic!("the second view: {other:?}"),
    }
    first.verify_unchanged().unwrap_or_else(|error| panic!("by a second one: {error}"));
    assert!(last(&*first) == before, "the first view changed by the second");
    drop(first);
    // Whoever was refused comes later.
    drop(view(rig, Vec::new()));
    nothing_left(rig, "two views");
}

/// A sweep takes nothing from a living view, and finds nothing after it (INV-21, S32).
pub fn a_sweep_leaves_the_living_alone(rig: &dyn Rig) {
    let sweep = || rig.provider().sweep(&[rig.machine()]).unwrap_or_else(|error| panic!("no sweep: {error}"));
    let first = view(rig, Vec::new());
    let before = last(&*first);
    let swept = sweep();
    assert!(swept.removed.is_empty(), "{:?}", swept.removed);
    first.verify_unchanged().unwrap_or_else(|error| panic!("swept away: {error}"));
    assert!(last(&*first) == before, "the view changed by a sweep");
    drop(first);
    let swept = sweep();
    assert!(swept.removed.is_empty() && swept.troubles.is_empty(), "{swept:?}");
    rig.provider()
        .sweep(&[rig.absent()])
        .unwrap_or_else(|error| panic!("a machine that left cannot be swept: {error}"));
}

fn recovery(rig: &dyn Rig, view: &dyn FrozenView) -> MachineRecovery {
    let job = job();
    let text = |what: Result<String, serde_json::Error>| what.unwrap_or_else(|error| panic!("{error}"));
    let disks = view.description().disks.iter().zip(0..).map(|(disk, number)| RecoveredDisk {
        disk: number,
        size: disk.size,
        sector: disk.sector,
        description: text(serde_json::to_string(disk)),
        data_bytes: disk.size,
        changed_bytes: 0,
    });
    MachineRecovery {
        job,
        point: RecoveryPointId(job.0),
        machine: view.description().id,
        machine_name: view.description().name.clone(),
        spec: text(serde_json::to_string(&rig.machine())),
        configuration: view.configuration().to_owned(),
        disks: disks.collect(),
        place: Place::Elsewhere { folder: Some(rig.folder()), format: None },
        name: Some("conformance".to_owned()),
        identity: Identity::New,
        network: Network::Disconnect,
        start: false,
        keep_seconds: MachineRecovery::KEEP_SECONDS,
    }
}

fn known(rig: &dyn Rig, id: DatasourceId) -> bool {
    let listed = rig.provider().inventory().unwrap_or_else(|error| panic!("no inventory: {error}"));
    listed.iter().any(|machine| machine.id == id)
}

/// A machine is recovered of its own definition and of disks that are there, once; nonsense is refused before anything is made.
///
/// A provider whose machines have no definition refuses all of it.
pub fn a_machine_is_made_of_what_is_there(rig: &dyn Rig) {
    let new = DatasourceId([0x77; 16]);
    let provider = rig.provider();
    let view = view(rig, Vec::new());
    let asked = recovery(rig, &*view);
    let foreign = serde_json::to_string(&rig.foreign()).unwrap_or_default();
    let elsewhere =
        |format: &str| Place::Elsewhere { folder: Some(rig.folder()), format: Some(format.into()) };
    let nowhere = Place::Elsewhere { folder: Some("/nonexistent/folder".into()), format: None };
    for (what, wrong) in [
        ("another provider's machine", MachineRecovery { spec: foreign, ..asked.clone() }),
        ("a definition that is none", MachineRecovery { spec: "{".to_owned(), ..asked.clone() }),
        ("a configuration that is none", MachineRecovery { configuration: "?".to_owned(), ..asked.clone() }),
        ("no disks", MachineRecovery { disks: Vec::new(), ..asked.clone() }),
        ("no name", MachineRecovery { name: Some(String::new()), ..asked.clone() }),
        ("a name that is a way", MachineRecovery { name: Some("../x".to_owned()), ..asked.clone() }),
        ("an unknown format", MachineRecovery { place: elsewhere("floppy"), ..asked.clone() }),
        ("no folder", MachineRecovery { place: nowhere, ..asked.clone() }),
    ] {
        assert!(provider.prepare_machine(&wrong, new).is_err(), "{what} is taken");
    }
    let prepared = match provider.prepare_machine(&asked, new) {
        Ok(prepared) => prepared,
        Err(ProviderError::Unsupported { .. }) if view.configuration().is_empty() => return,
        Err(other) => panic!("{other:?}"),
    };
    assert_eq!((prepared.id, &*prepared.name), (new, "conformance"));
    assert!(provider.complete_machine(&asked, &prepared).is_err(), "a machine of disks that are not there");
    assert!(!known(rig, new));
    fill(&asked, &prepared, &contents(&*view), provider);
    drop(view);
    let complete = || provider.complete_machine(&asked, &prepared);
    let made = complete().unwrap_or_else(|error| panic!("not made: {error}"));
    assert_eq!((made.id, &*made.name, made.started), (new, "conformance", false));
    let again = complete().unwrap_or_else(|error| panic!("the answer was lost, and then: {error}"));
    assert_eq!((again.id, again.name), (made.id, made.name));
    provider.abandon_machine(&asked, &prepared).unwrap_or_else(|error| panic!("{error}"));
    assert!(known(rig, new), "abandoned after it was made");
    assert!(provider.prepare_machine(&asked, DatasourceId([0x78; 16])).is_err(), "the name is taken");
    nothing_left(rig, "a recovery");
}

/// A machine goes back to what it was, or stays what it is where that is given up (S151).
///
/// A provider whose machines have no definition refuses it.
pub fn a_machine_goes_back_or_stays(rig: &dyn Rig) {
    let provider = rig.provider();
    let place = ByteRange { start: MIB, end: MIB + 65_536 };
    let first = view(rig, Vec::new());
    let (disks, before) = (contents(&*first), last(&*first));
    let original = || MachineRecovery {
        place: Place::Original { stop: Some(Stop::Now) },
        name: None,
        identity: Identity::Keep,
        network: Network::Keep,
        ..recovery(rig, &*first)
    };
    let (given_up, asked) = (original(), original());
    let has_definition = !first.configuration().is_empty();
    drop(first);
    rig.fill(place, 0x66);
    let prepare = |asked: &MachineRecovery| provider.prepare_machine(asked, asked.machine);
    let prepared = match prepare(&given_up) {
        Ok(prepared) => prepared,
        Err(ProviderError::Unsupported { .. }) if !has_definition => return,
        Err(other) => panic!("{other:?}"),
    };
    let some =
        PreparedMachine { disks: prepared.disks.iter().skip(1).cloned().collect(), ..prepared.clone() };
    assert!(provider.complete_machine(&given_up, &prepared).is_err(), "disks that are not there");
    fill(&given_up, &prepared, &disks, provider);
    assert!(provider.complete_machine(&given_up, &some).is_err(), "some of the disks");
    for _ in 0..2 {
        provider.abandon_machine(&given_up, &prepared).unwrap_or_else(|error| panic!("{error}"));
    }
    nothing_left(rig, "a recovery that was given up");
    let now = last(&*view(rig, Vec::new()));
    assert!(now[place.start as usize] == 0x66, "a recovery that was given up changed the machine");

    let prepared = prepare(&asked).unwrap_or_else(|error| panic!("{error}"));
    fill(&asked, &prepared, &disks, provider);
    for _ in 0..2 {
        let made = provider.complete_machine(&asked, &prepared);
        let made = made.unwrap_or_else(|error| panic!("not completed: {error}"));
        assert_eq!(made.id, asked.machine);
    }
    provider.abandon_machine(&asked, &prepared).unwrap_or_else(|error| panic!("{error}"));
    assert!(last(&*view(rig, Vec::new())) == before, "it is not what it was");
    nothing_left(rig, "a recovery to the original");
}

fn contents(view: &dyn FrozenView) -> Vec<(DiskDescription, Vec<u8>)> {
    view.disks().iter().map(|disk| (disk.description.clone(), content(&*disk.device))).collect()
}

/// Fills every disk that was prepared, as a transfer does: what is zero on a new disk is left out.
fn fill(
    asked: &MachineRecovery,
    prepared: &PreparedMachine,
    disks: &[(DiskDescription, Vec<u8>)],
    provider: &dyn Provider,
) {
    assert_eq!(prepared.disks.len(), disks.len());
    let format = |word: &str| word.parse().unwrap_or_else(|_| panic!("format {word:?}"));
    for (disk, (described, bytes)) in prepared.disks.iter().zip(disks) {
        assert!(!std::path::Path::new(&disk.path).exists(), "{} is there already", disk.path);
        let request = TargetRequest {
            path: disk.path.clone().into(),
            format: format(&disk.format),
            new: NewDisk {
                size: described.size,
                logical_sector_size: described.sector,
                fixed: false,
                ids: [[1; 16], [2; 16], [3; 16]],
                created: 0,
            },
            point: asked.point,
            disk: described.key.clone(),
            overwrite: false,
            over: disk.over.as_ref().map(|base| BaseImage {
                path: base.path.clone().into(),
                format: format(&base.format),
                allow_backing: base.folders.iter().map(Into::into).collect(),
            }),
        };
        let target = provider.recovery_target(&request).unwrap_or_else(|error| panic!("{error}"));
        let (device, fresh) = (target.device(), target.fresh());
        for (part, at) in bytes.chunks(MIB as usize).zip((0..).step_by(MIB as usize)) {
            if !fresh || part.iter().any(|&byte| byte != 0) {
                device.write_at(at, part).unwrap_or_else(|error| panic!("{error}"));
            }
        }
        drop(device);
        target.finish(true).unwrap_or_else(|error| panic!("{error}"));
    }
}
