//! `skein-agent`: runs a host's containers and its part of the overlay as a master wants them.

use std::{
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixListener,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use netlib::{Kernel as _, linux::LinuxKernel};
use skein_agent::{
    attached,
    config::{Config, Overrides},
    dns::UpstreamSource,
    engine::{Engine, EngineConfig},
    executor::Executor,
    fdstore::{HandedOver, Manager},
    host::{self, Host},
    identity::{self, IdentityDir, Membership, Tcp},
    ledger::Ledger,
    overlay::{OverlayConfig, OverlayHandle, OverlayTask, Wanted},
    plugin::{self, PluginServer},
    session::{Ended, Session},
};
use skein_api::{DEFAULT_PORT, JoinToken, grpc};
use skein_daemon::{EXIT_CONFIG, chain, fail, init_log, wait_for_signal};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// Exit code after removal from the cluster, so that a service manager does not start the agent again.
const EXIT_REMOVED: u8 = 3;

/// How long a master may take to answer a join.
const JOIN_WITHIN: Duration = Duration::from_secs(15);

/// Grace of containers when the host leaves its cluster.
const LEAVE_GRACE: Duration = Duration::from_secs(10);

#[derive(Parser)]
#[command(version, about = "Skein's agent: runs a host's containers and overlay", long_about = None)]
struct Cli {
    #[command(flatten)]
    overrides: Overrides,
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Make this host a node of a cluster.
    Join(JoinArgs),
    /// Run.
    Run,
    /// Stop this host's tasks, remove everything of Skein's from it, and forget the cluster. The agent must not run.
    Leave,
    /// Check the configuration and say what it means.
    CheckConfig,
}

#[derive(clap::Args)]
struct JoinArgs {
    /// Address of the master, `host[:port]`; may be given several times.
    #[arg(long, required = true)]
    master: Vec<String>,
    /// Join token, as `skein token create` printed it.
    #[arg(long, env = "SKEIN_JOIN_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// File with the join token.
    #[arg(long, conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// Name of the node; default is the host's.
    #[arg(long)]
    name: Option<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = match Config::load(&cli.overrides) {
        Ok(config) => config,
        Err(error) => return fail(&error, None, EXIT_CONFIG),
    };
    init_log(config.log_format);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, None, 1),
    };
    let result = match cli.command {
        Cmd::Join(args) => runtime.block_on(join(config, args)),
        Cmd::Run => runtime.block_on(run(config)),
        Cmd::Leave => runtime.block_on(leave(config)),
        Cmd::CheckConfig => {
            say(&format!("configuration is valid: {config:#?}"));
            Ok(ExitCode::SUCCESS)
        }
    };
    match result {
        Ok(code) => code,
        Err(error) => fail(error.as_ref(), None, 1),
    }
}

#[allow(clippy::print_stdout, reason = "what the command was asked for")]
fn say(text: &str) {
    println!("{text}");
}

/// `host`, `host:port`, `[v6]:port` or a bare IPv6 address, with the default port where there is none.
fn with_port(master: &str) -> String {
    if let Ok(address) = master.parse::<IpAddr>() {
        return SocketAddr::new(address, DEFAULT_PORT).to_string();
    }
    let has_port = master.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if has_port { master.to_owned() } else { format!("{master}:{DEFAULT_PORT}") }
}

fn hostname() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("failed to read the host's name")?;
    Ok(name.to_string_lossy().into_owned())
}

fn engine(config: &Config, membership: Option<&Membership>) -> Engine {
    let (cluster, node) = membership.map_or(("", ""), |m| (&m.cluster, &m.node));
    let engine = EngineConfig::new(&config.engine_socket, cluster, node);
    Engine::new(EngineConfig { cgroup_parent: config.cgroup_parent.clone(), ..engine })
}

