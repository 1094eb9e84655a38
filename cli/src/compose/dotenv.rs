//! `.env` and `env_file` texts (Compose specification, "`.env` file syntax").
//!
//! Owns lines, quoting and escapes. Must not know which file it is or what the variables are for. Lines are
//! `NAME=value` or `NAME: value` (with a space), optionally after `export`; `#` starts a comment at the start of a line or after white
//! space; `'single'` quotes are literal, `"double"` quotes know `\n \r \t \\ \" \$` and variables, both may span lines.

use std::collections::BTreeMap;

use super::interpolate::interpolate;

/// What is wrong with a text, and in which line, from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// Line.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

/// Variables in the order of the file; `None` is a name without a value, which passes on the caller's own.
pub type Variables = Vec<(String, Option<String>)>;

/// Reads a text. Values refer to variables of earlier lines and, first, to those of `lookup`. With `raw`, nothing is
/// interpreted: everything after `=` is the value.
///
/// # Errors
/// The first line that is wrong.
pub fn parse(text: &str, raw: bool, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Variables, BadLine> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text).replace("\r\n", "\n");
    let mut reader = Reader { rest: &text, line: 1, known: BTreeMap::new(), lookup };
    let mut out = Variables::new();
    while !reader.rest.is_empty() {
        if let Some((name, value)) = reader.entry(raw)? {
            if let Some(value) = &value {
                reader.known.insert(name.clone(), value.clone());
            }
            out.push((name, value));
        }
    }
    Ok(out)
}

struct Reader<'a> {
    rest: &'a str,
    line: usize,
    known: BTreeMap<String, String>,
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl<'a> Reader<'a> {
    /// Takes the rest of the line.
    fn line(&mut self) -> &'a str {
        let (line, rest) = self.rest.split_once('\n').unwrap_or((self.rest, ""));
        self.rest = rest;
        self.line += 1;
        line
    }

    fn entry(&mut self, raw: bool) -> Result<Option<(String, Option<String>)>, BadLine> {
        let number = self.line;
        let bad = |message: String| Err(BadLine { line: number, message });
        let line = self.rest.split('\n').next().unwrap_or_default();
        let indent = line.len() - line.trim_start().len();
        let trimmed = line[indent..].trim_end();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            self.line();
            return Ok(None);
        }
        let export = trimmed.strip_prefix("export ").map_or(0, |t| trimmed.len() - t.trim_start().len());
        let body = &trimmed[export..];
        // A colon separates only before white space: `constraint:zone==eu` is a name with one.
        let colon = body.char_indices().find(|(i, c)| *c == ':' && body[i + 1..].starts_with([' ', '\t']));
        let equals = body.find('=');
        let Some(split) = equals.into_iter().chain(colon.map(|(i, _)| i)).min() else {
            self.line();
            let name = body.split(" #").next().unwrap_or_default().trim_end();
            return match check_name(name) {
                Ok(()) => Ok(Some((name.to_owned(), None))),
                Err(message) => bad(message),
            };
        };
        let name = body[..split].trim_end().to_owned();
        if let Err(message) = check_name(&name) {
            return bad(message);
        }
        self.rest = &self.rest[indent + export + split + 1..];
        let value = if raw { self.line().to_owned() } else { self.value(number)? };
        Ok(Some((name, Some(value))))
    }

    fn value(&mut self, number: usize) -> Result<String, BadLine> {
        let spaces = self.rest.len() - self.rest.trim_start_matches([' ', '\t']).len();
        let start = &self.rest[spaces..];
        match start.chars().next() {
            Some(quote @ ('"' | '\'')) => {
                self.rest = &start[1..];
                self.quoted(quote, number)
            }
            _ => {
                let line = self.line();
                let comment =
                    line.char_indices().find(|(i, c)| *c == '#' && (*i == 0 || line[..*i].ends_with([' ', '\t'])));
                let value = comment.map_or(line, |(i, _)| &line[..i]).trim();
                self.expand(value, number)
            }
        }
    }

    fn quoted(&mut self, quote: char, number: usize) -> Result<String, BadLine> {
        let bad = |message: String| Err(BadLine { line: number, message });
        let mut escaped = false;
        let end = self.rest.char_indices().find(|(_, c)| {
            let closes = *c == quote && !escaped;
            escaped = *c == '\\' && !escaped;
            closes
        });
        let Some((end, _)) = end else { return bad(format!("the value is not closed with {quote}")) };
        let inner = &self.rest[..end];
        self.line += inner.matches('\n').count();
        self.rest = &self.rest[end + 1..];
        let tail = self.line().trim();
        if !tail.is_empty() && !tail.starts_with('#') {
            return bad(format!("unexpected {tail:?} after the closing quote"));
        }
        if quote == '\'' {
            return Ok(inner.replace("\\'", "'"));
        }
        let value = unescape(inner);
        self.expand(&value, number)
    }

    fn expand(&self, value: &str, number: usize) -> Result<String, BadLine> {
        let lookup = |name: &str| (self.lookup)(name).or_else(|| self.known.get(name).cloned());
        let done = interpolate(value, &lookup).map_err(|e| BadLine { line: number, message: e.message })?;
        Ok(done.text)
    }
}

