//! Replies of an engine that lies, or that is newer or older than any we know.

use std::collections::BTreeMap;

use agent_core::{Desired, EngineNetwork, Memory, Observed, Settings, reconcile};
use bollard::models::{ContainerInspectResponse, CreateImageInfo, SystemInfo};
use serde::Deserialize;
use skein_api::{Assignment, NetworkId, TaskAssignment, TaskId, TaskState, UnixMillis};
use skein_fuzz::{Form, Verdict};

use super::{containers, images::Progress, read_info};

/// One reply of each kind that is looked at field by field.
#[derive(Deserialize)]
struct Replies {
    inspect: ContainerInspectResponse,
    info: SystemInfo,
    pull: Vec<CreateImageInfo>,
}

/// What is wanted on this host: a task that the sample's container is of.
fn wanted() -> BTreeMap<String, Assignment> {
    let task = TaskAssignment { id: TaskId::new("t1"), desired_state: TaskState::Running, ..Default::default() };
    let task = Assignment::Task(Box::new(task));
    BTreeMap::from([(task.key(), task)])
}

/// From the engine's JSON, by way of the client's types, to what is seen and to the plan that follows from it.
#[test]
fn engine_replies() {
    let assignments = wanted();
    let network = EngineNetwork { engine_id: "e1".into(), name: "shop".into() };
    let networks = BTreeMap::from([(NetworkId::new("net1"), network)]);
    // The client's types are wide: `{}` of a port binding or a layer becomes some hundred bytes.
    skein_fuzz::target!("engine_replies").inputs(1_500).memory(512, 256 << 10).run_mutants(Form::Json, |input| {
        let Ok(replies) = serde_json::from_slice::<Replies>(input) else { return Verdict::Refused };
        read_info(replies.info);
        let mut progress = Progress::default();
        for step in replies.pull {
            let detail = step.progress_detail.unwrap_or_default();
            progress.take(step.id, detail.current, detail.total);
        }
        let Some(seen) = containers::read(replies.inspect, "c", &networks) else { return Verdict::Refused };
        let mut observed = Observed { networks: networks.clone(), ..Observed::default() };
        observed.containers.insert(seen.container.id.clone(), seen.container);
        let (memory, settings) = (Memory::default(), Settings::default());
        for confirmed in [false, true] {
            let desired = Desired { assignments: &assignments, confirmed };
            let plan = reconcile(&desired, &observed, UnixMillis(1_700_000_000_000), &memory, &settings);
            assert!(plan.reports.iter().all(|r| assignments.contains_key(&format!("task/{}", r.task))), "{plan:?}");
        }
        Verdict::Accepted
    });
}
