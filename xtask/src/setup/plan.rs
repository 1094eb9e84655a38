//! The decision of the set-up: facts about the host in, a plan or a refusal out.
//!
//! Pure: it runs nothing, reads nothing and prints nothing, so that every kind of host can be put in a table of tests.
//! `super` gathers the facts and carries the plan out.

use std::collections::BTreeSet;

use super::kernel::Gap;
use super::needs::{Need, first_packages};

/// Whether packages may be installed without a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consent {
    /// `--yes` was given, or nobody is there to ask.
    Given,
    /// A person is at a terminal.
    Ask,
}

/// What the set-up knows about the host before its first change.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The effective user is root.
    pub root: bool,
    /// `sudo` is installed.
    pub sudo: bool,
    /// `PATH` as it is now; root's own may lack cargo.
    pub path: String,
    /// The arguments of this command after the program's name.
    pub args: Vec<String>,
    /// The needs that nothing on the host meets.
    pub missing: Vec<&'static Need>,
    /// What the kernel lacks. Empty when not root: the probes need privileges.
    pub kernel_gaps: Vec<Gap>,
    /// `apt-get` and `dpkg` are installed.
    pub apt: bool,
    /// The package manager has lists of packages to install from.
    pub lists_present: bool,
    /// Whether to ask.
    pub consent: Consent,
}

/// What the set-up is going to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Everything is there.
    Nothing,
    /// Packages have to be installed.
    Install {
        /// What is missing.
        missing: Vec<&'static Need>,
        /// Fetch the package lists first.
        update_lists: bool,
        /// Ask before the first change.
        ask: bool,
    },
}

/// Why the set-up does not start. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Root is needed.
    #[error("failed to set up this host: not root, and nothing was changed{}\nhint: {command}", list(.missing))]
    NotRoot {
        /// The command line that runs the same thing as root.
        command: String,
        /// What is missing besides.
        missing: Vec<&'static Need>,
    },
    /// The kernel, or the privileges of this container, do not suffice.
    #[error("failed to set up this host: the kernel lacks what the lab is made of, and nothing was changed{}",
        gaps(.0))]
    Kernel(Vec<Gap>),
    /// No package manager that is known here.
    #[error("failed to set up this host: no apt-get, and nothing was changed{}\n\
             hint: install these by hand, then run the command again", list(.missing))]
    NoPackageManager {
        /// What is missing.
        missing: Vec<&'static Need>,
    },
}

/// A package that no configured source offers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "failed to find a package for `{binary}` ({purpose}): no configured source offers {names}\n\
     hint: on Ubuntu the section `universe` has to be enabled: add-apt-repository universe"
)]
pub struct NoCandidate {
    /// The missing program.
    pub binary: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// The packages that were looked for.
    pub names: String,
}

/// Decides from the facts. The order of the checks is the order in which a user can do something about them.
///
/// # Errors
/// A [`Refusal`] when the set-up must not start.
pub fn plan(facts: &Facts) -> Result<Plan, Refusal> {
    if !facts.root {
        let command = root_command(facts.sudo, &facts.path, &facts.args);
        return Err(Refusal::NotRoot { command, missing: facts.missing.clone() });
    }
    if !facts.kernel_gaps.is_empty() {
        return Err(Refusal::Kernel(facts.kernel_gaps.clone()));
    }
    if facts.missing.is_empty() {
        return Ok(Plan::Nothing);
    }
    if !facts.apt {
        return Err(Refusal::NoPackageManager { missing: facts.missing.clone() });
    }
    Ok(Plan::Install {
        missing: facts.missing.clone(),
        update_lists: !facts.lists_present,
        ask: facts.consent == Consent::Ask,
    })
}

/// Chooses one package per need out of those that can be installed, each package once, in the order of the needs.
///
/// # Errors
/// [`NoCandidate`] for the first need that no available package meets.
pub fn choose_packages(
    missing: &[&'static Need],
    available: &BTreeSet<String>,
) -> Result<Vec<&'static str>, NoCandidate> {
    let mut chosen = Vec::new();
    for need in missing {
        let Some(package) = need.packages.iter().copied().find(|name| available.contains(*name)) else {
            return Err(NoCandidate { binary: need.binary, purpose: need.purpose, names: need.packages.join(" or ") });
        };
        if !chosen.contains(&package) {
            chosen.push(package);
        }
    }
    Ok(chosen)
}

/// The command line that runs the same command as root. cargo is often in the user's home, which root's `PATH` lacks.
pub fn root_command(sudo: bool, path: &str, args: &[String]) -> String {
    let args: String = args.iter().map(|arg| format!(" {}", quote(arg))).collect();
    if sudo {
        format!("sudo -E env \"PATH=$PATH\" cargo xtask{args}")
    } else {
        // `su` may set PATH anew before the shell starts, so the value stands in the command.
        format!("su -m -c {}", quote(&format!("PATH={} cargo xtask{args}", quote(path))))
    }
}

