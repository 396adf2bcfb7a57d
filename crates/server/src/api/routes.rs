//! The routes, each one question to the [`Service`], and the OpenAPI document that is made from them.

use std::sync::Arc;

use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router};
use model::{Code, Consistency, Problem};
use protocol::api::{
    AddImage, AddMachine, Alert, AllocatedPage, BASE, CopyPool, Datasource, Direct, Host, Job, JobEvent,
    JobLogLine, JobRequest, KeyGeneration, KitFile, KitReport, ListedMachine, MakeToken, Page, PageQuery,
    Plan, PointDiff, PoolStatus, ProblemBody, Protect, Prune, Recipient, Reclaim, RecoverDisk,
    RecoverMachine, RecoverTarget, RecoveryPoint, RemoveData, Started, Status, Synchronize, Time, TokenMade,
    VerifyPool, Version,
};
use serde::Deserialize;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{IntoParams, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::input::{
    Administer, Allowed, Api, BODY_BYTES, Body, Destroy, Door, Failure, Need, Operate, Path, Query, Read,
    Recover, check_path,
};
use super::service::{JobFilter, Service};
use super::{names, stream};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Stillpoint",
        description = "The API of the protection server. The command line uses nothing else.",
        license(name = "Apache-2.0 OR MIT")
    ),
    components(schemas(ProblemBody, JobEvent)),
    security(("token" = []))
)]
struct Document;

/// The API over `service`.
pub fn router(service: Arc<dyn Service>, door: Door) -> Router {
    let (router, _) = parts();
    router
        .fallback(|| async {
            Failure(
                Problem::new(Code::NotFound, "There is no such path in the API.")
                    .hint("See docs/openapi.json."),
            )
        })
        .method_not_allowed_fallback(|| async {
            let problem = Problem::new(Code::Usage, "The path does not take this method.")
                .hint("See docs/openapi.json.");
            (StatusCode::METHOD_NOT_ALLOWED, Json(ProblemBody::from(problem)))
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .with_state(Api { service, door })
}

/// The OpenAPI document of [`router`].
pub fn openapi() -> utoipa::openapi::OpenApi {
    parts().1
}

fn parts() -> (Router<Api>, utoipa::openapi::OpenApi) {
    let api = OpenApiRouter::new()
        .routes(routes!(version))
        .routes(routes!(status))
        .routes(routes!(datasources))
        .routes(routes!(add_image))
        .routes(routes!(datasource, remove_datasource))
        .routes(routes!(protect))
        .routes(routes!(synchronize))
        .routes(routes!(check))
        .routes(routes!(recover_disk))
        .routes(routes!(recover_vm))
        .routes(routes!(recovery_points))
        .routes(routes!(recovery_point, delete_point))
        .routes(routes!(undelete_point))
        .routes(routes!(diff))
        .routes(routes!(disk))
        .routes(routes!(allocated))
        .routes(routes!(pool_status))
        .routes(routes!(verify_pool))
        .routes(routes!(reclaim))
        .routes(routes!(copy_pool))
        .routes(routes!(prune))
        .routes(routes!(jobs))
        .routes(routes!(job))
        .routes(routes!(job_log))
        .routes(routes!(job_events))
        .routes(routes!(cancel_job))
        .routes(routes!(machines))
        .routes(routes!(add_machine))
        .routes(routes!(hosts))
        .routes(routes!(make_token))
        .routes(routes!(revoke_host))
        .routes(routes!(alerts))
        .routes(routes!(acknowledge_alert))
        .routes(routes!(rebuild_catalog))
        .routes(routes!(write_kit))
        .routes(routes!(test_kit))
        .routes(routes!(recipients))
        .routes(routes!(revoke_recipient))
        .routes(routes!(rotate_keys));
    let (router, mut document) =
        OpenApiRouter::with_openapi(Document::openapi()).nest(BASE, api).split_for_parts();
    document
        .components
        .get_or_insert_default()
        .add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    (router, document)
}

type Answer<T> = Result<Json<T>, Failure>;

/// Which part of a list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PageOf {
    /// `next` of the page before; from the start if absent.
    after: Option<String>,
    /// At most so many items: 100 if absent, never more than 10000.
    limit: Option<u32>,
}

fn page(after: Option<String>, limit: Option<u32>) -> PageQuery {
    PageQuery { after, limit }
}

/// Whether only the plan is wanted.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct DryRun {
    /// Answer with the plan and change nothing.
    #[serde(default)]
    dry_run: bool,
}

