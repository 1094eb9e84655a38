//! `skein up` and `skein down`: compose file -> plan -> question -> change -> waiting.
//!
//! Waiting subscribes to events before it lists, so that nothing falls between, and starts over when the stream breaks:
//! a restart of the master does not end it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use skein_api::{
    Event, Node, Service, StackApply, StackPlan, StackSpec, Task, TaskId, TaskState,
    client::{Client, ClientError, EventStream, TaskFilter},
};
use tokio::time::{Instant, sleep, timeout_at};

use super::{App, node_names, objects::explained};
use crate::{
    args::{ComposeArgs, DownArgs, UpArgs},
    compose::{self, ComposeFile, Options},
    fail::{Failure, code},
    plan,
    progress::{Line, Outcome, Progress, short_name},
};

/// Names that Compose looks for, in its order.
const FILE_NAMES: [&str; 4] = ["compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml"];

/// Pause before a broken event stream is opened again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

/// Most services whose failure is explained in full; the others are named.
const EXPLAINED_MAX: usize = 5;

/// Reads the files that the arguments mean, and hands everything that the parser depends on to `work`.
fn with_options<T>(
    app: &App,
    args: &ComposeArgs,
    strict: bool,
    work: impl FnOnce(&Options<'_>) -> Result<T, compose::problem::ComposeError>,
) -> Result<T, Failure> {
    let cwd = std::env::current_dir().map_err(|e| Failure::io("failed to find the current directory", &e))?;
    let paths = find_files(app, args, &cwd)?;
    let mut files = Vec::new();
    for path in &paths {
        let text = if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .map_err(|e| Failure::new(code::BAD_CONFIG, format!("failed to read standard input: {e}"), None))?;
            text
        } else {
            crate::context::read(path)?
        };
        let name = path.strip_prefix(&cwd).unwrap_or(path).display().to_string();
        files.push(ComposeFile { name, text });
    }
    let first = paths.first().filter(|p| p.as_os_str() != "-");
    let project_dir = first.and_then(|p| Some(cwd.join(p).parent()?.to_owned())).unwrap_or_else(|| cwd.clone());
    // `..` and links resolved: the directory's name becomes the stack's, and its paths go to other hosts.
    let project_dir = project_dir.canonicalize().unwrap_or(project_dir);
    let options = Options {
        files,
        project_dir,
        project_name: args.project_name.clone(),
        env: app.env.clone(),
        env_files: args.env_file.iter().map(|f| cwd.join(f)).collect(),
        profiles: args.profile.clone(),
        strict,
        read: &|path: &Path| std::fs::read_to_string(path),
    };
    Ok(work(&options)?)
}

/// `-f`, COMPOSE_FILE, or the first usual name here or in a directory above, with its override file.
fn find_files(app: &App, args: &ComposeArgs, cwd: &Path) -> Result<Vec<PathBuf>, Failure> {
    if !args.files.is_empty() {
        return Ok(args.files.clone());
    }
    if let Some(list) = app.var("COMPOSE_FILE") {
        return Ok(std::env::split_paths(list).collect());
    }
    for dir in cwd.ancestors() {
        let Some(found) = FILE_NAMES.iter().map(|n| dir.join(n)).find(|p| p.is_file()) else { continue };
        let extension = found.extension().unwrap_or_default().to_string_lossy().into_owned();
        let over = found.with_extension(format!("override.{extension}"));
        let mut files = vec![found];
        files.extend(over.is_file().then_some(over));
        return Ok(files);
    }
    let message = format!("there is no compose file in {} or above it: {}", cwd.display(), FILE_NAMES.join(", "));
    Err(Failure::new(code::BAD_CONFIG, message, Some("name one with `-f FILE`")))
}

/// The stack that the files describe, for who does not make it.
pub(super) fn parsed(app: &App, args: &ComposeArgs) -> Result<StackSpec, Failure> {
    let parsed = with_options(app, args, false, compose::parse)?;
    for warning in &parsed.warnings {
        app.out.note(&warning.render("warning", &parsed.sources));
    }
    Ok(parsed.stack)
}

