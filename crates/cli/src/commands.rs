//! Each command as questions to the API.

use model::{Code, Consistency, ExitStatus, Problem};
use protocol::api::{
    AddImage, AddMachine, Alert, ChangedExtents, CopyPool, Datasource, Host, Job, JobLogLine, KeyGeneration,
    KitFile, KitReport, ListedDisk, ListedMachine, MachineTarget, MakeToken, PointDiff, PoolStatus, Protect,
    Prune, Recipient, Reclaim, RecoverDisk, RecoverMachine, RecoverTarget, RecoveryPoint, Status,
    Synchronize, Time, TokenMade, VerifyPool,
};
use serde_json::json;

use crate::client::{Client, coded};
use crate::output::{Output, bytes, printable, seconds};
use crate::room::Room;
use crate::words::*;
use crate::{jobs, local, read};

/// Does a command that needs the API.
pub async fn run(room: &Room<'_>, command: &Command) -> Result<ExitStatus, Problem> {
    let (client, output) = (&room.client, room.output);
    let datasource_path = |name: &str, verb: &str| format!("/datasources/{}{verb}", coded(name));
    match command {
        Command::Status { .. } => {
            let status: Status = client.get("/status").await?;
            show_status(output, &status);
            // `--check` maps the health itself; see `lib.rs`.
            Ok(ExitStatus::Done)
        }
        Command::Host(command) => host(room, command).await,
        Command::Datasource(command) => datasource(room, command).await,
        Command::Protect { datasource, group, job } => {
            let body = Protect { group: group.clone() };
            room.job(&datasource_path(datasource, "/protect"), Some(&body), *job).await
        }
        Command::Synchronize(args) | Command::RecoveryPoint(PointCommand::Create(args)) => {
            synchronize(room, args).await
        }
        Command::Check { datasource, job } => {
            room.job(&datasource_path(datasource, "/check"), Some(&json!({})), *job).await
        }
        Command::RecoveryPoint(command) => point(room, command).await,
        Command::Recover(RecoverCommand::Disk(args)) => recover_disk(room, args).await,
        Command::Recover(RecoverCommand::Vm(args)) => recover_vm(room, args).await,
        Command::Pool(command) => pool(room, command).await,
        Command::Prune { datasource, keep_last, yes, job } => {
            if !job.dry_run && keep_last.is_some() {
                let name = datasource.as_deref().unwrap_or("all");
                output.confirm(&format!("Prune drops recovery points of {name}"), name, *yes)?;
            }
            let body = Prune { datasource: datasource.clone(), keep_last: *keep_last };
            room.job("/prune", Some(&body), *job).await
        }
        Command::Job(command) => job(room, command).await,
        Command::Alert(command) => alert(room, command).await,
        Command::Catalog(CatalogCommand::Rebuild { job }) => {
            room.job("/catalog/rebuild", Some(&json!({})), *job).await
        }
        Command::RecoveryKit(KitCommand::Write(args)) => kit_write(room, args).await,
        Command::RecoveryKit(KitCommand::List) => {
            let mut rows = Vec::new();
            client
                .each("/recipients", |it: Recipient| {
                    output.object("recipient", &it);
                    let state = match (it.revoked, it.own) {
                        (true, _) => "revoked",
                        (false, true) => "this server",
                        (false, false) => "opens the pool",
                    };
                    rows.push(vec![it.id.clone(), word_of(&it.kind), state.to_owned()]);
                })
                .await?;
            output.table(&["ID", "KIND", "STATE"], &rows);
            Ok(ExitStatus::Done)
        }
        Command::RecoveryKit(KitCommand::Revoke { recipient, yes }) => {
            output.confirm(
                &format!("Recipient {recipient} can open nothing that is written from now on"),
                recipient,
                *yes,
            )?;
            let made: KeyGeneration =
                client.post(&format!("/recipients/{}/revoke", coded(recipient)), &json!({})).await?;
            show_generation(output, &made);
            output
                .message("What it could open before, it can still open wherever it has a copy of the pool.");
            Ok(ExitStatus::Done)
        }
        Command::RecoveryKit(KitCommand::Test { kit }) => {
            let path = kit.as_deref().map(|kit| room.path_here(kit)).transpose()?;
            room.only_standalone("recovery-kit test")?;
            let report: KitReport =
                client.post("/recovery-kit/test", &KitFile { path, overwrite: false }).await?;
            show_kit(output, "opens", &report);
            Ok(ExitStatus::Done)
        }
        Command::Demo { .. }
        | Command::Server(_)
        | Command::Agent(_)
        | Command::Completion { .. }
        | Command::Version
        | Command::Explain { .. } => Err(Problem::new(Code::Internal, "This command needs no server.")),
    }
}

