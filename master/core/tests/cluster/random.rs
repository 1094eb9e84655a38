//! Random histories: users, hosts that come, go and lose packets, agents whose words are late, doubled and out of
//! order, masters that start again or fail to commit. After every step all invariants hold and every ledger that was
//! filled step by step equals a full one (the harness asserts both in each turn); after the faults the cluster comes
//! to rest where it should.

use std::collections::BTreeMap;

use master_core::{
    Command,
    model::{Key, Object},
};
use proptest::prelude::*;
use skein_api::{
    AttachedContainer, Availability, DependencyCondition, GenericOffer, IngressPort, NetworkId, NetworkSpec,
    NodeDescription, NodeId, NodeUpdate, PlanAction, Preference, RestartCondition, ServiceMode, ServiceSpec,
    StackApply, Task, TaskId, TaskState, TaskStatus, UpdateConfig, UpdateOrder, VolumesFrom,
};

use crate::harness::{
    Cluster, Local, With, constraint, container, link, needs, network, port, replicas, restart, service, stack, volume,
};

/// Hosts at most: enough for spreading, ports and losses to meet.
const NODES_MAX: usize = 4;

#[derive(Clone, Debug)]
enum Op {
    Join,
    Cut(usize),
    Heal(usize),
    /// A session takes nothing, or takes again.
    Slow(usize, bool),
    /// What a session was sent is lost with it.
    LoseBatch(usize),
    Availability(usize, Availability),
    Label(usize, bool),
    Describe(usize, bool),
    RemoveNode(usize),
    Up {
        services: Vec<u8>,
        orphans: bool,
    },
    Down {
        volumes: bool,
    },
    ServiceRemove(usize),
    Container(u8, u8),
    Plain(bool),
    /// An agent makes a step and keeps what it has to say.
    Step(usize),
    /// All agents make a step and report.
    StepAll,
    Deliver(usize),
    /// An agent says which frozen addresses are in use.
    Answer(usize),
    /// The engine runs a container by itself, or ends it.
    PlainContainer(usize, usize),
    /// An old report comes again.
    Replay(usize, usize),
    /// A container ends.
    End(usize, usize, bool),
    /// An agent starts a container task again by its policy.
    Again(usize, usize),
    Pass(u64),
    Restart,
    /// The store refuses a commit: what was decided is forgotten.
    LoseCommit(Vec<u8>),
}

fn op() -> impl Strategy<Value = Op> {
    let node = 0..NODES_MAX;
    let availability = prop_oneof![Just(Availability::Active), Just(Availability::Pause), Just(Availability::Drain)];
    let services = || prop::collection::vec(any::<u8>(), 0..5);
    prop_oneof![
        2 => Just(Op::Join),
        2 => node.clone().prop_map(Op::Cut),
        3 => node.clone().prop_map(Op::Heal),
        2 => (node.clone(), any::<bool>()).prop_map(|(n, slow)| Op::Slow(n, slow)),
        1 => node.clone().prop_map(Op::LoseBatch),
        2 => (node.clone(), availability).prop_map(|(n, a)| Op::Availability(n, a)),
        1 => (node.clone(), any::<bool>()).prop_map(|(n, b)| Op::Label(n, b)),
        1 => (node.clone(), any::<bool>()).prop_map(|(n, b)| Op::Describe(n, b)),
        1 => node.clone().prop_map(Op::RemoveNode),
        5 => (services(), any::<bool>()).prop_map(|(services, orphans)| Op::Up { services, orphans }),
        1 => any::<bool>().prop_map(|volumes| Op::Down { volumes }),
        1 => (0..8_usize).prop_map(Op::ServiceRemove),
        4 => (0..5_u8, 0..3_u8).prop_map(|(a, b)| Op::Container(a, b)),
        1 => any::<bool>().prop_map(Op::Plain),
        6 => node.clone().prop_map(Op::Step),
        6 => Just(Op::StepAll),
        4 => node.clone().prop_map(Op::Deliver),
        2 => node.clone().prop_map(Op::Answer),
        2 => (node.clone(), any::<usize>()).prop_map(|(n, i)| Op::PlainContainer(n, i)),
        3 => (node.clone(), any::<usize>()).prop_map(|(n, i)| Op::Replay(n, i)),
        4 => (node.clone(), any::<usize>(), any::<bool>()).prop_map(|(n, i, ok)| Op::End(n, i, ok)),
        2 => (node, any::<usize>()).prop_map(|(n, i)| Op::Again(n, i)),
        4 => (1..20_000_u64).prop_map(Op::Pass),
        1 => Just(Op::Restart),
        1 => services().prop_map(Op::LoseCommit),
    ]
}

