//! Whole compose files: circles, messages, unsupported keys, profiles, names, variables, anchors, merging, documentation.

use proptest::prelude::*;

use super::*;

#[test]
fn a_circle_shows_its_steps() {
    error(
        "\
services:
  a: {image: i, depends_on: [b]}
  b: {image: i, links: [c]}
  c: {image: i, volumes_from: [a]}
  d: {image: i, depends_on: [a]}
",
        "\
error: services need each other in a circle: a -> b -> c -> a
  at c.yml:2:30: a needs b (depends_on)
  2 |   a: {image: i, depends_on: [b]}
    |                              ^
  at c.yml:3:25: b needs c (links)
  3 |   b: {image: i, links: [c]}
    |                         ^
  at c.yml:4:32: c needs a (volumes_from)
  4 |   c: {image: i, volumes_from: [a]}
    |                                ^
",
    );
}

#[test]
fn errors_as_users_see_them() {
    error(
        "services:\n  web:\n    imgae: nginx\n    ports: [80:x]\n",
        "\
error: unknown key \"imgae\" in services.web
  at c.yml:3:5
  3 |     imgae: nginx
    |     ^
hint: did you mean \"image\"?
error: services.web: expected the key \"image\"
  at c.yml:2:3
  2 |   web:
    |   ^
error: services.web.ports[0]: expected a port of 1 to 65535 or a range of them, found \"x\"
  at c.yml:4:13
  4 |     ports: [80:x]
    |             ^
",
    );
    error(
        "services:\n  web:\n   image: [a]\n",
        "\
error: services.web.image: expected text, found a list
  at c.yml:3:11
  3 |    image: [a]
    |           ^
",
    );
    error(
        "services:\n  web:\n    image: i\n   user: x\n",
        "\
error: bad YAML: while parsing a block mapping, did not find expected key
  at c.yml:4:4
  4 |    user: x
    |    ^
",
    );
    error(
        "services:\n  web: {image: 'i:${VERSION:?say which}'}\n",
        "\
error: the required variable VERSION is not set or empty: say which
  at c.yml:2:19
  2 |   web: {image: 'i:${VERSION:?say which}'}
    |                   ^
",
    );
    error(
        "services:\n  web: {build: .}\n",
        "\
error: services.web: images are not built here, and without `image` there is none to run
  at c.yml:2:9
  2 |   web: {build: .}
    |         ^
hint: build it (`docker build -t NAME DIR`), bring it to the hosts (push it to a registry, or `docker save NAME | docker load` on each host), and say `image: NAME`
",
    );
    error("", "error: the file is empty\n  at c.yml\n");
    error("name: x\n", "error: expected the key \"services\" with at least one service\n  at c.yml\n");
    error(
        "servces: {}\n",
        "\
error: unknown key \"servces\" at the top level
  at c.yml:1:1
  1 | servces: {}
    | ^
hint: did you mean \"services\"?
error: expected the key \"services\" with at least one service
  at c.yml
",
    );
    error("- a\n", "error: the file: expected a mapping, found a list\n  at c.yml:1:1\n  1 | - a\n    | ^\n");
}

#[test]
fn unsupported_keys_are_said() {
    let text = "
services:
  web: {image: i, build: ., logging: {driver: x}, sysctls: , shm_size: 64m, deploy: {rollback_config: {parallelism: 1}}}
";
    warnings(
        text,
        &[
            "3:19 services.web.build has no effect: images are not built here; the image must be there already",
            "3:29 services.web.logging has no effect: logs are kept by the agent, bounded; see `skein logs`",
            "3:62 services.web.shm_size has no effect: the engine's default is taken; mount a tmpfs at /dev/shm for another size",
            "3:86 services.web.deploy.rollback_config has no effect: not supported yet",
        ],
    );
    let strict = parse_with(&[text], |o| o.strict = true).unwrap_err();
    assert_eq!(strict.problems.len(), 4);
    assert_eq!(strict.problems[0].hint.as_deref(), Some("without --strict this is a warning"));
    for key in [
        "secrets: [a]",
        "configs: [a]",
        "security_opt: [a]",
        "devices: [/dev/x]",
        "userns_mode: host",
        "pid: host",
        "ipc: host",
    ] {
        let error = service_json(key).unwrap_err();
        assert!(error.to_string().contains(" is refused: "), "{error}");
    }
    warnings(
        "services: {web: {image: i, volumes: [./a:/a]}}",
        &["1:38 services.web: /srv/My Shop/a must exist on the host that runs the task; it is not copied there"],
    );
    warnings(
        "x-a: $UNSET\nservices: {web: {image: i, user: $U$U, hostname: '$U'}}",
        &["2:34 the variable U is not set; nothing is put in its place"],
    );
}

