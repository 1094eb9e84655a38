//! `cargo xtask fuzz`: fuzz targets, listed or run for as long as asked; docs/testing.md says what they are.
//!
//! A target is a test in a module named `fuzz` of a package that depends on `skein-fuzz`, which also reads the variables
//! that are set here. So there is no list to keep: cargo says which packages, each test program which tests.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use clap::Args;
use serde::Deserialize;

use crate::cli::repository_root;
use crate::{test, ui};

/// Package that runs targets: who depends on it has some.
const ENGINE: &str = "skein-fuzz";

/// Module that targets are in.
const MODULE: &str = "fuzz::";

/// How long a target runs unless told, seconds.
const SECONDS_DEFAULT: u64 = 60;

/// Arguments of `fuzz`.
#[derive(Debug, Clone, Args)]
pub struct FuzzArgs {
    /// The target; all, one after the other, when only a time is given
    pub target: Option<String>,
    /// Time for each target
    #[arg(long, value_name = "N", conflicts_with = "hours")]
    pub seconds: Option<u64>,
    /// Time for each target
    #[arg(long, value_name = "H")]
    pub hours: Option<u64>,
    /// The same inputs again; otherwise each run takes other ones
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Only the input in this file
    #[arg(long, value_name = "FILE", requires = "target", conflicts_with_all = ["seconds", "hours", "seed"])]
    pub input: Option<PathBuf>,
}

impl FuzzArgs {
    fn seconds(&self) -> u64 {
        self.hours.map(|h| h.saturating_mul(3_600)).or(self.seconds).unwrap_or(SECONDS_DEFAULT)
    }

    /// Nothing to run was named.
    fn only_list(&self) -> bool {
        self.target.is_none() && self.seconds.is_none() && self.hours.is_none()
    }
}

/// A target: a test of a test program.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    name: String,
    /// Its whole path, as the program knows it.
    test: String,
    package: String,
    program: PathBuf,
}

/// Builds the test programs, then lists targets or runs them.
///
/// # Errors
/// When a build fails, or there is no such target. A target that fails is the exit code.
pub fn run(args: &FuzzArgs) -> anyhow::Result<ExitCode> {
    let root = repository_root();
    let targets = targets(&root)?;
    if args.only_list() {
        targets.iter().for_each(|t| ui::note(&format!("{:24} {}", t.name, t.package)));
        ui::note("hint: cargo xtask fuzz TARGET --seconds N, or --seconds N alone for all");
        return Ok(ExitCode::SUCCESS);
    }
    let chosen = match &args.target {
        Some(name) => vec![find(&targets, name)?],
        None => targets.iter().collect(),
    };
    let mut failed = Vec::new();
    for target in chosen {
        ui::heading(&format!("{} ({})", target.name, target.package));
        if !run_one(target, args)? {
            failed.push(target.name.as_str());
        }
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    ui::note(&format!("failed: {}", failed.join(", ")));
    Ok(ExitCode::FAILURE)
}

fn find<'t>(targets: &'t [Target], name: &str) -> anyhow::Result<&'t Target> {
    let names = || targets.iter().map(|t| t.name.as_str()).collect::<Vec<_>>().join(", ");
    targets
        .iter()
        .find(|t| t.name == name)
        .with_context(|| format!("failed to find the fuzz target {name}\nhint: there are {}", names()))
}

fn run_one(target: &Target, args: &FuzzArgs) -> anyhow::Result<bool> {
    let mut command = Command::new(&target.program);
    command.args([&target.test, "--exact", "--nocapture"]).stdin(Stdio::null());
    match &args.input {
        Some(file) => {
            let file = file.canonicalize().with_context(|| format!("failed to find {}", file.display()))?;
            command.env("SKEIN_FUZZ_INPUT", file);
        }
        None => {
            command.env("SKEIN_FUZZ_SEED", args.seed.unwrap_or_else(any_seed).to_string());
            command.env("SKEIN_FUZZ_SECONDS", args.seconds().to_string());
        }
    }
    let status = command.status().with_context(|| format!("failed to start {}", target.program.display()))?;
    if status.code().is_none() {
        // A signal: too deep, too long, or too large to be caught. The input was written down before.
        let input = target.program.with_file_name(format!("fuzz-{}.input", target.name));
        ui::note(&format!("{status}\nagain: cargo xtask fuzz {} --input {}", target.name, input.display()));
    }
    Ok(status.success())
}

/// Another one each time.
fn any_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_secs() ^ u64::from(now.subsec_nanos()) << 20
}