fn host(config: &Config, name: String, engine: &Engine, masters: &[String]) -> anyhow::Result<Host> {
    let underlay = host::underlay(config, masters).context("failed to find the underlay address")?;
    let kernel = LinuxKernel::try_new(&config.netns_dir).context("failed to open netlink")?;
    let (config, engine, masters) = (config.clone(), engine.clone(), masters.to_vec());
    let underlay = Arc::new(watch::Sender::new(underlay));
    Ok(Host { config, name, engine, masters, underlay, kernel: Arc::new(kernel) })
}

async fn join(config: Config, args: JoinArgs) -> anyhow::Result<ExitCode> {
    // Everything is looked at before anything changes, on this host or on the master.
    let identity = IdentityDir::new(&config.state_dir);
    if let Some(known) = identity.membership()? {
        bail!("this host is already node {} ({}) of a cluster; hint: skein-agent leave", known.name, known.node);
    }
    let token = match (&args.token, &args.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(file)) => {
            std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?
        }
        (None, None) => bail!("no token; hint: --token or --token-file, from skein token create"),
    };
    let token = token.trim().to_owned();
    let pin =
        JoinToken::parse(&token).map_err(|e| anyhow::anyhow!("{e}; hint: {}", e.hint.as_deref().unwrap_or("")))?;
    let engine = engine(&config, None);
    engine.ping().await?;
    let masters: Vec<String> = args.master.iter().map(|m| with_port(m)).collect();
    let name = match args.name.or_else(|| config.name.clone()) {
        Some(name) => name,
        None => hostname()?,
    };
    let description = host(&config, name.clone(), &engine, &masters)?.describe().await?;
    let mut failures = Vec::new();
    for master in &masters {
        let mut client = match identity::connect(&Tcp, master, identity::pinned_tls(&pin.ca_sha256)?).await {
            Ok(client) => client,
            Err(error) => {
                failures.push(error.to_string());
                continue;
            }
        };
        let key = identity.ensure_key()?;
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = grpc::JoinRequest {
            token: token.clone(),
            csr_der: identity::signing_request(&key)?,
            description_json: serde_json::to_vec(&description)?,
            clock_unix_ms: u64::try_from(clock.as_millis()).unwrap_or(u64::MAX),
        };
        let call = tokio::time::timeout(JOIN_WITHIN, client.join(request));
        let answer = match call.await.with_context(|| format!("the master at {master} gave no answer"))? {
            Ok(answer) => answer.into_inner(),
            Err(status) => bail!("the master at {master} refused: {}", status.message()),
        };
        let membership =
            Membership { node: answer.node_id, masters: masters.clone(), cluster: pin.ca_sha256, name: name.clone() };
        identity.store(&answer.certificate_pem, &answer.ca_pem, Some(&membership))?;
        say(&format!("joined as {name} ({}); now: skein-agent run", membership.node));
        return Ok(ExitCode::SUCCESS);
    }
    bail!("{}", failures.join("; "))
}

/// The parts that serve the engine: the network, and the socket on which its plugin will be.
struct Network {
    overlay: OverlayHandle,
    overlay_task: OverlayTask,
    listener: UnixListener,
}

impl Network {
    /// Answers the engine from now on. The overlay should follow the ledger by then: what it does not know it refuses.
    fn serve(&mut self) -> anyhow::Result<PluginServer> {
        Ok(PluginServer::try_start(self.listener.try_clone()?, self.overlay.clone())?)
    }
}

async fn network(config: &Config, underlay: host::Underlay, manager: Option<Manager>) -> anyhow::Result<Network> {
    let overlay_config = OverlayConfig {
        underlay4: underlay.v4,
        underlay6: underlay.v6,
        vxlan_port: config.vxlan_port,
        fast_path: config.fast_path,
        netns_dir: config.netns_dir.clone(),
        state_dir: config.state_dir.clone(),
    };
    let HandedOver { plugin, sockets } = HandedOver::take(manager).await?;
    let listener = match plugin {
        Some(listener) => listener,
        None => {
            let listener = plugin::socket::bind(&config.plugin_socket)?;
            sockets.keep_plugin(&listener).await;
            listener
        }
    };
    let store = Arc::new(overlay_config.open_store()?);
    let resolvers = UpstreamSource::File("/etc/resolv.conf".into());
    let (overlay, overlay_task) = OverlayHandle::try_start(overlay_config, store, resolvers, sockets)?;
    Ok(Network { overlay, overlay_task, listener })
}

