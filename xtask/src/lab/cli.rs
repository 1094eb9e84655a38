//! The command line of the lab: `cargo xtask lab …`.
//!
//! Only parses, calls and prints. No tasks, no channels.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};

use super::probe::{Place, Probe, Request};
use super::{
    Counters, DataRoot, IMAGES, Impairment, Lab, LabSpec, MASTER, RelayState, Removed, all_labs, down, down_all,
    holder, parse_rate, run,
};

/// Prints a line. A reader that has gone away (`| head`) is no reason to fail, unlike for `println!`.
macro_rules! say {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($argument)*);
    }};
}

/// Name of the lab when none is given.
const DEFAULT_NAME: &str = "dev";

/// Several hosts with an engine each, on this machine.
#[derive(Debug, Args)]
pub struct LabArgs {
    #[command(subcommand)]
    command: LabCommand,
}

/// Which lab.
#[derive(Debug, Args)]
struct Name {
    /// Name of the lab
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Make a lab: a host `master` without and hosts `h1`, `h2`, … with an engine
    Up {
        #[command(flatten)]
        lab: Name,
        /// Hosts with an engine
        #[arg(long, default_value_t = 3)]
        hosts: usize,
        /// Keep engine data on disk, where syncing costs what it costs, instead of in memory
        #[arg(long)]
        disk: bool,
        /// MTU of the underlay in bytes
        #[arg(long, default_value_t = 1500)]
        mtu: u16,
    },
    /// Remove a lab and whatever a crash left of it
    Down {
        #[command(flatten)]
        lab: Name,
        /// Remove every lab
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Show a lab, or all
    Status {
        /// Name of the lab; all without it
        #[arg(long)]
        name: Option<String>,
    },
    /// Run a command in a host (the working directory is /)
    Exec {
        #[command(flatten)]
        lab: Name,
        /// Host
        host: String,
        /// Command line
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Run docker against a host's engine: `lab engine h1 -- ps`
    Engine {
        #[command(flatten)]
        lab: Name,
        /// Host
        host: String,
        /// Arguments of docker; the word docker before them is allowed
        #[arg(last = true, required = true)]
        args: Vec<OsString>,
    },
    /// Drop all traffic between two hosts, or between one and all others
    Cut {
        #[command(flatten)]
        lab: Name,
        /// Host
        a: String,
        /// The other host; all without it
        b: Option<String>,
    },
    /// End all cuts
    Heal {
        #[command(flatten)]
        lab: Name,
    },
    /// Limit what a host sends and receives: `lab limit h1 10mbit`, `lab limit h1 none`
    Limit {
        #[command(flatten)]
        lab: Name,
        /// Host
        host: String,
        /// Bits per second with kbit, mbit or gbit; or none
        rate: String,
    },
    /// Make frames of a host late, lost, doubled or overtaking: `lab relay h1 --delay 50ms --loss 5%`, `lab relay h1 off`
    Relay {
        #[command(flatten)]
        lab: Name,
        /// Host
        host: String,
        /// `off` takes the relay away; without it and without options, what it does is shown
        #[arg(value_parser = ["off"])]
        off: Option<String>,
        #[command(flatten)]
        how: RelayOptions,
    },
    /// Send packets or requests at a steady pace and count what is lost
    Probe {
        #[command(flatten)]
        lab: Name,
        /// `HOST` or `HOST/CONTAINER`
        from: String,
        /// `HOST` or `HOST/CONTAINER` for packets, `http://HOST[:PORT]/PATH` for requests
        to: String,
        /// How long
        #[arg(long, value_parser = parse_duration, default_value = "10s")]
        time: Duration,
        /// Time between two
        #[arg(long, value_parser = parse_duration, default_value = "1ms")]
        every: Duration,
    },
    /// Build an image from this machine's programs and load it into every engine
    Image {
        #[command(flatten)]
        lab: Name,
        /// Which image
        #[arg(value_parser = IMAGES)]
        image: String,
    },
    /// Start a registry on the master host
    Registry {
        #[command(flatten)]
        lab: Name,
    },
    /// Be a relay; started by `relay`
    #[command(hide = true)]
    RelayProcess {
        /// Lab
        lab: String,
        /// Host
        host: String,
        /// Seed of what chance does
        seed: u64,
    },
    /// Be a host; started by `up`
    #[command(hide = true)]
    Holder {
        /// Lab
        lab: String,
        /// Host
        host: String,
    },
}

/// What a relay does, in each direction of the host's cable. What is not said is none.
#[derive(Debug, Args)]
struct RelayOptions {
    /// How long a frame is on its way: 50ms
    #[arg(long, value_parser = parse_duration)]
    delay: Option<Duration>,
    /// By how much that differs, to both sides; frames keep their order
    #[arg(long, value_parser = parse_duration)]
    jitter: Option<Duration>,
    /// Share of frames that are lost: 5%
    #[arg(long, value_parser = parse_share)]
    loss: Option<f64>,
    /// Share of frames that come twice
    #[arg(long, value_parser = parse_share)]
    duplicate: Option<f64>,
    /// Share of frames that are not delayed, and so overtake others
    #[arg(long, value_parser = parse_share)]
    reorder: Option<f64>,
    /// Bits per second with kbit, mbit or gbit
    #[arg(long, value_parser = parse_rate)]
    rate: Option<u64>,
    /// Seed of what chance does; counts when the relay is put in
    #[arg(long)]
    seed: Option<u64>,
}

impl RelayOptions {
    /// Nothing when no option was given.
    fn impairment(&self) -> Option<Impairment> {
        let Self { delay, jitter, loss, duplicate, reorder, rate, .. } = *self;
        let given = delay.is_some() || loss.is_some() || duplicate.is_some() || rate.is_some();
        (given || jitter.is_some() || reorder.is_some()).then(|| Impairment {
            delay: delay.unwrap_or_default(),
            jitter: jitter.unwrap_or_default(),
            loss: loss.unwrap_or_default(),
            duplicate: duplicate.unwrap_or_default(),
            reorder: reorder.unwrap_or_default(),
            rate,
        })
    }
}

/// Parses a time with its unit: `1s`, `50ms`, `200us`.
fn parse_duration(text: &str) -> Result<Duration> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: Option<u64> = number.parse().ok();
    let duration = match (number, unit) {
        (Some(n), "s") => Some(Duration::from_secs(n)),
        (Some(n), "ms") => Some(Duration::from_millis(n)),
        (Some(n), "us") => Some(Duration::from_micros(n)),
        _ => None,
    };
    duration.with_context(|| format!("failed to parse time {text:?}: expected a number with s, ms or us"))
}

/// Parses a share in percent: `5%`, `0.1%`.
fn parse_share(text: &str) -> Result<f64> {
    let number = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
    let number = number.filter(|n| (0.0..=100.0).contains(n));
    number.map(|n| n / 100.0).with_context(|| format!("failed to parse share {text:?}: expected 0% to 100%"))
}

/// Does what the command line says. `exec` and `engine` become the command they run and do not return.
///
/// # Errors
/// Says what failed, where, and often a command that helps.
pub fn main(args: LabArgs) -> Result<()> {
    match args.command {
        LabCommand::Up { lab, hosts, disk, mtu } => up(&lab.name, hosts, disk, mtu),
        LabCommand::Down { all: true, .. } => {
            let removed = down_all()?;
            removed.iter().for_each(|(name, what)| print_removed(name, what));
            if removed.is_empty() {
                say!("no lab is up");
            }
            Ok(())
        }
        LabCommand::Down { lab, .. } => {
            let removed = down(&lab.name)?;
            print_removed(&lab.name, &removed);
            Ok(())
        }
        LabCommand::Status { name } => status(name),
        LabCommand::Exec { lab, host, command } => {
            let lab = Lab::open(&lab.name)?;
            let (program, args) = command.split_first().context("failed to run nothing")?;
            become_command(lab.find_host(&host)?.command(program).args(args))
        }
        LabCommand::Engine { lab, host, args } => {
            let lab = Lab::open(&lab.name)?;
            let host = lab.find_host(&host)?;
            ensure!(host.has_engine(), "failed to find an engine on {}: the host has none", host.name());
            let skip = usize::from(args.first().is_some_and(|word| word == "docker"));
            become_command(host.docker_command().args(args.iter().skip(skip)))
        }
        LabCommand::Cut { lab, a, b: Some(b) } => Lab::open(&lab.name)?.cut(&a, &b),
        LabCommand::Cut { lab, a, b: None } => Lab::open(&lab.name)?.isolate(&a),
        LabCommand::Heal { lab } => Lab::open(&lab.name)?.heal(),
        LabCommand::Limit { lab, host, rate } => {
            let rate = if rate == "none" { None } else { Some(parse_rate(&rate)?) };
            Lab::open(&lab.name)?.limit(&host, rate)
        }
        LabCommand::Image { lab, image } => {
            let lab = Lab::open(&lab.name)?;
            if image == "demo-app" {
                build_demo_app()?;
            }
            lab.image(&image)?;
            say!("image {image} is in {} engines", lab.engines().count());
            Ok(())
        }
        LabCommand::Registry { lab } => {
            say!("{}", Lab::open(&lab.name)?.registry()?);
            Ok(())
        }
        LabCommand::Relay { lab, host, off, how } => relay(&Lab::open(&lab.name)?, &host, off.is_some(), &how),
        LabCommand::RelayProcess { lab, host, seed } => super::relay::process::run(&lab, &host, seed),
        LabCommand::Probe { lab, from, to, time, every } => probe(&Lab::open(&lab.name)?, &from, &to, time, every),
        LabCommand::Holder { lab, host } => holder::run(&lab, &host),
    }
}

/// Builds what is copied into the image. Cargo's variables for this program are kept from it: build scripts that
/// watch them would run again.
fn build_demo_app() -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--package", "demo-app"]);
    cargo.current_dir(crate::cli::repository_root());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(&name);
        }
    }
    run(&mut cargo).map(drop)
}

