//! Words that users mistype: which one was meant. Owns the measure; it must not know what the words name. Pure, no tasks,
//! no channels.

/// The candidate that was most likely meant by `word`: at most a third of its letters differ.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = word.chars().count();
    let limit = (length / 3).max(1);
    let close = candidates.into_iter().filter(|c| c.chars().count().abs_diff(length) <= limit);
    let distances = close.map(|c| (distance(word, c), c));
    distances.filter(|(d, _)| *d <= limit).min().map(|(_, c)| c)
}

/// Edits between two words: insertions, removals, replacements, and swaps of neighbours (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replaced = rows[i - 1][j - 1] + usize::from(!a[i - 1].eq_ignore_ascii_case(&b[j - 1]));
                let mut best = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    best = best.min(rows[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestions() {
        let keys = ["image", "ports", "environment", "env_file", "networks", "network_mode"];
        let check = |word: &str, expected: Option<&str>| assert_eq!(did_you_mean(word, keys), expected, "{word}");
        check("imgae", Some("image"));
        check("port", Some("ports"));
        check("enviroment", Some("environment"));
        check("Image", Some("image"));
        check("env-file", Some("env_file"));
        check("netwroks", Some("networks"));
        check("foo", None);
        check("", None);
    }
}
