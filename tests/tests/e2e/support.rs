//! What these tests share: what a program said, checks that are all reported by name, the state before and after.

use std::{
    fs::File,
    io::Write as _,
    process::{Command, Output, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use skein_agent::identity::{self, IdentityDir};
use skein_api::{JoinToken, NodeDescription, grpc};
use xtask::{
    cluster::{Cluster, PATIENCE},
    lab::{Host, wait_for},
};

/// What a program said until it ended.
#[derive(Debug)]
pub(crate) struct Said {
    /// Exit code; -1 after a signal.
    pub(crate) code: i32,
    /// Standard output.
    pub(crate) out: String,
    /// Standard error.
    pub(crate) err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// Longest that any command here may take, in seconds: what hangs is a failure with a name. `timeout` exits with 124.
const COMMAND_S_MAX: &str = "60";

/// The same command with a time limit.
fn bounded(command: &Command) -> Command {
    let mut bounded = Command::new("timeout");
    bounded.args(["--kill-after", "5", COMMAND_S_MAX]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bounded.env(name, value),
            None => bounded.env_remove(name),
        };
    }
    bounded.stdin(Stdio::null());
    bounded
}

/// Runs a command to its end.
pub(crate) fn run(command: &Command) -> Result<Said> {
    Ok(bounded(command).output().with_context(|| format!("failed to start {command:?}"))?.into())
}

/// Runs a command to its end, giving it this on its standard input.
pub(crate) fn run_with_input(command: &Command, input: &[u8]) -> Result<Said> {
    let mut child = bounded(command).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("no standard input")?.write_all(input)?;
    Ok(child.wait_with_output()?.into())
}

/// Runs `skein`, whatever comes of it.
pub(crate) fn skein(cluster: &Cluster<'_>, args: &[&str]) -> Result<Said> {
    run(cluster.skein_command()?.args(args))
}

/// Checks that go on after a failure; the report names each that failed.
#[derive(Default)]
pub(crate) struct Checks {
    failures: Vec<String>,
}

impl Checks {
    /// Notes a failure unless it holds.
    pub(crate) fn ensure(&mut self, name: &str, holds: bool, found: impl std::fmt::Display) {
        if !holds {
            self.failures.push(format!("{name}: {found}"));
        }
    }

    /// Notes a failure of something that could not even be looked at.
    pub(crate) fn ok<T>(&mut self, name: &str, result: Result<T>) -> Option<T> {
        result.map_err(|e| self.failures.push(format!("{name}: {e:#}"))).ok()
    }

    /// A text has all these words.
    pub(crate) fn words(&mut self, name: &str, text: &str, words: &[&str]) {
        for word in words {
            self.ensure(name, text.contains(word), format_args!("{word:?} is not in {text:?}"));
        }
    }

    /// A program ended with this code and its standard error has all these words.
    pub(crate) fn refused(&mut self, name: &str, said: &Said, code: i32, words: &[&str]) {
        self.ensure(name, said.code == code, format_args!("exit code is not {code}: {said:?}"));
        self.words(name, &said.err, words);
    }

    /// A program ended with 0; gives back its standard output without the last line's end.
    pub(crate) fn fine(&mut self, name: &str, said: &Said) -> String {
        self.ensure(name, said.code == 0, format_args!("{said:?}"));
        said.out.trim_end().to_owned()
    }

    /// All of them, or the first failures first.
    pub(crate) fn finish(self) -> Result<()> {
        if self.failures.is_empty() {
            return Ok(());
        }
        bail!("{} checks failed:\n- {}", self.failures.len(), self.failures.join("\n- "))
    }
}

/// The store's revision: equal before and after means that nothing changed.
pub(crate) fn revision(cluster: &Cluster<'_>) -> Result<u64> {
    cluster.json(&["info"])?["revision"].as_u64().context("no revision")
}

/// Runs `work` on a thread in the network of a host, with a runtime of its own: the programs' own client code reaches the
/// master as an agent of that host would.
pub(crate) fn in_network_of<T: Send>(host: &Host, work: impl AsyncFnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = format!("/proc/{}/ns/net", host.holder().pid);
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(File::open(namespace)?, CloneFlags::CLONE_NEWNET)?;
            // Its blocking threads, made later, are in the same network.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(work())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Asks the master to let a host join, as an agent does, with whatever is given here. What it answers.
pub(crate) fn ask_to_join(
    cluster: &Cluster<'_>,
    name: &str,
    ca_sha256: &str,
    token: &str,
    clock_off_ms: i64,
) -> Result<String> {
    let address = cluster.master_address();
    in_network_of(cluster.master(), async move || {
        let dir = tempfile::tempdir()?;
        let key = IdentityDir::new(dir.path()).ensure_key()?;
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis();
        let description = NodeDescription { hostname: name.to_owned(), ..NodeDescription::default() };
        let request = grpc::JoinRequest {
            token: token.to_owned(),
            csr_der: identity::signing_request(&key)?,
            description_json: serde_json::to_vec(&description)?,
            clock_unix_ms: u64::try_from(clock)?.saturating_add_signed(clock_off_ms),
        };
        let mut client = identity::connect(&identity::Tcp, &address, identity::pinned_tls(ca_sha256)?).await?;
        Ok(match client.join(request).await {
            Ok(answer) => format!("joined as {}", answer.into_inner().node_id),
            Err(status) => status.message().to_owned(),
        })
    })
}

/// Digest of the CA that a token pins.
pub(crate) fn ca_of(token: &str) -> Result<String> {
    Ok(JoinToken::parse(token).map_err(|e| anyhow::anyhow!("{e}"))?.ca_sha256)
}

/// A node without a host: it joined, and was never heard of again.
pub(crate) fn add_node(cluster: &Cluster<'_>, name: &str) -> Result<()> {
    let token = cluster.token(&[])?;
    let answer = ask_to_join(cluster, name, &ca_of(&token)?, &token, 0)?;
    ensure!(answer.starts_with("joined"), "{answer}");
    Ok(())
}

/// Waits until a task of that name, live or not, is in one of these states, and returns it.
pub(crate) fn wait_for_state(cluster: &Cluster<'_>, name: &str, states: &[&str]) -> Result<Value> {
    wait_for(&format!("task {name} to be {}", states.join(" or ")), PATIENCE, || {
        let of_name = |t: &Value| t["name"] == name && states.iter().any(|s| t["status"]["state"] == *s);
        Ok(cluster.tasks()?.into_iter().find(of_name))
    })
    .with_context(|| cluster.skein(&["ps", "--all"]).unwrap_or_default())
}

/// Id of the container of a task.
pub(crate) fn container(task: &Value) -> Result<&str> {
    task["status"]["container_id"].as_str().with_context(|| format!("no container: {task}"))
}

/// All containers of a host with what tells whether they were touched: id, start, restarts.
pub(crate) fn containers(host: &Host) -> Result<String> {
    let ids = host.docker(&["ps", "-aq", "--no-trunc"])?;
    let mut ids: Vec<&str> = ids.split_whitespace().collect();
    if ids.is_empty() {
        return Ok(String::new());
    }
    ids.sort_unstable();
    inspect(host, &ids)
}

/// What tells whether these containers were touched: id, state, start, restarts. An error when one is not there.
pub(crate) fn inspect(host: &Host, ids: &[&str]) -> Result<String> {
    host.docker(&[&["inspect", "-f", "{{.Id}} {{.State.Status}} {{.State.StartedAt}} {{.RestartCount}}"], ids].concat())
}
