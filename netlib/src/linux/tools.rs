//! Owns the programs we run: `nft` for our table, `iptables` and `ip6tables` for `DOCKER-USER`, each with a time limit.
//!
//! They run in the namespace of the calling thread. What a program is slow at, the elements of sets, is read beside it
//! (`elements`). One short-lived thread per stream, with a channel of as many results.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read, Write},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use netlink_sys::protocols::NETLINK_NETFILTER;
use serde_json::Value;

use super::{elements, socket::Socket};
use crate::{
    names,
    nft::{Forms, Hook, Table, TableView, listed_tag, rule_form},
    state::{Direction, Family},
};

/// Longest run of a tool. 1,000 services take nft 0.1 to 0.4 s; iptables may wait for another's lock.
const TOOL_TIMEOUT: Duration = Duration::from_secs(20);
/// Seconds iptables waits for its lock, less than [`TOOL_TIMEOUT`].
const IPTABLES_WAIT_S: &str = "10";
/// Bytes of a tool's error output that go into a message.
const STDERR_BYTES_MAX: usize = 600;
/// Streams of a tool: its two outputs and its input.
const STREAMS: usize = 3;

struct Finished {
    success: bool,
    stdout: Vec<u8>,
    stderr: String,
}

impl Finished {
    fn into_error(self, tool: &str) -> io::Error {
        let text: String = self.stderr.trim().chars().take(STDERR_BYTES_MAX).collect();
        io::Error::other(format!("{tool} failed: {text}"))
    }
}

fn run(program: &str, args: &[&str], input: &str) -> io::Result<Finished> {
    run_within(TOOL_TIMEOUT, program, args, input)
}

fn run_within(limit: Duration, program: &str, args: &[&str], input: &str) -> io::Result<Finished> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child =
        command.spawn().map_err(|error| io::Error::new(error.kind(), format!("cannot run {program}: {error}")))?;
    let result = talk(&mut child, input, limit);
    if result.is_err() {
        // It may be gone already; the wait below reaps it either way.
        let _ = child.kill();
    }
    let status = child.wait()?;
    let (stdout, stderr) = result.map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    Ok(Finished { success: status.success(), stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() })
}

/// Feeds a program and reads both outputs to their ends. A program that ignores its input and fills its output does not
/// block us: each of the three streams has a thread, which ends when the program does.
fn talk(child: &mut Child, input: &str, limit: Duration) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let deadline = Instant::now() + limit;
    let missing = || io::Error::other("a stream is missing");
    let mut stdin = child.stdin.take().ok_or_else(missing)?;
    let stdout: Box<dyn Read + Send> = Box::new(child.stdout.take().ok_or_else(missing)?);
    let stderr: Box<dyn Read + Send> = Box::new(child.stderr.take().ok_or_else(missing)?);
    let (done_tx, done_rx) = mpsc::sync_channel(STREAMS);
    for (nth, mut stream) in [stdout, stderr].into_iter().enumerate() {
        let done_tx = done_tx.clone();
        thread::Builder::new().name("tool-output".into()).spawn(move || {
            let mut bytes = Vec::new();
            let read = stream.read_to_end(&mut bytes).map(|_| bytes);
            // The receiver is gone only after a time-out.
            let _ = done_tx.send((nth, read));
        })?;
    }
    let input = input.to_owned();
    thread::Builder::new().name("tool-input".into()).spawn(move || {
        let written = match stdin.write_all(input.as_bytes()) {
            // It ended without reading: its exit status says why.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => Ok(Vec::new()),
        };
        drop(stdin);
        let _ = done_tx.send((STREAMS - 1, written));
    })?;
    let mut outputs: [Vec<u8>; STREAMS] = Default::default();
    for _ in 0..STREAMS {
        let left = deadline.saturating_duration_since(Instant::now());
        let (nth, read) = done_rx.recv_timeout(left).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
        outputs[nth] = read?;
    }
    let [out, err, _] = outputs;
    Ok((out, err))
}

