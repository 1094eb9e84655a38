//! `$VARIABLE` in values (Compose specification, "Interpolation").
//!
//! Owns the syntax and its errors, and the walk over a tree. Must not know where variables come from.
//! Forms: `$V`, `${V}`, `${V:-d}`, `${V-d}`, `${V:?e}`, `${V?e}`, `${V:+r}`, `${V+r}`, and `$$` for a dollar; defaults,
//! replacements and error texts are interpolated themselves. Keys are never touched.

use std::collections::BTreeSet;

use super::{
    problem::{Pos, Problem, Sources},
    yaml::{Node, Value},
};

/// Deepest nesting of `${A:-${B:-…}}`.
const NESTING_MAX: usize = 32;

/// What is wrong, and which dollar sign of the text, from 0, it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSubstitution {
    /// What is wrong.
    pub message: String,
    /// How many dollar signs stand before the one at fault.
    pub dollar: usize,
}

/// The result of one text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interpolated {
    /// The text with its variables replaced.
    pub text: String,
    /// Variables without a value that became nothing, each with its dollar's number.
    pub blank: Vec<(String, usize)>,
}

struct Scan<'a> {
    chars: Vec<char>,
    at: usize,
    dollars: usize,
    lookup: &'a dyn Fn(&str) -> Option<String>,
    blank: Vec<(String, usize)>,
}

/// Replaces the variables of one text.
///
/// # Errors
/// The syntax is wrong, or a variable that the text requires has no value.
pub fn interpolate(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Interpolated, BadSubstitution> {
    let mut scan = Scan { chars: text.chars().collect(), at: 0, dollars: 0, lookup, blank: Vec::new() };
    let text = scan.text(0, true)?;
    Ok(Interpolated { text, blank: scan.blank })
}

impl Scan<'_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn bad<T>(&self, dollar: usize, message: impl Into<String>) -> Result<T, BadSubstitution> {
        Err(BadSubstitution { message: message.into(), dollar })
    }

    /// Reads until the end, or inside braces until the `}` that closes them, which is left. In a branch that is not
    /// taken (`live` is false) only the syntax counts.
    fn text(&mut self, depth: usize, live: bool) -> Result<String, BadSubstitution> {
        let mut out = String::new();
        while let Some(c) = self.peek() {
            match c {
                '}' if depth > 0 => break,
                '$' => {
                    let value = self.dollar(depth, live)?;
                    out.push_str(&value);
                }
                c => {
                    out.push(c);
                    self.at += 1;
                }
            }
        }
        Ok(out)
    }

    fn name(&mut self) -> String {
        let start = self.at;
        while self
            .peek()
            .is_some_and(|c| c == '_' || c.is_ascii_alphabetic() || (self.at > start && c.is_ascii_digit()))
        {
            self.at += 1;
        }
        self.chars[start..self.at].iter().collect()
    }

    fn dollar(&mut self, depth: usize, live: bool) -> Result<String, BadSubstitution> {
        let number = self.dollars;
        self.dollars += 1;
        self.at += 1;
        match self.peek() {
            Some('$') => {
                self.dollars += 1;
                self.at += 1;
                Ok("$".into())
            }
            Some('{') => {
                if depth == NESTING_MAX {
                    return self.bad(number, format!("variables are nested more than {NESTING_MAX} levels deep"));
                }
                self.at += 1;
                self.braces(depth + 1, live, number)
            }
            _ => {
                let name = self.name();
                if name.is_empty() {
                    return self.bad(number, "expected a variable's name after \"$\"; write \"$$\" for a dollar sign");
                }
                Ok(self.plain(&name, live, number))
            }
        }
    }

    fn plain(&mut self, name: &str, live: bool, number: usize) -> String {
        (self.lookup)(name).unwrap_or_else(|| {
            if live {
                self.blank.push((name.to_owned(), number));
            }
            String::new()
        })
    }

    fn braces(&mut self, depth: usize, live: bool, number: usize) -> Result<String, BadSubstitution> {
        let name = self.name();
        if name.is_empty() {
            return self.bad(number, "expected a variable's name after \"${\"");
        }
        let colon = self.peek() == Some(':');
        self.at += usize::from(colon);
        let operator = self.peek();
        let value = (self.lookup)(&name).filter(|v| !colon || !v.is_empty());
        let result = match operator {
            Some('}') if !colon => self.plain(&name, live, number),
            Some('-') => {
                let default = self.operand(depth, live && value.is_none())?;
                value.unwrap_or(default)
            }
            Some('+') => {
                let replacement = self.operand(depth, live && value.is_some())?;
                value.map(|_| replacement).unwrap_or_default()
            }
            Some('?') => {
                let reason = self.operand(depth, live && value.is_none())?;
                match value {
                    Some(value) => value,
                    None if !live => String::new(),
                    None => return self.bad(number, required(&name, colon, &reason)),
                }
            }
            None => return self.bad(number, format!("\"${{{name}\" is not closed with \"}}\"")),
            Some(c) => {
                let found = if colon { format!(":{c}") } else { c.to_string() };
                return self.bad(
                    number,
                    format!("expected \"}}\", \"-\", \"?\" or \"+\" after \"${{{name}\", found {found:?}"),
                );
            }
        };
        if self.peek() != Some('}') {
            return self.bad(number, format!("\"${{{name}\" is not closed with \"}}\""));
        }
        self.at += 1;
        Ok(result)
    }

    fn operand(&mut self, depth: usize, live: bool) -> Result<String, BadSubstitution> {
        self.at += 1;
        self.text(depth, live)
    }
}

