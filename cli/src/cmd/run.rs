//! `skein run`, `rm`, `stop`, `start`: container tasks.

use std::path::Path;

use skein_api::{
    LogOptions, Task, TaskState,
    client::{Client, EventStream},
    frame::Frame,
};
use tokio::signal::ctrl_c;

use super::{App, each, node_names, node_of};
use crate::{
    args::RunArgs,
    fail::{Failure, code},
    out::{stderr, stdout},
    progress::describe,
    run_flags::{Surroundings, container},
};

/// Exit code after a second Ctrl-C, as shells have it: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

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
    let events = client.events(None).await?;
    let task = client.container_create(&create).await?;
    let id = task.id.to_string();
    let ended = tokio::select! {
        ended = attached(app, &client, task, events) => Some(ended),
        () = interrupted_twice(app, &client, &id) => None,
    };
    let code = match ended {
        Some(code) => code?,
        None => return Ok(INTERRUPTED),
    };
    if args.rm {
        client.task_remove(&id, true).await?;
    }
    Ok(code)
}

/// Ctrl-C once asks the container to stop, twice gives up waiting.
async fn interrupted_twice(app: &App, client: &Client, id: &str) {
    if ctrl_c().await.is_err() {
        return std::future::pending().await;
    }
    app.out.note("stopping; press Ctrl-C again to leave it alone");
    let stop = client.task_stop(id);
    tokio::select! {
        result = stop => if let Err(e) = result {
            app.out.note(&Failure::from(e).text);
        },
        _ = ctrl_c() => return,
    }
    let _ = ctrl_c().await;
}

/// Follows a task of a run until it ends, with its output from the moment it runs.
async fn attached(app: &App, client: &Client, task: Task, mut events: EventStream) -> Result<u8, Failure> {
    let mut task = client.task(task.id.as_str()).await?;
    let mut said = String::new();
    while task.status.state < TaskState::Running {
        let names = node_names(client).await?;
        let text = describe(&task, node_of(&task, &names));
        if text != said {
            app.out.note(&format!("{}  {text}", task.name));
            said = text;
        }
        task = next_state(client, &mut events, &task).await?;
    }
    if task.status.container_id.is_some() || task.status.state == TaskState::Running {
        output(client, &task).await?;
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

/// The task after its next change. When the stream ends, it is asked for anew.
async fn next_state(client: &Client, events: &mut EventStream, task: &Task) -> Result<Task, Failure> {
    loop {
        match events.next().await? {
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
                *events = client.events(None).await?;
                return Ok(client.task(task.id.as_str()).await?);
            }
        }
    }
}

/// Copies a task's output to ours until it ends.
async fn output(client: &Client, task: &Task) -> Result<(), Failure> {
    let options = LogOptions { follow: true, ..Default::default() };
    let mut logs = client.logs(task.id.as_str(), &options).await?;
    while let Some(frame) = logs.next().await? {
        match frame {
            Frame::Stdout(data) => stdout(&data)?,
            Frame::Stderr(data) => stderr(&data),
            Frame::Failure(why) => {
                return Err(Failure::new(code::FAILED, format!("failed to read the output: {why}"), None));
            }
            _ => {}
        }
    }
    Ok(())
}

/// `skein rm`.
pub(super) async fn remove(app: &App, names: &[String], force: bool) -> Result<u8, Failure> {
    let client = &app.client("skein rm")?;
    each(names, |name| async move {
        client.task_remove(&name, force).await?;
        app.out.line(&name)
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
