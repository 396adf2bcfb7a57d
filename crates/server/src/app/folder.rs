//! The data folder: making it, finding out that it is none, its secret, its kit.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use environment::{Files, FolderFiles};
use model::{Code, PoolId, Problem};
use storage_pool::format::twin;
use storage_pool::keys::Secret;
use storage_pool::kit::{self, Recipient, RecipientId};
use storage_pool::{Access, Damage, Pool, PoolError, Settings, World};

const SECRET_NAME: &str = "keys/server.secret";
/// Stands in a folder that is being made, locked by whoever makes it, and names the kit that is written meanwhile. A
/// folder that has it was never told to anybody: what a crash left of it is taken away and made again.
const CREATING_NAME: &str = "creating";

/// A data folder by its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFolder {
    /// The folder.
    pub root: PathBuf,
}

/// What a new pool is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPool {
    /// Settings fixed for ever.
    pub settings: Settings,
    /// Where the recovery kit goes; [`default_kit_path`] if absent.
    pub kit: Option<PathBuf>,
}

/// How a data folder is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderOptions {
    /// Make the pool if the folder is missing or empty.
    pub create: Option<NewPool>,
    /// Refuse any other pool.
    pub pool: Option<PoolId>,
    /// Open for writing.
    pub writes: bool,
}

/// An opened data folder.
pub struct Opened {
    /// The pool.
    pub pool: Arc<Pool>,
    /// The server's own way into it.
    pub recipient: Recipient,
    /// The kit that was written, if the pool was made just now.
    pub created_kit: Option<PathBuf>,
    /// Damage met on the way.
    pub damage: Vec<Damage>,
}

/// Where the kit goes when nobody says: beside the folder, never in it.
pub fn default_kit_path(root: &Path) -> PathBuf {
    let mut name = root.file_name().map_or_else(|| "stillpoint".into(), std::ffi::OsStr::to_owned);
    name.push("-recovery-kit.txt");
    root.with_file_name(name)
}

fn no_data(root: &Path, why: &str) -> Problem {
    Problem::new(Code::DataFolderMissing, format!("{} {why}.", root.display()))
        .about(root.display().to_string())
}

fn io_problem(path: &Path, action: &str, error: &io::Error) -> Problem {
    let code = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::PoolFull,
        _ => Code::PoolIo,
    };
    Problem::new(code, format!("{}: cannot {action}: {error}.", path.display()))
        .about(path.display().to_string())
}

impl DataFolder {
    /// The folder at `root`.
    pub fn new(root: impl Into<PathBuf>) -> DataFolder {
        DataFolder { root: root.into() }
    }

    /// The pool's folder.
    pub fn pool(&self) -> PathBuf {
        self.root.join("pool")
    }

    /// The catalog's folder.
    pub fn catalog(&self) -> PathBuf {
        self.root.join("catalog")
    }

