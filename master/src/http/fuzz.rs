//! Requests to the native API: every route, with any body.

use skein_fuzz::{Form, Verdict};

use crate::fuzz::World;

/// Answers that say that the master is at fault.
const INTERNAL: std::ops::RangeInclusive<u16> = 500..=502;

/// One line: method, path, body. Whatever it is, a refusal changes nothing, and the invariants hold.
fn one(world: &World, line: &[u8]) -> Option<u16> {
    let text = String::from_utf8_lossy(line);
    let mut words = text.splitn(3, ' ');
    let (method, path, body) = (words.next()?, words.next()?, words.next().unwrap_or_default());
    let before = world.handle.position();
    let (status, answer) = world.request(method, path, body.as_bytes().to_vec())?;
    assert!(!INTERNAL.contains(&status), "{status} {}", String::from_utf8_lossy(&answer));
    if status >= 400 {
        assert_eq!(world.handle.position(), before, "refused with {status}");
        if !answer.is_empty() && status != 405 {
            assert!(!String::from_utf8_lossy(&answer).trim().is_empty(), "a refusal has a reason");
        }
    }
    Some(status)
}

#[test]
fn api_requests() {
    // Every object is held by the model, the index, the transaction, the answer, and once as JSON text; a request of 200
    // bytes may ask for the largest service, whose tasks are the constant.
    let target = skein_fuzz::target!("api_requests").inputs(100).memory(4 << 10, 1 << 30);
    target.run_mutants(Form::Script, |input| {
        let world = World::new();
        let mut done = 0;
        for line in input.split(|b| *b == b'\n') {
            if one(&world, line).is_some_and(|status| status < 300) {
                done += 1;
            }
            world.check();
        }
        let (status, answer) = world.request("GET", "/v1/check", Vec::new()).expect("a request");
        assert_eq!((status, &answer[..]), (200, &b"[]"[..]));
        Verdict::from(done > 0)
    });
}
