//! The engine's plugin protocol as data: requests, replies and their JSON.
//!
//! Owns: parsing (Docker's "remote" libnetwork driver and IPAM driver protocols, moby `libnetwork/drivers/remote/api`
//! and `libnetwork/ipams/remote/api`). Must not know: what is answered. Pure; no tasks, no channels.

use std::{collections::BTreeMap, net::IpAddr};

use netlib::Proto;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use skein_api::PORTS_MAX;
use thiserror::Error;

/// Generic option of an engine network that names ours.
pub const OPTION_NETWORK: &str = "io.skein.network";
/// Endpoint option (EndpointSettings.DriverOpts) that names the container's task.
pub const OPTION_TASK: &str = "io.skein.task";
/// Where the engine puts the options of `docker network create -o` (libnetwork `netlabel.GenericData`).
const GENERIC: &str = "com.docker.network.generic";
/// `docker network create --internal` (libnetwork `netlabel.Internal`).
const INTERNAL: &str = "com.docker.network.internal";
/// Port bindings of an endpoint (libnetwork `netlabel.PortMap`).
const PORT_MAP: &str = "com.docker.network.portmap";
/// What kind of address IPAM is asked for (libnetwork `ipamapi.RequestAddressType`).
const ADDRESS_TYPE: &str = "RequestAddressType";
/// Its value for the gateway (libnetwork `netlabel.Gateway`).
const GATEWAY: &str = "com.docker.network.gateway";
/// The MAC of the endpoint that an address is for (libnetwork `netlabel.MacAddress`), since we say that we want it.
const MAC: &str = "com.docker.network.endpoint.macaddress";

/// One port that the engine wants published.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortBinding {
    /// Transport protocol.
    pub proto: Proto,
    /// Only on this address of the host; none means on all.
    pub host_ip: Option<IpAddr>,
    /// Port on the host; 0: any that is free.
    pub host_port: u16,
    /// Last of the ports to choose from; equal to `host_port` if there is no choice.
    pub host_port_end: u16,
    /// The container's port.
    pub port: u16,
}

/// A request of the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// `/Plugin.Activate`
    Activate,
    /// `/NetworkDriver.GetCapabilities`
    DriverCapabilities,
    /// `/IpamDriver.GetCapabilities`
    IpamCapabilities,
    /// `/IpamDriver.GetDefaultAddressSpaces`
    DefaultAddressSpaces,
    /// Requests that only a global driver or a gossip needs (`AllocateNetwork`, `FreeNetwork`, `DiscoverNew`,
    /// `DiscoverDelete`): accepted, nothing to do.
    Nothing,
    /// `/NetworkDriver.CreateNetwork`
    CreateNetwork {
        /// The engine's id of the network.
        engine_network: String,
        /// Our id, if the options name it.
        network: Option<String>,
        /// The user made it internal at the engine.
        internal: bool,
        /// Pools, IPv4 then IPv6, as the engine has them.
        pools: Vec<String>,
    },
    /// `/NetworkDriver.DeleteNetwork`
    DeleteNetwork {
        /// The engine's id of the network.
        engine_network: String,
    },
    /// `/NetworkDriver.CreateEndpoint`
    CreateEndpoint {
        /// The engine's id of the network.
        engine_network: String,
        /// The engine's id of the endpoint.
        endpoint: String,
        /// IPv4 address with prefix length; empty if none.
        address: String,
        /// IPv6 address with prefix length; empty if none.
        address6: String,
        /// MAC; empty if the driver shall choose.
        mac: String,
        /// Our task, if the options name it.
        task: Option<String>,
    },
    /// `/NetworkDriver.EndpointOperInfo`
    EndpointOperInfo {
        /// The engine's id of the endpoint.
        endpoint: String,
    },
    /// `/NetworkDriver.DeleteEndpoint`
    DeleteEndpoint {
        /// The engine's id of the endpoint.
        endpoint: String,
    },
    /// `/NetworkDriver.Join`
    Join {
        /// The engine's id of the endpoint.
        endpoint: String,
        /// Path of the container's namespace: the same for all its endpoints.
        sandbox: String,
    },
    /// `/NetworkDriver.Leave`
    Leave {
        /// The engine's id of the endpoint.
        endpoint: String,
    },
    /// `/NetworkDriver.ProgramExternalConnectivity`
    Publish {
        /// The engine's id of the endpoint.
        endpoint: String,
        /// What to publish.
        ports: Vec<PortBinding>,
    },
    /// `/NetworkDriver.RevokeExternalConnectivity`
    Revoke {
        /// The engine's id of the endpoint.
        endpoint: String,
    },
    /// `/IpamDriver.RequestPool`
    RequestPool {
        /// Subnet; empty if the driver shall choose.
        pool: String,
        /// Our network, if IPAM's options name it.
        network: Option<String>,
        /// An IPv6 pool.
        v6: bool,
    },
    /// `/IpamDriver.ReleasePool`
    ReleasePool {
        /// The pool.
        pool: String,
    },
    /// `/IpamDriver.RequestAddress`
    RequestAddress {
        /// The pool.
        pool: String,
        /// Wanted address; empty if the driver shall choose.
        address: String,
        /// It is for the gateway.
        gateway: bool,
        /// MAC of the endpoint that it is for.
        mac: Option<String>,
    },
    /// `/IpamDriver.ReleaseAddress`
    ReleaseAddress {
        /// The pool.
        pool: String,
        /// The address.
        address: String,
    },
}

