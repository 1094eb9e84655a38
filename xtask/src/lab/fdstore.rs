//! The file descriptor stores of a host's services, as systemd keeps them (sd_notify(3)).
//!
//! Owns: per service the socket behind `NOTIFY_SOCKET`, and the descriptors that its processes have left there. Knows
//! nothing of what they are for, nor of the processes. Understands `FDSTORE=1`, `FDSTOREREMOVE=1`, `FDNAME=` and
//! `BARRIER=1`; other messages (`READY=1`, `STOPPING=1`) are read and change nothing. Nothing is dropped before the
//! host ends: a lab cannot tell the stop of a service from the first half of a restart.
//!
//! Threads: one per service (at most [`SERVICES_MAX`]), which waits for messages. No channels.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Services of a host: an agent, and what stands for one in tests.
const SERVICES_MAX: usize = 8;

/// Descriptors that a service may leave: four for each of 16 networks.
const KEPT_MAX: usize = 64;

/// Descriptors handed over to a process at most: those kept, and the plugin's.
const FDS_MAX: usize = KEPT_MAX + 1;

/// Longest message, bytes: three lines, of which the longest is a name.
const MESSAGE_BYTES_MAX: usize = 4096;

/// Descriptors in one message at most; further ones are closed by the kernel.
const MESSAGE_FDS_MAX: usize = 4;

/// Longest name of a descriptor, bytes (`FDNAME_MAX` of systemd).
const NAME_BYTES_MAX: usize = 255;

/// Where the sockets are, in the host's own `/run`.
const DIR: &str = "/run/skein-lab/notify";

/// The descriptors of one service, in the order they came.
type Kept = Vec<(String, OwnedFd)>;

/// The stores of a host, by service.
#[derive(Debug, Default)]
pub(super) struct Stores {
    services: Mutex<BTreeMap<String, Arc<Service>>>,
}

#[derive(Debug)]
struct Service {
    path: PathBuf,
    socket: UnixDatagram,
    kept: Mutex<Kept>,
}

impl Stores {
    /// The service's socket, made if it is not there, and copies of what is kept for it.
    ///
    /// # Errors
    /// The name is no file name, there are too many services, or the socket cannot be made.
    pub(super) fn open(&self, service: &str) -> Result<(PathBuf, Kept)> {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        if !services.contains_key(service) {
            ensure!(services.len() < SERVICES_MAX, "failed to keep descriptors of {service}: {SERVICES_MAX} services");
            services.insert(service.to_owned(), Service::start(service)?);
        }
        let service = &services[service];
        // What the last process sent before it died comes first.
        let kept = service.drain();
        let copies = kept.iter().map(|(name, fd)| Ok((name.clone(), fd.try_clone()?)));
        let copies = copies.collect::<io::Result<_>>().context("failed to share kept descriptors")?;
        Ok((service.path.clone(), copies))
    }
}

impl Service {
    fn start(service: &str) -> Result<Arc<Self>> {
        ensure!(
            !service.is_empty() && Path::new(service).file_name() == Some(service.as_ref()),
            "failed to name a service {service:?}"
        );
        fs::create_dir_all(DIR).with_context(|| format!("failed to create {DIR}"))?;
        let path = Path::new(DIR).join(service);
        let socket = UnixDatagram::bind(&path).with_context(|| format!("failed to bind {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("failed to protect {}", path.display()))?;
        let service = Arc::new(Self { path, socket, kept: Mutex::default() });
        let reader = Arc::clone(&service);
        std::thread::Builder::new()
            .name("notify".to_owned())
            .spawn(move || {
                let wait = || poll(&mut [PollFd::new(&reader.socket, PollFlags::IN)], None);
                while matches!(wait(), Ok(_) | Err(rustix::io::Errno::INTR)) {
                    drop(reader.drain());
                }
            })
            .context("failed to start a thread")?;
        Ok(service)
    }

    /// Reads all messages that wait.
    fn drain(&self) -> MutexGuard<'_, Kept> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok((text, fds)) = receive(&self.socket) {
            obey(&mut kept, &text, fds);
        }
        kept
    }
}

