//! What the engine refused, in words that can be acted on.

use std::path::PathBuf;

use bollard::errors::Error as Bollard;
use thiserror::Error;

/// Why a call to the engine failed.
#[derive(Debug, Error)]
pub enum EngineError {
    /// Nobody answers on the socket, or the connection broke. Recovers by itself.
    #[error("failed to reach the engine at {socket}: {reason}")]
    Unreachable {
        /// Its socket.
        socket: PathBuf,
        /// What the connection said.
        reason: String,
    },
    /// The engine took too long; it may or may not have done it.
    #[error("failed to {verb} {thing}: the engine did not answer in time")]
    TimedOut {
        /// What was asked.
        verb: &'static str,
        /// Of what.
        thing: String,
    },
    /// There is no such thing (HTTP 404).
    #[error("failed to {verb} {thing}: {message}")]
    NotFound {
        /// What was asked.
        verb: &'static str,
        /// Of what.
        thing: String,
        /// The engine's words.
        message: String,
    },
    /// It is there already, or is in use (HTTP 409).
    #[error("failed to {verb} {thing}: {message}")]
    Conflict {
        /// What was asked.
        verb: &'static str,
        /// Of what.
        thing: String,
        /// The engine's words.
        message: String,
    },
    /// The engine refused, or failed at it.
    #[error("failed to {verb} {thing}: {message}")]
    Refused {
        /// What was asked.
        verb: &'static str,
        /// Of what.
        thing: String,
        /// HTTP status; 0 when it failed within a stream.
        status: u16,
        /// The engine's words.
        message: String,
    },
    /// The image is not on the host and could not be pulled.
    #[error("failed to get image {image}: it is not on this host, and pulling it failed: {message}")]
    Image {
        /// The reference.
        image: String,
        /// The engine's words.
        message: String,
        /// The registry says that there is no such image: trying again cannot help.
        missing: bool,
    },
}

impl EngineError {
    /// Sorts a client's error.
    pub(super) fn from_bollard(error: Bollard, socket: &std::path::Path, verb: &'static str, thing: &str) -> Self {
        let thing = thing.to_owned();
        match error {
            Bollard::DockerResponseServerError { status_code: 404, message } => Self::NotFound { verb, thing, message },
            Bollard::DockerResponseServerError { status_code: 409, message } => Self::Conflict { verb, thing, message },
            Bollard::DockerResponseServerError { status_code, message } => {
                Self::Refused { verb, thing, status: status_code, message }
            }
            Bollard::DockerStreamError { error } => Self::Refused { verb, thing, status: 0, message: error },
            // It does answer, with something that nobody here understands: one such container must not count as an
            // engine that is gone.
            Bollard::JsonDataError { .. } | Bollard::JsonSerdeError { .. } => {
                Self::Refused { verb, thing, status: 0, message: chain(&error) }
            }
            Bollard::RequestTimeoutError => Self::TimedOut { verb, thing },
            other => Self::Unreachable { socket: socket.to_owned(), reason: chain(&other) },
        }
    }

    /// The engine does not answer at all.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }

    /// There is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Trying the same again cannot help. Made for create and start: a bad request, a program that is not in the
    /// image, a port that is taken, an image that does not exist.
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::TimedOut { .. } | Self::Conflict { .. } => false,
            Self::Image { missing, .. } => *missing,
            // A missing network is made by the next plan, and a missing container is seen by it.
            Self::NotFound { message, .. } => !message.contains("network") && !message.contains("No such container"),
            Self::Refused { status: 400, .. } => true,
            Self::Refused { message, .. } => FATAL.iter().any(|word| message.contains(word)),
        }
    }
}

/// What the engine says with status 500 although only a change of the specification helps (seen with docker 20.10:
/// the runtime's errors and the proxy's come that way). A lost plugin or a full disk is not among them.
const FATAL: [&str; 10] = [
    "executable file not found",
    "no such file or directory: unknown",
    "permission denied: unknown",
    "exec format error",
    "unable to find user",
    "unable to find group",
    "port is already allocated",
    "address already in use",
    "invalid mount config",
    "bind source path does not exist",
];

/// An error with its causes, once each: a client's errors print their source themselves at times.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16, message: &str) -> EngineError {
        let error = Bollard::DockerResponseServerError { status_code: status, message: message.into() };
        EngineError::from_bollard(error, std::path::Path::new("/run/docker.sock"), "start", "container web.1")
    }

    #[test]
    fn errors_say_what_failed_and_whether_to_try_again() {
        for (status, message, fatal) in [
            (400, "invalid port", true),
            (500, "OCI runtime create failed: exec: \"nope\": executable file not found in $PATH: unknown", true),
            (
                500,
                "driver failed programming external connectivity: Bind for 0.0.0.0:80 failed: port is already allocated",
                true,
            ),
            (500, "legacy plugin: Post \"http://%2Frun/skein.sock\": no such file", false),
            (404, "network skein_a not found", false),
            (409, "Conflict. The container name is already in use", false),
            (500, "write /var/lib/docker/x: no space left on device", false),
        ] {
            let error = refused(status, message);
            assert_eq!(error.is_fatal(), fatal, "{error}");
            assert_eq!(error.to_string(), format!("failed to start container web.1: {message}"));
        }
    }
}
