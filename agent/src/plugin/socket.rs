//! The socket on which the engine finds the plugin.
//!
//! Owns: taking it over from whoever holds it across our restarts (socket activation), or binding it. Must not know:
//! what is served on it. No tasks, no channels.
//!
//! Handed over is better: an engine that finds no plugin lets `run` fail after 15 s and starts itself 47 s late, while
//! a connection to a socket that somebody holds open just waits until the agent is back.

use std::{
    fs, io,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use listenfd::ListenFd;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use thiserror::Error;

/// Where an engine looks for sockets of plugins (Docker plugin discovery); the file's name is the driver's name.
pub const DEFAULT_PLUGIN_SOCKET: &str = "/run/docker/plugins/skein.sock";

/// Name of the socket among those that a service manager hands over (`FileDescriptorName=`, sd_listen_fds(3)).
pub const LISTEN_FD_NAME: &str = "skein-plugin";

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Another live process serves it.
    #[error("plugin socket taken: {path} is served by {holder}")]
    Taken {
        /// The socket.
        path: PathBuf,
        /// `process 123 (name)`, as far as known.
        holder: String,
    },
    /// Something that is not a socket is in its place; it is left alone.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("failed to bind plugin socket {path}")]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// What was handed over is not a listening unix socket.
    #[error("failed to take over file descriptor {index} as the plugin socket")]
    HandedOver {
        /// Position among those handed over, from 0.
        index: usize,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The socket that a service manager handed over, if it did. `names` is `LISTEN_FDNAMES`: with it the socket called
/// [`LISTEN_FD_NAME`] is taken; without names, a single one is ours.
///
/// # Errors
/// It is there but not usable.
pub fn handed_over(fds: &mut ListenFd, names: Option<&str>) -> Result<Option<UnixListener>, SocketError> {
    let Some(index) = position(fds.len(), names) else {
        return Ok(None);
    };
    fds.take_unix_listener(index).map_err(|source| SocketError::HandedOver { index, source })
}

fn position(count: usize, names: Option<&str>) -> Option<usize> {
    let index = match names.filter(|n| !n.is_empty()) {
        Some(names) => names.split(':').position(|n| n == LISTEN_FD_NAME)?,
        None if count == 1 => 0,
        None => return None,
    };
    (index < count).then_some(index)
}

/// Binds the socket at a path, in place of one that nobody serves any more. Only root may connect.
///
/// # Errors
/// See [`SocketError`]; nothing was changed then.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    use std::os::unix::fs::FileTypeExt;
    let failed = |source| SocketError::Bind { path: path.to_path_buf(), source };
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_path_buf()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(stream) => {
                return Err(SocketError::Taken { path: path.to_path_buf(), holder: holder(&stream) });
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed)?,
            Err(e) => return Err(failed(e)),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir).map_err(failed)?;
            }
        }
        Err(e) => return Err(failed(e)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// SO_PEERCRED of a client's end names the process that called listen(2).
fn holder(stream: &UnixStream) -> String {
    match getsockopt(stream, PeerCredentials) {
        Ok(peer) => {
            let name = fs::read_to_string(format!("/proc/{}/comm", peer.pid())).unwrap_or_default();
            format!("process {} ({})", peer.pid(), name.trim_end())
        }
        Err(_) => "another process".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plugins/skein.sock");
        let first = bind(&path).unwrap();
        let error = bind(&path).unwrap_err().to_string();
        assert!(error.starts_with("plugin socket taken"), "{error}");
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        bind(&path).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(matches!(bind(&file), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    }

    #[test]
    fn which_descriptor_is_ours() {
        let check = |count, names, want| assert_eq!(position(count, names), want, "{count} {names:?}");
        check(0, None, None);
        check(1, None, Some(0));
        check(2, None, None);
        check(1, Some(""), Some(0));
        check(2, Some("api:skein-plugin"), Some(1));
        check(2, Some("api:other"), None);
        check(1, Some("api:skein-plugin"), None);
    }
}
