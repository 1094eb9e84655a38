//! Compose files to stacks: text, environment and a file reader in; [`StackSpec`] and warnings, or errors with their
//! places, out.
//!
//! Pure: files are read through [`Options::read`] only, nothing is asked of a master. The way of a file:
//! [`yaml`] (tree with places) -> [`interpolate`] (variables, from the environment and [`dotenv`]) -> `merge` (several
//! files) -> `project`, `service`, `deploy`, `mounts` (meaning, by the tables of [`keys`]). docs/compose.md is the
//! user's view of it.

mod deploy;
pub mod dotenv;
#[cfg(test)]
mod fuzz;
pub mod interpolate;
pub mod keys;
mod merge;
mod mounts;
pub mod problem;
mod project;
mod service;
pub mod values;
mod walk;
pub mod yaml;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use skein_api::StackSpec;

pub(crate) use deploy::parse_restart;
pub(crate) use mounts::{short as parse_volume, tmpfs_short as parse_tmpfs};

use self::{
    problem::{ComposeError, Pos, Problem, Sources},
    yaml::{Node, Value},
};

/// A compose file.
#[derive(Clone, Debug)]
pub struct ComposeFile {
    /// Its name as errors show it.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// What to read, and the surroundings that it depends on.
pub struct Options<'a> {
    /// The files; later ones are laid over earlier ones.
    pub files: Vec<ComposeFile>,
    /// Absolute directory that relative paths start from, and where `.env` is.
    pub project_dir: PathBuf,
    /// Name of the stack, if the user gave one (`-p`).
    pub project_name: Option<String>,
    /// The environment of the process. It wins over every file.
    pub env: BTreeMap<String, String>,
    /// Instead of `.env`; later ones win.
    pub env_files: Vec<PathBuf>,
    /// Active profiles, beside those of the variable COMPOSE_PROFILES.
    pub profiles: Vec<String>,
    /// Keys without effect are errors.
    pub strict: bool,
    /// Reads a file as text.
    pub read: &'a dyn Fn(&Path) -> io::Result<String>,
}

/// A compose file that was understood.
#[derive(Debug)]
pub struct Parsed {
    /// What it describes.
    pub stack: StackSpec,
    /// What the user should know.
    pub warnings: Vec<Problem>,
    /// The texts that the warnings' places are about.
    pub sources: Sources,
}

/// Reads compose files.
///
/// # Errors
/// Everything that is wrong with them, up to the first error of syntax.
pub fn parse(options: &Options<'_>) -> Result<Parsed, ComposeError> {
    let mut sources = Sources::default();
    let mut cx = walk::Cx { strict: options.strict, ..Default::default() };
    match read(options, &mut sources, &mut cx) {
        Some(stack) if cx.errors.is_empty() => Ok(Parsed { stack, warnings: cx.warnings, sources }),
        _ => Err(ComposeError { problems: cx.errors, sources }),
    }
}

/// The name of the stack that compose files make, without reading the rest of them.
///
/// # Errors
/// The files are no YAML, or no name follows from them.
pub fn stack_name(options: &Options<'_>) -> Result<String, ComposeError> {
    let mut sources = Sources::default();
    let mut cx = walk::Cx::default();
    let name = trees(options, &mut sources, &mut cx).and_then(|trees| {
        let mut env = env_files(options, &mut cx)?;
        env.extend(options.env.clone());
        project_name(options, &trees, &env, &sources, &mut cx)
    });
    name.ok_or(ComposeError { problems: cx.errors, sources })
}

fn read(options: &Options<'_>, sources: &mut Sources, cx: &mut walk::Cx) -> Option<StackSpec> {
    let mut trees = trees(options, sources, cx)?;
    let mut env = env_files(options, cx)?;
    env.extend(options.env.clone());
    let name = project_name(options, &trees, &env, sources, cx)?;
    env.insert("COMPOSE_PROJECT_NAME".into(), name.clone());
    let lookup = |name: &str| env.get(name).cloned();
    let (mut warned, mut errors) = (BTreeSet::new(), Vec::new());
    for tree in &mut trees {
        interpolate::interpolate_tree(tree, sources, &lookup, &mut warned, &mut cx.warnings, &mut errors);
    }
    if !errors.is_empty() {
        cx.errors.extend(errors);
        return None;
    }
    let mut trees = trees.into_iter();
    let mut root = trees.next()?;
    for tree in trees {
        merge::merge(&mut root, tree);
    }
    let mut profiles: BTreeSet<String> = options.profiles.iter().cloned().collect();
    let more = env.get("COMPOSE_PROFILES").map(String::as_str).unwrap_or_default();
    profiles.extend(more.split(',').map(|p| p.trim().to_owned()).filter(|p| !p.is_empty()));
    let around = service::Surroundings {
        project_dir: &options.project_dir,
        home: env.get("HOME").cloned(),
        read: options.read,
        lookup: &lookup,
    };
    project::project(cx, &root, &name, &profiles, &around)
}

