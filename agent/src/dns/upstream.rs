//! Questions for other people's names: asked at the host's resolvers.
//!
//! Owns: the list of resolvers (`/etc/resolv.conf`, read again when it changes, or a fixed list) and one forwarded
//! question at a time, over UDP and over TCP when the answer was truncated. Must not know: the zone and who asked.
//! No tasks of its own, no channels: it runs in the server's tasks, which bound how many questions are under way.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Mutex,
    time::{Duration, Instant, SystemTime},
};

use rand::Rng;
use thiserror::Error;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::message::{self, Question};

/// How long one resolver may take for one question.
pub const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(2);

/// Resolvers that are asked, in order (resolv.conf(5): MAXNS). The worst case is 3 × 2 s, just over the 5 s after which
/// clients ask again.
pub const UPSTREAMS_MAX: usize = 3;

/// How often the file's time stamp is looked at.
const REREAD_AFTER: Duration = Duration::from_secs(1);

/// Largest answer over UDP that is read, bytes: what any EDNS client may announce.
const UDP_BUFFER_BYTES: usize = 4096;

/// Largest resolver file that is read, bytes. A real one has a few hundred.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Why no resolver answered.
#[derive(Debug, Error)]
pub enum UpstreamError {
    /// The host names no resolver.
    #[error("no resolver is configured on this host")]
    NoResolver,
    /// Each was asked; this is the last one's failure.
    #[error("failed to ask resolver {resolver}")]
    Failed {
        /// The last one that was asked.
        resolver: SocketAddr,
        /// What happened.
        #[source]
        source: io::Error,
    },
}

/// Where the resolvers come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpstreamSource {
    /// A file in the form of resolv.conf(5), `/etc/resolv.conf` unless tested.
    File(PathBuf),
    /// These, from the agent's configuration.
    Fixed(Vec<SocketAddr>),
}

#[derive(Debug, Default)]
struct Cache {
    looked: Option<Instant>,
    stamp: Option<(SystemTime, u64)>,
    resolvers: Vec<SocketAddr>,
}

/// The host's resolvers.
#[derive(Debug)]
pub struct Upstreams {
    source: UpstreamSource,
    cache: Mutex<Cache>,
}

impl Upstreams {
    /// Resolvers from this source; nothing is read yet.
    pub fn new(source: UpstreamSource) -> Self {
        Self { source, cache: Mutex::default() }
    }

    /// The resolvers to ask now, at most [`UPSTREAMS_MAX`]. A file that cannot be read leaves the last good list.
    pub fn current(&self) -> Vec<SocketAddr> {
        let path = match &self.source {
            UpstreamSource::Fixed(list) => {
                return list.iter().take(UPSTREAMS_MAX).copied().collect();
            }
            UpstreamSource::File(path) => path,
        };
        let mut cache = self.cache.lock().unwrap_or_else(|e| e.into_inner());
        let now = Instant::now();
        if cache.looked.is_some_and(|at| now.duration_since(at) < REREAD_AFTER) {
            return cache.resolvers.clone();
        }
        cache.looked = Some(now);
        // Small and almost always in the page cache: not worth a blocking thread.
        let Ok(meta) = std::fs::metadata(path) else {
            return cache.resolvers.clone();
        };
        let stamp = (meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len());
        if cache.stamp != Some(stamp)
            && meta.len() <= FILE_BYTES_MAX
            && let Ok(text) = std::fs::read_to_string(path)
        {
            cache.resolvers = parse_resolv_conf(&text);
            cache.stamp = Some(stamp);
            tracing::debug!(resolvers = ?cache.resolvers, "read the host's resolvers");
        }
        cache.resolvers.clone()
    }

    /// Asks the resolvers in turn; gives the answer ready to be sent to the client.
    ///
    /// # Errors
    /// No resolver, or none that answered in time.
    pub async fn ask(&self, question: &Question, packet: &[u8]) -> Result<Vec<u8>, UpstreamError> {
        let mut failure = UpstreamError::NoResolver;
        for resolver in self.current() {
            match timeout(UPSTREAM_TIMEOUT, ask_one(resolver, question, packet)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(source)) => failure = UpstreamError::Failed { resolver, source },
                Err(_) => failure = UpstreamError::Failed { resolver, source: io::ErrorKind::TimedOut.into() },
            }
        }
        Err(failure)
    }
}

