//! What the scheduler knows, as a user asks for it: by flags, by a compose file, with the engine doing its part.

use anyhow::{Context, Result};
use xtask::{
    cluster::{Cluster, PATIENCE},
    lab::wait_for,
};

use crate::{
    support::{Checks, skein},
    workloads::{hosts_of, wait_for_hosts},
};

/// On two hosts of which each has two GPUs.
pub(crate) fn scheduling(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    generic_resources(checks, cluster)?;
    namespaces(checks, cluster)?;
    compose(checks, cluster)?;
    explanations(checks, cluster)?;
    refusals(checks, cluster)
}

/// Of the two hosts one has the port, and the other one is ruled out by name.
fn explanations(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    let port = ["run", "-d", "-p", "8088:80", "--constraint", "node==h1"];
    for name in ["holder", "waiter"] {
        checks.fine(name, &skein(cluster, &[&port[..], &["--name", name, "busybox", "sleep", "1000"]].concat())?);
    }
    let why = cluster.skein(&["explain", "waiter", "--nodes"])?;
    let words = [
        "waiter: no node fits: 2 nodes; constraint node==h1 took 1; host port 8088/tcp took 1",
        "to change that: free host port 8088/tcp on h1, which is taken by holder",
        "h1     host port 8088/tcp: taken by holder",
        "h2     constraint node==h1",
    ];
    checks.words("who has the port", &why, &words);
    checks.ensure("no slots", !why.contains("container slots"), format_args!("{why}"));
    let said = skein(cluster, &["explain", "waiter", "--node", "h3"])?;
    checks.refused("an unknown node", &said, 3, &["no node \"h3\"; did you mean \"h1\"?"]);
    let said = skein(cluster, &["explain", "wiater"])?;
    checks.refused("an unknown task", &said, 3, &["no service or task \"wiater\"; did you mean \"waiter\"?"]);
    checks.fine("what is proposed", &skein(cluster, &["rm", "-f", "holder"])?);
    let why = wait_for("the waiter", PATIENCE, || {
        let why = cluster.skein(&["explain", "waiter"])?;
        Ok(why.contains("runs on h1").then_some(why))
    });
    checks.words("is enough", &checks_text(why), &["1 of 2 nodes fit"]);
    checks.fine("all go", &skein(cluster, &["rm", "-f", "waiter"])?);
    Ok(())
}

fn generic_resources(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    let told = ["busybox", "sh", "-c", "echo got $DOCKER_RESOURCE_GPU; exec sleep 1000"];
    let on_h1 = ["run", "-d", "--whitelist", "h1|nobody", "--generic-resource", "gpu=1", "--name"];
    for (name, id) in [("gpu-a", "GPU-0"), ("gpu-b", "GPU-1")] {
        checks.fine(name, &skein(cluster, &[&on_h1[..], &[name], &told[..]].concat())?);
        let said = wait_for(name, PATIENCE, || {
            let log = cluster.skein(&["logs", name])?;
            Ok((!log.is_empty()).then_some(log))
        });
        checks.words(name, &checks_text(said), &[&format!("got {id}")]);
    }
    checks.fine("a third one waits", &skein(cluster, &[&on_h1[..], &["gpu-c"], &told[..]].concat())?);
    let why = cluster.skein(&["explain", "gpu-c"])?;
    checks.words("and says for what", &why, &["generic resource gpu 1", "whitelist node==h1|nobody"]);
    checks.fine("one goes", &skein(cluster, &["rm", "-f", "gpu-a"])?);
    let said = wait_for("the third one", PATIENCE, || {
        let log = cluster.skein(&["logs", "gpu-c"]).unwrap_or_default();
        Ok((!log.is_empty()).then_some(log))
    });
    checks.words("and has what was given back", &checks_text(said), &["got GPU-0"]);
    checks.fine("all go", &skein(cluster, &["rm", "-f", "gpu-b", "gpu-c"])?);
    Ok(())
}

/// The text, or why there is none, to be looked at.
fn checks_text(found: Result<String>) -> String {
    found.unwrap_or_else(|error| format!("{error:#}"))
}