    /// Whether there is nothing at all.
    fn is_empty(&self) -> Result<bool, Problem> {
        match std::fs::read_dir(&self.root) {
            Ok(mut entries) => Ok(entries.next().is_none()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(io_problem(&self.root, "list", &error)),
        }
    }

    /// Opens the folder, or makes it where that is wanted and nothing is there.
    pub fn open(&self, world: &World, options: &FolderOptions, name: &str) -> Result<Opened, Problem> {
        if self.is_empty()? {
            return match &options.create {
                None if self.root.exists() => {
                    Err(no_data(&self.root, "is empty: it holds no Stillpoint data"))
                }
                None => Err(no_data(&self.root, "does not exist")),
                Some(_) if options.pool.is_some() => {
                    Err(no_data(&self.root, "holds no pool, and --pool-id asks for one that exists"))
                }
                Some(new) => self.create(world, new, name),
            };
        }
        if self.root.join(CREATING_NAME).exists() {
            return match &options.create {
                Some(new) if options.pool.is_none() => {
                    self.clear_unfinished()?;
                    self.create(world, new, name)
                }
                _ => {
                    Err(no_data(&self.root, "was being made when the machine stopped, and holds nothing yet")
                        .hint("Run the command that makes it again."))
                }
            };
        }
        let has_secret = self.root.join(SECRET_NAME).exists();
        let has_pool = self.pool().join("pool.stillpoint").exists();
        if !has_secret && !has_pool {
            // An unfinished creation left nothing that counts; anything else is somebody's other data.
            return Err(no_data(&self.root, "is not empty and holds no Stillpoint data"));
        }
        if !has_pool {
            return Err(Problem::new(
                Code::DataFolderMissing,
                format!(
                    "{} holds no pool, although its key is there: is the pool's file system mounted?",
                    self.pool().display()
                ),
            ));
        }
        let (recipient, server, secret_damage) = read_secret(&self.root).map_err(|problem| {
            if has_secret {
                return problem;
            }
            problem.hint(format!(
                "If the machine stopped while the folder was being made, remove {} and its recovery kit and start again. \
                 Otherwise recover with the kit: `stillpoint recover disk --pool {} --kit FILE ..`.",
                self.root.display(),
                self.pool().display()
            ))
        })?;
        if let Some(expected) = options.pool
            && expected != recipient.pool
        {
            return Err(jobs::problem::pool(PoolError::OtherPool { expected, found: recipient.pool }));
        }
        let access =
            if options.writes { Access::Write { server, name: name.to_owned() } } else { Access::Read };
        let pool = Pool::open(world.clone(), &recipient, access).map_err(jobs::problem::pool)?;
        if options.writes {
            // The key beside the pool comes into being as the pool's files do.
            for place in [self.pool(), self.root.clone()] {
                FolderFiles::new(&place)
                    .sweep_staging()
                    .map_err(|error| io_problem(&place, "sweep staging in", &error))?;
            }
        }
        let mut damage: Vec<Damage> = secret_damage.into_iter().collect();
        // Whoever writes has the index open; a reader hears of its damage from what reads it.
        damage.extend(pool.notes_at_hand());
        Ok(Opened { pool: Arc::new(pool), recipient, created_kit: None, damage })
    }

    /// Takes over a pool that was copied or mounted as `pool/` into a folder that has no key of its own: the kit opens it,
    /// the folder gets a key of its own, and whatever server wrote to this pool before may not write to it any more.
    ///
    /// Nobody can tell whether a copy is the newest state of its pool. So no change list is believed until everything
    /// was read once (INV-22).
    pub fn adopt(&self, world: &World, kit: &Path, name: &str) -> Result<PoolId, Problem> {
        let secret = self.root.join(SECRET_NAME);
        if secret.exists() {
            return Err(Problem::new(
                Code::TargetExists,
                format!("{} exists: this data folder has its own key and needs no kit.", secret.display()),
            )
            .about(self.root.display().to_string())
            .hint("Leave out --kit."));
        }
        if !self.pool().join("pool.stillpoint").exists() {
            return Err(no_data(&self.root, "has no pool/pool.stillpoint")
                .hint("Copy or mount the pool as the folder `pool` in it, then give its recovery kit."));
        }
        let kit = open_kit(kit)?.recipient;
        let mut server = [0u8; 16];
        world
            .randomness
            .fill(&mut server)
            .map_err(|error| Problem::new(Code::Internal, format!("No random bytes: {error}.")))?;
        let access = Access::Write { server, name: name.to_owned() };
        let pool = Pool::open(world.clone(), &kit, access).map_err(jobs::problem::pool)?;
        let head = pool.state().head;
        pool.put_document(jobs::synchronize::DOUBT_DOCUMENT, Some(head.to_string().as_bytes()))
            .map_err(jobs::problem::pool)?;
        let problem = std::cell::RefCell::new(None);
        // The key file of the pool first, the secret that opens it last: a folder with a secret is a finished one.
        pool.add_recipient(storage_pool::recipients::RecipientKind::Server, &mut |recipient| {
            let kept = write_secret(&self.root, recipient, &server)
                .and_then(|()| read_secret(&self.root).map(|(recipient, _, _)| recipient));
            kept.map_err(|error| {
                let message = error.message.clone();
                problem.borrow_mut().replace(error);
                PoolError::Misuse(message)
            })
        })
        .map_err(|error| problem.into_inner().unwrap_or_else(|| jobs::problem::pool(error)))?;
        Ok(kit.pool)
    }

    /// Damage of the files of the folder that are not the pool's.
    pub(crate) fn examine(&self) -> Vec<Damage> {
        match read_secret(&self.root) {
            Ok((_, _, damage)) => damage.into_iter().collect(),
            Err(problem) => vec![Damage::File {
                path: self.root.join(SECRET_NAME).display().to_string(),
                offset: 0,
                reason: problem.message,
                derived: false,
            }],
        }
    }

    /// Marks the folder as unfinished, durable, and holds the mark's lock until the result is dropped.
    fn mark_creation(&self, kit: &Path) -> Result<std::fs::File, Problem> {
        use std::io::Write;
        let failed = |error: io::Error| io_problem(&self.root, "begin", &error);
        std::fs::create_dir_all(&self.root).map_err(failed)?;
        let mut mark = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(self.root.join(CREATING_NAME))
            .map_err(failed)?;
        mark.try_lock().map_err(|error| failed(error.into()))?;
        writeln!(mark, "{}", kit.display()).and_then(|()| mark.sync_all()).map_err(failed)?;
        std::fs::File::open(&self.root).and_then(|folder| folder.sync_all()).map_err(failed)?;
        Ok(mark)
    }

    /// Takes away what an interrupted creation left: only what the mark proves to be of a folder that nobody was told of.
    fn clear_unfinished(&self) -> Result<(), Problem> {
        let mark = self.root.join(CREATING_NAME);
        let failed = |error: io::Error| io_problem(&self.root, "clear the unfinished creation of", &error);
        let file = std::fs::File::open(&mark).map_err(failed)?;
        if file.try_lock().is_err() {
            return Err(Problem::new(
                Code::PoolBusy,
                format!("{} is being made just now.", self.root.display()),
            )
            .about(self.root.display().to_string()));
        }
        let holds_data =
            std::fs::read_dir(self.pool().join("packs")).is_ok_and(|mut packs| packs.next().is_some());
        if holds_data {
            return Err(Problem::new(
                Code::DataFolderMissing,
                format!("{} is marked as unfinished, yet its pool holds data.", self.root.display()),
            )
            .hint(format!("If that is right, remove {} and run the command again.", mark.display())));
        }
        let kit = std::fs::read_to_string(&mark).map_err(failed)?;
        let gone = |result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        };
        // A mark whose text was not durable names no kit; then there is none.
        if let Some(kit) = kit.strip_suffix('\n').filter(|kit| !kit.is_empty()) {
            gone(std::fs::remove_file(kit))?;
        }
        for folder in [self.pool(), self.root.join("keys"), self.root.join("staging")] {
            gone(std::fs::remove_dir_all(folder))?;
        }
        gone(std::fs::remove_file(&mark))
    }

