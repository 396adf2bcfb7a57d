//! The command line: words in, API calls out.
//!
//! Speaks HTTP only, through [`Transport`]: to the router in this process (standalone) or to a server over HTTPS. What
//! must run before there is a server is behind [`Program`], which the binary implements.
//!
//! Refuses: knowing machines, pools or formats; resolving names (the server does); waiting for anything but answers.
//!
//! - `words`: every command and option, defined once.
//! - `read`: what a person types, turned at once into what is needed.
//! - `commands`, `jobs`, `local`: questions to the API. `output`: what is read on the other side.

mod client;
mod commands;
mod explain;
mod jobs;
mod local;
mod output;
pub mod program;
mod read;
mod room;
pub mod transport;
mod words;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use clap::{CommandFactory, Parser};
use model::{Code, ExitStatus, Problem, Timestamp};

pub use explain::{Explanation, explain, page as error_codes_page};
pub use output::Streams;
pub use program::Program;
pub use transport::Transport;

use client::Client;
use output::Output;
use program::{
    AgentOptions, BreakGlass, DemoOptions, EnrollOptions, PoolCreation, ServerOptions, StandaloneOptions,
    VerifyFolder,
};
use room::Room;
use words::*;

/// Runs a command line on this process's own streams; the answer is what the process returns to the shell.
pub fn main(arguments: impl IntoIterator<Item = OsString>, program: &dyn Program) -> u8 {
    let streams = Streams {
        stdout: Box::new(std::io::stdout()),
        stderr: Box::new(std::io::stderr()),
        terminal: std::io::stderr().is_terminal() && std::io::stdin().is_terminal(),
        zone: jiff::tz::TimeZone::system(),
        now: || Timestamp(u64::try_from(jiff::Timestamp::now().as_microsecond()).unwrap_or(0)),
        answer: || {
            let mut line = String::new();
            let _ = std::io::stdin().read_line(&mut line);
            line
        },
    };
    run(arguments, program, streams)
}

/// Runs a command line; the answer is what the process returns to the shell.
pub fn run(arguments: impl IntoIterator<Item = OsString>, program: &dyn Program, mut streams: Streams) -> u8 {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let words = match Words::try_parse_from(&arguments) {
        Ok(words) => words,
        Err(error) => {
            if !error.use_stderr() {
                let _ = write!(streams.stdout, "{}", error.render());
                return 0;
            }
            let json = arguments.iter().any(|argument| argument == "--json");
            if json {
                Output::new(streams, true, false).problem(&usage_problem(&error));
            } else {
                let _ = match foreign_hint(&error) {
                    Some(hint) => writeln!(streams.stderr, "hint: {hint}"),
                    None => write!(streams.stderr, "{}", error.render()),
                };
            }
            return ExitStatus::Usage as u8;
        }
    };
    let output = Output::new(streams, words.globals.json, words.globals.utc);
    let check = matches!(words.command, Command::Status { check: true });
    match dispatch(&words, program, &output) {
        Ok(status) => status,
        Err(problem) => {
            output.end_progress();
            output.problem(&problem);
            // A monitoring program takes 3 as "unknown"; every other number would be a statement about the data.
            if check { 3 } else { problem.exit_status() as u8 }
        }
    }
}

/// The hint for a word of another program.
fn foreign_hint(error: &clap::Error) -> Option<String> {
    let word = match error.get(clap::error::ContextKind::InvalidSubcommand)? {
        clap::error::ContextValue::String(word) => word,
        _ => return None,
    };
    FOREIGN.iter().find(|(theirs, _)| theirs == word).map(|(_, ours)| format!("here it is `{ours}`"))
}