/// Starts a job, or tells its plan.
async fn start<N: Need>(
    allowed: Allowed<N>,
    dry_run: bool,
    request: JobRequest,
) -> Result<Response, Failure> {
    if dry_run {
        let plan = allowed.ask(move |service, _| service.plan(&request)).await?;
        return Ok(Json(plan).into_response());
    }
    let started = allowed.ask(move |service, by| service.start(by, &request)).await?;
    Ok((StatusCode::ACCEPTED, Json(started)).into_response())
}

/// Tell what the server is.
#[utoipa::path(get, path = "/version", tag = "state", security(()), responses((status = 200, body = Version)))]
async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION").to_owned(), api: "v1".to_owned() })
}

/// Everything on one screen.
#[utoipa::path(get, path = "/status", tag = "state",
    responses((status = 200, body = Status), (status = "default", body = ProblemBody)))]
async fn status(allowed: Allowed<Read>) -> Answer<Status> {
    allowed.ask(|service, _| service.status()).await.map(Json)
}

// ---- Datasources

/// List datasources by name.
#[utoipa::path(get, path = "/datasources", tag = "datasources", params(PageOf),
    responses((status = 200, body = Page<Datasource>), (status = "default", body = ProblemBody)))]
async fn datasources(allowed: Allowed<Read>, Query(q): Query<PageOf>) -> Answer<Page<Datasource>> {
    allowed.ask(move |service, _| service.datasources(&page(q.after, q.limit))).await.map(Json)
}

/// Show a datasource.
#[utoipa::path(get, path = "/datasources/{datasource}", tag = "datasources",
    params(("datasource" = String, Path, description = "NAME, HOST/NAME (slash encoded), id or unique prefix")),
    responses((status = 200, body = Datasource), (status = "default", body = ProblemBody)))]
async fn datasource(allowed: Allowed<Read>, Path(name): Path<String>) -> Answer<Datasource> {
    allowed.ask(move |service, _| service.datasource(&name)).await.map(Json)
}

/// Add a machine that is a set of image files.
#[utoipa::path(post, path = "/datasources/images", tag = "datasources", request_body = AddImage,
    responses((status = 201, body = Datasource), (status = "default", body = ProblemBody)))]
async fn add_image(allowed: Allowed<Operate>, Body(request): Body<AddImage>) -> Result<Response, Failure> {
    names::check_name(&request.name)?;
    if request.images.is_empty() || request.formats.len() > request.images.len() {
        return Err(Problem::new(
            Code::Usage,
            "A machine needs at least one image, and at most one format for each.",
        )
        .into());
    }
    request.images.iter().chain(&request.allow_backing).try_for_each(|path| check_path(path))?;
    let added = allowed.ask(move |service, by| service.add_image(by, &request)).await?;
    Ok((StatusCode::CREATED, Json(added)).into_response())
}

/// Which machines.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct MachinesQuery {
    /// Name, id or unique prefix of an enrolled host; the server's own machine if absent.
    host: Option<String>,
    /// `next` of the page before.
    after: Option<String>,
    /// At most so many items: 100 if absent, never more than 10000.
    limit: Option<u32>,
}

