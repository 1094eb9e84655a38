//! `skein run`, `rm`, `stop`, `start`: container tasks.
//!
//! A run in the foreground outlives its master: what breaks off is opened again, output goes on where it stopped. With
//! `--rm` the container is removed however the run ends, but for SIGKILL.

use std::{path::Path, time::Duration};

use serde_json::json;
use skein_api::{
    LogOptions, Task, TaskState,
    client::{Client, ClientError, EventStream},
    frame::Frame,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, sleep},
};

use super::{App, each, node_names, node_of, stack::reopen};
use crate::{
    args::RunArgs,
    fail::{Failure, code},
    out::{now, stderr, stdout},
    progress::describe,
    run_flags::{Surroundings, container},
};

/// Exit code of a process that a signal ended, as shells have it.
const SIGNALLED: u8 = 128;

/// Pause before a call is repeated that reached no master.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// How long a master may be away while the container of an ended run is to be removed.
const REMOVE_WITHIN: Duration = Duration::from_secs(20);

/// Times in a row that output is asked for again when there is none: with [`RETRY_PAUSE`] 10 s, in which an agent has
/// found a master that came back.
const OUTPUT_RETRIES_MAX: u32 = 20;

/// Output that is read again to find where it stopped, bytes: below one log file of an agent (10 MB), so that it is
/// all still there. After more, output goes on by the clock, and lines of that second may come twice.
const REPLAY_BYTES_MAX: u64 = 8 << 20;

/// What ends a run from outside. Caught from before the container is made: one that is to be removed is.
struct Interrupts {
    int: Signal,
    term: Signal,
    hup: Signal,
}

impl Interrupts {
    fn catch() -> Result<Self, Failure> {
        let catch = |kind| signal(kind).map_err(|e| Failure::io("failed to catch signals", &e));
        Ok(Self {
            int: catch(SignalKind::interrupt())?,
            term: catch(SignalKind::terminate())?,
            hup: catch(SignalKind::hangup())?,
        })
    }

    /// The next signal's number. Cancel-safe.
    async fn next(&mut self) -> u8 {
        // Numbers of signal(7); the three are the same everywhere.
        tokio::select! {
            _ = self.int.recv() => 2,
            _ = self.term.recv() => 15,
            _ = self.hup.recv() => 1,
        }
    }
}

/// `skein run`: makes a container; unless detached, shows its output and ends with its exit code.
pub(super) async fn run(app: &App, args: &RunArgs) -> Result<u8, Failure> {
    let dir = std::env::current_dir().map_err(|e| Failure::io("failed to find the current directory", &e))?;
    let around = Surroundings {
        dir: &dir,
        lookup: &|name| app.env.get(name).cloned(),
        read: &|path: &Path| std::fs::read_to_string(path),
    };
    let create = container(args, &around).map_err(|e| Failure::new(code::USAGE, e, None))?;
    let client = app.client("skein run")?;
    if args.detach {
        let task = client.container_create(&create).await?;
        if app.out.json {
            app.out.value(&task)?
        } else {
            app.out.line(task.id.as_str())?
        }
        return Ok(0);
    }
    let mut interrupts = Interrupts::catch()?;
    let events = client.events(None).await?;
    let task = client.container_create(&create).await?;
    let id = task.id.to_string();
    // Dropping `attached` in the middle only closes streams.
    let ended = tokio::select! {
        ended = attached(app, &client, &task, events) => ended,
        signal = interrupted_twice(app, &client, &id, args.rm, &mut interrupts) => Ok(SIGNALLED + signal),
    };
    if !args.rm {
        return ended;
    }
    match (remove_at_end(&client, &id, &mut interrupts).await, ended) {
        (Ok(()), ended) => ended,
        (Err(left), Ok(_)) => Err(left),
        (Err(left), Err(why)) => Err(Failure { text: format!("{}{}", why.text, left.text), ..why }),
    }
}

