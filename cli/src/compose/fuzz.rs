//! Compose files, env files and variables from strangers.

use std::{cell::Cell, io, path::Path};

use skein_fuzz::{Form, Verdict};

use super::{
    ComposeFile, Options, dotenv,
    interpolate::{Interpolated, interpolate},
    parse,
    yaml::{COPIES_BYTES_MAX, NODES_MAX},
};

/// Divides an input into the compose file and the `.env` beside it.
const ENV_MARK: &str = "\n#.env\n";

const YAML_WORDS: &[&str] = &[
    "services:",
    "image: x",
    "<<: *a",
    "&a",
    "*a",
    "- ",
    "? ",
    ": ",
    "|",
    ">-",
    "!!str ",
    "!!binary ",
    "---",
    "...",
    "#",
    "\"",
    "'",
    "[",
    "]",
    "{",
    "}",
    "${A}",
    "${A:-${B:?no}}",
    "$$",
    "${",
    "$A",
    "~",
    "null",
    "0x10",
    "1e9",
    "ports:",
    "\"1-65535:1-65535\"",
    "8000-9000:80",
    "deploy:",
    "replicas: 70000",
    "depends_on:",
    "env_file: .env",
    "build: .",
    "volumes:",
    "a:b:ro",
    "networks:",
    "profiles:",
    "extends:",
    "\u{feff}",
    "\t",
    "\r",
    "é",
];

/// Files are understood or refused with places that exist, the same way each time.
#[test]
fn compose() {
    // Aliases are followed, so a small file may be a large one: the tree has limits of its own. It is held by the parser
    // and by what is made of it.
    let constant = NODES_MAX * 256 + 4 * COPIES_BYTES_MAX;
    let target = skein_fuzz::target!("compose").inputs(900).memory(8 << 10, constant as u64);
    target.run_mutants(Form::Text(YAML_WORDS), |input| {
        let text = String::from_utf8_lossy(input);
        let (yaml, env) = text.split_once(ENV_MARK).unwrap_or((&text, ""));
        let reads = Cell::new(0);
        let read = |path: &Path| {
            reads.set(reads.get() + 1);
            if path.ends_with(".env") { Ok(env.to_owned()) } else { Err(io::ErrorKind::NotFound.into()) }
        };
        let options = Options {
            files: vec![ComposeFile { name: "c.yml".into(), text: yaml.into() }],
            project_dir: "/srv/shop".into(),
            project_name: None,
            env: [("HOME".to_owned(), "/root".to_owned())].into(),
            env_files: Vec::new(),
            profiles: Vec::new(),
            strict: false,
            read: &read,
        };
        match (parse(&options), parse(&options)) {
            (Ok(first), Ok(second)) => {
                assert_eq!(first.stack, second.stack);
                let json = serde_json::to_string(&first.stack).expect("a stack is JSON");
                let stack: skein_api::StackSpec = serde_json::from_str(&json).expect("and is read from it");
                assert_eq!(stack, first.stack);
                for warning in &first.warnings {
                    assert!(!warning.render("warning", &first.sources).is_empty());
                }
                Verdict::Accepted
            }
            (Err(first), Err(second)) => {
                assert!(!first.problems.is_empty(), "a refusal has a reason");
                assert_eq!(first.to_string(), second.to_string());
                Verdict::Refused
            }
            _ => panic!("it was understood once, and refused once"),
        }
    });
}

/// Env files.
#[test]
fn dotenv_files() {
    let words = &["=", "A=", "export ", "\"", "'", "\\n", "$A", "${A:-b}", "#", ": ", "\\", "é", "\u{0}", "\r"];
    skein_fuzz::target!("dotenv_files").inputs(8_000).memory(1 << 10, 64 << 10).run_mutants(
        Form::Text(words),
        |input| {
            let text = String::from_utf8_lossy(input);
            let lookup = |name: &str| (name == "A").then(|| "a".to_owned());
            let raw = dotenv::parse(&text, true, &lookup);
            assert!(raw.is_err() || raw.is_ok_and(|v| v.iter().all(|(name, _)| !name.is_empty())));
            match dotenv::parse(&text, false, &lookup) {
                Ok(variables) => {
                    assert!(variables.iter().all(|(name, _)| !name.is_empty() && !name.contains('=')), "{variables:?}");
                    Verdict::Accepted
                }
                Err(bad) => {
                    assert!((1..=text.lines().count() + 1).contains(&bad.line), "line {}", bad.line);
                    Verdict::Refused
                }
            }
        },
    );
}

/// Variables in values: what is left after them has no variables of the user's own any more.
#[test]
fn interpolation() {
    let words = &["$", "$$", "${", "}", ":-", "-", ":?", "?", ":+", "+", "A", "B", "${A", "${A:-${B:-", "_", "é", " "];
    skein_fuzz::target!("interpolation").inputs(20_000).memory(1 << 10, 16 << 10).run_mutants(
        Form::Text(words),
        |input| {
            let text = String::from_utf8_lossy(input);
            let lookup = |name: &str| (name == "A").then(|| "one".to_owned());
            match interpolate(&text, &lookup) {
                Ok(Interpolated { text: done, blank }) => {
                    assert!(text.contains('$') || done == text, "nothing to replace");
                    let dollars = text.matches('$').count();
                    assert!(
                        blank.iter().all(|(name, nth)| *nth < dollars && text.contains(name.as_str())),
                        "{blank:?}"
                    );
                    Verdict::Accepted
                }
                Err(bad) => {
                    assert!(bad.dollar < text.matches('$').count(), "{}", bad.message);
                    Verdict::Refused
                }
            }
        },
    );
}