impl Room<'_> {
    async fn job<B: serde::Serialize>(
        &self,
        path: &str,
        body: Option<&B>,
        args: JobArgs,
    ) -> Result<ExitStatus, Problem> {
        jobs::run(&self.client, self.output, self.standalone, path, body, args).await
    }

    fn path_here(&self, path: &std::path::Path) -> Result<String, Problem> {
        let path = self.program.absolute(path)?;
        path.to_str()
            .map(str::to_owned)
            .ok_or_else(|| Problem::new(Code::Usage, format!("{}: the path is not UTF-8.", path.display())))
    }

    fn only_standalone(&self, what: &str) -> Result<(), Problem> {
        if self.standalone {
            return Ok(());
        }
        Err(Problem::new(Code::Unsupported, format!("`{what}` works on the server's own machine only."))
            .hint("Run it there with --standalone DIR."))
    }

    /// The host that has a typed path, and the path on it. `None` is this machine, standalone.
    fn located(&self, text: &str) -> Result<(Option<String>, String), Problem> {
        let (host, path) = read::host_path(text);
        if let Some(host) = host {
            return Ok((Some(host.to_owned()), path.to_owned()));
        }
        let path = self.path_here(std::path::Path::new(path))?;
        if self.standalone {
            return Ok((None, path));
        }
        match self.program.this_host() {
            Some(host) => Ok((Some(host), path)),
            None => {
                Err(Problem::new(Code::Usage, "The path is on this machine, which is not an enrolled host.")
                    .about(path)
                    .hint("Write HOST:PATH, or enrol this machine: `stillpoint agent enroll`."))
            }
        }
    }
}

async fn host(room: &Room<'_>, command: &HostCommand) -> Result<ExitStatus, Problem> {
    let (client, output) = (&room.client, room.output);
    match command {
        HostCommand::List => {
            let mut rows = Vec::new();
            client
                .each("/hosts", |host: Host| {
                    output.object("host", &host);
                    rows.push(vec![
                        printable(&host.name),
                        host.id.to_string(),
                        word_of(&host.state),
                        host.last_seen.map_or_else(String::new, |at| output.time(at)),
                        host.certificate_until.map_or_else(String::new, |at| output.time(at)),
                        printable(&host.version),
                    ]);
                })
                .await?;
            output.table(&["NAME", "ID", "STATE", "LAST SEEN", "CERTIFICATE UNTIL", "VERSION"], &rows);
        }
        HostCommand::Machines { host } => {
            let query = host.as_deref().map_or_else(String::new, |host| format!("?host={}", coded(host)));
            let mut rows = Vec::new();
            client
                .each(&format!("/machines{query}"), |it: ListedMachine| {
                    output.object("machine", &it);
                    rows.push(machine_row(&it));
                    rows.extend(it.disks.iter().map(disk_row));
                })
                .await?;
            output.table(&["NAME", "ID", "STATE", "GUEST AGENT", "DATASOURCE", "DISK"], &rows);
        }
        HostCommand::Token { count, valid } => {
            let made: TokenMade = client
                .post("/hosts/tokens", &MakeToken { count: *count, valid_seconds: Some(*valid) })
                .await?;
            output.object("token", &made);
            output.text(&made.token);
            output.message(&format!(
                "Enrols {} host(s) until {}. It is shown this once.",
                made.count,
                output.time(made.valid_until)
            ));
        }
        HostCommand::Revoke { host, yes } => {
            output.confirm(
                &format!("Host {host} can never connect again with its certificate"),
                host,
                *yes,
            )?;
            let host: Host = client.post(&format!("/hosts/{}/revoke", coded(host)), &json!({})).await?;
            output.object("host", &host);
            output.text(&format!("{} is revoked.", printable(&host.name)));
        }
    }
    Ok(ExitStatus::Done)
}