fn up(name: &str, hosts: usize, disk: bool, mtu: u16) -> Result<()> {
    let data_root = if disk { DataRoot::Disk } else { DataRoot::Tmpfs };
    let mut lab = Lab::up(LabSpec { data_root, mtu, ..LabSpec::new(name, hosts) })?;
    lab.keep();
    print_lab(&lab)?;
    say!("\ntry: cargo xtask lab image busybox --name {name}");
    if hosts > 0 {
        say!("     cargo xtask lab engine h1 --name {name} -- run --rm busybox hostname");
    }
    say!("     cargo xtask lab exec {MASTER} --name {name} -- ping -c 1 h1");
    say!("     cargo xtask lab down --name {name}");
    Ok(())
}

fn relay(lab: &Lab, host: &str, off: bool, how: &RelayOptions) -> Result<()> {
    match how.impairment() {
        _ if off => return lab.unrelay(host),
        Some(impairment) => lab.relay(host, impairment, how.seed.unwrap_or_default())?,
        None => {}
    }
    match lab.relay_state(host)? {
        Some(state) => say!("{host}: {}", relay_text(&state)),
        None => say!("{host}: no relay"),
    }
    Ok(())
}

fn relay_text(state: &RelayState) -> String {
    let Impairment { delay, jitter, loss, duplicate, reorder, rate } = state.impairment;
    let Counters { passed, lost, duplicated, overtook, overflowed } = state.counters;
    let rate = rate.map_or_else(|| "any rate".to_owned(), |rate| format!("{rate} bit/s"));
    format!(
        "delay {delay:?} ± {jitter:?}, loss {}%, duplicate {}%, reorder {}%, {rate}; {passed} passed, {lost} lost, \
         {duplicated} doubled, {overtook} overtook, {overflowed} dropped",
        loss * 100.0,
        duplicate * 100.0,
        reorder * 100.0
    )
}

