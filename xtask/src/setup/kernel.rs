//! Asks the kernel for each feature that the lab and the overlay are made of, by making one of it.
//!
//! Everything happens on a thread of its own with network, mount and UTS namespaces of its own, which end with the
//! thread: the host keeps its links, tables and mounts. It works before any package is installed, so it speaks
//! netlink itself (rtnetlink(7), `linux/netfilter/nfnetlink.h`) and runs no program.

use std::os::fd::AsRawFd;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};

/// A feature that could not be used here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// Name of the feature.
    pub feature: &'static str,
    /// What the kernel answered.
    pub detail: String,
    /// What may help.
    pub hint: &'static str,
}

const HINT_PRIVILEGES: &str =
    "run on the machine itself, or in a privileged container with all capabilities (CAP_SYS_ADMIN, CAP_NET_ADMIN)";

/// The features that are made over rtnetlink: name, kind of the link, data of the kind, hint.
const LINKS: &[(&str, &str, &[u8], &str)] = &[
    ("VXLAN devices", "vxlan", &VXLAN_DATA, "modprobe vxlan (CONFIG_VXLAN)"),
    ("veth pairs", "veth", &[], "modprobe veth (CONFIG_VETH)"),
    ("bridges", "bridge", &[], "modprobe bridge (CONFIG_BRIDGE)"),
];

/// `IFLA_VXLAN_ID` (1) with VNI 1: the only attribute that a VXLAN link cannot do without.
const VXLAN_DATA: [u8; 8] = {
    let (len, kind, vni) = (8_u16.to_ne_bytes(), 1_u16.to_ne_bytes(), 1_u32.to_ne_bytes());
    [len[0], len[1], kind[0], kind[1], vni[0], vni[1], vni[2], vni[3]]
};

/// Tries every feature. Needs root. Idempotent; leaves nothing behind.
///
/// # Errors
/// When the probe itself cannot run: no temporary directory, no thread.
pub fn probe() -> std::io::Result<Vec<Gap>> {
    // On the host's file system, empty before and after: what is mounted on it is seen by the thread alone.
    let dir = tempfile::Builder::new().prefix("skein-probe-").tempdir()?;
    let path = dir.path().to_path_buf();
    let thread = std::thread::Builder::new().name("kernel-probe".into()).spawn(move || probe_here(&path))?;
    let mut gaps = thread.join().map_err(|_| std::io::Error::other("the kernel probe panicked"))?;
    gaps.extend(probe_mounts(&std::fs::read_to_string("/proc/self/mounts").unwrap_or_default()));
    Ok(gaps)
}

/// Runs on the probe's own thread, whose namespaces it changes.
fn probe_here(dir: &Path) -> Vec<Gap> {
    let namespaces = [
        ("network namespaces", CloneFlags::CLONE_NEWNET),
        ("mount namespaces", CloneFlags::CLONE_NEWNS),
        ("UTS namespaces", CloneFlags::CLONE_NEWUTS),
    ];
    for (feature, flag) in namespaces {
        if let Err(errno) = unshare(flag) {
            // Without its own namespaces the rest would happen to the host.
            return vec![gap(feature, errno, HINT_PRIVILEGES)];
        }
    }
    let mut gaps = Vec::new();
    for (feature, kind, data, hint) in LINKS {
        if let Err(errno) = new_link(kind, data) {
            gaps.push(gap(feature, errno, hint));
        }
    }
    if let Err(errno) = new_nft_table() {
        gaps.push(gap("nftables", errno, "modprobe nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)"));
    }
    if !Path::new("/proc/sys/net/ipv6").exists() {
        gaps.push(gap("IPv6", Errno::EAFNOSUPPORT, "boot without ipv6.disable=1 (CONFIG_IPV6)"));
    }
    if let Err(errno) = mount_overlay(dir) {
        gaps.push(gap("overlayfs", errno, "modprobe overlay (CONFIG_OVERLAY_FS)"));
    }
    gaps
}

/// The engine needs cgroups, of either version, mounted.
fn probe_mounts(mounts: &str) -> Option<Gap> {
    let mounted =
        mounts.lines().any(|line| line.split(' ').nth(2).is_some_and(|kind| kind == "cgroup" || kind == "cgroup2"));
    (!mounted).then(|| Gap {
        feature: "control groups",
        detail: "no cgroup file system is mounted".into(),
        hint: "mount -t cgroup2 none /sys/fs/cgroup (CONFIG_CGROUPS)",
    })
}

fn gap(feature: &'static str, errno: Errno, hint: &'static str) -> Gap {
    let hint = if errno == Errno::EPERM { HINT_PRIVILEGES } else { hint };
    Gap { feature, detail: format!("{} ({errno:?})", errno.desc()), hint }
}

/// An overlay on a tmpfs, in this thread's mount namespace.
fn mount_overlay(dir: &Path) -> nix::Result<()> {
    const NONE: Option<&str> = None;
    // Without this the mounts below would appear on the host, where `/` is usually shared.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), NONE)?;
    let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| dir.join(name));
    for path in [&lower, &upper, &work, &merged] {
        std::fs::create_dir(path).map_err(|_| Errno::EIO)?;
    }
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
}