/// Feeds one transaction to nft.
pub(super) fn nft_apply(text: &str) -> io::Result<()> {
    let finished = run("nft", &["-f", "-"], text)?;
    if finished.success { Ok(()) } else { Err(finished.into_error("nft")) }
}

/// All tables of our family without the elements of their sets: to list one table alone, nft 1.0.6 reads those of all.
fn nft_list() -> io::Result<Value> {
    let finished = run("nft", &["-j", "-t", "list", "ruleset", "inet"], "")?;
    if finished.success { Ok(serde_json::from_slice(&finished.stdout)?) } else { Err(finished.into_error("nft")) }
}

/// Reads our table; `None` if there is none.
pub(super) fn nft_read() -> io::Result<Option<TableView>> {
    let Some(mut view) = parse_table(&nft_list()?)? else { return Ok(None) };
    let mut socket = Socket::open_for(NETLINK_NETFILTER)?;
    for (name, (kind, found)) in &mut view.sets {
        *found = elements::read(&mut socket, names::NFT_TABLE, name, kind)?;
    }
    Ok(Some(view))
}

/// Packets that the counting rules of each chain of our table have counted since it was put there.
pub(super) fn nft_counted() -> io::Result<BTreeMap<String, u64>> {
    parse_counted(&nft_list()?)
}

fn parse_counted(json: &Value) -> io::Result<BTreeMap<String, u64>> {
    let mut counted = BTreeMap::new();
    let ours = |rule: &&Value| rule.get("table").and_then(Value::as_str) == Some(names::NFT_TABLE);
    for rule in objects(json)?.iter().filter_map(|object| object.get("rule")).filter(ours) {
        let statements = rule.get("expr").and_then(Value::as_array).into_iter().flatten();
        let packets = statements.filter_map(|s| s.pointer("/counter/packets")?.as_u64());
        if let (Some(chain), Some(sum)) = (rule.get("chain").and_then(Value::as_str), packets.reduce(u64::wrapping_add))
        {
            *counted.entry(chain.to_owned()).or_default() += sum;
        }
    }
    Ok(counted)
}

/// Rules in tables of others that may drop what comes in.
pub(super) fn nft_foreign_drops(port: u16) -> io::Result<Vec<String>> {
    let finished = run("nft", &["list", "ruleset"], "")?;
    if !finished.success {
        return Err(finished.into_error("nft"));
    }
    Ok(foreign_drops(&String::from_utf8_lossy(&finished.stdout), port))
}

/// Of a listing: rules that drop or reject and policies that drop, in chains that packets pass on their way in; in all
/// other chains those that name the port, for they may be jumped to.
fn foreign_drops(listing: &str, port: u16) -> Vec<String> {
    let ours = format!("table inet {}", names::NFT_TABLE);
    let (mut table, mut chain, mut inwards) = (String::new(), String::new(), false);
    let mut found = Vec::new();
    for line in listing.lines().map(str::trim) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let has = |word: &str| words.iter().any(|w| w.trim_end_matches(';') == word);
        match words.first() {
            Some(&"table") => table = line.trim_end_matches('{').trim_end().to_owned(),
            Some(&"chain") => (chain, inwards) = (words.get(1).unwrap_or(&"").to_string(), false),
            Some(&"type") => {
                inwards = ["input", "prerouting", "ingress"].iter().any(|hook| has(hook));
                if table != ours && inwards && has("policy") && has("drop") {
                    found.push(format!("{table}, chain {chain}: policy drop"));
                }
            }
            _ if table == ours => {}
            _ if (has("drop") || has("reject")) && (inwards || has(&port.to_string())) => {
                found.push(format!("{table}, chain {chain}: {line}"));
            }
            _ => {}
        }
    }
    found
}

/// Finds out how nft prints each rule of a table: it has to be written somewhere. For an empty throw-away namespace.
pub(super) fn nft_learn(table: &Table) -> io::Result<Forms> {
    nft_apply(&table.frame().replace_text(&Forms::new()))?;
    let json = nft_list()?;
    let rules = objects(&json)?.iter().filter_map(|object| object.get("rule"));
    let form = |rule: &Value| Some((rule.get("comment")?.as_str()?.to_owned(), rule_form(rule.get("expr")?)));
    Ok(rules.filter_map(form).collect())
}