fn namespaces(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    checks.fine("web", &skein(cluster, &["run", "-d", "--name", "ns-web", "busybox", "sleep", "4711"])?);
    let shared = ["run", "--rm", "--network", "container:ns-web", "--pid", "container:ns-web", "busybox"];
    let said = skein(cluster, &[&shared[..], &["sh", "-c", "ps; hostname -i"]].concat())?;
    let out = checks.fine("in its namespaces", &said);
    checks.words("its processes are seen", &out, &["sleep 4711"]);
    let address = cluster.skein(&["exec", "ns-web", "--", "hostname", "-i"])?;
    checks.words("its address is the same", &out, &[address.trim()]);
    checks.fine("web goes", &skein(cluster, &["rm", "-f", "ns-web"])?);
    Ok(())
}

fn compose(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    let text = "\
services:
  spread:
    image: busybox
    command: [sleep, '1000']
    stop_grace_period: 0s
    deploy:
      replicas: 4
      placement: {preferences: [{spread: node.labels.host}]}
  apart:
    image: busybox
    command: [sleep, '1000']
    stop_grace_period: 0s
    environment: ['affinity:service!=apart']
    deploy: {replicas: 2}
  one:
    image: busybox
    command: [sleep, '1000']
    stop_grace_period: 0s
    deploy:
      replicas: 2
      placement: {x-skein: {strategy: binpack, whitelist: [h2, nobody]}}
  side:
    image: busybox
    command: [sleep, '1000']
    stop_grace_period: 0s
    network_mode: service:one
    volumes: [data:/data]
    environment: ['affinity:service==one']
volumes: {data: }
";
    let file = cluster.compose_file("sched", text)?;
    cluster.stack_up("sched", &file)?;
    checks.ok("preferences", wait_for_hosts(cluster, "sched_spread", &["h1", "h1", "h2", "h2"]));
    checks.ok("apart from itself", wait_for_hosts(cluster, "sched_apart", &["h1", "h2"]));
    checks.ok("whitelist", wait_for_hosts(cluster, "sched_one", &["h2", "h2"]));
    checks.ok("beside it", wait_for_hosts(cluster, "sched_side", &["h2"]));
    let near = ["run", "--rm", "--affinity", "volume==sched_data", "-v", "sched_data:/data", "busybox", "ls", "/data"];
    checks.fine("where the volume lives", &skein(cluster, &near)?);
    let hosts = hosts_of(cluster, "sched_side").context("side")?;
    checks.ensure("it stayed", hosts == ["h2"], format_args!("{hosts:?}"));
    checks.fine("down", &skein(cluster, &["down", "-p", "sched", "--yes", "--volumes"])?);
    Ok(())
}

fn refusals(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    let facts = ["run", "--rm", "--constraint", "executiondriver==runc", "--constraint", "node.ip==0.0.0.0/0"];
    checks.fine("what the agents said", &skein(cluster, &[&facts[..], &["busybox", "true"]].concat())?);
    let mut refused = |name: &str, flags: &[&str], code, words: &[&str]| -> Result<()> {
        let said = skein(cluster, &[&["run", "--name", "refused"], flags, &["busybox", "true"]].concat())?;
        checks.refused(name, &said, code, words);
        Ok(())
    };
    let both = ["--constraint", "node.labels.host==h1", "--constraint", "node.labels.host==h2"];
    let words = ["constraint node.labels.host==h1 and constraint node.labels.host==h2 can never both hold"];
    refused("contradiction", &both, 1, &words)?;
    let words = ["100000 GiB of memory is more than the largest host offers: h", "hint: reserve less"];
    refused("too large", &["--memory-reservation", "100000g"], 5, &words)?;
    let words = ["9 gpu is more than the largest host offers: h1 has 2 gpu"];
    refused("too many", &["--generic-resource", "gpu=9"], 5, &words)?;
    let words = ["failed to parse whitelist `node==h1,h2` at column 9", "hint: write for example `whitelist:"];
    refused("whitelist", &["--whitelist", "h1,h2"], 1, &words)?;
    refused("nobody", &["--whitelist", "nobody"], 5, &["whitelist node==nobody took 2"])?;
    refused("platform", &["--platform", "linux/s390x"], 5, &["platform linux/s390x took 2"])?;
    refused("plugin", &["--volume-driver", "none", "-v", "d:/d"], 5, &["volume plugin none took 2"])
}
