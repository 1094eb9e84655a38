//! Why a task is where it is, through the whole core.

use skein_api::{DependencyCondition, ExplainQuery, Explanation, Resources};

use crate::harness::{Cluster, With, constraint, container, needs, port, replicas, service};

/// Asks, and nothing is changed by that.
fn explain(c: &Cluster, name: &str, query: &ExplainQuery) -> Explanation {
    let mut core = c.core.clone();
    let explanation = core.explain(name, query).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(core.check(), Vec::<String>::new(), "the index is what follows from the tasks");
    assert_eq!(core.model(), c.model());
    core.settle(c.now, 1);
    assert!(core.take_staged().is_empty() && core.placements_tried() == c.core.placements_tried(), "nobody was woken");
    explanation
}

fn refused(c: &Cluster, name: &str, node: Option<&str>) -> String {
    let query = ExplainQuery { node: node.map(str::to_owned), ..ExplainQuery::default() };
    let error = c.core.clone().explain(name, &query).expect_err("it is not there");
    assert_eq!(error.code, "not_found");
    error.message
}

/// `n1: reason; reason`, `n2: fits`
fn per_node(explanation: &Explanation) -> Vec<String> {
    let line = |n: &skein_api::NodeExplanation| match n.reasons.is_empty() {
        true => format!("{}: fits", n.node),
        false => format!("{}: {}", n.node, n.reasons.join("; ")),
    };
    explanation.per_node.iter().map(line).collect()
}

const ALL: ExplainQuery = ExplainQuery { nodes: true, node: None };

#[test]
fn who_has_the_port_and_what_to_do() {
    let mut c = Cluster::with_nodes(2);
    let web = service("web").with(|s| (replicas(s, 2), s.task.ports = vec![port(8080)]).1);
    let other = service("other").with(|s| (s.task.ports = vec![port(8080)], constraint(s, "node==n2")).1);
    c.up(vec![web]);
    c.up(vec![other]);
    let why = explain(&c, "s_other", &ALL);
    assert_eq!(why.summary, "no node fits: 2 nodes; constraint node==n2 took 1; host port 8080/tcp took 1");
    let at = |node: &str| c.live("web").into_iter().find(|t| t.node == Some(c.node(node))).expect("one each").name;
    assert_eq!(
        per_node(&why),
        [
            format!("n1: constraint node==n2; host port 8080/tcp: taken by {}", at("n1")),
            format!("n2: host port 8080/tcp: taken by {}", at("n2")),
        ]
    );
    assert_eq!(why.suggestions, [format!("free host port 8080/tcp on n2, which is taken by {}", at("n2"))]);
    assert!(why.filters.iter().all(|f| f.filter != "container slots"), "no node counts them: {:?}", why.filters);
    // What is proposed is enough.
    c.ok(master_core::Command::ServiceRemove("s_web".into()));
    c.rest();
    assert_eq!(c.show("other"), ["other.1 running n2"]);
    // Its own place is not taken from it.
    let why = explain(&c, "s_other.1", &ALL);
    assert_eq!(per_node(&why), ["n1: constraint node==n2", "n2: fits"]);
    assert_eq!(why.summary, "runs on n2; now: 1 of 2 nodes fit; the next task goes to n2 (spread)");
    assert!(why.suggestions.is_empty());
}

#[test]
fn what_is_proposed_is_enough() {
    let mut c = Cluster::with_nodes(1);
    let half = Resources { nano_cpus: 2_000_000_000, mem_bytes: 2 << 30 };
    c.run(container("one").with(|t| t.spec.resources.reservations = half));
    let takes = |nano_cpus, mem_bytes| {
        service("big").with(|s| s.task.resources.reservations = Resources { nano_cpus, mem_bytes })
    };
    c.up(vec![takes(3_000_000_000, 3 << 30)]);
    let words = "ask for 2 CPUs and 2 GiB of memory instead of 3 CPUs and 3 GiB of memory, or free 1 CPU and 1 GiB of \
                 memory on n1";
    assert_eq!(explain(&c, "s_big", &ALL).suggestions, [words]);
    c.up(vec![takes(2_000_000_000, 2 << 30)]);
    assert_eq!(c.show("big"), ["big.1 running n1"]);
}

#[test]
fn what_is_not_there_is_said_first() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![
        service("db"),
        service("web").with(|s| needs(s, "db", DependencyCondition::ServiceCompletedSuccessfully)),
    ]);
    let waits = explain(&c, "s_web", &ALL).summary;
    assert!(waits.contains("s_db"), "it waits: {waits}");
    assert_eq!(refused(&c, "s_web", Some("n3")), "no node \"n3\"; did you mean \"n1\"?");
    assert_eq!(refused(&c, "s_web", Some("elsewhere")), "no node \"elsewhere\"");
    assert_eq!(refused(&c, "s_wbe", None), "no service or task \"s_wbe\"; did you mean \"s_web\"?");
    assert_eq!(refused(&c, "nothing", None), "no service or task \"nothing\"");
}
