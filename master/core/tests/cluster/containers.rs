//! Container tasks: start, stop, remove, their runs, and what they hold while they are stopped.

use master_core::Command;
use skein_api::{Resources, RestartCondition, TaskState, TaskStatus};

use crate::harness::{Cluster, Local, With, container, network, port, service};

fn remove(task: &str, force: bool) -> Command {
    Command::ContainerRemove { task: task.into(), force }
}

#[test]
fn a_life_of_start_stop_start_and_remove() {
    let mut c = Cluster::with_nodes(2);
    let id = c.run(container("one"));
    let state = |c: &Cluster| (c.task("one").status.state, c.task("one").run);
    assert_eq!(state(&c), (TaskState::Running, 1));
    let node = c.task("one").node;
    c.refused(remove("one", false), "running");
    c.ok(Command::ContainerStop("one".into()));
    c.rest();
    assert_eq!(state(&c), (TaskState::Shutdown, 1));
    c.ok(Command::ContainerStop("one".into()));
    c.ok(Command::ContainerStart("one".into()));
    assert_eq!(state(&c), (TaskState::Assigned, 2));
    c.rest();
    assert_eq!(state(&c), (TaskState::Running, 2));
    assert_eq!((c.task("one").node, c.task("one").id), (node, id), "it keeps its host and its id");
    c.end("one", 0);
    assert_eq!(state(&c), (TaskState::Complete, 2));
    c.pass(10_000);
    assert_eq!(state(&c), (TaskState::Complete, 2), "nobody but its agent restarts it");
    c.ok(remove("one", false));
    c.rest();
    assert!(c.model().tasks.is_empty());
}

#[test]
fn the_agents_own_restarts_count_runs() {
    let mut c = Cluster::with_nodes(1);
    let id = c.run(container("one").with(|t| t.spec.restart.condition = RestartCondition::Any));
    let node = c.node("n1");
    c.end("one", 0);
    let late = TaskStatus { state: TaskState::Failed, ..TaskStatus::default() };
    let report = skein_api::TaskReport { task: id.clone(), run: 1, status: late };
    c.ok(Command::Reports { node: node.clone(), reports: vec![report] });
    assert_eq!(c.task("one").status.state, TaskState::Complete, "a run ends once");
    let local = |run, state| Local { run, status: TaskStatus { state, ..TaskStatus::default() } };
    // Its agent started it twice; the report of run 2 was overtaken by run 3's.
    c.agents.get_mut(&node).unwrap().put(&id, local(3, TaskState::Running));
    c.deliver(&node);
    assert_eq!((c.task("one").run, c.task("one").status.state), (3, TaskState::Running));
    // A late word of an earlier run, and one of a state that was passed, change nothing.
    for (run, state) in [(2, TaskState::Failed), (3, TaskState::Starting)] {
        let report = skein_api::TaskReport { task: id.clone(), run, status: local(run, state).status };
        c.ok(Command::Reports { node: node.clone(), reports: vec![report] });
        assert_eq!((c.task("one").run, c.task("one").status.state), (3, TaskState::Running));
    }
    c.ok(Command::ContainerStop("one".into()));
    c.rest();
    c.ok(Command::ContainerStart("one".into()));
    c.rest();
    assert_eq!((c.task("one").run, c.task("one").status.state), (4, TaskState::Running));
}

#[test]
fn a_stopped_container_keeps_its_name_but_not_its_port() {
    let mut c = Cluster::with_nodes(1);
    let web = |name: &str| container(name).with(|t| t.spec.ports = vec![port(80)]);
    c.run(web("a"));
    c.run(web("b"));
    assert_eq!(c.task("b").status.message, "no node fits: 1 node; host port 80/tcp took 1");
    c.ok(Command::ContainerStop("a".into()));
    c.rest();
    assert_eq!(c.task("b").status.state, TaskState::Running);
    c.refused(Command::ContainerCreate(Box::new(container("a"))), "name_taken");
    let error = c.refused(Command::ContainerStart("a".into()), "no_node_fits");
    assert_eq!(error.message, "container task a does not fit on node n1 now: host port 80/tcp");
    c.ok(remove("b", true));
    c.rest();
    c.ok(Command::ContainerStart("a".into()));
    c.rest();
    assert_eq!(c.task("a").status.state, TaskState::Running);
}

