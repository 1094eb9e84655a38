//! `skein node|service|network|volume|stack|token|cert|explain|events|info|debug|backup`: one or two calls each.

use std::path::Path;

use skein_api::{
    Availability, CertRequest, Event, NetworkSpec, Node, NodeState, NodeUpdate, Service, ServiceMode, TokenCreate,
    client::{Client, TaskFilter},
};

use super::{App, each, labels, node_names, ps};
use crate::{
    args::{
        CertCommand, Command, DebugCommand, NetworkCommand, NodeCommand, ServiceCommand, StackCommand, TokenCommand,
        VolumeCommand,
    },
    context::{make_private_dir, write_private},
    fail::{Failure, code},
    out::{age, bytes, cpus, now, span, table},
};

/// Runs one of these commands.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Failure> {
    match command {
        Command::Node(command) => node(app, command).await,
        Command::Service(command) => service(app, command).await,
        Command::Network(command) => network(app, command).await,
        Command::Volume(VolumeCommand::Ls) => volumes(app).await.map(|()| 0),
        Command::Stack(StackCommand::Ls) => stacks(app).await.map(|()| 0),
        Command::Token(command) => token(app, command).await,
        Command::Cert(CertCommand::Issue { ttl, out, name }) => {
            let request = CertRequest { name, ttl_s: ttl.as_secs() };
            cert(app, &request, out.as_deref()).await.map(|()| 0)
        }
        Command::Explain { name, nodes, node } => {
            explain(app, &name, &skein_api::ExplainQuery { nodes, node }).await.map(|()| 0)
        }
        Command::WhatIf(question) => super::what_if::run(app, question).await.map(|()| 0),
        Command::Events { from } => events(app, from).await.map(|()| 0),
        Command::Info => info(app).await.map(|()| 0),
        Command::Debug(DebugCommand::Check) => check(app).await,
        Command::Backup { file } => {
            let bytes = app.client("skein backup")?.backup().await?;
            write_private(&file, &bytes, false)?;
            app.out.note(&format!("{} holds {} of backup", file.display(), crate::out::bytes(bytes.len() as u64)));
            Ok(0)
        }
        _ => unreachable!("the other commands have modules of their own"),
    }
}

async fn node(app: &App, command: NodeCommand) -> Result<u8, Failure> {
    let set = |names: Vec<String>, availability, why: &'static str| async move {
        let client = app.client(why)?;
        let update = NodeUpdate { availability: Some(availability), ..Default::default() };
        each(&names, |name| {
            let (client, update) = (&client, &update);
            async move { shown_node(app, &client.node_update(&name, update).await?) }
        })
        .await
    };
    match command {
        NodeCommand::Ls => {
            let client = app.client("skein node ls")?;
            list_nodes(app, &client).await.map(|()| 0)
        }
        NodeCommand::Inspect(args) => {
            let client = &app.client("skein node inspect")?;
            each(&args.names, |name| async move { app.out.value(&client.node(&name).await?) }).await
        }
        NodeCommand::Label { node, labels: changes } => {
            let (remove, add): (Vec<String>, Vec<String>) =
                changes.into_iter().partition(|c| c.ends_with('-') && !c.contains('='));
            let labels_remove = remove.into_iter().map(|c| c.trim_end_matches('-').to_owned()).collect();
            let update = NodeUpdate { labels_add: labels(&add)?, labels_remove, availability: None };
            let node = app.client("skein node label")?.node_update(&node, &update).await?;
            shown_node(app, &node).map(|()| 0)
        }
        NodeCommand::Drain(args) => set(args.names, Availability::Drain, "skein node drain").await,
        NodeCommand::Activate(args) => set(args.names, Availability::Active, "skein node activate").await,
        NodeCommand::Pause(args) => set(args.names, Availability::Pause, "skein node pause").await,
        NodeCommand::Rm { force, names } => {
            let client = &app.client("skein node rm")?;
            each(&names, |name| async move {
                client.node_remove(&name, force).await?;
                app.out.note(&format!("node {name} is removed"));
                Ok(())
            })
            .await
        }
    }
}

