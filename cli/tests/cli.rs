//! The binary against a small server with scripted answers: exit codes, what goes where, waiting, streams.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    path::Path,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use skein_api::frame::{Decoder, Frame};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    process::Command,
};

/// Answers by request line, `METHOD /path` without query; several of one line are given one after the other, the last
/// one for ever.
type Script = BTreeMap<&'static str, Vec<(u16, Vec<u8>)>>;

struct Master {
    dir: tempfile::TempDir,
    /// Request lines with queries and bodies, as they came.
    requests: Arc<Mutex<Vec<String>>>,
}

fn ok(value: Value) -> (u16, Vec<u8>) {
    (200, value.to_string().into())
}

fn refuse(status: u16, code: &str, message: &str) -> (u16, Vec<u8>) {
    (status, json!({"code": code, "message": message, "hint": "try this"}).to_string().into())
}

fn script(lines: &[(&'static str, (u16, Vec<u8>))]) -> Script {
    let mut script = Script::new();
    for (line, answer) in lines {
        script.entry(line).or_default().push(answer.clone());
    }
    script
}

async fn echo(upgraded: hyper::upgrade::OnUpgrade) {
    let mut stream = TokioIo::new(upgraded.await.unwrap());
    let (mut decoder, mut buffer) = (Decoder::new(), [0; 512]);
    loop {
        let n = stream.read(&mut buffer).await.unwrap();
        if n == 0 {
            return;
        }
        decoder.push(&buffer[..n]);
        while let Some(frame) = decoder.next_frame().unwrap() {
            match frame {
                Frame::Stdin(data) => stream.write_all(&Frame::Stdout(data).to_bytes()).await.unwrap(),
                Frame::StdinEnd => {
                    stream.write_all(&Frame::Stderr(b"bye\n".to_vec()).to_bytes()).await.unwrap();
                    stream.write_all(&Frame::Exit(42).to_bytes()).await.unwrap();
                    return stream.shutdown().await.unwrap();
                }
                _ => {}
            }
        }
    }
}

impl Master {
    fn start(script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("m.sock")).unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (script, log) = (Arc::new(Mutex::new(script)), requests.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (script, log) = (script.clone(), log.clone());
                let service = service_fn(move |mut request: Request<Incoming>| {
                    let (script, log) = (script.clone(), log.clone());
                    async move {
                        let upgrade = hyper::upgrade::on(&mut request);
                        let (parts, body) = request.into_parts();
                        let body = body.collect().await.unwrap().to_bytes();
                        let line = format!("{} {}", parts.method, parts.uri.path());
                        log.lock().unwrap().push(format!(
                            "{} {} {}",
                            parts.method,
                            parts.uri,
                            String::from_utf8_lossy(&body)
                        ));
                        let mut script = script.lock().unwrap();
                        let (status, body) = match script.get_mut(line.as_str()) {
                            Some(answers) if answers.len() > 1 => answers.remove(0),
                            Some(answers) => answers[0].clone(),
                            None => refuse(404, "not_found", &format!("no answer to {line}")),
                        };
                        let mut response = Response::builder().status(status);
                        if status == 101 {
                            response = response.header("connection", "upgrade").header("upgrade", "skein-exec");
                            tokio::spawn(echo(upgrade));
                        }
                        Ok::<_, Infallible>(response.body(Full::new(Bytes::from(body))).unwrap())
                    }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades());
            }
        });
        Self { dir, requests }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_skein"));
        command.args(args).current_dir(self.dir.path()).env_clear().env("HOME", self.dir.path());
        command.env("SKEIN_HOST", format!("unix://{}/m.sock", self.dir.path().display()));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    async fn run(&self, args: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(args).output().await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn asked(&self, start: &str) -> Vec<String> {
        self.requests.lock().unwrap().iter().filter(|r| r.starts_with(start)).cloned().collect()
    }
}

fn task(id: &str, state: &str, more: Value) -> Value {
    let mut task = json!({
        "id": id, "name": "shop_web.1", "service": "s1", "slot": 1, "spec_generation": 1, "node": "n1",
        "desired_state": "running", "status": {"state": state, "container_id": "c"},
        "spec": {"container": {"image": "nginx"}},
    });
    for (key, value) in more.as_object().unwrap() {
        task["status"][key] = value.clone();
    }
    task
}

fn cluster() -> Vec<(&'static str, (u16, Vec<u8>))> {
    vec![
        ("GET /v1/nodes", ok(json!([{"id": "n1", "name": "dc1-a"}]))),
        ("GET /v1/services", ok(json!([{"id": "s1", "meta": {"generation": 1}, "spec": {"name": "shop_web"}}]))),
        ("GET /v1/events", (200, Vec::new())),
        ("PUT /v1/stacks/shop", ok(json!({"items": [{"kind": "service", "name": "shop_web", "action": "create"}]}))),
    ]
}

const COMPOSE: &str = "name: shop\nservices: {web: {image: nginx}}\n";

#[tokio::test]
async fn tables_and_json() {
    let mut lines = cluster();
    lines.push(("GET /v1/tasks", ok(json!([task("0123456789abcdef", "running", json!({}))]))));
    let master = Master::start(script(&lines));
    let table = "ID             NAME         IMAGE   NODE    PORTS   STATE\n\
                 0123456789ab   shop_web.1   nginx   dc1-a           running -\n";
    assert_eq!(master.run(&["ps", "--stack", "shop", "-a"]).await, (0, table.into(), String::new()));
    assert_eq!(master.asked("GET /v1/tasks"), ["GET /v1/tasks?stack=shop&all=true "]);
    let (code, out, _) = master.run(&["ps", "-o", "json"]).await;
    let parsed: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &parsed[0]["name"]), (0, &json!("shop_web.1")));
    assert_eq!(master.run(&["ps", "-q"]).await.1, "0123456789abcdef\n");
}

