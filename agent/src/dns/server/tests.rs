//! The server on loopback sockets, with a resolver of our own behind it.

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RData, Record, RecordType, rdata::A},
};

use super::*;
use crate::dns::zone::tests::{endpoint, network};

fn ask(name: &str) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

/// A resolver that answers every question with 192.0.2.9; over UDP it says "truncated" for names that begin with `t`.
async fn resolver() -> (SocketAddr, JoinSet<()>) {
    let answer = |packet: &[u8], udp: bool| {
        let question = Message::from_vec(packet).unwrap();
        let mut m = Message::response(question.metadata.id, OpCode::Query);
        let name = question.queries[0].name().clone();
        m.add_queries(question.queries.clone());
        if udp && name.to_ascii().starts_with('t') {
            m.metadata.truncation = true;
        } else {
            m.add_answer(Record::from_rdata(name, 60, RData::A(A("192.0.2.9".parse().unwrap()))));
        }
        m.to_vec().unwrap()
    };
    let (udp, tcp) = pair();
    let (udp, tcp) = (UdpSocket::from_std(udp).unwrap(), TcpListener::from_std(tcp).unwrap());
    let address = udp.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut buffer = [0; 1500];
        loop {
            let (n, from) = udp.recv_from(&mut buffer).await.unwrap();
            udp.send_to(&answer(&buffer[..n], true), from).await.unwrap();
        }
    });
    tasks.spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let packet = read_framed(&mut stream).await.unwrap().unwrap();
            write_framed(&mut stream, &answer(&packet, false)).await.unwrap();
        }
    });
    (address, tasks)
}

async fn serve(upstreams: Vec<SocketAddr>) -> (Arc<DnsServer>, Serving, SocketAddr) {
    let server = DnsServer::new(UpstreamSource::Fixed(upstreams));
    let n = network(1, "n", false);
    server.publish(Zone::build([&n], &[], &[endpoint(1, 10, &["web.1"], &["web"], true)], []));
    let (udp, tcp) = pair();
    let address = udp.local_addr().unwrap();
    let serving = server.serve(&n.id, udp, tcp).unwrap();
    (server, serving, address)
}

/// A UDP and a TCP socket on one port; another process may take the port between the two, so a few are tried.
fn pair() -> (std::net::UdpSocket, std::net::TcpListener) {
    for _ in 0..16 {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        if let Ok(tcp) = std::net::TcpListener::bind(udp.local_addr().unwrap()) {
            udp.set_nonblocking(true).unwrap();
            tcp.set_nonblocking(true).unwrap();
            return (udp, tcp);
        }
    }
    panic!("no port is free for both UDP and TCP");
}

async fn over_udp(server: SocketAddr, name: &str) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&ask(name), server).await.unwrap();
    let mut buffer = [0; 4096];
    let n = timeout(Duration::from_secs(10), socket.recv(&mut buffer)).await.expect("an answer in time").unwrap();
    Message::from_vec(&buffer[..n]).unwrap()
}

fn data(message: &Message) -> Vec<String> {
    message.answers.iter().map(|r| r.data.to_string()).collect()
}

#[tokio::test]
async fn answers_and_forwards_over_udp_and_tcp() {
    let (upstream, _resolver) = resolver().await;
    let (server, mut serving, address) = serve(vec![upstream]).await;
    assert_eq!(data(&over_udp(address, "web.").await), ["10.1.1.10"]);
    assert_eq!(data(&over_udp(address, "example.org.").await), ["192.0.2.9"]);
    assert_eq!(data(&over_udp(address, "truncated.example.org.").await), ["192.0.2.9"], "asked again over TCP");
    assert_eq!(over_udp(address, "single.").await.metadata.response_code, ResponseCode::NXDomain);

    let mut stream = TcpStream::connect(address).await.unwrap();
    for (name, want) in [("web.", "10.1.1.10"), ("example.org.", "192.0.2.9"), ("web.1.", "10.1.1.10")] {
        write_framed(&mut stream, &ask(name)).await.unwrap();
        let answer = Message::from_vec(&read_framed(&mut stream).await.unwrap().unwrap()).unwrap();
        assert_eq!(data(&answer), [want], "{name}");
    }
    assert!(serving.is_alive());
    assert_eq!(server.counters().forwarded_total.load(Ordering::Relaxed), 3);
    assert_eq!(server.counters().forward_failures_total.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_dead_resolver_is_passed_over_and_none_at_all_fails_at_once() {
    let (upstream, _resolver) = resolver().await;
    // Port 9 of loopback refuses at once; the next resolver is asked.
    let (_, _serving, address) = serve(vec!["127.0.0.1:9".parse().unwrap(), upstream]).await;
    assert_eq!(data(&over_udp(address, "example.org.").await), ["192.0.2.9"]);
    let (server, _serving, address) = serve(vec![]).await;
    assert_eq!(over_udp(address, "example.org.").await.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(server.counters().forward_failures_total.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn bounds_hold() {
    let bound = Bound::new(3, 2);
    let (a, b): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
    let (first, _second) = (bound.take(a).unwrap(), bound.take(a).unwrap());
    assert!(bound.take(a).is_none(), "one client");
    let _third = bound.take(b).unwrap();
    assert!(bound.take(b).is_none(), "all clients");
    drop(first);
    assert!(bound.take(b).is_some());

    let (server, _serving, address) = serve(vec![]).await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_PER_CLIENT_MAX {
        let mut stream = TcpStream::connect(address).await.unwrap();
        write_framed(&mut stream, &ask("web.")).await.unwrap();
        read_framed(&mut stream).await.unwrap().unwrap();
        held.push(stream);
    }
    let mut over = TcpStream::connect(address).await.unwrap();
    // Closed or reset, depending on what was read before the close.
    assert!(matches!(timeout(Duration::from_secs(5), read_framed(&mut over)).await.unwrap(), Ok(None) | Err(_)));
    assert_eq!(server.counters().rejected_total.load(Ordering::Relaxed), 1);
}
