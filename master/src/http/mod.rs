//! The native API (docs/api.md): JSON in, commands and reads to the loop, JSON out.
//!
//! Parses and checks who asks; knows nothing of what a command means. Only users (by certificate) and the local operator
//! (by the unix socket) get in; agents have their own protocol on the same port.

mod events;
#[cfg(test)]
mod fuzz;
mod list;
mod net;
mod streams;

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{FromRequestParts, Path, Query, State},
    response::{IntoResponse, Response},
    routing::{delete, get, post, put},
};
use http::{StatusCode, request::Parts};
use master_core::{Command, Core, Reply};
use serde::{Deserialize, de::DeserializeOwned};
use skein_api::{
    ApiError, CertBundle, CertRequest, ClusterInfo, ContainerCreate, Network, NetworkSpec, Node, NodeState, NodeUpdate,
    Origin, Resources, StackApply, StackPlan, Task, TaskState, Token, TokenCreate, TokenCreated, TokenId, grpc,
};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::{
    agents::Agents,
    broker::Broker,
    cluster::{Handle, Position},
    pki::{self, Ca, Identity},
    server::ConnInfo,
    store::{EmbeddedStore, Revision, Store as _},
    tunnels::Findings,
};

/// What the API works with.
#[derive(Clone)]
pub struct Api {
    /// The loop.
    pub cluster: Handle,
    /// Signs users' certificates.
    pub ca: Arc<Ca>,
    /// Logs and exec.
    pub broker: Broker,
    /// For backups and health.
    pub store: EmbeddedStore,
    /// Where streams run.
    pub tasks: TaskTracker,
    /// What is wrong with hosts that joined.
    pub findings: Findings,
    events: events::Texts,
    /// One for each question of the form "what if" that may be answered at a time: each has a copy of the cluster.
    questions: Arc<Semaphore>,
}

/// Questions of the form "what if" that are answered at a time; the others wait for their turn.
const QUESTIONS_MAX: usize = 2;

impl Api {
    /// An API over these.
    pub fn new(cluster: Handle, ca: Arc<Ca>, broker: Broker, store: EmbeddedStore, tasks: TaskTracker) -> Self {
        let questions = Arc::new(Semaphore::new(QUESTIONS_MAX));
        let (events, findings) = (events::Texts::default(), Findings::default());
        Self { cluster, ca, broker, store, tasks, findings, events, questions }
    }
}

/// Longest life of a user's certificate: a year.
const CERT_TTL_S_MAX: u64 = 365 * 24 * 3_600;

/// Largest message of an agent: 256 reports of at most 8 KiB, or a host with ten thousand routes.
const AGENT_MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Native API and agent protocol in one service.
pub fn router(api: Api, agents: Agents) -> Router {
    let native = Router::new()
        .route("/v1/info", get(info))
        .route("/v1/nodes", get(nodes))
        .route("/v1/nodes/{reference}", get(node).patch(node_update).delete(node_remove))
        .route("/v1/tokens", get(tokens).post(token_create))
        .route("/v1/tokens/{id}", delete(token_revoke))
        .route("/v1/networks", get(networks).post(network_create))
        .route("/v1/networks/{reference}", get(network).delete(network_remove))
        .route("/v1/services", get(services))
        .route("/v1/services/{reference}", get(service).delete(service_remove))
        .route("/v1/tasks", get(tasks))
        .route("/v1/tasks/{reference}", get(task).delete(container_remove))
        .route("/v1/tasks/{reference}/stop", post(container_stop))
        .route("/v1/tasks/{reference}/start", post(container_start))
        .route("/v1/tasks/{reference}/logs", get(streams::logs))
        .route("/v1/tasks/{reference}/exec", post(streams::exec))
        .route("/v1/containers", post(container_create))
        .route("/v1/volumes", get(volumes))
        .route("/v1/stacks", get(stacks))
        .route("/v1/stacks/{name}", put(stack_apply).delete(stack_remove))
        .route("/v1/explain/{reference}", get(explain))
        .route("/v1/what-if", post(what_if))
        .route("/v1/check", get(check))
        .route("/v1/net/status", get(net::status))
        .route("/v1/net/path", get(net::path))
        .route("/v1/net/check", get(net::check))
        .route("/v1/net/exposed", get(net::exposed))
        .route("/v1/events", get(events))
        .route("/v1/certs", post(cert_issue))
        .route("/v1/backup", get(backup))
        // Denied by default: a route that does not name its user is closed to strangers all the same.
        .route_layer(axum::middleware::from_extractor::<User>())
        .fallback(|| async { Failure(ApiError::new("not_found", "no such path; see docs/api.md")) })
        .with_state(api);
    let service = grpc::agent_server::AgentServer::new(agents).max_decoding_message_size(AGENT_MESSAGE_BYTES_MAX);
    let agents = tonic::service::Routes::new(service).prepare().into_axum_router().reset_fallback();
    let lean = |response: Response| response.map(|body| axum::body::Body::new(skein_api::shed(body)));
    native.merge(agents.layer(tower::util::MapResponseLayer::new(lean)))
}

