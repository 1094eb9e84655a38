//! Requests that no engine sends, and requests in an order in which none does.

use skein_fuzz::{Form, Verdict};

use super::tests::World;
use crate::plugin::wire::Request;

/// Lines of method and body. Whatever they are, a refusal changes nothing and the disk has what the memory has: both are
/// checked after each request, as for the scripts of the tests.
#[test]
fn plugin_requests() {
    // Memory and disk of each endpoint and address, twice: as they are, and as they are read back.
    skein_fuzz::target!("plugin_requests").inputs(1_200).memory(256, 512 << 10).run_mutants(Form::Script, |input| {
        let mut world = World::new();
        let mut done = 0;
        for line in input.split(|b| *b == b'\n') {
            let at = line.iter().position(|b| *b == b' ').unwrap_or(line.len());
            let method = String::from_utf8_lossy(&line[..at]);
            let Ok(request) = Request::parse(&method, &line[at..]) else { continue };
            if let Ok(outcome) = world.ask(request) {
                let json = serde_json::to_string(&outcome.reply).expect("a reply is JSON");
                assert!(json.starts_with('{'), "{json}");
                done += 1;
            }
        }
        Verdict::from(done > 1)
    });
}
