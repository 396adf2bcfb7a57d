//! What the command line cannot do over the API.

use std::sync::Arc;

use block_io::WritableDevice;
use cli::Transport;
use cli::program::{
    AgentOptions, BreakGlass, DemoOptions, EnrollOptions, LocalTarget, LocalTargetOptions, Program, Say,
    ServerOptions, Standalone, StandaloneOptions, VerifyFolder,
};
use cli::transport::InProcess;
use datasource::{Images, Provider, RecoveryTarget, TargetRequest};
use disk_image::probe::NewDisk;
use environment::{Clock, Randomness, SystemClock, SystemRandomness};
use model::{Code, Problem, RecoveryPointId};
use protocol::api::{Job, JobRequest, RecoverDisk, RecoverTarget};
use server::api::{Caller, Door, Service};

use crate::follow::follow;
use crate::standalone;

/// The program.
pub struct Stillpoint;

impl Program for Stillpoint {
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    fn open_standalone(&self, options: &StandaloneOptions) -> Result<Standalone, Problem> {
        let create = options.create.as_ref().map(standalone::settings);
        let running = standalone::open(
            &options.folder,
            create,
            options.pool,
            options.writes,
            options.wait,
            options.accepts_older_pool,
            crate::agent::restraint(false, options.cpu_limit)?,
        )?;
        let router = server::api::router(standalone::service(&running), Door::InProcess);
        Ok(Standalone {
            transport: Arc::new(InProcess::new(router)),
            pool: running.app.pool().id(),
            created_kit: running.created_kit.clone(),
            guard: Box::new(running),
        })
    }

    fn demo(&self, options: &DemoOptions, say: &dyn Say) -> Result<(), Problem> {
        crate::demo::run(options, say)
    }

    fn server_run(&self, options: &ServerOptions, say: &dyn Say) -> Result<(), Problem> {
        crate::server::run(options, say)
    }

    fn agent_enroll(&self, options: &EnrollOptions, say: &dyn Say) -> Result<(), Problem> {
        crate::agent::enroll(options, say)
    }

    fn agent_run(&self, options: &AgentOptions, say: &dyn Say) -> Result<(), Problem> {
        crate::agent::run(options, say)
    }

    fn break_glass(&self, options: &BreakGlass, say: &dyn Say) -> Result<Job, Problem> {
        let running = standalone::break_glass(&options.pool, &options.kit)?;
        let service = standalone::service(&running);
        let by = Caller { name: "recovery kit".to_owned() };
        let datasource = match &options.datasource {
            Some(name) => name.clone(),
            None => {
                let all = service.datasources(&Default::default())?.items;
                match all.as_slice() {
                    [only] => only.id.to_string(),
                    [] => return Err(Problem::new(Code::NotFound, "The pool holds no machine.")),
                    many => {
                        let names: Vec<String> =
                            many.iter().map(|one| format!("{} ({})", one.name, one.id)).collect();
                        return Err(Problem::new(
                            Code::Ambiguous,
                            format!("The pool holds several machines: {}.", names.join(", ")),
                        )
                        .hint("Name one of them."));
                    }
                }
            }
        };
        let target = self.absolute(&options.target)?;
        let request = JobRequest::RecoverDisk {
            datasource,
            options: RecoverDisk {
                point: options.point.clone(),
                disk: options.disk,
                target: RecoverTarget::Server { path: target.display().to_string() },
                format: options.format,
                limit: options.limit,
                no_sync: options.no_sync,
                accept_damage: options.accept_damage,
                overwrite: options.overwrite,
                min_consistency: options.min_consistency,
            },
        };
        let started = service.start(&by, &request)?;
        follow(&*service, started.job, say)
    }

    fn verify_folder(&self, options: &VerifyFolder, say: &dyn Say) -> Result<Job, Problem> {
        standalone::verify_folder(&options.pool, options.limit, say)
    }

    fn local_target(&self, options: &LocalTargetOptions) -> Result<Box<dyn LocalTarget>, Problem> {
        let mut ids = [[0u8; 16]; 3];
        for id in &mut ids {
            SystemRandomness.fill(id).map_err(|error| {
                Problem::new(Code::Internal, format!("No random bytes for a new image: {error}."))
            })?;
        }
        // What is written is known by its content, so that a partial file of something else is never continued.
        let digest = options.content.bytes().fold([0u8; 16], |mut id, byte| {
            id.rotate_left(1);
            id[0] ^= byte.wrapping_mul(31);
            id
        });
        let point =
            options.content.split(['/', ' ', ':']).find_map(|word| word.parse::<RecoveryPointId>().ok());
        let request = TargetRequest {
            path: options.path.clone(),
            format: options
                .format
                .word()
                .parse()
                .map_err(|error: String| Problem::new(Code::TargetFormat, format!("{error}.")))?,
            new: NewDisk {
                size: options.bytes,
                logical_sector_size: options.sector_bytes,
                fixed: false,
                ids,
                created: u32::try_from((SystemClock.now_micros() / 1_000_000).saturating_sub(946_684_800))
                    .unwrap_or(0),
            },
            point: point.unwrap_or(RecoveryPointId(digest)),
            disk: options.content.clone(),
            overwrite: options.overwrite,
            over: None,
        };
        let target = Images::new().recovery_target(&request).map_err(Problem::from)?;
        Ok(Box::new(FileTarget { device: target.device(), target, path: options.path.display().to_string() }))
    }

    fn this_host(&self) -> Option<String> {
        crate::agent::this_host()
    }

    fn connect(&self, server: &str, fingerprint: &str) -> Result<Arc<dyn Transport>, Problem> {
        let wrong = |error: &dyn std::fmt::Display| {
            Problem::new(Code::Usage, format!("The fingerprint of the server cannot be used: {error}."))
                .hint("Take it from the server: it prints its fingerprint at each start.")
        };
        let pinned: identity::Fingerprint = fingerprint.parse().map_err(|error| wrong(&error))?;
        let time = Arc::new(rustls::time_provider::DefaultTimeProvider);
        let tls = identity::agent_tls(pinned, None, time).map_err(|error| wrong(&error))?;
        Ok(Arc::new(cli::transport::Https::new(server, tls)?))
    }
}

struct FileTarget {
    target: RecoveryTarget,
    device: Arc<dyn WritableDevice>,
    path: String,
}

impl LocalTarget for FileTarget {
    fn resume_at(&self) -> u64 {
        // What an interrupted recovery left was never proved: it is written again, which costs time and no trust.
        0
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Problem> {
        self.device
            .write_at(offset, bytes)
            .map_err(|error| datasource::ProviderError::from_target_device(self.path.clone(), &error).into())
    }

    fn finish(self: Box<Self>, sync: bool) -> Result<(), Problem> {
        let FileTarget { target, device, .. } = *self;
        drop(device);
        target.finish(sync).map_err(Problem::from)
    }
}
