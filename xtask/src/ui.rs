//! Lines for the person or the log that watches an xtask command.
//!
//! Everything goes to standard error, as cargo's and nextest's own messages do, so that the order is kept; standard
//! output stays free for results.
#![allow(clippy::print_stderr, reason = "this module is the output of a command line program")]

/// A heading above a step.
pub fn heading(text: &str) {
    eprintln!("\n==> {text}");
}

/// One line.
pub fn note(text: &str) {
    eprintln!("{text}");
}

/// A question, without a line end.
pub fn ask(text: &str) {
    eprint!("{text}");
}

/// An error with its causes, and the hint lines of its message left as they are.
pub fn error(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}