/// List machines that a host's hypervisor knows, and whether and how far they can be protected.
#[utoipa::path(get, path = "/machines", tag = "datasources", params(MachinesQuery),
    responses((status = 200, body = Page<ListedMachine>), (status = "default", body = ProblemBody)))]
async fn machines(allowed: Allowed<Read>, Query(q): Query<MachinesQuery>) -> Answer<Page<ListedMachine>> {
    allowed
        .ask(move |service, _| service.machines(q.host.as_deref(), &page(q.after, q.limit)))
        .await
        .map(Json)
}

/// Add a machine of a hypervisor.
#[utoipa::path(post, path = "/datasources/machines", tag = "datasources", request_body = AddMachine,
    responses((status = 201, body = Datasource), (status = "default", body = ProblemBody)))]
async fn add_machine(
    allowed: Allowed<Operate>,
    Body(request): Body<AddMachine>,
) -> Result<Response, Failure> {
    let added = allowed.ask(move |service, by| service.add_machine(by, &request)).await?;
    Ok((StatusCode::CREATED, Json(added)).into_response())
}

/// What becomes of the points.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct RemoveQuery {
    /// What becomes of its recovery points. There is no default.
    data: RemoveData,
    /// Answer with the plan and change nothing.
    #[serde(default)]
    dry_run: bool,
}

/// Remove a datasource; its points stay or are soft-deleted.
#[utoipa::path(delete, path = "/datasources/{datasource}", tag = "datasources",
    params(("datasource" = String, Path), RemoveQuery),
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn remove_datasource(
    allowed: Allowed<Destroy>,
    Path(datasource): Path<String>,
    Query(q): Query<RemoveQuery>,
) -> Result<Response, Failure> {
    start(allowed, q.dry_run, JobRequest::RemoveDatasource { datasource, data: q.data }).await
}

/// Make the initial replica, verify it, make the first recovery point.
#[utoipa::path(post, path = "/datasources/{datasource}/protect", tag = "datasources",
    params(("datasource" = String, Path), DryRun), request_body = Protect,
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn protect(
    allowed: Allowed<Operate>,
    Path(datasource): Path<String>,
    Query(q): Query<DryRun>,
    Body(options): Body<Protect>,
) -> Result<Response, Failure> {
    start(allowed, q.dry_run, JobRequest::Protect { datasource, options }).await
}

/// Make a new recovery point.
#[utoipa::path(post, path = "/datasources/{datasource}/synchronize", tag = "datasources",
    params(("datasource" = String, Path), DryRun), request_body = Synchronize,
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn synchronize(
    allowed: Allowed<Operate>,
    Path(datasource): Path<String>,
    Query(q): Query<DryRun>,
    Body(options): Body<Synchronize>,
) -> Result<Response, Failure> {
    let mut disks: Vec<u32> = options.changed_extents.iter().map(|list| list.disk).collect();
    disks.sort_unstable();
    if let Some([disk, _]) = disks.array_windows().find(|[a, b]| a == b) {
        return Err(Problem::new(
            Code::ChangedExtents,
            format!("Disk {disk} has two lists of changed extents."),
        )
        .into());
    }
    for list in &options.changed_extents {
        if let Some((offset, length)) =
            list.extents.iter().find(|(offset, length)| offset.checked_add(*length).is_none())
        {
            return Err(Problem::new(
                Code::ChangedExtents,
                format!(
                    "The list of disk {} names bytes {offset}..+{length}, past the largest offset.",
                    list.disk
                ),
            )
            .into());
        }
    }
    start(allowed, q.dry_run, JobRequest::Synchronize { datasource, options }).await
}

/// Compare the source with the replica.
#[utoipa::path(post, path = "/datasources/{datasource}/check", tag = "datasources",
    params(("datasource" = String, Path), DryRun),
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn check(
    allowed: Allowed<Operate>,
    Path(datasource): Path<String>,
    Query(q): Query<DryRun>,
) -> Result<Response, Failure> {
    start(allowed, q.dry_run, JobRequest::Check { datasource }).await
}