/// A request that is not of the protocol.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseError {
    /// No such method.
    #[error("method {0} is not served by this plugin")]
    UnknownMethod(String),
    /// The body is not what the method takes.
    #[error("failed to read the body of {method}: {detail}")]
    Body {
        /// The method.
        method: String,
        /// What is wrong.
        detail: String,
    },
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "PascalCase")]
struct Body {
    #[serde(rename = "NetworkID")]
    network_id: String,
    #[serde(rename = "EndpointID")]
    endpoint_id: String,
    sandbox_key: String,
    options: Option<Map<String, Value>>,
    #[serde(rename = "IPv4Data")]
    ipv4_data: Option<Vec<PoolData>>,
    #[serde(rename = "IPv6Data")]
    ipv6_data: Option<Vec<PoolData>>,
    interface: Option<Interface>,
    pool: String,
    #[serde(rename = "PoolID")]
    pool_id: String,
    address: String,
    #[serde(rename = "V6")]
    v6: bool,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "PascalCase")]
struct PoolData {
    pool: String,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "PascalCase")]
struct Interface {
    address: String,
    #[serde(rename = "AddressIPv6")]
    address_ipv6: String,
    mac_address: String,
}

/// libnetwork `types.PortBinding`; also carries `IP`, the container's address, which it does not know yet.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "PascalCase")]
struct WireBinding {
    proto: u8,
    port: u16,
    #[serde(rename = "HostIP")]
    host_ip: String,
    host_port: u16,
    host_port_end: u16,
}

