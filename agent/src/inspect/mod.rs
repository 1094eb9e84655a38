//! Answers questions about this host's network side (`skein net`), by looking at the kernel beside what is wanted.
//!
//! Owns: what may be asked ([`NetQuestion`], nothing else), how much at a time and how long. Must not know: who asks. It
//! changes nothing that lasts. Each answer is made in its asker's task, from a picture of the overlay's actor; what
//! blocks runs on the blocking pool. No channels.
//!
//! * `status`: how the networks of this host are.
//! * `exposed`: what an outsider can reach on this host.
//! * `path`: the way from one container to another; `probe` tries it, `sockets` shows who listens.

mod exposed;
mod path;
mod probe;
mod sockets;
mod status;

use std::time::Duration;

use serde::Serialize;
use skein_api::{NET_ANSWER_BYTES_MAX, NetQuestion};
use tokio::{sync::Semaphore, time::timeout};

use crate::overlay::OverlayHandle;

/// Questions that are answered at a time: each may run `nft` in every network. The others wait.
const QUESTIONS_MAX: usize = 2;

/// How long an answer may take, with the wait for its turn. The master waits somewhat longer.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(15);

static TURNS: Semaphore = Semaphore::const_new(QUESTIONS_MAX);

/// Answers a question with JSON.
///
/// # Errors
/// Words for the user: it took too long, or the overlay has ended. What cannot be looked at is part of the answer.
pub async fn answer(overlay: &OverlayHandle, question: &NetQuestion) -> Result<Vec<u8>, String> {
    let late = |_| format!("this host found no answer within {} s: it is very busy", ANSWER_WITHIN.as_secs());
    timeout(ANSWER_WITHIN, answer_now(overlay, question)).await.map_err(late)?
}

async fn answer_now(overlay: &OverlayHandle, question: &NetQuestion) -> Result<Vec<u8>, String> {
    let _turn = TURNS.acquire().await.map_err(|e| e.to_string())?;
    match question {
        NetQuestion::Status => json(&status::status(overlay).await?),
        NetQuestion::Exposed => json(&exposed::exposed(overlay).await?),
        NetQuestion::PathFrom(question) => json(&path::from(overlay, question).await?),
        NetQuestion::PathTo(question) => json(&path::to(overlay, question).await?),
        NetQuestion::Reach { task, to, port, proto } => {
            json(&path::reach(overlay, task.as_ref(), *to, *port, *proto).await?)
        }
    }
}

fn json(answer: &impl Serialize) -> Result<Vec<u8>, String> {
    let json = serde_json::to_vec(answer).map_err(|e| e.to_string())?;
    match json.len() {
        0..=NET_ANSWER_BYTES_MAX => Ok(json),
        bytes => Err(format!("the answer has {bytes} bytes, {NET_ANSWER_BYTES_MAX} can be told")),
    }
}
