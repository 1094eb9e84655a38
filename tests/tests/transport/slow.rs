//! Those who do not keep up: a host whose kernel hangs, and one that reads nothing.

use std::{rc::Rc, time::Duration};

use skein_api::{AGENT_PROTOCOL, grpc};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    agent::{self, AgentHost},
    world::{CONVERGES_WITHIN, World, scenario},
};

/// Changes for the slow host, 16 KiB each: more than HTTP/2 takes in unread (2 MiB), the master's queue for a session (64)
/// and the agent's for its kernel (8).
const CHANGES: usize = 260;

/// Changes the slow host, and then another one, which is not to notice.
fn change_both(world: &mut World) {
    for _ in 0..CHANGES {
        world.create_large(1);
    }
    let other = world.create(2);
    world.until("the other host has its task", Duration::from_secs(1), |w| w.agent(2).word(&other).is_some());
}

/// A kernel that hangs keeps its own host from following, and nobody else. The host stays ready: its containers run, and
/// its agent says so. What was changed meanwhile comes in fewer messages than there were changes.
#[test]
fn a_kernel_that_hangs_delays_nobody_else() {
    scenario(3, |world| {
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        let follows = world.agent(1).seen.follows();
        world.agent(1).seen.set_stuck(true);
        change_both(world);
        // Its containers run and have something to say, to which it does not read the answers.
        for round in 1..=10 {
            assert!(world.agent(1).chatter(&format!("round {round}")) > 0);
            world.pass_while("every node is ready", Duration::from_secs(6), |w| w.are_ready(1..=3));
        }
        assert_eq!(world.agent(1).seen.follows(), follows + 1, "the kernel still hangs in the first one");
        world.agent(1).seen.set_stuck(false);
        world.converges(CONVERGES_WITHIN);
        let told = world.agent(1).seen.follows() - follows;
        assert!(told < CHANGES, "{told} messages for {CHANGES} changes");
        assert_eq!(world.said(&["session ended"]), 0);
    });
}

/// An agent that sends heartbeats and reads nothing.
async fn deaf(host: Rc<AgentHost>) -> turmoil::Result {
    let mut client = agent::connect(&host).await?;
    let (tx, rx) = mpsc::channel(1);
    tx.send(agent::hello(&host, AGENT_PROTOCOL)).await?;
    let _unread = client.session(ReceiverStream::new(rx)).await?;
    for seq in 1.. {
        let body = grpc::agent_message::Body::Heartbeat(grpc::Heartbeat { seq });
        tx.send(grpc::AgentMessage { body: Some(body) }).await?;
        tokio::time::sleep(Duration::from_secs(4)).await;
    }
    Ok(())
}

/// An agent that reads nothing fills its own queue only; when a good one takes its place, that one gets everything.
#[test]
fn an_agent_that_reads_nothing_harms_nobody() {
    scenario(3, |world| {
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        world.kill_agent(1);
        world.agent(1).instead.replace(Some(Rc::new(|host| Box::pin(deaf(host)))));
        world.start_agent(1);
        world.until("it has a session", CONVERGES_WITHIN, |w| w.said(&["session opened"]) == 4);
        change_both(world);
        world.pass_while("every node is ready", Duration::from_secs(20), |w| w.are_ready(1..=3));
        world.kill_agent(1);
        world.agent(1).instead.replace(None);
        world.start_agent(1);
        world.converges(CONVERGES_WITHIN);
    });
}
