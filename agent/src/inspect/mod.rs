//! Answers questions about this host's network side (`skein net`), by looking at the kernel beside what is wanted.
//!
//! Owns: what may be asked ([`NetQuestion`], nothing else), how much at a time and how long. Must not know: who asks. It
//! changes nothing that lasts. Each answer is made in its asker's task, from a picture of the overlay's actor; what
//! blocks runs on the blocking pool. No channels.
//!
//! * `status`: how the networks of this host are.
//! * `check`: probes to other hosts; `respond`: where theirs are echoed.
//! * `exposed`: what an outsider can reach on this host.
//! * `path`: the way from one container to another; `probe` tries it, `sockets` shows who listens.

mod check;
mod exposed;
mod path;
mod probe;
mod respond;
mod sockets;
mod status;

use std::{any::Any, time::Duration};

use serde::Serialize;
use skein_api::{NET_ANSWER_BYTES_MAX, NetQuestion};
use tokio::{sync::Semaphore, time::timeout};

use crate::overlay::OverlayHandle;

/// Questions that are answered at a time: each may run `nft` in every network. The others wait.
const QUESTIONS_MAX: usize = 2;

/// How long an answer may take, with the wait for its turn. The master waits somewhat longer.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(15);

static TURNS: Semaphore = Semaphore::const_new(QUESTIONS_MAX);

/// An answer.
pub struct Reply {
    /// JSON.
    pub json: Vec<u8>,
    /// What lives as long as the asker's stream.
    pub held: Option<Box<dyn Any + Send>>,
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reply({} bytes, held: {})", self.json.len(), self.held.is_some())
    }
}

/// Answers a question with JSON.
///
/// # Errors
/// Words for the user: it took too long, or the overlay has ended. What cannot be looked at is part of the answer.
pub async fn answer(overlay: &OverlayHandle, question: NetQuestion) -> Result<Reply, String> {
    let late = |_| format!("this host found no answer within {} s: it is very busy", ANSWER_WITHIN.as_secs());
    timeout(ANSWER_WITHIN, answer_now(overlay, question)).await.map_err(late)?
}

async fn answer_now(overlay: &OverlayHandle, question: NetQuestion) -> Result<Reply, String> {
    let _turn = TURNS.acquire().await.map_err(|e| e.to_string())?;
    let json = match question {
        NetQuestion::Status => json(&status::status(overlay).await?),
        NetQuestion::Exposed => json(&exposed::exposed(overlay).await?),
        NetQuestion::PathFrom(question) => json(&path::from(overlay, &question).await?),
        NetQuestion::PathTo(question) => json(&path::to(overlay, &question).await?),
        NetQuestion::Reach { task, to, port, proto } => {
            json(&path::reach(overlay, task.as_ref(), to, port, proto).await?)
        }
        NetQuestion::Check { targets } => json(&check::check(overlay, targets).await?),
        NetQuestion::Respond { networks } => {
            let (places, opened) = respond::Places::open(overlay, &networks).await?;
            return Ok(Reply { json: json(&opened)?, held: Some(Box::new(places)) });
        }
    };
    Ok(Reply { json: json?, held: None })
}

fn json(answer: &impl Serialize) -> Result<Vec<u8>, String> {
    let json = serde_json::to_vec(answer).map_err(|e| e.to_string())?;
    match json.len() {
        0..=NET_ANSWER_BYTES_MAX => Ok(json),
        bytes => Err(format!("the answer has {bytes} bytes, {NET_ANSWER_BYTES_MAX} can be told")),
    }
}
