//! The command line as clap sees it: names, flags, help. No behaviour.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Containers on many hosts as if they were one machine.
#[derive(Debug, Parser)]
#[command(
    name = "skein",
    version,
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not \
    found, 4 conflict, 5 no node fits, 6 master unreachable, 64 bad compose file or configuration. `exec` and `run` \
    give back the container's own code."
)]
pub(crate) struct Cli {
    /// Master to talk to: unix:///path or tcp://host:port [env: SKEIN_HOST]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) host: Option<String>,
    /// Context to use instead of the current one [env: SKEIN_CONTEXT]
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) context: Option<String>,
    /// Directory with ca.pem, cert.pem and key.pem, for --host tcp://… [env: SKEIN_TLS_DIR]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Form of the output
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Tables and text for people.
    Table,
    /// JSON for programs.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make the cluster run what a compose file describes
    Up(UpArgs),
    /// Remove a stack
    Down(DownArgs),
    /// Run one container
    Run(Box<RunArgs>),
    /// Remove containers that were made by `skein run`
    Rm(RmArgs),
    /// Stop containers that were made by `skein run`; they keep their files
    Stop(Names),
    /// Start stopped containers again
    Start(Names),
    /// List tasks: containers and where they run
    Ps(PsArgs),
    /// Show the output of tasks, services or stacks
    Logs(LogsArgs),
    /// Run a command in a container
    Exec(ExecArgs),
    /// Hosts of the cluster
    #[command(subcommand)]
    Node(NodeCommand),
    /// Services
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Overlay networks
    #[command(subcommand)]
    Network(NetworkCommand),
    /// How the overlay is, as the hosts see it
    #[command(subcommand)]
    Net(NetCommand),
    /// Named volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Stacks: what compose files made
    #[command(subcommand)]
    Stack(StackCommand),
    /// Join tokens for new hosts
    #[command(subcommand)]
    Token(TokenCommand),
    /// Say why a task or service is where it is, or nowhere
    Explain {
        /// Task or service
        name: String,
        /// Show every node with all reasons against it
        #[arg(long)]
        nodes: bool,
        /// Show one node with all reasons against it
        #[arg(long, value_name = "NODE", conflicts_with = "nodes")]
        node: Option<String>,
    },
    /// Say what would happen if hosts failed, were drained or joined, or a file was applied; changes nothing
    #[command(subcommand)]
    WhatIf(WhatIfCommand),
    /// Follow all changes of the cluster
    Events {
        /// Begin after this revision instead of now
        #[arg(long)]
        from: Option<u64>,
    },
    /// Show the master and the cluster as a whole
    Info,
    /// Looks behind the scenes, for when something is wrong with the cluster itself
    #[command(subcommand)]
    Debug(DebugCommand),
    /// Client certificates for remote users
    #[command(subcommand)]
    Cert(CertCommand),
    /// Which master to talk to, and as whom
    #[command(subcommand)]
    Context(ContextCommand),
    /// Save the master's store to a file
    Backup {
        /// File to write; must not be there yet
        file: PathBuf,
    },
    /// Print completions for a shell
    Completion {
        /// Shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum WhatIfCommand {
    /// These hosts failed for good
    NodeDown {
        /// Nodes
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// These hosts were drained
    Drain {
        /// Nodes
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// Hosts joined that are like one that is there
    AddNode {
        /// Node whose labels, platform and offer the new ones have
        #[arg(long, value_name = "NODE")]
        like: String,
        /// How many
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        count: u32,
    },
    /// What a compose file describes was running
    Up {
        #[command(flatten)]
        compose: ComposeArgs,
        /// Services of the stack that are not in the file were removed
        #[arg(long)]
        remove_orphans: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetCommand {
    /// Show how networks are on each host: wanted beside found, repairs, drops, addresses
    Status {
        /// Only this host
        node: Option<String>,
    },
    /// Send through the tunnel between every pair of hosts: UDP and TCP, IPv4 and IPv6, all sizes
    Check {
        /// Only between this host and all others
        node: Option<String>,
    },
    /// Show what an outsider can reach on each host
    Exposed {
        /// Only this host
        node: Option<String>,
    },
    /// Say whether one container reaches another, hop by hop, and try it
    Path {
        /// Task, service or node where it begins
        from: String,
        /// Task, service or node where it ends
        to: String,
        /// Port there
        #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
        port: Option<u16>,
        /// Protocol of the port
        #[arg(long, value_enum, default_value_t = ProtoArg::Tcp)]
        proto: ProtoArg,
    },
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProtoArg {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DebugCommand {
    /// Have the master check the invariants of its whole state
    Check,
}

/// Which compose files, and what stack they make.
#[derive(Debug, Default, Args)]
pub(crate) struct ComposeArgs {
    /// Compose file, `-` for standard input; several are laid over each other [default: compose.yaml, compose.yml,
    /// docker-compose.yml or docker-compose.yaml here or in a parent directory]
    #[arg(short, long = "file", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Name of the stack [default: COMPOSE_PROJECT_NAME, the key `name:`, or the directory's name]
    #[arg(short, long, value_name = "NAME")]
    pub(crate) project_name: Option<String>,
    /// Variables for the file instead of `.env`
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Activate a profile
    #[arg(long, value_name = "NAME")]
    pub(crate) profile: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub(crate) compose: ComposeArgs,
    /// Only show what would change
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not wait until everything runs
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Do not ask before containers are replaced or removed
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Keys that have no effect here are errors
    #[arg(long)]
    pub(crate) strict: bool,
    /// Remove services of the stack that are not in the file
    #[arg(long)]
    pub(crate) remove_orphans: bool,
    /// How long to wait, such as 90s or 5m
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub(crate) timeout: std::time::Duration,
}

#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    #[command(flatten)]
    pub(crate) compose: ComposeArgs,
    /// Forget its volumes; the data stays on the hosts
    #[arg(long)]
    pub(crate) volumes: bool,
    /// Only show what would be removed
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not wait until all containers have stopped
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// How long to wait, such as 90s or 5m
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub(crate) timeout: std::time::Duration,
}

fn duration(text: &str) -> Result<std::time::Duration, String> {
    crate::compose::values::duration_ms(text).map(std::time::Duration::from_millis)
}

#[derive(Debug, Default, Args)]
pub(crate) struct RunArgs {
    /// Name of the container, unique in the cluster
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Do not wait and show its output
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Remove it when it ends
    #[arg(long, conflicts_with = "detach")]
    pub(crate) rm: bool,
    /// Variable: NAME=value, or NAME to pass on the caller's
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// File of variables
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Volume or path: [SOURCE:]TARGET[:ro]
    #[arg(short, long = "volume", value_name = "[SOURCE:]TARGET[:ro]")]
    pub(crate) volume: Vec<String>,
    /// Memory as a file system: TARGET[:size=64m]
    #[arg(long, value_name = "TARGET")]
    pub(crate) tmpfs: Vec<String>,
    /// Take the volumes of a container: NAME[:ro]
    #[arg(long, value_name = "NAME")]
    pub(crate) volumes_from: Vec<String>,
    /// Port: [[ADDRESS:]HOST:]CONTAINER[/udp]
    #[arg(short, long = "publish", value_name = "PORT")]
    pub(crate) publish: Vec<String>,
    /// Network, or container:NAME to share another one's [default: the engine's own bridge]
    #[arg(long, visible_alias = "net", value_name = "NAME")]
    pub(crate) network: Vec<String>,
    /// Further name in the networks' DNS
    #[arg(long, value_name = "NAME", requires = "network")]
    pub(crate) network_alias: Vec<String>,
    /// Its IPv4 address in the network
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) ip: Option<Ipv4Addr>,
    /// Its IPv6 address in the network: the one that belongs to the IPv4 address, or says it alone
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) ip6: Option<Ipv6Addr>,
    /// Where it may run: node.labels.disk==ssd, node==dc1-a, instance!=/db.*/
    #[arg(long, value_name = "EXPRESSION")]
    pub(crate) constraint: Vec<String>,
    /// What it shall run beside: container==front, image!=~redis, service!=shop_db, volume==data
    #[arg(long, value_name = "EXPRESSION")]
    pub(crate) affinity: Vec<String>,
    /// Nodes of which it must be one: dc1-a|dc1-b
    #[arg(long, value_name = "NODE|NODE...")]
    pub(crate) whitelist: Vec<String>,
    /// How to choose among the nodes that fit
    #[arg(long, value_enum)]
    pub(crate) strategy: Option<StrategyArg>,
    /// What the image is for: linux/arm64
    #[arg(long, value_name = "OS/ARCH")]
    pub(crate) platform: Option<String>,
    /// Driver of the named volumes that are made for it
    #[arg(long, value_name = "NAME")]
    pub(crate) volume_driver: Option<String>,
    /// Network plugin that the engine must have
    #[arg(long, value_name = "NAME")]
    pub(crate) network_plugin: Vec<String>,
    /// Generic resource to set aside on the node: gpu=1
    #[arg(long, value_name = "KIND=COUNT")]
    pub(crate) generic_resource: Vec<String>,
    /// GPUs to set aside on the node and to give to the container: how many
    #[arg(long, value_name = "COUNT")]
    pub(crate) gpus: Option<String>,
    /// Reach another one by a further name, on its host: NAME[:ALIAS]
    #[arg(long, value_name = "NAME[:ALIAS]")]
    pub(crate) link: Vec<String>,
    /// Not for one container, which has no replicas to spread; services have it
    #[arg(long, value_name = "spread=LABEL", hide = true)]
    pub(crate) placement_pref: Vec<String>,
    /// Share the processes of another one: container:NAME
    #[arg(long, value_name = "container:NAME")]
    pub(crate) pid: Option<String>,
    /// Share the memory of another one: container:NAME
    #[arg(long, value_name = "container:NAME")]
    pub(crate) ipc: Option<String>,
    /// Memory limit, such as 512m
    #[arg(short, long, value_name = "BYTES")]
    pub(crate) memory: Option<String>,
    /// Memory to set aside on the node
    #[arg(long, visible_alias = "reserve-memory", value_name = "BYTES")]
    pub(crate) memory_reservation: Option<String>,
    /// CPU limit, such as 0.5
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<String>,
    /// CPUs to set aside on the node
    #[arg(long, visible_alias = "reserve-cpu", value_name = "NUMBER")]
    pub(crate) cpus_reservation: Option<String>,
    /// no, always, unless-stopped or on-failure[:attempts]
    #[arg(long, default_value = "no")]
    pub(crate) restart: String,
    /// Replaces the image's entry point; empty clears it
    #[arg(long, value_name = "COMMAND")]
    pub(crate) entrypoint: Option<String>,
    /// Label of the container
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<String>,
    /// Host name inside
    #[arg(long)]
    pub(crate) hostname: Option<String>,
    /// user[:group]
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Working directory inside
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Run an init that reaps children
    #[arg(long)]
    pub(crate) init: bool,
    /// All capabilities and devices of the host
    #[arg(long)]
    pub(crate) privileged: bool,
    /// Read-only root file system
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Capability to add
    #[arg(long, value_name = "CAP")]
    pub(crate) cap_add: Vec<String>,
    /// Capability to drop
    #[arg(long, value_name = "CAP")]
    pub(crate) cap_drop: Vec<String>,
    /// Line for /etc/hosts: NAME:ADDRESS
    #[arg(long, value_name = "NAME:ADDRESS")]
    pub(crate) add_host: Vec<String>,
    /// Signal that asks it to stop
    #[arg(long, value_name = "SIGNAL")]
    pub(crate) stop_signal: Option<String>,
    /// Time between that signal and SIGKILL, such as 30s
    #[arg(long, value_name = "TIME")]
    pub(crate) stop_timeout: Option<String>,
    /// Image
    pub(crate) image: String,
    /// Command and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// How to choose among the nodes that fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StrategyArg {
    /// The emptiest node.
    Spread,
    /// The fullest node.
    Binpack,
    /// Any.
    Random,
}

#[derive(Debug, Args)]
pub(crate) struct Names {
    /// Names or ids
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Also those that run
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Names or ids
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Ended ones too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Only of this stack
    #[arg(long)]
    pub(crate) stack: Option<String>,
    /// Only of this service
    #[arg(long)]
    pub(crate) service: Option<String>,
    /// Only on this node
    #[arg(long)]
    pub(crate) node: Option<String>,
    /// Only ids
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Go on with new lines as they come
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only this many of the last lines of each task
    #[arg(short = 'n', long)]
    pub(crate) tail: Option<u64>,
    /// Only lines since then: a duration such as 10m, or a time such as 2030-01-31T12:00:00Z
    #[arg(long)]
    pub(crate) since: Option<String>,
    /// Show the time of each line
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Do not name the task before each line
    #[arg(long)]
    pub(crate) no_prefix: bool,
    /// Tasks, services or stacks
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Pass standard input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Allocate a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Variable: NAME=value
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// user[:group]
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Working directory inside
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Task
    pub(crate) task: String,
    /// Command and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// List the hosts
    #[command(visible_alias = "list")]
    Ls,
    /// Show all that is known of hosts
    Inspect(Names),
    /// Set (KEY=VALUE) or remove (KEY-) labels
    Label {
        /// Node
        node: String,
        /// KEY=VALUE or KEY-
        #[arg(required = true)]
        labels: Vec<String>,
    },
    /// No new tasks here, and present service tasks move away
    Drain(Names),
    /// Tasks may be placed here again
    Activate(Names),
    /// No new tasks here; present ones stay
    Pause(Names),
    /// Remove hosts from the cluster and refuse their identity from now on
    Rm {
        /// Also one that is ready
        #[arg(short, long)]
        force: bool,
        /// Names or ids
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceCommand {
    /// List the services
    #[command(visible_alias = "list")]
    Ls {
        /// Only of this stack
        #[arg(long)]
        stack: Option<String>,
    },
    /// Show services in full
    Inspect(Names),
    /// Remove services and their containers
    Rm(Names),
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// List the networks
    #[command(visible_alias = "list")]
    Ls,
    /// Make a network
    Create {
        /// IPv4 subnet, such as 10.5.0.0/16 [default: a free one]
        #[arg(long)]
        subnet: Option<ipnet::Ipv4Net>,
        /// No way out of it and none in
        #[arg(long)]
        internal: bool,
        /// Plain `docker run --network` may use it
        #[arg(long)]
        attachable: bool,
        /// Label
        #[arg(long, value_name = "KEY=VALUE")]
        label: Vec<String>,
        /// Name
        name: String,
    },
    /// Show networks in full
    Inspect(Names),
    /// Remove networks that nothing uses
    Rm(Names),
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// List the named volumes and where they live
    #[command(visible_alias = "list")]
    Ls,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StackCommand {
    /// List the stacks
    #[command(visible_alias = "list")]
    Ls,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token; this is the only time that it is shown
    Create {
        /// Lifetime, such as 1h
        #[arg(long, default_value = "1h", value_parser = duration)]
        ttl: std::time::Duration,
        /// How many hosts may join with it
        #[arg(long, default_value_t = 1)]
        uses: u32,
        /// Label that these nodes get
        #[arg(long, value_name = "KEY=VALUE")]
        label: Vec<String>,
    },
    /// List the tokens
    #[command(visible_alias = "list")]
    Ls,
    /// Take tokens back
    Revoke(Names),
}

#[derive(Debug, Subcommand)]
pub(crate) enum CertCommand {
    /// Issue a client certificate
    Issue {
        /// Lifetime, such as 30d
        #[arg(long, default_value = "30d", value_parser = duration)]
        ttl: std::time::Duration,
        /// Directory for ca.pem, cert.pem and key.pem [default: print them]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Name of the user
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// Keep a master's address (--host) and the certificates for it under a name
    Create {
        /// Directory with ca.pem, cert.pem and key.pem
        #[arg(long, value_name = "DIR", conflicts_with_all = ["ca", "cert", "key"])]
        certs: Option<PathBuf>,
        /// The cluster's CA certificate
        #[arg(long, value_name = "FILE")]
        ca: Option<PathBuf>,
        /// Client certificate
        #[arg(long, value_name = "FILE")]
        cert: Option<PathBuf>,
        /// Key of the client certificate
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// Name in the master's certificate, when it is not the address's
        #[arg(long, value_name = "NAME")]
        server_name: Option<String>,
        /// Replace one of the same name
        #[arg(long)]
        force: bool,
        /// Name
        name: String,
    },
    /// List the contexts
    #[command(visible_alias = "list")]
    Ls,
    /// Make a context the current one; `default` is the local socket
    Use {
        /// Name
        name: String,
    },
    /// Forget a context
    Rm {
        /// Name
        name: String,
    },
    /// Show a context, the current one without a name
    Show {
        /// Name
        name: Option<String>,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_of_others_keep_their_flags() {
        let cli = Cli::try_parse_from(["skein", "exec", "-it", "web.1", "--", "ls", "-l"]).unwrap();
        let Command::Exec(args) = cli.command else { panic!("{:?}", cli.command) };
        assert_eq!((args.interactive, args.tty, args.command), (true, true, vec!["ls".into(), "-l".into()]));
        let cli = Cli::try_parse_from(["skein", "run", "-d", "busybox", "sh", "-c", "x", "-o", "y"]).unwrap();
        let Command::Run(args) = cli.command else { panic!("{:?}", cli.command) };
        assert_eq!(args.command, ["sh", "-c", "x", "-o", "y"]);
        assert_eq!(cli.output, Format::Table);
    }
}