/// Recover a disk into a file.
#[utoipa::path(post, path = "/datasources/{datasource}/recover-disk", tag = "datasources",
    params(("datasource" = String, Path), DryRun), request_body = RecoverDisk,
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn recover_disk(
    allowed: Allowed<Recover>,
    Path(datasource): Path<String>,
    Query(q): Query<DryRun>,
    Body(options): Body<RecoverDisk>,
) -> Result<Response, Failure> {
    let (RecoverTarget::Server { path } | RecoverTarget::Host { path, .. }) = &options.target;
    check_path(path)?;
    if options.limit.is_some_and(|limit| limit.bytes_per_second == 0) {
        return Err(Problem::new(Code::Usage, "A rate of nothing would never end.").into());
    }
    start(allowed, q.dry_run, JobRequest::RecoverDisk { datasource, options }).await
}

/// Recover a whole machine: to the original by difference, or to a machine of its own.
#[utoipa::path(post, path = "/datasources/{datasource}/recover-vm", tag = "datasources",
    params(("datasource" = String, Path), DryRun), request_body = RecoverMachine,
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn recover_vm(
    allowed: Allowed<Recover>,
    Path(datasource): Path<String>,
    Query(q): Query<DryRun>,
    Body(options): Body<RecoverMachine>,
) -> Result<Response, Failure> {
    if options.limit.is_some_and(|limit| limit.bytes_per_second == 0) {
        return Err(Problem::new(Code::Usage, "A rate of nothing would never end.").into());
    }
    start(allowed, q.dry_run, JobRequest::RecoverMachine { datasource, options }).await
}

// ---- Recovery points

/// Which points.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PointsQuery {
    /// Only those of this datasource.
    datasource: Option<String>,
    /// `next` of the page before; from the start if absent.
    after: Option<String>,
    /// At most so many items: 100 if absent, never more than 10000.
    limit: Option<u32>,
}

/// List recovery points, oldest first. In a pool of more than 1000 points their unique bytes are left out, and that a
/// pack is missing shows in their states only if this server has used the pool's index since it began; showing one point and
/// verify always tell.
#[utoipa::path(get, path = "/recovery-points", tag = "recovery-points", params(PointsQuery),
    responses((status = 200, body = Page<RecoveryPoint>), (status = "default", body = ProblemBody)))]
async fn recovery_points(
    door: Door,
    allowed: Allowed<Read>,
    Query(q): Query<PointsQuery>,
) -> Result<Response, Failure> {
    let points = allowed
        .ask(move |service, _| service.recovery_points(q.datasource.as_deref(), &page(q.after, q.limit)))
        .await?;
    Ok(match door {
        Door::InProcess => Extension(Direct::new(points)).into_response(),
        Door::Network => Json(points).into_response(),
    })
}

/// How to find a point.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PointQuery {
    /// The datasource, which `latest` and `@TIME` need.
    datasource: Option<String>,
    /// Refuse a point of less consistency.
    #[param(value_type = Option<String>)]
    min_consistency: Option<Consistency>,
    /// Whether to count what only this point uses, which looks at the maps of all: yes if absent.
    count: Option<bool>,
}

/// Show a recovery point.
#[utoipa::path(get, path = "/recovery-points/{point}", tag = "recovery-points",
    params(("point" = String, Path, description = "id, unique prefix, `latest` or `@TIME`"), PointQuery),
    responses((status = 200, body = RecoveryPoint), (status = "default", body = ProblemBody)))]
async fn recovery_point(
    allowed: Allowed<Read>,
    Path(point): Path<String>,
    Query(q): Query<PointQuery>,
) -> Answer<RecoveryPoint> {
    allowed
        .ask(move |service, _| {
            let is_counted = q.count.unwrap_or(true);
            service.recovery_point(&point, q.datasource.as_deref(), q.min_consistency, is_counted)
        })
        .await
        .map(Json)
}

