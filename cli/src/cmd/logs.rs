//! `skein logs`: the output of tasks, services and stacks, one line at a time, each with its task's name before it.
//!
//! Tasks: one per followed task, owned by a JoinSet; each sends whole lines through one bounded channel
//! ([`LINES_WAITING_MAX`]; when it is full, reading from the master waits). With `-f`, new tasks of a service or stack
//! are found through events and joined.

use std::collections::BTreeSet;

use skein_api::{
    Event, LogOptions, ServiceId, Task, TaskId, TaskState, UnixMillis,
    client::{Client, ClientError, TaskFilter},
    frame::Frame,
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{sync::mpsc, task::JoinSet};

use super::{App, stack::reopen};
use crate::{
    args::LogsArgs,
    compose::values::duration_ms,
    fail::{Failure, code},
    out::{now, stderr, stdout},
};

/// Lines between the readers and standard output: some screens full.
const LINES_WAITING_MAX: usize = 256;

/// Longest line that is kept together; a longer one is shown in pieces.
const LINE_BYTES_MAX: usize = 64 << 10;

/// Colours of names, in turn (ANSI): no red, which reads as an error.
const COLOURS: [u8; 6] = [36, 33, 32, 35, 34, 96];

/// What a name stands for.
enum Subject {
    Task(TaskId),
    Service(ServiceId),
    Stack(String),
}

impl Subject {
    fn has(&self, task: &Task, services: &BTreeSet<String>) -> bool {
        match self {
            Self::Task(id) => task.id == *id,
            Self::Service(service) => task.service.as_ref() == Some(service),
            Self::Stack(_) => task.service.as_ref().is_some_and(|s| services.contains(s.as_str())),
        }
    }
}

struct OutputLine {
    name: String,
    colour: u8,
    error: bool,
    bytes: Vec<u8>,
}

fn not_found<T>(result: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.status() == Some(404) => Ok(None),
        Err(e) => Err(e),
    }
}

/// A task, else a service, else a stack of this name.
async fn subject(client: &Client, name: &str) -> Result<Subject, Failure> {
    if let Some(service) = not_found(client.service(name).await)? {
        return Ok(Subject::Service(service.id));
    }
    if let Some(task) = not_found(client.task(name).await)? {
        return Ok(Subject::Task(task.id));
    }
    if client.stacks().await?.iter().any(|s| s == name) {
        return Ok(Subject::Stack(name.to_owned()));
    }
    let message = format!("there is no task, service or stack {name:?}");
    Err(Failure::new(code::NOT_FOUND, message, Some("skein ps --all")))
}

/// `skein logs`.
pub(super) async fn logs(app: &App, args: &LogsArgs) -> Result<u8, Failure> {
    let client = app.client("skein logs")?;
    let since_unix_s = match &args.since {
        Some(text) => since(text, now()).map_err(|e| Failure::new(code::USAGE, format!("--since: {e}"), None))?,
        None => 0,
    };
    let options = LogOptions { follow: args.follow, tail: args.tail, since_unix_s, timestamps: args.timestamps };
    let mut subjects = Vec::new();
    for name in &args.names {
        subjects.push(subject(&client, name).await?);
    }
    // Subscribed before the list: a task that comes in between is not missed.
    let mut events = if args.follow { Some(client.events(None).await?) } else { None };
    let (tx, mut rx) = mpsc::channel(LINES_WAITING_MAX);
    let mut followed = Followed {
        services: stack_services(&client, &subjects).await?,
        others: BTreeSet::new(),
        client: client.clone(),
        options,
        seen: BTreeSet::new(),
        readers: JoinSet::new(),
        tx: Some(tx),
    };
    let mut tasks = initial(&client, &subjects).await?;
    tasks.sort_by(|a, b| (&a.name, a.meta.created_at).cmp(&(&b.name, b.meta.created_at)));
    tasks.iter().for_each(|t| followed.add(t));
    let only_tasks = subjects.iter().all(|s| matches!(s, Subject::Task(_)));
    if !args.follow || only_tasks {
        followed.tx = None;
        events = None;
    }
    let mut width = 0;
    let mut failed = None;
    loop {
        tokio::select! {
            // Both are cancel safe.
            line = rx.recv() => match line {
                Some(line) => {
                    width = width.max(line.name.chars().count());
                    write(&line, width, args.no_prefix || (only_tasks && subjects.len() == 1), app.out.colour)?;
                }
                None => break,
            },
            event = next_event(&mut events), if events.is_some() => match event? {
                Some(event) => followed.take(event, &subjects).await?,
                None => {
                    events = Some(reopen(&client).await?);
                    followed.services = stack_services(&client, &subjects).await?;
                    initial(&client, &subjects).await?.iter().for_each(|t| followed.add(t));
                }
            },
            Some(ended) = followed.readers.join_next() => if let Ok(Err(e)) = ended {
                app.out.note(&e.text);
                failed = Some(e.code);
            },
        }
    }
    while let Some(ended) = followed.readers.join_next().await {
        if let Ok(Err(e)) = ended {
            app.out.note(&e.text);
            failed = Some(e.code);
        }
    }
    Ok(failed.unwrap_or(0))
}