fn machine_row(it: &ListedMachine) -> Vec<String> {
    let agent = match it.guest_agent {
        Some(true) => "connected",
        Some(false) => "not connected",
        None => "",
    };
    vec![
        printable(&it.name),
        it.id.to_string(),
        printable(&it.power),
        agent.to_owned(),
        if it.is_datasource { "yes" } else { "no" }.to_owned(),
        String::new(),
    ]
}

fn disk_row(disk: &ListedDisk) -> Vec<String> {
    let mut text = format!("{} {} {}", disk.name, disk.format, disk.storage);
    if let Some(count) = disk.bytes {
        text = format!("{text}, {}", bytes(count));
    }
    if let Some(why) = &disk.unprotected {
        text = format!("{text}: cannot be protected: {why}");
    }
    let mut row = vec![String::new(); 5];
    row.push(printable(&text));
    row
}

async fn datasource(room: &Room<'_>, command: &DatasourceCommand) -> Result<ExitStatus, Problem> {
    let (client, output) = (&room.client, room.output);
    match command {
        DatasourceCommand::AddImage { name, images, format, allow_backing, .. } => {
            let mut host: Option<Option<String>> = None;
            let mut paths = Vec::new();
            for image in images {
                let (on, path) = room.located(image)?;
                if host.as_ref().is_some_and(|host| *host != on) {
                    return Err(
                        Problem::new(Code::Usage, "The images of a machine are on one host.").about(image)
                    );
                }
                host = Some(on);
                paths.push(path);
            }
            let host = host.flatten();
            let mut folders = Vec::new();
            for folder in allow_backing {
                folders.push(match &host {
                    Some(_) => folder.display().to_string(),
                    None => room.path_here(folder)?,
                });
            }
            let request = AddImage {
                name: name.clone(),
                host,
                formats: format.map_or_else(Vec::new, |format| vec![format; paths.len()]),
                images: paths,
                allow_backing: folders,
            };
            let added: Datasource = client.post("/datasources/images", &request).await?;
            output.object("datasource", &added);
            output.text(&format!("Added {}, id {}", printable(&added.name), added.id));
        }
        DatasourceCommand::AddMachine {
            machine,
            host,
            exclude,
            keep_swap,
            without_freeze,
            freeze_wait,
            ..
        } => {
            let request = AddMachine {
                machine: machine.clone(),
                host: host.clone(),
                exclude: exclude.clone(),
                keep_swap: *keep_swap,
                without_freeze: *without_freeze,
                freeze_wait_seconds: *freeze_wait,
            };
            let added: Datasource = client.post("/datasources/machines", &request).await?;
            output.object("datasource", &added);
            output.text(&format!("Added {}, id {}", printable(&added.name), added.id));
        }
        DatasourceCommand::List => {
            let mut rows = Vec::new();
            client
                .each("/datasources", |it: Datasource| {
                    output.object("datasource", &it);
                    rows.push(datasource_row(output, &it));
                })
                .await?;
            output.table(&DATASOURCE_HEADINGS, &rows);
        }
        DatasourceCommand::Show { datasource } => {
            let it: Datasource = client.get(&format!("/datasources/{}", coded(datasource))).await?;
            output.object("datasource", &it);
            output.table(&DATASOURCE_HEADINGS, &[datasource_row(output, &it)]);
            for disk in &it.disks {
                output.text(&format!(
                    "  disk {}: {} {} {}",
                    disk.disk,
                    bytes(disk.bytes),
                    printable(&disk.format),
                    printable(&disk.path)
                ));
            }
        }
        DatasourceCommand::Remove { datasource, delete_data, yes, job, .. } => {
            if !job.dry_run {
                let what =
                    if *delete_data { "and its recovery points" } else { "but keeps its recovery points" };
                output.confirm(&format!("This removes {datasource} {what}"), datasource, *yes)?;
            }
            let data = if *delete_data { "delete" } else { "keep" };
            let path = format!("/datasources/{}?data={data}", coded(datasource));
            return room.job::<()>(&path, None, *job).await;
        }
    }
    Ok(ExitStatus::Done)
}

