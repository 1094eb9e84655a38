//! `skein-master`: keeps the desired state of a cluster, schedules, and serves its API.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use skein_daemon::{EXIT_CONFIG, fail, init_log, raise_descriptor_limit, wait_for_signal};
use skein_master::{
    agents::Agents,
    ask::Asker,
    broker::Broker,
    cluster::Cluster,
    config::{Config, Overrides},
    http, pki,
    server::{Connections, Server, bind_unix},
    store::{self, EmbeddedStore, Store},
    tls, tunnels,
};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A master makes and drops many small objects of all ages, in batches of a hundred thousand: glibc's allocator took a
/// quarter of its CPU time for that, and kept three times the memory.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long connections may take to end.
const DRAIN: std::time::Duration = std::time::Duration::from_secs(5);

#[derive(Parser)]
#[command(version, about = "Skein's master: keeps the desired state, schedules, serves the API", long_about = None)]
struct Cli {
    #[command(flatten)]
    overrides: Overrides,
    #[command(subcommand)]
    command: Option<Cmd>,
}

#[derive(Subcommand)]
enum Cmd {
    /// Run (the default).
    Run,
    /// Check the configuration and say what it means.
    CheckConfig,
    /// Restore a backup into an empty data directory. The master must not run.
    Restore {
        /// A file that `skein backup` wrote.
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = match Config::load(&cli.overrides) {
        Ok(config) => config,
        Err(error) => return fail(&error, None, EXIT_CONFIG),
    };
    init_log(config.log_format);
    let result = match cli.command {
        None | Some(Cmd::Run) => run(config),
        Some(Cmd::CheckConfig) => {
            say(&format!("configuration is valid: {config:#?}"));
            Ok(())
        }
        Some(Cmd::Restore { file }) => restore(&config, &file),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let hint = error.downcast_ref::<store::StoreError>().and_then(store::StoreError::hint);
            fail(error.as_ref(), hint.as_deref(), 1)
        }
    }
}

#[allow(clippy::print_stdout, reason = "what the command was asked for")]
fn say(text: &str) {
    println!("{text}");
}

fn restore(config: &Config, file: &std::path::Path) -> anyhow::Result<()> {
    let reader = std::fs::File::open(file).with_context(|| format!("failed to open {}", file.display()))?;
    let summary = store::restore(std::io::BufReader::new(reader), &config.data_dir)?;
    say(&format!(
        "restored {} records of revision {} into {}",
        summary.records,
        summary.revision,
        config.data_dir.display()
    ));
    Ok(())
}

fn run(config: Config) -> anyhow::Result<()> {
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers()).enable_all().build()?;
    runtime.block_on(serve(config))
}

/// Threads that serve connections: half of the cores. The loop and the store's writer have threads of their own; and ten
/// thousand agents that say little, one at a time, are served for a fifth less where a thread needs not wake another for each.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    // Everything that can be refused is looked at before the store changes.
    let embedded = EmbeddedStore::open(&config.data_dir)?;
    let store: Arc<dyn Store> = Arc::new(embedded.clone());
    let unix = bind_unix(&config.socket)?;
    let tcp =
        TcpListener::bind(config.listen).await.with_context(|| format!("failed to listen on {}", config.listen))?;
    let shutdown = CancellationToken::new();
    let (connections, tasks) = (Connections::default(), TaskTracker::new());
    let (cluster, handle) = Cluster::start(store.clone(), config.settings(), connections.clone()).await?;
    let ca = Arc::new(cluster.ca()?);
    let broker = Broker::default();
    let agents = Agents { cluster: handle.clone(), ca: ca.clone(), broker: broker.clone(), tasks: tasks.clone() };
    let asker = Asker { cluster: handle.clone(), broker: broker.clone() };
    let api = http::Api::new(handle, ca.clone(), broker, embedded.clone(), tasks.clone());
    tasks.spawn(tunnels::watch_new(asker, api.findings.clone(), shutdown.clone()));
    let server = Server::new(http::router(api, agents), shutdown.clone(), tasks, connections);
    let resolver = Arc::new(tls::Resolver::new(&ca, &config.names)?);
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls::server_config(&ca, resolver.clone())?));
    // A thread of its own: however many requests wait for the others, the kernel gives the loop its share.
    let (runtime, ends) = (tokio::runtime::Handle::current(), shutdown.clone());
    let mut cluster = tokio::task::spawn_blocking(move || runtime.block_on(cluster.run(ends)));
    server.listen_tls(tcp, acceptor);
    server.listen_unix(unix);
    server.tasks.spawn(renew_certificate(resolver, ca, config.names.clone(), shutdown.clone()));
    tracing::info!(listen = %config.listen, socket = %config.socket.display(), "master ready");

    // A master whose loop is gone answers nobody: better that its service manager starts another.
    tokio::select! {
        signal = wait_for_signal() => signal?,
        ended = &mut cluster => {
            ended.context("the loop failed, which is a bug")?;
            anyhow::bail!("the loop ended by itself, which is a bug");
        }
    }
    tracing::info!("shutting down");
    shutdown.cancel();
    server.tasks.close();
    if tokio::time::timeout(DRAIN, server.tasks.wait()).await.is_err() {
        tracing::warn!("some connections did not end in time");
    }
    cluster.await?;
    embedded.close().await?;
    // A socket that nobody serves would only make the next start look twice.
    let _ = std::fs::remove_file(&config.socket);
    Ok(())
}

/// Makes a new certificate for the listener at half of the present one's life.
async fn renew_certificate(
    resolver: Arc<tls::Resolver>,
    ca: Arc<pki::Ca>,
    names: Vec<String>,
    shutdown: CancellationToken,
) {
    let half = std::time::Duration::from_secs(pki::MASTER_LIFETIME.whole_seconds().unsigned_abs() / 2);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(half) => {}
        }
        if let Err(error) = resolver.renew(&ca, &names) {
            tracing::error!(error = format!("{error:#}"), "failed to renew the listener's certificate");
        }
    }
}