/// Soft-delete a recovery point.
#[utoipa::path(delete, path = "/recovery-points/{point}", tag = "recovery-points", params(("point" = String, Path)),
    responses((status = 200, body = RecoveryPoint), (status = "default", body = ProblemBody)))]
async fn delete_point(allowed: Allowed<Destroy>, Path(point): Path<String>) -> Answer<RecoveryPoint> {
    allowed.ask(move |service, by| service.delete_point(by, &point)).await.map(Json)
}

/// Take a soft-deletion back.
#[utoipa::path(post, path = "/recovery-points/{point}/undelete", tag = "recovery-points",
    params(("point" = String, Path)),
    responses((status = 200, body = RecoveryPoint), (status = "default", body = ProblemBody)))]
async fn undelete_point(allowed: Allowed<Operate>, Path(point): Path<String>) -> Answer<RecoveryPoint> {
    allowed.ask(move |service, by| service.undelete_point(by, &point)).await.map(Json)
}

/// Tell what differs between two recovery points.
#[utoipa::path(get, path = "/recovery-points/{a}/diff/{b}", tag = "recovery-points",
    params(("a" = String, Path), ("b" = String, Path)),
    responses((status = 200, body = PointDiff), (status = "default", body = ProblemBody)))]
async fn diff(allowed: Allowed<Read>, Path((a, b)): Path<(String, String)>) -> Answer<PointDiff> {
    allowed.ask(move |service, _| service.diff(&a, &b)).await.map(Json)
}

/// Read a disk of a recovery point, all or one range of it.
#[utoipa::path(get, path = "/recovery-points/{point}/disks/{disk}", tag = "recovery-points",
    params(("point" = String, Path), ("disk" = u32, Path), ("Range" = Option<String>, Header, description = "bytes=FIRST-LAST")),
    responses((status = 200, description = "The whole disk", content_type = "application/octet-stream"),
        (status = 206, description = "The range", content_type = "application/octet-stream"),
        (status = "default", body = ProblemBody)))]
async fn disk(
    allowed: Allowed<Recover>,
    Path((point, disk)): Path<(String, u32)>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let what = format!("{point} disk {disk}");
    let device = allowed.ask(move |service, by| service.open_disk(by, &point, disk)).await?;
    stream::disk(device, &headers, what).await
}

/// Where to begin.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct FromQuery {
    /// `next` of the page before; from the start if absent.
    #[serde(default)]
    from: u64,
    /// At most so many extents: 4096 if absent, never more than 65536.
    limit: Option<u32>,
}

/// List the ranges of a disk that may hold data.
#[utoipa::path(get, path = "/recovery-points/{point}/disks/{disk}/allocated", tag = "recovery-points",
    params(("point" = String, Path), ("disk" = u32, Path), FromQuery),
    responses((status = 200, body = AllocatedPage), (status = "default", body = ProblemBody)))]
async fn allocated(
    allowed: Allowed<Recover>,
    Path((point, disk)): Path<(String, u32)>,
    Query(q): Query<FromQuery>,
) -> Answer<AllocatedPage> {
    allowed
        .ask(move |service, by| {
            let device = service.open_disk(by, &point, disk)?;
            stream::allocated(&*device, q.from, q.limit.unwrap_or(4_096), &format!("{point} disk {disk}"))
        })
        .await
        .map(Json)
}

// ---- Pool

/// Tell how the pool is.
#[utoipa::path(get, path = "/pool", tag = "pool",
    responses((status = 200, body = PoolStatus), (status = "default", body = ProblemBody)))]
async fn pool_status(allowed: Allowed<Read>) -> Answer<PoolStatus> {
    allowed.ask(|service, _| service.pool_status()).await.map(Json)
}