const DATASOURCE_HEADINGS: [&str; 7] = ["NAME", "HOST", "STATE", "DISKS", "POINTS", "LAST GOOD POINT", "ID"];

fn datasource_row(output: &Output, it: &Datasource) -> Vec<String> {
    vec![
        printable(&it.name),
        it.host.as_deref().map(printable).unwrap_or_default(),
        word_of(&it.state),
        it.disks.len().to_string(),
        it.recovery_points.to_string(),
        it.latest.as_ref().map_or_else(|| "none".to_owned(), |point| output.time(point.time)),
        it.id.to_string(),
    ]
}

/// The word that a unit-like value has in JSON.
fn word_of<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

async fn synchronize(room: &Room<'_>, args: &SynchronizeArgs) -> Result<ExitStatus, Problem> {
    let mut lists = Vec::new();
    for text in &args.changed_extents {
        let (disk, file) = read::disk_file(text)?;
        let content = tokio::fs::read(file).await.map_err(|error| {
            Problem::new(Code::ChangedExtents, format!("{file}: cannot be read: {error}.")).about(file)
        })?;
        lists.push(ChangedExtents { disk, extents: read::extents(file, &content)? });
    }
    let body = Synchronize {
        changed_extents: lists,
        changed_since: match &args.changed_since {
            Some(text) => Some(room.typed_point(text)?),
            None => None,
        },
        full_scan: args.full_scan,
        min_consistency: args.min_consistency,
    };
    let path = format!("/datasources/{}/synchronize", coded(&args.datasource));
    room.job(&path, Some(&body), args.job).await
}

impl Room<'_> {
    /// A typed point as the API takes it; a local time is echoed with its zone.
    fn typed_point(&self, text: &str) -> Result<String, Problem> {
        let (point, echo) = read::point(text, self.output.zone())?;
        if let Some(echo) = echo {
            self.output.message(&format!("{text} is {echo}"));
        }
        Ok(point)
    }
}