fn usage_problem(error: &clap::Error) -> Problem {
    let text = error.render().to_string();
    let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    let problem = Problem::new(Code::Usage, message);
    match foreign_hint(error) {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}

fn creation(args: &CreationArgs) -> PoolCreation {
    PoolCreation {
        recovery_kit: args.recovery_kit.clone(),
        floor_points: args.floor_points,
        floor_seconds: args.floor_age,
        soft_delete_seconds: args.soft_delete,
        reclaim_hold_seconds: args.reclaim_hold,
        reserve_bytes: args.reserve,
        parity_percent: args.parity,
    }
}

/// Lets Ctrl-C set the flag that [`Program`]'s methods look at; they end in order by themselves.
fn hear_ctrl_c(output: &Output) {
    let stop = output.stop.clone();
    std::thread::spawn(move || {
        if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() {
            let heard = runtime.block_on(tokio::signal::ctrl_c());
            stop.store(heard.is_ok(), Ordering::SeqCst);
        }
    });
}

/// First what needs no API, then the rest.
fn dispatch(words: &Words, program: &dyn Program, output: &Output) -> Result<u8, Problem> {
    let globals = &words.globals;
    if matches!(
        &words.command,
        Command::Demo { .. }
            | Command::Server(_)
            | Command::Agent(_)
            | Command::Recover(RecoverCommand::Disk(RecoverDiskArgs { pool: Some(_), .. }))
            | Command::Pool(PoolCommand::Verify(VerifyArgs { pool: Some(_), .. }))
    ) {
        hear_ctrl_c(output);
    }
    let done = |result: Result<(), Problem>| result.map(|()| ExitStatus::Done as u8);
    match &words.command {
        Command::Demo { data, image, keep } => {
            done(program.demo(&DemoOptions { data: data.clone(), image: image.clone(), keep: *keep }, output))
        }
        Command::Server(ServerCommand::Run { data, listen, config, kit, create }) => {
            done(program.server_run(
                &ServerOptions {
                    data: data.clone(),
                    listen: listen.clone(),
                    config: config.clone(),
                    create: creation(create),
                    pool: globals.pool_id,
                    kit: kit.clone(),
                },
                output,
            ))
        }
        Command::Agent(AgentCommand::Enroll { token, name, state }) => {
            let server = globals.server.clone().ok_or_else(|| {
                Problem::new(Code::Usage, "An agent needs the server's address.").hint("Add --server URL.")
            })?;
            let options =
                EnrollOptions { server, token: token.clone(), state: state.clone(), name: name.clone() };
            done(program.agent_enroll(&options, output))
        }
        Command::Agent(AgentCommand::Run { state, normal_priority }) => {
            let options = AgentOptions {
                state: state.clone(),
                normal_priority: *normal_priority,
                cpu_limit: globals.cpu_limit,
            };
            done(program.agent_run(&options, output))
        }
        Command::Recover(RecoverCommand::Disk(args)) if args.pool.is_some() => {
            break_glass(args, program, output)
        }
        Command::Pool(PoolCommand::Verify(args)) if args.pool.is_some() => {
            verify_folder(args, program, output)
        }
        Command::Completion { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Words::command(), "stillpoint", &mut text);
            output.raw(String::from_utf8_lossy(&text).trim_end());
            Ok(0)
        }
        Command::Version => {
            output.object("version", &serde_json::json!({ "version": program.version(), "api": "v1" }));
            output.text(&format!("stillpoint {}", program.version()));
            Ok(0)
        }
        Command::Explain { code } => {
            let code: Code = code.parse().map_err(|reason: String| {
                Problem::new(Code::NotFound, format!("{reason}."))
                    .about(code)
                    .hint("See docs/error-codes.md.")
            })?;
            let it = explain(code);
            output.object("explain", &it);
            output.text(&format!(
                "{code}: {}\n\nCause: {}\nRemedy: {}\nExit status: {}",
                it.title, it.cause, it.remedy, it.exit_status
            ));
            Ok(0)
        }
        command => over_api(globals, command, program, output),
    }
}

fn verify_folder(args: &VerifyArgs, program: &dyn Program, output: &Output) -> Result<u8, Problem> {
    if args.job.detach || args.job.dry_run {
        return Err(Problem::new(Code::Usage, "With --pool there is no --detach and no --dry-run."));
    }
    let limit =
        args.limit.as_deref().map(|text| read::rate(text, output.zone(), output.now())).transpose()?;
    let pool = args.pool.clone().unwrap_or_default();
    let job = program.verify_folder(&VerifyFolder { pool, limit }, output)?;
    output.end_progress();
    Ok(jobs::show_end(output, &job) as u8)
}

fn break_glass(args: &RecoverDiskArgs, program: &dyn Program, output: &Output) -> Result<u8, Problem> {
    let (Some(pool), Some(kit)) = (&args.pool, &args.kit) else {
        return Err(Problem::new(Code::Usage, "--pool and --kit belong together."));
    };
    if args.job.detach || args.job.dry_run {
        return Err(Problem::new(
            Code::Usage,
            "With --pool and --kit there is no --detach and no --dry-run.",
        ));
    }
    if read::host_path(&args.to).0.is_some() {
        return Err(
            Problem::new(Code::Usage, "With --pool and --kit the target is on this machine.").about(&args.to)
        );
    }
    let (point, echo) = read::point(&args.point, output.zone())?;
    if let Some(echo) = echo {
        output.message(&format!("{} is {echo}", args.point));
    }
    let limit =
        args.limit.as_deref().map(|text| read::rate(text, output.zone(), output.now())).transpose()?;
    let job = program.break_glass(
        &BreakGlass {
            pool: pool.clone(),
            kit: kit.clone(),
            datasource: args.datasource.clone(),
            point,
            disk: args.disk,
            target: program.absolute(std::path::Path::new(&args.to))?,
            format: args.format,
            limit,
            no_sync: args.no_sync,
            accept_damage: args.accept_damage,
            overwrite: args.overwrite,
            min_consistency: args.min_consistency,
        },
        output,
    )?;
    output.end_progress();
    Ok(jobs::show_end(output, &job) as u8)
}

