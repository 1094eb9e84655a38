//! The lab itself, on this machine: hosts, engines, faults of the underlay, images, removal after a crash.
//!
//! Every test makes labs of its own, named after its process, so that tests run side by side. Needs root and the
//! packages that `cargo xtask setup` installs; without them it fails, and says what to do.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xtask::lab::{
    DataRoot, Host, Impairment, Lab, LabSpec, MASTER, PLUGIN_SOCKET, STATE_ROOT, Spawn, Status, UNDERLAY_INTERFACE,
    all_labs, down,
    probe::{Place, Probe},
    wait_for,
};

/// For everything that happens soon unless something is broken.
const SOON: Duration = Duration::from_secs(20);

fn name(what: &str) -> String {
    format!("t{}-{what}", std::process::id())
}

fn lab(what: &str, engines: usize) -> Result<Lab> {
    Lab::up(LabSpec::new(name(what), engines))
}

fn pings(from: &Host, to: &Host) -> (bool, bool) {
    let ping = |version: &str, address: String| {
        from.run(&["ping", version, "-n", "-q", "-c", "2", "-i", "0.05", "-W", "1", &address]).is_ok()
    };
    (ping("-4", to.ipv4().to_string()), ping("-6", to.ipv6().to_string()))
}

/// Expected connectivity as a table: (from, to, reachable), IPv4 and IPv6 alike.
fn check_pings(lab: &Lab, table: &[(&str, &str, bool)]) {
    // At once, since every ping that is lost takes its whole time.
    let found: Vec<(bool, bool)> = std::thread::scope(|scope| {
        let pinging: Vec<_> =
            table.iter().map(|(from, to, _)| scope.spawn(|| pings(lab.host(from), lab.host(to)))).collect();
        pinging.into_iter().map(|thread| thread.join().expect("a ping does not panic")).collect()
    });
    for ((from, to, expected), found) in table.iter().zip(found) {
        assert_eq!(found, (*expected, *expected), "from {from} to {to}, IPv4 and IPv6");
    }
}

#[test]
fn engines_are_apart_and_run_containers() -> Result<()> {
    let lab = lab("run", 2)?;
    lab.image("busybox")?;
    for host in lab.engines() {
        // The same name on both: each engine has its own containers, bridge and control groups.
        let id = host.docker(&["run", "-d", "--name", "same", "-m", "32m", "busybox", "sleep", "1000"])?;
        let address = host.docker(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "same"])?;
        host.run(&["ping", "-q", "-c", "1", "-W", "2", &address]).context("docker0 works")?;
        assert_eq!(host.docker(&["ps", "-q", "--no-trunc"])?, id);
        assert_eq!(host.run(&["hostname"])?.trim_end(), host.name());
        let interfaces = host.run(&["ls", "/sys/class/net"])?;
        let interfaces: Vec<&str> = interfaces.split_whitespace().collect();
        for expected in ["docker0", UNDERLAY_INTERFACE, "lo"] {
            assert!(interfaces.contains(&expected), "{interfaces:?}");
        }
        // A name that nobody knows is refused at once, inside and outside of containers.
        let lookup = ["run", "--rm", "busybox", "timeout", "3", "nslookup", "nobody.example"];
        let error = format!("{:#}", host.docker(&lookup).expect_err("there is no such name"));
        assert!(!error.contains("143") && !error.contains("timed out"), "{error}");
    }
    assert!(!lab.host(MASTER).has_engine());
    assert!(lab.host(MASTER).start_engine().is_err());
    Ok(())
}

