//! A data folder under kills, and the ledger outside of it: what was acknowledged, and the hash of every disk then.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use environment::SeededRandomness;
use rustix::process::{Pid, Signal, kill_process};

use crate::machines::{Machine, hash_of};
use crate::network::{HOST, Victim};
use crate::program::{Ended, Program, Running};

/// States in which a point can be recovered from without a word of doubt.
const GOOD: [&str; 3] = ["committed", "verified", "restore-tested"];
/// States of a point that was given up.
const GONE: [&str; 2] = ["soft-deleted", "expired"];
/// At most so many machines at a time.
const MOST_MACHINES: usize = 4;

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Add,
    Protect,
    List,
    FullScan,
    Check,
    Prune,
    Reclaim,
    Delete,
    Remove,
    Recover,
    Rebuild,
    Verify,
    Copy,
}

/// How often each is killed, in proportion.
const MIX: [(Kind, u64); 13] = [
    (Kind::Add, 3),
    (Kind::Protect, 14),
    (Kind::List, 16),
    (Kind::FullScan, 14),
    (Kind::Check, 4),
    (Kind::Prune, 10),
    (Kind::Reclaim, 16),
    (Kind::Delete, 8),
    (Kind::Remove, 3),
    (Kind::Recover, 10),
    (Kind::Rebuild, 6),
    (Kind::Verify, 4),
    (Kind::Copy, 8),
];

/// A command that will be killed, and what it may change.
struct Plan {
    kind: Kind,
    words: Vec<String>,
    /// The machine it is about.
    machine: Option<usize>,
    /// Points that it gives up.
    going: BTreeSet<String>,
    /// The file that it writes: with the hash that it will have.
    target: Option<(PathBuf, blake3::Hash)>,
}

/// A point as the ledger has it.
struct Entry {
    machine: String,
    disks: Vec<blake3::Hash>,
}

#[derive(Default)]
struct Tally {
    kills: u32,
    hit: u32,
    told: u32,
}

/// Everything.
pub struct World {
    folder: PathBuf,
    program: Program,
    random: SeededRandomness,
    machines: Vec<Machine>,
    machines_made: u64,
    ledger: BTreeMap<String, Entry>,
    /// Points by the last listing, oldest first: id and machine.
    live: Vec<(String, String)>,
    /// How long a command takes, by what was seen.
    seconds: HashMap<Kind, f64>,
    tally: BTreeMap<Kind, Tally>,
    unacknowledged: u32,
    recovered: u32,
    services_hit: u32,
    bytes_freed: u64,
    /// Points were given up since the last whole reclaim.
    has_garbage: bool,
    /// What happens, for the message of a failure.
    story: Vec<String>,
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

impl World {
    /// A world in `folder`, all of it following from `seed`, but for the moments of the kills.
    pub fn new(folder: &Path, seed: u64, has_network: bool) -> World {
        for name in ["images", "recovered"] {
            fs::create_dir(folder.join(name)).unwrap();
        }
        let mut world = World {
            folder: folder.to_owned(),
            program: Program::new(folder, has_network),
            random: SeededRandomness::new(seed),
            machines: Vec::new(),
            machines_made: 0,
            ledger: BTreeMap::new(),
            live: Vec::new(),
            seconds: HashMap::new(),
            tally: BTreeMap::new(),
            unacknowledged: 0,
            recovered: 0,
            services_hit: 0,
            bytes_freed: 0,
            has_garbage: false,
            story: Vec::new(),
        };
        for kind in
            [Kind::Add, Kind::Protect, Kind::Protect, Kind::FullScan, Kind::List, Kind::List, Kind::Recover]
        {
            let plan = world.planned(kind).unwrap();
            world.again(&plan);
        }
        world
    }

    fn below(&self, bound: usize) -> usize {
        self.random.below(bound as u64) as usize
    }

    fn new_machine(&mut self) -> usize {
        let images = self.folder.join("images");
        self.machines.push(Machine::new(&images, self.machines_made, &self.random));
        self.machines_made += 1;
        self.machines.len() - 1
    }