impl Request {
    /// Parses a method and its body. The content type is not looked at: the engine does not always send one, and some
    /// methods come without a body.
    ///
    /// # Errors
    /// See [`ParseError`].
    pub fn parse(method: &str, body: &[u8]) -> Result<Self, ParseError> {
        let bad = |detail: String| ParseError::Body { method: method.to_owned(), detail };
        let body = match body.trim_ascii() {
            b"" | b"null" => Body::default(),
            text => serde_json::from_slice(text).map_err(|e| bad(e.to_string()))?,
        };
        let options = body.options.unwrap_or_default();
        let (engine_network, endpoint) = (body.network_id, body.endpoint_id);
        Ok(match method {
            "/Plugin.Activate" => Self::Activate,
            "/NetworkDriver.GetCapabilities" => Self::DriverCapabilities,
            "/IpamDriver.GetCapabilities" => Self::IpamCapabilities,
            "/IpamDriver.GetDefaultAddressSpaces" => Self::DefaultAddressSpaces,
            "/NetworkDriver.AllocateNetwork"
            | "/NetworkDriver.FreeNetwork"
            | "/NetworkDriver.DiscoverNew"
            | "/NetworkDriver.DiscoverDelete" => Self::Nothing,
            "/NetworkDriver.CreateNetwork" => Self::CreateNetwork {
                engine_network: required(engine_network, "NetworkID").map_err(bad)?,
                network: options.get(GENERIC).and_then(|g| text(g.get(OPTION_NETWORK))),
                internal: options.get(INTERNAL).and_then(Value::as_bool).unwrap_or(false),
                pools: [body.ipv4_data, body.ipv6_data].into_iter().flatten().flatten().map(|d| d.pool).collect(),
            },
            "/NetworkDriver.DeleteNetwork" => {
                Self::DeleteNetwork { engine_network: required(engine_network, "NetworkID").map_err(bad)? }
            }
            "/NetworkDriver.CreateEndpoint" => {
                let interface = body.interface.unwrap_or_default();
                Self::CreateEndpoint {
                    engine_network: required(engine_network, "NetworkID").map_err(bad)?,
                    endpoint: required(endpoint, "EndpointID").map_err(bad)?,
                    address: interface.address,
                    address6: interface.address_ipv6,
                    mac: interface.mac_address,
                    // The engine hands the options of an endpoint on both as they are and below the generic key.
                    task: text(options.get(OPTION_TASK))
                        .or_else(|| text(options.get(GENERIC).and_then(|g| g.get(OPTION_TASK)))),
                }
            }
            "/NetworkDriver.EndpointOperInfo" => Self::EndpointOperInfo { endpoint },
            "/NetworkDriver.DeleteEndpoint" => Self::DeleteEndpoint { endpoint },
            "/NetworkDriver.Join" => Self::Join { endpoint, sandbox: body.sandbox_key },
            "/NetworkDriver.Leave" => Self::Leave { endpoint },
            "/NetworkDriver.ProgramExternalConnectivity" => {
                Self::Publish { endpoint, ports: bindings(options.get(PORT_MAP)).map_err(bad)? }
            }
            "/NetworkDriver.RevokeExternalConnectivity" => Self::Revoke { endpoint },
            "/IpamDriver.RequestPool" => {
                Self::RequestPool { pool: body.pool, network: text(options.get(OPTION_NETWORK)), v6: body.v6 }
            }
            "/IpamDriver.ReleasePool" => Self::ReleasePool { pool: body.pool_id },
            "/IpamDriver.RequestAddress" => Self::RequestAddress {
                pool: body.pool_id,
                address: body.address,
                gateway: options.get(ADDRESS_TYPE).and_then(Value::as_str) == Some(GATEWAY),
                mac: text(options.get(MAC)),
            },
            "/IpamDriver.ReleaseAddress" => Self::ReleaseAddress { pool: body.pool_id, address: body.address },
            other => return Err(ParseError::UnknownMethod(other.to_owned())),
        })
    }
}

fn required(value: String, name: &str) -> Result<String, String> {
    if value.is_empty() { Err(format!("{name} is missing")) } else { Ok(value) }
}

fn text(value: Option<&Value>) -> Option<String> {
    value?.as_str().filter(|s| !s.is_empty()).map(str::to_owned)
}

fn bindings(value: Option<&Value>) -> Result<Vec<PortBinding>, String> {
    let list: Vec<WireBinding> = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(list) => serde_json::from_value(list.clone()).map_err(|e| format!("port map: {e}"))?,
    };
    if list.len() > PORTS_MAX {
        return Err(format!("{} ports published, at most {PORTS_MAX} are possible", list.len()));
    }
    list.into_iter().map(binding).collect()
}

fn binding(wire: WireBinding) -> Result<PortBinding, String> {
    // IANA protocol numbers, as the engine sends them.
    let proto = match wire.proto {
        6 => Proto::Tcp,
        17 => Proto::Udp,
        132 => {
            return Err(format!("port {}/sctp cannot be published: only tcp and udp can", wire.port));
        }
        other => return Err(format!("port {} has unknown protocol {other}", wire.port)),
    };
    let host_ip = match wire.host_ip.as_str() {
        "" => None,
        text => {
            let ip: IpAddr = text.parse().map_err(|_| format!("{text:?} is not an address to publish on"))?;
            // The engine's way to say "all".
            Some(ip).filter(|ip| !ip.is_unspecified())
        }
    };
    if wire.port == 0 {
        return Err("port 0 cannot be published".into());
    }
    Ok(PortBinding {
        proto,
        host_ip,
        host_port: wire.host_port,
        host_port_end: wire.host_port_end.max(wire.host_port),
        port: wire.port,
    })
}