/// The files as trees, without their top-level `x-*`: what of these is used came in by anchors already.
fn trees(options: &Options<'_>, sources: &mut Sources, cx: &mut walk::Cx) -> Option<Vec<Node>> {
    let mut trees = Vec::new();
    for file in &options.files {
        let index = sources.add(&file.name, &file.text);
        match yaml::parse(&file.text, index) {
            Ok(Some(mut tree)) => {
                if let Value::Map(entries) = &mut tree.value {
                    entries.retain(|(key, _)| !key.text.starts_with("x-"));
                }
                trees.push(tree);
            }
            Ok(None) => cx.error(Pos { file: index, line: 0, column: 0 }, "the file is empty"),
            Err(problem) => cx.errors.push(problem),
        }
    }
    if options.files.is_empty() {
        cx.errors.push(Problem::general("no compose file was given"));
    }
    cx.errors.is_empty().then_some(trees)
}

fn env_files(options: &Options<'_>, cx: &mut walk::Cx) -> Option<BTreeMap<String, String>> {
    let default = options.env_files.is_empty();
    let files = if default { vec![options.project_dir.join(".env")] } else { options.env_files.clone() };
    let mut out: BTreeMap<String, String> = BTreeMap::new();
    for file in files {
        let text = match (options.read)(&file) {
            Ok(text) => text,
            Err(e) if default && e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => {
                cx.errors.push(Problem::general(format!("failed to read the env file {}: {e}", file.display())));
                continue;
            }
        };
        let lookup = |name: &str| options.env.get(name).or_else(|| out.get(name)).cloned();
        match dotenv::parse(&text, false, &lookup) {
            Ok(variables) => out.extend(variables.into_iter().filter_map(|(n, v)| Some((n, v?)))),
            Err(e) => {
                cx.errors.push(Problem::general(format!("bad env file {}:{}: {}", file.display(), e.line, e.message)));
            }
        }
    }
    cx.errors.is_empty().then_some(out)
}

/// The name of the stack: `-p`, COMPOSE_PROJECT_NAME, the last file's `name:`, or the directory's name.
fn project_name(
    options: &Options<'_>,
    trees: &[Node],
    env: &BTreeMap<String, String>,
    sources: &Sources,
    cx: &mut walk::Cx,
) -> Option<String> {
    let from_env = || env.get("COMPOSE_PROJECT_NAME").filter(|n| !n.is_empty()).cloned();
    if let Some(name) = options.project_name.clone().or_else(from_env) {
        return checked_name(cx, &name, Problem::general);
    }
    if let Some(node) = trees.iter().rev().find_map(|t| t.get("name")).filter(|n| !n.is_null()) {
        let mut node = node.clone();
        let lookup = |name: &str| env.get(name).cloned();
        // Warnings come again, and are kept, when the whole tree is interpolated.
        let (mut warned, mut dropped) = (BTreeSet::new(), Vec::new());
        let before = cx.errors.len();
        interpolate::interpolate_tree(&mut node, sources, &lookup, &mut warned, &mut dropped, &mut cx.errors);
        if cx.errors.len() > before {
            return None;
        }
        let name = cx.text(&node, "name")?;
        return checked_name(cx, &name, |message| Problem::at(node.pos, message));
    }
    let dir = options.project_dir.file_name().unwrap_or_default().to_string_lossy();
    let name = values::normalise_name(&dir);
    if name.is_empty() {
        let message = format!("no name for the stack follows from the directory {}", options.project_dir.display());
        cx.errors.push(Problem::general(message).hint("give one with `-p NAME` or the key `name:`"));
        return None;
    }
    Some(name)
}

fn checked_name(cx: &mut walk::Cx, name: &str, problem: impl Fn(String) -> Problem) -> Option<String> {
    let usual = values::normalise_name(name);
    if usual == name && !name.is_empty() {
        return Some(name.to_owned());
    }
    let message = format!(
        "{name:?} cannot be the name of a stack: expected lower-case letters, digits, \"-\" and \"_\", a letter or digit first"
    );
    let problem = problem(message);
    cx.errors.push(if usual.is_empty() { problem } else { problem.hint(format!("{usual:?} would do")) });
    None
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