    fn adding(&self, machine: usize) -> Vec<String> {
        let machine = &self.machines[machine];
        let mut all = words(&["datasource", "add-image", &machine.name]);
        all.extend(machine.disks.iter().map(|disk| self.there(&disk.path)));
        if self.program.network.is_none() {
            all.extend(words(&["--floor-points", "0", "--floor-age", "0s"]));
            all.extend(words(&["--soft-delete", "0s", "--reclaim-hold", "0s"]));
        }
        all
    }

    /// The second copy of the pool.
    fn copy(&self) -> PathBuf {
        self.folder.join("copy")
    }

    /// A path as the command line names it.
    fn there(&self, path: &Path) -> String {
        match self.program.network {
            Some(_) => format!("{HOST}:{}", path.display()),
            None => path.display().to_string(),
        }
    }

    fn points_of(&self, machine: &str) -> Vec<String> {
        self.live.iter().filter(|(_, of)| of == machine).map(|(id, _)| id.clone()).collect()
    }

    /// A machine with or without points.
    fn any(&self, with_points: bool) -> Option<usize> {
        let fit: Vec<usize> = (0..self.machines.len())
            .filter(|&at| {
                let machine = &self.machines[at];
                machine.is_added
                    && !machine.is_removed
                    && with_points != self.points_of(&machine.name).is_empty()
            })
            .collect();
        (!fit.is_empty()).then(|| fit[self.below(fit.len())])
    }

    fn plan(&mut self) -> Plan {
        loop {
            let mut ticket = self.random.below(MIX.iter().map(|(_, share)| share).sum());
            let kind = MIX.iter().find(|(_, share)| {
                let is_it = ticket < *share;
                ticket = ticket.saturating_sub(*share);
                is_it
            });
            if let Some(plan) = self.planned(kind.unwrap().0) {
                return plan;
            }
        }
    }