#[test]
fn one_that_its_agent_starts_again_holds_its_place() {
    let mut c = Cluster::with_nodes(1);
    let all = Resources { nano_cpus: 0, mem_bytes: 4 << 30 };
    for (name, condition, code, free) in [
        ("a", RestartCondition::Any, 0, false),
        ("b", RestartCondition::OnFailure, 1, false),
        ("c", RestartCondition::OnFailure, 0, true),
        ("d", RestartCondition::None, 1, true),
    ] {
        c.run(container(name).with(|t| {
            t.spec.restart.condition = condition;
            t.spec.resources.reservations = all;
        }));
        c.end(name, code);
        c.run(container("other").with(|t| t.spec.resources.reservations = all));
        assert_eq!(c.task("other").node.is_some(), free, "{name}");
        for task in ["other", name] {
            c.ok(remove(task, true));
        }
        c.rest();
    }
}

#[test]
fn a_pending_one_can_be_stopped_started_and_removed() {
    let mut c = Cluster::new();
    c.run(container("one"));
    assert_eq!(c.task("one").status.message, "no node fits: the cluster has no nodes");
    c.ok(Command::ContainerStop("one".into()));
    assert_eq!(c.task("one").status.state, TaskState::Shutdown);
    c.ok(Command::ContainerStart("one".into()));
    assert_eq!(c.task("one").status.state, TaskState::Pending);
    c.ok(remove("one", false));
    assert!(c.model().tasks.is_empty());
}

#[test]
fn one_on_a_lost_node_stays_as_it_was() {
    let mut c = Cluster::with_nodes(1);
    c.run(container("one"));
    c.lose("n1");
    assert_eq!(c.task("one").status.state, TaskState::Running, "what the agent last said");
    c.ok(Command::ContainerStop("one".into()));
    c.heal("n1");
    c.rest();
    assert_eq!(c.task("one").status.state, TaskState::Shutdown);
    c.lose("n1");
    let error = c.refused(Command::ContainerStart("one".into()), "node_unreachable");
    assert_eq!(error.message, "container task one is on node n1, which is lost");
    c.refused(Command::NodeRemove { node: "n1".into(), force: false }, "in_use");
    c.ok(Command::NodeRemove { node: "n1".into(), force: true });
    assert!(c.model().tasks.is_empty());
}

#[test]
fn reports_are_believed_only_where_an_agent_can_know() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![service("web").with(|s| network(s, "s_net"))]);
    let before = c.live("web")[0].clone();
    let (own, other) = (before.node.clone().unwrap(), c.node(if c.nodes_of("web") == ["n1"] { "n2" } else { "n1" }));
    let mut said = |node: &skein_api::NodeId, status: TaskStatus| {
        let report = skein_api::TaskReport { task: before.id.clone(), run: 0, status };
        c.ok(Command::Reports { node: node.clone(), reports: vec![report] });
        c.model().tasks[&before.id].status.clone()
    };
    let now = before.status.clone();
    assert_eq!(said(&other, TaskStatus { state: TaskState::Failed, ..now.clone() }), now, "another node's task");
    for state in [TaskState::New, TaskState::Assigned, TaskState::Ready, TaskState::Orphaned, TaskState::Remove] {
        assert_eq!(said(&own, TaskStatus { state, ..now.clone() }), now, "{state:?}");
    }
    let mut elsewhere = now.clone();
    elsewhere.addresses[0].v4 = Some("10.64.15.9".parse().unwrap());
    assert_eq!(said(&own, elsewhere).addresses, [], "an address outside the node's blocks");
    assert_eq!(said(&own, now.clone()), now);
}

#[test]
fn a_stop_and_a_start_before_the_agent_hears_of_either_are_one_restart() {
    let mut c = Cluster::with_nodes(1);
    c.run(container("one"));
    c.cut("n1");
    c.ok(Command::ContainerStop("one".into()));
    c.ok(Command::ContainerStart("one".into()));
    c.heal("n1");
    c.rest();
    assert_eq!((c.task("one").run, c.task("one").status.state), (2, TaskState::Running));
}

#[test]
fn a_start_that_the_agent_never_heard_of_can_be_taken_back() {
    let mut c = Cluster::with_nodes(1);
    let restarted_unheard = |c: &mut Cluster| {
        c.run(container("one"));
        c.end("one", 1);
        c.cut("n1");
        c.ok(Command::ContainerStart("one".into()));
        assert_eq!((c.task("one").run, c.task("one").status.state), (2, TaskState::Assigned));
    };
    restarted_unheard(&mut c);
    c.ok(Command::ContainerStop("one".into()));
    c.heal("n1");
    c.rest();
    assert_eq!(c.task("one").status.state, TaskState::Shutdown);
    c.ok(Command::ContainerStart("one".into()));
    c.rest();
    assert_eq!((c.task("one").run, c.task("one").status.state), (3, TaskState::Running));
    c.ok(remove("one", true));
    c.rest();
    restarted_unheard(&mut c);
    c.ok(remove("one", true));
    c.heal("n1");
    c.rest();
    assert!(c.model().tasks.is_empty(), "the removal is of the whole task, whatever its run");
}
