//! Stacks: plans, dry runs, orphans, removal.

use master_core::{Command, Reply};
use skein_api::{PlanAction, StackApply};

use crate::harness::{Cluster, With, constraint, container, lines, network, replicas, service, stack, volume};

fn web() -> skein_api::StackSpec {
    stack(vec![
        service("web").with(|s| {
            network(s, "s_net");
            replicas(s, 2);
        }),
        service("db").with(|s| {
            network(s, "s_net");
            volume(s, "s_data");
        }),
    ])
}

#[test]
fn a_dry_run_plans_and_changes_nothing() {
    let mut c = Cluster::with_nodes(2);
    let before = c.model().clone();
    let apply = StackApply { stack: web(), dry_run: true, ..StackApply::default() };
    let Reply::Plan(plan) = c.ok(Command::StackApply(Box::new(apply))) else { panic!("a plan") };
    let wanted = ["network s_net create", "service s_db create", "service s_web create", "volume s_data create"];
    assert_eq!(lines(&plan), wanted);
    assert_eq!(*c.model(), before);
    c.apply(web());
    c.rest();
    let before = c.model().clone();
    let down = Command::StackRemove { name: "s".into(), volumes: true, dry_run: true };
    let Reply::Plan(plan) = c.ok(down) else { panic!("a plan") };
    assert!(plan.items.iter().all(|i| i.action == PlanAction::Remove), "{plan:?}");
    assert_eq!(*c.model(), before);
}

#[test]
fn applying_twice_keeps_everything() {
    let mut c = Cluster::with_nodes(2);
    c.apply(web());
    c.rest();
    let before = c.model().clone();
    let plan = c.apply(web());
    assert!(plan.items.iter().all(|i| i.action == PlanAction::Keep), "{plan:?}");
    assert_eq!(plan.items.len(), 4);
    assert_eq!(*c.model(), before);
}

#[test]
fn orphans_are_named_and_removed_on_request() {
    let mut c = Cluster::with_nodes(2);
    c.apply(web());
    c.rest();
    let rest = || stack(vec![service("web").with(|s| replicas(s, 2))]);
    let plan = c.apply(rest());
    let wanted = ["network s_net orphan", "service s_db orphan", "service s_web recreate"];
    assert_eq!(lines(&plan), wanted);
    c.rest();
    assert_eq!(c.live("db").len(), 1);
    let apply = StackApply { stack: rest(), remove_orphans: true, dry_run: false };
    let Reply::Plan(plan) = c.ok(Command::StackApply(Box::new(apply))) else { panic!("a plan") };
    assert_eq!(lines(&plan), ["network s_net remove", "service s_db remove", "service s_web keep"]);
    c.rest();
    assert!(c.model().service_named("s_db").is_none());
    // The network goes with the last task that names it, which is an ended one of `web` kept for its logs.
    c.end("s_web.1", 1);
    c.end("s_web.2", 1);
    c.pass(10_000);
    assert!(c.model().networks.is_empty());
}

#[test]
fn down_removes_all_but_data() {
    let mut c = Cluster::with_nodes(2);
    c.apply(web());
    c.rest();
    let plan = c.down(false);
    let wanted = ["network s_net remove", "service s_db remove", "service s_web remove", "volume s_data keep"];
    assert_eq!(lines(&plan), wanted);
    c.rest();
    assert!(c.model().tasks.is_empty() && c.model().networks.is_empty() && c.model().blocks.is_empty());
    let plan = c.down(true);
    assert_eq!(lines(&plan), ["volume s_data remove"]);
    let warning = &plan.warnings[0];
    assert!(warning.starts_with("volume s_data is forgotten, its data stays on node n"), "{warning}");
    assert!(warning.ends_with("there: docker volume rm s_data"), "{warning}");
    assert!(c.model().volumes.is_empty());
    c.refused(Command::StackRemove { name: "s".into(), volumes: true, dry_run: false }, "not_found");
}

#[test]
fn volumes_and_networks_that_others_use_stay() {
    let mut c = Cluster::with_nodes(1);
    c.apply(web());
    c.rest();
    c.run(container("tool").with(|t| {
        let mut own = service("x");
        network(&mut own, "s_net");
        volume(&mut own, "s_data");
        (t.spec.networks, t.spec.container.mounts) = (own.task.networks, own.task.container.mounts);
    }));
    c.ok(Command::ContainerStop("tool".into()));
    let plan = c.down(true);
    let wanted = ["network s_net keep", "service s_db remove", "service s_web remove", "volume s_data keep"];
    assert_eq!(lines(&plan), wanted);
    assert_eq!(
        plan.warnings,
        ["network s_net stays: container task tool uses it", "volume s_data stays: container task tool uses it"]
    );
    c.rest();
    assert_eq!((c.model().networks.len(), c.model().volumes.len()), (1, 1));
}

#[test]
fn an_unchanged_service_is_kept_with_a_warning_when_no_node_fits_any_more() {
    let mut c = Cluster::with_nodes(1);
    c.label("n1", "disk", "ssd");
    let spec = || service("web").with(|s| constraint(s, "node.labels.disk==ssd"));
    c.up(vec![spec()]);
    c.label("n1", "disk", "hdd");
    let plan = c.up(vec![spec(), service("new")]);
    assert_eq!(lines(&plan), ["service s_new create", "service s_web keep"]);
    assert_eq!(plan.warnings, ["s_web: no node fits: 1 node; constraint node.labels.disk==ssd took 1"]);
}

#[test]
fn changed_networks_and_unused_volumes_are_not_ignored() {
    let mut c = Cluster::with_nodes(1);
    let mut spec = web();
    c.apply(spec.clone());
    spec.networks[0].attachable = true;
    spec.volumes.push("s_unused".into());
    let plan = c.apply(spec.clone());
    assert!(lines(&plan).contains(&"network s_net update".to_owned()), "{plan:?}");
    assert_eq!(plan.warnings, ["volume s_unused is not made: no service mounts it"]);
    assert!(c.model().network("s_net").unwrap().spec.attachable);
    spec.networks[0].internal = true;
    c.refused(Command::StackApply(Box::new(StackApply { stack: spec, ..StackApply::default() })), "in_use");
}