#[test]
fn profiles_choose_services() {
    let text = "services:\n  web: {image: i}\n  debug: {image: i, profiles: [dev]}\n";
    warnings(text, &["3:3 services.debug is left out: none of its profiles is active"]);
    let names = |o: fn(&mut Options<'_>)| parse_with(&[text], o).unwrap().stack.services.len();
    assert_eq!(names(|_| ()), 1);
    assert_eq!(names(|o| o.profiles = vec!["dev".into()]), 2);
    assert_eq!(names(|o| drop(o.env.insert("COMPOSE_PROFILES".into(), "x, dev".into()))), 2);
    assert_eq!(names(|o| o.profiles = vec!["*".into()]), 2);
    error(
        "services:\n  web: {image: i, depends_on: [debug]}\n  debug: {image: i, profiles: [dev]}\n",
        "\
error: services.web.depends_on: the service \"debug\" is left out: none of its profiles is active
  at c.yml:2:32
  2 |   web: {image: i, depends_on: [debug]}
    |                                ^
",
    );
}

#[test]
fn names_of_stacks() {
    let check = |text: &str, change: fn(&mut Options<'_>), expected: &str| {
        let got = match parse_with(&[text], change) {
            Ok(parsed) => parsed.stack.name,
            Err(e) => e.to_string(),
        };
        assert_eq!(got, expected);
        if !expected.starts_with("error") {
            let mut name = String::new();
            parse_with(&[text], |o| {
                change(o);
                name = stack_name(o).unwrap();
            })
            .unwrap();
            assert_eq!(name, expected);
        }
    };
    let text = "name: 'own-${WHO}'\nservices: {web: {image: 'i:$COMPOSE_PROJECT_NAME'}}\n";
    check(text, |_| (), "own-env");
    check(text, |o| drop(o.env.insert("COMPOSE_PROJECT_NAME".into(), "env".into())), "env");
    check(
        text,
        |o| {
            o.env.insert("COMPOSE_PROJECT_NAME".into(), "env".into());
            o.project_name = Some("flag".into());
        },
        "flag",
    );
    check(
        text,
        |o| o.project_name = Some("My Flag".into()),
        "error: \"My Flag\" cannot be the name of a stack: expected lower-case letters, digits, \"-\" and \"_\", a letter or digit first\nhint: \"myflag\" would do\n",
    );
    check("services: {web: {image: i}}", |_| (), "myshop");
    check(
        "services: {web: {image: i}}",
        |o| o.project_dir = "/".into(),
        "error: no name for the stack follows from the directory /\nhint: give one with `-p NAME` or the key `name:`\n",
    );
    let image = parse_one(text).unwrap().stack.services.remove(0).task.container.image;
    assert_eq!(image, "i:own-env");
}

#[test]
fn variables_come_from_files_and_environment() {
    let image = |change: fn(&mut Options<'_>)| {
        let text = "services: {web: {image: '${WHO}-${TAG}-${EMPTY:-e}'}}";
        parse_with(&[text], change)
            .map(|p| p.stack.services[0].task.container.image.clone())
            .unwrap_or_else(|e| e.to_string())
    };
    assert_eq!(image(|_| ()), "env-16-e");
    assert_eq!(image(|o| o.env_files = vec!["/other.env".into()]), "env-17-e");
    assert_eq!(
        image(|o| o.env_files = vec!["/none.env".into()]),
        "error: failed to read the env file /none.env: entity not found\n"
    );
    assert_eq!(
        image(|o| o.env_files = vec!["/srv/My Shop/bad.env".into()]),
        "error: bad env file /srv/My Shop/bad.env:2: \"2\" is not a variable's name; expected NAME=value\n"
    );
}

#[test]
fn anchors_and_merge_keys() {
    let text = "
x-base: &base
  image: i
  environment: &env {A: 1, B: 2}
services:
  a: {<<: *base, user: x}
  b:
    <<: [*base]
    environment: {<<: *env, B: 3}
";
    let services = parse_one(text).unwrap_or_else(|e| panic!("{e}")).stack.services;
    let env = |i: usize| serde_json::to_string(&services[i].task.container.env).unwrap();
    assert_eq!((env(0), env(1)), (r#"{"A":"1","B":"2"}"#.into(), r#"{"A":"1","B":"3"}"#.into()));
    assert_eq!(services[1].task.container.image, "i");
}

#[test]
fn several_files_are_laid_over_each_other() {
    let base = "
services:
  web:
    image: i
    command: [a, b]
    ports: ['80:80']
    environment: [A=1, B=2]
    volumes: ['data:/d', '/x:/x']
    depends_on: [db]
    labels: {l: '1'}
  db: {image: db}
volumes: {data: }
";
    let over = "
services:
  web:
    command: [c]
    ports: ['81:81', '80:80']
    environment: {B: 3, C: 4}
    volumes: ['/y:/x:ro']
    depends_on: {db: {condition: service_healthy}}
    labels: [m=2]
  more: {image: m}
";
    let stack = parse_with(&[base, over], |_| ()).unwrap_or_else(|e| panic!("{e}")).stack;
    let web = &stack.services[0];
    let c = &web.task.container;
    assert_eq!((c.image.as_str(), c.command.clone().unwrap()), ("i", vec!["c".to_owned()]));
    assert_eq!(serde_json::to_string(&c.env).unwrap(), r#"{"A":"1","B":"3","C":"4"}"#);
    assert_eq!(serde_json::to_string(&c.labels).unwrap(), r#"{"l":"1","m":"2"}"#);
    assert_eq!(web.task.ports.iter().map(|p| p.host_port).collect::<Vec<_>>(), [80, 81]);
    let mounts: Vec<_> =
        c.mounts.iter().map(|m| (m.source.as_deref().unwrap(), m.target.as_str(), m.read_only)).collect();
    assert_eq!(mounts, [("myshop_data", "/d", false), ("/y", "/x", true)]);
    assert_eq!(web.depends_on[0].condition, skein_api::DependencyCondition::ServiceHealthy);
    assert_eq!(stack.services.len(), 3);
    let error = parse_with(&[base, "services: {web: {port: [1]}}"], |_| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "\
error: unknown key \"port\" in services.web
  at over.yml:1:18
  1 | services: {web: {port: [1]}}
    |                  ^
hint: did you mean \"ports\"?
"
    );
}

#[test]
fn the_documentation_has_every_key() {
    let doc = include_str!("../../../docs/compose.md");
    for (heading, table) in keys::ALL {
        let section = doc.split("\n### ").find(|s| s.starts_with(&format!("`{heading}`")) || s.starts_with(heading));
        let section = section.unwrap_or_else(|| panic!("docs/compose.md has no section {heading}"));
        for (key, support) in *table {
            let word = match support {
                keys::Support::Yes => "supported",
                keys::Support::Warn(_) => "warned",
                keys::Support::Refuse(..) => "refused",
            };
            let row = format!("| `{key}` | {word} |");
            assert!(section.contains(&row), "docs/compose.md, section {heading}: no row {row}");
        }
    }
}

#[test]
fn what_scheduling_md_shows_of_a_service_is_good() {
    let doc = include_str!("../../../docs/scheduling.md");
    let blocks: Vec<&str> = doc.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(blocks.len(), 3);
    for block in blocks {
        let indented: String = block.lines().map(|l| format!("    {l}\n")).collect();
        let parsed =
            parse_one(&format!("services:\n  web:\n    image: i\n{indented}")).unwrap_or_else(|e| panic!("{e}"));
        assert!(parsed.warnings.is_empty(), "{:?}", parsed.warnings);
    }
}

/// A file that uses most of what there is, to be damaged.
const RICH: &str = "\
x-a: &a {image: 'i:${TAG:-1}', restart: on-failure:3}
services:
  web:
    <<: *a
    ports: ['127.0.0.1:8000-8001:80-81/udp', {target: 9, published: 10}]
    volumes: [data:/d:ro, './x:/x', {type: tmpfs, target: /t, tmpfs: {size: 1.5g}}]
    environment: {A: $WHO, 'constraint:x': =y}
    healthcheck: {test: [CMD, a], interval: 1m30s}
    depends_on: {db: {condition: service_healthy}}
    deploy: {replicas: 2, resources: {limits: {cpus: '0.5', memory: 64m}, reservations: {generic_resources: [{discrete_resource_spec: {kind: gpu, value: 1}}], devices: [{count: 1, capabilities: [tpu]}]}}, placement: {preferences: [{spread: node.labels.zone}], x-skein: {strategy: binpack, whitelist: [a, b]}}}
    command: sh -c 'a b'
    networks: {n: {aliases: [w]}}
  db: {<<: *a, env_file: a.env, links: [], extra_hosts: ['h:::1']}
networks: {n: {ipam: {config: [{subnet: 10.1.0.0/16}]}}}
volumes: {data: }
";

#[test]
fn the_rich_file_is_good() {
    assert!(parse_one(RICH).is_ok_and(|p| p.stack.services.len() == 2));
}

proptest! {
    /// Whatever is in a file: an answer, never a panic, and every error can be shown.
    #[test]
    fn damaged_files_are_answered(at in 0..RICH.len(), drop in 0..30usize, put in "[-a-z0-9:${}'\"\\[\\]&*<!|> \n\t%@#,ü]{0,8}") {
        let end = (at + drop).min(RICH.len());
        let text = format!("{}{put}{}", &RICH[..at], &RICH[end..]);
        if let Err(e) = parse_one(&text) {
            prop_assert!(!e.problems.is_empty());
            prop_assert!(e.to_string().starts_with("error: "));
        }
    }

    /// The small languages too.
    #[test]
    fn any_value_is_answered(text in "[-a-z0-9:=./${}'\"\\[\\]\\\\ \n#,µ?+]{0,24}") {
        let _ = (values::duration_ms(&text), values::size_bytes(&text), values::nano_cpus(&text));
        let _ = (values::shell_words(&text), values::ports_short(&text), parse_restart(&text));
        let _ = (parse_volume(&text, Path::new("/d"), Some("/h")).is_ok(), parse_tmpfs(&text).is_ok());
        let _ = interpolate::interpolate(&text, &|_| None);
        let _ = dotenv::parse(&text, false, &|_| None);
    }
}