async fn point(room: &Room<'_>, command: &PointCommand) -> Result<ExitStatus, Problem> {
    let (client, output) = (&room.client, room.output);
    let path = |text: &str| format!("/recovery-points/{}", coded(text));
    match command {
        PointCommand::List { datasource } => {
            let query =
                datasource.as_deref().map_or_else(String::new, |name| format!("?datasource={}", coded(name)));
            let mut rows = Vec::new();
            client
                .each(&format!("/recovery-points{query}"), |it: RecoveryPoint| {
                    output.object("recovery-point", &it);
                    rows.push(point_row(output, &it));
                })
                .await?;
            output.table(&POINT_HEADINGS, &rows);
        }
        PointCommand::Show { point, datasource } => {
            let point = room.typed_point(point)?;
            let query =
                datasource.as_deref().map_or_else(String::new, |name| format!("?datasource={}", coded(name)));
            let it: RecoveryPoint = client.get(&format!("{}{query}", path(&point))).await?;
            show_point(output, &it);
        }
        PointCommand::Diff { a, b } => {
            let diff: PointDiff = client.get(&format!("{}/diff/{}", path(a), coded(b))).await?;
            for disk in &diff.disks {
                output.object(
                    "diff",
                    &json!({"a": diff.a, "b": diff.b, "disk": disk.disk,
                    "bytes_changed": disk.bytes_changed, "extents": disk.extents}),
                );
                output.text(&format!(
                    "disk {}: {} in {} extents",
                    disk.disk,
                    bytes(disk.bytes_changed),
                    disk.extents.len()
                ));
            }
        }
        PointCommand::Delete { point, yes } => {
            output.confirm(&format!("This deletes recovery point {point}"), point, *yes)?;
            let it: RecoveryPoint = client.delete(&path(point)).await?;
            show_point(output, &it);
        }
        PointCommand::Undelete { point } => {
            let it: RecoveryPoint = client.post(&format!("{}/undelete", path(point)), &json!({})).await?;
            show_point(output, &it);
        }
        PointCommand::Create(args) => return synchronize(room, args).await,
    }
    Ok(ExitStatus::Done)
}

const POINT_HEADINGS: [&str; 10] = [
    "ID",
    "TIME",
    "MACHINE",
    "CONSISTENCY",
    "STATE",
    "DISKS",
    "EXPIRES",
    "LOCKED UNTIL",
    "UNIQUE",
    "VERIFIED",
];

fn point_row(output: &Output, it: &RecoveryPoint) -> Vec<String> {
    let time = |at: Option<Time>| at.map_or_else(String::new, |at| output.time(at));
    vec![
        it.id.to_string(),
        output.time(it.time),
        printable(&it.datasource_name),
        it.consistency.word().to_owned(),
        it.state.word().to_owned(),
        it.disks.len().to_string(),
        match it.expires {
            Some(at) => format!("{} ({})", output.time(at), printable(&it.expires_why)),
            None if it.expires_why.is_empty() => "never".to_owned(),
            None => format!("never ({})", printable(&it.expires_why)),
        },
        time(it.locked_until),
        it.bytes_unique.map_or_else(String::new, bytes),
        time(it.verified_at),
    ]
}

fn show_point(output: &Output, it: &RecoveryPoint) {
    output.object("recovery-point", it);
    output.table(&POINT_HEADINGS, &[point_row(output, it)]);
    if output.json {
        return;
    }
    for (name, text) in [("reason", &it.reason), ("cause", &it.cause), ("evidence", &it.evidence)] {
        if !text.is_empty() {
            output.text(&format!("  {name}: {}", printable(text)));
        }
    }
    if let Some(until) = it.undelete_until {
        output.text(&format!("  can be had back until {}", output.time(until)));
    }
}

async fn recover_vm(room: &Room<'_>, args: &RecoverVmArgs) -> Result<ExitStatus, Problem> {
    let output = room.output;
    let point = resolved_point(room, &args.datasource, &args.point, args.min_consistency).await?;
    if args.original && !args.job.dry_run {
        let what = format!(
            "This puts {} back to {}: what its disks hold now is replaced and kept for 7 days",
            args.datasource,
            output.time(point.time)
        );
        output.confirm(&what, &args.datasource, args.yes)?;
    }
    let target = match args.original {
        true => MachineTarget::Original { stop: args.stop },
        false => {
            MachineTarget::Host { host: args.host.clone(), path: args.path.clone(), format: args.format }
        }
    };
    let limit =
        args.limit.as_deref().map(|text| read::rate(text, output.zone(), output.now())).transpose()?;
    let body = RecoverMachine {
        point: point.id.to_string(),
        target,
        name: args.name.clone(),
        identity: args.identity,
        network: args.network.clone(),
        start: args.start,
        limit,
        min_consistency: args.min_consistency,
    };
    room.job(&format!("/datasources/{}/recover-vm", coded(&args.datasource)), Some(&body), args.job).await
}

