//! The client against small servers of its own: statuses, time limits, streams, the upgrade, mutual TLS.

use std::{convert::Infallible, sync::Arc};

use http::Response;
use http_body_util::combinators::BoxBody;
use hyper::{server::conn::http1 as server, service::service_fn};
use tokio::net::{TcpListener, UnixListener};

use super::*;
use crate::TaskState;

type Answer = Response<BoxBody<Bytes, Infallible>>;

fn answer(status: u16, body: impl Into<Bytes>) -> Answer {
    Response::builder().status(status).body(Full::new(body.into()).boxed()).unwrap()
}

/// A server on a unix socket that answers each request with `handler(method path?query, body)`.
fn serve(
    handler: impl Fn(&str, &[u8], &http::HeaderMap) -> Answer + Send + Sync + 'static,
) -> (tempfile::TempDir, Client) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("master.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let handler = Arc::new(handler);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let handler = handler.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let handler = handler.clone();
                async move {
                    let (parts, body) = request.into_parts();
                    let body = body.collect().await.unwrap().to_bytes();
                    let line = format!("{} {}", parts.method, parts.uri);
                    Ok::<_, Infallible>(handler(&line, &body, &parts.headers))
                }
            });
            tokio::spawn(server::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades());
        }
    });
    (dir, Client::unix(path))
}

/// An error with its sources, as users see it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let _ = write!(text, ": {source}");
        next = source.source();
    }
    text
}

#[tokio::test]
async fn calls_have_the_documented_lines() {
    let (_dir, client) = serve(|line, body, headers| {
        assert_eq!(headers["skein-why"], "a test??");
        let body = std::str::from_utf8(body).unwrap();
        let list = line.starts_with("GET /v1/tasks?") || line == "GET /v1/services?stack=shop";
        answer(
            200,
            if list { "[]".into() } else { serde_json::json!({ "name": format!("{line} {body}").trim() }).to_string() },
        )
    });
    let client = client.with_why("a test\u{e4}\n");
    let check = |got: String, expected: &str| assert_eq!(got, expected);
    check(client.node("a b/c").await.unwrap().name, "GET /v1/nodes/a%20b%2Fc");
    check(client.task("web.1").await.unwrap().name, "GET /v1/tasks/web.1");
    check(client.task_stop("t").await.unwrap().name, "POST /v1/tasks/t/stop");
    let update = NodeUpdate { labels_remove: vec!["x".into()], ..Default::default() };
    check(
        client.node_update("n", &update).await.unwrap().name,
        r#"PATCH /v1/nodes/n {"labels_add":{},"labels_remove":["x"],"availability":null}"#,
    );
    client.node_remove("n", true).await.unwrap();
    assert!(client.services(Some("shop")).await.unwrap().is_empty());
    let filter = TaskFilter { stack: Some("s".into()), node: Some("n 1".into()), all: true, ..Default::default() };
    assert!(client.tasks(&filter).await.unwrap().is_empty());
}

#[tokio::test]
async fn refusals_carry_status_code_and_hint() {
    let (_dir, client) = serve(|line, _, _| match line {
        "GET /v1/nodes/x" => {
            let error = ApiError::new("not_found", "no node \"x\"").with_hint("skein node ls");
            answer(404, serde_json::to_vec(&error).unwrap())
        }
        "GET /v1/info" => answer(502, "<html>bad gateway</html>"),
        _ => answer(200, "{"),
    });
    let error = client.node("x").await.unwrap_err();
    assert_eq!(
        (error.status(), error.code(), error.hint()),
        (Some(404), Some("not_found"), Some("skein node ls".into()))
    );
    assert_eq!(chain(&error), "no node \"x\"");
    let at = client.endpoint();
    let error = client.info().await.unwrap_err();
    assert_eq!(
        chain(&error),
        format!("failed to GET /v1/info: unexpected answer from {at}: status 502 Bad Gateway without a reason")
    );
    let error = client.volumes().await.unwrap_err();
    assert!(
        chain(&error).contains("not the JSON that it should be: invalid type: map, expected a sequence"),
        "{}",
        chain(&error)
    );
    assert!(!error.is_unreachable());
}

#[tokio::test]
async fn nobody_there_is_said_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.sock");
    let error = Client::unix(&path).info().await.unwrap_err();
    assert_eq!(
        chain(&error),
        format!("failed to reach the master at unix://{}: No such file or directory (os error 2)", path.display())
    );
    assert_eq!(error.hint().unwrap(), "is skein-master running? `skein context ls` shows which master is meant");
    assert!(error.is_unreachable());
}