/// `skein up`.
pub(super) async fn up(app: &App, args: UpArgs) -> Result<u8, Failure> {
    let parsed = with_options(app, &args.compose, args.strict, compose::parse)?;
    for warning in &parsed.warnings {
        app.out.note(&warning.render("warning", &parsed.sources));
    }
    let client = app.client("skein up")?;
    let stack = parsed.stack;
    let mut apply = StackApply { stack, remove_orphans: args.remove_orphans, dry_run: true };
    let planned = client.stack_apply(&apply).await?;
    if args.dry_run {
        show_plan(app, &planned, &apply.stack.name)?;
        return Ok(0);
    }
    app.out.note(&plan::render(&planned, &apply.stack.name, app.out.live && app.out.colour));
    if plan::is_destructive(&planned) && !args.yes && app.out.ask && !app.out.confirm("go ahead?") {
        return Err(Failure::new(code::FAILED, "nothing was changed", None));
    }
    apply.dry_run = false;
    // Before the change: what it sets off is not missed.
    let events = client.events(None).await?;
    let done = client.stack_apply(&apply).await?;
    let tasks = if args.detach {
        client.tasks(&TaskFilter { stack: Some(apply.stack.name.clone()), ..Default::default() }).await?
    } else {
        wait_up(app, &client, &apply.stack, &done, events, args.timeout).await?
    };
    if app.out.json {
        app.out.value(&serde_json::json!({ "plan": done, "tasks": tasks }))?;
    }
    Ok(0)
}

/// A plan is the data of a dry run.
fn show_plan(app: &App, planned: &StackPlan, stack: &str) -> Result<(), Failure> {
    app.out.show(planned, || plan::render(planned, stack, app.out.colour))
}

/// Shows lines of tasks: bars on a terminal, plain lines elsewhere.
struct Display<'a> {
    app: &'a App,
    bars: Option<MultiProgress>,
    by_name: BTreeMap<String, ProgressBar>,
}

impl<'a> Display<'a> {
    fn new(app: &'a App) -> Self {
        Self { app, bars: app.out.live.then(MultiProgress::new), by_name: BTreeMap::new() }
    }