/// The point that was typed, told to whoever typed it.
async fn resolved_point(
    room: &Room<'_>,
    datasource: &str,
    typed: &str,
    min_consistency: Option<Consistency>,
) -> Result<RecoveryPoint, Problem> {
    let output = room.output;
    let typed = room.typed_point(typed)?;
    // What only this point uses is not shown here.
    let mut query = format!("?datasource={}&count=false", coded(datasource));
    if let Some(least) = min_consistency {
        query.push_str(&format!("&min_consistency={}", least.word()));
    }
    let point: RecoveryPoint = room.client.get(&format!("/recovery-points/{}{query}", coded(&typed))).await?;
    output.message(&format!(
        "Recovery point {} of {}, {} ago, consistency {}, id {}",
        output.time(point.time),
        printable(&point.datasource_name),
        output.age(point.time),
        point.consistency.word(),
        point.id
    ));
    Ok(point)
}

async fn recover_disk(room: &Room<'_>, args: &RecoverDiskArgs) -> Result<ExitStatus, Problem> {
    let output = room.output;
    let name = args.datasource.as_deref().unwrap_or_default();
    let limit =
        args.limit.as_deref().map(|text| read::rate(text, output.zone(), output.now())).transpose()?;
    let point = resolved_point(room, name, &args.point, args.min_consistency).await?;
    let (host, path) = read::host_path(&args.to);
    let target = match host {
        Some(host) => RecoverTarget::Host { host: host.to_owned(), path: path.to_owned() },
        None if room.standalone => {
            RecoverTarget::Server { path: room.path_here(std::path::Path::new(path))? }
        }
        None => return local::recover(room, args, &point, limit).await,
    };
    let body = RecoverDisk {
        point: point.id.to_string(),
        disk: args.disk,
        target,
        format: args.format,
        limit,
        no_sync: args.no_sync,
        accept_damage: args.accept_damage,
        overwrite: args.overwrite,
        min_consistency: args.min_consistency,
    };
    room.job(&format!("/datasources/{}/recover-disk", coded(name)), Some(&body), args.job).await
}

async fn pool(room: &Room<'_>, command: &PoolCommand) -> Result<ExitStatus, Problem> {
    let (client, output) = (&room.client, room.output);
    match command {
        PoolCommand::Status => {
            let it: PoolStatus = client.get("/pool").await?;
            output.object("pool", &it);
            let state = if it.damaged { "damaged, see `stillpoint alert list`" } else { "no known damage" };
            for line in [
                format!("pool          {}", it.pool),
                format!("folder        {}", printable(&it.path)),
                format!("state         {state}"),
                format!("stored        {} for {} of disks", bytes(it.bytes_stored), bytes(it.bytes_logical)),
                format!("points        {} of {} machines", it.recovery_points, it.datasources),
                format!("quarantine    {}", bytes(it.bytes_quarantined)),
                format!("free          {} of {}", bytes(it.bytes_free), bytes(it.bytes_total)),
                format!(
                    "full in       {}",
                    it.days_until_full.map_or("not foreseeable".into(), |d| format!("{d} d"))
                ),
                format!(
                    "proved since  {}",
                    it.proved_since.map_or("not all of it yet".into(), |time| output.time(time))
                ),
                format!("floor         {} points, {}", it.floor_points, seconds(it.floor_seconds)),
                format!("soft-delete   {}", seconds(it.soft_delete_seconds)),
                format!("reclaim hold  {}", seconds(it.reclaim_hold_seconds)),
                match it.parity_percent {
                    0 => "parity        none".to_owned(),
                    percent => format!("parity        {percent} %"),
                },
            ] {
                output.text(&line);
            }
            Ok(ExitStatus::Done)
        }
        PoolCommand::Verify(args) => {
            let limit = args
                .limit
                .as_deref()
                .map(|text| read::rate(text, output.zone(), output.now()))
                .transpose()?;
            let body = VerifyPool {
                hashes: args.hashes,
                read_data: args.read_data,
                due: args.due,
                every_seconds: args.every,
                limit,
            };
            room.job("/pool/verify", Some(&body), args.job).await
        }
        PoolCommand::Reclaim { hold, breaker, yes, job } => {
            if breaker.is_some() && !job.dry_run {
                output.confirm("This raises the share of the pool that may be deleted", "reclaim", *yes)?;
            }
            room.job("/pool/reclaim", Some(&Reclaim { hold_seconds: *hold, breaker_percent: *breaker }), *job)
                .await
        }
        PoolCommand::Copy { to, limit, verify, accept_damage, job } => {
            let limit =
                limit.as_deref().map(|text| read::rate(text, output.zone(), output.now())).transpose()?;
            let request =
                CopyPool { to: room.path_here(to)?, limit, verify: *verify, accept_damage: *accept_damage };
            room.job("/pool/copy", Some(&request), *job).await
        }
        PoolCommand::RotateKeys => {
            let made: KeyGeneration = client.post("/pool/rotate-keys", &json!({})).await?;
            show_generation(output, &made);
            Ok(ExitStatus::Done)
        }
        PoolCommand::ExportKeys(args) => kit_write(room, args).await,
    }
}

