//! Questions to a copy: the answer is what then happens, and asking changes nothing.

use std::collections::BTreeMap;

use skein_api::{Availability, Task, WhatIf, WhatIfAnswer};

use crate::harness::{Cluster, With, constraint, container, replicas, service, stack, volume};

fn ask(c: &Cluster, question: &WhatIf) -> WhatIfAnswer {
    let before = c.model().objects().len();
    let answer = c.core.clone().what_if(question).expect("an answer");
    assert_eq!(c.model().objects().len(), before);
    answer
}

/// `web.1: n1 -> n2`
fn lines(answer: &WhatIfAnswer) -> Vec<String> {
    let place = |node: &Option<String>| node.clone().unwrap_or_else(|| "-".to_owned());
    let line = |t: &skein_api::WhatIfTask| format!("{}: {} -> {} {}", t.name, place(&t.from), place(&t.to), t.message);
    answer.tasks.iter().map(|t| line(t).trim_end().to_owned()).collect()
}

/// Where each live task of some services is, by name.
fn places(c: &Cluster, services: &[&str]) -> BTreeMap<String, Option<String>> {
    let node = |t: &Task| t.node.as_ref().map(|node| c.model().nodes[node].name.clone());
    services.iter().flat_map(|service| c.live(service)).map(|t| (t.name.clone(), node(&t))).collect()
}

/// The same as an answer foretells it: what it does not name stays.
fn foretold(before: BTreeMap<String, Option<String>>, answer: &WhatIfAnswer) -> BTreeMap<String, Option<String>> {
    let mut after = before;
    for task in answer.tasks.iter().filter(|t| after.contains_key(&t.name)).cloned().collect::<Vec<_>>() {
        after.insert(task.name, task.to);
    }
    after
}

#[test]
fn a_drain_does_what_was_answered() {
    let mut c = Cluster::with_nodes(4);
    c.up(vec![service("web").with(|s| replicas(s, 6)), service("db").with(|s| constraint(s, "node==n1"))]);
    let answer = ask(&c, &WhatIf::Drain(vec!["n1".into()]));
    assert_eq!(answer.tasks.iter().filter(|t| t.name.starts_with("s_web.")).count(), 2);
    assert!(lines(&answer).iter().any(|l| l.starts_with("s_db.1: n1 -> - no node fits")), "{:?}", lines(&answer));
    let node = answer.nodes.iter().find(|n| n.name == "n1").expect("it changes");
    assert_eq!((node.tasks_before, node.tasks_after), (3, 0));
    let expected = foretold(places(&c, &["web", "db"]), &answer);
    c.drain("n1", Availability::Drain);
    c.pass(60_000);
    assert_eq!(places(&c, &["web", "db"]), expected);
    assert!(ask(&c, &WhatIf::Drain(vec!["n1".into()])).tasks.is_empty(), "it is drained already");
}

#[test]
fn lost_hosts_cost_what_was_answered() {
    let mut c = Cluster::with_nodes(3);
    c.up(vec![service("web").with(|s| replicas(s, 3)), service("db").with(|s| volume(s, "data"))]);
    c.run(container("one").with(|t| t.spec.placement.constraints.push("node==n2".into())));
    let answer = ask(&c, &WhatIf::NodeDown(vec!["n2".into()]));
    assert!(lines(&answer).contains(&"one: n2 -> - lost with its host: container tasks are not replaced".to_owned()));
    let expected = foretold(places(&c, &["web", "db"]), &answer);
    c.lose("n2");
    c.rest();
    assert_eq!(places(&c, &["web", "db"]), expected);
    let all = ask(&c, &WhatIf::NodeDown(vec!["n1".into(), "n3".into()]));
    assert!(all.tasks.iter().filter(|t| t.name.starts_with("s_web.")).all(|t| t.to.is_none()), "{:?}", lines(&all));
}

#[test]
fn new_hosts_and_stacks() {
    let mut c = Cluster::with_nodes(1);
    c.up(vec![
        service("web").with(|s| (replicas(s, 3), s.task.placement.max_replicas_per_node = 1).1),
        service("log").with(|s| s.mode = skein_api::ServiceMode::Global),
    ]);
    let answer = ask(&c, &WhatIf::AddNode { like: "n1".into(), count: 2 });
    assert_eq!(answer.summary, "4 tasks would start");
    let names: Vec<_> = answer.nodes.iter().map(|n| (n.name.as_str(), n.tasks_after)).collect();
    assert_eq!(names, [("n1-new-1", 2), ("n1-new-2", 2)]);
    let apply = skein_api::StackApply {
        stack: stack(vec![service("web").with(|s| replicas(s, 1)), service("new").with(|s| replicas(s, 2))]),
        remove_orphans: true,
        dry_run: true,
    };
    let answer = ask(&c, &WhatIf::Up(Box::new(apply)));
    assert!(lines(&answer).contains(&"s_log.n1: n1 -> - removed".to_owned()), "{:?}", lines(&answer));
    assert!(lines(&answer).contains(&"s_new.1: - -> n1".to_owned()), "{:?}", lines(&answer));
    assert!(answer.plan.is_some_and(|plan| !plan.items.is_empty()));
    let refuse = |question, code: &str| {
        let error = c.core.clone().what_if(&question).expect_err(code);
        assert_eq!(error.code, code, "{error}");
    };
    refuse(WhatIf::Drain(vec!["n9".into()]), "not_found");
    refuse(WhatIf::AddNode { like: "n1".into(), count: 0 }, "bad_request");
    let bad = skein_api::StackApply { stack: stack(vec![service("x"), service("x")]), ..Default::default() };
    refuse(WhatIf::Up(Box::new(bad)), "bad_request");
}