/// Says what a node is now: the object as JSON, or a message.
fn shown_node(app: &App, node: &Node) -> Result<(), Failure> {
    if app.out.json {
        return app.out.value(node);
    }
    let labels: Vec<String> = node.spec.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    app.out.note(&format!("node {}: {}, labels: {}", node.name, availability(node), labels.join(" ")));
    Ok(())
}

fn availability(node: &Node) -> &'static str {
    match node.spec.availability {
        Availability::Active => "active",
        Availability::Pause => "pause",
        Availability::Drain => "drain",
    }
}

async fn list_nodes(app: &App, client: &Client) -> Result<(), Failure> {
    let mut nodes = client.nodes().await?;
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    let mut headers =
        vec!["ID", "NAME", "STATE", "AVAILABILITY", "SITE", "CPUS", "MEMORY", "ADDRESS", "ENGINE", "LABELS"];
    let troubled = nodes.iter().any(|n| !n.description.troubles.is_empty());
    if troubled {
        headers.push("TROUBLES");
    }
    app.out.list(&nodes, &headers, |n| {
        let state = match n.status.as_ref().map(|s| s.state) {
            Some(NodeState::Ready) => "ready",
            Some(NodeState::Down) => "down",
            Some(NodeState::Unknown) | None => "unknown",
        };
        let d = &n.description;
        let address = d.underlay4.map(|a| a.to_string()).or_else(|| d.underlay6.map(|a| a.to_string()));
        // The operator's labels win over the agent's own of the same key.
        let mut all = d.labels.clone();
        all.extend(n.spec.labels.clone());
        let labels: Vec<String> = all.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let mut row = vec![
            n.id.short().to_owned(),
            n.name.clone(),
            format!("{state}{}", if d.troubles.is_empty() { "" } else { "!" }),
            availability(n).to_owned(),
            d.site.clone(),
            cpus(d.offered.nano_cpus),
            bytes(d.offered.mem_bytes),
            address.unwrap_or_else(|| "-".into()),
            d.engine_version.clone(),
            labels.join(","),
        ];
        if troubled {
            row.push(d.troubles.join("; "));
        }
        row
    })
}

async fn service(app: &App, command: ServiceCommand) -> Result<u8, Failure> {
    match command {
        ServiceCommand::Ls { stack } => {
            let client = app.client("skein service ls")?;
            let mut services = client.services(stack.as_deref()).await?;
            services.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
            if app.out.json {
                return app.out.value(&services).map(|()| 0);
            }
            let tasks = client.tasks(&TaskFilter { stack, ..Default::default() }).await?;
            let running = |s: &Service| {
                let of = |t: &&skein_api::Task| t.service.as_ref() == Some(&s.id);
                tasks.iter().filter(of).filter(|t| t.status.state == skein_api::TaskState::Running).count()
            };
            app.out.list(&services, &["ID", "NAME", "MODE", "RUNNING", "IMAGE", "PORTS"], |s| {
                let (mode, wanted) = match s.spec.mode {
                    ServiceMode::Replicated(n) => ("replicated", n.to_string()),
                    ServiceMode::Global => ("global", "all".into()),
                };
                let image = s.spec.task.container.image.clone();
                let running = format!("{}/{wanted}", running(s));
                let ports = ps::ingress(&s.spec.ingress);
                vec![s.id.short().into(), s.spec.name.clone(), mode.into(), running, image, ports]
            })?;
            Ok(0)
        }
        ServiceCommand::Inspect(args) => {
            let client = &app.client("skein service inspect")?;
            each(&args.names, |name| async move { app.out.value(&client.service(&name).await?) }).await
        }
        ServiceCommand::Rm(args) => {
            let client = &app.client("skein service rm")?;
            each(&args.names, |name| async move {
                client.service_remove(&name).await?;
                app.out.note(&format!("service {name} is removed"));
                Ok(())
            })
            .await
        }
    }
}

