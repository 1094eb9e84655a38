//! All agents: starting them, telling them what is wanted, counting.
//!
//! Tasks: one per agent, in a `JoinSet` that ends with the fleet. At most [`JOINS_MAX`] of them join at a time.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde::Serialize;
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};

use crate::agent::{Agent, Shared, Wish, name};

/// Agents that join at a time: the master keeps 64 places for hosts without a certificate.
pub const JOINS_MAX: usize = 48;

/// Different reasons that are remembered of failures.
const REASONS_MAX: usize = 16;

/// A number that many agents change.
#[derive(Debug, Default)]
pub struct Counter(AtomicUsize);

impl Counter {
    /// More.
    pub fn add(&self, n: usize) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Less.
    pub fn sub(&self, n: usize) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    /// How many.
    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the agents counted.
#[derive(Debug, Default)]
pub struct Counters {
    /// Agents that have joined.
    pub joined: Counter,
    /// Attempts to join that failed and were tried again.
    pub retries: Counter,
    /// Sessions that stand.
    pub sessions: Counter,
    /// Tasks that run and whose master has confirmed it.
    pub running: Counter,
    /// Reports sent.
    pub reports: Counter,
    failures: Mutex<BTreeMap<String, usize>>,
}

impl Counters {
    /// A session or a join failed.
    pub fn broken(&self, error: &anyhow::Error) {
        let mut failures = self.failures.lock().expect("nobody panics while holding this lock");
        let reason = format!("{error:#}");
        if failures.len() < REASONS_MAX || failures.contains_key(&reason) {
            *failures.entry(reason).or_default() += 1;
        }
    }
}

/// The counters at one moment, as the program prints them.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Agents that have joined.
    pub joined: usize,
    /// Attempts to join that were tried again.
    pub retries: usize,
    /// Sessions that stand.
    pub sessions: usize,
    /// Tasks that run and whose master has confirmed it.
    pub running: usize,
    /// Reports sent.
    pub reports: usize,
    /// Why sessions and joins failed, and how often.
    pub failures: BTreeMap<String, usize>,
}

/// Many agents.
pub struct Fleet {
    shared: Arc<Shared>,
    joining: Arc<Semaphore>,
    wishes: Vec<watch::Sender<Wish>>,
    agents: JoinSet<()>,
    /// Who is restarted next.
    turn: usize,
}

impl Fleet {
    /// A fleet without agents.
    pub fn new(shared: Shared) -> Self {
        let joining = Arc::new(Semaphore::new(JOINS_MAX));
        Self { shared: Arc::new(shared), joining, wishes: Vec::new(), agents: JoinSet::new(), turn: 0 }
    }

    /// Starts further agents. Does not wait for them.
    pub fn join(&mut self, count: u32) {
        for _ in 0..count {
            let number = u32::try_from(self.wishes.len()).expect("far fewer agents than numbers") + 1;
            let (wish_tx, wish) = watch::channel(Wish::default());
            self.wishes.push(wish_tx);
            let (shared, joining) = (self.shared.clone(), self.joining.clone());
            self.agents.spawn(async move {
                let agent = Agent::new(shared.clone(), number, wish);
                let place = joining.acquire_owned().await.expect("the semaphore is never closed");
                let joined = agent.join().await;
                drop(place);
                match joined {
                    Ok(tls) => {
                        shared.counters.joined.add(1);
                        agent.run(tls).await;
                    }
                    Err(error) => shared.counters.broken(&error.context(format!("{} cannot join", name(number)))),
                }
            });
        }
    }

    /// Makes the agent with this number (from 1) fall silent, or speak again.
    ///
    /// # Errors
    /// There is none.
    pub fn silence(&self, number: usize, silent: bool) -> anyhow::Result<()> {
        let wish = number.checked_sub(1).and_then(|at| self.wishes.get(at));
        let wish = wish.ok_or_else(|| anyhow::anyhow!("there is no agent {number}"))?;
        wish.send_modify(|w| w.silent = silent);
        Ok(())
    }

    /// Restarts the processes of so many agents, each time the next ones.
    pub fn restart(&mut self, count: usize) {
        for _ in 0..count.min(self.wishes.len()) {
            self.turn = (self.turn + 1) % self.wishes.len();
            self.wishes[self.turn].send_modify(|w| w.restarts += 1);
        }
    }

    /// What was counted until now.
    pub fn status(&self) -> Status {
        let c = &self.shared.counters;
        Status {
            joined: c.joined.get(),
            retries: c.retries.get(),
            sessions: c.sessions.get(),
            running: c.running.get(),
            reports: c.reports.get(),
            failures: c.failures.lock().expect("nobody panics while holding this lock").clone(),
        }
    }
}