/// The name servers of a resolv.conf(5) file, in its order, without duplicates. Zones of IPv6 addresses are left out
/// with their line: they name an interface that means nothing elsewhere.
pub fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(Ok(address)) = words.next().map(str::parse::<IpAddr>) else {
            continue;
        };
        let address = SocketAddr::new(address, 53);
        if !found.contains(&address) && found.len() < UPSTREAMS_MAX {
            found.push(address);
        }
    }
    found
}

/// An id and a source port that an off-path attacker must guess (RFC 5452): random id, and a fresh socket for each
/// question, whose port the kernel chooses at random.
async fn ask_one(resolver: SocketAddr, question: &Question, packet: &[u8]) -> io::Result<Vec<u8>> {
    let id: u16 = rand::rng().random();
    let mut packet = packet.to_vec();
    packet[..2].copy_from_slice(&id.to_be_bytes());
    let local: SocketAddr = match resolver {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(local).await?;
    socket.connect(resolver).await?;
    socket.send(&packet).await?;
    let mut buffer = vec![0; UDP_BUFFER_BYTES];
    loop {
        let n = socket.recv(&mut buffer).await?;
        let answer = &buffer[..n];
        if message::is_truncated(answer) && answer.get(..2) == Some(&id.to_be_bytes()[..]) {
            let whole = ask_tcp(resolver, &packet).await?;
            return message::relay(question, id, whole).ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
        // Anything else is somebody's forgery or a late answer: wait on, the caller's time limit ends it.
        if let Some(answer) = message::relay(question, id, answer.to_vec()) {
            return Ok(answer);
        }
    }
}

async fn ask_tcp(resolver: SocketAddr, packet: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(resolver).await?;
    write_framed(&mut stream, packet).await?;
    let mut length = [0; 2];
    stream.read_exact(&mut length).await?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

/// Writes a message with its length before it (RFC 1035, 4.2.2), in one write so that it leaves in one segment.
pub(super) async fn write_framed(stream: &mut TcpStream, packet: &[u8]) -> io::Result<()> {
    let length = u16::try_from(packet.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut framed = Vec::with_capacity(packet.len() + 2);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(packet);
    stream.write_all(&framed).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf() {
        let check = |text: &str, want: &[&str]| {
            let want: Vec<SocketAddr> = want.iter().map(|s| s.parse().unwrap()).collect();
            assert_eq!(parse_resolv_conf(text), want, "{text:?}");
        };
        check("", &[]);
        check("nameserver 192.0.2.1\n", &["192.0.2.1:53"]);
        check(
            "# c\nsearch a b\n nameserver\t2001:db8::1 # x\nnameserver 192.0.2.1",
            &["[2001:db8::1]:53", "192.0.2.1:53"],
        );
        check("nameserver 192.0.2.1\nnameserver 192.0.2.1\n;nameserver 192.0.2.2", &["192.0.2.1:53"]);
        check("nameserver fe80::1%eth0\nnameserver nonsense\nnameserver", &[]);
        check(
            "nameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4",
            &["1.1.1.1:53", "1.1.1.2:53", "1.1.1.3:53"],
        );
    }

    #[test]
    fn the_file_is_read_again_and_a_lost_one_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        let upstreams = Upstreams::new(UpstreamSource::File(path.clone()));
        assert_eq!(upstreams.current(), ["192.0.2.1:53".parse().unwrap()]);
        std::fs::write(&path, "nameserver 192.0.2.1\nnameserver 192.0.2.2\n").unwrap();
        upstreams.cache.lock().unwrap().looked = None;
        assert_eq!(upstreams.current().len(), 2);
        std::fs::remove_file(&path).unwrap();
        upstreams.cache.lock().unwrap().looked = None;
        assert_eq!(upstreams.current().len(), 2);
    }
}