fn type_text(value: Option<&Value>) -> String {
    match value {
        Some(Value::Array(parts)) => parts.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" . "),
        Some(Value::String(text)) => text.clone(),
        _ => String::new(),
    }
}

/// The type of a set's keys, and of a map's values after ` : `.
fn set_kind(set: &Value) -> String {
    let kind = type_text(set.get("type"));
    if set.get("map").is_some() { format!("{kind} : {}", type_text(set.get("map"))) } else { kind }
}

fn objects(json: &Value) -> io::Result<&Vec<Value>> {
    let objects = json.get("nftables").and_then(Value::as_array);
    objects.ok_or_else(|| io::Error::other("nft answered without a list of objects"))
}

/// Our table without elements, out of a listing of all; `None` if it is not among them.
pub(super) fn parse_table(json: &Value) -> io::Result<Option<TableView>> {
    let text = |object: &Value, key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let ours = |object: &&Value| text(object, "table") == names::NFT_TABLE;
    let (mut there, mut view) = (false, TableView::default());
    for object in objects(json)? {
        if let Some(table) = object.get("table") {
            there |= text(table, "name") == names::NFT_TABLE;
        } else if let Some(set) = object.get("set").or_else(|| object.get("map")).filter(ours) {
            view.sets.insert(text(set, "name"), (set_kind(set), BTreeMap::new()));
        } else if let Some(chain) = object.get("chain").filter(ours) {
            let priority = chain.get("prio").and_then(Value::as_i64).and_then(|prio| i32::try_from(prio).ok());
            let accepts = text(chain, "policy") == "accept";
            let hook = priority.filter(|_| accepts).map(|priority| Hook {
                kind: text(chain, "type"),
                hook: text(chain, "hook"),
                priority,
            });
            view.chains.entry(text(chain, "name")).or_default().0 = hook;
        } else if let Some(rule) = object.get("rule").filter(ours) {
            view.chains.entry(text(rule, "chain")).or_default().1.push(listed_tag(rule));
        }
    }
    Ok(there.then_some(view))
}

fn iptables(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

/// Which of our rules stand in each `DOCKER-USER` chain that exists. A host without iptables has none.
pub(super) fn docker_user_read() -> BTreeMap<Family, BTreeSet<Direction>> {
    let mut found = BTreeMap::new();
    for family in [Family::V4, Family::V6] {
        let listed = run(iptables(family), &["-w", IPTABLES_WAIT_S, "-S", "DOCKER-USER"], "");
        let Ok(listed) = listed else { continue };
        if listed.success {
            found.insert(family, parse_docker_user(&String::from_utf8_lossy(&listed.stdout)));
        }
    }
    found
}

pub(super) fn parse_docker_user(listing: &str) -> BTreeSet<Direction> {
    let mut found = BTreeSet::new();
    for line in listing.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let has = |a: &str, b: &str| words.windows(2).any(|pair| pair == [a, b]);
        let any = format!("{}+", names::HOST_UPLINK_PREFIX);
        // Nothing else may narrow the rule: "-A CHAIN -i IF -m comment --comment skein -j ACCEPT" has ten words.
        let plain = words.len() == 10 && has("--comment", names::NFT_TABLE) && has("-j", "ACCEPT");
        if plain && has("-i", &any) {
            found.insert(Direction::In);
        } else if plain && has("-o", &any) {
            found.insert(Direction::Out);
        } else if has("-j", "RETURN") || has("-j", "DROP") || has("-j", "REJECT") {
            // What stands behind a rule that ends the chain may never be reached; ours go first again.
            break;
        }
    }
    found
}