/// Check stored bytes against their hashes.
#[utoipa::path(post, path = "/pool/verify", tag = "pool", params(DryRun), request_body = VerifyPool,
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn verify_pool(
    allowed: Allowed<Operate>,
    Query(q): Query<DryRun>,
    Body(options): Body<VerifyPool>,
) -> Result<Response, Failure> {
    start(allowed, q.dry_run, JobRequest::VerifyPool(options)).await
}

/// Free chunks that nothing needs.
#[utoipa::path(post, path = "/pool/reclaim", tag = "pool", params(DryRun), request_body = Reclaim,
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn reclaim(
    allowed: Allowed<Destroy>,
    Query(q): Query<DryRun>,
    Body(options): Body<Reclaim>,
) -> Result<Response, Failure> {
    if options.breaker_percent.is_some_and(|percent| percent == 0 || percent > 100) {
        return Err(Problem::new(Code::Usage, "The breaker is a share of 1 to 100 percent.").into());
    }
    start(allowed, q.dry_run, JobRequest::Reclaim(options)).await
}

/// Move encrypted packs and records into a second copy.
#[utoipa::path(post, path = "/pool/copy", tag = "pool", params(DryRun), request_body = CopyPool,
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn copy_pool(
    allowed: Allowed<Operate>,
    Query(q): Query<DryRun>,
    Body(options): Body<CopyPool>,
) -> Result<Response, Failure> {
    if !std::path::Path::new(&options.to).is_absolute() {
        return Err(Problem::new(Code::Usage, "The copy's folder is not an absolute path.")
            .about(options.to)
            .into());
    }
    if options.limit.is_some_and(|limit| limit.bytes_per_second == 0) {
        return Err(Problem::new(Code::Usage, "A limit of 0 bytes a second would never end.").into());
    }
    start(allowed, q.dry_run, JobRequest::CopyPool(options)).await
}

/// Drop recovery points by retention.
#[utoipa::path(post, path = "/prune", tag = "pool", params(DryRun), request_body = Prune,
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn prune(
    allowed: Allowed<Destroy>,
    Query(q): Query<DryRun>,
    Body(options): Body<Prune>,
) -> Result<Response, Failure> {
    if options.keep_last == Some(0) {
        return Err(Problem::new(Code::Usage, "Keeping the last 0 points would keep none.")
            .hint("Use `stillpoint datasource remove --delete-data` for that.")
            .into());
    }
    start(allowed, q.dry_run, JobRequest::Prune(options)).await
}

// ---- Jobs

/// Which jobs.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct JobsQuery {
    /// Only those that failed.
    #[serde(default)]
    failed: bool,
    /// Only those created at or after.
    #[param(value_type = Option<String>, format = DateTime)]
    since: Option<Time>,
    /// `next` of the page before; from the start if absent.
    after: Option<String>,
    /// At most so many items: 100 if absent, never more than 10000.
    limit: Option<u32>,
}

/// List jobs, newest first.
#[utoipa::path(get, path = "/jobs", tag = "jobs", params(JobsQuery),
    responses((status = 200, body = Page<Job>), (status = "default", body = ProblemBody)))]
async fn jobs(allowed: Allowed<Read>, Query(q): Query<JobsQuery>) -> Answer<Page<Job>> {
    let filter = JobFilter { failed: q.failed, since: q.since.map(|time| time.0) };
    allowed.ask(move |service, _| service.jobs(&filter, &page(q.after, q.limit))).await.map(Json)
}

/// Show a job.
#[utoipa::path(get, path = "/jobs/{job}", tag = "jobs", params(("job" = String, Path)),
    responses((status = 200, body = Job), (status = "default", body = ProblemBody)))]
async fn job(allowed: Allowed<Read>, Path(id): Path<String>) -> Answer<Job> {
    allowed.ask(move |service, _| service.job(&id)).await.map(Json)
}

/// Read a job's log.
#[utoipa::path(get, path = "/jobs/{job}/log", tag = "jobs", params(("job" = String, Path), PageOf),
    responses((status = 200, body = Page<JobLogLine>), (status = "default", body = ProblemBody)))]