/// All targets, by name.
fn targets(root: &Path) -> anyhow::Result<Vec<Target>> {
    let packages = packages(&test::metadata(root)?)?;
    let mut arguments = vec!["test", "--lib", "--no-run", "--message-format=json-render-diagnostics"];
    arguments.extend(packages.iter().flat_map(|p| ["-p", p]));
    let output =
        test::cargo(root, &arguments).stderr(Stdio::inherit()).output().context("failed to start cargo test")?;
    if !output.status.success() {
        bail!("failed to build the fuzz targets");
    }
    let mut targets = Vec::new();
    for (package, program) in programs(&String::from_utf8_lossy(&output.stdout)) {
        let list = Command::new(&program).args(["--list", "--format", "terse"]).output();
        let list = list.with_context(|| format!("failed to start {}", program.display()))?;
        let found = tests(&String::from_utf8_lossy(&list.stdout));
        targets.extend(found.into_iter().map(|(name, test)| Target {
            name,
            test,
            package: package.clone(),
            program: program.clone(),
        }));
    }
    targets.sort();
    Ok(targets)
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
}

/// Packages with targets, of cargo metadata.
fn packages(metadata: &[u8]) -> anyhow::Result<Vec<String>> {
    let metadata: Metadata = serde_json::from_slice(metadata).context("failed to read the output of cargo metadata")?;
    let with_targets = |p: &Package| p.dependencies.iter().any(|d| d.name == ENGINE);
    Ok(metadata.packages.into_iter().filter(with_targets).map(|p| p.name).collect())
}

#[derive(Deserialize)]
struct Artifact {
    target: ArtifactTarget,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct ArtifactTarget {
    name: String,
}

/// Test programs in cargo's messages, each with the name of its library.
fn programs(messages: &str) -> Vec<(String, PathBuf)> {
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Artifact>(line).ok());
    artifacts.filter_map(|a| Some((a.target.name, a.executable?))).collect()
}

/// Targets in a program's list of tests (`path::to::test: test`): name and path.
fn tests(list: &str) -> Vec<(String, String)> {
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    let target = |test: &str| {
        let (before, name) = test.rsplit_once(MODULE)?;
        let is_module = before.is_empty() || before.ends_with("::");
        (is_module && !name.contains("::")).then(|| (name.to_owned(), test.to_owned()))
    };
    names.filter_map(target).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: FuzzArgs,
    }

    fn parse(words: &[&str]) -> Result<FuzzArgs, clap::Error> {
        Line::try_parse_from([&["fuzz"], words].concat()).map(|line| line.args)
    }

    #[test]
    fn times() {
        let check = |words: &[&str], seconds: u64, only_list: bool| {
            let args = parse(words).unwrap();
            assert_eq!((args.seconds(), args.only_list()), (seconds, only_list), "{words:?}");
        };
        check(&[], 60, true);
        check(&["frames"], 60, false);
        check(&["--seconds", "5"], 5, false);
        check(&["frames", "--hours", "2", "--seed", "7"], 7_200, false);
        for bad in
            [&["--hours", "1", "--seconds", "1"][..], &["--input", "x"], &["frames", "--input", "x", "--seed", "1"]]
        {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn targets_are_tests_in_modules_named_fuzz() {
        let list = "fuzz::frames: test\nstore::fuzz::backups: test\nfuzz::inner::x: test\ndefuzz::y: test\nz: test\n\
            fuzz::slow: benchmark\n";
        let found = [("frames", "fuzz::frames"), ("backups", "store::fuzz::backups")];
        assert_eq!(tests(list), found.map(|(name, test)| (name.to_owned(), test.to_owned())));
    }

    #[test]
    fn packages_are_those_that_depend_on_the_engine() {
        let json = br#"{"packages":[{"name":"a","dependencies":[{"name":"skein-fuzz"},{"name":"serde"}]},
            {"name":"skein-fuzz","dependencies":[{"name":"bolero"}]}]}"#;
        assert_eq!(packages(json).unwrap(), ["a"]);
    }

    #[test]
    fn programs_are_artifacts_that_can_be_run() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"serde"},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"netlib"},"executable":"/t/netlib-1"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(programs(messages), [("netlib".to_owned(), PathBuf::from("/t/netlib-1"))]);
    }

    #[test]
    fn an_unknown_target_is_answered_with_the_known_ones() {
        let target =
            |name: &str| Target { name: name.into(), test: String::new(), package: String::new(), program: "p".into() };
        let targets = [target("backups"), target("frames")];
        assert_eq!(find(&targets, "frames").unwrap().name, "frames");
        assert!(format!("{:#}", find(&targets, "frame").unwrap_err()).contains("backups, frames"));
    }
}