/// Port at which a probe's packets are echoed: in the range that no service is registered for.
const ECHO_PORT: u16 = 49_007;

fn probe(lab: &Lab, from: &str, to: &str, time: Duration, every: Duration) -> Result<()> {
    let from = place(lab, from)?.0;
    let probe = match to.strip_prefix("http://") {
        Some(url) => {
            let (host, path) = url.split_once('/').unwrap_or((url, ""));
            let (host, port) = host.split_once(':').unwrap_or((host, "80"));
            let port: u16 = port.parse().with_context(|| format!("failed to parse port {port:?}"))?;
            let address = SocketAddr::from((lab.find_host(host)?.ipv4(), port));
            Probe::requests(&from, address, Request::get(format!("/{path}")), every)?
        }
        None => {
            let (place, address) = place(lab, to)?;
            Probe::packets(&from, &place, SocketAddr::new(address, ECHO_PORT), every)?
        }
    };
    std::thread::sleep(time);
    let report = probe.stop();
    say!("{report}");
    ensure!(report.lost == 0, "{} of {} were lost", report.lost, report.sent);
    Ok(())
}

/// A host, or one of its containers, with its first address.
fn place(lab: &Lab, name: &str) -> Result<(Place, IpAddr)> {
    let Some((host, container)) = name.split_once('/') else {
        let host = lab.find_host(name)?;
        return Ok((Place::host(host), host.ipv4().into()));
    };
    let host = lab.find_host(host)?;
    let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}";
    let addresses = host.docker(&["inspect", "-f", format, container])?;
    let address = addresses.split_whitespace().next().and_then(|a| a.parse().ok());
    let address = address.with_context(|| format!("failed to find an address of {name}"))?;
    Ok((Place::container(host, container)?, address))
}

