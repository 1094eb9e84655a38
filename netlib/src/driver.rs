//! Owns the way from a wanted state to a report: observe, plan, apply. Blocking, over any [`Kernel`], so that the
//! simulation runs what ships.
//!
//! It never retries: whoever calls it does so again on the next change or timer. No tasks, no channels.

use std::{collections::BTreeSet, net::IpAddr};

use nix::errno::Errno;

use crate::{
    desired,
    fast::Fast,
    kernel::{Error, Kernel, OpFailure, OpFailures, Scope},
    names,
    plan::{Op, plan},
    state::{Desired, LinkMake, Query, VethPeer},
    types::{Endpoint, HostConfig, HostState, NetworkId, NetworkState, Report, Translated},
};

/// Brings a network's fabric and uplink to `state`. Idempotent; an empty report means nothing had to be done.
///
/// # Errors
/// When the state is invalid (nothing was changed) or the kernel refuses a change (the others were made).
pub fn ensure_network(kernel: &dyn Kernel, config: &HostConfig, state: &NetworkState) -> Result<Report, Error> {
    state.validate(config)?;
    let mut report = Report::default();
    if kernel.create_fabric(&state.id)? {
        report.changes.push(format!("network {}: make namespace {}", state.id, names::netns_name(&state.id)));
    }
    let config = HostConfig { fast_path: has_fast_path(kernel, config), ..config.clone() };
    let want = desired::fabric(&config, state, &host_addrs(kernel, &config, state)?)?;
    let fabric = Scope::Fabric(state.id.clone());
    let missing = converge(kernel, &fabric, &want, &mut report)?;
    let lost = state.endpoints.iter().filter(|(_, endpoint)| missing.contains(&endpoint.fabric_ifname()));
    report.lost_endpoints.extend(lost.map(|(id, _)| id.clone()));
    if !ensure_uplink(kernel, state, &mut report)? {
        // The pair is there, but the host's end is not where it belongs: renamed, moved, or of another VNI.
        let remove = Op::DeleteLink(names::UPLINK_IFNAME.to_owned());
        kernel.apply(&fabric, std::slice::from_ref(&remove))?;
        report.changes.push(format!("{fabric}: {remove}"));
        converge(kernel, &fabric, &want, &mut report)?;
        ensure_uplink(kernel, state, &mut report)?;
    }
    Ok(report)
}

fn has_fast_path(kernel: &dyn Kernel, config: &HostConfig) -> bool {
    config.fast_path && kernel.fast_path().is_ok()
}

/// Brings the rules of a network's fabric to `state`, its services above all, and reads nothing else. Idempotent.
///
/// # Errors
/// When the state is invalid, there is no such fabric (nothing was changed), or the kernel refuses a change.
pub fn ensure_rules(kernel: &dyn Kernel, config: &HostConfig, state: &NetworkState) -> Result<Report, Error> {
    let want = desired::fabric_rules(config, state, &host_addrs(kernel, config, state)?)?;
    let mut report = Report::default();
    converge(kernel, &Scope::Fabric(state.id.clone()), &want, &mut report)?;
    Ok(report)
}

/// Forgets connections to virtual addresses and ports of every host that lead where they must not lead any more
/// ([`NetworkState::keeps`]). After the rules: until then new ones may be made.
///
/// # Errors
/// When there is no such fabric or connection tracking cannot be read.
pub fn sweep_connections(kernel: &dyn Kernel, state: &NetworkState) -> Result<(), Error> {
    let scope = Scope::Fabric(state.id.clone());
    let count = kernel.forget_connections(&scope, &|flow| !state.keeps(flow))?;
    if count > 0 {
        tracing::debug!(network = %state.id, count, "forgot connections to backends that are gone");
    }
    Ok(())
}

/// The same in the host's own namespace, for ports that lead into networks on every host ([`HostState::keeps`]).
///
/// # Errors
/// When connection tracking cannot be read.
pub fn sweep_host_connections(kernel: &dyn Kernel, state: &HostState) -> Result<(), Error> {
    let count = kernel.forget_connections(&Scope::Host, &|flow| !state.keeps(flow))?;
    if count > 0 {
        tracing::debug!(count, "forgot connections to ports that are published no more");
    }
    Ok(())
}

/// Brings the host's end of an uplink into shape. Answers whether it is there.
fn ensure_uplink(kernel: &dyn Kernel, state: &NetworkState, report: &mut Report) -> Result<bool, Error> {
    let ipv6 = state.subnet6.is_some() && uplink_has_ipv6(kernel, state)?;
    match desired::uplink(state, ipv6) {
        Some(want) => converge(kernel, &Scope::Host, &want, report).map(|missing| missing.is_empty()),
        None => Ok(true),
    }
}