#[test]
fn cuts_stop_traffic_and_heal() -> Result<()> {
    let lab = lab("cut", 2)?;
    let all = |h1_h2: bool, h1_master: bool, h2_master: bool| {
        check_pings(
            &lab,
            &[
                ("h1", "h2", h1_h2),
                ("h2", "h1", h1_h2),
                ("h1", MASTER, h1_master),
                (MASTER, "h1", h1_master),
                ("h2", MASTER, h2_master),
            ],
        );
    };
    all(true, true, true);
    lab.cut("h1", "h2")?;
    lab.cut("h2", "h1").context("a cut that is there already")?;
    assert_eq!(lab.cuts()?, [("h1".to_owned(), Some("h2".to_owned()))]);
    all(false, true, true);
    lab.heal()?;
    lab.isolate(MASTER)?;
    assert_eq!(lab.cuts()?, [(MASTER.to_owned(), None)]);
    all(true, false, false);
    lab.heal()?;
    assert!(lab.cuts()?.is_empty());
    all(true, true, true);
    assert!(lab.cut("h1", "h1").is_err());
    let error = format!("{:#}", lab.cut("h1", "h9").expect_err("no such host"));
    assert!(error.contains("h9") && error.contains("h2"), "{error}");
    Ok(())
}

#[test]
fn a_cut_stops_an_established_connection_and_a_capture_shows_it() -> Result<()> {
    let lab = lab("flow", 2)?;
    let (h1, h2) = (lab.host("h1"), lab.host("h2"));
    let mut capture = h2.capture("icmp[icmptype] == icmp-echo")?;
    let flow = h1.spawn(Spawn::new("ping").args(["-n", "-i", "0.02", "-W", "1", &h2.ipv4().to_string()]))?;
    capture.wait_for(10, SOON)?;
    lab.cut("h1", "h2")?;
    // What was sent before the cut has arrived: the switch is on this machine. What ping sends next does not.
    let before = capture.lines()?.len();
    let sent = h1.run(&["cat", "/proc/net/snmp"])?;
    wait_for("more packets sent", SOON, || {
        Ok((echoes_sent(&h1.run(&["cat", "/proc/net/snmp"])?) > echoes_sent(&sent) + 20).then_some(()))
    })?;
    let after = capture.lines()?.len();
    assert!(after <= before + 1, "{after} packets after the cut, {before} before");
    lab.heal()?;
    capture.wait_for(after + 10, SOON)?;
    capture.stop()?;
    assert!(capture.file().is_file());
    flow.kill()?;
    assert_eq!(flow.wait(SOON)?, Status::Signaled(9));
    Ok(())
}

/// `OutEchos` of `/proc/net/snmp`: the names are in one line, the numbers in the next.
fn echoes_sent(snmp: &str) -> u64 {
    let mut icmp = snmp.lines().filter(|line| line.starts_with("Icmp:"));
    let (names, numbers) = (icmp.next().unwrap_or_default(), icmp.next().unwrap_or_default());
    let found = names.split(' ').zip(numbers.split(' ')).find(|(name, _)| *name == "OutEchos");
    found.and_then(|(_, number)| number.parse().ok()).expect("the kernel counts echo requests")
}

#[test]
fn a_limit_holds_in_both_directions() -> Result<()> {
    let lab = Lab::up(LabSpec::new(name("limit"), 0).host("a", false).host("b", false))?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    let server = b.spawn(Spawn::new("iperf3").arg("-s"))?;
    wait_for("iperf3 listening", SOON, || {
        Ok(b.run(&["ss", "-Hltn", "sport", "=", "5201"])?.contains("LISTEN").then_some(()))
    })?;
    let measure = |reverse: bool| -> Result<f64> {
        let mut command = a.command("iperf3");
        command.args(["-J", "-t", "1", "-c"]).arg(b.ipv4().to_string());
        command.args(reverse.then_some("-R"));
        let report: serde_json::Value = serde_json::from_str(&xtask::lab::run(&mut command)?)?;
        report["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 reports bits per second")
    };
    assert_eq!(lab.limit_of("a")?, "");
    assert!(measure(false)? > 200e6);
    lab.limit("a", Some(20_000_000))?;
    lab.limit("a", Some(20_000_000)).context("a limit that is there already")?;
    assert_eq!(lab.limit_of("a")?, "20Mbit");
    for reverse in [false, true] {
        let rate = measure(reverse)?;
        // The bucket lets 64 KiB pass at once, half a megabit.
        assert!((5e6..30e6).contains(&rate), "{rate} bit/s, reverse {reverse}");
    }
    lab.limit("a", None)?;
    lab.limit("a", None).context("a limit that is gone already")?;
    assert!(measure(false)? > 200e6);
    assert!(server.is_running());
    Ok(())
}

