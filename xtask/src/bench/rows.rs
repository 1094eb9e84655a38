//! Rows of a benchmark: what was measured, against what goal, as JSON and as a table.

use serde::Serialize;

/// What a figure shall be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
}

impl Goal {
    fn reached(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(most) => format!("<= {}", number(most)),
            Self::AtLeast(least) => format!(">= {}", number(least)),
        }
    }
}

/// One figure. What is not known is left out of the JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The benchmark.
    pub bench: String,
    /// What was done, at what size.
    pub case: String,
    /// What was measured.
    pub metric: String,
    /// Its unit.
    pub unit: String,
    /// The figure.
    pub value: f64,
    /// The figure of what it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<f64>,
    /// `value` by `baseline`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// What it shall be, such as `<= 60`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal: Option<String>,
    /// Whether it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reached: Option<bool>,
}

impl Row {
    /// A figure.
    pub fn new(bench: &str, case: &str, metric: &str, unit: &str, value: f64) -> Self {
        Self {
            bench: bench.to_owned(),
            case: case.to_owned(),
            metric: metric.to_owned(),
            unit: unit.to_owned(),
            value,
            baseline: None,
            ratio: None,
            goal: None,
            reached: None,
        }
    }

    /// With what it shall be.
    #[must_use]
    pub fn goal(self, goal: Goal) -> Self {
        Self { goal: Some(goal.text()), reached: Some(goal.reached(self.value)), ..self }
    }

    /// With what it is compared with.
    #[must_use]
    pub fn baseline(self, baseline: f64) -> Self {
        let ratio = (baseline != 0.0).then_some(self.value / baseline);
        Self { baseline: Some(baseline), ratio, ..self }
    }
}

/// A figure with three digits that count; whole from a hundred on.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 || v == 0.0 || v.fract() == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// The rows as a table in Markdown, with columns only for what some row has.
pub fn table(rows: &[Row]) -> String {
    let compared = rows.iter().any(|r| r.baseline.is_some());
    let mut head = vec!["case", "metric", "value", "unit"];
    if compared {
        head.extend(["baseline", "ratio"]);
    }
    head.extend(["goal", "reached"]);
    let mut lines = vec![head.iter().map(|h| (*h).to_owned()).collect(), vec!["---".to_owned(); head.len()]];
    for row in rows {
        let some = |value: Option<f64>| value.map(number).unwrap_or_default();
        let mut line = vec![row.case.clone(), row.metric.clone(), number(row.value), row.unit.clone()];
        if compared {
            line.extend([some(row.baseline), some(row.ratio)]);
        }
        let reached = row.reached.map_or("", |reached| if reached { "yes" } else { "**missed**" });
        line.extend([row.goal.clone().unwrap_or_default(), reached.to_owned()]);
        lines.push(line);
    }
    lines.iter().map(|cells| format!("| {} |\n", cells.join(" | "))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_goal_is_shown_as_missed() {
        let rows = [
            Row::new("scale", "10 agents", "join", "s", 61.25).goal(Goal::AtMost(60.0)),
            Row::new("scale", "10 agents", "rate", "1/s", 5_000.4).goal(Goal::AtLeast(3_750.0)),
            Row::new("scale", "10 agents", "memory", "KB", 0.5).baseline(0.25),
        ];
        let expected = "\
| case | metric | value | unit | baseline | ratio | goal | reached |
| --- | --- | --- | --- | --- | --- | --- | --- |
| 10 agents | join | 61.2 | s |  |  | <= 60 | **missed** |
| 10 agents | rate | 5000 | 1/s |  |  | >= 3750 | yes |
| 10 agents | memory | 0.500 | KB | 0.250 | 2 |  |  |
";
        assert_eq!(table(&rows), expected);
        let json = serde_json::to_value(&rows[0]).expect("rows are JSON");
        let expected = serde_json::json!({
            "bench": "scale", "case": "10 agents", "metric": "join", "unit": "s", "value": 61.25,
            "goal": "<= 60", "reached": false,
        });
        assert_eq!(json, expected);
    }
}