/// Removes a network with its links, routes and uplink. Answers whether there was one.
///
/// # Errors
/// When the kernel refuses.
pub fn remove_network(kernel: &dyn Kernel, id: &NetworkId) -> Result<bool, Error> {
    kernel.remove_fabric(id)
}

/// Brings the host's sysctls, nft table and `DOCKER-USER` rules to `state`. Idempotent.
///
/// # Errors
/// When the state is invalid (nothing was changed) or the kernel refuses a change (the others were made).
pub fn ensure_host(kernel: &dyn Kernel, config: &HostConfig, state: &HostState) -> Result<Report, Error> {
    let want = desired::host_rules(config, state)?;
    let mut report = Report::default();
    converge(kernel, &Scope::Host, &want, &mut report)?;
    Ok(report)
}

/// Makes a container's veth pair, one end in the fabric with its routes, the other in the host's namespace under the
/// name `container_ifname`, down, with MAC and MTU set. A link left over from an earlier container with the same address
/// is replaced. Reads nothing back; on failure the pair is removed.
///
/// # Errors
/// When there is no such fabric, the name is taken in the host's namespace, or the kernel refuses.
pub fn add_endpoint(
    kernel: &dyn Kernel,
    state: &NetworkState,
    endpoint: &Endpoint,
    container_ifname: &str,
) -> Result<(), Error> {
    let scope = Scope::Fabric(state.id.clone());
    let name = endpoint.fabric_ifname();
    let mut want = Desired::empty(crate::state::Owned::Fabric);
    desired::add_endpoint(&mut want, state, endpoint);
    let peer = VethPeer { name: container_ifname.to_owned(), mac: endpoint.mac };
    let mac = names::gateway_mac(state.vni);
    let mut ops = vec![
        Op::DeleteLink(name.clone()),
        Op::CreateVeth { name: name.clone(), mac, mtu: state.mtu, peer },
        Op::SetLink { name: name.clone(), mac: None, mtu: None },
    ];
    ops.extend(want.addrs.into_iter().map(|(dev, addr)| Op::AddAddr(dev, addr)));
    ops.extend(want.neighs.into_iter().map(|((dev, addr), mac)| Op::PutNeigh(dev, addr, mac)));
    ops.extend(want.routes.into_iter().map(|(key, route)| Op::PutRoute { key, route, replace: true }));
    let made = kernel.apply(&scope, &ops);
    if made.is_err() && !matches!(made, Err(Error::NoNetwork(_))) {
        // The first error says why; a removal that fails too is found by the next ensure_network.
        if let Err(error) = kernel.apply(&scope, &[Op::DeleteLink(name)]) {
            tracing::debug!(%error, "failed to remove a half-made endpoint");
        }
    }
    made
}

/// Puts a container that was just added onto the fast path, if there is one: a new container has made no connection yet
/// that was translated. Its entries stand before its program asks for them. No failure matters: its packets go the
/// routed way until the next [`ensure_network`].
pub fn speed_up_endpoint(kernel: &dyn Kernel, config: &HostConfig, state: &NetworkState, endpoint: &Endpoint) {
    if !has_fast_path(kernel, config) {
        return;
    }
    let mut fast = Fast::default();
    desired::add_fast(&mut fast, config, state, endpoint);
    let locals = fast.locals.into_iter().map(|(addr, local)| Op::PutLocal { addr, local, routed: false });
    let programs = fast.programs.into_iter().map(|(dev, program)| Op::AttachFast(dev, program));
    let ops: Vec<Op> = locals.chain(programs).collect();
    if let Err(error) = kernel.apply(&Scope::Fabric(state.id.clone()), &ops) {
        tracing::debug!(%error, "a new endpoint is not on the fast path yet");
    }
}

/// Removes a container's veth pair with its routes, wherever the container's end is, and forgets the connections that
/// were translated to it. Idempotent.
///
/// # Errors
/// When there is no such fabric or the kernel refuses.
pub fn remove_endpoint(kernel: &dyn Kernel, id: &NetworkId, endpoint: &Endpoint) -> Result<(), Error> {
    let fabric = Scope::Fabric(id.clone());
    let mut ops = vec![Op::DeleteLink(endpoint.fabric_ifname())];
    if kernel.fast_path().is_ok() {
        ops.extend(endpoint.addrs().map(Op::DeleteLocal));
    }
    match kernel.apply(&fabric, &ops) {
        // The next ensure_network finds what is left, which leads nowhere.
        Err(Error::Apply { failures, .. }) if failures.0.iter().all(|one| ops[one.index].is_fast()) => {}
        other => other?,
    }
    let gone = |flow: &Translated| endpoint.addrs().any(|addr| addr == flow.answers);
    for scope in [fabric, Scope::Host] {
        match kernel.forget_connections(&scope, &gone) {
            Ok(0) => {}
            Ok(count) => tracing::debug!(%scope, count, "forgot connections of a removed endpoint"),
            // The endpoint is gone, which is what was asked for; its connections time out by themselves.
            Err(error) => {
                tracing::warn!(%error, %scope, "failed to forget connections of a removed endpoint")
            }
        }
    }
    Ok(())
}