/// A service whose shape follows from the bits of a number.
fn spec(at: usize, bits: u8) -> ServiceSpec {
    let bit = |n: u8| bits & (1 << n) != 0;
    service(&format!("w{at}")).with(|s| {
        replicas(s, u32::from(bits % 4));
        if bit(2) {
            network(s, if at.is_multiple_of(2) { "s_a" } else { "s_b" });
            // Twice the same address is refused. What is static anywhere meets blocks that hosts have already.
            if bits % 4 < 2 && (!bits.is_multiple_of(3) || !bit(7)) && bits % 5 < 3 {
                let (a, b) = (["10.1.0.4", "10.1.0.9", "10.1.0.29"], ["10.1.1.2", "10.1.1.6", "10.1.1.13"]);
                let address = (if at.is_multiple_of(2) { a } else { b })[usize::from(bits >> 3) % 3];
                s.task.networks[0].ipv4 = address.parse().ok();
            }
        }
        if bit(2) && bits % 3 == 1 {
            let published = if bit(7) { 80 } else { 81 };
            s.ingress = vec![IngressPort { protocol: Default::default(), published, target: 80 }];
        }
        if bit(3) {
            s.task.ports = vec![port(80)];
        }
        if bit(4) {
            volume(s, if at.is_multiple_of(2) { "s_x" } else { "s_y" });
        }
        if bit(5) {
            restart(s, if bit(0) { RestartCondition::None } else { RestartCondition::OnFailure });
        }
        if bit(6) && at > 0 {
            let before = format!("w{}", at - 1);
            match bits % 5 {
                0 => needs(s, &before, DependencyCondition::ServiceStarted),
                1 => needs(s, &before, DependencyCondition::ServiceCompletedSuccessfully),
                2 if bit(1) => s.task.container.share.pid = Some(format!("s_{before}")),
                2 => link(s, &before),
                3 => {
                    s.task.container.volumes_from = vec![VolumesFrom { from: format!("s_{before}"), read_only: false }]
                }
                _ => needs(s, &before, DependencyCondition::ServiceHealthy),
            }
        }
        if bit(7) {
            match bits % 3 {
                0 => s.mode = ServiceMode::Global,
                1 => constraint(s, "node.labels.zone==a"),
                _ => {
                    s.task.container.image = "nginx".into();
                    s.task.placement.preferences = vec![Preference::Spread("zone".into())];
                }
            }
        }
        s.update = match bits % 13 {
            0..5 => UpdateConfig::default(),
            5..9 => UpdateConfig { order: UpdateOrder::StartFirst, ..UpdateConfig::default() },
            9 | 10 => UpdateConfig { order: UpdateOrder::StartFirst, parallelism: 1, delay_ms: 2_000 },
            _ => UpdateConfig { parallelism: 1, ..UpdateConfig::default() },
        };
        // Most of them want port 80: there is somebody to make room.
        s.task.placement.priority = i32::from(bits % 3) - 1;
        s.task.placement.preempt = bits % 5 == 1;
        if bits % 7 == 3 {
            s.task.resources.generic = BTreeMap::from([("gpu".into(), 1)]);
        }
    })
}

fn apply(services: &[u8], orphans: bool) -> Command {
    let services = services.iter().enumerate().map(|(at, bits)| spec(at, *bits)).collect();
    let mut stack = stack(services);
    // Blocks of two addresses and of one: few enough to be used up.
    for network in &mut stack.networks {
        let subnet = if network.name == "s_a" { "10.1.0.0/27" } else { "10.1.1.0/28" };
        network.subnet4 = Some(subnet.parse().expect("a subnet"));
        network.attachable = network.name == "s_a";
    }
    Command::StackApply(Box::new(StackApply { stack, remove_orphans: orphans, dry_run: false }))
}