/// What the engine gets back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Reply {
    /// Nothing to say.
    Empty {},
    /// To `Activate`.
    #[serde(rename_all = "PascalCase")]
    Activate {
        /// Protocols that this plugin serves.
        implements: [&'static str; 2],
    },
    /// To `NetworkDriver.GetCapabilities`.
    #[serde(rename_all = "PascalCase")]
    DriverCapabilities {
        /// `local`: one engine network per host.
        scope: &'static str,
        /// `global`: containers reach those of other hosts.
        connectivity_scope: &'static str,
    },
    /// To `IpamDriver.GetCapabilities`.
    IpamCapabilities {
        /// Requests for addresses name the endpoint's MAC: links the two families' requests of one container.
        #[serde(rename = "RequiresMACAddress")]
        requires_mac_address: bool,
        /// Pools and addresses survive on our own disk.
        #[serde(rename = "RequiresRequestReplay")]
        requires_request_replay: bool,
    },
    /// To `GetDefaultAddressSpaces`.
    #[serde(rename_all = "PascalCase")]
    AddressSpaces {
        /// For networks of local scope.
        local_default_address_space: &'static str,
        /// For networks of global scope, which this driver does not have.
        global_default_address_space: &'static str,
    },
    /// To `RequestPool`.
    Pool {
        /// Names the pool from now on.
        #[serde(rename = "PoolID")]
        pool_id: String,
        /// Its subnet.
        #[serde(rename = "Pool")]
        pool: String,
        /// Nothing.
        #[serde(rename = "Data")]
        data: BTreeMap<String, String>,
    },
    /// To `RequestAddress`.
    #[serde(rename_all = "PascalCase")]
    Address {
        /// Address with prefix length.
        address: String,
        /// Nothing.
        data: BTreeMap<String, String>,
    },
    /// To `CreateEndpoint`: only what the engine left to us may be set.
    #[serde(rename_all = "PascalCase")]
    Endpoint {
        /// What we chose.
        interface: ReplyInterface,
    },
    /// To `EndpointOperInfo`.
    #[serde(rename_all = "PascalCase")]
    Info {
        /// Shown nowhere.
        value: BTreeMap<String, String>,
    },
    /// To `Join`.
    Join(Box<JoinReply>),
}

/// The interface part of the reply to `CreateEndpoint`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ReplyInterface {
    /// MAC that we chose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac_address: Option<String>,
}

/// The reply to `Join`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct JoinReply {
    /// Which link to take and how to call it.
    pub interface_name: InterfaceName,
    /// Default gateway; empty on internal networks.
    pub gateway: String,
    /// IPv6 default gateway.
    #[serde(rename = "GatewayIPv6")]
    pub gateway_ipv6: String,
    /// In this order: the on-link route to the gateway stands before the one that depends on it.
    pub static_routes: Vec<StaticRoute>,
    /// Keeps the engine from attaching a bridge of its own to a container without a default gateway.
    pub disable_gateway_service: bool,
}

/// The link of a `Join`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct InterfaceName {
    /// Name of the link in the engine's namespace.
    pub src_name: String,
    /// Start of its name in the container: `eth`.
    pub dst_prefix: String,
}

