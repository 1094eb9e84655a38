//! What goes into each image.
//!
//! Knows the programs and where distributions keep them, nothing of image formats. No tasks, no channels.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::super::find_program;
use super::super::process::run;
use super::Config;
use super::rootfs::{Owner, Rootfs, quietly};

/// `PATH` of containers.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The user PostgreSQL runs as in its image, in the official image too.
const POSTGRES: Owner = Owner { uid: 999, gid: 999 };

/// Where the PostgreSQL image keeps the cluster that is copied into an empty volume.
const CLUSTER: &str = "/usr/local/share/cluster";

/// busybox-static with a link for every applet.
pub(super) fn busybox(root: &mut Rootfs) -> Result<Config> {
    root.base();
    add_busybox(root)?;
    Ok(Config { cmd: vec!["sh".to_owned()], env: vec![PATH.to_owned()], ..Config::default() })
}

fn add_busybox(root: &mut Rootfs) -> Result<()> {
    let busybox =
        find_program("busybox").context("failed to find the program busybox\nhint: apt-get install busybox-static")?;
    // Debian's other package, busybox, is linked dynamically and serves as well.
    root.programs(std::slice::from_ref(&busybox))?;
    root.file_as(&busybox, "/usr/bin/busybox");
    let applets = run(Command::new(&busybox).arg("--list"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox" && !applet.contains('/')) {
        root.link("busybox", Path::new("/usr/bin").join(applet));
    }
    for dir in ["/bin", "/sbin"] {
        // Where they are links already, as on this machine, sh is found there.
        if fs::read_link(dir).is_err() {
            root.link("usr/bin", dir);
        }
    }
    Ok(())
}

/// This machine's shell in the place of busybox's, which prefers its own applets to the programs of an image.
fn add_shell(root: &mut Rootfs) -> Result<()> {
    let shell = fs::canonicalize("/bin/sh").context("failed to find /bin/sh")?;
    root.programs(std::slice::from_ref(&shell))?;
    root.file_as(&shell, "/usr/bin/sh");
    Ok(())
}

/// Name look-ups of programs that use the C library: parts of it are loaded at run time, unseen by `ldd`.
fn add_name_services(root: &mut Rootfs) -> Result<()> {
    let places = ["/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/lib64", "/usr/lib64", "/usr/lib", "/lib"];
    for name in ["libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2"] {
        if let Some(path) = places.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file()) {
            root.programs(&[path])?;
        }
    }
    for path in ["/etc/services", "/etc/protocols", "/etc/ssl/certs/ca-certificates.crt"] {
        root.file_if_there(path);
    }
    Ok(())
}

/// Tools to look at and load networks, with busybox for the rest.
pub(super) fn net_tools(root: &mut Rootfs) -> Result<Config> {
    root.base();
    add_busybox(root)?;
    add_shell(root)?;
    add_name_services(root)?;
    for (name, package) in [
        ("iperf3", "iperf3"),
        ("ping", "iputils-ping"),
        ("nc", "netcat-openbsd"),
        ("dig", "bind9-dnsutils"),
        ("ip", "iproute2"),
        ("ss", "iproute2"),
    ] {
        root.program(name, package)?;
    }
    for name in ["curl", "tcpdump"] {
        if let Some(path) = find_program(name) {
            root.programs(&[path])?;
        }
    }
    Ok(Config { cmd: vec!["sh".to_owned()], env: vec![PATH.to_owned()], ..Config::default() })
}

/// The demo's application, from the directory that the running program was built into.
pub(super) fn demo_app(root: &mut Rootfs) -> Result<Config> {
    let me = std::env::current_exe().context("failed to find the running program")?;
    let app = me.ancestors().skip(1).take(3).map(|dir| dir.join("demo-app")).find(|path| path.is_file());
    let app = app.context("failed to find the program demo-app\nhint: cargo build -p demo-app")?;
    root.base();
    add_busybox(root)?;
    add_name_services(root)?;
    root.programs(std::slice::from_ref(&app))?;
    // Not at the place it was built in.
    root.entries.retain(|path, _| !path.ends_with("demo-app"));
    root.file_as(&app, "/usr/local/bin/demo-app");
    Ok(Config {
        cmd: vec!["demo-app".to_owned()],
        env: vec![PATH.to_owned()],
        exposed_ports: vec!["8080/tcp".to_owned()],
        ..Config::default()
    })
}

