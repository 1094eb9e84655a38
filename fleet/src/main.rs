//! `skein-fleet agents`: thousands of agents with model engines, told what to do by lines on standard input.
//! `skein-fleet users`: many users of the API at once.
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

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};
use skein_fleet::{
    agent::Shared,
    fleet::Fleet,
    users::{self, Users},
};
use tokio::io::{AsyncBufReadExt as _, BufReader};

/// Many agents with model engines, or many users, for benchmarks and tests of a master
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Agents, told what to do by lines on standard input
    Agents(AgentsArgs),
    /// Users of the API; prints what came of it as JSON
    Users(UsersArgs),
}

#[derive(Args)]
struct UsersArgs {
    /// The master's unix socket
    #[arg(long)]
    socket: PathBuf,
    /// Connections that ask one thing after the other
    #[arg(long)]
    readers: usize,
    /// Questions of all of them together
    #[arg(long)]
    gets: usize,
    /// What they ask for, in turn
    #[arg(long = "path", required = true)]
    paths: Vec<String>,
    /// Connections that read events meanwhile
    #[arg(long, default_value_t = 0)]
    watchers: usize,
    /// Connections that ask for the path of `--stuck-path` and do not read the answer
    #[arg(long, default_value_t = 0)]
    stuck: usize,
    /// Something whose answer is larger than what sockets buffer
    #[arg(long, default_value = "/v1/tasks")]
    stuck_path: String,
}

#[derive(Args)]
struct AgentsArgs {
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
    match cli.what {
        What::Agents(AgentsArgs { masters, token }) => runtime.block_on(serve(Fleet::new(Shared::new(masters, token)))),
        What::Users(args) => {
            let UsersArgs { socket, readers, gets, paths, watchers, stuck, stuck_path } = args;
            let users = Users { socket, readers, gets, paths, watchers, stuck, stuck_path };
            say(&serde_json::to_string(&runtime.block_on(users::run(users))?)?);
            Ok(())
        }
    }
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
