//! Every expression and message that docs/scheduling.md shows is one that the scheduler takes or says.

use master_core::scheduler::{EXPRESSION_CHARS_MAX, EXPRESSIONS_MAX, NodeFacts, Placed, Request, Scheduler};
use skein_api::{
    GENERIC_IDS_MAX, GENERIC_KINDS_MAX, LABEL_KEY_BYTES_MAX, LABEL_VALUE_BYTES_MAX, LABELS_MAX,
    NODE_LABEL_VALUE_BYTES_MAX, NodeId, PREFERENCES_MAX, Resources, Strategy, TaskId, TaskSpec,
};

const SCHEDULING: &str = include_str!("../../../docs/scheduling.md");

/// First cells of the table whose heading begins with `head`, without their back quotes.
fn first_cells(head: &str) -> Vec<String> {
    let heading = format!("| {head} |");
    let rows = SCHEDULING.lines().skip_while(|line| !line.starts_with(&heading)).skip(2);
    rows.take_while(|line| line.starts_with('|'))
        .map(|line| {
            // A table needs its bars escaped, an expression does not.
            let line = line.replace("\\|", "\u{1}");
            let cell = line.split('|').nth(1).expect("a row has cells").trim().replace('\u{1}', "|");
            cell.trim_matches('`').to_owned()
        })
        .collect()
}

fn compile(constraint: Option<&str>, affinity: Option<&str>) -> Result<Request, String> {
    let mut spec = TaskSpec::default();
    spec.placement.constraints.extend(constraint.map(str::to_owned));
    spec.placement.affinities.extend(affinity.map(str::to_owned));
    Request::compile(&spec, None, None, Strategy::Spread).map_err(|err| format!("{err}\n{}", err.caret()))
}

#[test]
fn every_expression_parses() {
    let (constraints, affinities) = (first_cells("Constraint"), first_cells("Affinity"));
    let whitelists = first_cells("Whitelist");
    let counts = (constraints.len(), affinities.len(), whitelists.len());
    assert_eq!(counts, (25, 14, 2), "a table was not found or grew");
    for text in whitelists {
        let mut spec = TaskSpec::default();
        spec.placement.whitelists.push(text);
        Request::compile(&spec, None, None, Strategy::Spread).unwrap_or_else(|err| panic!("{err}"));
    }
    for text in &constraints {
        compile(Some(text), None).unwrap_or_else(|err| panic!("{err}"));
    }
    for text in &affinities {
        compile(None, Some(text)).unwrap_or_else(|err| panic!("{err}"));
    }
}

#[test]
fn the_error_and_the_limits_are_the_real_ones() {
    let err = compile(Some("node.labels.disk=ssd"), None).unwrap_err();
    assert!(SCHEDULING.contains(&format!("```text\n{err}\n```")), "{err}");
    let limits = (EXPRESSION_CHARS_MAX, EXPRESSIONS_MAX, PREFERENCES_MAX, GENERIC_KINDS_MAX, GENERIC_IDS_MAX);
    assert_eq!(limits, (1_024, 64, 4, 16, 1_024), "docs/scheduling.md names them");
    let labels = (LABEL_KEY_BYTES_MAX, NODE_LABEL_VALUE_BYTES_MAX, LABEL_VALUE_BYTES_MAX, LABELS_MAX);
    assert_eq!(labels, (128, 512, 16_384, 256), "docs/scheduling.md names them");
    let err = compile(Some("node==/(x{1000}){1000}/"), None).unwrap_err();
    assert!(err.contains("expected a regex of bounded size"), "{err}");
}

