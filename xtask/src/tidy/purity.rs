//! Purity of the cores: what they may depend on, and what their sources must not name.
//!
//! The nested `clippy.toml` of each core says the same with the compiler's knowledge; this check is there for what
//! clippy cannot see (imports, modules as a whole, dependencies).

use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

use super::Finding;

/// Directories of the cores, and the names of their packages.
const CORES: &[(&str, &str)] = &[("master/core", "master-core"), ("agent/core", "agent-core")];

/// What a core may depend on: data, parsing, errors. Nothing that waits, opens, listens or knows the time.
const ALLOWED: &[&str] =
    &["bitflags", "ipnet", "multiversion", "regex-lite", "serde", "serde_json", "skein-api", "smallvec", "thiserror"];

/// Names that a core's source must not contain, each with what to do instead.
const FORBIDDEN: &[(&str, &str)] = &[
    ("std::fs", "files belong to the shell"),
    ("std::net::TcpListener", "sockets belong to the shell"),
    ("std::net::TcpStream", "sockets belong to the shell"),
    ("std::net::ToSocketAddrs", "name resolution belongs to the shell"),
    ("std::net::UdpSocket", "sockets belong to the shell"),
    ("std::os", "the operating system belongs to the shell"),
    ("std::process", "processes belong to the shell"),
    ("std::thread", "a core has no threads"),
    ("std::env", "configuration is an argument"),
    ("Instant", "time is an argument"),
    ("SystemTime", "time is an argument"),
    ("HashMap", "its order is not total: use BTreeMap, or an index"),
    ("HashSet", "its order is not total: use BTreeSet, or a bitset"),
    ("RandomState", "randomness is seeded state"),
    ("tokio", "a core does not wait"),
];

/// Whether a file belongs to a core. Tests are left out: stored output and environment are theirs.
pub(super) fn is_core_source(path: &Path) -> bool {
    let core = CORES.iter().any(|(dir, _)| path.starts_with(dir));
    let test = path.components().any(|part| part.as_os_str() == "tests" || part.as_os_str() == "tests.rs");
    core && !test
}

/// Names in the source of a core that must not be there.
pub(super) fn check_source(path: &Path, text: &str) -> Vec<Finding> {
    let code = without_comments(text);
    let mut findings = Vec::new();
    for (index, line) in code.lines().enumerate() {
        for (name, instead) in FORBIDDEN {
            if contains_name(line, name) {
                findings.push(Finding::new(path, index + 1, format!("`{name}` in a pure core: {instead}")));
            }
        }
    }
    // `use std::{fs, net::UdpSocket}` hides the names from the search above.
    for (line, name) in grouped_imports(&code) {
        if let Some((forbidden, instead)) =
            FORBIDDEN.iter().find(|(forbidden, _)| forbidden.contains("::") && contains_name(&name, forbidden))
        {
            findings.push(Finding::new(path, line, format!("`{forbidden}` in a pure core: {instead}")));
        }
    }
    findings
}

/// Every line keeps its number. Text in quotes stays: a forbidden name in a message is rare, and easily reworded.
fn without_comments(text: &str) -> String {
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether `name` stands in `line` as a whole: no letter, digit or underscore beside it.
fn contains_name(line: &str, name: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(name).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + name.len()..].chars().next();
        !before.is_some_and(part_of_word) && !after.is_some_and(part_of_word)
    })
}

/// Full paths that `std::{…}` groups name, with the line where the group starts; groups within groups too.
fn grouped_imports(code: &str) -> Vec<(usize, String)> {
    const START: &str = "std::{";
    let mut found = Vec::new();
    for (at, _) in code.match_indices(START) {
        let line = code[..at].matches('\n').count() + 1;
        let mut prefix = vec!["std".to_owned()];
        let mut word = String::new();
        for c in code[at + START.len()..].chars() {
            match c {
                '{' => prefix.push(std::mem::take(&mut word).trim_end_matches(':').to_owned()),
                ',' | '}' => {
                    let name = std::mem::take(&mut word);
                    if !name.is_empty() {
                        found.push((line, format!("{}::{name}", prefix.join("::"))));
                    }
                    if c == '}' {
                        prefix.pop();
                        if prefix.is_empty() {
                            break;
                        }
                    }
                }
                c if c.is_whitespace() => {}
                c => word.push(c),
            }
        }
    }
    found
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
    features: std::collections::BTreeMap<String, Vec<String>>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// Absent for an ordinary one, else `dev` or `build`.
    kind: Option<String>,
    uses_default_features: bool,
}

