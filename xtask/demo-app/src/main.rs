//! The demo's application: a small HTTP service that writes and reads rows in a PostgreSQL.
//!
//! `GET /` says where it runs and whether the database answers, `POST /rows` with `{"text": …}` inserts a row and
//! `GET /rows` lists the last [`ROWS_MAX`]. Settings: `DATABASE_URL` (default: user `postgres` on the host `db`),
//! `PORT` (8080), `SKEIN_NODE` (the name shown as the place it runs on; else the host name).
//!
//! One task serves each connection; one more drives the database connection and ends with it. The client is shared
//! behind a lock and made anew when it is lost. No channels. One line per request goes to standard output.
#![allow(clippy::print_stdout, reason = "the log of a container is its standard output")]

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, NoTls};

/// Where the database is when nobody says.
const DATABASE_URL: &str = "postgres://postgres@db/postgres";

/// Time for everything a request asks of the database, connecting included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Pauses between attempts to connect at start: doubled from the first to the last, then that for ever.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// See [`RETRY_FIRST`].
const RETRY_LAST: Duration = Duration::from_secs(2);

/// Rows that one answer holds at most.
const ROWS_MAX: i64 = 1000;

/// Bytes of a request's body at most.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

const CREATE: &str = "CREATE TABLE IF NOT EXISTS demo_rows (id bigserial PRIMARY KEY, text text NOT NULL, \
                      node text NOT NULL, created timestamptz NOT NULL DEFAULT now())";

/// What all requests share.
struct App {
    database: tokio_postgres::Config,
    client: Mutex<Option<Arc<Client>>>,
    node: String,
}

/// Why a request could not be served.
enum Failure {
    /// The database does not answer: 503 with the reason.
    Database(String),
    /// The request is wrong: 400 with the reason.
    Request(String),
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (status, reason) = match self {
            Self::Database(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason),
            Self::Request(reason) => (StatusCode::BAD_REQUEST, reason),
        };
        (status, Json(json!({ "error": reason }))).into_response()
    }
}

impl App {
    /// The connection, a new one if the last is lost. Also makes the table, which a new database lacks.
    async fn client(&self) -> Result<Arc<Client>> {
        let mut slot = self.client.lock().await;
        if let Some(client) = slot.as_ref().filter(|client| !client.is_closed()) {
            return Ok(Arc::clone(client));
        }
        let (client, connection) = self.database.connect(NoTls).await.context("failed to connect to the database")?;
        // Ends when the client is dropped or the connection breaks; either is seen at the client.
        tokio::spawn(connection);
        // Two that start at the same time may both try to make the table: one is told that it exists.
        if let Err(e) = client.batch_execute(CREATE).await {
            let exists = client.query_one("SELECT to_regclass('demo_rows') IS NOT NULL", &[]).await;
            let exists = exists.is_ok_and(|row| row.get(0));
            ensure!(exists, "failed to create the table: {e}");
        }
        let client = Arc::new(client);
        *slot = Some(Arc::clone(&client));
        Ok(client)
    }

