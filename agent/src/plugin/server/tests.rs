//! The protocol over a real socket, with an overlay that has no networks and thus needs no kernel.

use http::Request as HttpRequest;
use hyper::client::conn::http1 as client;
use serde_json::Value;

use super::*;
use crate::{
    dns::UpstreamSource,
    fdstore::FdStore,
    overlay::{OverlayConfig, OverlayTask},
    plugin::socket,
};

struct World {
    dir: tempfile::TempDir,
    _overlay: OverlayTask,
    _server: PluginServer,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let config = OverlayConfig {
        underlay4: None,
        underlay6: None,
        vxlan_port: 4789,
        fast_path: true,
        netns_dir: dir.path().join("netns"),
        state_dir: dir.path().join("state"),
    };
    let store = Arc::new(config.open_store().unwrap());
    let (handle, overlay) =
        OverlayHandle::try_start(config, store, UpstreamSource::Fixed(vec![]), FdStore::default()).unwrap();
    let listener = socket::bind(&dir.path().join("skein.sock")).unwrap();
    let server = PluginServer::try_start(listener, handle).unwrap();
    World { dir, _overlay: overlay, _server: server }
}

impl World {
    async fn post(&self, method: &str, body: impl Into<Bytes>) -> (StatusCode, Value) {
        let stream = UnixStream::connect(self.dir.path().join("skein.sock")).await.unwrap();
        let (mut sender, connection) = client::handshake(TokioIo::new(stream)).await.unwrap();
        let driver = tokio::spawn(connection);
        // No content type, as engines sometimes do it.
        let request = HttpRequest::post(method).header("Host", "plugin").body(Full::new(body.into())).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status();
        assert_eq!(response.headers()[CONTENT_TYPE], MEDIA_TYPE);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        driver.abort();
        (status, serde_json::from_slice(&body).unwrap())
    }
}

#[tokio::test]
async fn the_handshake_and_capabilities() {
    let world = world();
    let check = async |method: &str, want: Value| assert_eq!(world.post(method, "").await, (StatusCode::OK, want));
    check("/Plugin.Activate", json!({"Implements": ["NetworkDriver", "IpamDriver"]})).await;
    check("/NetworkDriver.GetCapabilities", json!({"Scope": "local", "ConnectivityScope": "global"})).await;
    check("/IpamDriver.GetCapabilities", json!({"RequiresMACAddress": true, "RequiresRequestReplay": false})).await;
    check("/NetworkDriver.DiscoverNew", json!({})).await;
}

#[tokio::test]
async fn failures_are_said_in_the_words_of_both_drivers() {
    let world = world();
    let check = async |method: &str, body: &str, status: StatusCode, words: &str| {
        let (got, answer) = world.post(method, body.to_owned()).await;
        assert_eq!(got, status, "{method}: {answer}");
        assert!(answer["Err"].as_str().unwrap().contains(words), "{method}: {answer}");
        assert_eq!(answer["Err"], answer["Error"]);
    };
    let create = r#"{"NetworkID":"e1","Options":{},"IPv4Data":[{"Pool":"172.30.0.0/16"}]}"#;
    check("/NetworkDriver.CreateNetwork", create, StatusCode::OK, "hint: skein network create").await;
    check("/IpamDriver.RequestPool", "{}", StatusCode::OK, "hint: skein network create").await;
    check("/NetworkDriver.Join", r#"{"EndpointID":"p1"}"#, StatusCode::OK, "p1 is not known").await;
    check("/NetworkDriver.Join", "{", StatusCode::OK, "failed to read the body").await;
    check("/NetworkDriver.Dance", "{}", StatusCode::NOT_FOUND, "not served").await;
    // What takes down succeeds for what is not there.
    for method in ["/NetworkDriver.Leave", "/NetworkDriver.DeleteEndpoint", "/IpamDriver.ReleaseAddress"] {
        assert_eq!(world.post(method, r#"{"EndpointID":"p1"}"#).await, (StatusCode::OK, json!({})), "{method}");
    }
}

#[tokio::test]
async fn a_body_over_the_bound_is_refused() {
    let world = world();
    let (status, answer) = world.post("/NetworkDriver.Join", vec![b' '; BODY_BYTES_MAX + 1]).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(answer["Err"].as_str().unwrap().contains("length limit exceeded"), "{answer}");
}
