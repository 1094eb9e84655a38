//! The agent's network side alone, for tests with real engines: overlay, plugin and name server, fed from files.
//!
//! `network-side DIR` serves the plugin on the socket that is handed over (or on `DIR/plugin.sock`) and brings
//! `DIR/assignments.json` to the kernel, again whenever the file changes; `DIR/applied` then has the number of times
//! and the last failure. Tasks: those of the overlay and the plugin's server.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use serde::Deserialize;
use skein_agent::{
    dns::UpstreamSource,
    fdstore::{HandedOver, Manager},
    overlay::{OverlayConfig, OverlayHandle, Wanted},
    plugin::{PluginServer, socket},
};
use skein_api::{EndpointAssignment, NetworkAssignment, PeerAssignment, ServiceAssignment};

/// How often the file is looked at.
const POLL: Duration = Duration::from_millis(50);

#[derive(Deserialize)]
struct Assignments {
    underlay4: std::net::Ipv4Addr,
    networks: Vec<NetworkAssignment>,
    peers: Vec<PeerAssignment>,
    #[serde(default)]
    services: Vec<ServiceAssignment>,
    endpoints: Vec<EndpointAssignment>,
}

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_env_filter("info,skein_agent=debug,netlib=debug").with_ansi(false).init();
    let dir = PathBuf::from(std::env::args_os().nth(1).context("usage: network-side DIR")?);
    let file = dir.join("assignments.json");
    let read = || -> Result<Assignments> { Ok(serde_json::from_slice(&fs::read(&file)?)?) };

    let HandedOver { plugin, sockets } = HandedOver::take(Manager::from_env()).await?;
    let listener = match plugin {
        Some(listener) => listener,
        None => socket::bind(&dir.join("plugin.sock"))?,
    };
    let config = OverlayConfig {
        underlay4: Some(read()?.underlay4),
        underlay6: None,
        vxlan_port: 4789,
        fast_path: true,
        netns_dir: "/run/skein/netns".into(),
        state_dir: dir.join("state"),
    };
    let store = Arc::new(config.open_store()?);
    let resolvers = UpstreamSource::File("/etc/resolv.conf".into());
    let (overlay, _overlay_task) = OverlayHandle::try_start(config, store, resolvers, sockets)?;
    let mut server = None;
    let (mut last, mut count) = (Vec::new(), 0);
    loop {
        let text = fs::read(&file)?;
        if text != last
            && let Ok(wanted) = serde_json::from_slice::<Assignments>(&text)
        {
            let Assignments { networks, peers, services, endpoints, .. } = wanted;
            let result = overlay.apply(Wanted { networks, peers, services, endpoints }).await;
            let failure = result.err().map(|e| format!("{:#}", anyhow::Error::from(e))).unwrap_or_default();
            count += 1;
            last = text;
            if server.is_none() {
                server = Some(PluginServer::try_start(listener.try_clone()?, overlay.clone())?);
            }
            fs::write(dir.join("applied.new"), format!("{count} {failure}"))?;
            fs::rename(dir.join("applied.new"), dir.join("applied"))?;
        }
        tokio::time::sleep(POLL).await;
    }
}