    /// A plan of this kind, if there is anything to do it with.
    fn planned(&mut self, kind: Kind) -> Option<Plan> {
        let mut plan = Plan { kind, words: Vec::new(), machine: None, going: BTreeSet::new(), target: None };
        match kind {
            Kind::Add => {
                let waiting = self.machines.iter().position(|machine| !machine.is_added);
                let room = self.machines.iter().filter(|machine| !machine.is_removed).count() < MOST_MACHINES;
                let machine = waiting.or_else(|| room.then(|| self.new_machine()))?;
                plan.words = self.adding(machine);
                plan.machine = Some(machine);
            }
            Kind::Protect => {
                let machine = match self.any(false) {
                    Some(machine) => machine,
                    // Its points are given up first, or another machine comes: there is always something to protect.
                    None => {
                        let adding = self.planned(Kind::Add)?;
                        let added = self.program.run(&adding.words);
                        assert_eq!(added.status, Some(0), "{}", added.told());
                        let machine = adding.machine?;
                        self.machines[machine].is_added = true;
                        machine
                    }
                };
                plan.words = words(&["protect", &self.machines[machine].name]);
                plan.machine = Some(machine);
            }
            Kind::List | Kind::FullScan | Kind::Check => {
                let at = self.any(true)?;
                let name = self.machines[at].name.clone();
                let newest = self.points_of(&name).pop()?;
                let (random, folder) = (&self.random, &self.folder);
                let machine = &mut self.machines[at];
                machine.change(random);
                plan.words = match kind {
                    Kind::List => {
                        let mut all = words(&["synchronize", &name]);
                        all.extend(machine.lists(folder));
                        if random.below(2) == 0 {
                            all.extend(["--changed-since".to_owned(), newest]);
                        }
                        all
                    }
                    Kind::FullScan => words(&["synchronize", &name, "--full-scan"]),
                    _ => words(&["check", &name]),
                };
                plan.machine = Some(at);
            }
            Kind::Prune => {
                let keep = 1 + self.below(3);
                plan.words = words(&["prune", "--yes", "--keep-last", &keep.to_string()]);
                let names: Vec<String> = match self.random.below(3) {
                    0 => self.machines.iter().map(|machine| machine.name.clone()).collect(),
                    _ => {
                        let name = self.machines[self.any(true)?].name.clone();
                        plan.words.push(name.clone());
                        vec![name]
                    }
                };
                for name in names {
                    let points = self.points_of(&name);
                    let kept = points.len().saturating_sub(keep);
                    plan.going.extend(points.into_iter().take(kept));
                }
                if plan.going.is_empty() {
                    return None;
                }
            }
            // With nothing to free there is little to kill.
            Kind::Reclaim if !self.has_garbage && self.random.below(5) > 0 => return None,
            Kind::Reclaim => plan.words = words(&["pool", "reclaim", "--yes"]),
            Kind::Delete => {
                let (id, _) = self.live.get(self.below(self.live.len()))?.clone();
                plan.words = words(&["recovery-point", "delete", &id, "--yes"]);
                plan.going.insert(id);
            }
            Kind::Remove => {
                if self.machines.iter().filter(|machine| !machine.is_removed).count() < MOST_MACHINES {
                    return None;
                }
                let machine = self.any(true)?;
                let name = self.machines[machine].name.clone();
                plan.words = words(&["datasource", "remove", &name, "--delete-data", "--yes"]);
                plan.going.extend(self.points_of(&name));
                plan.machine = Some(machine);
                self.machines[machine].is_removed = true;
            }
            Kind::Recover => {
                let (id, machine) = self.live.get(self.below(self.live.len()))?.clone();
                let hashes = &self.ledger[&id].disks;
                let disk = self.below(hashes.len());
                let format = ["raw", "raw", "qcow2", "vhdx"][self.below(4)];
                let path = self.folder.join("recovered").join(format!("{}.{format}", self.story.len()));
                plan.words = words(&["recover", "disk", &machine, "--point", &id]);
                plan.words.extend(words(&["--disk", &disk.to_string(), "--to", &self.there(&path)]));
                plan.target = Some((path, hashes[disk]));
            }
            Kind::Rebuild => plan.words = words(&["catalog", "rebuild"]),
            Kind::Verify => plan.words = words(&["pool", "verify", "--read-data"]),
            Kind::Copy => {
                plan.words = words(&["pool", "copy", "--to"]);
                plan.words.push(self.copy().display().to_string());
            }
        }
        Some(plan)
    }

    /// One kill and all that must hold after it.
    pub fn kill(&mut self, number: u32) {
        let plan = self.plan();
        let usual = self.seconds.get(&plan.kind).copied().unwrap_or(0.08);
        let at = Duration::from_secs_f64(usual * 1.3 * self.random.below(10_000) as f64 / 10_000.0);
        let on_service =
            self.program.network.is_none() && plan.kind == Kind::Reclaim && self.random.below(4) == 0;
        let has_agent = matches!(
            plan.kind,
            Kind::Add | Kind::Protect | Kind::List | Kind::FullScan | Kind::Check | Kind::Recover
        );
        let victim = if has_agent && self.random.below(2) == 0 { Victim::Agent } else { Victim::Server };
        let whom = match (self.program.network.is_some(), on_service) {
            (true, _) => format!("{victim:?}"),
            (_, true) => "deletion service".to_owned(),
            _ => "program".to_owned(),
        };
        self.story.push(format!(
            "kill {number}: {whom} of `{}` after {at:?} of {usual:.3} s",
            plan.words.join(" ")
        ));
        let running = self.program.start(&plan.words);
        let ended = if let Some(network) = &mut self.program.network {
            std::thread::sleep(at);
            network.kill(victim);
            match victim {
                // A command whose server died ends by itself.
                Victim::Server => {
                    let ended = running.end();
                    network.restart(victim);
                    ended
                }
                // The agent is back while the command is still under way.
                Victim::Agent => {
                    network.restart(victim);
                    running.end()
                }
            }
        } else if on_service {
            self.kill_service(running, at)
        } else {
            running.kill_at(at)
        };
        let was_hit = ended.status.is_none() || self.program.network.is_some() && ended.status != Some(0);
        let tally = self.tally.entry(plan.kind).or_default();
        tally.kills += 1;
        tally.hit += u32::from(was_hit);
        tally.told += u32::from(ended.succeeded().is_some());
        // Half of the time the next command meets a deletion service that still lives.
        if self.random.below(2) == 0 {
            self.nobody_lives();
        }
        self.follow(&plan, &ended);
    }

