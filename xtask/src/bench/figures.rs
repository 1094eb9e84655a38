//! Figures of a program that measures: one JSON object a line, and where the program comes from.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::{
    cli::{repository_root, target_dir},
    test,
};

/// One figure.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Figure {
    pub(super) case: String,
    /// By what rule; empty where there is only one.
    #[serde(default)]
    pub(super) rule: String,
    pub(super) metric: String,
    pub(super) unit: String,
    pub(super) value: f64,
    /// The most that it may be.
    pub(super) at_most: Option<f64>,
}

/// Builds a package whose one program measures, for speed.
///
/// # Errors
/// It cannot be built.
pub(super) fn program(package: &str) -> Result<PathBuf> {
    let root = repository_root();
    test::must(test::cargo(&root, &["build", "--quiet", "--release", "--package", package]))?;
    Ok(target_dir()?.join("release").join(package))
}

/// Builds an example of a package that measures, for speed.
///
/// # Errors
/// It cannot be built.
pub(super) fn example(package: &str, name: &str) -> Result<PathBuf> {
    let root = repository_root();
    test::must(test::cargo(&root, &["build", "--quiet", "--release", "--package", package, "--example", name]))?;
    Ok(target_dir()?.join("release/examples").join(name))
}

/// Reads what such a program said.
///
/// # Errors
/// The first line that is no figure.
pub(super) fn read(output: Vec<u8>) -> Result<Vec<Figure>> {
    let text = String::from_utf8(output).context("figures are text")?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("no figure: {line}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_line_by_line() {
        let plain = r#"{"case":"10 nodes","metric":"place, p50","unit":"ns","value":71.5}"#;
        let held = r#"{"case":"10 nodes","rule":"spread","metric":"place, p50","unit":"ns","value":71.5,"at_most":50}"#;
        let found = read(format!("{plain}\n{held}\n").into_bytes()).expect("two figures");
        assert_eq!((found[0].value, found[0].at_most, found[0].rule.as_str()), (71.5, None, ""));
        assert_eq!((found[1].at_most, found[1].rule.as_str()), (Some(50.0), "spread"));
        for bad in ["hello", r#"{"case":"a"}"#] {
            let error = read(bad.into()).expect_err("no figure").to_string();
            assert_eq!(error, format!("no figure: {bad}"));
        }
    }
}