async fn network(app: &App, command: NetworkCommand) -> Result<u8, Failure> {
    match command {
        NetworkCommand::Ls => {
            let mut networks = app.client("skein network ls")?.networks().await?;
            networks.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
            let heads = ["ID", "NAME", "STACK", "SUBNET", "SUBNET6", "VNI", "INTERNAL", "USED"];
            app.out.list(&networks, &heads, |n| {
                let crowded = if n.crowded { ", crowded" } else { "" };
                let used = n.usage.as_ref().map(|u| format!("{} of {}{crowded}", u.used, u.addresses));
                vec![
                    n.id.short().to_owned(),
                    n.spec.name.clone(),
                    n.spec.stack.clone().unwrap_or_default(),
                    n.subnet4.to_string(),
                    n.subnet6.to_string(),
                    n.vni.to_string(),
                    if n.spec.internal { "yes" } else { "" }.to_owned(),
                    used.unwrap_or_default(),
                ]
            })?;
            Ok(0)
        }
        NetworkCommand::Create { subnet, internal, attachable, label, name } => {
            let spec =
                NetworkSpec { name, labels: labels(&label)?, stack: None, subnet4: subnet, internal, attachable };
            let network = app.client("skein network create")?.network_create(&spec).await?;
            if app.out.json {
                app.out.value(&network)?
            } else {
                app.out.line(network.id.as_str())?
            }
            Ok(0)
        }
        NetworkCommand::Inspect(args) => {
            let client = &app.client("skein network inspect")?;
            each(&args.names, |name| async move { app.out.value(&client.network(&name).await?) }).await
        }
        NetworkCommand::Rm(args) => {
            let client = &app.client("skein network rm")?;
            each(&args.names, |name| async move {
                client.network_remove(&name).await?;
                app.out.note(&format!("network {name} is removed"));
                Ok(())
            })
            .await
        }
    }
}

async fn volumes(app: &App) -> Result<(), Failure> {
    let client = app.client("skein volume ls")?;
    let mut volumes = client.volumes().await?;
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    if app.out.json {
        return app.out.value(&volumes);
    }
    let names = node_names(&client).await?;
    let now = now();
    app.out.list(&volumes, &["NAME", "STACK", "NODE", "AGE"], |v| {
        let node = names.get(&v.node).map_or(v.node.short(), String::as_str);
        vec![v.name.clone(), v.stack.clone().unwrap_or_default(), node.to_owned(), age(v.meta.created_at, now)]
    })
}

async fn stacks(app: &App) -> Result<(), Failure> {
    let stacks = app.client("skein stack ls")?.stacks().await?;
    app.out.list(&stacks, &["NAME"], |s| vec![s.clone()])
}

async fn token(app: &App, command: TokenCommand) -> Result<u8, Failure> {
    match command {
        TokenCommand::Create { ttl, uses, label } => {
            let request = TokenCreate { ttl_s: ttl.as_secs(), uses, node_labels: labels(&label)? };
            let created = app.client("skein token create")?.token_create(&request).await?;
            if app.out.json {
                app.out.value(&created)?;
            } else {
                app.out.line(&created.token)?;
                let hosts = if uses == 1 { "one host".to_owned() } else { format!("{uses} hosts") };
                app.out.note(&format!(
                    "for {hosts} within {}, shown this once; there: skein-agent join --master HOST --token TOKEN",
                    span(ttl.as_secs())
                ));
            }
            Ok(0)
        }
        TokenCommand::Ls => {
            let tokens = app.client("skein token ls")?.tokens().await?;
            let now = now();
            app.out.list(&tokens, &["ID", "USES", "EXPIRES IN", "LABELS"], |t| {
                let left_s = t.expires_at.since_ms(now).div_ceil(1_000);
                let left = if left_s == 0 { "expired".to_owned() } else { span(left_s) };
                let labels: Vec<String> = t.node_labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
                vec![t.id.to_string(), format!("{}/{}", t.uses, t.uses_max), left, labels.join(",")]
            })?;
            Ok(0)
        }
        TokenCommand::Revoke(args) => {
            let client = &app.client("skein token revoke")?;
            each(&args.names, |id| async move {
                client.token_revoke(&id).await?;
                app.out.note(&format!("token {id} is revoked"));
                Ok(())
            })
            .await
        }
    }
}