#[test]
fn a_relay_delays_loses_doubles_and_reorders() -> Result<()> {
    let lab = Lab::up(LabSpec::new(name("relay"), 0).host("a", false).host("b", false))?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    let ms = Duration::from_millis;
    // A packet each millisecond for as long as `look` takes, and what the relay has counted meanwhile.
    let probe = || Probe::packets(&Place::host(a), &Place::host(b), (b.ipv4(), 49_007).into(), ms(1));
    let after = |probe: Probe, packets: usize| -> Result<_> {
        wait_for("packets", SOON, || Ok((probe.report().sent >= packets).then_some(())))?;
        Ok(probe.stop())
    };
    let plain = after(probe()?, 500)?;
    assert_eq!((plain.lost, plain.slowest < ms(50)), (0, true), "{plain}");
    assert_eq!(lab.relay_state("a")?, None);

    let how = Impairment { delay: ms(60), jitter: ms(20), loss: 0.1, duplicate: 0.1, reorder: 0.1, rate: None };
    lab.relay("a", Impairment::default(), 7)?;
    // Each knows the other's address before addresses are asked for in vain.
    check_pings(&lab, &[("a", "b", true)]);
    lab.relay("a", how, 7)?;
    let report = after(probe()?, 1_000)?;
    // There and back: 19 % are lost, and of the others some are delayed by 80 ms in both directions.
    assert!((130..260).contains(&(report.lost * 1_000 / report.sent)), "{report}");
    assert!((ms(120)..ms(400)).contains(&report.slowest), "{report}");
    let relay = lab.relay_state("a")?.context("there is one")?;
    assert_eq!(relay.impairment, how);
    let counted = relay.counters;
    assert!(counted.passed > 1_500 && counted.overflowed == 0, "{counted:?}");
    for (what, share) in [("lost", counted.lost), ("doubled", counted.duplicated), ("overtook", counted.overtook)] {
        assert!((70..130).contains(&(share * 1_000 / (counted.passed + counted.lost))), "{what}: {counted:?}");
    }

    // Changed while packets pass, without another loss.
    lab.relay("a", Impairment { delay: ms(20), ..Impairment::default() }, 7)?;
    let changing = probe()?;
    wait_for("packets", SOON, || Ok((changing.report().answered >= 200).then_some(())))?;
    lab.relay("a", Impairment::default(), 7)?;
    let report = after(changing, 600)?;
    assert!(report.lost == 0 && report.slowest >= ms(40), "{report}");
    assert_eq!(lab.relay_state("a")?.context("the same one")?.process, relay.process);

    // Bulk: no checksum is missing and no segment too long.
    let server = b.spawn(Spawn::new("iperf3").arg("-s"))?;
    wait_for("iperf3 listening", SOON, || {
        Ok(b.run(&["ss", "-Hltn", "sport", "=", "5201"])?.contains("LISTEN").then_some(()))
    })?;
    let bulk = a.run(&["iperf3", "-J", "-t", "1", "-c", &b.ipv4().to_string()])?;
    let bulk: serde_json::Value = serde_json::from_str(&bulk)?;
    let rate = bulk["end"]["sum_received"]["bits_per_second"].as_f64().context("a rate")?;
    assert!(rate > 20e6, "{rate} bit/s");
    server.kill()?;

    // Cuts hold; a limit cannot be together with a relay; nothing is left when it is gone.
    lab.cut("a", "b")?;
    check_pings(&lab, &[("a", "b", false), ("a", MASTER, true)]);
    lab.heal()?;
    assert!(lab.relay("a", Impairment { loss: 2.0, ..how }, 7).is_err());
    lab.limit("b", Some(20_000_000))?;
    let error = format!("{:#}", lab.relay("b", how, 7).expect_err("it has a limit"));
    assert!(error.contains("lab limit b none"), "{error}");
    lab.limit("b", None)?;
    lab.unrelay("a")?;
    lab.unrelay("a").context("one that is gone already")?;
    assert_eq!(lab.relay_state("a")?, None);
    check_pings(&lab, &[("a", "b", true), ("b", "a", true)]);
    assert!(!relay.process.is_alive());
    // One that died is said so, and put right.
    lab.relay("b", how, 7)?;
    let died = lab.relay_state("b")?.context("there is one")?.process;
    kill(Pid::from_raw(died.pid), Signal::SIGKILL)?;
    wait_for("the relay gone", SOON, || Ok((!died.is_alive()).then_some(())))?;
    let error = format!("{:#}", lab.relay_state("b").expect_err("it is dead"));
    assert!(error.contains("lab relay b off"), "{error}");
    lab.unrelay("b")?;
    check_pings(&lab, &[("a", "b", true), ("b", "a", true)]);
    Ok(())
}