fn member(config: &Config) -> anyhow::Result<(IdentityDir, Membership)> {
    let identity = IdentityDir::new(&config.state_dir);
    match identity.membership()? {
        Some(membership) => Ok((identity, membership)),
        None => bail!(
            "this host has not joined a cluster ({} has no identity); hint: skein-agent join --master HOST --token TOKEN",
            config.state_dir.display()
        ),
    }
}

async fn run(config: Config) -> anyhow::Result<ExitCode> {
    let (identity, membership) = member(&config)?;
    let ledger = Ledger::open(&config.state_dir.join("ledger"))?;
    if let Some(damage) = ledger.damage() {
        tracing::error!(damage, "ledger was damaged, the master will send everything again");
    }
    let engine = engine(&config, Some(&membership));
    let host = host(&config, membership.name.clone(), &engine, &membership.masters)?;
    let manager = Manager::from_env();
    let underlay = *host.underlay.borrow();
    let mut network = network(&config, underlay, manager.clone()).await?;
    let shutdown = CancellationToken::new();
    let settings = agent_core::Settings {
        image_unused_ms: (config.image_retention_hours > 0)
            .then(|| u64::from(config.image_retention_hours) * 3_600_000),
    };
    let side = Arc::new(network.overlay.clone());
    let (executor, handle) = Executor::new(engine.clone(), ledger.clone(), side, settings);
    let (description_tx, description) = watch::channel(skein_api::NodeDescription::default());
    let session = Session {
        net: Tcp,
        membership,
        identity,
        ledger: ledger.clone(),
        overlay: network.overlay.clone(),
        engine: engine.clone(),
        reports: handle.reports().clone(),
        description,
    };
    session.follow().await;
    // Before the engine is waited for: one that boots starts containers, and asks the plugin for their networks.
    let mut plugin = network.serve()?;
    description_tx.send_replace(first_description(&host, &shutdown).await?);
    let enforced = host::cgroup::enforce(&config, &engine).await.context("failed to enforce `offer`")?;
    engine.set_cgroup_parent(enforced.parent);
    let (attached_tx, attached) = watch::channel(Vec::new());
    let names = tokio::spawn(attached::follow(engine.clone(), network.overlay.clone(), attached_tx));
    let sources = host::Sources {
        standing: enforced.warnings,
        ledger: ledger.state(),
        engine: engine.state(),
        overlay: network.overlay.troubles(),
        addresses: network.overlay.addresses(),
        host: network.overlay.host_changes(),
        executor: handle.status(),
        attached,
    };
    let executor = tokio::spawn(executor.run(shutdown.clone()));
    let mut moves = JoinSet::new();
    moves.spawn(follow_underlay(host.underlay.subscribe(), network.overlay.clone()));
    let follow = tokio::spawn(host.follow(sources, description_tx, shutdown.clone()));
    let session = session.run(shutdown.clone());
    if let Some(manager) = &manager {
        manager.ready().await;
    }
    tracing::info!("agent ready");
    let ended = tokio::select! {
        ended = session => ended,
        signal = wait_for_signal() => { signal?; Ended::Shutdown }
        () = network.overlay_task.ended() => bail!("the network part ended by itself, which is a bug"),
        () = plugin.ended() => bail!("the plugin's server ended by itself, which is a bug"),
    };
    tracing::info!(reason = %ended, "agent ends, containers go on");
    if let Some(manager) = &manager {
        manager.stopping().await;
    }
    shutdown.cancel();
    executor.await?;
    follow.await?;
    names.abort();
    Ok(match ended {
        Ended::Shutdown => ExitCode::SUCCESS,
        Ended::Removed(_) => ExitCode::from(EXIT_REMOVED),
    })
}