    /// One command while storage does what `arrange` plans, until `settle` makes it good again.
    pub fn disturb(&mut self, arrange: &mut dyn FnMut() -> String, settle: &mut dyn FnMut()) {
        let plan = self.plan();
        self.story.push(format!("{} of `{}`", arrange(), plan.words.join(" ")));
        let ended = self.program.start(&plan.words).end();
        // Its deletion service has the same storage.
        self.nobody_lives();
        settle();
        assert!(!ended.stderr.contains("panicked"), "{}", ended.told());
        let tally = self.tally.entry(plan.kind).or_default();
        tally.kills += 1;
        tally.hit += u32::from(ended.status != Some(0));
        tally.told += u32::from(ended.succeeded().is_some());
        self.story.push(format!("  it ended with {:?}", ended.status));
        self.follow(&plan, &ended);
    }

    /// What must hold after a command that did not come to its end.
    fn follow(&mut self, plan: &Plan, ended: &Ended) {
        self.take_in(plan, ended);
        self.look(Some(plan), ended.succeeded().is_some());
        // Now and then the next kill meets what this one left, with nobody in between.
        if self.random.below(4) > 0 {
            self.again(plan);
        } else if plan.target.is_some() {
            // What a recovery that nobody asks for again has kept.
            fs::remove_dir_all(self.folder.join("recovered")).unwrap();
            fs::create_dir(self.folder.join("recovered")).unwrap();
        }
        self.nobody_lives();
    }

    /// The service is killed, the program must end by itself.
    fn kill_service(&mut self, running: Running, at: Duration) -> Ended {
        std::thread::sleep(at);
        let main = running.id();
        if let Some((id, _)) = self
            .program
            .processes()
            .into_iter()
            .find(|(id, words)| *id != main && words.contains("__deletion-service"))
        {
            // It may have ended in this very moment.
            self.services_hit += u32::from(kill_process(Pid::from_raw(id).unwrap(), Signal::KILL).is_ok());
        }
        running.end()
    }

    fn nobody_lives(&self) {
        let living = self.program.survivors();
        assert!(living.is_empty(), "still alive: {living:?}");
    }

    /// What an ended command acknowledged.
    fn take_in(&mut self, plan: &Plan, ended: &Ended) {
        if let (Some(id), Some(machine)) = (ended.point(), plan.machine) {
            let machine = &mut self.machines[machine];
            let entry = Entry { machine: machine.name.clone(), disks: machine.hashes() };
            machine.was_saved();
            self.ledger.insert(id.to_owned(), entry);
        }
        if plan.kind == Kind::Add
            && ended.of_type("datasource").next().is_some()
            && let Some(machine) = plan.machine
        {
            self.machines[machine].is_added = true;
        }
        self.bytes_freed += ended.figure("bytes_freed").and_then(|bytes| bytes.as_u64()).unwrap_or(0);
        match plan.kind {
            Kind::Reclaim => self.has_garbage &= ended.status != Some(0),
            _ => self.has_garbage |= !plan.going.is_empty(),
        }
        if ended.status == Some(0) {
            let seconds = self.seconds.entry(plan.kind).or_insert(ended.took.as_secs_f64());
            *seconds = *seconds * 0.7 + ended.took.as_secs_f64() * 0.3;
        }
    }

