//! Compose files in, stacks, warnings and whole error messages out. Here: what all tests use, and the keys of services;
//! `tests_files.rs` has whole files: messages, names, variables, several files.

use std::io;

use super::*;

#[path = "tests_files.rs"]
mod files;

/// What the surroundings of all tests are: a directory `/srv/My Shop`, some files, some variables.
fn parse_with(texts: &[&str], change: impl FnOnce(&mut Options<'_>)) -> Result<Parsed, ComposeError> {
    let read = |path: &Path| match path.to_str().unwrap() {
        "/srv/My Shop/.env" => Ok("TAG=16\nEMPTY=\nWHO=file\n".to_owned()),
        "/srv/My Shop/a.env" => Ok("A=1\nB=file\nconstraint:zone==eu\n".to_owned()),
        "/srv/My Shop/bad.env" => Ok("A=1\n2=3\n".to_owned()),
        "/other.env" => Ok("TAG=17\n".to_owned()),
        _ => Err(io::ErrorKind::NotFound.into()),
    };
    let names = ["c.yml", "over.yml"];
    let mut options = Options {
        files: texts.iter().zip(names).map(|(t, n)| ComposeFile { name: n.into(), text: (*t).into() }).collect(),
        project_dir: "/srv/My Shop".into(),
        project_name: None,
        env: [("HOME", "/root"), ("WHO", "env"), ("SECRET", "x$y")].map(|(k, v)| (k.into(), v.into())).into(),
        env_files: Vec::new(),
        profiles: Vec::new(),
        strict: false,
        read: &read,
    };
    change(&mut options);
    parse(&options)
}

fn parse_one(text: &str) -> Result<Parsed, ComposeError> {
    parse_with(&[text], |_| ())
}

/// What differs from `default`, recursively.
fn difference(a: &serde_json::Value, default: &serde_json::Value) -> Option<serde_json::Value> {
    use serde_json::Value::Object;
    match (a, default) {
        (Object(a), Object(b)) => {
            let field = |(k, v): (&String, &serde_json::Value)| match b.get(k) {
                Some(other) => Some((k.clone(), difference(v, other)?)),
                None => Some((k.clone(), v.clone())),
            };
            let fields: serde_json::Map<_, _> = a.iter().filter_map(field).collect();
            (!fields.is_empty()).then_some(Object(fields))
        }
        _ => (a != default).then(|| a.clone()),
    }
}

/// The service `web` of the given keys, as what it changes of an empty one, without names and networks.
fn service_json(keys: &str) -> Result<String, ComposeError> {
    let indented: String = keys.lines().map(|l| format!("    {l}\n")).collect();
    let parsed = parse_one(&format!("services:\n  web:\n    image: i\n{indented}"))?;
    let mut spec = parsed.stack.services[0].clone();
    (spec.name, spec.short_name, spec.stack) = Default::default();
    spec.task.networks.clear();
    spec.task.container.image.clear();
    let default = serde_json::to_value(skein_api::ServiceSpec::default()).unwrap();
    let got = difference(&serde_json::to_value(&spec).unwrap(), &default).unwrap_or_default();
    Ok(got.to_string())
}

fn check(keys: &str, expected: &str) {
    let got = service_json(keys).unwrap_or_else(|e| e.to_string());
    assert_eq!(got, expected, "\n{keys}");
}

/// The same, looking at one part of the service: a JSON pointer.
fn check_at(pointer: &str, keys: &str, expected: &str) {
    let got: serde_json::Value = serde_json::from_str(&service_json(keys).unwrap_or_else(|e| panic!("{e}"))).unwrap();
    assert_eq!(got.pointer(pointer).unwrap_or(&serde_json::Value::Null).to_string(), expected, "\n{keys}");
}

/// Errors of a service `web` with these keys, on one line each: `line:column message [hint]`, lines as in `keys`.
fn refused(keys: &str, expected: &[&str]) {
    let error = match service_json(keys) {
        Ok(got) => panic!("no error: {got}\n{keys}"),
        Err(e) => e,
    };
    let show = |p: &Problem| {
        let hint = p.hint.as_ref().map(|h| format!(" [{h}]")).unwrap_or_default();
        let at = p.at.map(|at| format!("{}:{} ", at.line as i64 - 3, at.column as i64 - 4)).unwrap_or_default();
        format!("{at}{}{hint}", p.message)
    };
    assert_eq!(error.problems.iter().map(show).collect::<Vec<_>>(), expected, "\n{keys}");
}

/// Errors of a whole file, as the user sees them.
fn error(text: &str, expected: &str) {
    match parse_one(text) {
        Ok(parsed) => panic!("no error: {:?}", parsed.stack),
        Err(e) => assert_eq!(e.to_string(), expected, "\n{text}"),
    }
}

fn warnings(text: &str, expected: &[&str]) {
    let parsed = parse_one(text).unwrap_or_else(|e| panic!("{e}"));
    let show = |p: &Problem| {
        let at = p.at.map(|at| format!("{}:{} ", at.line, at.column)).unwrap_or_default();
        format!("{at}{}", p.message)
    };
    assert_eq!(parsed.warnings.iter().map(show).collect::<Vec<_>>(), expected, "\n{text}");
}

#[test]
fn the_well_known_example() {
    let parsed = parse_one(
        "\
version: '2'
services:
  db:
    image: postgres:${TAG}
    mem_limit: 256m
    volumes: [data:/var/lib/postgresql]
    environment:
      - constraint:instance==db
      - POSTGRES_PASSWORD=$SECRET
    healthcheck: {test: pg_isready, interval: 1s}
  app:
    image: demo-app
    ports: ['8080:8080']
    depends_on: {db: {condition: service_healthy}}
    environment: {'constraint:instance': =java, DB: db}
volumes: {data: }
",
    )
    .unwrap_or_else(|e| panic!("{e}"));
    assert!(parsed.warnings.is_empty(), "{:?}", parsed.warnings);
    let stack = parsed.stack;
    assert_eq!((stack.name.as_str(), stack.volumes), ("myshop", vec!["myshop_data".to_owned()]));
    assert_eq!(stack.networks.len(), 1);
    assert_eq!(
        (stack.networks[0].name.as_str(), stack.networks[0].stack.as_deref()),
        ("myshop_default", Some("myshop"))
    );
    let [db, app] = &stack.services[..] else { panic!() };
    assert_eq!((db.name.as_str(), db.short_name.as_str(), db.stack.as_deref()), ("myshop_db", "db", Some("myshop")));
    assert_eq!(db.task.container.image, "postgres:16");
    assert_eq!(db.task.placement.constraints, ["constraint:instance==db"]);
    assert_eq!(db.task.container.env, [("POSTGRES_PASSWORD".to_owned(), Some("x$y".to_owned()))].into());
    assert_eq!(db.task.container.mounts[0].source.as_deref(), Some("myshop_data"));
    assert_eq!(db.task.networks[0].network, "myshop_default");
    assert_eq!(app.task.placement.constraints, ["constraint:instance==java"]);
    assert_eq!(app.depends_on[0].service, "myshop_db");
    assert_eq!(app.depends_on[0].condition, skein_api::DependencyCondition::ServiceHealthy);
}

#[test]
fn process_keys() {
    let at = |keys, expected| check_at("/task/container", keys, expected);
    at("command: sh -c 'a b' c", r#"{"command":["sh","-c","a b","c"]}"#);
    at("command: [a, '1', 2]", r#"{"command":["a","1","2"]}"#);
    at("command: []\nentrypoint: ''", r#"{"command":[],"entrypoint":[]}"#);
    at("command:\nentrypoint: ~", "null");
    at("command: echo $$HOME ${TAG}", r#"{"command":["echo","$HOME","16"]}"#);
    at("command: |\n  sh\n  -c\n  'x y'", r#"{"command":["sh","-c","x y"]}"#);
    at("hostname: h\nuser: 1000\nworking_dir: /w", r#"{"hostname":"h","user":"1000","working_dir":"/w"}"#);
    at("stop_signal: SIGINT\nstop_grace_period: 1m30s", r#"{"stop_grace_ms":90000,"stop_signal":"SIGINT"}"#);
    at("init: true\ntty: true\nstdin_open: 'true'", r#"{"init":true,"stdin_open":true,"tty":true}"#);
    at("init: false", r#"{"init":false}"#);
    at("privileged: true\nread_only: true", r#"{"privileged":true,"read_only":true}"#);
    at("cap_add: [NET_ADMIN]\ncap_drop: [ALL]", r#"{"cap_add":["NET_ADMIN"],"cap_drop":["ALL"]}"#);
    at("container_name: c1", r#"{"container_name":"c1"}"#);
    at("labels: [a=b, c]", r#"{"labels":{"a":"b","c":""}}"#);
    at("labels: {a: b, n: 1.0, t: true}", r#"{"labels":{"a":"b","n":"1.0","t":"true"}}"#);
    at("expose: ['80', 53/udp, 90-91]", r#"{"expose":["80","53/udp","90-91"]}"#);
    at(
        "extra_hosts: [db:10.0.0.5, 'v6:[::1]', g=host-gateway]",
        r#"{"extra_hosts":["db:10.0.0.5","v6:::1","g:host-gateway"]}"#,
    );
    at("extra_hosts: {db: 10.0.0.5}", r#"{"extra_hosts":["db:10.0.0.5"]}"#);
    at("x-anything: {goes: [here]}", "null");
}

#[test]
fn environments() {
    let at = |keys, expected| check_at("/task/container/env", keys, expected);
    at("environment: [A=1, B, WHO, C=]", r#"{"A":"1","B":null,"C":"","WHO":"env"}"#);
    at("environment: {A: 1, B: , WHO: ~, T: true, F: 1.0}", r#"{"A":"1","B":null,"F":"1.0","T":"true","WHO":"env"}"#);
    at("environment: ['A=x=y']", r#"{"A":"x=y"}"#);
    at("env_file: a.env", r#"{"A":"1","B":"file"}"#);
    at("env_file: [a.env]\nenvironment: [B=own]", r#"{"A":"1","B":"own"}"#);
    at("env_file: [{path: a.env}, {path: none.env, required: false}]", r#"{"A":"1","B":"file"}"#);
    check_at("/task/placement", "env_file: a.env", r#"{"constraints":["constraint:zone==eu"]}"#);
    check_at(
        "/task",
        "environment: ['constraint:disk!=ssd', 'affinity:container==~db']\ndeploy: {placement: {constraints: [node.labels.a==b]}}",
        r#"{"placement":{"affinities":["affinity:container==~db"],"constraints":["constraint:disk!=ssd","node.labels.a==b"]}}"#,
    );
    refused(
        "env_file: none.env",
        &["1:11 services.web.env_file: failed to read /srv/My Shop/none.env: entity not found"],
    );
    refused(
        "env_file: [a.env, bad.env]",
        &["1:19 services.web.env_file[1]: /srv/My Shop/bad.env:2: \"2\" is not a variable's name; expected NAME=value"],
    );
    refused("env_file: {required: false}", &["1:11 services.web.env_file: expected the key \"path\""]);
    refused("environment: A=1", &["1:14 services.web.environment: expected a mapping or a list, found \"A=1\""]);
    refused("environment: {A: [1]}", &["1:18 services.web.environment.A: expected text, found a list"]);
    refused("environment: ['A B=1']", &["1:15 services.web: \"A B\" cannot be the name of a variable"]);
    refused(
        "environment: ['constraint:disk']",
        &[
            "1:15 services.web: \"constraint:disk\" is a placement expression without an operator [write constraint:key==value]",
        ],
    );
}

#[test]
fn health_checks() {
    let at = |keys, expected| check_at("/task/container/healthcheck", keys, expected);
    at(
        "healthcheck: {test: curl x}",
        r#"{"interval_ms":0,"retries":0,"start_period_ms":0,"test":["CMD-SHELL","curl x"],"timeout_ms":0}"#,
    );
    at(
        "healthcheck: {test: [CMD, curl, x], interval: 1m30s, timeout: 5s, retries: 3, start_period: 1.5s}",
        r#"{"interval_ms":90000,"retries":3,"start_period_ms":1500,"test":["CMD","curl","x"],"timeout_ms":5000}"#,
    );
    at(
        "healthcheck: {disable: true}",
        r#"{"interval_ms":0,"retries":0,"start_period_ms":0,"test":["NONE"],"timeout_ms":0}"#,
    );
    let test = "1:21 services.web.healthcheck.test: expected [\"CMD\", program, argument…], [\"CMD-SHELL\", line] or [\"NONE\"], found";
    refused("healthcheck: {test: [curl, x]}", &[&format!("{test} [\"curl\", \"x\"]")]);
    refused("healthcheck: {test: []}", &[&format!("{test} []")]);
    refused(
        "healthcheck: {interval: soon}",
        &["1:25 services.web.healthcheck.interval: expected a duration such as 1m30s, found \"soon\""],
    );
    refused(
        "healthcheck: {tets: x}",
        &["1:15 unknown key \"tets\" in services.web.healthcheck [did you mean \"test\"?]"],
    );
}

#[test]
fn port_keys() {
    let at = |keys: &str, expected: &str| {
        let spec = service_json(keys).map(|_| ()).and_then(|()| {
            let indented: String = keys.lines().map(|l| format!("    {l}\n")).collect();
            Ok(parse_one(&format!("services:\n  web:\n    image: i\n{indented}"))?.stack.services.remove(0))
        });
        let ports = spec.unwrap_or_else(|e| panic!("{e}")).task.ports;
        let show = |p: &skein_api::PortPublish| {
            let ip = p.host_ip.map(|ip| format!("{ip} ")).unwrap_or_default();
            format!("{ip}{}>{}", p.host_port, p.container_port)
        };
        assert_eq!(ports.iter().map(show).collect::<Vec<_>>().join(" "), expected, "{keys}");
    };
    at("ports: [80, '81', 22:22]", "0>80 0>81 22>22");
    at("ports: ['8000-8001:80-81', '127.0.0.1:9:9', '[::1]:9:9']", "8000>80 8001>81 127.0.0.1 9>9 ::1 9>9");
    at(
        "ports: [{target: 80, published: '8080', host_ip: 10.0.0.1, mode: host, name: web, app_protocol: http}]",
        "10.0.0.1 8080>80",
    );
    at("ports: [{target: 80}, {target: 80-81, published: 90-91}]", "0>80 90>80 91>81");
    at("ports: [80:80, 80:80]", "80>80");
    refused("ports: 80:80", &["1:8 services.web.ports: expected a list, found \"80:80\""]);
    refused(
        "ports: ['80:x']",
        &["1:9 services.web.ports[0]: expected a port of 1 to 65535 or a range of them, found \"x\""],
    );
    refused("ports: [\"1-65535:1-65535\"]", &["1:9 services.web.ports[0]: a service publishes at most 4096 ports"]);
    refused("ports: [80:80, 80:81]", &["1:16 services.web.ports[1]: the host's port 80 is published twice"]);
    refused("ports: [{published: 80}]", &["1:9 services.web.ports[0]: expected the key \"target\""]);
    refused(
        "ports: [{target: 80, protocol: sctp}]",
        &["1:32 services.web.ports[0].protocol: expected the protocol tcp or udp, found \"sctp\""],
    );
    let ingress = |keys: &str, expected: &str| check_at("/ingress", keys, expected);
    ingress(
        "ports: [{target: 80-81, published: 8080-8081, mode: ingress}, {target: 80, published: 8080, mode: ingress}]",
        r#"[{"protocol":"tcp","published":8080,"target":80},{"protocol":"tcp","published":8081,"target":81}]"#,
    );
    at("ports: [9:9, {target: 53, published: 53, protocol: udp, mode: ingress}]", "9>9");
    let needs = "mode ingress expects the key \"published\": the port of every host";
    let hint = "[write for example {target: 80, published: 8080, mode: ingress}]";
    refused("ports: [{target: 80, mode: ingress}]", &[&format!("1:9 services.web.ports[0]: {needs} {hint}")]);
    refused(
        "ports: [{target: 80, published: 80, host_ip: 127.0.0.1, mode: ingress}]",
        &["1:46 services.web.ports[0].host_ip: a port of mode ingress is open on all addresses of every host"],
    );
    let twice = [
        "ports: [80:80, {target: 80, published: 80, mode: ingress}]",
        "ports: [{target: 80, published: 80, mode: ingress}, 80:80]",
    ];
    for keys in twice {
        let message = service_json(keys).expect_err("twice").to_string();
        assert!(message.contains("the host's port 80 is published twice"), "{message}");
    }
    refused(
        "ports: [{target: 80, mode: vip}]",
        &["1:28 services.web.ports[0].mode: expected host or ingress, found \"vip\""],
    );
}

#[test]
fn mounts_of_a_service() {
    let at = |keys: &str, expected: &str| {
        let text =
            format!("services:\n  web:\n    image: i\n    {keys}\nvolumes: {{data: , ext: {{external: true}}}}\n");
        let spec = parse_one(&text).unwrap_or_else(|e| panic!("{e}")).stack.services.remove(0);
        let show = |m: &skein_api::Mount| {
            let source = m.source.clone().unwrap_or_default();
            let size = m.tmpfs_size_bytes.map(|s| format!(" {s}")).unwrap_or_default();
            format!("{:?} {source}>{}{}{size}", m.kind, m.target, if m.read_only { " ro" } else { "" })
        };
        assert_eq!(spec.task.container.mounts.iter().map(show).collect::<Vec<_>>().join(", "), expected, "{keys}");
    };
    at("volumes: [data:/d, ext:/e:ro, /anon]", "Volume myshop_data>/d, Volume ext>/e ro, Volume >/anon");
    at(
        "volumes: [./a:/a, ../b:/b:ro, /c:/c:rw, ~/d:/d]",
        "Bind /srv/My Shop/a>/a, Bind /srv/b>/b ro, Bind /c>/c, Bind /root/d>/d",
    );
    at("volumes: [{type: volume, source: data, target: /d, read_only: true}]", "Volume myshop_data>/d ro");
    at("volumes: [{type: bind, source: ., target: /d}]", "Bind /srv/My Shop>/d");
    at("volumes: [{type: tmpfs, target: /t, tmpfs: {size: 64m}}]", "Tmpfs >/t 67108864");
    at("tmpfs: /run", "Tmpfs >/run");
    at("tmpfs: [/run, '/tmp:size=1m']", "Tmpfs >/run, Tmpfs >/tmp 1048576");
    refused(
        "volumes: [a:b]",
        &["1:11 services.web.volumes[0]: expected an absolute path inside the container, found \"b\""],
    );
    refused(
        "volumes: ['/a:/b:xx']",
        &["1:11 services.web.volumes[0]: unknown or unsupported option \"xx\" in \"/a:/b:xx\"; expected ro or rw"],
    );
    refused("volumes: [/a, /a]", &["1:15 services.web: two mounts have the target \"/a\""]);
    refused(
        "volumes: [dta:/d]",
        &[
            "1:11 services.web: there is no volume \"dta\" in the file [add it to volumes: at the top level, with `external: true` if it is there already]",
        ],
    );
    refused(
        "volumes: [{type: npipe, target: /x}]",
        &["1:18 services.web.volumes[0].type: expected volume, bind or tmpfs, found \"npipe\""],
    );
    refused("volumes: [{type: bind, target: /x}]", &["1:11 services.web.volumes[0]: expected the key \"source\""]);
    refused(
        "volumes: [{type: bind, source: /x, target: /x, bind: {propagation: rshared}}]",
        &[
            "1:55 services.web.volumes[0].bind.propagation is refused: mount propagation is not supported yet [remove the key if the service can do without it]",
        ],
    );
}

#[test]
fn deploy_keys() {
    check("scale: 3", r#"{"mode":{"replicated":3}}"#);
    check("deploy: {replicas: 0}", r#"{"mode":{"replicated":0}}"#);
    check("scale: 2\ndeploy: {replicas: 2}", r#"{"mode":{"replicated":2}}"#);
    check("deploy: {mode: global}", r#"{"mode":"global"}"#);
    check("deploy: {endpoint_mode: dnsrr, x-skein: {drain: 30s}}", r#"{"drain_ms":30000,"endpoint_mode":"dnsrr"}"#);
    check("deploy: {endpoint_mode: vip}", "null");
    let update = |keys: &str, expected| check_at("/update", &format!("deploy: {{update_config: {keys}}}"), expected);
    update("{order: start-first, delay: 2s}", r#"{"delay_ms":2000,"order":"start-first","parallelism":1}"#);
    update("{parallelism: 0, failure_action: pause}", "null");
    update("{parallelism: 3}", r#"{"delay_ms":0,"order":"stop-first","parallelism":3}"#);
    refused(
        "deploy: {update_config: {order: both}}",
        &["1:33 services.web.deploy.update_config.order: expected stop-first or start-first, found \"both\""],
    );
    check("deploy: {mode: replicated, labels: {a: b}}", r#"{"labels":{"a":"b"}}"#);
    check_at("/task/placement", "deploy: {placement: {max_replicas_per_node: 2}}", r#"{"max_replicas_per_node":2}"#);
    let placement =
        |keys: &str, expected| check_at("/task/placement", &format!("deploy: {{placement: {keys}}}"), expected);
    placement(
        "{preferences: [{spread: node.labels.zone}, {spread: node.labels.rack}]}",
        r#"{"preferences":[{"spread":"node.labels.zone"},{"spread":"node.labels.rack"}]}"#,
    );
    placement(
        "{x-skein: {strategy: binpack, whitelist: [n1, n2], affinities: ['service!=web'], network_plugins: [weave]}}",
        r#"{"affinities":["service!=myshop_web"],"network_plugins":["weave"],"strategy":"binpack","whitelists":["node==n1|n2"]}"#,
    );
    placement("{x-skein: {priority: -5, preempt: true}}", r#"{"preempt":true,"priority":-5}"#);
    placement("{x-skein: {whitelist: n1|n2}, x-other: 1}", r#"{"whitelists":["node==n1|n2"]}"#);
    let affinities = "environment: ['affinity:service!=~web', 'affinity:service==/web/', 'affinity:service==other', 'whitelist:node==a|b']";
    check_at(
        "/task/placement",
        affinities,
        r#"{"affinities":["affinity:service!=~myshop_web","affinity:service==/web/","affinity:service==other"],"whitelists":["whitelist:node==a|b"]}"#,
    );
    check_at("/task/container", "platform: linux/arm64", r#"{"platform":"linux/arm64"}"#);
    refused(
        "deploy: {placement: {preferences: [spread]}}",
        &["1:36 services.web.deploy.placement.preferences[0]: expected a mapping, found \"spread\""],
    );
    refused(
        "deploy: {placement: {preferences: [{}, {spread: a}, {spread: b}, {spread: c}, {spread: d}]}}",
        &[
            "1:36 services.web.deploy.placement.preferences[0]: expected the key \"spread\", such as spread: node.labels.zone",
            "1:79 services.web.deploy.placement.preferences: at most 4 preferences",
        ],
    );
    refused(
        "deploy: {placement: {x-skein: {strategy: fast}}}",
        &["1:42 services.web.deploy.placement.x-skein.strategy: expected spread, binpack or random, found \"fast\""],
    );
    refused(
        "deploy: {placement: {x-skein: {whitelists: []}}}",
        &["1:32 unknown key \"whitelists\" in services.web.deploy.placement.x-skein [did you mean \"whitelist\"?]"],
    );
    let resources = |keys, expected| check_at("/task/resources", keys, expected);
    let generic = |list: &str| format!("deploy: {{resources: {{reservations: {{generic_resources: [{list}]}}}}}}");
    let gpu = "{discrete_resource_spec: {kind: gpu, value: 2}}";
    check_at("/task/resources", &generic(gpu), r#"{"generic":{"gpu":2}}"#);
    let devices = |list: &str| format!("deploy: {{resources: {{reservations: {{devices: [{list}]}}}}}}");
    let gpu_device = "{driver: nvidia, count: 1, capabilities: [gpu, compute], options: {a: b}}";
    check(
        &devices(gpu_device),
        r#"{"task":{"container":{"devices":[{"capabilities":["gpu","compute"],"driver":"nvidia","kind":"gpu","options":{"a":"b"}}]},"resources":{"generic":{"gpu":1}}}}"#,
    );
    refused(
        &devices("{capabilities: [gpu], count: all}"),
        &[
            "1:76 services.web.deploy.resources.reservations.devices[0].count: all devices of a host cannot be asked for: say how many",
        ],
    );
    refused(
        &devices("{capabilities: [gpu], count: 0}"),
        &[
            "1:76 services.web.deploy.resources.reservations.devices[0].count: expected a whole number above 0, found \"0\"",
        ],
    );
    check(
        "gpus: [{count: 2, capabilities: [compute, gpu]}]",
        r#"{"task":{"container":{"devices":[{"capabilities":["gpu","compute"],"driver":"","kind":"gpu"}]},"resources":{"generic":{"gpu":2}}}}"#,
    );
    refused(
        "gpus: all",
        &[
            "1:7 services.web.gpus: expected a list with counts: each GPU is set aside for one container [write for example gpus: [{count: 1}]]",
        ],
    );
    refused("gpus: [{count: 1}, {count: 1}]", &["1:20 services.web.gpus[1]: the kind \"gpu\" is given twice"]);
    refused(
        "gpus: [{device_ids: ['0']}]",
        &[
            "1:9 services.web.gpus[0].device_ids is refused: which devices are free is known when the task is placed [use `count`]",
            "1:8 services.web.gpus[0]: expected the key \"count\", such as count: 1",
        ],
    );
    refused(
        &devices("{count: 1}"),
        &[
            "1:47 services.web.deploy.resources.reservations.devices[0]: expected the key \"capabilities\", such as capabilities: [gpu]",
        ],
    );
    refused(
        &generic("{discrete_resource_spec: {kind: gpu}}"),
        &[
            "1:57 services.web.deploy.resources.reservations.generic_resources[0].discrete_resource_spec: expected the keys \"kind\" and \"value\"",
        ],
    );
    refused(
        &generic(&format!("{gpu}, {gpu}")),
        &["1:106 services.web.deploy.resources.reservations.generic_resources[1]: the kind \"gpu\" is given twice"],
    );
    resources("mem_limit: 64m\ncpus: 0.5", r#"{"limits":{"mem_bytes":67108864,"nano_cpus":500000000}}"#);
    resources("mem_limit: 1048576", r#"{"limits":{"mem_bytes":1048576}}"#);
    resources(
        "deploy: {resources: {limits: {cpus: '1.5', memory: 1.5g}, reservations: {cpus: '0.25', memory: 1g}}}",
        r#"{"limits":{"mem_bytes":1610612736,"nano_cpus":1500000000},"reservations":{"mem_bytes":1073741824,"nano_cpus":250000000}}"#,
    );
    resources("mem_limit: 64m\ndeploy: {resources: {limits: {memory: 64m}}}", r#"{"limits":{"mem_bytes":67108864}}"#);
    resources("mem_reservation: 32m", r#"{"reservations":{"mem_bytes":33554432}}"#);
    refused(
        "mem_limit: 64m\ndeploy: {resources: {limits: {memory: 128m}}}",
        &[
            "1:12 services.web.mem_limit and services.web.deploy.resources.limits.memory differ: give one of them, or both the same value",
        ],
    );
    refused(
        "scale: 2\ndeploy: {replicas: 3}",
        &["1:8 services.web.scale and services.web.deploy.replicas differ: give one of them, or both the same value"],
    );
    refused(
        "mem_limit: 64m\nmem_reservation: 65m",
        &["2:18 services.web: more memory is reserved than the limit allows"],
    );
    refused(
        "deploy: {mode: global, replicas: 2}",
        &["1:16 services.web.deploy.mode: a global service has no number of replicas"],
    );
    refused(
        "deploy: {mode: every}",
        &["1:16 services.web.deploy.mode: expected replicated or global, found \"every\""],
    );
    refused("deploy: {replicas: -1}", &["1:20 services.web.deploy.replicas: expected a whole number, found \"-1\""]);
    refused("deploy: {replicas: 1.5}", &["1:20 services.web.deploy.replicas: expected a whole number, found \"1.5\""]);
    let name = "[remove container_name; the service's name reaches all its tasks]";
    refused(
        "container_name: x\nscale: 2",
        &[&format!("1:1 services.web: container_name \"x\" is for one container, but the service has 2 {name}")],
    );
    refused(
        "container_name: x\ndeploy: {mode: global}",
        &[&format!(
            "1:1 services.web: container_name \"x\" is for one container, but the service has one on each node {name}"
        )],
    );
}

#[test]
fn restarts() {
    let at = |keys, expected| check_at("/task/restart", keys, expected);
    at("user: x", "null");
    at("restart: 'no'", r#"{"condition":"none"}"#);
    at("restart: no", r#"{"condition":"none"}"#);
    at("restart: always", "null");
    at("restart: unless-stopped", "null");
    at("restart: on-failure", r#"{"condition":"on-failure"}"#);
    at("restart: on-failure:3", r#"{"condition":"on-failure","max_attempts":3}"#);
    at(
        "deploy: {restart_policy: {condition: on-failure, delay: 1s, max_attempts: 2, window: 2m}}",
        r#"{"condition":"on-failure","delay_ms":1000,"max_attempts":2,"window_ms":120000}"#,
    );
    at("restart: 'no'\ndeploy: {restart_policy: {condition: any}}", "null");
    refused(
        "restart: often",
        &["1:10 services.web.restart: expected no, always, unless-stopped or on-failure[:attempts], found \"often\""],
    );
    refused(
        "deploy: {restart_policy: {condition: maybe}}",
        &["1:38 services.web.deploy.restart_policy.condition: expected none, on-failure or any, found \"maybe\""],
    );
}

#[test]
fn awaited_jobs_may_complete() {
    let text = "
services:
  job: {image: i}
  own: {image: i, restart: always}
  web:
    image: i
    depends_on:
      job: {condition: service_completed_successfully}
      own: {condition: service_completed_successfully}
";
    let services = parse_one(text).unwrap().stack.services;
    let conditions: Vec<_> = services.iter().map(|s| s.task.restart.condition).collect();
    use skein_api::RestartCondition::{Any, OnFailure};
    assert_eq!(conditions, [OnFailure, Any, Any]);
}

#[test]
fn namespaces_of_others() {
    let text = "
services:
  side: {image: i, network_mode: 'service:db', pid: 'service:db'}
  debug: {image: i, network_mode: 'container:one', ipc: 'container:db'}
  db: {image: i, volumes: [data:/d]}
volumes: {data: {driver: nfs}}
";
    let parsed = parse_one(text).unwrap_or_else(|e| panic!("{e}"));
    let services = &parsed.stack.services;
    let find = |name: &str| services.iter().find(|s| s.short_name == name).expect("it is there");
    let share = |name: &str| {
        let share = &find(name).task.container.share;
        share.iter().map(|(key, with)| format!("{key} {with}")).collect::<Vec<_>>()
    };
    assert_eq!(share("side"), ["network_mode myshop_db", "pid myshop_db"]);
    assert_eq!(share("debug"), ["network_mode one", "ipc db"]);
    assert_eq!((find("side").task.networks.len(), find("db").task.networks.len()), (0, 1));
    let needs: Vec<_> = find("side").depends_on.iter().map(|d| d.service.as_str()).collect();
    assert_eq!(needs, ["myshop_db"]);
    assert_eq!(find("db").task.container.mounts[0].volume_driver.as_deref(), Some("nfs"));
    let hint = "[remove the key if the service can do without it]";
    refused(
        "pid: host",
        &[&format!(
            "1:6 services.web.pid: \"host\" is refused: expected \"service:NAME\" or \"container:NAME\" {hint}"
        )],
    );
    refused("ipc: 'service:no'", &["1:6 services.web.ipc: there is no service \"no\" in the file"]);
    refused(
        "network_mode: 'container:x'\nports: [80]",
        &["1:15 services.web.network_mode: with the network of another one it has no ports of its own"],
    );
}

#[test]
fn networks_of_a_service() {
    let text = "
services:
  a: {image: i, networks: [front, default]}
  b:
    image: i
    networks:
      front: {aliases: [x, y]}
      back: {priority: 10, ipv4_address: 10.9.7.7, ipv6_address: 'fd00::707'}
      ext:
  c: {image: i, network_mode: bridge}
networks:
  front: {internal: true, attachable: true, labels: {l: v}, driver: overlay}
  back: {name: given, ipam: {config: [{subnet: 10.9.0.0/16}]}}
  ext: {external: true, name: their}
";
    let parsed = parse_one(text).unwrap_or_else(|e| panic!("{e}"));
    assert!(parsed.warnings.is_empty(), "{:?}", parsed.warnings);
    let show = |s: &skein_api::ServiceSpec| {
        let nets = s.task.networks.iter().map(|n| format!("{}{:?}", n.network, n.aliases));
        nets.collect::<Vec<_>>().join(" ")
    };
    let services: Vec<String> = parsed.stack.services.iter().map(show).collect();
    let back = &parsed.stack.services[1].task.networks[0];
    assert_eq!((back.ipv4, back.ipv6), ("10.9.7.7".parse().ok(), "fd00::707".parse().ok()));
    assert_eq!(services, ["myshop_front[] myshop_default[]", "given[] myshop_front[\"x\", \"y\"] their[]", ""]);
    let show = |n: &skein_api::NetworkSpec| {
        let subnet = n.subnet4.map(|s| s.to_string()).unwrap_or_default();
        format!("{} {subnet} {} {} {:?}", n.name, n.internal, n.attachable, n.labels)
    };
    let networks: Vec<String> = parsed.stack.networks.iter().map(show).collect();
    assert_eq!(
        networks,
        [
            "given 10.9.0.0/16 false false {}",
            "myshop_default  false false {}",
            "myshop_front  true true {\"l\": \"v\"}"
        ]
    );
    assert_eq!(parsed.stack.external_networks, ["their"]);
    refused(
        "network_mode: host",
        &[
            "1:15 services.web.network_mode: \"host\" is refused: expected \"bridge\", the engine's own network, \"service:NAME\" or \"container:NAME\" [leave it out: services of a stack share an overlay network and find each other by name]",
        ],
    );
    refused(
        "networks: [defualt]",
        &[
            "1:12 services.web: there is no network \"defualt\" in the file [add it to networks: at the top level, with `external: true` if it is there already]",
        ],
    );
    refused(
        "networks: {default: {ipv4_address: 10.0.0}}",
        &["1:36 services.web.networks.default.ipv4_address: expected an address, found \"10.0.0\""],
    );
}

#[test]
fn top_level_networks_and_volumes() {
    let with = |section: &str| format!("services: {{web: {{image: i}}}}\n{section}\n");
    error(
        &with("networks: {default: {ipam: {config: [{subnet: 10.0.0.5/8}]}}}"),
        "\
error: networks.default.ipam.config[0].subnet: expected the first address of the subnet, 10.0.0.0/8, found 10.0.0.5/8
  at c.yml:2:47
  2 | networks: {default: {ipam: {config: [{subnet: 10.0.0.5/8}]}}}
    |                                               ^
",
    );
    error(
        &with("networks: {default: {external: true, internal: true}}"),
        "\
error: networks.default.internal: the network is external, nothing else can be said of it
  at c.yml:2:38
  2 | networks: {default: {external: true, internal: true}}
    |                                      ^
",
    );
    error(
        &with("networks: {default: {driver: macvlan}}"),
        "\
error: networks.default.driver: the driver \"macvlan\" is refused: networks of a cluster are overlays
  at c.yml:2:30
  2 | networks: {default: {driver: macvlan}}
    |                              ^
hint: remove the key
",
    );
    error(
        &with("networks: {default: {driver_opts: {encrypted: ''}}}"),
        "\
error: networks.default.driver_opts.encrypted is refused: encryption is not supported yet
  at c.yml:2:36
  2 | networks: {default: {driver_opts: {encrypted: ''}}}
    |                                    ^
",
    );
    warnings(
        &with(
            "volumes: {d: }\nnetworks: {n: {driver: bridge}, default: {enable_ipv6: true}, y: {external: {name: x}}}",
        ),
        &[
            "3:24 networks.n.driver: \"bridge\" becomes an overlay network over all hosts",
            "3:43 networks.default.enable_ipv6 has no effect: a network always has both IPv4 and IPv6",
            "3:12 the network \"n\" is not used by any service and not made",
            "3:63 the network \"y\" is not used by any service and not made",
            "2:11 the volume \"d\" is not used by any service and not made",
        ],
    );
}

#[test]
fn dependencies_between_services() {
    let text = "
services:
  a: {image: i, depends_on: [b], links: [c, 'b:bee'], volumes_from: [c, 'b:ro', 'container:other:ro']}
  b: {image: i}
  c: {image: i, depends_on: {none: {condition: service_started, required: false}}}
";
    let parsed = parse_one(text).unwrap_or_else(|e| panic!("{e}"));
    let a = &parsed.stack.services[0];
    let deps: Vec<&str> = a.depends_on.iter().map(|d| d.service.as_str()).collect();
    assert_eq!(deps, ["myshop_b", "myshop_c"]);
    let links: Vec<_> = a.task.container.links.iter().map(|l| (l.target.as_str(), l.alias.as_str())).collect();
    assert_eq!(links, [("myshop_c", "c"), ("myshop_b", "bee")]);
    let aliases = |i: usize| parsed.stack.services[i].task.networks[0].aliases.clone();
    assert_eq!((aliases(0), aliases(1), aliases(2)), (vec![], vec!["bee".to_owned()], vec![]), "of a, b and c");
    let from: Vec<_> = a.task.container.volumes_from.iter().map(|v| (v.from.as_str(), v.read_only)).collect();
    assert_eq!(from, [("myshop_c", false), ("myshop_b", true), ("other", true)]);
    refused(
        "depends_on: [wed]",
        &["1:14 services.web.depends_on: there is no service \"wed\" in the file [did you mean \"web\"?]"],
    );
    refused(
        "depends_on: {web: {condition: ready}}",
        &[
            "1:31 services.web.depends_on.web.condition: expected service_started, service_healthy or service_completed_successfully, found \"ready\"",
            "services need each other in a circle: web -> web",
        ],
    );
}