async fn next_event(events: &mut Option<skein_api::client::EventStream>) -> Result<Option<Event>, ClientError> {
    match events {
        Some(events) => match events.next().await {
            // As an end of the stream: it is opened again.
            Err(e) if e.is_unreachable() => Ok(None),
            other => other,
        },
        None => std::future::pending().await,
    }
}

async fn stack_services(client: &Client, subjects: &[Subject]) -> Result<BTreeSet<String>, Failure> {
    let mut ids = BTreeSet::new();
    for subject in subjects {
        if let Subject::Stack(name) = subject {
            ids.extend(client.services(Some(name)).await?.into_iter().map(|s| s.id.to_string()));
        }
    }
    Ok(ids)
}

async fn initial(client: &Client, subjects: &[Subject]) -> Result<Vec<Task>, Failure> {
    let mut tasks = Vec::new();
    for subject in subjects {
        match subject {
            Subject::Task(id) => tasks.push(client.task(id.as_str()).await?),
            Subject::Service(service) => {
                let filter = TaskFilter { service: Some(service.to_string()), all: true, ..Default::default() };
                tasks.extend(client.tasks(&filter).await?);
            }
            Subject::Stack(name) => {
                let filter = TaskFilter { stack: Some(name.clone()), all: true, ..Default::default() };
                tasks.extend(client.tasks(&filter).await?);
            }
        }
    }
    // Those without a container have no output yet; with -f they come by their events.
    tasks.retain(|t| t.status.container_id.is_some() || matches!(t.status.state, TaskState::Running));
    Ok(tasks)
}

/// The tasks whose output is being read.
struct Followed {
    /// Services of the stacks that are meant.
    services: BTreeSet<String>,
    /// Services that are known to be of none of them.
    others: BTreeSet<String>,
    client: Client,
    options: LogOptions,
    seen: BTreeSet<(TaskId, u64)>,
    readers: JoinSet<Result<(), Failure>>,
    tx: Option<mpsc::Sender<OutputLine>>,
}

impl Followed {
    /// Follows the task of an event if it is meant and has, or will soon have, output.
    async fn take(&mut self, event: Event, subjects: &[Subject]) -> Result<(), Failure> {
        let object = event.object.filter(|_| event.kind == "task");
        let Some(Ok(task)) = object.map(serde_json::from_value::<Task>) else { return Ok(()) };
        if let Some(service) = task.service.as_ref().map(ToString::to_string)
            && !self.services.contains(&service)
            && self.others.insert(service.clone())
            && subjects.iter().any(|s| matches!(s, Subject::Stack(_)))
        {
            // A service of such a stack may be new.
            self.services = stack_services(&self.client, subjects).await?;
        }
        if task.status.state >= TaskState::Starting && subjects.iter().any(|s| s.has(&task, &self.services)) {
            self.add(&task);
        }
        Ok(())
    }

    fn add(&mut self, task: &Task) {
        let Some(tx) = self.tx.clone() else { return };
        if !self.seen.insert((task.id.clone(), task.run)) {
            return;
        }
        let colour = COLOURS[self.seen.len() % COLOURS.len()];
        let (client, options) = (self.client.clone(), self.options.clone());
        let (id, name) = (task.id.to_string(), task.name.clone());
        self.readers.spawn(async move { read(&client, &id, name, colour, &options, &tx).await });
    }
}