    /// The same command once more, without a kill: it works, and leaves nothing behind.
    fn again(&mut self, plan: &Plan) {
        let mut all = plan.words.clone();
        if plan.target.as_ref().is_some_and(|(path, hash)| path.exists() && hash_of(path) == *hash) {
            // It was killed after the file had got its name.
            all.push("--overwrite".to_owned());
        }
        let ended = self.program.run(&all);
        let is_done = match plan.kind {
            // What was done before the kill is not there to be done again.
            Kind::Delete | Kind::Remove => ended.status == Some(0) || ended.status == Some(4),
            _ => ended.status == Some(0),
        };
        assert!(is_done, "after a kill: {}", ended.told());
        quiet(&ended);
        self.take_in(plan, &ended);
        if let Some((path, hash)) = &plan.target {
            assert_eq!(hash_of(path), *hash, "recovered otherwise: {}", ended.told());
            fs::remove_file(path).unwrap();
            self.recovered += 1;
        }
        self.look(Some(plan), true);
        if plan.kind == Kind::Copy {
            self.recover_from_copy();
        }
        self.no_strays(plan.kind);
    }

    /// A copy that was finished gives back a point that is there now, with the kit alone.
    fn recover_from_copy(&mut self) {
        if self.live.is_empty() {
            return;
        }
        let (id, machine) = self.live[self.below(self.live.len())].clone();
        let hashes = &self.ledger[&id].disks;
        let disk = self.below(hashes.len());
        let path = self.folder.join("recovered").join("from-copy.raw");
        let mut all = words(&["recover", "disk", &machine, "--point", &id, "--disk", &disk.to_string()]);
        let named = [("--pool", self.copy()), ("--kit", self.program.kit()), ("--to", path.clone())];
        for (option, path) in named {
            all.extend([option.to_owned(), path.display().to_string()]);
        }
        let ended = self.program.run_alone(&all);
        assert_eq!(ended.status, Some(0), "from the copy: {}", ended.told());
        quiet(&ended);
        assert_eq!(hash_of(&path), hashes[disk], "recovered otherwise from the copy: {}", ended.told());
        fs::remove_file(&path).unwrap();
        self.recovered += 1;
    }

    /// Compares the program's list of points with the ledger.
    fn look(&mut self, plan: Option<&Plan>, was_done: bool) {
        let ended = self.program.run(&words(&["recovery-point", "list"]));
        assert_eq!(ended.status, Some(0), "{}", ended.told());
        quiet(&ended);
        self.live.clear();
        for point in ended.of_type("recovery-point") {
            let (id, state) = (point["id"].as_str().unwrap(), point["state"].as_str().unwrap());
            if GONE.contains(&state) {
                continue;
            }
            assert!(GOOD.contains(&state), "a point is {state}: {point}");
            let name = point["datasource_name"].as_str().unwrap();
            if !self.ledger.contains_key(id) {
                // Committed, and killed before it could be said: it holds what the machine held then.
                let machine = plan.and_then(|plan| plan.machine).map(|at| &mut self.machines[at]);
                let machine = machine.filter(|machine| machine.name == name);
                let machine = machine.unwrap_or_else(|| panic!("a point out of nowhere: {point}"));
                let entry = Entry { machine: name.to_owned(), disks: machine.hashes() };
                self.ledger.insert(id.to_owned(), entry);
                self.unacknowledged += 1;
            }
            self.live.push((id.to_owned(), name.to_owned()));
        }
        let live: BTreeSet<&String> = self.live.iter().map(|(id, _)| id).collect();
        let none = BTreeSet::new();
        let going = plan.map_or(&none, |plan| &plan.going);
        if was_done && let Some(left) = going.iter().find(|id| live.contains(id)) {
            panic!("point {left} was given up, and is there");
        }
        let lost = self.ledger.iter().find(|(id, _)| !live.contains(id) && !going.contains(*id));
        if let Some((id, entry)) = lost {
            panic!("point {id} of {} was acknowledged and is not listed", entry.machine);
        }
        self.ledger.retain(|id, _| live.contains(id));
    }

