//! The command line of the lab: `cargo xtask lab …`.
//!
//! Only parses, calls and prints. No tasks, no channels.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};

use super::{DataRoot, IMAGES, Lab, LabSpec, MASTER, Removed, all_labs, down, down_all, holder, parse_rate, run};

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
    /// Be a host; started by `up`
    #[command(hide = true)]
    Holder {
        /// Lab
        lab: String,
        /// Host
        host: String,
    },
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
    for (a, b) in lab.cuts().unwrap_or_default() {
        say!("  cut: {a} - {}", b.as_deref().unwrap_or("all others"));
    }
    for problem in lab.problems() {
        say!("  problem: {problem}");
    }
    Ok(())
}