fn required(name: &str, colon: bool, reason: &str) -> String {
    let what = if colon { "is not set or empty" } else { "is not set" };
    let reason = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    format!("the required variable {name} {what}{reason}")
}

/// Problems of one kind that are kept: more than anybody reads, and the place of each is looked for in the whole file.
const PROBLEMS_MAX: usize = 100;

/// Replaces the variables in all values of a tree. Each variable that became nothing is a warning, once, up to
/// `PROBLEMS_MAX` of them; so are errors.
pub fn interpolate_tree(
    node: &mut Node,
    sources: &Sources,
    lookup: &dyn Fn(&str) -> Option<String>,
    warned: &mut BTreeSet<String>,
    warnings: &mut Vec<Problem>,
    errors: &mut Vec<Problem>,
) {
    match &mut node.value {
        Value::Scalar { text, .. } if text.contains('$') => match interpolate(text, lookup) {
            Ok(done) => {
                *text = done.text;
                for (name, dollar) in done.blank {
                    if warned.len() < PROBLEMS_MAX && warned.insert(name.clone()) {
                        let pos = dollar_pos(sources, node.pos, dollar);
                        let message = format!("the variable {name} is not set; nothing is put in its place");
                        warnings.push(Problem::at(pos, message));
                    }
                }
            }
            Err(_) if errors.len() >= PROBLEMS_MAX => {}
            Err(bad) => errors.push(Problem::at(dollar_pos(sources, node.pos, bad.dollar), bad.message)),
        },
        Value::Scalar { .. } => {}
        Value::List(items) => {
            for item in items {
                interpolate_tree(item, sources, lookup, warned, warnings, errors);
            }
        }
        Value::Map(entries) => {
            for (_, value) in entries {
                interpolate_tree(value, sources, lookup, warned, warnings, errors);
            }
        }
    }
}

