//! The calls of `skein net`: questions that agents answer through the master.
//!
//! Owns: their time limit. Must not know: how answers are shown. No tasks, no channels.

use std::time::Duration;

use super::{Call, Client, ClientError};
use crate::{CheckReport, ExposedPort, HostAnswer, NetStatus, PathReport, Protocol};

/// How long an answer may take: each agent has 15 s, and is asked beside the others.
const NET_TIMEOUT: Duration = Duration::from_secs(60);

/// As the other calls: each fails with any [`ClientError`]. None changes anything.
impl Client {
    /// How the networks are, on one host or on all. A host that does not answer is an entry that says so.
    pub async fn net_status(&self, node: Option<&str>) -> Result<Vec<HostAnswer<NetStatus>>, ClientError> {
        let patient = self.clone().with_request_timeout(NET_TIMEOUT);
        patient.json(Call::get(&["net", "status"]).query("node", node)).await
    }
    /// Sends through the tunnels between all hosts, or between one and all others.
    pub async fn net_check(&self, node: Option<&str>) -> Result<CheckReport, ClientError> {
        let patient = self.clone().with_request_timeout(NET_TIMEOUT);
        patient.json(Call::get(&["net", "check"]).query("node", node)).await
    }
    /// What an outsider can reach, on one host or on all.
    pub async fn net_exposed(&self, node: Option<&str>) -> Result<Vec<HostAnswer<Vec<ExposedPort>>>, ClientError> {
        let patient = self.clone().with_request_timeout(NET_TIMEOUT);
        patient.json(Call::get(&["net", "exposed"]).query("node", node)).await
    }
    /// From one task, service or node to another, hop by hop.
    pub async fn net_path(
        &self,
        from: &str,
        to: &str,
        port: Option<u16>,
        proto: Protocol,
    ) -> Result<PathReport, ClientError> {
        let proto = match proto {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        let patient = self.clone().with_request_timeout(NET_TIMEOUT);
        let call = Call::get(&["net", "path"]).query("from", Some(from)).query("to", Some(to));
        patient.json(call.query("port", port).query("proto", Some(proto))).await
    }
}
