//! Names, and messages to a socket of our own in the place of the service manager's.

use std::{
    os::{fd::OwnedFd, linux::fs::MetadataExt},
    path::Path,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::*;

fn name(protocol: Protocol, address: &str) -> SocketName {
    SocketName {
        network: NetworkId::new("0123456789abcdef"),
        fabric: 4_026_532_211,
        protocol,
        address: address.parse().unwrap(),
    }
}

#[test]
fn names_are_valid_and_come_back() {
    let check = |name: SocketName, want: &str| {
        assert_eq!(name.encoded().as_deref(), Some(want));
        assert_eq!(want.parse(), Ok(name));
    };
    check(name(Protocol::Udp, "10.57.0.1:53"), "skein-dns_udp_10.57.0.1_53_4026532211_0123456789abcdef");
    check(name(Protocol::Tcp, "[fd57::1]:53"), "skein-dns_tcp_fd57--1_53_4026532211_0123456789abcdef");
    check(name(Protocol::Tcp, "[::]:1"), "skein-dns_tcp_--_1_4026532211_0123456789abcdef");
    let odd = SocketName { network: NetworkId::new("a_b"), ..name(Protocol::Udp, "10.0.0.1:53") };
    check(odd, "skein-dns_udp_10.0.0.1_53_4026532211_a_b");
}

#[test]
fn names_that_a_manager_refuses_are_not_sent() {
    let check = |network: &str| {
        let name = SocketName { network: NetworkId::new(network), ..name(Protocol::Udp, "10.0.0.1:53") };
        assert_eq!(name.encoded(), None, "{network:?}");
    };
    check("a:b");
    check("a\nFDSTORE=1");
    check("höhle");
    check(&"x".repeat(250));
}

#[test]
fn other_texts_are_no_names() {
    for text in [
        "",
        "skein-plugin",
        "skein-dns",
        "skein-dns_udp_10.0.0.1_53_7",
        "skein-dns_udp_10.0.0.1_53_7_",
        "skein-dns_sctp_10.0.0.1_53_7_n",
        "skein-dns_udp_10.0.0_53_7_n",
        "skein-dns_udp_10.0.0.1_65536_7_n",
        "skein-dns_udp_10.0.0.1_53_x_n",
        "other_udp_10.0.0.1_53_7_n",
    ] {
        assert_eq!(text.parse::<SocketName>(), Err(NotAName), "{text:?}");
    }
}

/// The next message, with the descriptors in it.
fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
    let mut buffer = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message =
        recvmsg(socket, &mut [io::IoSliceMut::new(&mut buffer)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    (String::from_utf8(buffer[..message.bytes].to_vec()).unwrap(), fds)
}

fn inode(fd: impl AsFd) -> u64 {
    std::fs::File::from(fd.as_fd().try_clone_to_owned().unwrap()).metadata().unwrap().st_ino()
}

fn manager(dir: &Path) -> (UnixDatagram, Manager) {
    let path = dir.join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    // A test that fails must not hang.
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (socket, Manager::at(path.to_str().unwrap()).unwrap())
}

#[tokio::test]
async fn a_manager_is_told_and_given_each_socket_once() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, manager) = manager(dir.path());
    manager.ready().await;
    assert_eq!(receive(&socket).0, "READY=1");
    let mut store = FdStore { manager: Some(manager.clone()), ..FdStore::default() };
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let name = name(Protocol::Udp, &udp.local_addr().unwrap().to_string());
    store.keep(name.clone(), udp.as_fd()).await;
    store.keep(name.clone(), udp.as_fd()).await;
    let (text, fds) = receive(&socket);
    assert_eq!(text, format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"));
    assert_eq!(fds.iter().map(inode).collect::<Vec<_>>(), [inode(&udp)]);
    // It is in use: nothing to take over.
    assert!(store.take_udp(&name).is_none());

    // Nothing to give up, no message; then one, which ends once the manager has read it.
    store.release(|_, in_use| !in_use).await;
    let text = name.to_string();
    let reader = std::thread::spawn(move || {
        assert_eq!(receive(&socket).0, format!("FDSTOREREMOVE=1\nFDNAME={text}"));
        let (text, fds) = receive(&socket);
        assert_eq!((text.as_str(), fds.len()), ("BARRIER=1", 1));
        socket
    });
    store.release(|n, _| n.network == name.network).await;
    let socket = reader.join().unwrap();
    manager.stopping().await;
    assert_eq!(receive(&socket).0, "STOPPING=1");
}

#[tokio::test]
async fn without_a_manager_nothing_is_kept_and_nothing_fails() {
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let name = name(Protocol::Udp, &udp.local_addr().unwrap().to_string());
    let mut store = FdStore::default();
    store.keep(name.clone(), udp.as_fd()).await;
    assert!(store.kept.is_empty());
    store.release(|_, _| true).await;
    // One that is gone costs the keeping only.
    let dir = tempfile::tempdir().unwrap();
    store.manager = Some(Manager::at(dir.path().join("gone").to_str().unwrap()).unwrap());
    store.keep(name, udp.as_fd()).await;
    assert!(store.kept.is_empty());
}

#[tokio::test]
async fn the_bound_holds() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, manager) = manager(dir.path());
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut store = FdStore { manager: Some(manager), ..FdStore::default() };
    let numbered = |fabric: u64| SocketName { fabric, ..name(Protocol::Udp, "10.0.0.1:53") };
    store.kept = (0..SOCKETS_MAX as u64).map(|n| (numbered(n), None)).collect();
    store.keep(numbered(u64::MAX), udp.as_fd()).await;
    assert_eq!(store.kept.len(), SOCKETS_MAX);
    socket.set_nonblocking(true).unwrap();
    assert!(socket.recv(&mut [0; 16]).is_err(), "a socket over the bound was sent");
}

#[test]
fn addresses_of_managers() {
    assert!(Manager::at("/run/systemd/notify").is_ok());
    assert!(Manager::at("@abstract").is_ok());
    assert!(Manager::at("vsock:2:1234").is_err());
    assert!(Manager::at("").is_err());
}