async fn cert(app: &App, request: &CertRequest, dir: Option<&Path>) -> Result<(), Failure> {
    let client = app.client("skein cert issue")?;
    if let Some(dir) = dir {
        // Looked at before anything is issued: a certificate that cannot be kept is a loss.
        make_private_dir(dir)?;
        if let Some(there) = ["ca.pem", "cert.pem", "key.pem"].iter().find(|f| dir.join(f).exists()) {
            return Err(Failure::new(code::CONFLICT, format!("{} is there already", dir.join(there).display()), None));
        }
    }
    let bundle = client.cert_issue(request).await?;
    match dir {
        Some(dir) => {
            write_private(&dir.join("ca.pem"), bundle.ca_pem.as_bytes(), false)?;
            write_private(&dir.join("cert.pem"), bundle.certificate_pem.as_bytes(), false)?;
            write_private(&dir.join("key.pem"), bundle.key_pem.as_bytes(), false)?;
            app.out.note(&format!(
                "ca.pem, cert.pem and key.pem are in {0}; with them: skein context create --host tcp://HOST:{1} --certs {0} NAME",
                dir.display(),
                skein_api::DEFAULT_PORT
            ));
            Ok(())
        }
        None if app.out.json => app.out.value(&bundle),
        None => app.out.text(&format!("{}{}{}", bundle.certificate_pem, bundle.key_pem, bundle.ca_pem)),
    }
}

async fn explain(app: &App, name: &str, query: &skein_api::ExplainQuery) -> Result<(), Failure> {
    let explanation = app.client("skein explain")?.explain(name, query).await?;
    app.out.show(&explanation, || explained(&explanation))
}

/// An explanation for people: one sentence, then what each filter took away.
pub(crate) fn explained(e: &skein_api::Explanation) -> String {
    let mut text = format!("{}: {}\n", e.subject, e.summary);
    if e.nodes > 0 || !e.filters.is_empty() {
        let rows =
            e.filters.iter().map(|f| vec![f.filter.clone(), f.rejected.to_string(), f.rejected_alone.to_string()]);
        text.push_str(&table(&["FILTER", "REJECTED", "ALONE"], &rows.collect::<Vec<_>>()));
        text.push_str(&format!("{} of {} nodes fit\n", e.fitting, e.nodes));
    }
    for (at, suggestion) in e.suggestions.iter().enumerate() {
        text.push_str(&format!("{} {suggestion}\n", if at == 0 { "to change that:" } else { "            or:" }));
    }
    if let Some(preemption) = &e.preemption {
        text.push_str(&format!("preemption: {}\n", preemption.message));
    }
    if !e.per_node.is_empty() {
        let reasons = |n: &skein_api::NodeExplanation| match n.reasons.is_empty() {
            true => "fits".to_owned(),
            false => n.reasons.join("; "),
        };
        let rows = e.per_node.iter().map(|n| vec![n.node.clone(), reasons(n)]);
        text.push_str(&table(&["NODE", "REASONS"], &rows.collect::<Vec<_>>()));
    }
    text
}

async fn events(app: &App, from: Option<u64>) -> Result<(), Failure> {
    let mut stream = app.client("skein events")?.events(from).await?;
    while let Some(event) = stream.next().await? {
        if app.out.json { app.out.value_line(&event)? } else { app.out.line(&event_line(&event))? }
    }
    app.out.note("the master ended the stream");
    Ok(())
}

/// `412  task  web.1 (0123…)  running`.
fn event_line(event: &Event) -> String {
    let text = |path: &str| event.object.as_ref().and_then(|o| o.pointer(path)).and_then(|v| v.as_str());
    let name = text("/name").or_else(|| text("/spec/name")).unwrap_or_default();
    let what = match &event.object {
        None => "removed",
        Some(_) => text("/status/state").unwrap_or("changed"),
    };
    let id = event.id.get(..12).unwrap_or(&event.id);
    let line = format!("{}  {:<8}  {id:<12}  {name}  {what}", event.revision, event.kind);
    match text("/status/err").or_else(|| text("/status/message")).filter(|m| !m.is_empty()) {
        Some(message) => format!("{line}: {message}"),
        None => line,
    }
}

