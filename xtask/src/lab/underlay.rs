//! The network between the hosts of a lab: a bridge in a namespace of its own, the *switch*, and a veth pair to every
//! host. The machine's own network is not touched.
//!
//! Faults are made at the switch, where no host can see or undo them: `cut` drops frames between two ports in an nft
//! table of the bridge family (stateless, so established flows stop at once), `limit` is a token bucket at both ends
//! of a host's cable. No tasks, no channels; everything is done by `ip`, `nft` and `tc`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::process::run;
use super::spec::{LabState, SWITCH};

/// Where `ip netns` keeps names of namespaces.
const NETNS_DIR: &str = "/run/netns";

/// Name of the underlay's interface in every host.
pub const UNDERLAY_INTERFACE: &str = "eth0";

/// The bridge in the switch's namespace.
pub(super) const BRIDGE: &str = "underlay";

/// Bytes that may pass at once under a limit: the largest segment the kernel builds (64 KiB) must fit, and at 1 Gbit/s
/// the bucket must last for a 4 ms tick (500 KB).
const BURST_BYTES_MIN: u64 = 64 * 1024;

/// Longest time a packet waits under a limit.
const LIMIT_LATENCY: &str = "50ms";

/// Name of the network namespace of a host. The dot is in no lab's name: `a` and `a-b` cannot be confused.
pub(super) fn netns(lab: &str, host: &str) -> String {
    format!("sklab-{lab}.{host}")
}

/// Path of the network namespace of a host.
pub(super) fn netns_path(lab: &str, host: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(netns(lab, host))
}

/// The switch's port to the host at `index`. Interface names have 15 bytes, host names more.
pub(super) fn port(index: usize) -> String {
    format!("p{index}")
}

/// `/etc/hosts` of a host: all hosts of the lab under both addresses.
pub(super) fn hosts_file(state: &LabState) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    for (i, host) in state.spec.hosts.iter().enumerate() {
        let _ = writeln!(text, "{} {}\n{} {}", state.ipv4(i), host.name, state.ipv6(i), host.name);
    }
    text
}

/// `/etc/resolv.conf` of a host: its own address, where nothing listens, so that a query is refused at once; a resolver
/// that times out adds 10 s to every look-up of an image. Not a loopback address: an engine would put public servers
/// in its place for containers, and those would time out. No options: containers inherit them, and shall wait for
/// names as long as they do on a host of their user's.
pub(super) fn resolv_conf(state: &LabState, host: &str) -> String {
    let index = state.spec.hosts.iter().position(|spec| spec.name == host).unwrap_or_default();
    format!("nameserver {}\n", state.ipv4(index))
}

/// Makes the switch, the hosts' network namespaces and the cables between them.
///
/// # Errors
/// Names the command that failed. What was made before stays; `remove` takes it away.
pub(super) fn create(state: &LabState) -> Result<()> {
    let lab = &state.spec.name;
    let mtu = state.spec.mtu;
    let mut script = format!("netns add {}\n", netns(lab, SWITCH));
    for host in &state.spec.hosts {
        let _ = writeln!(script, "netns add {}", netns(lab, &host.name));
    }
    batch(None, &script)?;

    // Without snooping, since a bridge without a querier would lose neighbour discovery; without STP, which would
    // block ports for 30 s; no forwarding delay for the same reason.
    let mut script = format!(
        "link add {BRIDGE} mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\nlink set {BRIDGE} up\nlink set lo up\n"
    );
    for (i, host) in state.spec.hosts.iter().enumerate() {
        let (port, netns) = (port(i), netns(lab, &host.name));
        let _ = writeln!(
            script,
            "link add {port} mtu {mtu} type veth peer name {UNDERLAY_INTERFACE} mtu {mtu} netns {netns}\n\
             link set {port} alias {} master {BRIDGE} up",
            host.name
        );
    }
    batch(Some(&netns(lab, SWITCH)), &script)?;

    for (i, host) in state.spec.hosts.iter().enumerate() {
        // `nodad`: an address that may be used at once.
        let script = format!(
            "link set lo up\nlink set {UNDERLAY_INTERFACE} up\n\
             addr add {}/24 dev {UNDERLAY_INTERFACE}\naddr add {}/64 dev {UNDERLAY_INTERFACE} nodad\n",
            state.ipv4(i),
            state.ipv6(i)
        );
        batch(Some(&netns(lab, &host.name)), &script)?;
    }
    nft(
        lab,
        "table bridge skein_lab {
            set cut { type ifname . ifname; }
            set alone { type ifname; }
            chain forward {
                type filter hook forward priority 0; policy accept;
                iifname . oifname @cut drop
                iifname @alone drop
                oifname @alone drop
            }
        }",
    )
    .map(drop)
}