/// The overlay follows the host's underlay addresses. Ends with the last of them, or when it is dropped.
async fn follow_underlay(mut underlay: watch::Receiver<host::Underlay>, overlay: OverlayHandle) {
    while underlay.changed().await.is_ok() {
        let host::Underlay { v4, v6 } = *underlay.borrow_and_update();
        if let Err(error) = overlay.set_underlay(v4, v6).await {
            tracing::error!(error = chain(&error), "the overlay does not follow the underlay's address");
        }
    }
}

/// The host's first description; an engine that is not up yet is waited for.
async fn first_description(host: &Host, shutdown: &CancellationToken) -> anyhow::Result<skein_api::NodeDescription> {
    let mut signal = Box::pin(wait_for_signal());
    loop {
        match host.describe().await {
            Ok(description) => return Ok(description),
            Err(error) => tracing::warn!(error = chain(error.as_ref()), "waiting for the engine"),
        }
        tokio::select! {
            result = &mut signal => {
                result?;
                shutdown.cancel();
                bail!("ended while waiting for the engine");
            }
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
}

async fn leave(config: Config) -> anyhow::Result<ExitCode> {
    let (identity, membership) = member(&config)?;
    let ledger = Ledger::open(&config.state_dir.join("ledger"))?;
    let engine = engine(&config, Some(&membership));
    engine.ping().await?;
    let host = host(&config, membership.name.clone(), &engine, &membership.masters)?;
    // The engine asks the plugin when networks go, so it must be served.
    let underlay = *host.underlay.borrow();
    let mut network = network(&config, underlay, None).await?;
    let plugin = network.serve()?;
    let mut failures = Vec::new();
    let mut note = |what: String, result: Result<(), String>| match result {
        Ok(()) => say(&format!("removed {what}")),
        Err(error) => failures.push(format!("{what}: {error}")),
    };
    for id in engine.list().await? {
        let removed = async {
            engine.stop(&id, LEAVE_GRACE).await?;
            engine.remove(&id).await
        };
        note(format!("container {id}"), removed.await.map_err(|e| chain(&e)));
    }
    for (id, known) in engine.networks().await? {
        let removed = engine.remove_network(&known.engine_id).await;
        note(format!("engine network {id}"), removed.map_err(|e| chain(&e)));
    }
    let removed = network.overlay.apply(Wanted::default()).await;
    note("overlay networks".to_owned(), removed.map_err(|e| chain(&e)));
    drop((plugin, network));
    let kernel = host.kernel.clone();
    let removed = tokio::task::spawn_blocking(move || {
        for id in kernel.networks()? {
            netlib::driver::remove_network(&*kernel, &id)?;
        }
        kernel.remove_host_rules()
    });
    note("host rules".to_owned(), removed.await?.map_err(|e| chain(&e)));
    if !failures.is_empty() {
        bail!("some things could not be removed, the host is still a member: {}", failures.join("; "));
    }
    ledger.clear()?;
    drop(ledger);
    identity.remove()?;
    for part in ["ledger", "network"] {
        let dir = config.state_dir.join(part);
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("failed to remove {}", dir.display()))?;
        }
    }
    say(&format!("left the cluster; now, on a master: skein node rm {}", membership.name));
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masters_get_the_default_port() {
        let check = |given: &str, expected: &str| assert_eq!(with_port(given), expected);
        check("master", "master:7440");
        check("master:99", "master:99");
        check("10.0.0.1", "10.0.0.1:7440");
        check("fd00::1", "[fd00::1]:7440");
        check("[fd00::1]:99", "[fd00::1]:99");
    }
}
