//! A stack's plan as text. Pure.

use std::fmt::Write as _;

use skein_api::{PlanAction, StackPlan};

/// Whether the plan replaces or removes containers or data that are there.
pub(crate) fn is_destructive(plan: &StackPlan) -> bool {
    plan.items.iter().any(|i| matches!(i.action, PlanAction::Recreate | PlanAction::Remove))
}

/// Whether the plan changes nothing.
pub(crate) fn is_empty(plan: &StackPlan) -> bool {
    plan.items.iter().all(|i| matches!(i.action, PlanAction::Keep | PlanAction::Orphan))
}

fn mark(action: PlanAction) -> (&'static str, &'static str, &'static str) {
    match action {
        PlanAction::Create => ("+", "create", "32"),
        PlanAction::Recreate => ("!", "recreate", "33"),
        PlanAction::Update => ("~", "update", "33"),
        PlanAction::Keep => ("=", "keep", "2"),
        PlanAction::Remove => ("-", "remove", "31"),
        PlanAction::Orphan => ("?", "orphan", "35"),
    }
}

/// One line per object with what differs below it, a count, and what to know about orphans.
pub(crate) fn render(plan: &StackPlan, stack: &str, colour: bool) -> String {
    let paint = |code: &str, text: &str| if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() };
    let mut out = String::new();
    let kind_width = plan.items.iter().map(|i| i.kind.len()).max().unwrap_or(0);
    for item in &plan.items {
        let (sign, word, code) = mark(item.action);
        let head = format!("{sign} {word:<8}  {:<kind_width$}  {}", item.kind, item.name);
        let _ = writeln!(out, "{}", paint(code, &head));
        for difference in &item.differences {
            let _ = writeln!(out, "      {difference}");
        }
    }
    let order = [
        (PlanAction::Create, "to create"),
        (PlanAction::Recreate, "to recreate"),
        (PlanAction::Update, "to update"),
        (PlanAction::Remove, "to remove"),
        (PlanAction::Keep, "to keep"),
        (PlanAction::Orphan, "left over"),
    ];
    let count = |action| plan.items.iter().filter(|i| i.action == action).count();
    let counts: Vec<String> =
        order.iter().map(|(a, w)| (count(*a), w)).filter(|(n, _)| *n > 0).map(|(n, w)| format!("{n} {w}")).collect();
    let summary = if counts.is_empty() { "nothing".to_owned() } else { counts.join(", ") };
    let _ = writeln!(out, "stack {stack}: {summary}");
    for warning in &plan.warnings {
        let _ = writeln!(out, "warning: {warning}");
    }
    if count(PlanAction::Orphan) > 0 {
        let _ = writeln!(out, "hint: what is left over is not in the file; remove it with --remove-orphans");
    }
    out
}

#[cfg(test)]
mod tests {
    use skein_api::PlanItem;

    use super::*;

    fn plan() -> StackPlan {
        let item = |kind: &str, name: &str, action, differences: &[&str]| PlanItem {
            kind: kind.into(),
            name: name.into(),
            action,
            differences: differences.iter().map(|d| (*d).to_owned()).collect(),
        };
        StackPlan {
            items: vec![
                item("network", "shop_default", PlanAction::Keep, &[]),
                item(
                    "service",
                    "shop_db",
                    PlanAction::Recreate,
                    &["image: postgres:15 -> postgres:16", "env.A: (none) -> 1"],
                ),
                item("service", "shop_old", PlanAction::Orphan, &[]),
                item("service", "shop_web", PlanAction::Create, &[]),
            ],
            warnings: vec!["no node meets instance==java now".into()],
        }
    }

    #[test]
    fn plain() {
        assert_eq!(
            render(&plan(), "shop", false),
            "\
= keep      network  shop_default
! recreate  service  shop_db
      image: postgres:15 -> postgres:16
      env.A: (none) -> 1
? orphan    service  shop_old
+ create    service  shop_web
stack shop: 1 to create, 1 to recreate, 1 to keep, 1 left over
warning: no node meets instance==java now
hint: what is left over is not in the file; remove it with --remove-orphans
"
        );
        assert_eq!(render(&StackPlan::default(), "s", false), "stack s: nothing\n");
    }

    #[test]
    fn coloured_and_judged() {
        let mut plan = plan();
        assert!(render(&plan, "shop", true).starts_with("\x1b[2m= keep      network  shop_default\x1b[0m\n\x1b[33m! "));
        assert!(is_destructive(&plan) && !is_empty(&plan));
        plan.items.retain(|i| i.action == PlanAction::Create);
        assert!(!is_destructive(&plan) && !is_empty(&plan));
        plan.items[0].action = PlanAction::Keep;
        assert!(is_empty(&plan));
    }
}