    /// Nothing temporary is left, wherever a command may have put something.
    fn no_strays(&self, kind: Kind) {
        let is_reader = matches!(kind, Kind::Verify | Kind::Recover | Kind::Copy);
        // A server at work has its database open, and a reader clears nothing up, because it writes nothing.
        let is_closed = self.program.network.is_none() && !is_reader;
        // A reader's copy of the catalog that has not got its lock's name yet may be a living reader's: for a minute the others
        // leave it alone, and no longer.
        if fs::read_dir(&self.program.temporary).unwrap().flatten().any(|entry| is_just_begun(&entry.path()))
        {
            std::thread::sleep(std::time::Duration::from_secs(61));
            let ended = self.program.run(&words(&["recovery-point", "list"]));
            assert_eq!(ended.status, Some(0), "{}", ended.told());
        }
        let mut strays = Vec::new();
        let mut folders = vec![self.folder.clone()];
        while let Some(folder) = folders.pop() {
            // What a killed copy left there is the next copy's to clear.
            if folder == self.copy() && kind != Kind::Copy {
                continue;
            }
            let is_closed = is_closed || folder.starts_with(self.copy());
            for entry in fs::read_dir(&folder).unwrap().flatten() {
                let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
                let is_stray = folder == self.program.temporary
                    || is_closed && folder.ends_with("staging")
                    || folder.ends_with("recovered")
                    || name.starts_with(".stillpoint-frozen")
                    || [".partial", ".partial.state"].iter().any(|end| name.ends_with(end))
                    || name.contains(".damaged-")
                    || is_closed && [".new", "-wal", "-shm"].iter().any(|end| name.ends_with(end));
                if is_stray {
                    strays.push(path.display().to_string());
                }
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        assert!(strays.is_empty(), "left behind: {strays:?}");
    }

    /// Reads all of the pool, and recovers `most` points at random.
    pub fn examine(&mut self, most: usize) {
        let ended = self.program.run(&words(&["pool", "verify", "--read-data"]));
        assert_eq!(ended.status, Some(0), "{}", ended.told());
        quiet(&ended);
        let mut ids: Vec<String> = self.ledger.keys().cloned().collect();
        while ids.len() > most {
            ids.swap_remove(self.below(ids.len()));
        }
        for id in ids {
            let entry = &self.ledger[&id];
            for (disk, hash) in entry.disks.iter().enumerate() {
                let path = self.folder.join("recovered").join("whole.raw");
                let mut all = words(&["recover", "disk", &entry.machine, "--point", &id]);
                all.extend(words(&["--disk", &disk.to_string(), "--to", &self.there(&path)]));
                let ended = self.program.run(&all);
                assert_eq!(ended.status, Some(0), "{}", ended.told());
                assert_eq!(hash_of(&path), *hash, "recovered otherwise: {}", ended.told());
                fs::remove_file(&path).unwrap();
                self.recovered += 1;
            }
        }
    }

    /// Runs a command, whatever it comes to, and then `settle`: storage lies until then. What the command acknowledged
    /// is in the ledger.
    pub fn work(&mut self, settle: &mut dyn FnMut()) -> bool {
        let plan = self.plan();
        self.story.push(format!("`{}`", plan.words.join(" ")));
        let ended = self.program.run(&plan.words);
        self.nobody_lives();
        settle();
        assert!(!ended.stderr.contains("panicked"), "{}", ended.told());
        self.take_in(&plan, &ended);
        for id in &plan.going {
            self.ledger.remove(id);
        }
        let listed = self.program.run(&words(&["recovery-point", "list"]));
        assert_eq!(listed.status, Some(0), "{}", listed.told());
        self.live.clear();
        for point in listed.of_type("recovery-point") {
            let (id, state) = (point["id"].as_str().unwrap(), point["state"].as_str().unwrap());
            // What was committed and not acknowledged is nobody's promise, and may be given up with the others.
            if !GONE.contains(&state) && self.ledger.contains_key(id) {
                self.live.push((id.to_owned(), point["datasource_name"].as_str().unwrap().to_owned()));
            }
        }
        if let Some((path, hash)) = &plan.target
            && path.exists()
        {
            assert!(
                ended.status != Some(0) || hash_of(path) == *hash,
                "recovered otherwise: {}",
                ended.told()
            );
            fs::remove_file(path).unwrap();
        }
        ended.status == Some(0)
    }

    /// Recovers every point of the ledger: each comes back exactly, or, if `may_be_lost`, an error says that it does
    /// not. Returns how many disks did.
    pub fn recover_all(&mut self, may_be_lost: bool) -> (u32, u32) {
        let (mut exact, mut lost) = (0, 0);
        for (id, entry) in &self.ledger {
            for (disk, hash) in entry.disks.iter().enumerate() {
                let path = self.folder.join("recovered").join("all.raw");
                let mut all = words(&["recover", "disk", &entry.machine, "--point", id]);
                all.extend(words(&["--disk", &disk.to_string(), "--to", &self.there(&path)]));
                let ended = self.program.run(&all);
                assert!(!ended.stderr.contains("panicked"), "{}", ended.told());
                if ended.status == Some(0) {
                    assert_eq!(hash_of(&path), *hash, "recovered otherwise: {}", ended.told());
                    exact += 1;
                } else {
                    assert!(may_be_lost, "{}", ended.told());
                    lost += 1;
                }
                let _ = fs::remove_file(&path);
                let _ = fs::remove_file(path.with_extension("raw.partial"));
                let _ = fs::remove_file(path.with_extension("raw.partial.state"));
            }
        }
        (exact, lost)
    }

    /// The end: everything once more, and equal tables of the catalog.
    pub fn conclude(&mut self) {
        self.examine(usize::MAX);
        if self.program.network.is_some() {
            // A server at work brings its tables up to date by and by.
            self.program.run(&words(&["catalog", "rebuild"]));
        }
        let rebuilt = self.program.run(&words(&["catalog", "rebuild"]));
        let job = rebuilt.succeeded().unwrap_or_else(|| panic!("{}", rebuilt.told()));
        let log = self.program.run(&words(&["job", "log", job["id"].as_str().unwrap()]));
        let was_equal = log.lines.iter().any(|line| line.to_string().contains("were equal"));
        assert!(was_equal, "derived tables: {}", log.told());
        self.no_strays(Kind::Rebuild);
        self.nobody_lives();
    }

    /// What was done, for people.
    pub fn report(&self) -> String {
        let mut text = String::from("              kills  while it ran  after it had acknowledged\n");
        for (kind, tally) in &self.tally {
            let kind = format!("{kind:?}");
            text += &format!("{kind:12} {:6} {:13} {:26}\n", tally.kills, tally.hit, tally.told);
        }
        let sum = |of: fn(&Tally) -> u32| self.tally.values().map(of).sum::<u32>();
        text += &format!(
            "all          {:6} {:13} {:26}\n",
            sum(|it| it.kills),
            sum(|it| it.hit),
            sum(|it| it.told)
        );
        text += &format!(
            "{} points committed and not yet acknowledged when the kill came; {} disks recovered and compared; {} points at the end; {} deletion services killed; {} MiB freed",
            self.unacknowledged,
            self.recovered,
            self.ledger.len(),
            self.services_hit,
            self.bytes_freed >> 20
        );
        text
    }

    /// How many commands were killed, or met an accident.
    pub fn kills(&self) -> u32 {
        self.tally.values().map(|tally| tally.kills).sum()
    }

    /// The same as a line that can be added up.
    pub fn result(&self) -> String {
        let sum = |of: fn(&Tally) -> u32| self.tally.values().map(of).sum::<u32>();
        format!(
            "{} disks recovered and compared, {} of the commands had not ended, {} points committed and not yet acknowledged",
            self.recovered,
            sum(|it| it.hit),
            self.unacknowledged
        )
    }

    /// The last things that happened.
    pub fn story(&self) -> String {
        self.story.iter().rev().take(4).rev().cloned().collect::<Vec<_>>().join("\n")
    }
}

/// Whether this is a reader's copy of the catalog without its lock.
fn is_just_begun(path: &Path) -> bool {
    let is_copy =
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("stillpoint-catalog-"));
    is_copy && !path.join("in-use").exists()
}

/// A kill is no damage: no command after it may speak of any.
fn quiet(ended: &Ended) {
    let warned = ended.stderr.lines().any(|line| line.starts_with("warning:") || line.contains("panicked"));
    assert!(!warned, "{}", ended.told());
}