#[test]
fn labs_live_side_by_side() -> Result<()> {
    let one = lab("one", 1)?;
    let two = lab("two", 1)?;
    assert_ne!(one.host("h1").ipv4(), two.host("h1").ipv4());
    for lab in [&one, &two] {
        check_pings(lab, &[("h1", MASTER, true)]);
        assert!(lab.host("h1").engine_answers());
    }
    assert!(one.host("h1").run(&["ping", "-c", "1", "-W", "1", &two.host("h1").ipv4().to_string()]).is_err());
    one.down()?;
    check_pings(&two, &[("h1", MASTER, true)]);
    assert!(two.problems().is_empty(), "{:?}", two.problems());
    Ok(())
}

#[test]
fn a_healthy_lab_is_adopted_and_another_one_is_refused() -> Result<()> {
    let spec = LabSpec::new(name("adopt"), 1);
    let first = Lab::up(spec.clone())?;
    drop(Lab::up(spec.clone()).context("the same again")?);
    assert!(first.problems().is_empty(), "dropping the adopted handle leaves the lab: {:?}", first.problems());
    let refuse = |spec: LabSpec, expected: &str| {
        let error = format!("{:#}", Lab::up(spec).expect_err("refused"));
        assert!(error.contains(expected) && error.contains("lab down"), "{error}");
    };
    refuse(LabSpec { data_root: DataRoot::Disk, ..spec.clone() }, "other hosts or options");
    first.host("h1").stop_engine(Signal::SIGKILL)?;
    refuse(spec.clone(), "engine of h1");
    first.host("h1").start_engine()?;
    Lab::up(spec)?;
    Ok(())
}

#[test]
fn wrong_names_are_refused_before_anything_is_made() {
    for bad in ["", "Lab", "a_b", "../x", "a-name-that-is-far-too-long"] {
        assert!(Lab::up(LabSpec::new(bad, 1)).is_err(), "{bad:?}");
        assert!(down(bad).is_err(), "{bad:?}");
    }
    assert!(Lab::open(&name("absent")).is_err());
    assert_eq!(down(&name("absent")).expect("nothing to do").processes, 0);
}

#[test]
fn an_engine_that_crashed_finds_its_containers_again() -> Result<()> {
    let lab = Lab::up(LabSpec { data_root: DataRoot::Disk, live_restore: true, ..LabSpec::new(name("crash"), 1) })?;
    lab.image("busybox")?;
    let host = lab.host("h1");
    let id = host.docker(&["run", "-d", "busybox", "sleep", "1000"])?;
    let started = host.docker(&["inspect", "-f", "{{.State.StartedAt}} {{.State.Pid}}", &id])?;
    host.stop_engine(Signal::SIGKILL)?;
    assert!(!host.engine_answers());
    host.start_engine()?;
    assert_eq!(host.docker(&["inspect", "-f", "{{.State.StartedAt}} {{.State.Pid}}", &id])?, started);
    Ok(())
}