#[tokio::test]
async fn a_silent_master_is_a_timeout() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("master.sock");
    // Bound but never accepted: connects succeed, nothing ever answers.
    let _listener = UnixListener::bind(&path).unwrap();
    let client = Client::unix(&path).with_request_timeout(Duration::from_millis(50));
    let error = client.info().await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    assert!(matches!(client.events(None).await.unwrap_err(), ClientError::Timeout { .. }));
}

#[tokio::test]
async fn events_are_read_from_the_stream() {
    let (_dir, client) = serve(|line, _, _| {
        assert_eq!(line, "GET /v1/events?from=7");
        let task = Task { name: "web.1".into(), ..Default::default() };
        let event = |revision| Event {
            revision,
            kind: "task".into(),
            id: "t1".into(),
            object: Some(serde_json::to_value(&task).unwrap()),
        };
        let text = |revision| serde_json::to_string(&event(revision)).unwrap();
        answer(
            200,
            format!(
                ": hello\n\ndata: {}\n\nevent: change\r\nid: 9\r\ndata:{}\r\n\r\nevent: missed\ndata: \"3\"\n\ndata: {}\n\n",
                text(8),
                text(9),
                text(12)
            ),
        )
    });
    let mut events = client.events(Some(7)).await.unwrap();
    let first = events.next().await.unwrap().unwrap();
    assert_eq!((first.revision, first.kind.as_str()), (8, "task"));
    let task: Task = serde_json::from_value(first.object.unwrap()).unwrap();
    assert_eq!((task.name.as_str(), task.status.state), ("web.1", TaskState::New));
    assert_eq!(events.next().await.unwrap().unwrap().revision, 9);
    assert_eq!(events.next().await.unwrap(), None);
}

#[test]
fn event_streams_may_come_in_any_pieces() {
    let text = "data: a\ndata: b\n\n:x\n\nevent: none\n\nevent: x\ndata:\u{fc}\r\n\r\nretry: 5\n\ndata: cut";
    for size in 1..text.len() {
        let (mut decoder, mut got) = (SseDecoder::default(), Vec::new());
        for piece in text.as_bytes().chunks(size) {
            decoder.push(piece).unwrap();
            got.extend(std::iter::from_fn(|| decoder.next_event()).map(|e| format!("{}-{}", e.name, e.data)));
        }
        assert_eq!(got, ["-a\nb", "x-\u{fc}"], "pieces of {size}");
    }
    let mut decoder = SseDecoder::default();
    let long = vec![b'x'; EVENT_BYTES_MAX + 1];
    assert_eq!(decoder.push(&long).unwrap_err(), "an event is longer than 16777216 bytes");
}

#[tokio::test]
async fn logs_are_frames_and_a_cut_is_seen() {
    let (_dir, client) = serve(|line, _, _| {
        let mut bytes = Frame::Stdout(b"one\n".to_vec()).to_bytes();
        bytes.extend(Frame::Stderr(b"two\n".to_vec()).to_bytes());
        if line == "GET /v1/tasks/cut/logs" {
            bytes.pop();
        } else {
            assert_eq!(line, "GET /v1/tasks/web.1/logs?follow=true&tail=5&since_unix_s=60&timestamps=true");
        }
        answer(200, bytes)
    });
    let options = LogOptions { follow: true, tail: Some(5), since_unix_s: 60, timestamps: true };
    let mut logs = client.logs("web.1", &options).await.unwrap();
    assert_eq!(logs.next().await.unwrap(), Some(Frame::Stdout(b"one\n".to_vec())));
    assert_eq!(logs.next().await.unwrap(), Some(Frame::Stderr(b"two\n".to_vec())));
    assert_eq!(logs.next().await.unwrap(), None);
    let mut logs = client.logs("cut", &LogOptions::default()).await.unwrap();
    assert!(logs.next().await.unwrap().is_some());
    assert!(chain(&logs.next().await.unwrap_err()).ends_with("it ended in the middle of a frame"));
}

/// Answers an exec request with an upgrade and sends standard input back as standard output, then exits with 3.
async fn echo(mut request: Request<Incoming>) -> Result<Answer, Infallible> {
    assert_eq!(request.headers()[header::UPGRADE], EXEC_PROTOCOL);
    let upgrade = hyper::upgrade::on(&mut request);
    let options: ExecOptions =
        serde_json::from_slice(&request.into_body().collect().await.unwrap().to_bytes()).unwrap();
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgrade.await.unwrap());
        let mut decoder = Decoder::new();
        let mut buffer = [0; 64];
        stream.write_all(&Frame::Stderr(options.argv.join(" ").into_bytes()).to_bytes()).await.unwrap();
        loop {
            let n = stream.read(&mut buffer).await.unwrap();
            decoder.push(&buffer[..n]);
            while let Some(frame) = decoder.next_frame().unwrap() {
                let reply = match frame {
                    Frame::Stdin(data) => Frame::Stdout(data),
                    Frame::StdinEnd => Frame::Exit(3),
                    Frame::Resize { rows, columns } => Frame::Stdout(format!("{rows}x{columns}").into_bytes()),
                    other => panic!("{other:?}"),
                };
                stream.write_all(&reply.to_bytes()).await.unwrap();
                if reply == Frame::Exit(3) {
                    return stream.shutdown().await.unwrap();
                }
            }
        }
    });
    let switch = Response::builder()
        .status(101)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, EXEC_PROTOCOL)
        .body(Full::new(Bytes::new()).boxed());
    Ok(switch.unwrap())
}

