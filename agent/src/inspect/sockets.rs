//! Sockets of a network namespace, as `/proc/net` shows them (proc_net_tcp.txt).
//!
//! Owns: reading the tables. Must not know: why. Blocking, on the calling thread's namespace. No tasks, no channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use skein_api::Protocol;

/// State of a TCP socket that listens (`TCP_LISTEN`, include/net/tcp_states.h).
const TCP_LISTEN: &str = "0A";

/// A socket that waits for whoever comes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Waiting {
    /// Protocol.
    pub(super) proto: Protocol,
    /// Where it waits.
    pub(super) address: SocketAddr,
    /// Its inode; 0 where the kernel itself has it.
    pub(super) inode: u64,
}

/// Every TCP socket that listens and every UDP socket that is not connected, of both families.
pub(super) fn waiting() -> io::Result<Vec<Waiting>> {
    let mut found = Vec::new();
    for (proto, file) in
        [(Protocol::Tcp, "tcp"), (Protocol::Tcp, "tcp6"), (Protocol::Udp, "udp"), (Protocol::Udp, "udp6")]
    {
        match fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
            Ok(table) => found.extend(table.lines().skip(1).filter_map(|line| parse(proto, line))),
            // Without IPv6 there is no such table.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// One line: fields 1 local, 2 remote (port 0: not connected), 3 state, 9 inode.
fn parse(proto: Protocol, line: &str) -> Option<Waiting> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (local, remote) = (socket_address(fields.get(1)?)?, socket_address(fields.get(2)?)?);
    let waits = match proto {
        Protocol::Tcp => *fields.get(3)? == TCP_LISTEN,
        Protocol::Udp => remote.port() == 0 && local.port() != 0,
    };
    waits.then_some(Waiting { proto, address: local, inode: fields.get(9)?.parse().ok()? })
}

/// `0100007F:0050`: words of 32 bits in the machine's order, then the port.
fn socket_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for nth in 0..4 {
                bytes[nth * 4..nth * 4 + 4].copy_from_slice(&word(nth * 8)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

/// The processes that have these sockets, `nginx (pid 123)`, by inode. Reads every process's open files.
pub(super) fn holders(inodes: &BTreeSet<u64>) -> BTreeMap<u64, String> {
    let mut found = BTreeMap::new();
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        for file in files.flatten() {
            let target = fs::read_link(file.path()).unwrap_or_default();
            let inode = target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            if let Some(inode) = inode.filter(|inode| inodes.contains(inode)) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                found.entry(inode).or_insert_with(|| format!("{} (pid {pid})", name.trim_end()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn lines_are_read_as_the_kernel_prints_them() {
        let line =
            "   1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 x";
        let expected = Waiting { proto: Protocol::Tcp, address: "127.0.0.1:8080".parse().unwrap(), inode: 4711 };
        assert_eq!(parse(Protocol::Tcp, line), Some(expected));
        assert_eq!(parse(Protocol::Tcp, &line.replace(" 0A ", " 01 ")), None, "connected");
        assert_eq!(socket_address("00000000000000000000000001000000:0035"), "[::1]:53".parse().ok());
        assert_eq!(socket_address("odd"), None);
    }

    #[test]
    fn own_sockets_are_found_with_their_process() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("[::1]:0").unwrap();
        let all = waiting().unwrap();
        for (proto, address) in [(Protocol::Tcp, tcp.local_addr().unwrap()), (Protocol::Udp, udp.local_addr().unwrap())]
        {
            let found = all.iter().find(|w| w.proto == proto && w.address == address).expect("it waits");
            let holder = &holders(&[found.inode].into())[&found.inode];
            assert!(holder.ends_with(&format!("(pid {})", std::process::id())), "{holder}");
        }
    }
}
