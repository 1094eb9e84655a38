//! Logs and exec of the engine.

use std::{pin::Pin, time::Duration};

use bollard::{
    container::LogOutput,
    exec::{CreateExecOptions, StartExecOptions, StartExecResults},
    query_parameters::{LogsOptionsBuilder, ResizeExecOptionsBuilder},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use skein_api::{ExecOptions, LogOptions};
use tokio::io::AsyncWrite;

use super::{Engine, EngineError};

/// A quiet log sends no answer before its first line, so that answer may take this long: a day.
const QUIET_MAX: Duration = Duration::from_secs(24 * 3_600);

/// A piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecOutput {
    /// Standard output, or a terminal's.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
}

/// Pieces of output as they come.
pub type LogStream = Pin<Box<dyn Stream<Item = Result<ExecOutput, EngineError>> + Send>>;

/// A process that was started in a container.
pub struct ExecProcess {
    /// The engine's id of it.
    pub id: String,
    /// Its output; ends with the process.
    pub output: LogStream,
    /// Its standard input; shutting it down is its end.
    pub input: Pin<Box<dyn AsyncWrite + Send>>,
}

impl Engine {
    fn pieces(
        &self,
        stream: impl Stream<Item = Result<LogOutput, bollard::errors::Error>> + Send + 'static,
        thing: String,
    ) -> LogStream {
        let engine = self.clone();
        Box::pin(stream.map(move |piece| match piece {
            Ok(LogOutput::StdErr { message }) => Ok(ExecOutput::Stderr(message)),
            Ok(LogOutput::StdOut { message } | LogOutput::Console { message } | LogOutput::StdIn { message }) => {
                Ok(ExecOutput::Stdout(message))
            }
            Err(error) => Err(engine.failed("read", &thing, error)),
        }))
    }

    /// Log lines of a container, by the engine's id.
    pub async fn logs(&self, container: &str, options: &LogOptions) -> Result<LogStream, EngineError> {
        let query = LogsOptionsBuilder::default()
            .stdout(true)
            .stderr(true)
            .follow(options.follow)
            .timestamps(options.timestamps)
            .since(i32::try_from(options.since_unix_s).unwrap_or(i32::MAX))
            .tail(&options.tail.map_or_else(|| "all".to_owned(), |n| n.to_string()))
            .build();
        let client = self.client_for(QUIET_MAX).await?;
        let container_id = container.to_owned();
        let stream = client.logs(&container_id, Some(query));
        Ok(self.pieces(stream, format!("logs of container {container}")))
    }

    /// Starts a process in a container, by the engine's id.
    pub async fn exec(&self, container: &str, options: &ExecOptions) -> Result<ExecProcess, EngineError> {
        let thing = format!("{:?} in container {container}", options.argv.first().map_or("", String::as_str));
        let create = CreateExecOptions {
            attach_stdin: Some(options.stdin),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            tty: Some(options.tty),
            env: Some(options.env.clone()),
            cmd: Some(options.argv.clone()),
            user: options.user.clone(),
            working_dir: options.working_dir.clone(),
            ..Default::default()
        };
        let client = self.client().await?;
        let made = client.create_exec(container, create).await.map_err(|e| self.failed("execute", &thing, e))?;
        let start = StartExecOptions { detach: false, tty: options.tty, output_capacity: None };
        let started = client.start_exec(&made.id, Some(start)).await.map_err(|e| self.failed("execute", &thing, e))?;
        match started {
            StartExecResults::Attached { output, input } => {
                Ok(ExecProcess { id: made.id, output: self.pieces(output, thing), input })
            }
            StartExecResults::Detached => Err(EngineError::Refused {
                verb: "execute",
                thing,
                status: 0,
                message: "the engine did not attach to it".into(),
            }),
        }
    }

    /// The size of an exec's terminal, in characters.
    pub async fn exec_resize(&self, exec: &str, rows: u16, columns: u16) -> Result<(), EngineError> {
        let size = ResizeExecOptionsBuilder::default().h(rows.into()).w(columns.into()).build();
        let client = self.client().await?;
        client.resize_exec(exec, size).await.map_err(|e| self.failed("resize", &format!("terminal of {exec}"), e))
    }

    /// Exit code of an exec; none: it still runs.
    pub async fn exec_exit_code(&self, exec: &str) -> Result<Option<i64>, EngineError> {
        let client = self.client().await?;
        let found = client.inspect_exec(exec).await.map_err(|e| self.failed("inspect", &format!("exec {exec}"), e))?;
        Ok(found.exit_code.filter(|_| found.running != Some(true)))
    }
}