    fn create(&self, world: &World, new: &NewPool, name: &str) -> Result<Opened, Problem> {
        let kit_path = new.kit.clone().unwrap_or_else(|| default_kit_path(&self.root));
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        if absolute(&kit_path).starts_with(absolute(&self.root)) {
            return Err(Problem::new(
                Code::KitNotWritten,
                format!("{} is inside the data folder: a kit there is lost with it.", kit_path.display()),
            ));
        }
        if kit_path.exists() {
            return Err(Problem::new(
                Code::KitNotWritten,
                format!("{} exists and may be the only kit of another pool.", kit_path.display()),
            )
            .hint("Move it away, or name another place with --recovery-kit FILE."));
        }
        let existed = self.root.exists();
        let mark = self.mark_creation(&absolute(&kit_path))?;
        let made = self.fill(world, new, name, &kit_path);
        drop(mark);
        if made.is_err() {
            // What could not be made leaves nothing behind. If even that fails, the mark stays and the next try clears.
            let cleared = self.clear_unfinished();
            if cleared.is_ok() && !existed {
                let _ = std::fs::remove_dir(&self.root);
            }
        }
        made
    }

    /// Makes what a marked folder holds, and takes the mark away last.
    fn fill(&self, world: &World, new: &NewPool, name: &str, kit_path: &Path) -> Result<Opened, Problem> {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let mut server = [0u8; 16];
        world
            .randomness
            .fill(&mut server)
            .map_err(|error| Problem::new(Code::Internal, format!("No random bytes: {error}.")))?;
        let place = format!("{} on {name}", absolute(&self.pool()).display());
        let kit_problem = std::cell::RefCell::new(None);
        let created = Pool::create(world.clone(), new.settings, server, name, &mut |recipient| {
            write_kit(kit_path, recipient, &place, false).map_err(|problem| {
                let message = problem.message.clone();
                kit_problem.borrow_mut().replace(problem);
                PoolError::Misuse(message)
            })
        })
        .map_err(|error| kit_problem.into_inner().unwrap_or_else(|| jobs::problem::pool(error)))?;
        write_secret(&self.root, &created.server, &server)?;
        std::fs::remove_file(self.root.join(CREATING_NAME))
            .and_then(|()| std::fs::File::open(&self.root)?.sync_all())
            .map_err(|error| io_problem(&self.root, "finish", &error))?;
        Ok(Opened {
            pool: Arc::new(created.pool),
            recipient: created.server,
            created_kit: Some(kit_path.to_owned()),
            damage: Vec::new(),
        })
    }
}