/// Puts a rule of ours first in `DOCKER-USER`.
pub(super) fn docker_user_accept(family: Family, direction: Direction) -> io::Result<()> {
    let any = format!("{}+", names::HOST_UPLINK_PREFIX);
    let rule = docker_user_rule(direction, &any);
    let tool = iptables(family);
    docker_user_remove(family, direction)?;
    let insert = [&["-w", IPTABLES_WAIT_S, "-I", "DOCKER-USER", "1"], &rule[..]].concat();
    let finished = run(tool, &insert, "")?;
    if finished.success { Ok(()) } else { Err(finished.into_error(tool)) }
}

/// Takes a rule of ours out of `DOCKER-USER`. That there is none is fine.
pub(super) fn docker_user_remove(family: Family, direction: Direction) -> io::Result<()> {
    let any = format!("{}+", names::HOST_UPLINK_PREFIX);
    let rule = docker_user_rule(direction, &any);
    let delete = [&["-w", IPTABLES_WAIT_S, "-D", "DOCKER-USER"], &rule[..]].concat();
    run(iptables(family), &delete, "").map(drop)
}

fn docker_user_rule(direction: Direction, links: &str) -> [&str; 8] {
    let flag = if direction == Direction::In { "-i" } else { "-o" };
    [flag, links, "-m", "comment", "--comment", names::NFT_TABLE, "-j", "ACCEPT"]
}

