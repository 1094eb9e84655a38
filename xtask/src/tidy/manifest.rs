//! Checks on the manifest of a member: versions, features and lints stand in the root manifest alone.

use std::path::Path;

use toml::{Table, Value};

use super::Finding;

/// Keys of `[package]` that the root manifest gives.
const INHERITED: &[&str] = &["version", "edition", "rust-version", "license", "publish"];

const DEPENDENCY_TABLES: &[&str] = &["dependencies", "dev-dependencies", "build-dependencies"];

/// A member inherits its package data, its lints and every dependency.
pub(super) fn check(path: &Path, text: &str) -> Vec<Finding> {
    let manifest: Table = match text.parse() {
        Ok(manifest) => manifest,
        Err(error) => return vec![Finding::new(path, 0, format!("is not TOML: {error}"))],
    };
    let mut messages = Vec::new();
    for key in INHERITED {
        if !manifest.get("package").and_then(|package| package.get(key)).is_some_and(inherits) {
            messages.push(format!("`{key}` does not stand in the root manifest alone: write `{key}.workspace = true`"));
        }
    }
    if !manifest.get("lints").is_some_and(inherits) {
        messages.push("lints are not the workspace's: write `[lints]` and `workspace = true`".into());
    }
    check_dependencies(&manifest, &mut messages);
    for table in manifest.get("target").and_then(Value::as_table).into_iter().flat_map(Table::values) {
        check_dependencies(table.as_table().unwrap_or(&Table::new()), &mut messages);
    }
    messages.into_iter().map(|message| Finding::new(path, 0, message)).collect()
}

fn check_dependencies(table: &Table, messages: &mut Vec<String>) {
    for name in DEPENDENCY_TABLES {
        for (dependency, value) in table.get(*name).and_then(Value::as_table).into_iter().flatten() {
            if !inherits(value) {
                messages
                    .push(format!("dependency `{dependency}` is not inherited: write `{dependency}.workspace = true`"));
            }
        }
    }
}

fn inherits(value: &Value) -> bool {
    value.get("workspace").and_then(Value::as_bool) == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[package]\nname = \"a\"\nversion.workspace = true\nedition.workspace = true\n\
        rust-version.workspace = true\nlicense.workspace = true\npublish.workspace = true\n\
        [lints]\nworkspace = true\n[dependencies]\nserde.workspace = true\n\
        tokio = { workspace = true, features = [\"fs\"] }\n";

    fn messages(text: &str) -> Vec<String> {
        check(Path::new("a/Cargo.toml"), text).into_iter().map(|finding| finding.message).collect()
    }

    #[test]
    fn a_good_manifest() {
        assert!(messages(GOOD).is_empty());
    }

    #[test]
    fn bad_manifests() {
        let check = |bad: &str, expected: &str| {
            let found = messages(bad);
            assert!(found.len() == 1 && found[0].contains(expected), "{expected}: {found:?}");
        };
        check(&GOOD.replace("version.workspace = true\nedition", "version = \"1\"\nedition"), "`version`");
        check(&GOOD.replace("[lints]\nworkspace = true\n", ""), "lints");
        check(&GOOD.replace("serde.workspace = true", "serde = \"1\""), "`serde`");
        check(&format!("{GOOD}[dev-dependencies]\nx = {{ version = \"1\" }}\n"), "`x`");
        check(&format!("{GOOD}[target.'cfg(unix)'.build-dependencies]\ny = \"1\"\n"), "`y`");
        check("= nonsense", "is not TOML");
    }
}