// netlink(7), linux/netlink.h
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 0x2;
const NLMSG_HDRLEN: usize = 16;
// rtnetlink(7), linux/if_link.h
const RTM_NEWLINK: u16 = 16;
const IFINFOMSG_LEN: usize = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWTABLE: u16 = NFNL_SUBSYS_NFTABLES << 8;
const NFPROTO_INET: u8 = 1;
const NFTA_TABLE_NAME: u16 = 1;

/// One answer of the kernel: a message header, the error code and the header of the request, with room to spare.
const ANSWER_BYTES: usize = 4096;

fn new_link(kind: &str, data: &[u8]) -> nix::Result<()> {
    let mut info = attribute(IFLA_INFO_KIND, kind.as_bytes());
    if !data.is_empty() {
        info.extend(attribute(IFLA_INFO_DATA, data));
    }
    let mut body = vec![0; IFINFOMSG_LEN];
    body.extend(attribute(IFLA_IFNAME, format!("probe-{kind}\0").as_bytes()));
    body.extend(attribute(IFLA_LINKINFO, &info));
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    request(SockProtocol::NetlinkRoute, &message(RTM_NEWLINK, flags, &body))
}

fn new_nft_table() -> nix::Result<()> {
    let header = |family: u8, resource: u16| {
        let [high, low] = resource.to_be_bytes();
        vec![family, 0, high, low]
    };
    let mut table = header(NFPROTO_INET, 0);
    table.extend(attribute(NFTA_TABLE_NAME, b"skein_probe\0"));
    let mut batch = message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, &header(0, NFNL_SUBSYS_NFTABLES));
    batch.extend(message(NFT_MSG_NEWTABLE, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, &table));
    batch.extend(message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, &header(0, NFNL_SUBSYS_NFTABLES)));
    request(SockProtocol::NetlinkNetFilter, &batch)
}

/// Sends to the kernel and returns its verdict. The kernel handles a request inside the send, so the answer is there
/// when it returns, and an empty socket is an error rather than something to wait for.
fn request(protocol: SockProtocol, bytes: &[u8]) -> nix::Result<()> {
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    sendto(fd.as_raw_fd(), bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; ANSWER_BYTES];
    let len = recv(fd.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    verdict(&answer[..len])
}

/// The error code of the first message, which is of type `NLMSG_ERROR` (0 acknowledges).
fn verdict(answer: &[u8]) -> nix::Result<()> {
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(NLMSG_HDRLEN..NLMSG_HDRLEN + 4).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(Errno::from_raw(code.saturating_neg())),
        _ => Err(Errno::EBADMSG),
    }
}

/// A netlink message: header and body, padded to 4 bytes. Probes are small: lengths fit their fields.
fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(NLMSG_HDRLEN + body.len()).expect("a probe is a few dozen bytes");
    let mut out = Vec::with_capacity(NLMSG_HDRLEN + body.len() + 3);
    out.extend(len.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend([0; 8]); // sequence number and port id: one request per socket
    out.extend(body);
    pad(&mut out);
    out
}

/// A netlink attribute: length and type, then the value, padded to 4 bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).expect("a probe is a few dozen bytes");
    let mut out = Vec::with_capacity(value.len() + 7);
    out.extend(len.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    pad(&mut out);
    out
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        let answer = |kind: u16, code: i32| {
            let mut bytes = message(kind, 0, &code.to_ne_bytes());
            bytes.extend([0; 16]);
            bytes
        };
        assert_eq!(verdict(&answer(NLMSG_ERROR, 0)), Ok(()));
        assert_eq!(verdict(&answer(NLMSG_ERROR, -95)), Err(Errno::EOPNOTSUPP));
        assert_eq!(verdict(&answer(RTM_NEWLINK, 0)), Err(Errno::EBADMSG));
        assert_eq!(verdict(&[]), Err(Errno::EBADMSG));
    }

    #[test]
    fn attributes_are_padded_but_their_length_is_not() {
        let bytes = attribute(IFLA_IFNAME, b"ab\0");
        assert_eq!(bytes.len(), 8);
        assert_eq!(u16::from_ne_bytes([bytes[0], bytes[1]]), 7);
        assert_eq!(attribute(1, &1_u32.to_ne_bytes()), VXLAN_DATA);
    }

    #[test]
    fn cgroups_of_either_version_suffice() {
        assert_eq!(probe_mounts("none /sys/fs/cgroup cgroup2 rw 0 0\n"), None);
        assert_eq!(probe_mounts("proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw 0 0\n"), None);
        assert_eq!(probe_mounts("proc /proc proc rw 0 0\n").unwrap().feature, "control groups");
    }

    #[test]
    fn a_missing_privilege_is_named_as_such() {
        assert_eq!(gap("bridges", Errno::EPERM, "modprobe bridge").hint, HINT_PRIVILEGES);
        assert_eq!(gap("bridges", Errno::EOPNOTSUPP, "modprobe bridge").hint, "modprobe bridge");
    }
}