/// The next message with its descriptors; an error when none waits.
fn receive(socket: &UnixDatagram) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = recvmsg(socket, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags)?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    Ok((String::from_utf8_lossy(&buffer[..message.bytes]).into_owned(), fds))
}

/// Does what a message says. Descriptors that are not kept are closed, which is all that a barrier waits for.
fn obey(kept: &mut Kept, text: &str, fds: Vec<OwnedFd>) {
    let field = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let valid =
        |name: &&str| name.len() <= NAME_BYTES_MAX && name.bytes().all(|b| (b' '..127).contains(&b) && b != b':');
    let name = field("FDNAME").filter(valid);
    if field("FDSTOREREMOVE") == Some("1") {
        kept.retain(|(known, _)| Some(known.as_str()) != name);
    } else if field("FDSTORE") == Some("1") {
        let room = KEPT_MAX.saturating_sub(kept.len());
        kept.extend(fds.into_iter().take(room).map(|fd| (name.unwrap_or("stored").to_owned(), fd)));
    }
}

/// A copy of a descriptor that children inherit, at a number that is none of those from 3 on where a child wants it.
#[derive(Debug)]
pub(super) struct Inherited(RawFd);

impl Inherited {
    /// Copies it.
    ///
    /// # Errors
    /// Too many are open.
    pub(super) fn try_new(fd: &OwnedFd) -> Result<Self> {
        let least = RawFd::try_from(3 + FDS_MAX).context("failed to represent a descriptor's number")?;
        let number = fcntl(fd.as_fd(), FcntlArg::F_DUPFD(least))
            .with_context(|| format!("failed to copy descriptor {}", fd.as_raw_fd()))?;
        Ok(Self(number))
    }

    /// Its number, here and in children.
    pub(super) fn number(&self) -> RawFd {
        self.0
    }
}

impl Drop for Inherited {
    fn drop(&mut self) {
        let _ = nix::unistd::close(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd() -> OwnedFd {
        UnixDatagram::unbound().unwrap().into()
    }

    #[test]
    fn what_messages_do() {
        let check = |messages: &[(&str, usize)], want: &[&str]| {
            let mut kept = Kept::new();
            for (text, fds) in messages {
                obey(&mut kept, text, (0..*fds).map(|_| fd()).collect());
            }
            let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, want, "{messages:?}");
        };
        check(&[], &[]);
        check(&[("READY=1", 0), ("STOPPING=1\nSTATUS=bye", 0)], &[]);
        check(&[("FDSTORE=1\nFDPOLL=0\nFDNAME=a", 1), ("FDNAME=b\nFDSTORE=1\n", 1)], &["a", "b"]);
        check(&[("FDSTORE=1\nFDNAME=a", 2), ("FDSTORE=1", 1)], &["a", "a", "stored"]);
        check(&[("FDSTORE=1\nFDNAME=a", 2), ("FDSTORE=1\nFDNAME=b", 1), ("FDSTOREREMOVE=1\nFDNAME=a", 0)], &["b"]);
        check(&[("FDSTORE=1\nFDNAME=a", 1), ("FDSTOREREMOVE=1\nFDNAME=c", 0), ("FDSTOREREMOVE=1", 0)], &["a"]);
        check(&[("FDSTORE=1\nFDNAME=a:b", 1)], &["stored"]);
        check(&[("BARRIER=1", 1), ("FDSTORE=0\nFDNAME=a", 1), ("FDNAME=a", 1)], &[]);
    }

    #[test]
    fn a_service_may_leave_so_many_and_no_more() {
        let mut kept = Kept::new();
        for _ in 0..KEPT_MAX + 2 {
            obey(&mut kept, "FDSTORE=1\nFDNAME=a", vec![fd()]);
        }
        assert_eq!(kept.len(), KEPT_MAX);
    }

    #[test]
    fn inherited_copies_are_out_of_the_way() {
        let copy = Inherited::try_new(&fd()).unwrap();
        assert!(copy.number() >= RawFd::try_from(3 + FDS_MAX).unwrap());
    }
}