async fn job_log(
    allowed: Allowed<Read>,
    Path(id): Path<String>,
    Query(q): Query<PageOf>,
) -> Answer<Page<JobLogLine>> {
    allowed
        .ask(move |service, _| service.job_log(service.job(&id)?.id, &page(q.after, q.limit)))
        .await
        .map(Json)
}

/// From which event on.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct EventsQuery {
    /// Event number; from the start if absent.
    #[serde(default)]
    after: u64,
}

/// Follow a job until it ends: a line of JSON an event, empty lines in between.
#[utoipa::path(get, path = "/jobs/{job}/events", tag = "jobs", params(("job" = String, Path), EventsQuery),
    responses((status = 200, body = JobEvent, content_type = "application/x-ndjson"), (status = "default", body = ProblemBody)))]
async fn job_events(
    allowed: Allowed<Read>,
    Path(id): Path<String>,
    Query(q): Query<EventsQuery>,
) -> Result<Response, Failure> {
    let service = allowed.service();
    let id = allowed.ask(move |service, _| service.job(&id).map(|job| job.id)).await?;
    Ok(stream::events(service, id, q.after))
}

/// Cancel a job.
#[utoipa::path(post, path = "/jobs/{job}/cancel", tag = "jobs", params(("job" = String, Path)),
    responses((status = 200, body = Job), (status = "default", body = ProblemBody)))]
async fn cancel_job(allowed: Allowed<Operate>, Path(id): Path<String>) -> Answer<Job> {
    allowed.ask(move |service, by| service.cancel_job(by, service.job(&id)?.id)).await.map(Json)
}

// ---- Hosts, alerts, catalog, keys

/// List enrolled hosts by name.
#[utoipa::path(get, path = "/hosts", tag = "hosts", params(PageOf),
    responses((status = 200, body = Page<Host>), (status = "default", body = ProblemBody)))]
async fn hosts(allowed: Allowed<Read>, Query(q): Query<PageOf>) -> Answer<Page<Host>> {
    allowed.ask(move |service, _| service.hosts(&page(q.after, q.limit))).await.map(Json)
}

/// Make an enrolment token.
#[utoipa::path(post, path = "/hosts/tokens", tag = "hosts", request_body = MakeToken,
    responses((status = 200, body = TokenMade), (status = "default", body = ProblemBody)))]
async fn make_token(allowed: Allowed<Administer>, Body(request): Body<MakeToken>) -> Answer<TokenMade> {
    if request.count == 0 || request.count > 10_000 {
        return Err(Problem::new(Code::Usage, "A token enrols 1 to 10000 hosts.").into());
    }
    if request.valid_seconds.is_some_and(|seconds| seconds == 0 || seconds > 7 * 86_400) {
        return Err(Problem::new(Code::Usage, "A token is valid for a second to seven days.").into());
    }
    allowed.ask(move |service, by| service.make_token(by, &request)).await.map(Json)
}

/// Revoke a host.
#[utoipa::path(post, path = "/hosts/{host}/revoke", tag = "hosts", params(("host" = String, Path)),
    responses((status = 200, body = Host), (status = "default", body = ProblemBody)))]
async fn revoke_host(allowed: Allowed<Administer>, Path(host): Path<String>) -> Answer<Host> {
    allowed.ask(move |service, by| service.revoke_host(by, &host)).await.map(Json)
}

/// Which alerts.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AlertsQuery {
    /// Acknowledged ones too.
    #[serde(default)]
    all: bool,
    /// `next` of the page before; from the start if absent.
    after: Option<String>,
    /// At most so many items: 100 if absent, never more than 10000.
    limit: Option<u32>,
}

/// List alerts, newest first.
#[utoipa::path(get, path = "/alerts", tag = "alerts", params(AlertsQuery),
    responses((status = 200, body = Page<Alert>), (status = "default", body = ProblemBody)))]