/// What a host says of itself: each has two GPUs.
fn description(name: &str) -> NodeDescription {
    let ids = ["g0", "g1"].map(str::to_owned).into();
    Cluster::description(name).with(|d| d.generic = BTreeMap::from([("gpu".into(), GenericOffer::Named(ids))]))
}

struct Run {
    c: Cluster,
    joined: usize,
}

impl Run {
    fn nodes(&self) -> Vec<NodeId> {
        self.c.agents.keys().cloned().collect()
    }

    fn name(&self, at: usize) -> Option<String> {
        let nodes = self.nodes();
        let id = nodes.get(at.checked_rem(nodes.len())?)?;
        Some(self.c.model().nodes[id].name.clone())
    }

    /// What a host says that was started there by hand: one in each of its networks, as far as it knows.
    fn attached(&self, node: &NodeId) -> Vec<AttachedContainer> {
        let model = self.c.model();
        let address = |network: &NetworkId| model.node_blocks(network, node).next()?.block4.hosts().nth(3);
        let container = |network: &NetworkId| AttachedContainer {
            id: TaskId::new("by-hand"),
            network: network.clone(),
            names: vec!["debug".into()],
            v4: address(network),
            v6: None,
        };
        model.node_networks(node).map(container).collect()
    }

    /// A command that may be refused; then nothing changes.
    fn maybe(&mut self, command: Command) {
        let before = self.c.model().clone();
        if self.c.execute(&command).is_err() {
            assert_eq!(*self.c.model(), before, "refused and yet changed something: {command:?}");
        }
        self.c.turn();
    }

    /// The `pick`th task of a node whose agent has it running.
    fn running(&self, node: &NodeId, pick: usize) -> Option<(TaskId, Local)> {
        let agent = &self.c.agents[node];
        let running: Vec<_> = agent.tasks.iter().filter(|(_, l)| l.status.state == TaskState::Running).collect();
        let (id, local) = running.get(pick.checked_rem(running.len())?)?;
        Some(((*id).clone(), (*local).clone()))
    }

    fn on_node(&mut self, op: &Op, name: String) {
        let id = self.c.node(&name);
        let update = |update| Command::NodeUpdate { node: name.clone(), update };
        match op {
            Op::Cut(_) => self.c.cut(&name),
            Op::Heal(_) => self.c.heal(&name),
            Op::Slow(_, slow) => {
                self.c.agents.get_mut(&id).expect("listed").slow = *slow;
                self.c.turn();
            }
            Op::LoseBatch(_) => self.c.lose_batch(&id),
            Op::Availability(_, availability) => {
                self.maybe(update(NodeUpdate { availability: Some(*availability), ..NodeUpdate::default() }));
            }
            Op::Label(_, a) => {
                let value = if *a { "a" } else { "b" };
                self.maybe(update(NodeUpdate {
                    labels_add: [("zone".into(), value.into())].into(),
                    ..Default::default()
                }));
            }
            Op::Describe(_, small) => {
                let mut description = description(&name);
                description.underlay_mtu = if *small { 1_400 } else { 1_500 };
                description.underlay4 = description.underlay4.filter(|_| !small);
                description.attached = if *small { self.attached(&id) } else { Vec::new() };
                let known = &self.c.model().nodes[&id].description;
                description.frozen.clone_from(&known.frozen);
                description.plain_addresses.clone_from(&known.plain_addresses);
                self.maybe(Command::Describe { node: id, description: Box::new(description) });
            }
            Op::RemoveNode(_) => self.maybe(Command::NodeRemove { node: name, force: true }),
            Op::Step(_) => {
                let now = self.c.now;
                self.c.agents.get_mut(&id).expect("listed").step(now);
            }
            Op::Deliver(_) => {
                self.c.deliver(&id);
            }
            Op::Answer(_) => {
                self.c.answer(&id);
            }
            Op::PlainContainer(_, pick) => self.c.plain_container(&id, *pick),
            Op::Replay(_, pick) => {
                let said = &self.c.agents[&id].said;
                if let Some(report) = pick.checked_rem(said.len()).map(|i| said[i].clone()) {
                    self.maybe(Command::Reports { node: id, reports: vec![report.clone(), report] });
                }
            }
            Op::End(_, pick, ok) => {
                if let Some((task, local)) = self.running(&id, *pick) {
                    let (state, code) = if *ok { (TaskState::Complete, 0) } else { (TaskState::Failed, 1) };
                    let since = self.c.now.wall;
                    let status = TaskStatus { state, since, exit_code: Some(code), ..local.status };
                    self.c.agents.get_mut(&id).expect("listed").put(&task, Local { status, ..local });
                }
            }
            Op::Again(_, pick) => {
                let container = |t: &TaskId| self.c.model().tasks.get(t).is_some_and(|t| t.service.is_none());
                if let Some((task, local)) = self.running(&id, *pick).filter(|(t, _)| container(t)) {
                    let status = TaskStatus { state: TaskState::Accepted, ..TaskStatus::default() };
                    self.c.agents.get_mut(&id).expect("listed").put(&task, Local { run: local.run + 1, status });
                }
            }
            other => unreachable!("{other:?} is about no node"),
        }
    }

