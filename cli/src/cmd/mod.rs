//! The commands: each takes its arguments and an [`App`], and gives back an exit code or a failure.

pub(crate) mod contexts;
mod exec;
mod logs;
mod net;
mod objects;
mod ps;
mod run;
mod stack;
mod what_if;

use std::collections::BTreeMap;

use skein_api::{
    NodeId, Task,
    client::{Client, ClientError},
};

use crate::{
    args::Command,
    context::{Choice, Store},
    fail::Failure,
    out::Out,
};

/// What commands work with.
pub(crate) struct App {
    /// Where to write.
    pub(crate) out: Out,
    /// The user's contexts.
    pub(crate) store: Store,
    /// What the user said about the master that is meant.
    pub(crate) choice: Choice,
    /// The environment of the process.
    pub(crate) env: BTreeMap<String, String>,
}

impl App {
    /// A client of the master that is meant; `why` goes with every change.
    pub(crate) fn client(&self, why: &str) -> Result<Client, Failure> {
        let (_, context) = self.store.resolve(&self.choice)?;
        Ok(context.client()?.with_why(why))
    }

    /// The value of a variable that is set and not empty.
    pub(crate) fn var(&self, name: &str) -> Option<&str> {
        self.env.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }
}

/// Runs any command but those that need no master.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Failure> {
    match command {
        Command::Up(args) => stack::up(app, args).await,
        Command::Down(args) => stack::down(app, args).await,
        Command::Run(args) => run::run(app, &args).await,
        Command::Rm(args) => run::remove(app, &args.names, args.force).await,
        Command::Stop(args) => run::stop(app, &args.names).await,
        Command::Start(args) => run::start(app, &args.names).await,
        Command::Ps(args) => ps::ps(app, &args).await.map(|()| 0),
        Command::Logs(args) => logs::logs(app, &args).await,
        Command::Exec(args) => exec::exec(app, args).await,
        Command::Net(command) => net::run(app, command).await,
        Command::Completion { .. } | Command::Context(_) => unreachable!("these need no master and are done before"),
        other => objects::run(app, other).await,
    }
}

/// Names of all nodes, to show instead of ids.
pub(crate) async fn node_names(client: &Client) -> Result<BTreeMap<NodeId, String>, ClientError> {
    Ok(client.nodes().await?.into_iter().map(|n| (n.id, n.name)).collect())
}

/// The name of the node that a task is on.
pub(crate) fn node_of<'a>(task: &'a Task, names: &'a BTreeMap<NodeId, String>) -> Option<&'a str> {
    task.node.as_ref().map(|id| names.get(id).map_or(id.short(), String::as_str))
}

/// Does the same to each name: goes on after a failure, reports each, and gives back the first one's code.
pub(crate) async fn each<F>(names: &[String], mut work: impl FnMut(String) -> F) -> Result<u8, Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let mut first: Option<Failure> = None;
    for name in names {
        if let Err(failure) = work(name.clone()).await {
            match &mut first {
                None => first = Some(failure),
                Some(first) => first.text.push_str(&failure.text),
            }
        }
    }
    first.map_or(Ok(0), Err)
}

/// Reads `KEY=VALUE` arguments.
pub(crate) fn labels(flags: &[String]) -> Result<BTreeMap<String, String>, Failure> {
    let split = |flag: &String| match flag.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(Failure::new(crate::fail::code::USAGE, format!("expected KEY=VALUE, found {flag:?}"), None)),
    };
    flags.iter().map(split).collect()
}