#[test]
fn refusals_read_as_shown() {
    let mut spec = TaskSpec::default();
    spec.placement.constraints = vec!["zone==a".into(), "zone==b".into()];
    let request = Request::compile(&spec, None, None, Strategy::Spread).unwrap();
    let shown = |text: String| assert!(SCHEDULING.contains(&format!("```text\n{text}\n```")), "{text}");
    shown(request.contradiction().expect("they exclude each other").to_string());
    let mut scheduler = Scheduler::new();
    let offered = Resources { nano_cpus: 0, mem_bytes: 256 << 30 };
    scheduler.apply_node(NodeFacts { name: "far".into(), offered, ..NodeFacts::default() });
    let mut spec = TaskSpec::default();
    spec.resources.reservations.mem_bytes = 300 << 30;
    let request = Request::compile(&spec, None, None, Strategy::Spread).unwrap();
    shown(scheduler.too_large(&request).expect("it is larger").to_string());
}

/// What a node must be to meet a row of the table, beside the node that every row is asked about.
#[test]
fn every_constraint_means_what_it_says() {
    let mut scheduler = Scheduler::new();
    let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    scheduler.apply_node(NodeFacts {
        id: NodeId::new("x1b2c3"),
        name: "dc1-a".into(),
        hostname: "a.example.com".into(),
        site: "dc1".into(),
        labels: labels(&[("disk", "ssd"), ("zone", "a")]),
        engine_labels: labels(&[("gpu", "a100")]),
        os: "linux".into(),
        arch: "x86_64".into(),
        operating_system: "Debian GNU/Linux".into(),
        kernel: "6.1.0".into(),
        engine_version: "20.10.24".into(),
        storage_driver: "overlay2".into(),
        execution_driver: "runc".into(),
        addresses: vec!["10.1.0.8".into()],
        ready: true,
        ..NodeFacts::default()
    });
    scheduler.apply_node(NodeFacts {
        id: NodeId::new("other"),
        name: "other".into(),
        ready: true,
        ..NodeFacts::default()
    });
    for text in first_cells("Constraint") {
        let request = compile(Some(&text), None).unwrap_or_else(|err| panic!("{err}"));
        let meets = |id: &str| scheduler.fitting(&request).contains(&NodeId::new(id));
        // A node that is nothing in particular meets every `!=` and only the `==` that all meet.
        let all = text == "node.role==worker";
        let soft = text.contains("=~");
        let negated = text.contains("!=");
        let expected = match text.as_str() {
            "node.labels.disk != ssd" | "node!=dc1-*" => (false, true),
            _ => (true, all || soft || negated),
        };
        assert_eq!((meets("x1b2c3"), meets("other")), expected, "{text}");
    }
}

/// Beside a node that has nothing, one that has what the table speaks of.
#[test]
fn every_affinity_means_what_it_says() {
    let mut scheduler = Scheduler::new();
    for name in ["full", "empty"] {
        scheduler.apply_node(NodeFacts {
            id: NodeId::new(name),
            name: name.into(),
            ready: true,
            ..NodeFacts::default()
        });
    }
    let full = scheduler.node(&NodeId::new("full")).cloned().expect("applied just now");
    scheduler.apply_node(full.with_volumes(["shop_data".to_owned()]));
    scheduler.apply_task(Placed {
        task: TaskId::new("0a1b2c3d4e5f6071"),
        node: NodeId::new("full"),
        service_name: "shop_db".into(),
        name: "db".into(),
        image: "redis:7".into(),
        labels: [("com.example.tier", "front"), ("service", "x")].map(|(k, v)| (k.into(), v.into())).into(),
        ..Placed::default()
    });
    for text in first_cells("Affinity") {
        let request = compile(None, Some(&text)).unwrap_or_else(|err| panic!("{err}"));
        let meets = |id: &str| scheduler.fitting(&request).contains(&NodeId::new(id));
        let soft = text.contains("=~");
        let expected = match text.as_str() {
            // Of another service than the one that runs.
            "affinity:service!=shop_web" => (true, true),
            _ => (soft || !text.contains("!="), soft || text.contains("!=")),
        };
        assert_eq!((meets("full"), meets("empty")), expected, "{text}");
    }
}