/// Removes our table. That there is none is fine.
pub(super) fn nft_remove() -> io::Result<()> {
    let table = names::NFT_TABLE;
    // "add" first: nft refuses to delete a table that is not there.
    nft_apply(&format!("add table inet {table}\ndelete table inet {table}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let json = serde_json::json!({"nftables": [
            {"table": {"family": "inet", "name": "skein"}},
            {"map": {"table": "skein", "name": "any4", "type": ["inet_proto", "inet_service"],
                     "map": "ipv4_addr . inet_service"}},
            {"set": {"table": "skein", "name": "vteps4", "type": "ipv4_addr"}},
            {"chain": {"table": "skein", "name": "vxlan", "type": "filter", "hook": "input", "prio": -5,
                       "policy": "accept"}},
            {"rule": {"table": "skein", "chain": "vxlan", "comment": "skein 12"}},
            {"table": {"family": "inet", "name": "other"}},
            {"set": {"table": "other", "name": "vteps6", "type": "ipv6_addr"}},
            {"rule": {"table": "other", "chain": "vxlan", "comment": "skein 13"}},
        ]});
        let view = parse_table(&json).expect("parses").expect("is there");
        let kinds: Vec<_> = view.sets.iter().map(|(name, (kind, _))| format!("{name}: {kind}")).collect();
        assert_eq!(kinds, ["any4: inet_proto . inet_service : ipv4_addr . inet_service", "vteps4: ipv4_addr"]);
        let hook = Hook { kind: "filter".into(), hook: "input".into(), priority: -5 };
        assert_eq!(view.chains["vxlan"], (Some(hook), vec!["skein 12".to_owned()]));
    }

    #[test]
    fn a_table_that_is_not_there_is_none() {
        let json = serde_json::json!({"nftables": [{"table": {"family": "inet", "name": "other"}}]});
        assert_eq!(parse_table(&json).expect("parses"), None);
    }

    #[test]
    fn our_rules_in_docker_user_count_only_plain_and_before_the_end() {
        let check = |listing: &str, expected: &[Direction]| {
            assert_eq!(parse_docker_user(listing), expected.iter().copied().collect(), "{listing}");
        };
        let ours = |flag: &str| format!("-A DOCKER-USER {flag} ske-+ -m comment --comment skein -j ACCEPT\n");
        let end = "-A DOCKER-USER -j RETURN\n";
        check(&format!("-N DOCKER-USER\n{}{}{end}", ours("-i"), ours("-o")), &[Direction::In, Direction::Out]);
        check(&format!("-N DOCKER-USER\n{}{end}{}", ours("-i"), ours("-o")), &[Direction::In]);
        check(&format!("-N DOCKER-USER\n-A DOCKER-USER -s 1.2.3.4/32 -i ske-+ -j ACCEPT\n{end}"), &[]);
    }

    #[test]
    fn a_rule_that_is_not_what_its_comment_says_is_not_ours() {
        let expr = serde_json::json!([{"match": {"right": {"set": ["udp", "tcp"]}}}, {"drop": null}]);
        let turned = serde_json::json!([{"match": {"right": {"set": ["tcp", "udp"]}}}, {"drop": null}]);
        let other = serde_json::json!([{"match": {"right": {"set": ["tcp", "udp"]}}}, {"accept": null}]);
        let form = rule_form(&expr);
        let check = |comment: &str, expr: &Value, ours: bool| {
            let tag = listed_tag(&serde_json::json!({"comment": comment, "expr": expr}));
            assert_eq!(tag == "skein 12", ours, "{comment}: {tag}");
        };
        check(&format!("skein 12 {form}"), &expr, true);
        check(&format!("skein 12 {form}"), &turned, true);
        check(&format!("skein 12 {form}"), &other, false);
        check(&format!("skein 12 {form} more"), &expr, false);
        check("skein 12", &other, true);
        check("other 12", &expr, false);
        let counting =
            |packets: u64| serde_json::json!([{"counter": {"packets": packets, "bytes": 60}}, {"drop": null}]);
        let form = rule_form(&counting(0));
        check(&format!("skein 12 {form}"), &counting(7), true);
    }

    #[test]
    fn foreign_rules_that_may_drop_are_found_and_ours_are_not() {
        let listing = "\
table inet skein {
\tchain vxlan {
\t\ttype filter hook input priority -5; policy accept;
\t\tudp dport 4789 ip saddr != @vteps4 counter packets 0 bytes 0 drop comment \"skein 1\"
\t}
}
table ip filter {
\tchain INPUT {
\t\ttype filter hook input priority filter; policy drop;
\t\ttcp dport 22 accept
\t\tip saddr 192.0.2.7 counter packets 3 bytes 180 drop
\t}
\tchain FORWARD {
\t\ttype filter hook forward priority filter; policy drop;
\t\tiifname \"docker0\" drop
\t}
\tchain blocked {
\t\ttcp dport 25 reject
\t\tudp dport 4789 drop
\t}
}
";
        let expected = [
            "table ip filter, chain INPUT: policy drop",
            "table ip filter, chain INPUT: ip saddr 192.0.2.7 counter packets 3 bytes 180 drop",
            "table ip filter, chain blocked: udp dport 4789 drop",
        ];
        assert_eq!(foreign_drops(listing, 4789), expected);
    }

    #[test]
    fn what_rules_counted_is_summed_by_chain() {
        let rule_of = |table: &str, chain: &str, packets: u64| {
            let counter = serde_json::json!({"counter": {"packets": packets, "bytes": 9}});
            serde_json::json!({"rule": {"table": table, "chain": chain, "expr": [counter, {"drop": null}]}})
        };
        let rule = |chain: &str, packets: u64| rule_of(names::NFT_TABLE, chain, packets);
        let plain =
            serde_json::json!({"rule": {"table": names::NFT_TABLE, "chain": "own", "expr": [{"accept": null}]}});
        let foreign = rule_of("filter", "into", 7);
        let json =
            serde_json::json!({"nftables": [rule("vxlan", 2), rule("vxlan", 3), rule("into", 0), plain, foreign]});
        let expected = [("into", 0), ("vxlan", 5)].map(|(chain, sum)| (chain.to_owned(), sum));
        assert_eq!(parse_counted(&json).expect("parses"), BTreeMap::from(expected));
    }

    #[test]
    fn a_tool_that_neither_reads_nor_ends_is_stopped() {
        let limit = Duration::from_millis(100);
        // More than a pipe takes, 64 KiB.
        let error = run_within(limit, "sleep", &["600"], &"x".repeat(1 << 20)).err().expect("it hangs");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    }

    #[test]
    fn a_tool_that_is_missing_says_its_name() {
        let error = run("no-such-tool-of-skein", &[], "").err().expect("it is missing");
        assert!(error.to_string().contains("no-such-tool-of-skein"), "{error}");
    }
}
