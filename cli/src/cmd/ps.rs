//! `skein ps`: tasks as a table.

use std::collections::BTreeMap;

use skein_api::{Health, IngressPort, PortPublish, Protocol, ServiceId, Task, UnixMillis, client::TaskFilter};

use super::{App, node_names, node_of};
use crate::{
    args::PsArgs,
    fail::Failure,
    out::{age, now},
    progress::state_word,
};

/// Lists tasks.
pub(crate) async fn ps(app: &App, args: &PsArgs) -> Result<(), Failure> {
    let client = app.client("skein ps")?;
    let filter =
        TaskFilter { stack: args.stack.clone(), service: args.service.clone(), node: args.node.clone(), all: args.all };
    let mut tasks = client.tasks(&filter).await?;
    tasks.sort_by(|a, b| (&a.name, a.meta.created_at, &a.id).cmp(&(&b.name, b.meta.created_at, &b.id)));
    if args.quiet {
        return tasks.iter().try_for_each(|t| app.out.line(t.id.as_str()));
    }
    if app.out.json {
        return app.out.value(&tasks);
    }
    let names = node_names(&client).await?;
    let services = client.services(args.stack.as_deref()).await?;
    let everywhere: BTreeMap<ServiceId, Vec<IngressPort>> =
        services.into_iter().map(|service| (service.id, service.spec.ingress)).collect();
    let now = now();
    app.out.list(&tasks, &["ID", "NAME", "IMAGE", "NODE", "PORTS", "STATE"], |t| {
        vec![
            t.id.short().to_owned(),
            t.name.clone(),
            t.spec.container.image.clone(),
            node_of(t, &names).unwrap_or("-").to_owned(),
            all_ports(t, &everywhere),
            // Last: why something does not run may be long.
            state(t, now),
        ]
    })
}

/// `running 5m (healthy)`, `failed 2m: exited with 1`.
fn state(task: &Task, now: UnixMillis) -> String {
    let status = &task.status;
    let live = !status.state.is_terminal() && status.state >= skein_api::TaskState::Assigned;
    let word =
        if live && task.desired_state > skein_api::TaskState::Running { "stopping" } else { state_word(status.state) };
    let mut text = format!("{word} {}", age(status.since, now));
    match status.health {
        Some(Health::Healthy) => text.push_str(" (healthy)"),
        Some(Health::Unhealthy) => text.push_str(" (unhealthy)"),
        Some(Health::Starting) => text.push_str(" (health: starting)"),
        None => {}
    }
    let exit = status.exit_code.filter(|c| *c != 0).map(|c| format!("exited with {c}"));
    let oom = status.oom_killed.then(|| "out of memory".to_owned());
    let running = status.state == skein_api::TaskState::Running;
    let message = Some(status.message.clone()).filter(|m| !m.is_empty() && !running);
    if let Some(why) = oom.or_else(|| status.err.clone()).or(exit).or(message) {
        text.push_str(": ");
        text.push_str(&why);
    }
    text
}

/// Its own ports, and while it runs those of every host that may lead to it.
fn all_ports(task: &Task, everywhere: &BTreeMap<ServiceId, Vec<IngressPort>>) -> String {
    let runs = task.status.state == skein_api::TaskState::Running;
    let of_service = task.service.as_ref().filter(|_| runs).and_then(|service| everywhere.get(service));
    let shown = [ports(&task.status.ports), of_service.map(|ports| ingress(ports)).unwrap_or_default()];
    shown.into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join(", ")
}

/// `*:8080->80/tcp`: ports of every host.
pub(crate) fn ingress(ports: &[IngressPort]) -> String {
    let show = |p: &IngressPort| format!("*:{}->{}/{}", p.published, p.target, word(p.protocol));
    ports.iter().map(show).collect::<Vec<_>>().join(", ")
}

fn word(protocol: Protocol) -> &'static str {
    if protocol == Protocol::Udp { "udp" } else { "tcp" }
}

/// `8080->80/tcp, 127.0.0.1:53->53/udp`.
pub(crate) fn ports(ports: &[PortPublish]) -> String {
    let show = |p: &PortPublish| {
        let ip = match p.host_ip {
            Some(std::net::IpAddr::V6(ip)) => format!("[{ip}]:"),
            Some(ip) => format!("{ip}:"),
            None => String::new(),
        };
        format!("{ip}{}->{}/{}", p.host_port, p.container_port, word(p.protocol))
    };
    ports.iter().map(show).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use skein_api::{TaskState, TaskStatus};

    use super::*;

    #[test]
    fn states() {
        let check = |change: fn(&mut TaskStatus), expected: &str| {
            let mut task = Task::default();
            task.status.since = UnixMillis(1_000);
            task.status.state = TaskState::Running;
            change(&mut task.status);
            assert_eq!(state(&task, UnixMillis(31_000)), expected);
        };
        check(|s| s.message = "started".into(), "running 30s");
        check(|s| s.health = Some(Health::Healthy), "running 30s (healthy)");
        check(|s| (s.state, s.exit_code) = (TaskState::Failed, Some(2)), "failed 30s: exited with 2");
        check(
            |s| (s.state, s.message) = (TaskState::Preparing, "pulling image".into()),
            "preparing 30s: pulling image",
        );
        check(
            |s| (s.state, s.oom_killed, s.exit_code) = (TaskState::Failed, true, Some(137)),
            "failed 30s: out of memory",
        );
    }

    #[test]
    fn port_lists() {
        let port = |host_port, container_port, protocol, ip: Option<&str>| PortPublish {
            protocol,
            container_port,
            host_port,
            host_ip: ip.map(|ip| ip.parse().unwrap()),
        };
        let list = [port(8080, 80, Protocol::Tcp, None), port(53, 53, Protocol::Udp, Some("::1"))];
        assert_eq!(ports(&list), "8080->80/tcp, [::1]:53->53/udp");
        let mut task = Task { service: Some(ServiceId::new("s")), ..Task::default() };
        task.status.state = TaskState::Running;
        let everywhere = [("s", 8080), ("other", 8081)].map(|(service, published)| {
            (ServiceId::new(service), vec![IngressPort { protocol: Protocol::Tcp, published, target: 80 }])
        });
        let everywhere = BTreeMap::from(everywhere);
        assert_eq!(all_ports(&task, &everywhere), "*:8080->80/tcp");
        task.status.ports = list[1..].to_vec();
        assert_eq!(all_ports(&task, &everywhere), "[::1]:53->53/udp, *:8080->80/tcp");
        task.status.state = TaskState::Failed;
        assert_eq!(all_ports(&task, &everywhere), "[::1]:53->53/udp");
    }
}