async fn read(
    client: &Client,
    id: &str,
    name: String,
    colour: u8,
    options: &LogOptions,
    tx: &mpsc::Sender<OutputLine>,
) -> Result<(), Failure> {
    let mut stream = client.logs(id, options).await?;
    let mut lines = [Lines::default(), Lines::default()];
    while let Some(frame) = stream.next().await? {
        let (data, error) = match frame {
            Frame::Stdout(data) => (data, false),
            Frame::Stderr(data) => (data, true),
            Frame::Failure(why) => {
                return Err(Failure::new(code::FAILED, format!("failed to read the output of {name}: {why}"), None));
            }
            _ => continue,
        };
        for bytes in lines[usize::from(error)].push(&data) {
            let line = OutputLine { name: name.clone(), colour, error, bytes };
            if tx.send(line).await.is_err() {
                return Ok(());
            }
        }
    }
    for (i, rest) in lines.into_iter().enumerate().filter(|(_, l)| !l.rest.is_empty()) {
        let _ = tx.send(OutputLine { name: name.clone(), colour, error: i == 1, bytes: rest.rest }).await;
    }
    Ok(())
}

/// Bytes to lines without their ends.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn push(&mut self, data: &[u8]) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        for piece in data.split_inclusive(|b| *b == b'\n') {
            self.rest.extend_from_slice(piece);
            if self.rest.ends_with(b"\n") {
                self.rest.pop();
                out.push(std::mem::take(&mut self.rest));
            } else if self.rest.len() >= LINE_BYTES_MAX {
                out.push(std::mem::take(&mut self.rest));
            }
        }
        out
    }
}

/// Standard error of a task goes to ours only when it is alone: lines of several tasks stay in one order otherwise.
fn write(line: &OutputLine, width: usize, bare: bool, colour: bool) -> Result<(), Failure> {
    let mut text = Vec::with_capacity(line.bytes.len() + 32);
    if !bare {
        let padded = format!("{:<width$}", line.name);
        let prefix = if colour { format!("\x1b[{}m{padded} |\x1b[0m ", line.colour) } else { format!("{padded} | ") };
        text.extend_from_slice(prefix.as_bytes());
    }
    text.extend_from_slice(&line.bytes);
    text.push(b'\n');
    if bare && line.error {
        stderr(&text);
        return Ok(());
    }
    stdout(&text)
}

/// Seconds since 1970 of `10m` (ago) or of a time (RFC 3339, or seconds).
fn since(text: &str, now: UnixMillis) -> Result<i64, String> {
    let now_s = i64::try_from(now.0 / 1_000).unwrap_or(i64::MAX);
    if let Ok(seconds) = text.parse::<i64>() {
        return Ok(seconds);
    }
    if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
        return Ok(time.unix_timestamp());
    }
    let bad = |_| format!("expected a duration such as 10m or a time such as 2030-01-31T12:00:00Z, found {text:?}");
    let ago = duration_ms(text).map_err(bad)?;
    Ok(now_s.saturating_sub(i64::try_from(ago / 1_000).unwrap_or(i64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let check = |text: &str, expected: Result<i64, &str>| {
            assert_eq!(since(text, UnixMillis(1_000_000_000)), expected.map_err(str::to_owned), "{text}");
        };
        check("10m", Ok(999_400));
        check("500", Ok(500));
        check("1970-01-02T00:00:00Z", Ok(86_400));
        check("1970-01-02T01:00:00+01:00", Ok(86_400));
        check(
            "yesterday",
            Err("expected a duration such as 10m or a time such as 2030-01-31T12:00:00Z, found \"yesterday\""),
        );
    }

    #[test]
    fn lines_are_put_together() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"one\ntw"), [b"one".to_vec()]);
        assert_eq!(lines.push(b"o\n\nx"), [b"two".to_vec(), Vec::new()]);
        assert_eq!(lines.rest, b"x");
        assert_eq!(lines.push(&vec![b'y'; LINE_BYTES_MAX]).len(), 1);
    }
}
