//! The executor against an engine of a few canned answers, some of which never come.

use std::{future::pending, net::IpAddr};

use axum::{Json, Router, http::Uri};
use serde_json::json;
use skein_api::{NetworkId, ServiceId, TaskAddress, TaskAssignment, TaskState};
use tokio::{net::UnixListener, time::timeout};

use super::*;
use crate::{
    engine::{EngineConfig, EngineNetworkSpec},
    ledger::AssignmentChange,
};

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

struct NoNetworks;

impl NetworkSide for NoNetworks {
    async fn engine_network(&self, _network: &NetworkId) -> Option<EngineNetworkSpec> {
        None
    }
    async fn reserve(&self, _task: &TaskAssignment, _network: &NetworkId) -> Result<TaskAddress, String> {
        Err("there are none".into())
    }
    async fn release(&self, _task: &TaskId) {}
    fn dns_servers(&self, _networks: &[NetworkId]) -> Vec<IpAddr> {
        Vec::new()
    }
    async fn ready(&self, _task: &TaskId) -> Result<(), String> {
        Ok(())
    }
}

fn labels(task: &str) -> Value {
    json!({"io.skein.cluster": "c1", "io.skein.task": task, "io.skein.service": "s1", "io.skein.run": "1"})
}

/// Answers with or without the API's version before the path, as clients have it.
async fn answer(uri: Uri) -> Json<Value> {
    let parts: Vec<&str> = uri.path().split('/').filter(|p| !p.is_empty() && !p.starts_with("v1.")).collect();
    Json(match parts[..] {
        ["version"] => json!({"ApiVersion": "1.41", "MinAPIVersion": "1.12", "Version": "20.10"}),
        ["networks"] => json!([]),
        ["containers", "json"] => json!(["stuck", "well"].map(|id| json!({"Id": id, "Labels": labels(id)}))),
        ["containers", "well", "json"] => json!({
            "Id": "well", "Created": "2024-01-01T00:00:00Z", "Config": {"Labels": labels("well"), "Image": "app"},
            "State": {"Status": "running", "StartedAt": "2024-01-01T00:00:01Z"},
        }),
        // The stuck container, and events.
        _ => pending().await,
    })
}

/// An engine with the containers `stuck`, over which it hangs, and `well`.
fn engine(dir: &std::path::Path) -> Engine {
    let socket = dir.join("engine.sock");
    let listener = UnixListener::bind(&socket).expect("a new directory");
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
    Engine::new(EngineConfig::new(socket, "c1", "n1"))
}

fn assigned(ledger: &Ledger, tasks: &[&str]) {
    let task = |id: &&str| {
        Assignment::Task(Box::new(TaskAssignment {
            id: TaskId::new(*id),
            name: (*id).to_owned(),
            service: Some(ServiceId::new("s1")),
            run: 1,
            desired_state: TaskState::Running,
            ..Default::default()
        }))
    };
    let upserts = tasks.iter().map(task).collect();
    let change =
        AssignmentChange { chain: "a".into(), full: true, base: 0, generation: 1, upserts, removes: Vec::new() };
    ledger.apply(change).expect("a disk");
}

#[tokio::test]
async fn one_container_that_hangs_the_engine_holds_up_nobody() {
    let dir = tempfile::tempdir().expect("a directory");
    let ledger = Ledger::open(&dir.path().join("ledger")).expect("a new ledger");
    assigned(&ledger, &["stuck", "well"]);
    let engine = engine(dir.path());
    let (mut executor, handle) = Executor::new(engine, ledger, Arc::new(NoNetworks), Settings::default());
    executor.looks = Looks::with_limit(Duration::from_millis(100));
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(executor.run(shutdown.clone()));

    let mut reported = handle.reports().changed();
    let seen = async {
        loop {
            let pending = handle.reports().pending();
            if pending.iter().any(|r| r.task.as_str() == "well" && r.status.state == TaskState::Running) {
                return pending;
            }
            reported.changed().await.expect("it runs");
        }
    };
    let pending = timeout(PATIENCE, seen).await;
    let pending = pending.unwrap_or_else(|_| panic!("the other container is not seen: {:?}", handle.status().borrow()));
    let mut status = handle.status();
    let told = status.wait_for(|s| s.failures.iter().any(|f| f.contains("hangs over container stuck")));
    timeout(PATIENCE, told).await.expect("it is said").expect("it runs");
    // Nobody knows what the other one does: it is neither called lost nor made anew.
    assert!(pending.iter().all(|r| r.task.as_str() == "well"), "{pending:?}");
    assert_eq!(handle.status().borrow().actions, 0);
    shutdown.cancel();
    timeout(PATIENCE, running).await.expect("it ends").expect("without a panic");
}

#[tokio::test]
async fn an_agent_that_looks_can_be_ended() {
    let dir = tempfile::tempdir().expect("a directory");
    let ledger = Ledger::open(&dir.path().join("ledger")).expect("a new ledger");
    let (mut executor, _handle) = Executor::new(engine(dir.path()), ledger, Arc::new(NoNetworks), Settings::default());
    executor.looks = Looks::with_limit(PATIENCE * 10);
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(executor.run(shutdown.clone()));
    shutdown.cancel();
    timeout(PATIENCE, running).await.expect("it does not wait for the engine").expect("without a panic");
}

#[tokio::test]
async fn an_unreadable_memory_of_a_task_is_said_and_takes_the_safe_side() {
    let dir = tempfile::tempdir().expect("a directory");
    let ledger = Ledger::open(&dir.path().join("ledger")).expect("a new ledger");
    let bad = json!({"run": 7, "assigned_run": 3, "status": "what?"});
    ledger.put_locals(BTreeMap::from([("executor/task/t1".to_owned(), Some(bad))])).expect("a disk");
    let (executor, _handle) = Executor::new(engine(dir.path()), ledger, Arc::new(NoNetworks), Settings::default());
    let local = &executor.memory.tasks[&TaskId::new("t1")];
    assert_eq!((local.run, local.assigned_run, local.reserved), (7, 3, true));
    assert!(executor.unreadable[0].contains("executor/task/t1"));
}
