//! How a command ends: exit codes and the one shape of an error for users.

use std::io;

use skein_api::client::ClientError;

use crate::compose::problem::ComposeError;

/// Exit codes (docs/cli.md). 2 is clap's, for wrong usage.
pub(crate) mod code {
    pub(crate) const FAILED: u8 = 1;
    pub(crate) const USAGE: u8 = 2;
    pub(crate) const NOT_FOUND: u8 = 3;
    pub(crate) const CONFLICT: u8 = 4;
    pub(crate) const NO_NODE_FITS: u8 = 5;
    pub(crate) const UNREACHABLE: u8 = 6;
    pub(crate) const BAD_CONFIG: u8 = 64;
}

/// Why a command failed, as the user sees it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Exit code.
    pub(crate) code: u8,
    /// What is printed, whole lines; may be empty.
    pub(crate) text: String,
}

impl Failure {
    /// `error: <message>`, and a hint.
    pub(crate) fn new(code: u8, message: impl AsRef<str>, hint: Option<&str>) -> Self {
        let hint = hint.map(|h| format!("hint: {h}\n")).unwrap_or_default();
        Self { code, text: format!("error: {}\n{hint}", message.as_ref().trim_end()) }
    }

    /// Something failed on this machine.
    pub(crate) fn io(what: impl AsRef<str>, error: &io::Error) -> Self {
        Self::new(code::FAILED, format!("{}: {error}", what.as_ref()), None)
    }
}

/// An error with its sources on one line. The one place that prints sources.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        // Some libraries repeat their source in their own text.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = source.source();
    }
    text
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let code = match (error.status(), error.code()) {
            (_, Some("no_node_fits")) => code::NO_NODE_FITS,
            (Some(404), _) => code::NOT_FOUND,
            (Some(409), _) => code::CONFLICT,
            _ if error.is_unreachable() => code::UNREACHABLE,
            _ if matches!(error, ClientError::Tls(_)) => code::BAD_CONFIG,
            _ => code::FAILED,
        };
        Self::new(code, chain(&error), error.hint().as_deref())
    }
}

impl From<ComposeError> for Failure {
    fn from(error: ComposeError) -> Self {
        Self { code: code::BAD_CONFIG, text: error.to_string() }
    }
}

/// A reader that is gone (`skein ps | head -1`) is a quiet success; all else about standard output is a failure.
pub(crate) fn stdout_failed(error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return Failure { code: 0, text: String::new() };
    }
    Failure::io("failed to write to standard output", error)
}

#[cfg(test)]
mod tests {
    use skein_api::ApiError;

    use super::*;

    #[test]
    fn codes_follow_from_answers() {
        let check = |status, code: &str, expected: u8| {
            let error = ClientError::Api { status, error: ApiError::new(code, "no").with_hint("do this") };
            assert_eq!(Failure::from(error), Failure { code: expected, text: "error: no\nhint: do this\n".into() });
        };
        check(404, "not_found", 3);
        check(409, "name_taken", 4);
        check(422, "no_node_fits", 5);
        check(422, "bad_constraint", 1);
        check(503, "read_only", 1);
        let source = io::Error::from(io::ErrorKind::NotFound);
        let error = ClientError::Connect { endpoint: "unix:///x".into(), source };
        assert_eq!(
            Failure::from(error),
            Failure {
                code: 6,
                text:
                    "error: failed to reach the master at unix:///x: entity not found\nhint: is skein-master running? \
                       `skein context ls` shows which master is meant\n"
                        .into()
            }
        );
    }

    #[test]
    fn a_closed_pipe_is_quiet() {
        assert_eq!(stdout_failed(&io::ErrorKind::BrokenPipe.into()), Failure { code: 0, text: String::new() });
        assert_eq!(stdout_failed(&io::ErrorKind::StorageFull.into()).code, 1);
    }
}