/// Where a distribution keeps PostgreSQL.
struct Installation {
    bin: PathBuf,
    share: PathBuf,
    lib: PathBuf,
}

impl Installation {
    /// The newest of Debian's side-by-side installations, else the one in the usual directories.
    fn find() -> Result<Self> {
        let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().filter_map(Result::ok);
        let newest = versions
            .filter_map(|entry| {
                let number: u32 = entry.file_name().to_str()?.split('.').next()?.parse().ok()?;
                let bin = entry.path().join("bin");
                bin.join("postgres").is_file().then_some((number, bin))
            })
            .max();
        let bin = newest.map(|(_, bin)| bin).or_else(|| {
            find_program("postgres").and_then(|path| fs::canonicalize(path).ok()?.parent().map(Path::to_owned))
        });
        let bin = bin.context("failed to find the program postgres\nhint: apt-get install postgresql")?;
        ensure!(bin.join("initdb").is_file(), "failed to find initdb in {}", bin.display());
        let ask = |what: &str| -> Result<PathBuf> {
            let config = bin.join("pg_config");
            let config = if config.is_file() { config } else { PathBuf::from("pg_config") };
            Ok(PathBuf::from(run(Command::new(config).arg(what))?.trim_end()))
        };
        // Without pg_config (its package is for developers on some distributions): Debian's layout.
        let version = bin.parent().and_then(Path::file_name).unwrap_or_default().to_owned();
        let share = ask("--sharedir").unwrap_or_else(|_| Path::new("/usr/share/postgresql").join(version));
        let lib = ask("--pkglibdir").unwrap_or_else(|_| bin.with_file_name("lib"));
        ensure!(share.is_dir() && lib.is_dir(), "failed to find {} and {}", share.display(), lib.display());
        Ok(Self { bin, share, lib })
    }
}

/// The distribution's PostgreSQL server, initialised and ready to run.
pub(super) fn postgres(root: &mut Rootfs) -> Result<Config> {
    let Installation { bin, share, lib } = Installation::find()?;
    root.base();
    add_busybox(root)?;
    add_shell(root)?;
    add_name_services(root)?;
    root.program("setpriv", "util-linux")?;

    let mut programs: Vec<PathBuf> =
        ["postgres", "initdb", "pg_ctl", "psql", "pg_isready", "pg_dump"].iter().map(|name| bin.join(name)).collect();
    programs.retain(|path| path.is_file());
    // Extensions and encodings; the compiler for queries would bring 100 MB of LLVM.
    let modules = fs::read_dir(&lib).with_context(|| format!("failed to list {}", lib.display()))?;
    programs.extend(modules.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.ends_with(".so") && !name.starts_with("llvmjit") && MODULES.iter().any(|module| name.starts_with(module))
    }));
    root.programs(&programs)?;
    let not_needed = ["man", "doc", "contrib"];
    root.tree(&share, &|path| !not_needed.iter().any(|name| path.ends_with(name)))?;
    root.tree(Path::new("/usr/share/zoneinfo"), &|path| !path.ends_with("right") && !path.ends_with("posix"))?;
    let locale = Path::new("/usr/lib/locale/C.utf8");
    if locale.is_dir() {
        root.tree(locale, &|_| true)?;
    }

    let Owner { uid, gid } = POSTGRES;
    root.text(
        "/etc/passwd",
        format!("root:x:0:0:root:/root:/bin/sh\npostgres:x:{uid}:{gid}::/var/lib/postgresql:/bin/sh\n"),
        0o644,
    );
    root.text("/etc/group", format!("root:x:0:\npostgres:x:{gid}:\n"), 0o644);
    root.directory("/var/lib/postgresql", 0o755, Some(POSTGRES));
    root.directory("/var/lib/postgresql/data", 0o700, Some(POSTGRES));
    root.directory("/run/postgresql", 0o755, Some(POSTGRES));
    root.text("/usr/local/bin/docker-entrypoint.sh", include_str!("postgres-entrypoint.sh"), 0o755);
    let text = format!("initdb of {}\n{SERVER_CONFIG}{INITDB:?}", bin.display());
    let initdb = bin.join("initdb");
    root.finish = Some((text, Box::new(move |dir| initialise(dir, &initdb))));

    Ok(Config {
        entrypoint: vec!["/usr/local/bin/docker-entrypoint.sh".to_owned()],
        cmd: vec!["postgres".to_owned()],
        env: vec![
            format!("{PATH}:{}", bin.display()),
            "PGDATA=/var/lib/postgresql/data".to_owned(),
            "LANG=C.UTF-8".to_owned(),
        ],
        exposed_ports: vec!["5432/tcp".to_owned()],
        volumes: vec!["/var/lib/postgresql/data".to_owned()],
        // "Fast shutdown": the default signal would wait for clients to go away.
        stop_signal: Some("SIGINT".to_owned()),
        ..Config::default()
    })
}