/// Removes the container of a run that is over.
async fn remove_at_end(client: &Client, id: &str, interrupts: &mut Interrupts) -> Result<(), Failure> {
    let deadline = Instant::now() + REMOVE_WITHIN;
    let remove = async {
        loop {
            match client.task_remove(id, true).await {
                Err(e) if e.status() == Some(404) => return Ok(()),
                Err(e) if e.is_unreachable() && Instant::now() < deadline => sleep(RETRY_PAUSE).await,
                Err(e) => return Err(Failure::from(e)),
                Ok(_) => return Ok(()),
            }
        }
    };
    let hint = format!("skein rm --force {id}");
    tokio::select! {
        removed = remove => removed.map_err(|why| {
            let left = Failure::new(why.code, format!("the container {id} is still there"), Some(&hint));
            Failure { text: format!("{}{}", why.text, left.text), ..left }
        }),
        _ = interrupts.next() => {
            Err(Failure::new(code::FAILED, format!("the container {id} may still be there"), Some(&hint)))
        }
    }
}

/// Ctrl-C once asks the container to stop, twice gives up waiting; so does any other signal at once. The answer is the
/// signal's number.
async fn interrupted_twice(app: &App, client: &Client, id: &str, rm: bool, interrupts: &mut Interrupts) -> u8 {
    let first = interrupts.next().await;
    if first != 2 {
        return first;
    }
    let again = if rm { "remove it at once" } else { "leave it alone" };
    app.out.note(&format!("stopping; press Ctrl-C again to {again}"));
    tokio::select! {
        result = client.task_stop(id) => if let Err(e) = result {
            app.out.note(&Failure::from(e).text);
        },
        signal = interrupts.next() => return signal,
    }
    interrupts.next().await
}

/// Repeats a call until a master answers. Only for calls that change nothing.
async fn steady<T>(mut call: impl AsyncFnMut() -> Result<T, ClientError>) -> Result<T, ClientError> {
    loop {
        match call().await {
            Err(e) if e.is_unreachable() => sleep(RETRY_PAUSE).await,
            other => return other,
        }
    }
}

/// Follows a task of a run until it ends, with its output from the moment it runs.
async fn attached(app: &App, client: &Client, task: &Task, mut events: EventStream) -> Result<u8, Failure> {
    let mut task = steady(async || client.task(task.id.as_str()).await).await?;
    let mut said = String::new();
    while task.status.state < TaskState::Running {
        let names = steady(async || node_names(client).await).await?;
        let text = describe(&task, node_of(&task, &names));
        if text != said {
            app.out.note(&format!("{}  {text}", task.name));
            said = text;
        }
        task = next_state(client, &mut events, &task).await?;
    }
    if task.status.container_id.is_some() || task.status.state == TaskState::Running {
        task = output(app, client, &task).await?;
    }
    while !task.status.state.is_terminal() {
        task = next_state(client, &mut events, &task).await?;
    }
    if let (Some(exit), TaskState::Complete | TaskState::Failed | TaskState::Shutdown) =
        (task.status.exit_code, task.status.state)
    {
        return Ok(u8::try_from(exit).unwrap_or(code::FAILED));
    }
    let hint = format!("skein explain {}", task.name);
    Err(Failure::new(code::FAILED, format!("{}  {}", task.name, describe(&task, None)), Some(&hint)))
}

/// The task after its next change. When the stream ends or breaks, it is opened again and the task asked for anew.
async fn next_state(client: &Client, events: &mut EventStream, task: &Task) -> Result<Task, Failure> {
    loop {
        let event = match events.next().await {
            Err(e) if e.is_unreachable() => None,
            other => other?,
        };
        match event {
            Some(event) if event.kind == "task" && event.id == task.id.as_str() => {
                let Some(object) = event.object else {
                    return Err(Failure::new(code::NOT_FOUND, format!("{} was removed", task.name), None));
                };
                if let Ok(next) = serde_json::from_value::<Task>(object)
                    && next.meta.revision >= task.meta.revision
                {
                    return Ok(next);
                }
            }
            Some(_) => {}
            None => {
                *events = reopen(client).await?;
                return Ok(steady(async || client.task(task.id.as_str()).await).await?);
            }
        }
    }
}

/// How far a task's output was shown.
#[derive(Default)]
struct Shown {
    /// Bytes of standard output and of standard error.
    bytes: [u64; 2],
    /// When the last of it came, seconds since 1970.
    last_unix_s: i64,
}

impl Shown {
    /// Whether the output can be read again from its beginning.
    fn replays(&self) -> bool {
        self.bytes.iter().sum::<u64>() <= REPLAY_BYTES_MAX
    }
}