/// A failure on its way to the user.
struct Failure(ApiError);

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.0.code.as_str() {
            "bad_request" | "bad_name" | "bad_subnet" | "ambiguous" => StatusCode::BAD_REQUEST,
            "forbidden" => StatusCode::FORBIDDEN,
            "not_found" => StatusCode::NOT_FOUND,
            "name_taken" | "port_taken" | "in_use" | "conflict" | "node_ready" | "running" | "service_task"
            | "subnet_overlaps" => StatusCode::CONFLICT,
            "read_only" | "not_stored" | "node_unreachable" | "not_answered" | "shutting_down" | "not_ready" => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            _ => StatusCode::UNPROCESSABLE_ENTITY,
        };
        (status, Json(self.0)).into_response()
    }
}

type Answer<T> = Result<Json<T>, Failure>;

/// A user, with what they say of the reason.
struct User(Origin);

impl<S: Sync> FromRequestParts<S> for User {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        let info = parts.extensions.get::<ConnInfo>().expect("the server puts it into every request");
        let who = match &info.identity {
            Identity::User(name) => format!("user:{name}"),
            Identity::Local(uid) => format!("local:{uid}"),
            Identity::Node { .. } | Identity::Anonymous => {
                return Err(Failure(
                    ApiError::new("forbidden", "this call needs a user's certificate").with_hint("skein cert issue"),
                ));
            }
        };
        let why = parts.headers.get("skein-why").and_then(|v| v.to_str().ok()).unwrap_or_default();
        Ok(Self(Origin { who, why: why.chars().take(200).collect() }))
    }
}

/// A JSON body, whatever its content type says, with the place of a mistake.
fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Failure> {
    let body: &[u8] = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body)
        .map_err(|e| Failure(ApiError::new("bad_request", format!("failed to parse the request's body: {e}"))))
}

/// The local operator. What gives its holder the whole cluster for good (the CA's key, new certificates) is not for
/// certificates, which end and may be lost.
struct Operator(Origin);

impl<S: Sync> FromRequestParts<S> for Operator {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let User(origin) = User::from_request_parts(parts, state).await?;
        let info = parts.extensions.get::<ConnInfo>().expect("the server puts it into every request");
        match info.identity {
            Identity::Local(_) => Ok(Self(origin)),
            _ => Err(Failure(
                ApiError::new("forbidden", "this call is for the local operator")
                    .with_hint("run it on the master's host, through its unix socket"),
            )),
        }
    }
}

impl Api {
    async fn read<T: Send + 'static>(&self, f: impl FnOnce(&Core) -> T + Send + 'static) -> Result<T, Failure> {
        Ok(self.cluster.query(f).await?)
    }

    async fn run(&self, user: User, command: Command) -> Result<Reply, Failure> {
        Ok(self.cluster.command(command, user.0).await?)
    }

    /// Changes something and answers with what the change left.
    async fn change<T: Send + 'static>(
        &self,
        user: User,
        command: Command,
        read: impl FnOnce(&Core, Reply) -> Result<T, ApiError> + Send + 'static,
    ) -> Answer<T> {
        Ok(Json(self.cluster.command_and_read(command, user.0, read).await??))
    }

    /// Changes a container task and answers with it.
    async fn change_task(&self, user: User, command: Command) -> Answer<Task> {
        let read = |core: &Core, reply| {
            let Reply::Task(id) = reply else { unreachable!("a container task's command answers with it") };
            core.model().find_task(id.as_str()).cloned()
        };
        self.change(user, command, read).await
    }
}

