//! `skein exec`: a process in a task's container, with the user's terminal if wanted.
//!
//! Tasks and channels: a thread reads standard input (it blocks and cannot be cancelled, so it is not a runtime task,
//! which would hold up the exit) into a channel of [`INPUT_WAITING_MAX`] pieces; when it is full, reading waits. The main
//! task alone writes to the stream.

use std::{
    io::{self, IsTerminal, Read},
    os::fd::AsFd,
};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use skein_api::{ExecOptions, client::ExecWriter, frame::Frame};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use super::App;
use crate::{
    args::ExecArgs,
    fail::{Failure, code},
    out::{stderr, stdout},
};

/// Pieces of standard input that wait for the network.
const INPUT_WAITING_MAX: usize = 16;

/// Bytes of one piece.
const INPUT_BYTES: usize = 16 << 10;

/// The user's terminal in raw mode; as it was when dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn new() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that went away.
        let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &self.before);
    }
}

/// `skein exec`: gives back the process's exit code.
pub(super) async fn exec(app: &App, args: ExecArgs) -> Result<u8, Failure> {
    if args.tty && args.interactive && !io::stdin().is_terminal() {
        let hint = "leave out -t when standard input is no terminal";
        return Err(Failure::new(code::USAGE, "standard input is not a terminal", Some(hint)));
    }
    let options = ExecOptions {
        argv: args.command,
        tty: args.tty,
        stdin: args.interactive,
        env: args.env,
        user: args.user,
        working_dir: args.workdir,
    };
    let client = app.client("skein exec")?;
    let (mut reader, mut writer) = client.exec(&args.task, &options).await?;
    let _raw = if args.tty && args.interactive {
        Some(RawTerminal::new().map_err(|e| Failure::io("failed to set up the terminal", &e))?)
    } else {
        None
    };
    let mut input = args.interactive.then(read_input);
    let mut resized = if args.tty { signal(SignalKind::window_change()).ok() } else { None };
    if args.tty {
        send_size(&mut writer).await?;
    }
    loop {
        // The readers are cancel safe, and sending happens in the arms, which are not cancelled.
        tokio::select! {
            frame = reader.next() => match frame? {
                Some(Frame::Stdout(data)) => stdout(&data)?,
                Some(Frame::Stderr(data)) => stderr(&data),
                Some(Frame::Exit(code)) => return Ok(u8::try_from(code).unwrap_or(code::FAILED)),
                Some(Frame::Failure(why)) => {
                    return Err(Failure::new(code::FAILED, format!("failed to run in {}: {why}", args.task), None));
                }
                Some(_) => {}
                None => {
                    let message = format!("the stream from {} ended before the process did", args.task);
                    return Err(Failure::new(code::FAILED, message, Some(&format!("skein explain {}", args.task))));
                }
            },
            data = next_input(&mut input), if input.is_some() => match data {
                // The process may have ended already: its exit code, which comes by the reader, says more.
                Some(data) => drop(writer.send(&Frame::Stdin(data)).await),
                None => {
                    input = None;
                    drop(writer.send(&Frame::StdinEnd).await);
                }
            },
            () = next_resize(&mut resized), if resized.is_some() => send_size(&mut writer).await?,
        }
    }
}

async fn next_input(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}

async fn next_resize(resized: &mut Option<Signal>) {
    match resized {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (tx, rx) = mpsc::channel(INPUT_WAITING_MAX);
    std::thread::spawn(move || {
        let mut buffer = vec![0; INPUT_BYTES];
        loop {
            match io::stdin().read(&mut buffer) {
                Ok(0) => break,
                Ok(n) if tx.blocking_send(buffer[..n].to_vec()).is_err() => break,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    });
    rx
}

async fn send_size(writer: &mut ExecWriter) -> Result<(), Failure> {
    // No size, no frame: standard output is not the terminal then.
    let Ok(size) = tcgetwinsize(io::stdout().as_fd()) else { return Ok(()) };
    Ok(writer.send(&Frame::Resize { rows: size.ws_row, columns: size.ws_col }).await?)
}