async fn kit_write(room: &Room<'_>, args: &KitWriteArgs) -> Result<ExitStatus, Problem> {
    room.only_standalone("recovery-kit write")?;
    let request = KitFile { path: Some(room.path_here(&args.to)?), overwrite: args.overwrite };
    let report: KitReport = room.client.post("/recovery-kit/write", &request).await?;
    show_kit(room.output, "was written and opens", &report);
    Ok(ExitStatus::Done)
}

fn show_generation(output: &Output, made: &KeyGeneration) {
    output.object("key-generation", made);
    let revoked =
        made.revoked.as_deref().map_or_else(String::new, |id| format!("Revoked {}. ", printable(id)));
    output.text(&format!(
        "{revoked}Key generation {} begins; {} recipients can open it.",
        made.generation, made.recipients
    ));
}

fn show_kit(output: &Output, verb: &str, report: &KitReport) {
    output.object("recovery-kit", report);
    output.text(&format!(
        "{} {verb} pool {}, recipient {}",
        printable(&report.path),
        report.pool,
        printable(&report.recipient)
    ));
}

fn job_row(output: &Output, it: &Job) -> Vec<String> {
    vec![
        it.id.to_string(),
        it.kind.word().to_owned(),
        it.state.word().to_owned(),
        it.datasource_name.as_deref().map(printable).unwrap_or_default(),
        output.time(it.created_at),
        it.figures.seconds.map_or_else(String::new, |s| format!("{s:.1} s")),
        it.problem.as_ref().map_or_else(String::new, |problem| problem.code.to_string()),
    ]
}

const JOB_HEADINGS: [&str; 7] = ["ID", "KIND", "STATE", "MACHINE", "CREATED", "TOOK", "PROBLEM"];