async fn info(State(api): State<Api>, _: User) -> Answer<ClusterInfo> {
    let ca_sha256 = api.ca.digest();
    let position = api.cluster.position();
    let info = api.read(move |core| {
        let model = core.model();
        let (mut nodes, mut tasks) = (BTreeMap::new(), BTreeMap::new());
        let mut offered = Resources::default();
        let word = |value: serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let mut node_states = BTreeMap::<_, u64>::new();
        for node in model.nodes.values() {
            let state = core.node_status(&node.id).state;
            *node_states.entry(state).or_default() += 1;
            if state == NodeState::Ready {
                add(&mut offered, node.description.offered);
            }
        }
        nodes.extend(node_states.into_iter().map(|(state, count)| (word(serde_json::json!(state)), count)));
        // Not one by one: there may be a hundred thousand, and everybody asks.
        tasks.extend(model.task_states().iter().map(|(state, count)| (word(serde_json::json!(state)), *count)));
        let reserved = core.scheduler().reserved();
        let id = model.cluster.as_ref().map(|c| c.id.clone()).unwrap_or_default();
        ClusterInfo { id, nodes, tasks, offered, reserved, ..ClusterInfo::default() }
    });
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let Position { revision, epoch, read_only } = position;
    Ok(Json(ClusterInfo { version, ca_sha256, revision, epoch, read_only, ..info.await? }))
}

/// Agents say what they like: a sum must not overflow.
fn add(sum: &mut Resources, more: Resources) {
    sum.nano_cpus = sum.nano_cpus.saturating_add(more.nano_cpus);
    sum.mem_bytes = sum.mem_bytes.saturating_add(more.mem_bytes);
}

async fn nodes(State(api): State<Api>, _: User) -> Result<Response, Failure> {
    let mut nodes = api.read(|core| core.model().nodes.values().map(|n| core.node_view(n)).collect::<Vec<_>>()).await?;
    nodes.iter_mut().for_each(|node| api.findings.add_to(node));
    Ok(list::answer(nodes))
}

async fn node(State(api): State<Api>, _: User, Path(reference): Path<String>) -> Answer<Node> {
    let found = api.read(move |core| core.model().find_node(&reference).map(|n| core.node_view(n)));
    let mut node = found.await??;
    api.findings.add_to(&mut node);
    Ok(Json(node))
}

async fn node_update(State(api): State<Api>, user: User, Path(reference): Path<String>, body: Bytes) -> Answer<Node> {
    let update: NodeUpdate = parse(&body)?;
    let read = |core: &Core, reply| {
        let Reply::Node(id) = reply else { unreachable!("a node update answers with a node") };
        core.model().find_node(id.as_str()).map(|n| core.node_view(n))
    };
    api.change(user, Command::NodeUpdate { node: reference, update }, read).await
}

#[derive(Deserialize)]
struct Force {
    #[serde(default)]
    force: bool,
}

async fn node_remove(
    State(api): State<Api>,
    user: User,
    Path(node): Path<String>,
    Query(Force { force }): Query<Force>,
) -> Answer<serde_json::Value> {
    api.run(user, Command::NodeRemove { node, force }).await?;
    Ok(Json(serde_json::json!({})))
}

async fn tokens(State(api): State<Api>, _: User) -> Answer<Vec<Token>> {
    let shown = |t: &Token| Token { secret_sha256: String::new(), ..t.clone() };
    Ok(Json(api.read(move |core| core.model().tokens.values().map(shown).collect()).await?))
}

async fn token_create(State(api): State<Api>, user: User, body: Bytes) -> Answer<TokenCreated> {
    let request: TokenCreate = parse(&body)?;
    let (id, secret, token) = pki::new_token(&api.ca.digest());
    let secret_sha256 = pki::sha256_hex(secret.as_bytes());
    let command = Command::TokenCreate { id: id.clone(), secret_sha256, request };
    let read = move |core: &Core, _| {
        let info = core.model().tokens.get(&id).cloned().unwrap_or_default();
        Ok(TokenCreated { token, info: Token { secret_sha256: String::new(), ..info } })
    };
    api.change(user, command, read).await
}

async fn token_revoke(State(api): State<Api>, user: User, Path(id): Path<String>) -> Answer<serde_json::Value> {
    api.run(user, Command::TokenRevoke(TokenId::new(id))).await?;
    Ok(Json(serde_json::json!({})))
}

async fn networks(State(api): State<Api>, _: User) -> Answer<Vec<Network>> {
    Ok(Json(api.read(|core| core.model().networks.values().map(|n| core.network_view(n)).collect()).await?))
}

async fn network(State(api): State<Api>, _: User, Path(reference): Path<String>) -> Answer<Network> {
    let found = api.read(move |core| core.model().find_network(&reference).map(|n| core.network_view(n)));
    Ok(Json(found.await??))
}

async fn network_create(State(api): State<Api>, user: User, body: Bytes) -> Answer<Network> {
    let read = |core: &Core, reply| {
        let Reply::Network(id) = reply else { unreachable!("a new network answers with its id") };
        core.model().find_network(id.as_str()).cloned()
    };
    api.change(user, Command::NetworkCreate(parse::<NetworkSpec>(&body)?), read).await
}

