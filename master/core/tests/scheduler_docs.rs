//! Every expression and message that docs/scheduling.md shows is one that the scheduler takes or says.

use master_core::scheduler::{EXPRESSION_CHARS_MAX, EXPRESSIONS_MAX, Request};
use skein_api::{Strategy, TaskSpec};

const PLACEMENT: &str = include_str!("../../../docs/scheduling.md");

/// First cells of the table whose heading begins with `head`, without their back quotes.
fn first_cells(head: &str) -> Vec<String> {
    let heading = format!("| {head} |");
    let rows = PLACEMENT.lines().skip_while(|line| !line.starts_with(&heading)).skip(2);
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
    assert_eq!((constraints.len(), affinities.len()), (22, 7), "a table was not found or grew");
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
    assert!(PLACEMENT.contains(&format!("```text\n{err}\n```")), "{err}");
    assert_eq!((EXPRESSION_CHARS_MAX, EXPRESSIONS_MAX), (1_024, 64), "docs/scheduling.md names both");
}