/// Server modules that are taken along, by the start of their names.
const MODULES: [&str; 12] = [
    "plpgsql",
    "dict_snowball",
    "libpqwalreceiver",
    "pgoutput",
    "pgcrypto",
    "citext",
    "hstore",
    "pg_trgm",
    "uuid-ossp",
    "pg_stat_statements",
    "euc",
    "utf8",
];

/// Small segments, since the whole cluster is copied into every new volume; not synced, since it is packed at once.
const INITDB: [&str; 9] = [
    "--username=postgres",
    "--encoding=UTF8",
    "--locale=C.UTF-8",
    "--auth=trust",
    "--wal-segsize=1",
    "--no-sync",
    "--no-instructions",
    "--set=shared_buffers=16MB",
    "--set=max_connections=50",
];

/// Options of `initdb` that servers before 16 do not know are said here instead. Fits a container of 128 MiB.
const SERVER_CONFIG: &str = "
listen_addresses = '*'
unix_socket_directories = '/run/postgresql'
shared_buffers = 16MB
max_connections = 50
max_wal_size = 64MB
min_wal_size = 8MB
timezone = 'UTC'
log_timezone = 'UTC'
jit = off
";

/// A user of this machine that is not root, to run `initdb`, which refuses root and users without a name.
fn unprivileged() -> Result<Owner> {
    let passwd = fs::read_to_string("/etc/passwd").context("failed to read /etc/passwd")?;
    let find = |wanted: &str| {
        passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [name, _, uid, gid, ..] = fields.as_slice() else {
                return None;
            };
            (*name == wanted).then_some(Owner { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
        })
    };
    find("postgres").or_else(|| find("nobody")).context("failed to find a user postgres or nobody in /etc/passwd")
}

/// Makes the cluster as an unprivileged user of this machine and gives it to the image's user.
fn initialise(root: &Path, initdb: &Path) -> Result<()> {
    let cluster = root.join(CLUSTER.trim_start_matches('/'));
    fs::create_dir_all(&cluster).with_context(|| format!("failed to create {}", cluster.display()))?;
    // The work directory is closed to others, so the cluster is made beside it and moved.
    let work = tempfile::Builder::new()
        .prefix("skein-lab-initdb-")
        .tempdir()
        .context("failed to create a temporary directory")?;
    let Owner { uid, gid } = unprivileged()?;
    std::os::unix::fs::chown(work.path(), Some(uid), Some(gid)).context("failed to hand over a directory")?;
    let data = work.path().join("data");
    let options = INITDB.iter().filter(|option| !option.starts_with("--set"));
    let mut command = Command::new(initdb);
    command.args(options).arg("--pgdata").arg(&data).env("LC_ALL", "C.UTF-8").env("TZ", "UTC");
    command.uid(uid).gid(gid).current_dir(work.path());
    quietly(&mut command)?;
    let config = data.join("postgresql.conf");
    let text = fs::read_to_string(&config).with_context(|| format!("failed to read {}", config.display()))?;
    fs::write(&config, text + SERVER_CONFIG).with_context(|| format!("failed to write {}", config.display()))?;
    // The mark of a whole cluster goes in last when it is copied, so it is kept beside.
    quietly(Command::new("cp").arg("-a").arg(format!("{}/.", data.display())).arg(&cluster))?;
    quietly(Command::new("chown").arg("-R").arg(format!("{}:{}", POSTGRES.uid, POSTGRES.gid)).arg(&cluster))?;
    fs::rename(cluster.join("PG_VERSION"), cluster.with_extension("version")).context("failed to move PG_VERSION")
}