/// Whether a command writes to the pool, and with which settings it may create one.
fn needs(command: &Command) -> (bool, Option<PoolCreation>) {
    match command {
        Command::Datasource(
            DatasourceCommand::AddImage { create, .. } | DatasourceCommand::AddMachine { create, .. },
        ) => (true, Some(creation(create))),
        Command::Status { .. }
        | Command::Host(HostCommand::List | HostCommand::Machines { .. })
        | Command::Datasource(DatasourceCommand::List | DatasourceCommand::Show { .. })
        | Command::RecoveryPoint(
            PointCommand::List { .. } | PointCommand::Show { .. } | PointCommand::Diff { .. },
        )
        | Command::Recover(_)
        | Command::Pool(PoolCommand::Status | PoolCommand::Verify(_) | PoolCommand::Copy { .. })
        | Command::Job(JobCommand::List { .. } | JobCommand::Show { .. } | JobCommand::Log { .. })
        | Command::Alert(AlertCommand::List { .. })
        | Command::RecoveryKit(KitCommand::Test { .. } | KitCommand::List) => (false, None),
        Command::Protect { job, .. }
        | Command::Check { job, .. }
        | Command::Prune { job, .. }
        | Command::Catalog(CatalogCommand::Rebuild { job })
        | Command::Pool(PoolCommand::Reclaim { job, .. })
        | Command::Datasource(DatasourceCommand::Remove { job, .. }) => (!job.dry_run, None),
        Command::Synchronize(args) | Command::RecoveryPoint(PointCommand::Create(args)) => {
            (!args.job.dry_run, None)
        }
        _ => (true, None),
    }
}

/// The bearer token for a server.
fn token() -> Result<Option<String>, Problem> {
    if let Some(path) = std::env::var_os("STILLPOINT_TOKEN_FILE") {
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Problem::new(Code::Usage, format!("{}: cannot be read: {error}.", path.to_string_lossy()))
        })?;
        return Ok(Some(text.trim().to_owned()));
    }
    Ok(std::env::var("STILLPOINT_TOKEN").ok().filter(|token| !token.is_empty()))
}

/// How to reach the API: transport, bearer token, what ends a standalone server.
type Way = (Arc<dyn Transport>, Option<String>, Option<Box<dyn Send>>);

fn over_api(
    globals: &Globals,
    command: &Command,
    program: &dyn Program,
    output: &Output,
) -> Result<u8, Problem> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Problem::new(Code::Internal, format!("Threads cannot be started: {error}.")))?;
    let inside = runtime.enter();
    let (transport, token, guard): Way = match (&globals.standalone, &globals.server) {
        (Some(_), Some(_)) => {
            return Err(Problem::new(Code::Usage, "Both a data folder and a server are given.")
                .hint("Leave out --standalone (STILLPOINT_STANDALONE) or --server (STILLPOINT_SERVER)."));
        }
        (None, None) => {
            return Err(Problem::new(Code::Usage, "Neither a data folder nor a server is given.")
                .hint("Add --standalone DIR to work in this process, or --server URL."));
        }
        (Some(folder), None) => {
            let (writes, create) = needs(command);
            let options = StandaloneOptions {
                folder: folder.clone(),
                create,
                pool: globals.pool_id,
                writes,
                wait: globals.wait,
                cpu_limit: globals.cpu_limit,
                accepts_older_pool: matches!(command, Command::Catalog(_)),
            };
            let opened = program.open_standalone(&options)?;
            if let Some(kit) = &opened.created_kit {
                output.message(&format!(
                    "Created the data folder {} with pool {}",
                    folder.display(),
                    opened.pool
                ));
                output.message(&format!("The recovery kit is {}", kit.display()));
                output
                    .message("Keep a copy of it away from this machine: without it a lost key is lost data.");
            }
            (opened.transport, None, Some(opened.guard))
        }
        (None, Some(server)) => {
            let fingerprint = globals.fingerprint.as_deref().ok_or_else(|| {
                Problem::new(Code::Usage, "The server's fingerprint is not known, so it could be anyone.")
                    .about(server)
                    .hint("Add --fingerprint TEXT or set STILLPOINT_FINGERPRINT; `server run` prints it.")
            })?;
            (program.connect(server, fingerprint)?, token()?, None)
        }
    };
    let room = Room {
        client: Client::new(transport, token),
        output,
        program,
        standalone: globals.standalone.is_some(),
    };
    let result = runtime.block_on(async {
        if let (Some(wanted), false) = (globals.pool_id, room.standalone) {
            let found: protocol::api::PoolStatus = room.client.get("/pool").await?;
            if found.pool != wanted {
                return Err(Problem::new(
                    Code::OtherPool,
                    format!("The server has pool {}, not {wanted}.", found.pool),
                ));
            }
        }
        if matches!(command, Command::Status { check: true }) {
            return commands::health(&room.client, output).await;
        }
        commands::run(&room, command).await.map(|status| status as u8)
    });
    output.end_progress();
    // In this order: no request is under way any more, then the folder is closed, then the threads end.
    drop(room);
    drop(guard);
    drop(inside);
    result
}

#[cfg(test)]
mod tests;