async fn network_remove(
    State(api): State<Api>,
    user: User,
    Path(reference): Path<String>,
) -> Answer<serde_json::Value> {
    api.run(user, Command::NetworkRemove(reference)).await?;
    Ok(Json(serde_json::json!({})))
}

#[derive(Deserialize)]
struct Filter {
    stack: Option<String>,
    service: Option<String>,
    node: Option<String>,
    #[serde(default)]
    all: bool,
}

async fn services(State(api): State<Api>, _: User, Query(filter): Query<Filter>) -> Answer<Vec<skein_api::Service>> {
    let wanted = move |s: &&skein_api::Service| filter.stack.is_none() || s.spec.stack == filter.stack;
    Ok(Json(api.read(move |core| core.model().services.values().filter(wanted).cloned().collect()).await?))
}

async fn service(State(api): State<Api>, _: User, Path(reference): Path<String>) -> Answer<skein_api::Service> {
    Ok(Json(api.read(move |core| core.model().find_service(&reference).cloned()).await??))
}

async fn service_remove(
    State(api): State<Api>,
    user: User,
    Path(reference): Path<String>,
) -> Answer<serde_json::Value> {
    api.run(user, Command::ServiceRemove(reference)).await?;
    Ok(Json(serde_json::json!({})))
}

async fn tasks(State(api): State<Api>, _: User, Query(filter): Query<Filter>) -> Result<Response, Failure> {
    let found = api.read(move |core| {
        let model = core.model();
        let node = filter.node.as_deref().map(|n| model.find_node(n).map(|n| n.id.clone())).transpose()?;
        let service = filter.service.as_deref().map(|s| model.find_service(s).map(|s| s.id.clone())).transpose()?;
        // Container tasks stay listed when they are stopped only with `all`, like containers of an engine.
        let live = |t: &Task| filter.all || !t.status.state.is_terminal() && t.desired_state != TaskState::Remove;
        // What is asked for most has a lookup of its own.
        let candidates: Box<dyn Iterator<Item = &Arc<Task>>> = match (&node, &service) {
            (Some(node), _) => Box::new(model.node_tasks(node).map(|t| &model.tasks[&t.id])),
            (None, Some(service)) => Box::new(model.service_tasks(service).map(|t| &model.tasks[&t.id])),
            // No lookups: the loop waits meanwhile, for a hundred thousand of them.
            (None, None) => Box::new(model.tasks.values()),
        };
        let found: Vec<Arc<Task>> = candidates
            .filter(|t| live(t))
            .filter(|t| service.is_none() || t.service == service)
            .filter(|t| filter.stack.is_none() || t.stack == filter.stack)
            .cloned()
            .collect();
        Ok::<_, ApiError>(found)
    });
    Ok(list::answer(found.await??))
}

async fn task(State(api): State<Api>, _: User, Path(reference): Path<String>) -> Answer<Task> {
    Ok(Json(api.read(move |core| core.model().find_task(&reference).cloned()).await??))
}

async fn container_create(State(api): State<Api>, user: User, body: Bytes) -> Answer<Task> {
    let create: ContainerCreate = parse(&body)?;
    api.change_task(user, Command::ContainerCreate(Box::new(create))).await
}

async fn container_stop(State(api): State<Api>, user: User, Path(reference): Path<String>) -> Answer<Task> {
    api.change_task(user, Command::ContainerStop(reference)).await
}

async fn container_start(State(api): State<Api>, user: User, Path(reference): Path<String>) -> Answer<Task> {
    api.change_task(user, Command::ContainerStart(reference)).await
}

async fn container_remove(
    State(api): State<Api>,
    user: User,
    Path(task): Path<String>,
    Query(Force { force }): Query<Force>,
) -> Answer<serde_json::Value> {
    api.run(user, Command::ContainerRemove { task, force }).await?;
    Ok(Json(serde_json::json!({})))
}

async fn volumes(State(api): State<Api>, _: User) -> Answer<Vec<skein_api::Volume>> {
    Ok(Json(api.read(|core| core.model().volumes.values().cloned().collect()).await?))
}

async fn stacks(State(api): State<Api>, _: User) -> Answer<Vec<String>> {
    let names = api.read(|core| {
        let names = core.model().services.values().filter_map(|s| s.spec.stack.clone());
        names.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
    });
    Ok(Json(names.await?))
}