    fn line(&mut self, line: &Line) {
        let Some(bars) = &self.bars else {
            self.app.out.note(&format!("{}  {}", line.name, line.text));
            return;
        };
        let bar = self.by_name.entry(line.name.clone()).or_insert_with(|| {
            let style = ProgressStyle::with_template("{spinner} {prefix}  {wide_msg}").expect("a fixed template");
            let bar = bars.add(ProgressBar::new_spinner().with_style(style).with_prefix(line.name.clone()));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        bar.set_message(line.text.clone());
        if line.settled {
            bar.disable_steady_tick();
            bar.tick();
        } else {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
    }

    fn end(&mut self) {
        for bar in self.by_name.values() {
            bar.abandon();
        }
    }
}

/// Waits until a stack is there; gives back its tasks.
async fn wait_up(
    app: &App,
    client: &Client,
    stack: &StackSpec,
    done: &StackPlan,
    events: EventStream,
    limit: Duration,
) -> Result<Vec<Task>, Failure> {
    let deadline = Instant::now() + limit;
    let services = client.services(Some(&stack.name)).await?;
    let mut progress = Progress::new(&stack.name, services, done, node_names(client).await?);
    let mut display = Display::new(app);
    let waited = timeout_at(deadline, watch_up(client, &stack.name, events, &mut progress, &mut display)).await;
    display.end();
    let why = match waited {
        Ok(Ok(Outcome::Failed(slots))) => format!("stack {} did not come up: {} failed", stack.name, slots.join(", ")),
        Ok(Ok(_)) => return Ok(progress.tasks().into_iter().cloned().collect()),
        Ok(Err(e)) => return Err(e.into()),
        Err(_) => format!("stack {} did not come up within {} s", stack.name, limit.as_secs()),
    };
    Err(not_up(client, &stack.name, &why, &progress).await)
}

/// Feeds the state machine until it has an outcome.
async fn watch_up(
    client: &Client,
    stack: &str,
    events: EventStream,
    progress: &mut Progress,
    display: &mut Display<'_>,
) -> Result<Outcome, ClientError> {
    let filter = TaskFilter { stack: Some(stack.to_owned()), all: true, ..Default::default() };
    let mut stream = Some(events);
    loop {
        let mut events = match stream.take() {
            Some(events) => events,
            None => reopen(client).await?,
        };
        match client.tasks(&filter).await {
            Ok(tasks) => tasks.into_iter().filter_map(|t| progress.seen(t)).for_each(|line| display.line(&line)),
            Err(e) if e.is_unreachable() => continue,
            Err(e) => return Err(e),
        }
        loop {
            match progress.outcome() {
                Outcome::Waiting => {}
                outcome => return Ok(outcome),
            }
            match events.next().await {
                Ok(Some(event)) => take_event(progress, event).iter().for_each(|line| display.line(line)),
                Ok(None) => break,
                Err(e) if e.is_unreachable() => break,
                Err(e) => return Err(e),
            }
        }
    }
}

/// Opens the event stream again; goes on trying while the master is away. The caller has the time limit.
pub(super) async fn reopen(client: &Client) -> Result<EventStream, ClientError> {
    loop {
        sleep(RECONNECT_PAUSE).await;
        match client.events(None).await {
            Err(e) if e.is_unreachable() => {}
            other => return other,
        }
    }
}

fn take_event(progress: &mut Progress, event: Event) -> Option<Line> {
    match (event.kind.as_str(), event.object) {
        ("task", None) => {
            progress.gone(&TaskId::new(event.id));
            None
        }
        // An object of a newer release that cannot be read is as good as none: the next list has it, or fails loudly.
        ("task", Some(object)) => progress.seen(serde_json::from_value(object).ok()?),
        ("node", Some(object)) => {
            let node: Node = serde_json::from_value(object).ok()?;
            progress.node(node.id, node.name);
            None
        }
        _ => None,
    }
}

/// Why a stack is not up: the tasks' own words, and for those without a node what each filter took away.
async fn not_up(client: &Client, stack: &str, why: &str, progress: &Progress) -> Failure {
    let mut text = format!("error: {why}\n");
    let mut missing = progress.missing();
    // What failed is the reason; others may still be on their way, or wait for it.
    let failed = |line: &Line| line.text.starts_with("failed") || line.text.starts_with("rejected");
    missing.sort_by_key(|(_, lines)| !lines.iter().any(failed));
    let mut exit = code::FAILED;
    let mut hint = None;
    for (service, lines) in missing.iter().take(EXPLAINED_MAX) {
        if lines.is_empty() {
            text.push_str(&format!("  {}  has no task\n", short_name(service, stack)));
        }
        for line in lines {
            text.push_str(&format!("  {}  {}\n", line.name, line.text));
        }
        let unplaced =
            lines.is_empty() || lines.iter().any(|l| l.text.starts_with("pending") || l.text.starts_with("new"));
        if unplaced && let Ok(explanation) = client.explain(service, &skein_api::ExplainQuery::default()).await {
            // One that waits for another service was not looked at by any filter.
            if explanation.fitting == 0 && !explanation.filters.is_empty() {
                exit = code::NO_NODE_FITS;
            }
            for line in explained(&explanation).lines() {
                text.push_str(&format!("    {line}\n"));
            }
            hint.get_or_insert_with(|| format!("skein explain {service}"));
        } else {
            let name = lines.first().map(|l| format!("{stack}_{}", l.name));
            hint.get_or_insert_with(|| format!("skein logs {}", name.unwrap_or_else(|| service.clone())));
        }
    }
    if let Some(more) = missing.len().checked_sub(EXPLAINED_MAX).filter(|n| *n > 0) {
        text.push_str(&format!("  and {more} more services\n"));
    }
    let hint = hint.unwrap_or_else(|| format!("skein ps --all --stack {stack}"));
    text.push_str(&format!("hint: {hint}\n"));
    Failure { code: exit, text }
}

/// `skein down`.
pub(super) async fn down(app: &App, args: DownArgs) -> Result<u8, Failure> {
    let name = match &args.compose.project_name {
        Some(name) if args.compose.files.is_empty() => name.clone(),
        _ => with_options(app, &args.compose, false, compose::stack_name)?,
    };
    let client = app.client("skein down")?;
    let planned = client.stack_remove(&name, args.volumes, true).await?;
    if args.dry_run {
        show_plan(app, &planned, &name)?;
        return Ok(0);
    }
    app.out.note(&plan::render(&planned, &name, app.out.live && app.out.colour));
    if !plan::is_empty(&planned) && !args.yes && app.out.ask && !app.out.confirm("go ahead?") {
        return Err(Failure::new(code::FAILED, "nothing was changed", None));
    }
    let events = client.events(None).await?;
    let filter = TaskFilter { stack: Some(name.clone()), ..Default::default() };
    let before: Vec<Task> = client.tasks(&filter).await?;
    let services: Vec<Service> = client.services(Some(&name)).await?;
    let done = client.stack_remove(&name, args.volumes, false).await?;
    if !args.detach {
        let mut display = Display::new(app);
        let deadline = Instant::now() + args.timeout;
        let waited = timeout_at(deadline, watch_down(&client, &name, events, before, &mut display)).await;
        display.end();
        match waited {
            Ok(result) => result?,
            Err(_) => {
                let message = format!("stack {name} is not gone after {} s", args.timeout.as_secs());
                return Err(Failure::new(code::FAILED, message, Some(&format!("skein ps --all --stack {name}"))));
            }
        }
    }
    if app.out.json {
        app.out.value(&serde_json::json!({ "plan": done }))?;
    } else {
        app.out.note(&format!("stack {name} is removed ({} services)", services.len()));
    }
    Ok(0)
}

/// Waits until none of these tasks has a container any more.
async fn watch_down(
    client: &Client,
    stack: &str,
    events: EventStream,
    before: Vec<Task>,
    display: &mut Display<'_>,
) -> Result<(), ClientError> {
    let live = |t: &Task| !t.status.state.is_terminal() && t.status.state > TaskState::Pending;
    let names: BTreeMap<TaskId, String> = before.iter().map(|t| (t.id.clone(), t.name.clone())).collect();
    let mut left: BTreeSet<TaskId> = before.iter().filter(|t| live(t)).map(|t| t.id.clone()).collect();
    let filter = TaskFilter { stack: Some(stack.to_owned()), all: true, ..Default::default() };
    let mut gone = |left: &mut BTreeSet<TaskId>, id: &TaskId| {
        if left.remove(id) {
            let name = names.get(id).map_or(id.as_str(), |n| short_name(n, stack)).to_owned();
            display.line(&Line { name, text: "stopped".into(), settled: true });
        }
    };
    let mut stream = Some(events);
    loop {
        let mut events = match stream.take() {
            Some(events) => events,
            None => reopen(client).await?,
        };
        match client.tasks(&filter).await {
            Ok(tasks) => {
                let now: BTreeSet<TaskId> = tasks.into_iter().filter(live).map(|t| t.id).collect();
                for id in left.clone().difference(&now) {
                    gone(&mut left, id);
                }
            }
            Err(e) if e.is_unreachable() => continue,
            Err(e) => return Err(e),
        }
        while !left.is_empty() {
            match events.next().await {
                Ok(Some(event)) if event.kind == "task" => {
                    let task = event.object.and_then(|o| serde_json::from_value::<Task>(o).ok());
                    if task.is_none_or(|t| !live(&t)) {
                        gone(&mut left, &TaskId::new(event.id));
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(e) if e.is_unreachable() => break,
                Err(e) => return Err(e),
            }
        }
        if left.is_empty() {
            return Ok(());
        }
    }
}