/// Copies a task's output to ours until it ends; goes on where it stopped when the way to it breaks. The answer is the
/// task as it is then.
async fn output(app: &App, client: &Client, task: &Task) -> Result<Task, Failure> {
    let (mut shown, mut fruitless, mut said) = (Shown::default(), 0, false);
    loop {
        let before = shown.bytes;
        let broken = match copy(client, task, &mut shown).await {
            Ok(None) => {
                let now = steady(async || client.task(task.id.as_str()).await).await?;
                // A master that shuts down ends the stream just as the container's end does, whose word may be late.
                if now.status.state.is_terminal() || fruitless >= OUTPUT_RETRIES_MAX {
                    return Ok(now);
                }
                None
            }
            // Nobody reads what we write.
            Err(Stopped::Here(failure)) => return Err(failure),
            Ok(Some(why)) => {
                let message = format!("failed to read the output of {}: {why}", task.name);
                Some(Failure::new(code::FAILED, message, None))
            }
            Err(Stopped::Master(e)) if e.is_unreachable() => {
                // The master is waited for; what an agent answers after that counts anew.
                fruitless = 0;
                if !std::mem::replace(&mut said, true) {
                    app.out.note("the master does not answer; the container goes on, waiting for its output");
                }
                sleep(RETRY_PAUSE).await;
                continue;
            }
            // Its agent has not found the master yet.
            Err(Stopped::Master(e)) if e.status().is_some_and(|s| s >= 500) => Some(e.into()),
            Err(Stopped::Master(e)) => return Err(e.into()),
        };
        fruitless = if shown.bytes == before { fruitless + 1 } else { 0 };
        if let Some(broken) = broken.filter(|_| fruitless >= OUTPUT_RETRIES_MAX) {
            return Err(broken);
        }
        sleep(RETRY_PAUSE).await;
    }
}

/// Why copying stopped.
enum Stopped {
    Master(ClientError),
    Here(Failure),
}

/// Copies what was not shown yet, until the output ends. The answer is why it broke off on its way, if it did.
async fn copy(client: &Client, task: &Task, shown: &mut Shown) -> Result<Option<String>, Stopped> {
    let mut options = LogOptions { follow: true, ..Default::default() };
    let mut skip = shown.bytes;
    if !shown.replays() {
        options.since_unix_s = shown.last_unix_s;
        skip = [0, 0];
    }
    let mut logs = client.logs(task.id.as_str(), &options).await.map_err(Stopped::Master)?;
    while let Some(frame) = logs.next().await.map_err(Stopped::Master)? {
        let (data, stream) = match frame {
            Frame::Stdout(data) => (data, 0),
            Frame::Stderr(data) => (data, 1),
            Frame::Failure(why) => return Ok(Some(why)),
            _ => continue,
        };
        let old = usize::try_from(skip[stream]).unwrap_or(usize::MAX).min(data.len());
        skip[stream] -= old as u64;
        let new = &data[old..];
        shown.bytes[stream] += new.len() as u64;
        shown.last_unix_s = i64::try_from(now().0 / 1_000).unwrap_or(i64::MAX);
        match stream {
            0 => stdout(new).map_err(Stopped::Here)?,
            _ => stderr(new),
        }
    }
    Ok(None)
}

/// `skein rm`.
pub(super) async fn remove(app: &App, names: &[String], force: bool) -> Result<u8, Failure> {
    let client = &app.client("skein rm")?;
    each(names, |name| async move {
        client.task_remove(&name, force).await?;
        if app.out.json { app.out.value(&json!({ "removed": name })) } else { app.out.line(&name) }
    })
    .await
}

/// `skein stop`.
pub(super) async fn stop(app: &App, names: &[String]) -> Result<u8, Failure> {
    let client = &app.client("skein stop")?;
    each(names, |name| async move {
        let task = client.task_stop(&name).await?;
        if app.out.json { app.out.value(&task) } else { app.out.line(&name) }
    })
    .await
}

/// `skein start`.
pub(super) async fn start(app: &App, names: &[String]) -> Result<u8, Failure> {
    let client = &app.client("skein start")?;
    each(names, |name| async move {
        let task = client.task_start(&name).await?;
        if app.out.json { app.out.value(&task) } else { app.out.line(&name) }
    })
    .await
}