#[tokio::test]
async fn a_reader_that_leaves_is_no_failure() {
    let master = Master::start(script(&[("GET /v1/stacks", ok(json!(vec!["x"; 100_000])))]));
    let mut child = master.command(&["stack", "ls"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

#[tokio::test]
async fn exit_codes() {
    let master = Master::start(script(&[
        ("DELETE /v1/networks/used", refuse(409, "in_use", "the network \"used\" is in use")),
        ("POST /v1/containers", refuse(422, "no_node_fits", "no node fits")),
    ]));
    let error = |text: &str| format!("error: {text}\nhint: try this\n");
    let check = async |args: &[&str], code: i32, stderr: String| {
        assert_eq!(master.run(args).await, (code, String::new(), stderr), "{args:?}");
    };
    check(&["node", "inspect", "x"], 3, error("no answer to GET /v1/nodes/x")).await;
    check(
        &["network", "rm", "used", "none"],
        4,
        error("the network \"used\" is in use") + &error("no answer to DELETE /v1/networks/none"),
    )
    .await;
    check(&["run", "-d", "i"], 5, error("no node fits")).await;
    let (code, out, err) = master.run(&["ps", "--host", "unix:///nowhere/m.sock"]).await;
    assert_eq!((code, out.as_str()), (6, ""));
    assert!(err.starts_with("error: failed to reach the master at unix:///nowhere/m.sock: No such file"), "{err}");
    assert!(err.ends_with("hint: is skein-master running? `skein context ls` shows which master is meant\n"), "{err}");
    assert_eq!(master.run(&["pss"]).await.0, 2);
    assert_eq!(master.run(&["run", "-m", "lots", "i"]).await.0, 2);
    assert_eq!(master.run(&["ps", "--host", "nonsense"]).await.0, 64);
    assert_eq!(master.run(&["up"]).await.0, 64);
    assert_eq!(master.run(&["--version"]).await.0, 0);
}

#[tokio::test]
async fn a_bad_file_asks_nothing_of_the_master() {
    let master = Master::start(Script::new());
    master.write("docker-compose.yml", "services:\n  web:\n    imgae: nginx\n");
    let (code, out, err) = master.run(&["up"]).await;
    assert_eq!((code, out.as_str()), (64, ""));
    assert!(err.starts_with("error: unknown key \"imgae\" in services.web\n  at docker-compose.yml:3:5\n"), "{err}");
    assert!(master.asked("").is_empty());
}

#[tokio::test]
async fn up_waits_until_all_runs() {
    let mut lines = cluster();
    lines.push(("GET /v1/tasks", ok(json!([task("t1", "preparing", json!({"message": "pulling image"}))]))));
    lines.push(("GET /v1/tasks", ok(json!([task("t1", "running", json!({}))]))));
    let master = Master::start(script(&lines));
    master.write("compose.yaml", COMPOSE);
    let (code, out, err) = master.run(&["up"]).await;
    let expected = "+ create    service  shop_web\nstack shop: 1 to create\n\
                    web.1  preparing on dc1-a: pulling image\nweb.1  running on dc1-a\n";
    assert_eq!((code, out.as_str(), err.as_str()), (0, "", expected));
    let puts = master.asked("PUT ");
    assert!(puts[0].contains("\"dry_run\":true") && puts[1].contains("\"dry_run\":false"), "{puts:?}");
    let (code, out, _) = master.run(&["up", "-o", "json"]).await;
    let parsed: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &parsed["tasks"][0]["status"]["state"]), (0, &json!("running")));
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let master = Master::start(script(&cluster()));
    master.write("other.yml", COMPOSE);
    let (code, out, err) = master.run(&["up", "-f", "other.yml", "-p", "shop", "--dry-run"]).await;
    assert_eq!((code, out.as_str(), err.as_str()), (0, "+ create    service  shop_web\nstack shop: 1 to create\n", ""));
    assert_eq!(master.asked("").len(), 1);
}

#[tokio::test]
async fn up_says_why_it_failed() {
    let mut lines = cluster();
    let failed = |id| task(id, "rejected", json!({"err": "no such image: nginx"}));
    lines.push(("GET /v1/tasks", ok(json!([failed("t1"), failed("t2"), failed("t3")]))));
    let master = Master::start(script(&lines));
    master.write("compose.yaml", COMPOSE);
    let (code, _, err) = master.run(&["up"]).await;
    assert_eq!(code, 1);
    let end = "error: stack shop did not come up: web.1 failed\n  web.1  rejected on dc1-a: no such image: nginx\n\
               hint: skein logs shop_web.1\n";
    assert!(err.ends_with(end), "{err}");
}

#[tokio::test]
async fn up_explains_what_fits_nowhere() {
    let mut lines = cluster();
    let mut pending = task("t1", "pending", json!({"message": "no node fits"}));
    pending["node"] = Value::Null;
    lines.push(("GET /v1/tasks", ok(json!([pending]))));
    let filters = json!([{"filter": "constraint node.labels.disk==ssd", "rejected": 3, "rejected_alone": 3}]);
    let explanation =
        json!({"subject": "shop_web", "summary": "no node fits", "nodes": 3, "filters": filters, "fitting": 0});
    lines.push(("GET /v1/explain/shop_web", ok(explanation)));
    let master = Master::start(script(&lines));
    master.write("compose.yaml", COMPOSE);
    let (code, _, err) = master.run(&["up", "--timeout", "200ms"]).await;
    let end = "error: stack shop did not come up within 0 s
  web.1  pending: no node fits
    shop_web: no node fits
    FILTER                             REJECTED   ALONE
    constraint node.labels.disk==ssd   3          3
    0 of 3 nodes fit
hint: skein explain shop_web
";
    assert!(err.ends_with(end), "{err}");
    assert_eq!(code, 5);
}

#[tokio::test]
async fn down_waits_until_all_is_gone() {
    let mut lines = cluster();
    let plan = json!({"items": [{"kind": "service", "name": "shop_web", "action": "remove"}]});
    lines.push(("DELETE /v1/stacks/shop", ok(plan)));
    lines.push(("GET /v1/tasks", ok(json!([task("t1", "running", json!({}))]))));
    lines.push(("GET /v1/tasks", ok(json!([task("t1", "running", json!({}))]))));
    lines.push(("GET /v1/tasks", ok(json!([]))));
    let master = Master::start(script(&lines));
    let (code, out, err) = master.run(&["down", "-p", "shop", "--volumes"]).await;
    let expected =
        "- remove    service  shop_web\nstack shop: 1 to remove\nweb.1  stopped\nstack shop is removed (1 services)\n";
    assert_eq!((code, out.as_str(), err.as_str()), (0, "", expected));
    let asked = master.asked("DELETE");
    assert_eq!(asked, ["DELETE /v1/stacks/shop?volumes=true&dry_run=true ", "DELETE /v1/stacks/shop?volumes=true "]);
}

#[tokio::test]
async fn logs_name_their_tasks() {
    let mut output = Frame::Stdout(b"one\ntw".to_vec()).to_bytes();
    output.extend(Frame::Stdout(b"o\n".to_vec()).to_bytes());
    output.extend(Frame::Stderr(b"end".to_vec()).to_bytes());
    let mut lines = cluster();
    lines.push(("GET /v1/services/shop_web", ok(json!({"id": "s1", "spec": {"name": "shop_web"}}))));
    lines.push(("GET /v1/tasks", ok(json!([task("t1", "running", json!({}))]))));
    lines.push(("GET /v1/tasks/shop_web.1", ok(task("t1", "running", json!({})))));
    lines.push(("GET /v1/tasks/t1", ok(task("t1", "running", json!({})))));
    lines.push(("GET /v1/tasks/t1/logs", (200, output)));
    lines.push(("GET /v1/stacks", ok(json!(["shop"]))));
    let master = Master::start(script(&lines));
    let prefixed = "shop_web.1 | one\nshop_web.1 | two\nshop_web.1 | end\n";
    assert_eq!(master.run(&["logs", "shop_web"]).await, (0, prefixed.into(), String::new()));
    assert_eq!(master.run(&["logs", "shop", "-n", "5"]).await, (0, prefixed.into(), String::new()));
    assert_eq!(master.asked("GET /v1/tasks/t1/logs")[1], "GET /v1/tasks/t1/logs?tail=5 ");
    assert_eq!(master.run(&["logs", "shop_web.1"]).await, (0, "one\ntwo\n".into(), "end\n".into()));
    assert_eq!(master.run(&["logs", "none"]).await.0, 3);
}

#[tokio::test]
async fn exec_passes_input_and_exit_code() {
    let master = Master::start(script(&[("POST /v1/tasks/web.1/exec", (101, Vec::new()))]));
    let mut child = master.command(&["exec", "-i", "web.1", "--", "cat", "-n"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"hello\n").await.unwrap();
    drop(stdin);
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(
        (output.status.code(), output.stdout, output.stderr),
        (Some(42), b"hello\n".to_vec(), b"bye\n".to_vec())
    );
    assert!(master.asked("POST")[0].contains(r#""argv":["cat","-n"],"tty":false,"stdin":true"#));
}

#[tokio::test]
async fn run_ends_as_its_container_does() {
    let ended = task("t1", "failed", json!({"exit_code": 7}));
    let mut lines = cluster();
    lines.push(("POST /v1/containers", ok(task("t1", "new", json!({})))));
    lines.push(("GET /v1/tasks/t1", ok(task("t1", "running", json!({})))));
    lines.push(("GET /v1/tasks/t1", ok(ended)));
    lines.push(("GET /v1/tasks/t1/logs", (200, Frame::Stdout(b"out\n".to_vec()).to_bytes())));
    lines.push(("DELETE /v1/tasks/t1", ok(json!({}))));
    let master = Master::start(script(&lines));
    let got = master.run(&["run", "--rm", "-e", "A=1", "busybox", "sh", "-c", "exit 7"]).await;
    assert_eq!(got, (7, "out\n".into(), String::new()));
    assert_eq!(master.asked("DELETE"), ["DELETE /v1/tasks/t1?force=true "]);
    assert!(master.asked("POST")[0].contains(r#""command":["sh","-c","exit 7"]"#));
}

#[tokio::test]
async fn contexts_and_certificates() {
    let bundle = json!({"certificate_pem": "C\n", "key_pem": "K\n", "ca_pem": "A\n"});
    let master = Master::start(script(&[("POST /v1/certs", ok(bundle))]));
    let dir = |name: &str| -> String { Path::new(master.dir.path()).join(name).to_str().unwrap().to_owned() };
    assert_eq!(master.run(&["cert", "issue", "--out", &dir("alice"), "alice"]).await.0, 0);
    assert_eq!(std::fs::read_to_string(dir("alice/key.pem")).unwrap(), "K\n");
    assert_eq!(master.run(&["cert", "issue", "--out", &dir("alice"), "alice"]).await.0, 4);
    assert_eq!(master.run(&["cert", "issue", "bob"]).await.1, "C\nK\nA\n");
    // These are no certificates: refused before they are kept.
    let bad = master.run(&["context", "create", "--host", "tcp://m:1", "--certs", &dir("alice"), "prod"]).await;
    assert_eq!((bad.0, bad.2.starts_with("error: failed to set up TLS: ")), (64, true), "{}", bad.2);
    let socket = format!("unix://{}", dir("m.sock"));
    assert_eq!(master.run(&["context", "create", "--host", &socket, "here"]).await.0, 0);
    assert_eq!(master.run(&["context", "use", "here"]).await.0, 0);
    let (code, out, _) = master.run(&["context", "show"]).await;
    assert_eq!((code, out), (0, format!("name: here\nhost: {socket}\ncertificates: none\n")));
    assert_eq!(master.run(&["context", "use", "none"]).await.0, 3);
}

#[tokio::test]
async fn completions_are_scripts() {
    let master = Master::start(Script::new());
    let (code, out, _) = master.run(&["completion", "bash"]).await;
    assert_eq!((code, out.contains("complete -F _skein")), (0, true));
}

#[tokio::test]
async fn rm_says_what_it_removed() {
    let master =
        Master::start(script(&[("DELETE /v1/tasks/t1", ok(json!({}))), ("DELETE /v1/tasks/t2", ok(json!({})))]));
    assert_eq!(master.run(&["rm", "t1", "t2"]).await, (0, "t1\nt2\n".into(), String::new()));
    let (code, out, _) = master.run(&["rm", "t1", "t2", "-o", "json"]).await;
    let removed: Vec<Value> = serde_json::Deserializer::from_str(&out).into_iter().map(Result::unwrap).collect();
    assert_eq!((code, removed), (0, vec![json!({"removed": "t1"}), json!({"removed": "t2"})]));
}

#[tokio::test]
async fn a_run_that_fails_is_removed_all_the_same() {
    let mut lines = cluster();
    lines.push(("POST /v1/containers", ok(task("t1", "new", json!({})))));
    lines.push(("GET /v1/tasks/t1", ok(task("t1", "rejected", json!({"err": "no such image"})))));
    lines.push(("GET /v1/tasks/t1/logs", refuse(404, "not_found", "no output")));
    lines.push(("DELETE /v1/tasks/t1", ok(json!({}))));
    let master = Master::start(script(&lines));
    let (code, _, err) = master.run(&["run", "--rm", "nothing"]).await;
    assert_eq!(code, 3, "{err}");
    assert_eq!(master.asked("DELETE"), ["DELETE /v1/tasks/t1?force=true "]);
}

#[tokio::test]
async fn output_goes_on_where_it_broke_off() {
    let mut first = Frame::Stdout(b"one\ntw".to_vec()).to_bytes();
    first.extend(Frame::Failure("the agent lost its master".into()).to_bytes());
    let whole = Frame::Stdout(b"one\ntwo\n".to_vec()).to_bytes();
    let mut lines = cluster();
    lines.push(("POST /v1/containers", ok(task("t1", "new", json!({})))));
    lines.push(("GET /v1/tasks/t1", ok(task("t1", "running", json!({})))));
    lines.push(("GET /v1/tasks/t1", ok(task("t1", "complete", json!({"exit_code": 0})))));
    lines.push(("GET /v1/tasks/t1/logs", (200, first)));
    lines.push(("GET /v1/tasks/t1/logs", refuse(503, "no_agent", "the node has no session")));
    lines.push(("GET /v1/tasks/t1/logs", (200, whole)));
    let master = Master::start(script(&lines));
    assert_eq!(master.run(&["run", "busybox"]).await, (0, "one\ntwo\n".into(), String::new()));
}

#[tokio::test]
async fn interrupted_runs_are_removed() {
    let mut lines = cluster();
    lines.push(("POST /v1/containers", ok(task("t1", "new", json!({})))));
    lines.push(("GET /v1/tasks/t1", ok(task("t1", "starting", json!({})))));
    lines.push(("DELETE /v1/tasks/t1", ok(json!({}))));
    let master = Master::start(script(&lines));
    let child = master.command(&["run", "--rm", "busybox"]).spawn().unwrap();
    let pid = i32::try_from(child.id().unwrap()).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    // From the container's making on, the signals are caught.
    while master.asked("POST").is_empty() {
        assert!(std::time::Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    let term = Command::new("kill").args(["-TERM", &pid.to_string()]).status().await.unwrap();
    assert!(term.success());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(128 + 15));
    assert_eq!(master.asked("DELETE"), ["DELETE /v1/tasks/t1?force=true "]);
}

#[tokio::test]
async fn troubles_of_nodes_are_shown() {
    let well = json!({"id": "n1", "name": "a", "status": {"state": "ready"}});
    let ill = json!({
        "id": "n2", "name": "b", "status": {"state": "ready"}, "description": {"troubles": ["disk full", "no engine"]},
    });
    let master = Master::start(script(&[
        ("GET /v1/nodes", ok(json!([well]))),
        ("GET /v1/nodes", ok(json!([well, ill]))),
        ("GET /v1/nodes/b", ok(ill.clone())),
    ]));
    assert!(!master.run(&["node", "ls"]).await.1.contains("TROUBLES"));
    let (_, out, _) = master.run(&["node", "ls"]).await;
    let rows: Vec<&str> = out.lines().collect();
    assert!(rows[0].ends_with("TROUBLES") && rows[1].contains(" ready ") && rows[2].contains(" ready! "), "{out}");
    assert!(rows[2].ends_with("disk full; no engine"), "{out}");
    assert!(master.run(&["node", "inspect", "b"]).await.1.contains("disk full"));
}

#[tokio::test]
async fn debug_check_says_that_all_is_well_or_what_is_not() {
    let info = ok(json!({"revision": 7, "nodes": {"ready": 2, "down": 1}, "tasks": {"running": 5}}));
    let well = Master::start(script(&[("GET /v1/check", ok(json!([]))), ("GET /v1/info", info.clone())]));
    let (code, out, err) = well.run(&["debug", "check"]).await;
    assert_eq!((code, out.as_str(), err.as_str()), (0, "all invariants hold: 3 nodes, 5 tasks, revision 7\n", ""));
    let (code, out, _) = well.run(&["debug", "check", "-o", "json"]).await;
    assert_eq!((code, serde_json::from_str::<Value>(&out).unwrap()), (0, json!([])));

    let lines = json!(["vni has two owners: a and b", "block 10.0.0.0/24 belongs to no node"]);
    let broken = Master::start(script(&[("GET /v1/check", ok(lines.clone())), ("GET /v1/info", info)]));
    let (code, out, err) = broken.run(&["debug", "check"]).await;
    assert_eq!((code, out.as_str()), (1, "vni has two owners: a and b\nblock 10.0.0.0/24 belongs to no node\n"));
    assert!(err.contains("2 invariants") && err.contains("hint: save the state"), "{err}");
    let (code, out, _) = broken.run(&["debug", "check", "-o", "json"]).await;
    assert_eq!((code, serde_json::from_str::<Value>(&out).unwrap()), (1, lines));
}