/// A route of a `Join`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct StaticRoute {
    /// Prefix.
    pub destination: String,
    /// 0 by a next hop, 1 on the link (libnetwork `types.NEXTHOP`, `types.CONNECTED`).
    pub route_type: u8,
    /// The next hop, if by one.
    pub next_hop: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        let check = |method: &str, body: &str, want: Request| {
            assert_eq!(Request::parse(method, body.as_bytes()), Ok(want), "{method} {body}");
        };
        check("/Plugin.Activate", "", Request::Activate);
        check("/IpamDriver.GetCapabilities", "null", Request::IpamCapabilities);
        check(
            "/NetworkDriver.CreateNetwork",
            r#"{"NetworkID":"e1","Options":{"com.docker.network.enable_ipv6":true,"com.docker.network.internal":true,
                "com.docker.network.generic":{"io.skein.network":"n1"}},
                "IPv4Data":[{"AddressSpace":"x","Pool":"10.1.0.0/16","Gateway":"10.1.0.1/16","AuxAddresses":{}}],
                "IPv6Data":[{"Pool":"fd00::/64"}]}"#,
            Request::CreateNetwork {
                engine_network: "e1".into(),
                network: Some("n1".into()),
                internal: true,
                pools: vec!["10.1.0.0/16".into(), "fd00::/64".into()],
            },
        );
        check(
            "/NetworkDriver.CreateNetwork",
            r#"{"NetworkID":"e1","Options":null,"IPv4Data":null,"IPv6Data":[]}"#,
            Request::CreateNetwork { engine_network: "e1".into(), network: None, internal: false, pools: vec![] },
        );
        check(
            "/NetworkDriver.CreateEndpoint",
            r#"{"NetworkID":"e1","EndpointID":"p1","Interface":{"Address":"10.1.1.2/32","AddressIPv6":"",
                "MacAddress":"02:42:00:00:00:01"},"Options":{"io.skein.task":"t1"}}"#,
            Request::CreateEndpoint {
                engine_network: "e1".into(),
                endpoint: "p1".into(),
                address: "10.1.1.2/32".into(),
                address6: String::new(),
                mac: "02:42:00:00:00:01".into(),
                task: Some("t1".into()),
            },
        );
        let ports =
            vec![PortBinding { proto: Proto::Udp, host_ip: None, host_port: 53, host_port_end: 53, port: 5353 }];
        check(
            "/NetworkDriver.ProgramExternalConnectivity",
            r#"{"EndpointID":"p1","Options":{"com.docker.network.portmap":[
                {"Proto":17,"IP":"","Port":5353,"HostIP":"0.0.0.0","HostPort":53,"HostPortEnd":53}]}}"#,
            Request::Publish { endpoint: "p1".into(), ports },
        );
        check(
            "/IpamDriver.RequestAddress",
            r#"{"PoolID":"p","Address":"","Options":{"RequestAddressType":"com.docker.network.gateway"}}"#,
            Request::RequestAddress { pool: "p".into(), address: String::new(), gateway: true, mac: None },
        );
    }

    #[test]
    fn bad_requests() {
        let check = |method: &str, body: &str, want: &str| {
            let error = Request::parse(method, body.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(want), "{method} {body}: {error}");
        };
        check("/NetworkDriver.Dance", "{}", "method /NetworkDriver.Dance is not served");
        check("/NetworkDriver.CreateNetwork", "{}", "NetworkID is missing");
        check("/NetworkDriver.CreateNetwork", "{\"NetworkID\":", "failed to read the body");
        check("/NetworkDriver.CreateNetwork", "[1]", "failed to read the body");
        let publish = |binding: &str| format!(r#"{{"Options":{{"com.docker.network.portmap":[{binding}]}}}}"#);
        let method = "/NetworkDriver.ProgramExternalConnectivity";
        check(method, &publish(r#"{"Proto":132,"Port":1}"#), "only tcp and udp");
        check(method, &publish(r#"{"Proto":6,"Port":1,"HostIP":"nine"}"#), "not an address");
        check(method, &publish(r#"{"Proto":6,"Port":0}"#), "port 0");
        check(method, &publish(r#"{"Proto":6,"Port":70000}"#), "port map");
    }

    #[test]
    fn replies() {
        let check = |reply: Reply, want: &str| assert_eq!(serde_json::to_string(&reply).unwrap(), want);
        check(Reply::Empty {}, "{}");
        check(
            Reply::Activate { implements: ["NetworkDriver", "IpamDriver"] },
            r#"{"Implements":["NetworkDriver","IpamDriver"]}"#,
        );
        check(Reply::Endpoint { interface: ReplyInterface::default() }, r#"{"Interface":{}}"#);
        let join = JoinReply {
            interface_name: InterfaceName { src_name: "skc-1".into(), dst_prefix: "eth".into() },
            gateway: "10.57.0.1".into(),
            gateway_ipv6: String::new(),
            static_routes: vec![StaticRoute { destination: "10.57.0.1/32".into(), route_type: 1, next_hop: "".into() }],
            disable_gateway_service: false,
        };
        check(
            Reply::Join(Box::new(join)),
            r#"{"InterfaceName":{"SrcName":"skc-1","DstPrefix":"eth"},"Gateway":"10.57.0.1","GatewayIPv6":"","StaticRoutes":[{"Destination":"10.57.0.1/32","RouteType":1,"NextHop":""}],"DisableGatewayService":false}"#,
        );
    }
}