#[test]
fn processes_get_the_plugin_socket_and_are_reaped() -> Result<()> {
    let lab = lab("proc", 1)?;
    let host = lab.host("h1");
    assert!(!host.path(PLUGIN_SOCKET).exists(), "no engine may find a socket that nobody serves");
    let script = "[ $LISTEN_PID = $$ ] && echo $LISTEN_FDS $LISTEN_FDNAMES $GREETING; readlink /proc/$$/fd/3; sleep 0.1 & exit 7";
    let process =
        host.spawn(Spawn::new("sh").args(["-c", script]).name("agent").env("GREETING", "hello").plugin_socket())?;
    assert_eq!(process.wait(SOON)?, Status::Exited(7));
    let log = process.log()?;
    assert!(log.starts_with("1 skein-plugin hello\nsocket:["), "{log}");
    // Nobody accepts now: the connection waits in the queue for the next one.
    UnixStream::connect(host.path(PLUGIN_SOCKET)).context("the holder keeps the socket")?;

    assert!(host.spawn(Spawn::new("/no/such/program")).is_err());
    let process = host.spawn(Spawn::new("sleep").arg("1000"))?;
    assert_eq!(process.wait(Duration::from_millis(10))?, Status::Running);
    assert_eq!(host.process("sleep")?.context("it runs")?.id(), process.id());
    process.kill()?;
    assert_eq!(process.wait(SOON)?, Status::Signaled(9));
    assert!(process.signal(Signal::SIGTERM).is_err());
    // The background sleep of the script was left to the holder.
    let children = format!("/proc/{}/task/{0}/children", host.holder().pid);
    wait_for("the orphan reaped", SOON, || {
        let pids = fs::read_to_string(&children)?;
        let zombie = pids
            .split_whitespace()
            .any(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z ")));
        Ok((!zombie).then_some(()))
    })
}

#[test]
fn down_removes_what_a_crash_left_and_nothing_else() -> Result<()> {
    let mut lab = lab("dead", 2)?;
    let other = self::lab("alive", 1)?;
    lab.keep();
    lab.image("busybox")?;
    lab.relay("h1", Impairment::default(), 0)?;
    let mut pids = vec![];
    for host in lab.engines() {
        host.docker(&["run", "-d", "--restart", "always", "-v", "data:/data", "busybox", "sleep", "1000"])?;
        let out = host.docker(&["ps", "-q"])?;
        pids.push(host.docker(&["inspect", "-f", "{{.State.Pid}}", &out])?.parse::<i32>()?);
    }
    let holder = lab.host("h1").holder().pid;
    lab.host("h1").stop_engine(Signal::SIGKILL)?;
    kill(Pid::from_raw(holder), Signal::SIGKILL)?;
    kill(Pid::from_raw(lab.host("h2").holder().pid), Signal::SIGKILL)?;
    wait_for("the crash seen", SOON, || Ok((lab.problems().len() >= 2).then_some(())))?;
    // A half-written state file does not stop the removal either.
    fs::write(lab.dir().join("state.json"), "{")?;
    assert!(all_labs()?.contains(&lab.name().to_owned()));

    let removed = down(lab.name())?;
    assert!(removed.processes > 4 && removed.namespaces == 4 && removed.state, "{removed:?}");
    assert_eq!(leftovers(lab.name(), &pids)?, Vec::<String>::new());
    assert!(!all_labs()?.contains(&lab.name().to_owned()));
    assert_eq!(down(lab.name())?.namespaces, 0);
    assert!(other.problems().is_empty(), "{:?}", other.problems());
    check_pings(&other, &[("h1", MASTER, true)]);
    Ok(())
}

/// Everything on the machine that bears the lab's name, and those of the processes that live.
fn leftovers(lab: &str, pids: &[i32]) -> Result<Vec<String>> {
    let mut found = vec![];
    for mount in fs::read_to_string("/proc/self/mountinfo")?.lines().filter(|line| line.contains(lab)) {
        found.push(format!("mount {mount}"));
    }
    for entry in fs::read_dir("/run/netns")?.filter_map(Result::ok) {
        if entry.file_name().to_string_lossy().contains(lab) {
            found.push(format!("namespace {:?}", entry.file_name()));
        }
    }
    for entry in fs::read_dir("/sys/fs/cgroup")?.filter_map(Result::ok) {
        let dir = entry.path().join("skein-lab").join(lab);
        if dir.exists() {
            found.push(format!("control group {}", dir.display()));
        }
    }
    for entry in fs::read_dir("/proc")?.filter_map(Result::ok) {
        let command = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The holders are children of this process, which does not collect them: a zombie holds nothing.
        if (command.contains(lab) || groups.contains(lab)) && !stat.contains(") Z ") {
            found.push(format!("process {:?} {command}", entry.file_name()));
        }
    }
    for pid in pids.iter().filter(|pid| Path::new(&format!("/proc/{pid}/root/bin")).exists()) {
        found.push(format!("container's process {pid}"));
    }
    if Path::new(STATE_ROOT).join(lab).exists() {
        found.push("state directory".to_owned());
    }
    Ok(found)
}

#[test]
fn a_registry_of_the_lab_serves_pulls() -> Result<()> {
    let lab = lab("pull", 2)?;
    lab.image_on("h1", "busybox")?;
    let address = lab.registry()?;
    assert_eq!(lab.registry().context("it runs already")?, address);
    let image = format!("{address}/busybox:1");
    lab.host("h1").docker(&["tag", "busybox", &image])?;
    lab.host("h1").docker(&["push", &image])?;
    let text = lab.host("h2").docker(&["run", "--rm", &image, "echo", "pulled"])?;
    assert!(text.ends_with("pulled"), "{text}");
    Ok(())
}

#[test]
fn images_hold_a_database_an_application_and_tools() -> Result<()> {
    let lab = lab("images", 1)?;
    for image in ["postgres", "demo-app", "net-tools"] {
        lab.image(image)?;
    }
    let host = lab.host("h1");
    host.docker(&["network", "create", "net"])?;
    let database = ["run", "-d", "--name", "db", "--net", "net", "-m", "512m", "-e", "POSTGRES_PASSWORD=it's"];
    host.docker(&[&database[..], &["-v", "rows:/var/lib/postgresql/data", "postgres"]].concat())?;
    let url = "DATABASE_URL=host=db user=postgres password='it\\'s'";
    host.docker(&["run", "-d", "--name", "app", "--net", "net", "-e", url, "-e", "SKEIN_NODE=here", "demo-app"])?;
    let curl = |args: &[&str]| -> Result<String> {
        let fixed =
            ["run", "--rm", "--net", "net", "net-tools", "curl", "-sS", "--max-time", "8", "http://app:8080/rows"];
        host.docker(&[&fixed[..], args].concat())
    };
    let insert = ["-H", "content-type: application/json", "-d", "{\"text\":\"kept\"}"];
    wait_for("a row written", SOON, || Ok(curl(&insert).is_ok_and(|text| text.contains("\"id\"")).then_some(())))?;
    assert!(curl(&[])?.contains("\"text\":\"kept\""));
    // Over the network a password is asked for.
    let psql =
        ["run", "--rm", "--net", "net", "postgres", "psql", "-w", "-h", "db", "-U", "postgres", "-c", "select 1"];
    assert!(format!("{:#}", host.docker(&psql).expect_err("no password")).contains("no password supplied"));

    host.docker(&["stop", "db"])?;
    let text = curl(&["-w", "%{http_code}"])?;
    assert!(text.ends_with("503") && text.contains("error"), "{text}");
    // A new container on the same volume has the rows.
    host.docker(&["rm", "db"])?;
    host.docker(&[&database[..], &["-v", "rows:/var/lib/postgresql/data", "postgres"]].concat())?;
    wait_for("the row read again", SOON, || Ok(curl(&[]).is_ok_and(|text| text.contains("kept")).then_some(())))?;
    for tool in ["iperf3 --version", "ping -V", "dig -v", "ip -V"] {
        let words: Vec<&str> = tool.split(' ').collect();
        host.docker(&[&["run", "--rm", "net-tools"][..], &words].concat()).with_context(|| tool.to_owned())?;
    }
    Ok(())
}
