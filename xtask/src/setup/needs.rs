//! What the lab, the tests and the demo need from the distribution: one table, and the search for it on this host.
//!
//! Owns the names of binaries and packages. Must not know how packages are installed or whether that is allowed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// One program that something here runs, and the packages that bring it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Need {
    /// What the program is for, in a reader's words.
    pub purpose: &'static str,
    /// File name of the program.
    pub binary: &'static str,
    /// Names of the package in order of preference; the first that the package manager can install is taken.
    /// More than one where releases split or merged a package.
    pub packages: &'static [&'static str],
}

const fn need(purpose: &'static str, binary: &'static str, packages: &'static [&'static str]) -> Need {
    Need { purpose, binary, packages }
}

/// Everything that is needed. Whatever provides the binary is taken as it is: an engine from another source, a
/// dynamic busybox, a newer PostgreSQL.
pub const NEEDS: &[Need] = &[
    need("container engine", "dockerd", &["docker.io"]),
    // A package of its own since Debian 13; part of docker.io before, and on Ubuntu.
    need("client of the engine", "docker", &["docker-cli", "docker.io"]),
    need("network configuration", "ip", &["iproute2"]),
    need("bridge and FDB inspection", "bridge", &["iproute2"]),
    need("traffic limits", "tc", &["iproute2"]),
    need("relays of the lab", "ethtool", &["ethtool"]),
    need("small disks of tests", "losetup", &["mount", "util-linux"]),
    need("file systems on them", "mkfs.ext2", &["e2fsprogs"]),
    need("packet filter", "nft", &["nftables"]),
    need("firewall rules of the engine", "iptables", &["iptables"]),
    need("namespaces of the lab", "nsenter", &["util-linux"]),
    need("image busybox", "busybox", &["busybox-static", "busybox"]),
    need("PostgreSQL server", "postgres", &["postgresql"]),
    need("PostgreSQL client", "psql", &["postgresql-client"]),
    need("packet capture", "tcpdump", &["tcpdump"]),
    need("throughput measurement", "iperf3", &["iperf3"]),
    need("reachability tests", "ping", &["iputils-ping"]),
    need("connection tests", "nc", &["netcat-openbsd"]),
    need("DNS tests", "dig", &["bind9-dnsutils", "dnsutils"]),
    need("image registry", "docker-registry", &["docker-registry"]),
];

/// Directories of system programs that an ordinary user's `PATH` may lack.
const USUAL_DIRS: &[&str] =
    &["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/opt/docker/bin"];

/// Where Debian and Ubuntu keep the server programs of each PostgreSQL release: `<here>/<major>/bin`.
const POSTGRES_ROOT: &str = "/usr/lib/postgresql";

/// Finds a program in `PATH`, in the usual directories of system programs, and among PostgreSQL's server programs
/// (the newest release first).
pub fn find_binary(name: &str) -> Option<PathBuf> {
    search_dirs().into_iter().map(|dir| dir.join(name)).find(|path| is_executable(path))
}

/// The needs that no program on this host meets, in the table's order.
pub fn missing() -> Vec<&'static Need> {
    missing_in(&search_dirs())
}

/// The first choice of package of each need, once each, in the table's order.
pub fn first_packages(needs: &[&'static Need]) -> Vec<&'static str> {
    let mut seen = BTreeSet::new();
    needs.iter().filter_map(|need| need.packages.first().copied()).filter(|name| seen.insert(*name)).collect()
}

fn missing_in(dirs: &[PathBuf]) -> Vec<&'static Need> {
    NEEDS.iter().filter(|need| !dirs.iter().any(|dir| is_executable(&dir.join(need.binary)))).collect()
}

fn search_dirs() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // A relative entry would make the answer depend on where the command was typed.
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).filter(|dir| dir.is_absolute()).collect();
    dirs.extend(USUAL_DIRS.iter().map(PathBuf::from));
    dirs.extend(postgres_dirs(Path::new(POSTGRES_ROOT)));
    dirs
}

/// `<root>/<major>/bin`, the highest major first.
fn postgres_dirs(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root) else {
        return Vec::new();
    };
    let mut majors: Vec<u32> = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    majors.sort_unstable_by(|a, b| b.cmp(a));
    majors.into_iter().map(|major| root.join(major.to_string()).join("bin")).collect()
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn executable(dir: &Path, name: &str, mode: u32) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join(name), "").unwrap();
        std::fs::set_permissions(dir.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn an_empty_host_lacks_everything_and_a_program_meets_its_need() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = [dir.path().to_path_buf()];
        assert_eq!(missing_in(&dirs).len(), NEEDS.len());
        executable(dir.path(), "dockerd", 0o755);
        let left = missing_in(&dirs);
        assert_eq!(left.len(), NEEDS.len() - 1);
        assert!(left.iter().all(|need| need.binary != "dockerd"));
    }

    #[test]
    fn a_file_that_cannot_run_is_no_program() {
        let dir = tempfile::tempdir().unwrap();
        executable(dir.path(), "nft", 0o644);
        assert!(missing_in(&[dir.path().to_path_buf()]).iter().any(|need| need.binary == "nft"));
    }

    #[test]
    fn the_newest_postgresql_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        for major in ["9", "15", "17", "README"] {
            std::fs::create_dir_all(dir.path().join(major).join("bin")).unwrap();
        }
        let found = postgres_dirs(dir.path());
        let majors: Vec<_> = found.iter().map(|p| p.parent().unwrap().file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(majors, ["17", "15", "9"]);
    }

    #[test]
    fn packages_are_named_once() {
        let all: Vec<&Need> = NEEDS.iter().collect();
        let packages = first_packages(&all);
        let distinct: BTreeSet<_> = packages.iter().collect();
        assert_eq!(distinct.len(), packages.len());
        assert_eq!(packages.iter().filter(|name| **name == "iproute2").count(), 1);
    }

    #[test]
    fn every_need_names_a_package_and_binaries_are_distinct() {
        assert!(NEEDS.iter().all(|need| !need.packages.is_empty()));
        let distinct: BTreeSet<_> = NEEDS.iter().map(|need| need.binary).collect();
        assert_eq!(distinct.len(), NEEDS.len());
    }
}