    /// Runs a query within the time limit. A connection that was too slow is given up: it may be dead without a sign.
    async fn query<T>(
        &self,
        work: impl AsyncFnOnce(&Client) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, Failure> {
        let all = async {
            let client = self.client().await?;
            work(&client).await.context("failed to query the database")
        };
        match timeout(REQUEST_TIMEOUT, all).await {
            Ok(result) => result.map_err(|e| Failure::Database(format!("{e:#}"))),
            Err(_) => {
                // Another request may hold the lock while it connects; then the connection is a new one anyway.
                if let Ok(mut slot) = self.client.try_lock() {
                    *slot = None;
                }
                Err(Failure::Database(format!("failed to hear from the database within {REQUEST_TIMEOUT:?}")))
            }
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("DATABASE_URL").unwrap_or_else(|_| DATABASE_URL.to_owned());
    let mut database: tokio_postgres::Config = url.parse().context("failed to parse DATABASE_URL")?;
    if database.get_connect_timeout().is_none() {
        database.connect_timeout(REQUEST_TIMEOUT);
    }
    let port: u16 = match std::env::var("PORT") {
        Ok(text) => text.parse().with_context(|| format!("failed to parse PORT {text:?}"))?,
        Err(_) => 8080,
    };
    let app = Arc::new(App { database, client: Mutex::new(None), node: place() });
    let router = Router::new()
        .route("/", get(health))
        .route("/rows", get(list).post(insert))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(log))
        .with_state(Arc::clone(&app));

    let v4 = listen(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
    // A host may be without IPv6.
    let v6 = listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    println!("listening on port {port} as {}", app.node);
    tokio::spawn(connect_at_start(app));
    let stop = async { stop_signal().await };
    let serve_v6 = async {
        match v6 {
            Ok(listener) => axum::serve(listener, router.clone()).await,
            Err(e) => {
                println!("no IPv6: {e:#}");
                std::future::pending().await
            }
        }
    };
    // All are cancel-safe: the process ends with the first that is done.
    tokio::select! {
        result = axum::serve(v4, router.clone()) => result.context("failed to serve"),
        result = serve_v6 => result.context("failed to serve"),
        result = stop => result,
    }
}

/// As the first process of a container it gets no default action for signals.
async fn stop_signal() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    // Both are cancel-safe, as tokio documents.
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    println!("stopping");
    Ok(())
}

/// A listener of its own per family: whether one of both serves IPv4 too is a setting of the machine.
fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = socket.with_context(|| format!("failed to make a socket for {address}"))?;
    socket.set_reuseaddr(true).context("failed to set SO_REUSEADDR")?;
    if address.is_ipv6() {
        only_v6(&socket).context("failed to set IPV6_V6ONLY")?;
    }
    socket.bind(address).with_context(|| format!("failed to bind {address}"))?;
    socket.listen(BACKLOG).with_context(|| format!("failed to listen on {address}"))
}

fn only_v6(socket: &TcpSocket) -> std::io::Result<()> {
    socket2::SockRef::from(socket).set_only_v6(true)
}

/// Where it runs: the node if it is told, else the host name, which in a container is its id.
fn place() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    std::env::var("SKEIN_NODE").unwrap_or_else(|_| name.trim_end().to_owned())
}

async fn connect_at_start(app: Arc<App>) {
    let mut pause = RETRY_FIRST;
    loop {
        match timeout(REQUEST_TIMEOUT, app.client()).await {
            Ok(Ok(_)) => return println!("connected to the database"),
            Ok(Err(e)) => println!("no database yet: {e:#}"),
            Err(_) => println!("no database yet: no answer within {REQUEST_TIMEOUT:?}"),
        }
        sleep(pause).await;
        pause = RETRY_LAST.min(pause * 2);
    }
}

async fn log(request: Request, next: Next) -> Response {
    let start = Instant::now();
    let mut line = format!("{} {}", request.method(), request.uri());
    let response = next.run(request).await;
    let _ = write!(line, " {} {} ms", response.status().as_u16(), start.elapsed().as_millis());
    println!("{line}");
    response
}

async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, Failure> {
    let row = app.query(async |client| client.query_one("SELECT count(*) FROM demo_rows", &[]).await).await?;
    Ok(Json(json!({ "ok": true, "node": app.node, "rows": row.get::<_, i64>(0) })))
}

async fn insert(
    State(app): State<Arc<App>>,
    body: Result<Json<Value>, JsonRejection>,
) -> Result<(StatusCode, Json<Value>), Failure> {
    let Json(body) = body.map_err(|e| Failure::Request(e.body_text()))?;
    let text = body.get("text").and_then(Value::as_str);
    let text = text.ok_or_else(|| Failure::Request("expected {\"text\": \"…\"}".to_owned()))?.to_owned();
    let node = app.node.clone();
    let sql = "INSERT INTO demo_rows (text, node) VALUES ($1, $2) RETURNING id";
    let row = app.query(async |client| client.query_one(sql, &[&text, &node]).await).await?;
    Ok((StatusCode::CREATED, Json(json!({ "id": row.get::<_, i64>(0), "node": app.node }))))
}

async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, Failure> {
    let sql = "SELECT id, text, node FROM (SELECT * FROM demo_rows ORDER BY id DESC LIMIT $1) last ORDER BY id";
    let rows = app.query(async |client| client.query(sql, &[&ROWS_MAX]).await).await?;
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({ "id": row.get::<_, i64>(0), "text": row.get::<_, String>(1), "node": row.get::<_, String>(2) })
        })
        .collect();
    Ok(Json(Value::Array(rows)))
}