fn become_command(command: &mut Command) -> Result<()> {
    Err(command.exec()).context("failed to start nsenter")
}

fn print_removed(name: &str, removed: &Removed) {
    if *removed == Removed::default() {
        say!("lab {name}: nothing to remove");
    } else {
        say!("lab {name}: removed {} processes, {} namespaces", removed.processes, removed.namespaces);
    }
}

fn status(name: Option<String>) -> Result<()> {
    let names = match name {
        Some(name) => vec![name],
        None => all_labs()?,
    };
    if names.is_empty() {
        say!("no lab is up\nhint: cargo xtask lab up --hosts 3");
    }
    for name in names {
        match Lab::open(&name) {
            Ok(lab) => print_lab(&lab)?,
            Err(_) => {
                say!("lab {name}: left over from a crash\nhint: cargo xtask lab down --name {name}")
            }
        }
    }
    Ok(())
}

fn print_lab(lab: &Lab) -> Result<()> {
    say!("lab {}  {}", lab.name(), lab.dir().display());
    say!("  {:<16} {:<16} {:<20} {:<8} {:<10} RUNNING", "HOST", "IPV4", "IPV6", "ENGINE", "LIMIT");
    for host in lab.hosts() {
        let engine = match (host.has_engine(), host.has_engine() && host.engine_answers()) {
            (false, _) => "-",
            (true, true) => "ready",
            (true, false) => "down",
        };
        let limit = lab.limit_of(host.name()).unwrap_or_default();
        let limit = if limit.is_empty() { "-" } else { &limit };
        let processes = host.processes().unwrap_or_default();
        let running: Vec<&str> = processes
            .iter()
            .filter(|info| info.status == super::Status::Running)
            .map(|info| info.name.as_str())
            .collect();
        let (v4, v6) = (host.ipv4().to_string(), host.ipv6().to_string());
        say!("  {:<16} {v4:<16} {v6:<20} {engine:<8} {limit:<10} {}", host.name(), running.join(" "));
    }
    for host in lab.hosts() {
        match lab.relay_state(host.name()) {
            Ok(Some(state)) => say!("  relay of {}: {}", host.name(), relay_text(&state)),
            Ok(None) => {}
            Err(e) => say!("  problem: {e:#}"),
        }
    }
    for (a, b) in lab.cuts().unwrap_or_default() {
        say!("  cut: {a} - {}", b.as_deref().unwrap_or("all others"));
    }
    for problem in lab.problems() {
        say!("  problem: {problem}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_shares_need_their_units() {
        for (text, expected) in [("1s", Some(1_000_000)), ("50ms", Some(50_000)), ("200us", Some(200))] {
            assert_eq!(parse_duration(text).ok(), expected.map(Duration::from_micros), "{text}");
        }
        for bad in ["", "5", "ms", "-1s", "1.5s", "1h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_share("5%").ok(), Some(0.05));
        for bad in ["5", "%", "-1%", "101%", "NaN%"] {
            assert!(parse_share(bad).is_err(), "{bad}");
        }
    }
}