/// Quotes for a POSIX shell where that is necessary.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// `\n  dockerd (container engine)` for each, and the packages to install.
fn list(missing: &[&'static Need]) -> String {
    if missing.is_empty() {
        return String::new();
    }
    let lines: String = missing.iter().map(|need| format!("\n  missing: {} ({})", need.binary, need.purpose)).collect();
    format!("{lines}\n  packages on Debian and Ubuntu: {}", first_packages(missing).join(" "))
}

/// A line for each gap, then each hint once.
fn gaps(gaps: &[Gap]) -> String {
    let lines: String = gaps.iter().map(|gap| format!("\n  {}: {}", gap.feature, gap.detail)).collect();
    let hints: BTreeSet<&str> = gaps.iter().map(|gap| gap.hint).collect();
    lines + &hints.into_iter().map(|hint| format!("\nhint: {hint}")).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::super::needs::NEEDS;
    use super::*;

    fn ready() -> Facts {
        Facts {
            root: true,
            sudo: true,
            path: "/home/a b/.cargo/bin:/usr/bin".into(),
            args: vec!["demo".into(), "--once".into()],
            missing: Vec::new(),
            kernel_gaps: Vec::new(),
            apt: true,
            lists_present: true,
            consent: Consent::Given,
        }
    }

    fn needs(binaries: &[&str]) -> Vec<&'static Need> {
        NEEDS.iter().filter(|need| binaries.contains(&need.binary)).collect()
    }

    fn vxlan_gap() -> Gap {
        Gap { feature: "VXLAN devices", detail: "Operation not supported".into(), hint: "modprobe vxlan" }
    }

    fn check(name: &str, change: impl FnOnce(&mut Facts), expected: Result<Plan, &str>) {
        let mut facts = ready();
        change(&mut facts);
        match (plan(&facts), expected) {
            (Ok(got), Ok(want)) => assert_eq!(got, want, "{name}"),
            (Err(got), Err(want)) => assert!(got.to_string().contains(want), "{name}: {got}"),
            (got, want) => panic!("{name}: got {got:?}, want {want:?}"),
        }
    }

    fn install(binaries: &[&str], update_lists: bool, ask: bool) -> Result<Plan, &'static str> {
        Ok(Plan::Install { missing: needs(binaries), update_lists, ask })
    }

    #[test]
    fn hosts() {
        check("complete", |_| {}, Ok(Plan::Nothing));
        check("complete without apt", |f| f.apt = false, Ok(Plan::Nothing));
        check("complete, terminal", |f| f.consent = Consent::Ask, Ok(Plan::Nothing));
        check("one missing", |f| f.missing = needs(&["nft"]), install(&["nft"], false, false));
        check(
            "no lists yet",
            |f| {
                f.missing = needs(&["nft"]);
                f.lists_present = false;
            },
            install(&["nft"], true, false),
        );
        check(
            "a person is there",
            |f| {
                f.missing = needs(&["dockerd", "postgres"]);
                f.consent = Consent::Ask;
            },
            install(&["dockerd", "postgres"], false, true),
        );
    }

    #[test]
    fn refusals() {
        check("not root", |f| f.root = false, Err("sudo -E env \"PATH=$PATH\" cargo xtask demo --once"));
        check(
            "not root says what is missing too",
            |f| {
                f.root = false;
                f.missing = needs(&["dockerd"]);
            },
            Err("packages on Debian and Ubuntu: docker.io"),
        );
        check("kernel", |f| f.kernel_gaps = vec![vxlan_gap()], Err("VXLAN devices: Operation not supported"));
        check("kernel hint", |f| f.kernel_gaps = vec![vxlan_gap()], Err("hint: modprobe vxlan"));
        check(
            "the kernel is looked at before packages are installed",
            |f| {
                f.kernel_gaps = vec![vxlan_gap()];
                f.missing = needs(&["nft"]);
            },
            Err("nothing was changed"),
        );
        check(
            "no apt-get",
            |f| {
                f.apt = false;
                f.missing = needs(&["nft", "ip"]);
            },
            Err("packages on Debian and Ubuntu: iproute2 nftables"),
        );
    }

    #[test]
    fn command_lines_for_root() {
        let args = |list: &[&str]| list.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
        assert_eq!(root_command(true, "", &args(&["setup"])), "sudo -E env \"PATH=$PATH\" cargo xtask setup");
        assert_eq!(
            root_command(true, "", &args(&["lab", "exec", "h1", "--", "echo", "a b"])),
            "sudo -E env \"PATH=$PATH\" cargo xtask lab exec h1 -- echo 'a b'"
        );
        assert_eq!(
            root_command(false, "/home/x/bin:/bin", &args(&["test"])),
            "su -m -c 'PATH=/home/x/bin:/bin cargo xtask test'"
        );
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }

    #[test]
    fn packages_are_chosen_by_what_is_available() {
        let available = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
        let engine = needs(&["dockerd", "docker"]);
        assert_eq!(choose_packages(&engine, &available(&["docker.io"])).unwrap(), ["docker.io"]);
        assert_eq!(
            choose_packages(&engine, &available(&["docker.io", "docker-cli"])).unwrap(),
            ["docker.io", "docker-cli"]
        );
        let error = choose_packages(&needs(&["docker-registry"]), &available(&["nftables"])).unwrap_err();
        assert!(error.to_string().contains("`docker-registry` (image registry)"), "{error}");
        assert_eq!(choose_packages(&needs(&["ip", "tc"]), &available(&["iproute2"])).unwrap(), ["iproute2"]);
    }
}