/// The place of the nth dollar sign of a value that starts at `start`: the parser keeps no map from a scalar's text to
/// the source, but both have the same dollar signs (but for one that is written `\x24`, which is close enough).
fn dollar_pos(sources: &Sources, start: Pos, nth: usize) -> Pos {
    let mut left = nth;
    for (i, line) in sources.text(start.file).lines().enumerate().skip(start.line.saturating_sub(1)) {
        let skip = if i + 1 == start.line { start.column.saturating_sub(1) } else { 0 };
        for (j, c) in line.chars().enumerate().skip(skip) {
            if c == '$' {
                if left == 0 {
                    return Pos { file: start.file, line: i + 1, column: j + 1 };
                }
                left -= 1;
            }
        }
    }
    start
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(name: &str) -> Option<String> {
        match name {
            "A" => Some("one".into()),
            "B_2" => Some("two".into()),
            "EMPTY" => Some(String::new()),
            "DOLLAR" => Some("$A".into()),
            _ => None,
        }
    }

    #[test]
    fn forms() {
        let check = |text: &str, expected: &str| match interpolate(text, &lookup) {
            Ok(got) => assert_eq!(got.text, expected, "{text}"),
            Err(e) => assert_eq!(format!("#{} {}", e.dollar, e.message), expected, "{text}"),
        };
        check("", "");
        check("plain } text", "plain } text");
        check("$A", "one");
        check("x$A-${B_2}y", "xone-twoy");
        check("$A1", "");
        check("${A}1", "one1");
        check("$$A ${A}$$", "$A one$");
        check("$$$A", "$one");
        check("$DOLLAR", "$A");
        check("${NO:-d}|${NO-d}|${EMPTY:-d}|${EMPTY-d}|${A:-d}|${A-d}", "d|d|d||one|one");
        check("${NO:+r}|${NO+r}|${EMPTY:+r}|${EMPTY+r}|${A:+r}|${A+r}", "|||r|r|r");
        check("${A:?e}|${A?e}|${EMPTY?e}", "one|one|");
        check("${NO:-}", "");
        check("${NO:-a:b-c?d+e}", "a:b-c?d+e");
        check("${NO:-${B_2}}", "two");
        check("${NO:-${NO2:-deep $A}}", "deep one");
        check("${NO:-$$5}", "$5");
        check("${A:-${NO:?not reached}}", "one");
        check("${A:+${B_2:+x}}", "x");
        check("${NO:?}", "#0 the required variable NO is not set or empty");
        check("$A ${NO:?say $A}", "#1 the required variable NO is not set or empty: say one");
        check("$$ ${NO?say it}", "#2 the required variable NO is not set: say it");
        check("${EMPTY:?e}", "#0 the required variable EMPTY is not set or empty: e");
        check("5$", "#0 expected a variable's name after \"$\"; write \"$$\" for a dollar sign");
        check("$5", "#0 expected a variable's name after \"$\"; write \"$$\" for a dollar sign");
        check("${}", "#0 expected a variable's name after \"${\"");
        check("${1A}", "#0 expected a variable's name after \"${\"");
        check("${A", "#0 \"${A\" is not closed with \"}\"");
        check("$A ${A:-x", "#1 \"${A\" is not closed with \"}\"");
        check("${A!}", "#0 expected \"}\", \"-\", \"?\" or \"+\" after \"${A\", found \"!\"");
        check("${A:}", "#0 expected \"}\", \"-\", \"?\" or \"+\" after \"${A\", found \":}\"");
        let deep = "${NO:-".repeat(40) + &"}".repeat(40);
        check(&deep, "#32 variables are nested more than 32 levels deep");
    }

    #[test]
    fn blanks_are_reported_only_where_they_count() {
        let check = |text: &str, expected: &[(&str, usize)]| {
            let got = interpolate(text, &lookup).unwrap().blank;
            let got: Vec<_> = got.iter().map(|(n, d)| (n.as_str(), *d)).collect();
            assert_eq!(got, expected, "{text}");
        };
        check("$NO ${NO2}", &[("NO", 0), ("NO2", 1)]);
        check("${A:-$NO} ${EMPTY} ${NO:-x} ${NO+x}", &[]);
        check("${NO:-$NO2}", &[("NO2", 1)]);
    }

    #[test]
    fn places() {
        let mut sources = Sources::default();
        let text = "a: \"x $A\n  ${NO}\"\nb: |\n  $NO\n  ${Q?}\n";
        let file = sources.add("f", text);
        let mut node = super::super::yaml::parse(text, file).unwrap().unwrap();
        let (mut warned, mut warnings, mut errors) = (BTreeSet::new(), Vec::new(), Vec::new());
        interpolate_tree(&mut node, &sources, &lookup, &mut warned, &mut warnings, &mut errors);
        let show = |p: &Problem| format!("{}:{} {}", p.at.unwrap().line, p.at.unwrap().column, p.message);
        assert_eq!(
            warnings.iter().map(show).collect::<Vec<_>>(),
            ["2:3 the variable NO is not set; nothing is put in its place"]
        );
        assert_eq!(errors.iter().map(show).collect::<Vec<_>>(), ["5:3 the required variable Q is not set"]);
    }
}
