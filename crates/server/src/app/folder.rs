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
            FolderFiles::new(self.pool())
                .sweep_staging()
                .map_err(|error| io_problem(&self.pool(), "sweep staging in", &error))?;
        }
        let mut damage: Vec<Damage> = secret_damage.into_iter().collect();
        damage.extend(pool.notes().iter().cloned());
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
        pool.add_kit(&mut |recipient| {
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
        let mut server = [0u8; 16];
        world
            .randomness
            .fill(&mut server)
            .map_err(|error| Problem::new(Code::Internal, format!("No random bytes: {error}.")))?;
        let place = format!("{} on {name}", absolute(&self.pool()).display());
        let kit_problem = std::cell::RefCell::new(None);
        let created = Pool::create(world.clone(), new.settings, server, name, &mut |recipient| {
            write_kit(&kit_path, recipient, &place, false).map_err(|problem| {
                let message = problem.message.clone();
                kit_problem.borrow_mut().replace(problem);
                PoolError::Misuse(message)
            })
        })
        .map_err(|error| kit_problem.into_inner().unwrap_or_else(|| jobs::problem::pool(error)))?;
        write_secret(&self.root, &created.server, &server)?;
        Ok(Opened {
            pool: Arc::new(created.pool),
            recipient: created.server,
            created_kit: Some(kit_path),
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
