//! A hostile agent: messages that are none, and messages that lie.

use std::sync::Arc;

use bolero::{Driver, TypeGenerator, ValueGenerator, produce};
use prost::Message as _;
use serde_json::json;
use skein_api::{NetworkId, Task, TaskId};
use skein_fuzz::{Pick, Verdict, mutate_bytes, mutate_json};

use super::*;
use crate::fuzz::World;

/// Length before each message.
const LENGTH_BYTES: usize = 4;

/// A task as a liar names it: the ids of a world are random, so they stand in a message as a number among all tasks.
const TASK_MARK: &str = "task#";

/// What the agent of `node1` says.
#[derive(Clone, Debug, TypeGenerator)]
enum Lie {
    Heartbeat {
        seq: u64,
    },
    Ack {
        generation: u64,
        old_chain: bool,
    },
    Hello {
        protocol: u32,
        clock: u64,
    },
    Reports(#[generator(produce::<Vec<Report>>().with().len(0..6usize))] Vec<Report>),
    /// Very many of the same.
    Flood {
        report: Report,
        #[generator(0..200u16)]
        count: u16,
    },
    Description {
        #[generator(0..4u8)]
        host: u8,
        nano_cpus: u64,
        mem_bytes: u64,
        routes: u16,
        mtu: u32,
        vxlan_port: u16,
    },
}

/// A report, of any task, in any state, with addresses of anybody.
#[derive(Clone, Debug, TypeGenerator)]
struct Report {
    #[generator(0..9u8)]
    task: u8,
    #[generator(0..15u8)]
    state: u8,
    run: Run,
    #[generator(produce::<Vec<u16>>().with().len(0..4usize))]
    addresses: Vec<u16>,
    #[generator(0..5_000u16)]
    message_bytes: u16,
    exit_code: Option<i64>,
    healthy: Option<bool>,
    container_id: bool,
    since: u64,
}

/// A run that a report is about.
#[derive(Clone, Debug, TypeGenerator)]
enum Run {
    Present,
    Next,
    Last,
    Any(u64),
}

const STATES: [&str; 15] = [
    "new",
    "pending",
    "assigned",
    "accepted",
    "preparing",
    "ready",
    "starting",
    "running",
    "complete",
    "shutdown",
    "failed",
    "rejected",
    "remove",
    "orphaned",
    "asleep",
];

impl Report {
    fn json(&self) -> serde_json::Value {
        let run = match self.run {
            Run::Present => 1,
            Run::Next => 2,
            Run::Last => u64::MAX,
            Run::Any(run) => run,
        };
        let [high, low] = [10, 64].map(|b: u8| b);
        let address = |a: &u16| json!({ "network": "lan", "v4": format!("{high}.{low}.{}.{}", a >> 8, a & 0xff) });
        json!({ "task": format!("{TASK_MARK}{}", self.task), "run": run, "status": {
            "state": STATES[usize::from(self.state)], "since": self.since, "message": "m".repeat(self.message_bytes.into()),
            "exit_code": self.exit_code, "health": self.healthy.map(|h| if h { "healthy" } else { "unhealthy" }),
            "container_id": self.container_id.then_some("c"), "addresses": self.addresses.iter().map(address).collect::<Vec<_>>() } })
    }
}

impl Lie {
    fn message(&self) -> grpc::AgentMessage {
        use grpc::agent_message::Body;
        let reports = |list: Vec<serde_json::Value>| Body::ReportsJson(serde_json::to_vec(&list).expect("JSON"));
        let body = match self {
            Self::Heartbeat { seq } => Body::Heartbeat(grpc::Heartbeat { seq: *seq }),
            Self::Ack { generation, old_chain } => {
                let chain = if *old_chain { "older".to_owned() } else { String::new() };
                Body::Ack(grpc::Ack { generation: *generation, chain })
            }
            Self::Hello { protocol, clock } => {
                Body::Hello(grpc::Hello { protocol: *protocol, clock_unix_ms: *clock, ..grpc::Hello::default() })
            }
            Self::Reports(list) => reports(list.iter().map(Report::json).collect()),
            Self::Flood { report, count } => reports(vec![report.json(); usize::from(*count)]),
            Self::Description { host, nano_cpus, mem_bytes, routes, mtu, vxlan_port } => {
                let route = |n: u16| format!("10.{}.{}.0/24", n >> 8, n & 0xff);
                let document = json!({ "hostname": format!("node{host}"), "offered": { "nano_cpus": nano_cpus,
                    "mem_bytes": mem_bytes }, "underlay4": format!("10.0.0.{host}"), "underlay_mtu": mtu,
                    "vxlan_port": vxlan_port, "routes": (0..*routes).map(route).collect::<Vec<_>>() });
                Body::DescriptionJson(document.to_string().into_bytes())
            }
        };
        grpc::AgentMessage { body: Some(body) }
    }
}

/// Conversations: lies, kept ones with changed documents, and now and then with changed bytes.
struct Conversations(Vec<Vec<u8>>);

impl ValueGenerator for Conversations {
    type Output = Vec<u8>;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Vec<u8>> {
        let mut messages: Vec<grpc::AgentMessage> = Vec::new();
        for _ in 0..1 + Pick(driver).below(4) {
            messages.push(driver.produce::<Lie>()?.message());
        }
        let mut pick = Pick(driver);
        if pick.once_in(2) {
            messages.extend(parse(pick.sample(&self.0)).into_iter().flatten());
        }
        for message in &mut messages {
            use grpc::agent_message::Body;
            if let (true, Some(Body::ReportsJson(json) | Body::DescriptionJson(json))) =
                (pick.once_in(3), &mut message.body)
                && json.len() < 10_000
            {
                let mut tree: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
                let other = tree.clone();
                mutate_json(&mut pick, &mut tree, &other);
                *json = tree.to_string().into_bytes();
            }
        }
        let mut bytes = Vec::new();
        for message in messages {
            let mut one = message.encode_to_vec();
            if pick.once_in(8) {
                mutate_bytes(&mut pick, &mut one, &self.0);
            }
            bytes.extend((one.len() as u32).to_be_bytes());
            bytes.extend(one);
        }
        Some(bytes)
    }
}

/// The messages of a conversation as the transport hands them on; one that does not decode ends it.
fn parse(mut bytes: &[u8]) -> Vec<Option<grpc::AgentMessage>> {
    let mut messages = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() {
        let length = (u32::from_be_bytes(*length) as usize).min(rest.len());
        messages.push(grpc::AgentMessage::decode(&rest[..length]).ok());
        bytes = &rest[length..];
    }
    messages
}

/// Puts the ids of this world in the place of `task#N`, and of its network in that of `lan`.
fn resolve(world: &World, message: &mut grpc::AgentMessage) {
    let Some(grpc::agent_message::Body::ReportsJson(json)) = &mut message.body else { return };
    let (tasks, network) = world.read(|core| {
        let tasks: Vec<TaskId> = core.model().tasks.keys().cloned().collect();
        let lan = core.model().networks.values().find(|n| n.spec.name == "lan");
        (tasks, lan.map_or(NetworkId::new(""), |n| n.id.clone()))
    });
    let mut text = String::from_utf8_lossy(json).replace("\"lan\"", &format!("\"{network}\""));
    for (at, id) in tasks.iter().enumerate().rev() {
        text = text.replace(&format!("\"{TASK_MARK}{at}\""), &format!("\"{id}\""));
    }
    *json = text.into_bytes();
}

/// Tasks that are not on this node.
fn others(world: &World, node: &NodeId) -> Vec<Arc<Task>> {
    let node = node.clone();
    world.read(move |core| core.model().tasks.values().filter(|t| t.node.as_ref() != Some(&node)).cloned().collect())
}

/// Whatever an agent says, the invariants hold, and what is on other nodes stays as it is.
#[test]
fn agent_messages() {
    // Each report of a task is held as text, as a report, and as the task that it makes, whose specification comes along.
    let target = skein_fuzz::target!("agent_messages").inputs(80).memory(1 << 10, 64 << 20);
    let samples = target.samples();
    target.run(Conversations(samples), |input| {
        let world = World::new();
        let node = world.node("node1");
        let (number, tx) = world.open_session("node1");
        let (reported, refused) = (Vec::new(), Vec::new());
        let cluster = world.handle.clone();
        let mut reader = Reader { cluster, node: node.clone(), number, tx, reported, refused, undescribed: None };
        let before = others(&world, &node);
        let mut accepted = 0;
        for message in parse(input) {
            let Some(mut message) = message else { break };
            resolve(&world, &mut message);
            if world.wait(reader.handle(message)).is_err() {
                break;
            }
            accepted += 1;
            world.check();
        }
        world.check();
        // Replacements come; what was there is not touched.
        let after = others(&world, &node);
        assert!(before.iter().all(|t| after.contains(t)), "a task of another node changed");
        Verdict::from(accepted > 0)
    });
}

/// Signing requests of strangers: DER in, at most a certificate for the very key that signed it.
#[test]
fn certificate_requests() {
    let (certificate, key) = pki::new_ca("fuzz").expect("a CA can be made");
    let ca = Ca::load(&certificate, &key).expect("and loaded");
    let target = skein_fuzz::target!("certificate_requests").inputs(1_500).memory(1 << 10, 256 << 10);
    target.run_mutants(skein_fuzz::Form::Bytes, |input| {
        let Ok(digest) = pki::csr_key_digest(input) else { return Verdict::Refused };
        let Ok(pem) = ca.sign_node(input, "node1") else { return Verdict::Refused };
        let (chain, _) = pki::parse_pem(&pem, &key).expect("our certificates can be read");
        let identity = pki::identity(&chain[0]).expect("and name somebody");
        assert_eq!(identity, Identity::Node { id: "node1".into(), key_digest: digest });
        Verdict::Accepted
    });
}