/// The host's own addresses, where the network's rules or its fast path need them.
pub(crate) fn host_addrs(
    kernel: &dyn Kernel,
    config: &HostConfig,
    state: &NetworkState,
) -> Result<BTreeSet<IpAddr>, Error> {
    let ports = !state.published.is_empty() || state.ingress.is_some();
    if state.internal || !(ports || config.fast_path) {
        return Ok(BTreeSet::new());
    }
    let query = Query { objects: true, only_our_routes: true, ..Query::default() };
    Ok(kernel.observe(&Scope::Host, &query)?.addrs.into_iter().map(|(_, addr)| addr.addr()).collect())
}

/// An administrator may have switched IPv6 off; then routes over the link are refused (EACCES).
pub(crate) fn uplink_has_ipv6(kernel: &dyn Kernel, state: &NetworkState) -> Result<bool, Error> {
    let path = format!("net/ipv6/conf/{}/disable_ipv6", names::host_uplink_ifname(state.vni));
    let query = Query { sysctls: vec![path.clone()], ..Query::default() };
    let found = kernel.observe(&Scope::Host, &query)?;
    Ok(found.sysctls.get(&path).is_some_and(|value| value == "0"))
}

/// Links made elsewhere that are gone and were not `missing` before. A container may end between observing and applying,
/// and the kernel takes its link away whenever it gets to it: that is a lost link, not a failure.
fn vanished(
    kernel: &dyn Kernel,
    scope: &Scope,
    want: &Desired,
    missing: &BTreeSet<String>,
) -> Result<BTreeSet<String>, Error> {
    let query = Query { objects: true, only_our_routes: true, ..Query::default() };
    let found = kernel.observe(scope, &query)?.links;
    let elsewhere = want.links.iter().filter(|(_, spec)| matches!(spec.make, LinkMake::Elsewhere));
    let gone = elsewhere.map(|(name, _)| name).filter(|name| !found.contains_key(*name) && !missing.contains(*name));
    Ok(gone.cloned().collect())
}

/// What failed of the fast path, in words. One is enough, the rest follows from it; a container that ended meanwhile is
/// none.
fn routed(scope: &Scope, failures: &[OpFailure]) -> Option<String> {
    let first = failures.iter().find(|one| one.source.raw_os_error() != Some(Errno::ENODEV as i32))?;
    Some(format!("{scope}: {}: {}", first.what, first.source))
}

/// One observe, plan, apply. Answers which links made elsewhere are missing.
fn converge(
    kernel: &dyn Kernel,
    scope: &Scope,
    want: &Desired,
    report: &mut Report,
) -> Result<BTreeSet<String>, Error> {
    let found = kernel.observe(scope, &want.query())?;
    let mut plan = plan(want, &found);
    if plan.ops.is_empty() {
        return Ok(plan.missing);
    }
    let (mut conflicts, mut skipped) = (BTreeSet::new(), BTreeSet::new());
    match kernel.apply(scope, &plan.ops) {
        Ok(()) => {}
        Err(Error::Apply { scope, total, mut failures }) => {
            failures.0.retain(|failure| {
                let foreign = matches!(plan.ops.get(failure.index), Some(Op::PutRoute { replace: false, .. }))
                    && failure.source.raw_os_error() == Some(Errno::EEXIST as i32);
                if foreign {
                    conflicts.insert(failure.index);
                }
                !foreign
            });
            let (fast, others): (Vec<_>, Vec<_>) =
                failures.0.into_iter().partition(|failure| plan.ops.get(failure.index).is_some_and(Op::is_fast));
            skipped.extend(fast.iter().map(|failure| failure.index));
            report.routed.extend(routed(&scope, &fast));
            let mut failures = OpFailures(others);
            if !failures.0.is_empty() {
                let gone = vanished(kernel, &scope, want, &plan.missing)?;
                let needs_gone =
                    |index: usize| plan.ops.get(index).is_some_and(|op: &Op| gone.iter().any(|dev| op.needs_link(dev)));
                skipped.extend(failures.0.iter().map(|failure| failure.index).filter(|index| needs_gone(*index)));
                failures.0.retain(|failure| !skipped.contains(&failure.index));
                plan.missing.extend(gone);
            }
            if !failures.0.is_empty() {
                return Err(Error::Apply { scope, total, failures });
            }
        }
        Err(error) => return Err(error),
    }
    for (index, op) in plan.ops.iter().enumerate() {
        if conflicts.contains(&index) {
            report.conflicts.push(format!("{scope}: {op}: something else routes that prefix already"));
        } else if !skipped.contains(&index) {
            report.changes.push(format!("{scope}: {op}"));
        }
    }
    Ok(plan.missing)
}