pub(super) fn batch(netns: Option<&str>, script: &str) -> Result<()> {
    use std::io::Write;
    let mut file = tempfile::NamedTempFile::new().context("failed to create a temporary file")?;
    file.write_all(script.as_bytes()).context("failed to write a temporary file")?;
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    run(command.arg("-batch").arg(file.path())).map(drop).with_context(|| format!("failed to apply:\n{script}"))
}

fn nft(lab: &str, script: &str) -> Result<String> {
    run(in_netns(lab, SWITCH, "nft").arg(script))
}

/// A command in the network namespace of a host or the switch, and in no other namespace of it.
pub(super) fn in_netns(lab: &str, host: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns_path(lab, host).display())).arg("--").arg(program);
    command
}

/// Drops all frames between two hosts, or between one and all others. Doing so twice changes nothing.
pub(super) fn cut(lab: &str, a: usize, b: Option<usize>) -> Result<()> {
    let script = match b {
        Some(b) if a == b => bail!("failed to cut a host from itself"),
        Some(b) => {
            let (a, b) = (port(a), port(b));
            format!("add element bridge skein_lab cut {{ {a} . {b}, {b} . {a} }}")
        }
        None => format!("add element bridge skein_lab alone {{ {} }}", port(a)),
    };
    nft(lab, &script).map(drop)
}

/// Ends every cut.
pub(super) fn heal(lab: &str) -> Result<()> {
    nft(lab, "flush set bridge skein_lab cut; flush set bridge skein_lab alone").map(drop)
}

/// The cuts in force; hosts as their positions.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Cuts {
    /// Sorted, the smaller position first.
    pub(super) pairs: Vec<(usize, usize)>,
    /// Hosts that are cut from all others.
    pub(super) alone: Vec<usize>,
}

/// Reads the cuts back from the switch.
pub(super) fn cuts(lab: &str) -> Result<Cuts> {
    let text = run(in_netns(lab, SWITCH, "nft").args(["-j", "list", "table", "bridge", "skein_lab"]))?;
    parse_cuts(&text)
}

fn parse_cuts(json: &str) -> Result<Cuts> {
    let tree: serde_json::Value = serde_json::from_str(json).context("failed to parse what nft listed")?;
    let index = |value: &serde_json::Value| value.as_str()?.strip_prefix('p')?.parse::<usize>().ok();
    let Cuts { mut pairs, mut alone } = Cuts::default();
    for set in tree["nftables"].as_array().into_iter().flatten().filter_map(|item| item.get("set")) {
        for element in set["elem"].as_array().into_iter().flatten() {
            match element["concat"].as_array().map(Vec::as_slice) {
                Some([a, b]) => pairs.extend(index(a).zip(index(b)).filter(|(a, b)| a < b)),
                _ => alone.extend(index(element)),
            }
        }
    }
    pairs.sort_unstable();
    alone.sort_unstable();
    Ok(Cuts { pairs, alone })
}