async fn job(room: &Room<'_>, command: &JobCommand) -> Result<ExitStatus, Problem> {
    let (client, output) = (&room.client, room.output);
    match command {
        JobCommand::List { failed, since } => {
            let mut path = format!("/jobs?failed={failed}");
            if let Some(since) = since {
                let from = output.now().0.saturating_sub(since.saturating_mul(model::Timestamp::SECOND));
                path.push_str(&format!("&since={}", coded(&Time(model::Timestamp(from)).to_string())));
            }
            let mut rows = Vec::new();
            client
                .each(&path, |it: Job| {
                    output.object("job", &it);
                    rows.push(job_row(output, &it));
                })
                .await?;
            output.table(&JOB_HEADINGS, &rows);
        }
        JobCommand::Show { job } => {
            let it: Job = client.get(&format!("/jobs/{}", coded(job))).await?;
            output.object("job", &it);
            output.table(&JOB_HEADINGS, &[job_row(output, &it)]);
            if !output.json {
                for line in jobs::figure_lines(output, &it.figures) {
                    output.text(&format!("  {line}"));
                }
                for problem in it.warnings.iter().chain(&it.problem) {
                    output.text(&format!("  {}: {}", problem.code, printable(&problem.message)));
                }
            }
        }
        JobCommand::Watch { job } => return jobs::follow(client, output, false, job).await,
        JobCommand::Log { job } => {
            client
                .each(&format!("/jobs/{}/log", coded(job)), |line: JobLogLine| {
                    output.object("log", &line);
                    output.text(&format!(
                        "{} {:7} {}",
                        output.time(line.time),
                        word_of(&line.level),
                        printable(&line.message)
                    ));
                })
                .await?;
        }
        JobCommand::Cancel { job } => {
            let it: Job = client.post(&format!("/jobs/{}/cancel", coded(job)), &json!({})).await?;
            output.object("job", &it);
            output.text(&format!("{} {}", it.id, it.state.word()));
        }
    }
    Ok(ExitStatus::Done)
}

async fn alert(room: &Room<'_>, command: &AlertCommand) -> Result<ExitStatus, Problem> {
    let (client, output) = (&room.client, room.output);
    let row = |it: &Alert| {
        vec![
            it.id.to_string(),
            word_of(&it.severity),
            output.time(it.raised_at),
            it.code.map_or_else(String::new, |code| code.to_string()),
            printable(&it.object),
            printable(&it.message),
        ]
    };
    let headings = ["NUMBER", "SEVERITY", "RAISED", "CODE", "OBJECT", "MESSAGE"];
    match command {
        AlertCommand::List { all } => {
            let mut rows = Vec::new();
            client
                .each(&format!("/alerts?all={all}"), |it: Alert| {
                    output.object("alert", &it);
                    rows.push(row(&it));
                })
                .await?;
            output.table(&headings, &rows);
        }
        AlertCommand::Ack { alert } => {
            let it: Alert = client.post(&format!("/alerts/{alert}/ack"), &json!({})).await?;
            output.object("alert", &it);
            output.table(&headings, &[row(&it)]);
        }
    }
    Ok(ExitStatus::Done)
}

fn show_status(output: &Output, it: &Status) {
    output.object("status", it);
    if output.json {
        return;
    }
    output.text(&format!("{}: pool {}", it.health.word(), it.pool));
    for line in &it.breached {
        output.text(&format!("  breached: {}", printable(line)));
    }
    let rows: Vec<Vec<String>> =
        it.datasources.iter().map(|machine| datasource_row(output, machine)).collect();
    output.table(&DATASOURCE_HEADINGS, &rows);
    for (title, jobs) in [("at work", &it.running), ("failed in the last 24 h", &it.failed)] {
        if !jobs.is_empty() {
            output.text(&format!("{title}:"));
            for job in jobs {
                output.text(&format!("  {}", job_row(output, job).join("  ")));
            }
        }
    }
    for host in &it.silent_hosts {
        output.text(&format!("not heard of: {}", printable(host)));
    }
    if it.open_alerts > 0 {
        output.text(&format!("{} open alerts, see `stillpoint alert list`", it.open_alerts));
    }
    let full = it.days_until_full.map_or_else(|| "not foreseeable".to_owned(), |days| format!("{days} days"));
    output.text(&format!("free {}, full in: {full}", bytes(it.bytes_free)));
}

/// What `status --check` ends with.
pub async fn health(client: &Client, output: &Output) -> Result<u8, Problem> {
    let status: Status = client.get("/status").await?;
    show_status(output, &status);
    Ok(status.health.check_status())
}