fn check_name(name: &str) -> Result<(), String> {
    let fine = |c: char| matches!(c, '_' | '.' | '-' | ':' | '!') || c.is_ascii_alphanumeric();
    match name.chars().next() {
        None => Err("expected a variable's name before \"=\"".into()),
        Some(first) if first.is_ascii_digit() || !name.chars().all(fine) => {
            Err(format!("{name:?} is not a variable's name; expected NAME=value"))
        }
        Some(_) => Ok(()),
    }
}

fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('n') => out.push('\n'),
            Some('r') => out.push('\r'),
            Some('t') => out.push('\t'),
            Some(c @ ('\\' | '"')) => out.push(c),
            // Kept apart from a variable until they are replaced.
            Some('$') => out.push_str("$$"),
            Some(c) => out.extend(['\\', c]),
            None => out.push('\\'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_raw(text: &str, raw: bool, expected: &str) {
        let lookup = |name: &str| (name == "HOME").then(|| "/root".to_owned());
        let got = match parse(text, raw, &lookup) {
            Ok(variables) => {
                let show = |(n, v): &(String, Option<String>)| match v {
                    Some(v) => format!("{n}=<{v}>"),
                    None => n.clone(),
                };
                variables.iter().map(show).collect::<Vec<_>>().join(" ")
            }
            Err(e) => format!("{}: {}", e.line, e.message),
        };
        assert_eq!(got, expected, "{text:?}");
    }

    fn check(text: &str, expected: &str) {
        check_raw(text, false, expected);
    }

    #[test]
    fn lines() {
        check("", "");
        check("# comment\n\n  # another\nA=1\n", "A=<1>");
        check("A=1\r\nB=2\r\n", "A=<1> B=<2>");
        check("export A=1\n export  B=2", "A=<1> B=<2>");
        check("A = 1 \nC: 3\na:b==c", "A=<1> C=<3> a:b=<=c>");
        check("A", "A");
        check("A=", "A=<>");
        check("A=b c # d", "A=<b c>");
        check("A=b#c", "A=<b#c>");
        check("A=# c", "A=<>");
        check("A=x=y", "A=<x=y>");
        check("a.b-c=1", "a.b-c=<1>");
    }

    #[test]
    fn quotes() {
        check("A='x # $HOME \\n'", "A=<x # $HOME \\n>");
        check("A='it\\'s'", "A=<it's>");
        check("A=\"x\\ty\\\"z\\\" # \" # c", "A=<x\ty\"z\" # >");
        check("A=\"two\nlines\"\nB=1", "A=<two\nlines> B=<1>");
        check("A='two\nlines' # c\nB=1", "A=<two\nlines> B=<1>");
        check("A=\"\\$HOME $HOME ${NO:-d}\"", "A=<$HOME /root d>");
    }

    #[test]
    fn variables() {
        check("A=1\nB=$A${A}\nC='$A'", "A=<1> B=<11> C=<$A>");
        check("HOME=/x\nB=$HOME", "HOME=</x> B=</root>");
        check("A=$NONE.", "A=<.>");
    }

    #[test]
    fn raw_lines() {
        check_raw("A='x' # y\nB=$A", true, "A=<'x' # y> B=<$A>");
    }

    #[test]
    fn refusals() {
        check("A=1\n=2", "2: expected a variable's name before \"=\"");
        check("1A=2", "1: \"1A\" is not a variable's name; expected NAME=value");
        check("A B=2", "1: \"A B\" is not a variable's name; expected NAME=value");
        check("A='x", "1: the value is not closed with '");
        check("\nA=\"x\ny", "2: the value is not closed with \"");
        check("A='x' y", "1: unexpected \"y\" after the closing quote");
        check("A=\"a\nb\"\nB=${X?no}", "3: the required variable X is not set: no");
    }
}
