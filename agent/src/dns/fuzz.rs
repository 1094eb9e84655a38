//! DNS packets from containers and from resolvers.

use hickory_proto::{
    op::{Message, MessageType, Query, ResponseCode},
    rr::{Name, RecordType},
};
use skein_api::NetworkId;
use skein_fuzz::{Form, Verdict};

use super::{
    message::{Asker, Outcome, Question, UDP_MAX_BYTES, decide, failure, is_truncated, relay},
    zone::tests::sample,
};

/// Questions: whatever comes, the answer has the question's id, is an answer, fits, and can be read.
#[test]
fn dns_questions() {
    let (zone, network) = (sample(), NetworkId::new("net1"));
    let client = "10.1.1.11".parse().expect("an address");
    // A compressed name of 2 bytes becomes 255, and a record 200 more.
    skein_fuzz::target!("dns_questions").inputs(8_000).memory(512, 64 << 10).run_mutants(Form::Bytes, |input| {
        let tcp = input.first().is_some_and(|b| b % 2 == 1);
        let asker = Asker { network: &network, client, tcp };
        match decide(&zone, asker, input, input.len()) {
            Outcome::Reply(bytes) => {
                assert!(tcp || bytes.len() <= usize::from(UDP_MAX_BYTES), "{} bytes", bytes.len());
                assert_eq!(bytes[..2], input[..2], "the question's id");
                let answer = Message::from_vec(&bytes).expect("our answers can be read");
                assert_eq!(answer.metadata.message_type, MessageType::Response);
                Verdict::from(answer.metadata.response_code == ResponseCode::NoError)
            }
            Outcome::Forward(question) => {
                let answer = failure(&question, ResponseCode::ServFail);
                let answer = Message::from_vec(&answer).expect("our failures can be read");
                assert_eq!(answer.metadata.id, question.id);
                Verdict::Accepted
            }
            Outcome::Drop => Verdict::Refused,
        }
    });
}

/// Answers of resolvers: only one to the very question is handed on, under the client's id, and it fits the client.
#[test]
fn dns_answers() {
    let question = question();
    skein_fuzz::target!("dns_answers").inputs(8_000).memory(512, 64 << 10).run_mutants(Form::Bytes, |input| {
        is_truncated(input);
        match relay(&question, 0x1234, input.to_vec()) {
            Some(answer) => {
                assert!(answer.len() <= usize::from(question.max_bytes), "{} bytes", answer.len());
                let answer = Message::from_vec(&answer).expect("what is handed on can be read");
                assert_eq!(answer.metadata.id, question.id);
                assert!(answer.queries.iter().all(|q| *q == question.query), "another question's answer");
                Verdict::Accepted
            }
            None => Verdict::Refused,
        }
    });
}

/// What a client asked that the samples answer: the address of `www.example.com`.
fn question() -> Question {
    let name = Name::from_ascii("www.example.com.").expect("a name");
    Question { id: 7, query: Query::query(name, RecordType::A), max_bytes: 512, edns: true }
}