/// The direct dependencies of the cores are on the list, from the output of `cargo metadata --no-deps`; and the wire
/// types come without the wire: without default features, or from a package whose default is empty.
///
/// # Errors
/// The input is not what cargo prints, or a core is missing from it.
pub(super) fn check_dependencies(json: &[u8]) -> anyhow::Result<Vec<Finding>> {
    let metadata: Metadata = serde_json::from_slice(json).context("failed to read the output of cargo metadata")?;
    let find = |name: &str| metadata.packages.iter().find(|package| package.name == name);
    let api_is_plain = find("skein-api").is_some_and(|api| api.features.get("default").is_none_or(Vec::is_empty));
    let mut findings = Vec::new();
    for (dir, name) in CORES {
        let manifest = Path::new(dir).join("Cargo.toml");
        let core = find(name).with_context(|| format!("failed to find the package {name} in the workspace"))?;
        for dependency in core.dependencies.iter().filter(|dep| dep.kind.as_deref() != Some("dev")) {
            let message = if !ALLOWED.contains(&dependency.name.as_str()) {
                format!("a pure core must not depend on `{}`; allowed: {}", dependency.name, ALLOWED.join(", "))
            } else if dependency.name == "skein-api" && dependency.uses_default_features && !api_is_plain {
                "a pure core takes `skein-api` with default-features = false".to_owned()
            } else {
                continue;
            };
            findings.push(Finding::new(&manifest, 0, message));
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(usize, String)> {
        check_source(Path::new("master/core/src/lib.rs"), text).into_iter().map(|f| (f.line, f.message)).collect()
    }

    #[test]
    fn which_files_are_pure() {
        for (path, expected) in [
            ("master/core/src/model.rs", true),
            ("agent/core/src/reconcile/plan.rs", true),
            ("agent/src/main.rs", false),
            ("master/core/tests/scenarios.rs", false),
            ("master/core/src/sched/tests.rs", false),
        ] {
            assert_eq!(is_core_source(Path::new(path)), expected, "{path}");
        }
    }

    #[test]
    fn good_sources() {
        for good in [
            "use std::collections::BTreeMap;\nuse std::net::{IpAddr, Ipv4Addr};\n",
            "// unlike HashMap, ordered\n/// Not an Instant.\n",
            "struct InstantReply; fn my_tokio_free() {}\n",
            "use std::{collections::BTreeMap, net::IpAddr, time::Duration};\n",
        ] {
            assert!(found(good).is_empty(), "{good}");
        }
    }

    #[test]
    fn bad_sources() {
        for (bad, line, name) in [
            ("\nuse std::collections::HashMap;\n", 2, "`HashMap`"),
            ("let now = std::time::Instant::now();\n", 1, "`Instant`"),
            ("use std::fs::File;\n", 1, "`std::fs`"),
            ("use std::{\n    cmp,\n    fs::File,\n};\n", 1, "`std::fs`"),
            ("\nuse std::{collections::BTreeMap, net::{IpAddr, UdpSocket}};\n", 2, "`std::net::UdpSocket`"),
            ("use std::net::UdpSocket;\n", 1, "`std::net::UdpSocket`"),
            ("tokio::spawn(f());\n", 1, "`tokio`"),
        ] {
            let messages = found(bad);
            assert!(
                messages.len() == 1 && messages[0].0 == line && messages[0].1.contains(name),
                "{bad}: {messages:?}"
            );
        }
    }

    fn metadata(core_dependency: &str, api_features: &str) -> Vec<u8> {
        format!(
            r#"{{"packages":[
                {{"name":"master-core","dependencies":[{core_dependency}],"features":{{}}}},
                {{"name":"agent-core","dependencies":[],"features":{{}}}},
                {{"name":"skein-api","dependencies":[],"features":{api_features}}}]}}"#
        )
        .into_bytes()
    }

    fn dependency(name: &str, kind: &str, defaults: bool) -> String {
        format!(r#"{{"name":"{name}","kind":{kind},"uses_default_features":{defaults}}}"#)
    }

    #[test]
    fn dependencies() {
        let check = |dependency: String, api_features: &str, expected: &str| {
            let found = check_dependencies(&metadata(&dependency, api_features)).unwrap();
            match expected {
                "" => assert!(found.is_empty(), "{found:?}"),
                _ => assert!(found.len() == 1 && found[0].message.contains(expected), "{found:?}"),
            }
        };
        let with_grpc = r#"{"default":["grpc"],"grpc":[]}"#;
        check(dependency("serde", "null", true), "{}", "");
        check(dependency("tokio", "null", true), "{}", "must not depend on `tokio`");
        check(dependency("cc", "\"build\"", true), "{}", "must not depend on `cc`");
        check(dependency("proptest", "\"dev\"", true), "{}", "");
        check(dependency("skein-api", "null", true), with_grpc, "default-features = false");
        check(dependency("skein-api", "null", false), with_grpc, "");
        check(dependency("skein-api", "null", true), "{}", "");
        check(dependency("skein-api", "null", true), r#"{"default":[]}"#, "");
    }

    #[test]
    fn a_workspace_without_cores_is_an_error() {
        assert!(check_dependencies(br#"{"packages":[]}"#).is_err());
    }
}
