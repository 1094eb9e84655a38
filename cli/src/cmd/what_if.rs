//! `skein what-if`: a question to a copy of the cluster.

use skein_api::{Resources, StackApply, WhatIf, WhatIfAnswer};

use super::{App, stack};
use crate::{
    args::WhatIfCommand,
    fail::Failure,
    out::{bytes, table},
};

/// Asks, and shows what would be elsewhere.
pub(super) async fn run(app: &App, question: WhatIfCommand) -> Result<(), Failure> {
    let question = match question {
        WhatIfCommand::NodeDown { nodes } => WhatIf::NodeDown(nodes),
        WhatIfCommand::Drain { nodes } => WhatIf::Drain(nodes),
        WhatIfCommand::AddNode { like, count } => WhatIf::AddNode { like, count },
        WhatIfCommand::Up { compose, remove_orphans } => {
            let stack = stack::parsed(app, &compose)?;
            WhatIf::Up(Box::new(StackApply { stack, remove_orphans, dry_run: true }))
        }
    };
    let answer = app.client("skein what-if")?.what_if(&question).await?;
    app.out.show(&answer, || told(&answer))
}

/// An answer for people: one sentence, then tasks and nodes.
fn told(answer: &WhatIfAnswer) -> String {
    let mut text = format!("{}\n", answer.summary);
    if !answer.tasks.is_empty() {
        let place = |node: &Option<String>| node.clone().unwrap_or_else(|| "-".to_owned());
        let rows = answer.tasks.iter().map(|t| vec![t.name.clone(), place(&t.from), place(&t.to), t.message.clone()]);
        text.push_str(&table(&["TASK", "FROM", "TO", "WHY"], &rows.collect::<Vec<_>>()));
    }
    for room in &answer.rooms {
        text.push_str(&format!("room: {room}\n"));
    }
    if !answer.nodes.is_empty() {
        let change =
            |before: String, after: String| if before == after { after } else { format!("{before} -> {after}") };
        let cpus = |r: Resources| format!("{:.1}", r.nano_cpus as f64 / 1e9);
        let rows = answer.nodes.iter().map(|n| {
            vec![
                n.name.clone(),
                change(n.tasks_before.to_string(), n.tasks_after.to_string()),
                format!("{} of {}", change(cpus(n.reserved_before), cpus(n.reserved_after)), cpus(n.offered)),
                format!(
                    "{} of {}",
                    change(bytes(n.reserved_before.mem_bytes), bytes(n.reserved_after.mem_bytes)),
                    bytes(n.offered.mem_bytes)
                ),
            ]
        });
        text.push_str(&table(&["NODE", "TASKS", "CPUS RESERVED", "MEMORY RESERVED"], &rows.collect::<Vec<_>>()));
    }
    text
}

#[cfg(test)]
mod tests {
    use skein_api::{WhatIfNode, WhatIfTask};

    use super::*;

    #[test]
    fn an_answer_is_a_sentence_and_two_tables() {
        let task = |name: &str, from: Option<&str>, to: Option<&str>, message: &str| WhatIfTask {
            name: name.to_owned(),
            from: from.map(str::to_owned),
            to: to.map(str::to_owned),
            message: message.to_owned(),
        };
        let gib = |n: u64| Resources { nano_cpus: n * 500_000_000, mem_bytes: n << 30 };
        let node = WhatIfNode {
            name: "h2".into(),
            tasks_before: 1,
            tasks_after: 2,
            reserved_before: gib(1),
            reserved_after: gib(2),
            offered: gib(8),
        };
        let answer = WhatIfAnswer {
            summary: "1 task would move, 1 task would find no place".into(),
            tasks: vec![task("web.1", Some("h1"), Some("h2"), ""), task("db.1", Some("h1"), None, "no node fits")],
            nodes: vec![node],
            rooms: vec!["api.1 waits for room on h2, stops log.1".into()],
            plan: None,
        };
        let expected = "\
1 task would move, 1 task would find no place
TASK    FROM   TO   WHY
web.1   h1     h2
db.1    h1     -    no node fits
room: api.1 waits for room on h2, stops log.1
NODE   TASKS    CPUS RESERVED       MEMORY RESERVED
h2     1 -> 2   0.5 -> 1.0 of 4.0   1GiB -> 2GiB of 8GiB
";
        assert_eq!(told(&answer), expected);
    }
}