async fn info(app: &App) -> Result<(), Failure> {
    let client = app.client("skein info")?;
    let info = client.info().await?;
    if app.out.json {
        return app.out.value(&info);
    }
    let counts = |map: &std::collections::BTreeMap<String, u64>| {
        let all: Vec<String> = map.iter().map(|(k, v)| format!("{v} {k}")).collect();
        if all.is_empty() { "none".to_owned() } else { all.join(", ") }
    };
    let resources = |r: &skein_api::Resources| format!("{} CPUs, {}", cpus(r.nano_cpus), bytes(r.mem_bytes));
    let mut text = format!(
        "master:    {} (version {})\ncluster:   {}\nca:        sha256:{}\nstore:     revision {}, epoch {}\n\
         nodes:     {}\ntasks:     {}\noffered:   {}\nreserved:  {}\n",
        client.endpoint(),
        info.version,
        info.id,
        info.ca_sha256,
        info.revision,
        info.epoch,
        counts(&info.nodes),
        counts(&info.tasks),
        resources(&info.offered),
        resources(&info.reserved),
    );
    if let Some(why) = &info.read_only {
        text.push_str(&format!("read-only: {why}\n"));
    }
    app.out.text(&text)
}

/// Every broken invariant is a line; then the command fails.
async fn check(app: &App) -> Result<u8, Failure> {
    let client = app.client("skein debug check")?;
    let broken = client.check().await?;
    if app.out.json {
        app.out.value(&broken)?;
    } else if broken.is_empty() {
        let info = client.info().await?;
        let count = |map: &std::collections::BTreeMap<String, u64>| map.values().sum::<u64>();
        let (nodes, tasks, revision) = (count(&info.nodes), count(&info.tasks), info.revision);
        app.out.line(&format!("all invariants hold: {nodes} nodes, {tasks} tasks, revision {revision}"))?;
    } else {
        broken.iter().try_for_each(|line| app.out.line(line))?;
    }
    if broken.is_empty() {
        return Ok(0);
    }
    let hint = "save the state with `skein backup FILE` on the master's host, and report it";
    Err(Failure::new(code::FAILED, format!("{} invariants of the master's state are broken", broken.len()), Some(hint)))
}

#[cfg(test)]
mod tests {
    use skein_api::{Explanation, FilterCount};

    use super::*;

    #[test]
    fn explanations() {
        let filter =
            |filter: &str, rejected, rejected_alone| FilterCount { filter: filter.into(), rejected, rejected_alone };
        let explanation = Explanation {
            subject: "shop_web".into(),
            summary: "no node fits".into(),
            nodes: 3,
            filters: vec![filter("constraint node.labels.disk==ssd", 2, 2), filter("memory 4GiB", 1, 3)],
            fitting: 0,
            suggestions: vec!["free 1 GiB of memory on h1".into(), "skein node activate h2".into()],
            preemption: Some(skein_api::Preemption {
                message: "waits for room on h1, stops log.1".into(),
                node: Some("h1".into()),
                victims: vec!["log.1".into()],
            }),
            per_node: vec![
                skein_api::NodeExplanation { node: "h1".into(), reasons: vec!["not ready".into(), "drained".into()] },
                skein_api::NodeExplanation { node: "h2".into(), reasons: Vec::new() },
            ],
        };
        assert_eq!(
            explained(&explanation),
            "\
shop_web: no node fits
FILTER                             REJECTED   ALONE
constraint node.labels.disk==ssd   2          2
memory 4GiB                        1          3
0 of 3 nodes fit
to change that: free 1 GiB of memory on h1
            or: skein node activate h2
preemption: waits for room on h1, stops log.1
NODE   REASONS
h1     not ready; drained
h2     fits
"
        );
    }

    #[test]
    fn event_lines() {
        let check = |object: Option<serde_json::Value>, expected: &str| {
            let event = Event { revision: 7, kind: "task".into(), id: "0123456789abcdef".into(), object };
            assert_eq!(event_line(&event), expected);
        };
        check(None, "7  task      0123456789ab    removed");
        let task = serde_json::json!({"name": "web.1", "status": {"state": "failed", "message": "exited with 1"}});
        check(Some(task), "7  task      0123456789ab  web.1  failed: exited with 1");
        check(Some(serde_json::json!({"spec": {"name": "n"}})), "7  task      0123456789ab  n  changed");
    }
}
