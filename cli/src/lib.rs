//! `skein`, the command line of a cluster: compose files in, plans and tables out.
//!
//! Map: `args` (what clap sees), `cmd` (one module per family of commands), [`compose`] (the parser, usable on its own),
//! `plan` and `progress` and `run_flags` (pure), `context` (which master), `out` and `fail` (what users see). All talk to
//! a master goes through `skein_api::client`. The environment is read here, once.

mod args;
mod cmd;
pub mod compose;
mod context;
mod fail;
mod out;
mod plan;
mod progress;
mod run_flags;

use std::{collections::BTreeMap, process::ExitCode};

use clap::{CommandFactory, Parser};

use crate::{
    args::{Cli, Command, Format},
    cmd::App,
    context::{Choice, Store},
    fail::{Failure, code},
    out::Out,
};

/// The whole program: reads arguments and environment, runs, and says how it went.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are data, all else is a message; a reader that is gone changes neither code.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { code::USAGE } else { 0 });
        }
    };
    let env: BTreeMap<String, String> =
        std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect();
    match run(cli, env) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            out::stderr(failure.text.as_bytes());
            ExitCode::from(failure.code)
        }
    }
}

fn run(cli: Cli, env: BTreeMap<String, String>) -> Result<u8, Failure> {
    let set = |name: &str| env.get(name).filter(|v| !v.is_empty()).cloned();
    let dumb = set("TERM").is_some_and(|t| t == "dumb");
    let out = Out::detect(cli.output == Format::Json, set("NO_COLOR").is_some(), dumb);
    let store = Store::new(set("XDG_CONFIG_HOME"), set("HOME"));
    let choice = Choice {
        host: cli.host,
        context: cli.context,
        tls_dir: cli.tls_dir.or_else(|| set("SKEIN_TLS_DIR").map(Into::into)),
        env_host: set("SKEIN_HOST"),
        env_context: set("SKEIN_CONTEXT"),
    };
    match cli.command {
        Command::Completion { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "skein", &mut text);
            out::stdout(&text).map(|()| 0)
        }
        Command::Context(command) => cmd::contexts::run(command, &store, &choice, out).map(|()| 0),
        command => {
            let app = App { out, store, choice, env };
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .map_err(|e| Failure::io("failed to start", &e))?;
            runtime.block_on(cmd::run(&app, command))
        }
    }
}