    fn container_command(&self, what: u8, at: u8) -> Command {
        let name = format!("c{at}");
        let attach = what == 4 && self.c.model().network("s_a").is_some();
        match what {
            0 => Command::ContainerStop(name),
            1 => Command::ContainerStart(name),
            2 => Command::ContainerRemove { task: name, force: true },
            _ => Command::ContainerCreate(Box::new(container(&name).with(|t| {
                if at == 1 {
                    t.spec.ports = vec![port(80)];
                    t.spec.restart.condition = RestartCondition::OnFailure;
                }
                if at == 2 {
                    t.spec.resources.generic = BTreeMap::from([("gpu".into(), 1)]);
                    t.spec.restart.condition = RestartCondition::Any;
                }
                if attach {
                    let mut attached = service("x");
                    network(&mut attached, "s_a");
                    t.spec.networks = attached.task.networks;
                }
            }))),
        }
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Join => {
                if self.c.agents.len() < NODES_MAX {
                    self.joined += 1;
                    let name = format!("n{}", self.joined);
                    let node = self.c.join(&name);
                    self.maybe(Command::Describe { node, description: Box::new(description(&name)) });
                }
            }
            Op::Up { services, orphans } => self.maybe(apply(services, *orphans)),
            Op::Down { volumes } => {
                self.maybe(Command::StackRemove { name: "s".into(), volumes: *volumes, dry_run: false });
            }
            Op::ServiceRemove(at) => self.maybe(Command::ServiceRemove(format!("s_w{at}"))),
            Op::Container(what, at) => {
                let command = self.container_command(*what, *at);
                self.maybe(command);
            }
            Op::Plain(make) => self.maybe(if *make {
                Command::NetworkCreate(NetworkSpec { name: "plain".into(), attachable: true, ..Default::default() })
            } else {
                Command::NetworkRemove("plain".into())
            }),
            Op::StepAll => {
                self.c.agents_step();
            }
            Op::Pass(ms) => self.c.pass(*ms),
            Op::Restart => self.c.restart_master(),
            Op::LoseCommit(services) => {
                // Whatever the answer is, nobody hears it.
                let _ = self.c.execute(&apply(services, true));
                let now = self.c.now;
                self.c.core.settle(now, 7);
                self.c.core.take_staged();
                self.c.restart_master();
            }
            about_a_node => {
                let (Op::Cut(at)
                | Op::Heal(at)
                | Op::Slow(at, _)
                | Op::LoseBatch(at)
                | Op::Availability(at, _)
                | Op::Label(at, _)
                | Op::Describe(at, _)
                | Op::RemoveNode(at)
                | Op::Step(at)
                | Op::Deliver(at)
                | Op::Answer(at)
                | Op::PlainContainer(at, _)
                | Op::Replay(at, _)
                | Op::End(at, ..)
                | Op::Again(at, _)) = about_a_node
                else {
                    unreachable!("the others are above")
                };
                if let Some(name) = self.name(*at) {
                    self.on_node(op, name);
                }
            }
        }
    }

    /// The faults end; all that was said arrives; time passes.
    fn end_faults(&mut self) {
        for node in self.nodes() {
            self.c.agents.get_mut(&node).expect("listed").slow = false;
            self.c.connect(&node);
        }
        // Longer than any pause between attempts.
        self.c.pass(120_000);
    }

    /// What was asked for is what is.
    fn at_rest(&mut self) {
        let model = self.c.core.model().clone();
        for task in model.tasks.values() {
            let (state, desired) = (task.status.state, task.desired_state);
            let settled = match desired {
                TaskState::Running if task.node.is_none() => {
                    state == TaskState::Pending && !task.status.message.is_empty()
                }
                TaskState::Running => state >= TaskState::Running && state != TaskState::Orphaned,
                TaskState::Shutdown => state.is_terminal(),
                _ => false,
            };
            assert!(settled, "task {} shall be {desired:?} and is {:?}", task.name, task.status);
        }
        for service in model.services.values() {
            let live = model.service_tasks(&service.id).filter(|t| t.desired_state == TaskState::Running);
            let current = live.filter(|t| t.spec_generation == service.meta.generation);
            let open = current.filter(|t| !t.status.state.is_terminal()).count();
            let always = service.spec.task.restart.condition == RestartCondition::Any;
            if let (ServiceMode::Replicated(n), true) = (service.spec.mode, always) {
                // What cannot be served holds those back that are to follow.
                let held = service.spec.update.parallelism > 0 && open < n as usize;
                let stuck = |t: &&Task| t.status.state != TaskState::Running;
                let stuck = held && model.service_tasks(&service.id).any(|t| stuck(&t));
                assert!(open == n as usize || stuck, "{open} of {n} replicas of {}", service.spec.name);
            }
        }
        for (node, agent) in &self.c.agents {
            // A start that was taken back before its agent heard of it leaves the agent at the run before.
            let shown = |state: TaskState, service: bool| {
                if state.is_terminal() && !service { TaskState::Shutdown } else { state }
            };
            let task = |t: &Task| (t.id.clone(), shown(t.status.state, t.service.is_some()));
            let wanted: BTreeMap<_, _> = model.node_tasks(node).map(task).collect();
            let local = |(id, l): (&TaskId, &Local)| {
                let service = model.tasks.get(id).is_some_and(|t| t.service.is_some());
                (id.clone(), shown(l.status.state, service))
            };
            let there: BTreeMap<_, _> = agent.tasks.iter().map(local).collect();
            assert_eq!(there, wanted, "what node {node} runs is what the master thinks");
        }
        assert_eq!(self.c.turn(), 0, "settling once more changes nothing");
        let (model, stored) = (facts(&self.c.model().objects()), facts(&self.c.loaded().model().objects()));
        for (key, object) in &model {
            assert_eq!(stored.get(key), Some(object), "memory and store agree");
        }
        assert_eq!(model.len(), stored.len(), "memory and store agree");
        self.c.restart_master();
        assert_eq!(self.c.turn(), 0, "a master that starts again has nothing to change");
    }
}