fn plan(reply: Reply) -> Answer<StackPlan> {
    let Reply::Plan(plan) = reply else { unreachable!("a stack's command answers with a plan") };
    Ok(Json(plan))
}

async fn stack_apply(State(api): State<Api>, user: User, Path(name): Path<String>, body: Bytes) -> Answer<StackPlan> {
    let apply: StackApply = parse(&body)?;
    if apply.stack.name != name {
        let message = format!("the path names stack {name:?}, the body {:?}", apply.stack.name);
        return Err(Failure(ApiError::new("bad_request", message)));
    }
    let preempts = apply.dry_run && apply.stack.services.iter().any(|service| service.task.placement.preempt);
    let question = preempts.then(|| apply.clone());
    let Json(mut plan) = plan(api.run(user, Command::StackApply(Box::new(apply))).await?)?;
    if let Some(apply) = question {
        plan.warnings.append(&mut beside(&api, move |copy| copy.preemptions(&apply)).await?);
    }
    Ok(Json(plan))
}

#[derive(Deserialize)]
struct StackRemoveQuery {
    #[serde(default)]
    volumes: bool,
    #[serde(default)]
    dry_run: bool,
}

async fn stack_remove(
    State(api): State<Api>,
    user: User,
    Path(name): Path<String>,
    Query(query): Query<StackRemoveQuery>,
) -> Answer<StackPlan> {
    let command = Command::StackRemove { name, volumes: query.volumes, dry_run: query.dry_run };
    plan(api.run(user, command).await?)
}

async fn explain(
    State(api): State<Api>,
    _: User,
    Path(reference): Path<String>,
    Query(query): Query<skein_api::ExplainQuery>,
) -> Answer<skein_api::Explanation> {
    Ok(Json(api.cluster.ask(move |core| core.explain(&reference, &query)).await??))
}

/// Asks a copy, beside the loop, which only gives references to every object.
async fn beside<T: Send + 'static>(
    api: &Api,
    ask: impl FnOnce(Core) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, Failure> {
    let _turn = api.questions.acquire().await.map_err(|_| ApiError::new("not_ready", "the master is ending"))?;
    let sketch = api.read(Core::sketch).await?;
    let answer = tokio::task::spawn_blocking(move || ask(sketch.into_core())).await;
    Ok(answer.map_err(|_| ApiError::new("internal", "the question ended in a panic: please report it"))??)
}

async fn what_if(State(api): State<Api>, _: User, body: Bytes) -> Answer<skein_api::WhatIfAnswer> {
    let question: skein_api::WhatIf = parse(&body)?;
    Ok(Json(beside(&api, move |copy| copy.what_if(&question)).await?))
}

async fn check(State(api): State<Api>, _: User) -> Answer<Vec<String>> {
    Ok(Json(api.read(Core::check).await?))
}

#[derive(Deserialize)]
struct EventsQuery {
    from: Option<u64>,
}

/// Changes after a revision, or from now on. A reader that is too slow, or asks for what is no longer kept, gets `missed`
/// and the end: it must read the state anew.
async fn events(State(api): State<Api>, _: User, Query(EventsQuery { from }): Query<EventsQuery>) -> Response {
    let from = from.unwrap_or_else(|| api.cluster.position().revision);
    events::answer(api.store.watch(Revision(from)), api.events)
}

async fn cert_issue(State(api): State<Api>, user: Operator, body: Bytes) -> Answer<CertBundle> {
    let request: CertRequest = parse(&body)?;
    let bad = |message: String| Failure(ApiError::new("bad_request", message));
    let valid =
        !request.name.is_empty() && request.name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-@".contains(c));
    if !valid || request.name.len() > 64 {
        return Err(bad(format!("user name {:?} is not 1 to 64 letters, digits, `_`, `.`, `-` and `@`", request.name)));
    }
    if request.ttl_s == 0 || request.ttl_s > CERT_TTL_S_MAX {
        return Err(bad(format!("ttl_s {} is not 1 to {CERT_TTL_S_MAX}", request.ttl_s)));
    }
    let (certificate_pem, key_pem) = api
        .ca
        .issue_user(&request.name, request.ttl_s)
        .map_err(|e| bad(format!("failed to issue a certificate: {e}")))?;
    tracing::info!(user = request.name, by = user.0.who, "client certificate issued");
    Ok(Json(CertBundle { certificate_pem, key_pem, ca_pem: api.ca.certificate_pem().to_owned() }))
}

async fn backup(State(api): State<Api>, _: Operator) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    api.store.backup(&mut bytes).await.map_err(|e| Failure(ApiError::new("not_stored", e.to_string())))?;
    Ok(bytes)
}
