//! Constraint and affinity expressions from strangers.

use skein_fuzz::{Form, Verdict};

use super::expr::{
    AnyAffinity, ConstraintError, EXPRESSION_CHARS_MAX, Expression, REGEX_BYTES_MAX, parse_affinity, parse_constraint,
    parse_platform, parse_preference, parse_whitelist,
};

/// Longest value that is matched: labels of a node are at most this long in practice, and time is linear in it.
const VALUE_CHARS: usize = 1_000;

/// Pieces of expressions; the last ones make patterns that backtracking matchers never get through.
const WORDS: &[&str] = &[
    "==",
    "!=",
    "==~",
    "!=~",
    "constraint:",
    "affinity:",
    "whitelist:node==",
    "spread=",
    "volume",
    "service",
    "node.ip",
    "10.0.0.0/8",
    "fd00::",
    "a|b",
    "linux/",
    "node.labels.",
    "engine.labels.",
    "node.id",
    "container",
    "image",
    "*",
    "**",
    "/",
    "(?i)",
    "[^a]",
    "[[:alpha:]]",
    "\\p{L}",
    "\\b",
    "$",
    "^",
    "é",
    "(a*)*",
    "(a|a)*",
    "(.*)*b",
    "{1000}",
    "{1,1000}",
    "((((((((((",
    "(x{100}){100}",
];

/// An expression that is understood says the same when it is written and read again, and matches or not in time.
fn understood<K>(
    expression: &Expression<K>,
    parse: impl Fn(&str) -> Result<Expression<K>, ConstraintError>,
    text: &str,
) {
    let again = parse(&expression.to_string()).expect("what was printed is understood");
    assert_eq!((&again.text, again.negated, again.soft), (&expression.text, expression.negated, expression.soft));
    let values = ["".to_owned(), "ssd".to_owned(), "a".repeat(VALUE_CHARS), text.chars().take(VALUE_CHARS).collect()];
    for value in values {
        assert_eq!(again.pattern.matches(&value), expression.pattern.matches(&value), "{value:?}");
    }
}

fn understood_affinity(affinity: &AnyAffinity, text: &str) {
    let tasks = |text: &str| match parse_affinity(text)? {
        AnyAffinity::Tasks(tasks) => Ok(tasks),
        AnyAffinity::Volumes(volumes) => panic!("{volumes} was about tasks"),
    };
    let volumes = |text: &str| match parse_affinity(text)? {
        AnyAffinity::Volumes(volumes) => Ok(volumes),
        AnyAffinity::Tasks(tasks) => panic!("{tasks} was about volumes"),
    };
    match affinity {
        AnyAffinity::Tasks(affinity) => understood(affinity, tasks, text),
        AnyAffinity::Volumes(affinity) => understood(affinity, volumes, text),
    }
}

/// A refusal shows its place within the expression.
fn refused(error: &ConstraintError, text: &str) {
    assert!((1..=text.chars().count() + 1).contains(&error.column), "{error}");
    assert!(error.caret().ends_with('^') && !error.hint().is_empty());
}

#[test]
fn expressions() {
    // A regex of limited size is held twice, and its matcher has some words of memory for each state.
    let target = skein_fuzz::target!("expressions").inputs(4_000).memory(64, 32 * REGEX_BYTES_MAX as u64);
    target.run_mutants(Form::Text(WORDS), |input| {
        let Ok(text) = str::from_utf8(input) else { return Verdict::Refused };
        let (constraint, affinity) = (parse_constraint(text), parse_affinity(text));
        let long = text.chars().count() > EXPRESSION_CHARS_MAX;
        assert!(!long || constraint.is_err() && affinity.is_err(), "the limit holds");
        match &constraint {
            Ok(expression) => understood(expression, parse_constraint, text),
            Err(error) => refused(error, text),
        }
        match &affinity {
            Ok(expression) => understood_affinity(expression, text),
            Err(error) => refused(error, text),
        }
        match parse_whitelist(text) {
            Ok(whitelist) => understood(&whitelist, parse_whitelist, text),
            Err(error) => refused(&error, text),
        }
        parse_preference(text).map_or_else(|error| refused(&error, text), |_| ());
        parse_platform(text).map_or_else(|error| refused(&error, text), |_| ());
        Verdict::from(constraint.is_ok() || affinity.is_ok())
    });
}