/// Objects without the revision, which the store keeps beside each.
fn facts(objects: &[Object]) -> BTreeMap<Key, serde_json::Value> {
    let fact = |object: &Object| {
        let mut json: serde_json::Value = serde_json::from_slice(&object.encode()).expect("JSON");
        if let Some(meta) = json.get_mut("meta") {
            meta["revision"] = 0.into();
        }
        (object.key(), json)
    };
    objects.iter().map(fact).collect()
}

fn run(ops: &[Op]) {
    let mut run = Run { c: Cluster::new(), joined: 0 };
    for name in ["n1", "n2"] {
        run.c.join(name);
        run.joined += 1;
    }
    for op in ops {
        run.step(op);
    }
    run.end_faults();
    run.at_rest();
    // The last application again is a plan of keeps.
    let last = ops.iter().rev().find_map(|op| match op {
        Op::Up { services, .. } => Some(services),
        _ => None,
    });
    if let Some(services) = last
        && let Ok(master_core::Reply::Plan(_)) = run.c.execute(&apply(services, true))
    {
        run.c.turn();
        if let Ok(master_core::Reply::Plan(plan)) = run.c.execute(&apply(services, true)) {
            let kept = |i: &skein_api::PlanItem| i.action == PlanAction::Keep || i.kind == "volume";
            assert!(plan.items.iter().all(kept), "{plan:?}");
        }
        run.c.turn();
        run.c.pass(60_000);
        run.at_rest();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn random_histories_end_well(ops in prop::collection::vec(op(), 1..120)) {
        run(&ops);
    }
}