/// Limits what the host at `index` receives and sends to `bits_per_second` each; `None` ends it.
pub(super) fn limit(lab: &str, index: usize, host: &str, bits_per_second: Option<u64>) -> Result<()> {
    // Both ends are egress queues: the switch's towards the host, and the host's own.
    for (place, device) in [(SWITCH, port(index)), (host, UNDERLAY_INTERFACE.to_owned())] {
        let mut command = in_netns(lab, place, "tc");
        match bits_per_second {
            Some(rate) => {
                let burst = BURST_BYTES_MIN.max(rate / 8 / 250);
                command.args(["qdisc", "replace", "dev", &device, "root", "tbf", "rate", &format!("{rate}bit")]);
                command.args(["burst", &format!("{burst}b"), "latency", LIMIT_LATENCY]);
                run(&mut command)?;
            }
            None if limited(lab, place, &device)? => {
                run(command.args(["qdisc", "del", "dev", &device, "root"]))?;
            }
            None => {}
        }
    }
    Ok(())
}

fn limited(lab: &str, place: &str, device: &str) -> Result<bool> {
    let text = run(in_netns(lab, place, "tc").args(["qdisc", "show", "dev", device, "root"]))?;
    Ok(text.starts_with("qdisc tbf"))
}

/// What the queue of the switch towards a host says of itself, empty without a limit.
pub(super) fn limit_text(lab: &str, index: usize) -> Result<String> {
    let text = run(in_netns(lab, SWITCH, "tc").args(["qdisc", "show", "dev", &port(index), "root"]))?;
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let rate = words.iter().position(|word| *word == "rate").and_then(|i| words.get(i + 1));
    Ok(if text.starts_with("qdisc tbf") { rate.copied().unwrap_or_default().to_owned() } else { String::new() })
}

/// Parses a rate as `tc(8)` writes it: `10mbit`, `1gbit`, `500kbit`, `64kbit`, `800bit`; a bare number is bits.
///
/// # Errors
/// Says what was expected. The least rate is 8 kbit/s: below, a full-sized packet takes seconds.
pub fn parse_rate(text: &str) -> Result<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "bit" => Some(1),
        "kbit" => Some(1_000),
        "mbit" => Some(1_000_000),
        "gbit" => Some(1_000_000_000),
        _ => None,
    };
    let rate = factor.zip(number.parse::<u64>().ok()).and_then(|(factor, number)| number.checked_mul(factor));
    match rate {
        Some(rate) if rate >= 8_000 => Ok(rate),
        _ => bail!("failed to parse rate {text:?}: expected a number with bit, kbit, mbit or gbit, at least 8kbit"),
    }
}

/// Names of the network namespaces of a lab.
pub(super) fn namespaces(lab: &str) -> Vec<String> {
    let prefix = netns(lab, "");
    all_namespaces().into_iter().filter(|name| name.starts_with(&prefix)).collect()
}

fn all_namespaces() -> Vec<String> {
    let entries = fs::read_dir(NETNS_DIR).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// Names of the labs that have left a network namespace.
pub(super) fn labs() -> Vec<String> {
    let names = all_namespaces();
    names.iter().filter_map(|name| Some(name.strip_prefix("sklab-")?.split_once('.')?.0.to_owned())).collect()
}

/// Removes a network namespace's name; the namespace and its devices go with the last process in it.
pub(super) fn remove(name: &str) -> Result<()> {
    run(Command::new("ip").args(["netns", "del", name])).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        let check = |text: &str, expected: Option<u64>| assert_eq!(parse_rate(text).ok(), expected, "{text:?}");
        check("10mbit", Some(10_000_000));
        check("1Gbit", Some(1_000_000_000));
        check("64kbit", Some(64_000));
        check("8000", Some(8_000));
        for bad in ["", "mbit", "10", "10mb", "-1kbit", "1.5mbit", "99999999999999999999bit", "99999999999999gbit"] {
            check(bad, None);
        }
    }

    #[test]
    fn cuts_are_read_back() {
        let json = r#"{"nftables":[{"metainfo":{}},{"table":{"name":"skein_lab"}},
            {"set":{"name":"cut","elem":[{"concat":["p2","p1"]},{"concat":["p1","p2"]}]}},
            {"set":{"name":"alone","elem":["p3"]}},{"set":{"name":"none"}}]}"#;
        let expected = Cuts { pairs: vec![(1, 2)], alone: vec![3] };
        assert_eq!(parse_cuts(json).expect("well formed"), expected);
    }
}