async fn alerts(allowed: Allowed<Read>, Query(q): Query<AlertsQuery>) -> Answer<Page<Alert>> {
    allowed.ask(move |service, _| service.alerts(q.all, &page(q.after, q.limit))).await.map(Json)
}

/// Take note of an alert.
#[utoipa::path(post, path = "/alerts/{alert}/ack", tag = "alerts", params(("alert" = u64, Path)),
    responses((status = 200, body = Alert), (status = "default", body = ProblemBody)))]
async fn acknowledge_alert(allowed: Allowed<Operate>, Path(id): Path<u64>) -> Answer<Alert> {
    allowed.ask(move |service, by| service.acknowledge_alert(by, id)).await.map(Json)
}

/// Make the catalog's derived tables again from the pool.
#[utoipa::path(post, path = "/catalog/rebuild", tag = "catalog", params(DryRun),
    responses((status = 202, body = Started), (status = 200, body = Plan), (status = "default", body = ProblemBody)))]
async fn rebuild_catalog(allowed: Allowed<Administer>, Query(q): Query<DryRun>) -> Result<Response, Failure> {
    start(allowed, q.dry_run, JobRequest::RebuildCatalog).await
}

/// List who can open the pool: servers and recovery kits.
#[utoipa::path(get, path = "/recipients", tag = "recovery-kit",
    responses((status = 200, body = Page<Recipient>), (status = "default", body = ProblemBody)))]
async fn recipients(allowed: Allowed<Administer>) -> Answer<Page<Recipient>> {
    let items = allowed.ask(move |service, _| service.recipients()).await?;
    Ok(Json(Page { items, next: None }))
}

/// Begin a new key generation without this recipient.
#[utoipa::path(post, path = "/recipients/{recipient}/revoke", tag = "recovery-kit",
    params(("recipient" = String, Path)),
    responses((status = 200, body = KeyGeneration), (status = "default", body = ProblemBody)))]
async fn revoke_recipient(allowed: Allowed<Administer>, Path(id): Path<String>) -> Answer<KeyGeneration> {
    allowed.ask(move |service, by| service.rotate_keys(by, Some(&id))).await.map(Json)
}

/// Begin a new key generation: what is written from now on is sealed under a new root key.
#[utoipa::path(post, path = "/pool/rotate-keys", tag = "pool",
    responses((status = 200, body = KeyGeneration), (status = "default", body = ProblemBody)))]
async fn rotate_keys(allowed: Allowed<Administer>) -> Answer<KeyGeneration> {
    allowed.ask(move |service, by| service.rotate_keys(by, None)).await.map(Json)
}

/// Write the recovery kit to a path of the server's machine. Standalone only.
#[utoipa::path(post, path = "/recovery-kit/write", tag = "recovery-kit", request_body = KitFile,
    responses((status = 200, body = KitReport), (status = "default", body = ProblemBody)))]
async fn write_kit(allowed: Allowed<Administer>, Body(request): Body<KitFile>) -> Answer<KitReport> {
    match &request.path {
        Some(path) => check_path(path)?,
        None => return Err(Problem::new(Code::Usage, "The recovery kit needs a path.").into()),
    }
    allowed.ask(move |service, by| service.write_kit(by, &request)).await.map(Json)
}

/// Open the pool with nothing but a recovery kit on the server's machine. Standalone only.
#[utoipa::path(post, path = "/recovery-kit/test", tag = "recovery-kit", request_body = KitFile,
    responses((status = 200, body = KitReport), (status = "default", body = ProblemBody)))]
async fn test_kit(allowed: Allowed<Administer>, Body(request): Body<KitFile>) -> Answer<KitReport> {
    request.path.as_deref().map_or(Ok(()), check_path)?;
    allowed.ask(move |service, by| service.test_kit(by, &request)).await.map(Json)
}
