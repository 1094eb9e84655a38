//! `cargo xtask test`: what CI runs, in order, each with a heading and its time.
//!
//! Set-up, format, tidy, clippy, documentation, doctests, licences and bans, the simulation, the programs that the end-to-end tests
//! start, then every test in one run. The last comes last whatever the others say, and nothing is printed after it, so
//! that the end of the output is the test runner's own summary. A failed check is named before that run and in the
//! exit code.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde::Deserialize;

use crate::cli::repository_root;
use crate::{setup, sim, tidy, ui};

/// Arguments of `test`.
#[derive(Debug, Clone, Args)]
pub struct TestArgs {
    /// Leave out what needs root: the set-up, and the tests in namespaces and in the lab
    #[arg(long)]
    pub fast: bool,
    /// Install missing packages without asking
    #[arg(long, short)]
    pub yes: bool,
    /// Run only the tests whose names contain one of these; every check still runs
    #[arg(value_name = "FILTER")]
    pub filters: Vec<String>,
}

/// First part, before an underscore, of the names of the test programs (files in a package's `tests` folder) that need
/// root and what the set-up installs: `kernel`, `lab_images`, `e2e_compose`. docs/testing.md tells authors.
pub const ROOT_TEST_PREFIXES: &[&str] = &["kernel", "lab", "e2e", "engine", "overlay"];

/// Seed of the property tests, a number; proptest reads it.
const PROPTEST_SEED: &str = "PROPTEST_RNG_SEED";
/// The seed unless the environment has one.
const PROPTEST_SEED_DEFAULT: &str = "20261122";

/// Variables that cargo sets for the program it runs. Passed on to another cargo they make build scripts run again
/// that watch them (ring's does), and half the workspace with them.
const CARGO_RUN_VARIABLES: &[&str] =
    &["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_NAME", "CARGO_PRIMARY"];