fn write_secret(root: &Path, recipient: &Recipient, server: &[u8; 16]) -> Result<(), Problem> {
    let mut content = Vec::with_capacity(80);
    content.extend_from_slice(&recipient.pool.0);
    content.extend_from_slice(&recipient.id.0);
    content.extend_from_slice(recipient.secret.expose());
    content.extend_from_slice(server);
    let files = FolderFiles::new(root);
    let write = || -> io::Result<()> {
        files.make_folder("keys")?;
        // Whoever reads the secret can read the pool.
        #[cfg(unix)]
        std::fs::set_permissions(
            root.join("keys"),
            <std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o700),
        )?;
        let mut file = files.create(SECRET_NAME)?;
        file.append(&twin::encode(twin::SECRET, &content))?;
        file.publish()
    };
    write().map_err(|error| io_problem(&root.join(SECRET_NAME), "write", &error))
}

/// The server's way into the pool, the id of its data folder, and what is wrong with one copy of the file.
pub fn read_secret(root: &Path) -> Result<(Recipient, [u8; 16], Option<Damage>), Problem> {
    let path = root.join(SECRET_NAME);
    let bytes = match std::fs::metadata(&path).map(|metadata| metadata.len()) {
        Ok(length) if length <= twin::MAX_BYTES => std::fs::read(&path),
        Ok(length) => Err(io::Error::other(format!("has {length} bytes"))),
        Err(error) => Err(error),
    };
    let bytes = bytes.map_err(|error| {
        Problem::new(Code::KeyMissing, format!("{}: cannot be read: {error}.", path.display()))
            .about(path.display().to_string())
    })?;
    let wrong = |reason: String| {
        Problem::new(Code::KeyWrong, format!("{}: {reason}.", path.display()))
            .about(path.display().to_string())
    };
    let twin = twin::decode(twin::SECRET, &bytes)
        .map_err(|error| wrong(format!("both copies are damaged ({error:?})")))?;
    let content: [u8; 80] = twin
        .content
        .as_slice()
        .try_into()
        .map_err(|_| wrong("the secret has an unexpected length".to_owned()))?;
    let part = |from: usize| -> [u8; 16] { std::array::from_fn(|at| content[from + at]) };
    let recipient = Recipient {
        pool: PoolId(part(0)),
        id: RecipientId(part(16)),
        secret: Secret::from_bytes(std::array::from_fn(|at| content[32 + at])),
    };
    let damage = twin.damage.map(|damage| Damage::File {
        path: path.display().to_string(),
        offset: 0,
        reason: format!("{damage:?}; the other copy serves"),
        derived: false,
    });
    Ok((recipient, part(64), damage))
}

/// Writes a kit, durable, reads it back from its place and gives what was read.
pub(crate) fn write_kit(
    path: &Path,
    recipient: &Recipient,
    place: &str,
    overwrite: bool,
) -> Result<Recipient, Problem> {
    use std::io::Write;
    let failed = |action: &str, error: &io::Error| {
        Problem::new(
            Code::KitNotWritten,
            format!("{}: cannot {action} the recovery kit: {error}.", path.display()),
        )
        .about(path.display().to_string())
    };
    if overwrite && path.exists() {
        std::fs::remove_file(path).map_err(|error| failed("replace", &error))?;
    }
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(|error| failed("create", &error))?;
    let write = file.write_all(kit::write(recipient, place).as_bytes()).and_then(|()| file.sync_all());
    write.map_err(|error| failed("write", &error))?;
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|error| failed("sync", &error))?;
    }
    Ok(open_kit(path)?.recipient)
}