#[tokio::test]
async fn exec_speaks_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("master.sock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        server::Builder::new().serve_connection(TokioIo::new(stream), service_fn(echo)).with_upgrades().await.unwrap();
    });
    let options = ExecOptions { argv: vec!["sh".into(), "-c".into()], stdin: true, ..Default::default() };
    let (mut reader, mut writer) = Client::unix(&path).exec("web.1", &options).await.unwrap();
    assert_eq!(reader.next().await.unwrap(), Some(Frame::Stderr(b"sh -c".to_vec())));
    writer.send(&Frame::Stdin(b"hello".to_vec())).await.unwrap();
    assert_eq!(reader.next().await.unwrap(), Some(Frame::Stdout(b"hello".to_vec())));
    writer.send(&Frame::Resize { rows: 2, columns: 3 }).await.unwrap();
    assert_eq!(reader.next().await.unwrap(), Some(Frame::Stdout(b"2x3".to_vec())));
    writer.send(&Frame::StdinEnd).await.unwrap();
    assert_eq!(reader.next().await.unwrap(), Some(Frame::Exit(3)));
    assert_eq!(reader.next().await.unwrap(), None);
}

#[tokio::test]
async fn exec_may_be_refused() {
    let (_dir, client) = serve(|_, _, _| answer(503, r#"{"code":"node_unreachable","message":"node dc1-a is down"}"#));
    let error = client.exec("web.1", &ExecOptions::default()).await.unwrap_err();
    assert_eq!((error.code(), chain(&error).as_str()), (Some("node_unreachable"), "node dc1-a is down"));
}

struct Pki {
    ca_pem: String,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_pem = params.self_signed(&key).unwrap().pem();
        Self { ca_pem, issuer: rcgen::Issuer::new(params, key) }
    }
    fn issue(&self, name: &str) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
    fn identity(&self) -> TlsIdentity {
        let (certificate, key) = self.issue("alice");
        TlsIdentity { ca_pem: self.ca_pem.clone().into(), certificate_pem: certificate.into(), key_pem: key.into() }
    }
}

#[tokio::test]
async fn mutual_tls_knows_both_sides() {
    let pki = Pki::new();
    let (certificate, key) = pki.issue("master.skein");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pki.ca_pem.as_bytes()).unwrap()).unwrap();
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build().unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            let service = service_fn(|_| async { Ok::<_, Infallible>(answer(200, r#"{"id":"c1"}"#)) });
            let _ = server::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        }
    });
    let client = Client::tls("127.0.0.1", port, Some("master.skein"), &pki.identity()).unwrap();
    assert_eq!(client.endpoint(), format!("tcp://127.0.0.1:{port}"));
    assert_eq!(client.info().await.unwrap().id, "c1");
    let wrong_name = Client::tls("127.0.0.1", port, None, &pki.identity()).unwrap();
    let error = wrong_name.info().await.unwrap_err();
    assert!(chain(&error).contains("invalid peer certificate"), "{}", chain(&error));
    let stranger = Pki::new();
    let identity = TlsIdentity { ca_pem: pki.ca_pem.clone().into(), ..stranger.identity() };
    let refused = Client::tls("127.0.0.1", port, Some("master.skein"), &identity).unwrap();
    assert!(refused.info().await.unwrap_err().is_unreachable());
    let other_ca = Client::tls("127.0.0.1", port, Some("master.skein"), &stranger.identity()).unwrap();
    assert!(chain(&other_ca.info().await.unwrap_err()).contains("invalid peer certificate"));
}

#[test]
fn unusable_certificates_are_named() {
    let pki = Pki::new();
    let check = |identity: TlsIdentity, expected: &str| {
        let error = Client::tls("m", 1, None, &identity).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
    };
    let good = pki.identity();
    check(
        TlsIdentity { ca_pem: Vec::new(), ..good.clone() },
        "failed to set up TLS: CA certificate: no certificate in it",
    );
    check(TlsIdentity { key_pem: Vec::new(), ..good.clone() }, "failed to set up TLS: client key: ");
    let other = pki.identity();
    check(TlsIdentity { key_pem: other.key_pem, ..good }, "failed to set up TLS: client certificate and key: ");
}
