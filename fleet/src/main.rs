//! `skein-fleet`: thousands of agents with model engines, told what to do by lines on standard input.
//!
//! Every line gets one line of JSON as its answer: the counters ([`skein_fleet::fleet::Status`]), or `{"error": …}`.
//!
//! ```text
//! join N       start N further agents          restart N    restart the processes of N agents
//! silence I    agent I says nothing more       speak I      it speaks again
//! status       only the counters
//! ```
//!
//! The end of the input ends it.

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use skein_fleet::{agent::Shared, fleet::Fleet};
use tokio::io::{AsyncBufReadExt as _, BufReader};

/// Many agents with model engines, for benchmarks and tests of a master
#[derive(Parser)]
struct Cli {
    /// Address of the master, `host:port`; several share the agents
    #[arg(long = "master", required = true)]
    masters: Vec<String>,
    /// Join token with room for all of them
    #[arg(long)]
    token: String,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => skein_daemon::fail(error.as_ref(), None, 1),
    }
}

fn run(cli: Cli) -> Result<()> {
    skein_daemon::raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(Fleet::new(Shared::new(cli.masters, cli.token))))
}

async fn serve(mut fleet: Fleet) -> Result<()> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let answer = match obey(&mut fleet, &line) {
            Ok(()) => serde_json::to_string(&fleet.status())?,
            Err(error) => serde_json::json!({ "error": format!("{error:#}") }).to_string(),
        };
        say(&answer);
    }
    Ok(())
}

fn obey(fleet: &mut Fleet, line: &str) -> Result<()> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let number = |text: &str| text.parse::<u32>().with_context(|| format!("{text:?} is not a number"));
    match words[..] {
        ["status"] => {}
        ["join", count] => fleet.join(number(count)?),
        ["restart", count] => fleet.restart(number(count)? as usize),
        ["silence", which] => fleet.silence(number(which)? as usize, true)?,
        ["speak", which] => fleet.silence(number(which)? as usize, false)?,
        _ => bail!("unknown command {line:?}"),
    }
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the answers are its output")]
fn say(line: &str) {
    println!("{line}");
}
