//! Set-up of a host for the lab, the tests and the demo: says what is missing, asks, installs, verifies.
//!
//! Order: facts ([`needs`], [`kernel`]) → decision ([`plan`], pure) → the plan on the screen → consent → changes
//! ([`packages`], undone by [`guard`] where temporary) → facts again. Nothing is changed before everything is checked.
//! Runs on the main thread, blocking, before any other thread is started.

pub mod guard;
pub mod kernel;
pub mod needs;
pub mod packages;
pub mod plan;

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, bail};

pub use needs::find_binary;
use plan::{Consent, Facts, Plan};

use crate::ui;

/// Makes sure that this host can run the lab. Idempotent, and quick when everything is there.
///
/// `yes` installs without a question; so does a missing terminal.
///
/// # Errors
/// A [`plan::Refusal`] (nothing was changed), a declined question, or a failed installation. The messages are for the
/// user and carry their hints.
pub fn ensure(yes: bool) -> anyhow::Result<()> {
    let facts = gather(yes)?;
    let plan = plan::plan(&facts)?;
    if packages::leftovers() {
        let _lock = packages::lock_host()?;
        packages::recover_leftovers()?;
    }
    let (missing, update_lists, ask) = match plan {
        Plan::Nothing => {
            ui::note("set-up: everything is installed, and the kernel has what is needed");
            return Ok(());
        }
        Plan::Install { missing, update_lists, ask } => (missing, update_lists, ask),
    };
    show(&missing);
    if ask && !confirmed(&mut std::io::stdin().lock())? {
        bail!("failed to set up this host: declined, and nothing was changed");
    }
    let _lock = packages::lock_host()?;
    packages::recover_leftovers()?;
    // Another set-up may have done it while this one waited.
    let missing: Vec<_> = needs::missing().into_iter().filter(|need| missing.contains(need)).collect();
    if !missing.is_empty() {
        packages::install(&missing, update_lists)?;
    }
    let left = needs::missing();
    if !left.is_empty() {
        let names: Vec<&str> = left.iter().map(|need| need.binary).collect();
        bail!(
            "failed to set up this host: the packages are installed, but {} is still not found in PATH or the usual \
             directories",
            names.join(", ")
        );
    }
    ui::note("set-up: done");
    Ok(())
}

fn gather(yes: bool) -> anyhow::Result<Facts> {
    let root = nix::unistd::geteuid().is_root();
    let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    Ok(Facts {
        root,
        sudo: find_binary("sudo").is_some(),
        path: std::env::var_os("PATH").unwrap_or_default().to_string_lossy().into_owned(),
        args: std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect(),
        missing: needs::missing(),
        kernel_gaps: if root { kernel::probe().context("failed to probe the kernel")? } else { Vec::new() },
        apt: packages::apt_installed(),
        lists_present: packages::lists_present(),
        consent: if yes || !terminal { Consent::Given } else { Consent::Ask },
    })
}

fn show(missing: &[&'static needs::Need]) {
    ui::note("set-up: missing on this host:");
    for need in missing {
        ui::note(&format!("  {:<16} {}", need.binary, need.purpose));
    }
    ui::note(&format!("to be installed from the distribution: {}", needs::first_packages(missing).join(" ")));
    ui::note("no daemon is started or enabled, and the firewall stays as it is");
}

/// Asks; an empty answer means yes, the end of input means no.
fn confirmed(input: &mut impl BufRead) -> anyhow::Result<bool> {
    ui::ask("install them? [Y/n] ");
    std::io::stderr().flush().context("failed to write the question")?;
    let mut answer = String::new();
    if input.read_line(&mut answer).context("failed to read the answer")? == 0 {
        return Ok(false);
    }
    Ok(matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        for (answer, expected) in
            [("\n", true), ("y\n", true), (" Yes \n", true), ("n\n", false), ("what\n", false), ("", false)]
        {
            assert_eq!(confirmed(&mut answer.as_bytes()).unwrap(), expected, "{answer:?}");
        }
    }
}