/// Reads a kit from its place.
pub fn open_kit(path: &Path) -> Result<kit::Kit, Problem> {
    let about = path.display().to_string();
    let length = std::fs::metadata(path).map(|metadata| metadata.len());
    let text = match length {
        Ok(length) if length <= 64 * 1024 => std::fs::read(path),
        Ok(_) => Err(io::Error::other("is far too long for a recovery kit")),
        Err(error) => Err(error),
    };
    let text = text.map_err(|error| {
        Problem::new(Code::KeyMissing, format!("{about}: the recovery kit cannot be read: {error}."))
            .about(&about)
    })?;
    kit::read(&String::from_utf8_lossy(&text))
        .map_err(|error| Problem::new(Code::KeyWrong, format!("{about}: {error}.")).about(&about))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use environment::{SystemClock, SystemRandomness};

    use super::*;

    fn world(folder: &DataFolder) -> World {
        World {
            files: Arc::new(FolderFiles::new(folder.pool())),
            clock: Arc::new(SystemClock),
            randomness: Arc::new(SystemRandomness),
        }
    }

    fn options(create: bool) -> FolderOptions {
        let new = NewPool { settings: Settings::without_safety(), kit: None };
        FolderOptions { create: create.then_some(new), pool: None, writes: true }
    }

    /// A creation that stopped anywhere is made again by the same command; one that ended is never touched.
    #[test]
    fn an_unfinished_creation_is_made_again_and_a_finished_one_is_not() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = DataFolder::new(scratch.path().join("data"));
        let kit = default_kit_path(&folder.root);
        let open = |create: bool| folder.open(&world(&folder), &options(create), "test");
        let first = open(true).unwrap();
        let id = first.pool.id();
        assert!(!folder.root.join(CREATING_NAME).exists() && kit.exists());
        drop(first);
        assert_eq!(open(true).unwrap().pool.id(), id);

        // Every prefix of a creation: the mark alone, with the kit, with the pool, with the secret.
        for left in 0..4 {
            for (index, part) in [kit.clone(), folder.pool(), folder.root.join("keys")].iter().enumerate() {
                if left <= index {
                    let _ = std::fs::remove_dir_all(part);
                    let _ = std::fs::remove_file(part);
                }
            }
            std::fs::write(folder.root.join(CREATING_NAME), format!("{}\n", kit.display())).unwrap();
            let refused = open(false).err().unwrap();
            assert_eq!(refused.code, Code::DataFolderMissing, "{left}");
            let again = open(true).unwrap();
            assert_ne!(again.pool.id(), id, "{left}");
            assert!(again.created_kit.is_some() && kit.exists() && !folder.root.join(CREATING_NAME).exists());
        }
    }

    #[test]
    fn a_creation_that_fails_leaves_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = DataFolder::new(scratch.path().join("data"));
        let mut options = options(true);
        if let Some(new) = &mut options.create {
            new.kit = Some(scratch.path().join("no/such/folder/kit.txt"));
        }
        let refused = folder.open(&world(&folder), &options, "test").err().unwrap();
        assert_eq!(refused.code, Code::KitNotWritten);
        assert!(!folder.root.exists());
    }

    #[test]
    fn a_marked_folder_with_data_or_in_the_making_is_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = DataFolder::new(scratch.path().join("data"));
        let open = |create: bool| folder.open(&world(&folder), &options(create), "test");
        drop(open(true).unwrap());
        let mark = folder.root.join(CREATING_NAME);
        std::fs::write(&mark, "\n").unwrap();
        std::fs::create_dir_all(folder.pool().join("packs/ab")).unwrap();
        assert_eq!(open(true).err().unwrap().code, Code::DataFolderMissing);
        std::fs::remove_dir_all(folder.pool().join("packs/ab")).unwrap();
        let held = std::fs::File::open(&mark).unwrap();
        held.try_lock().unwrap();
        assert_eq!(open(true).err().unwrap().code, Code::PoolBusy);
        assert!(folder.pool().join("pool.stillpoint").exists());
    }
}
