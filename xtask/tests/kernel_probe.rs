//! The set-up's probe against the real kernel. Needs root, as the name says (docs/testing.md).

use std::process::Command;

use xtask::setup::kernel::probe;

/// Output of a program that must succeed.
fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn this_kernel_has_everything_and_the_probe_leaves_nothing() {
    // Twice: what the first left would be in the way of the second.
    for round in 1..=2 {
        assert_eq!(probe().unwrap(), [], "round {round}");
    }
    let links = output("ip", &["-j", "link", "show"]);
    assert!(!links.contains("\"probe-"), "{links}");
    let tables = output("nft", &["-j", "list", "tables"]);
    assert!(!tables.contains("skein_probe"), "{tables}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("skein-probe-"), "{mounts}");
}

#[test]
fn a_probe_without_the_privilege_names_it() {
    // As a user without capabilities: the probe must refuse before it touches the host's own namespaces.
    let output = Command::new("setpriv")
        .args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"])
        .args([env!("CARGO_BIN_EXE_xtask"), "setup", "--yes"])
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("network namespaces: Operation not permitted (EPERM)"), "{message}");
    assert!(message.contains("nothing was changed"), "{message}");
    assert!(message.contains("hint: run on the machine itself"), "{message}");
}