/// Runs everything.
///
/// # Errors
/// When the set-up, the build or a tool cannot run at all. Failed checks and tests are the exit code.
pub fn run(args: &TestArgs) -> anyhow::Result<ExitCode> {
    let root = repository_root();
    if !args.fast {
        step("set-up", || setup::ensure(args.yes))?;
    }
    let mut failed = checks(&root);
    if args.filters.is_empty()
        && let Err(error) = step("simulation", || sim::check(&root))
    {
        ui::error(&error);
        failed.push("simulation");
    }
    step("programs", || build_programs(&root))?;
    let command = test_command(&root, args)?;
    if failed.is_empty() {
        ui::heading("tests");
    } else {
        ui::heading(&format!("tests (the outcome is a failure already: {})", failed.join(", ")));
    }
    let passed = status(command)?;
    Ok(if passed && failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs every check, the failed ones too, and returns the names of those.
fn checks(root: &Path) -> Vec<&'static str> {
    type Check = (&'static str, fn(&Path) -> anyhow::Result<()>);
    const CHECKS: &[Check] = &[
        ("format", check_format),
        ("tidy", tidy::run),
        ("clippy", check_clippy),
        ("documentation", check_documentation),
        ("doctests", check_doctests),
        ("licences and bans", check_deny),
    ];
    let mut failed = Vec::new();
    for (name, check) in CHECKS {
        if let Err(error) = step(name, || check(root)) {
            ui::error(&error);
            failed.push(*name);
        }
    }
    failed
}

/// Runs one step with its heading, and its time behind it.
fn step(name: &str, run: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    ui::heading(name);
    let start = Instant::now();
    let outcome = run();
    let verdict = if outcome.is_ok() { "ok" } else { "FAILED" };
    ui::note(&format!("    {name}: {verdict}, {}", seconds(start.elapsed())));
    outcome
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

fn check_format(root: &Path) -> anyhow::Result<()> {
    if optional_tool(root, "fmt", "rustup component add rustfmt, or apt-get install rustfmt")? {
        must(cargo(root, &["fmt", "--all", "--check"]))?;
    }
    Ok(())
}

fn check_clippy(root: &Path) -> anyhow::Result<()> {
    if optional_tool(root, "clippy", "rustup component add clippy, or apt-get install rust-clippy")? {
        must(cargo(root, &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    }
    Ok(())
}

fn check_documentation(root: &Path) -> anyhow::Result<()> {
    let mut command = cargo(root, &["doc", "--quiet", "--no-deps", "--workspace"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    must(command)
}

fn check_doctests(root: &Path) -> anyhow::Result<()> {
    must(cargo(root, &["test", "--quiet", "--doc", "--workspace"]))
}

fn check_deny(root: &Path) -> anyhow::Result<()> {
    if !has_subcommand(root, "deny") {
        ui::note("skipped: cargo-deny is not installed");
        return Ok(());
    }
    // Not `advisories`: their database is downloaded, and would make yesterday's green commit red.
    must(cargo(root, &["deny", "--workspace", "check", "bans", "licenses", "sources"]))
}

/// The programs that the tests in the lab start, as they are in the development profile.
pub(crate) fn build_programs(root: &Path) -> anyhow::Result<()> {
    must(cargo(root, &["build", "--quiet", "--workspace", "--bins"]))
}

/// Whether a part of the toolchain is there. A developer without it is told; CI must have it.
fn optional_tool(root: &Path, name: &str, hint: &str) -> anyhow::Result<bool> {
    if has_subcommand(root, name) {
        return Ok(true);
    }
    if std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false") {
        bail!("failed to find `cargo {name}`, which CI must have\nhint: {hint}");
    }
    ui::note(&format!("skipped: `cargo {name}` is not installed\nhint: {hint}"));
    Ok(false)
}

fn has_subcommand(root: &Path, name: &str) -> bool {
    let mut command = cargo(root, &[name, "--version"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// The one command that runs all tests, or all that do not need root.
fn test_command(root: &Path, args: &TestArgs) -> anyhow::Result<Command> {
    let programs = test_programs(root)?;
    let list = if has_subcommand(root, "nextest") {
        nextest_args(args, &programs)
    } else {
        ui::note("cargo-nextest is not installed: the tests run with cargo test, without time limits");
        libtest_args(args, &programs)
    };
    let mut command = cargo(root, &list.iter().map(String::as_str).collect::<Vec<_>>());
    // A commit that was green stays green; whoever looks for more chooses other seeds.
    if std::env::var_os(PROPTEST_SEED).is_none() {
        command.env(PROPTEST_SEED, PROPTEST_SEED_DEFAULT);
    }
    Ok(command)
}

/// A test program of a package: a file of its `tests` folder.
#[derive(Debug, Clone, PartialEq, Eq)]
struct TestProgram {
    package: String,
    name: String,
}

impl TestProgram {
    fn needs_root(&self) -> bool {
        let first = self.name.split('_').next().unwrap_or_default();
        ROOT_TEST_PREFIXES.contains(&first)
    }
}

fn nextest_args(args: &TestArgs, programs: &[TestProgram]) -> Vec<String> {
    let mut list: Vec<String> = ["nextest", "run", "--workspace"].map(String::from).to_vec();
    if args.fast {
        // Only programs that exist: nextest takes an unknown name for a mistake.
        let expression: Vec<String> = programs
            .iter()
            .filter(|program| program.needs_root())
            .map(|program| format!("binary_id({}::{})", program.package, program.name))
            .collect();
        if !expression.is_empty() {
            list.extend(["--filterset".into(), format!("not ({})", expression.join(" + "))]);
        }
    }
    list.extend(args.filters.iter().cloned());
    list
}

fn libtest_args(args: &TestArgs, programs: &[TestProgram]) -> Vec<String> {
    let mut list: Vec<String> = ["test", "--workspace", "--no-fail-fast", "--lib", "--bins"].map(String::from).to_vec();
    if args.fast {
        let mut names: Vec<&str> =
            programs.iter().filter(|program| !program.needs_root()).map(|program| program.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        list.extend(names.into_iter().flat_map(|name| ["--test".to_owned(), name.to_owned()]));
    } else {
        list.push("--tests".into());
    }
    // Labs share this machine's engines and bridges: nextest has groups for them, libtest only this.
    list.push("--".into());
    if !args.fast {
        list.push("--test-threads=1".into());
    }
    list.extend(args.filters.iter().cloned());
    list
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

fn test_programs(root: &Path) -> anyhow::Result<Vec<TestProgram>> {
    parse_programs(&metadata(root)?)
}

fn parse_programs(json: &[u8]) -> anyhow::Result<Vec<TestProgram>> {
    let metadata: Metadata = serde_json::from_slice(json).context("failed to read the output of cargo metadata")?;
    Ok(metadata
        .packages
        .into_iter()
        .flat_map(|Package { name: package, targets }| {
            targets
                .into_iter()
                .filter(|target| target.kind.iter().any(|kind| kind == "test"))
                .map(move |target| TestProgram { package: package.clone(), name: target.name })
        })
        .collect())
}

/// Output of `cargo metadata` about the workspace's own packages.
///
/// # Errors
/// cargo cannot be started, or finds a manifest that it cannot read.
pub(crate) fn metadata(root: &Path) -> anyhow::Result<Vec<u8>> {
    let output = cargo(root, &["metadata", "--no-deps", "--format-version", "1"])
        .stderr(Stdio::inherit())
        .output()
        .context("failed to start cargo metadata")?;
    if !output.status.success() {
        bail!("failed to run cargo metadata: {}", output.status);
    }
    Ok(output.stdout)
}

/// The same cargo that runs this program, in the root of the repository.
pub(crate) fn cargo(root: &Path, args: &[&str]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(program);
    command.current_dir(root).args(args).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if is_cargo_run_variable(&name.to_string_lossy()) {
            command.env_remove(name);
        }
    }
    command
}

fn is_cargo_run_variable(name: &str) -> bool {
    CARGO_RUN_VARIABLES.iter().any(|prefix| name.starts_with(prefix))
}

pub(crate) fn must(command: Command) -> anyhow::Result<()> {
    let line = line(&command);
    if !status(command)? {
        bail!("failed to pass `{line}`");
    }
    Ok(())
}

fn status(mut command: Command) -> anyhow::Result<bool> {
    let line = line(&command);
    let status = command.status().with_context(|| format!("failed to start `{line}`"))?;
    Ok(status.success())
}

fn line(command: &Command) -> String {
    let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
    format!("cargo {}", args.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs() -> Vec<TestProgram> {
        [("netlib", "kernel"), ("netlib", "plan"), ("skein-tests", "e2e_compose"), ("skein-tests", "durability")]
            .map(|(package, name)| TestProgram { package: package.into(), name: name.into() })
            .to_vec()
    }

    fn args(fast: bool, filters: &[&str]) -> TestArgs {
        TestArgs { fast, yes: false, filters: filters.iter().map(|f| (*f).to_owned()).collect() }
    }

    #[test]
    fn names_tell_what_needs_root() {
        for (name, expected) in [
            ("kernel", true),
            ("lab", true),
            ("lab_images", true),
            ("e2e", true),
            ("e2e_compose", true),
            ("engine", true),
            ("label", false),
            ("plan", false),
            ("my_lab", false),
        ] {
            let program = TestProgram { package: "p".into(), name: name.into() };
            assert_eq!(program.needs_root(), expected, "{name}");
        }
    }

    #[test]
    fn nextest_command_lines() {
        let check = |args: &TestArgs, programs: &[TestProgram], expected: &str| {
            assert_eq!(nextest_args(args, programs).join(" "), expected);
        };
        check(&args(false, &[]), &programs(), "nextest run --workspace");
        check(&args(false, &["dns"]), &programs(), "nextest run --workspace dns");
        check(
            &args(true, &["dns"]),
            &programs(),
            "nextest run --workspace --filterset not (binary_id(netlib::kernel) + binary_id(skein-tests::e2e_compose)) dns",
        );
        check(&args(true, &[]), &[], "nextest run --workspace");
    }

    #[test]
    fn libtest_command_lines() {
        let check = |args: &TestArgs, expected: &str| {
            assert_eq!(libtest_args(args, &programs()).join(" "), expected);
        };
        check(&args(false, &[]), "test --workspace --no-fail-fast --lib --bins --tests -- --test-threads=1");
        check(
            &args(true, &["dns", "ipam"]),
            "test --workspace --no-fail-fast --lib --bins --test durability --test plan -- dns ipam",
        );
    }

    #[test]
    fn test_programs_come_from_cargo_metadata() {
        let json = br#"{"packages":[{"name":"netlib","targets":[
            {"name":"netlib","kind":["lib"]},{"name":"kernel","kind":["test"]}]}]}"#;
        let expected = TestProgram { package: "netlib".into(), name: "kernel".into() };
        assert_eq!(parse_programs(json).unwrap(), [expected]);
        assert!(parse_programs(b"{").is_err());
    }

    #[test]
    fn variables_of_cargo_run_are_told_from_the_users() {
        assert!(is_cargo_run_variable("CARGO_PKG_NAME"));
        assert!(is_cargo_run_variable("CARGO_MANIFEST_DIR"));
        assert!(!is_cargo_run_variable("CARGO_HOME"));
        assert!(!is_cargo_run_variable("CARGO_TARGET_DIR"));
    }
}
