//! `cargo xtask demo`: the main job, on this machine, with real engines: an application and a PostgreSQL on different
//! hosts, placed by label from one compose file, that find each other by name across the overlay.
//!
//! Says what it does as it does it, then what runs where, then what it verified. Owns the story; how a lab or a cluster
//! is made is theirs.

mod verify;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{
    cluster::{Cluster, NodeOptions},
    lab::{self, Lab, LabSpec},
    setup, test, ui,
};

/// Name of the demo's lab.
const LAB: &str = "demo";

/// Name of its stack.
const STACK: &str = "shop";

/// The compose file.
const COMPOSE: &str = include_str!("../../demo/docker-compose.yml");

/// Exit code after Ctrl-C in the middle (128 + SIGINT).
const EXIT_INTERRUPTED: i32 = 130;

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Take everything down at the end; exit with 0 only if everything was verified
    #[arg(long)]
    once: bool,
    /// Install what is missing without asking
    #[arg(long, short)]
    yes: bool,
}

/// Runs the demo.
///
/// # Errors
/// The first step that could not be done; the lab is taken down then.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    setup::ensure(args.yes)?;
    ui::heading("programs");
    test::build_programs(&crate::cli::repository_root())?;
    take_down_on_signal()?;
    // What an earlier demo left is in the way.
    lab::down(LAB)?;
    let told = tell(args);
    if INTERRUPTED.load(Ordering::Acquire) {
        wait_for_the_end();
    }
    lab::down(LAB)?;
    Ok(if told? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The story; whether all of it was verified. The lab stays, for whoever ends it.
fn tell(args: &DemoArgs) -> Result<bool> {
    let began = Instant::now();
    let lab = up()?;
    let cluster = cluster(&lab)?;
    let file = deploy(&cluster)?;
    let results = verify::all(&lab, &cluster);
    show(&cluster)?;
    let verified = report(&results, began.elapsed());
    if !args.once {
        invite(&cluster, &file);
        wait_for_the_end();
    }
    Ok(verified)
}

/// Set before the signal's thread takes the lab down: whoever fails for that says nothing, and leaves the rest to it.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The signal's thread takes the lab down and ends the process.
fn wait_for_the_end() -> ! {
    loop {
        std::thread::park();
    }
}

/// Ctrl-C takes the lab down, whatever is being done.
fn take_down_on_signal() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("failed to watch for signals")?;
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            INTERRUPTED.store(true, Ordering::Release);
            ui::heading("taking the lab down");
            if let Err(error) = lab::down(LAB) {
                ui::error(&error);
            }
            std::process::exit(EXIT_INTERRUPTED);
        }
    });
    Ok(())
}

fn up() -> Result<Lab> {
    ui::heading("a lab: three hosts with an engine each, and one for the master");
    let mut lab = Lab::up(LabSpec::new(LAB, 3))?;
    lab.keep();
    for host in lab.hosts() {
        ui::note(&format!("{:8} {:12} {}", host.name(), host.ipv4(), host.ipv6()));
    }
    for image in ["postgres", "demo-app"] {
        ui::note(&format!("image {image}, from this machine's own programs"));
        lab.image(image)?;
    }
    Ok(lab)
}

fn cluster(lab: &Lab) -> Result<Cluster<'_>> {
    ui::heading("a cluster: skein-master, and an agent on each host");
    let cluster = Cluster::up(lab, |host| match host {
        "h1" => NodeOptions::label("instance", "java").memory("2GiB"),
        "h2" => NodeOptions::label("instance", "db").memory("512MiB"),
        _ => NodeOptions::default(),
    })?;
    ui::note(cluster.skein(&["node", "ls"])?.trim_end());
    Ok(cluster)
}

fn deploy(cluster: &Cluster<'_>) -> Result<PathBuf> {
    ui::heading("skein up: an application on instance==java, its database on instance==db");
    let file = cluster.compose_file(STACK, COMPOSE)?;
    let status = cluster
        .skein_command()?
        .args(["up", "--yes", "-p", STACK, "-f"])
        .arg(&file)
        .status()
        .context("failed to start skein")?;
    ensure!(status.success(), "skein up failed");
    Ok(file)
}

fn show(cluster: &Cluster<'_>) -> Result<()> {
    ui::heading("what runs where");
    ui::note(cluster.skein(&["ps"])?.trim_end());
    Ok(())
}

/// Prints what was verified; true when all of it was.
fn report(results: &[verify::Check], took: Duration) -> bool {
    ui::heading("verified");
    for check in results {
        match &check.result {
            Ok(seen) => ui::note(&format!("ok    {}: {seen}", check.what)),
            Err(error) => ui::note(&format!("FAIL  {}: {error:#}", check.what)),
        }
    }
    let failed = results.iter().filter(|c| c.result.is_err()).count();
    ui::note(&format!("{} of {} verified in {:.0} s", results.len() - failed, results.len(), took.as_secs_f64()));
    failed == 0
}

fn invite(cluster: &Cluster<'_>, file: &std::path::Path) {
    ui::heading("it stays up until Ctrl-C; try, in another terminal");
    let skein = crate::cluster::program("skein").map_or_else(|_| "skein".to_owned(), |p| p.display().to_string());
    for line in [
        format!("export SKEIN_HOST=unix://{}", cluster.socket().display()),
        format!("{skein} ps"),
        format!("{skein} logs -f shop_app.1"),
        format!("{skein} exec shop_db.1 -- psql -U postgres -c 'select * from demo_rows'"),
        format!("{skein} node drain h3"),
        format!("{skein} up -p {STACK} -f {} --dry-run", file.display()),
        format!("cargo xtask lab exec master --name {LAB} -- curl -s http://h1:8080/rows"),
        format!(
            "cargo xtask lab exec h2 --name {LAB} -- \
             sh -c 'for n in /run/skein/netns/*; do nsenter --net=$n ip -d link show type vxlan; done'"
        ),
        format!("cargo xtask lab cut h1 h2 --name {LAB}; cargo xtask lab heal --name {LAB}"),
    ] {
        ui::note(&line);
    }
}
