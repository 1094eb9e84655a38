//! Inputs out of samples: what a parser nearly expects gets further into it than noise.

use std::ops::Bound;

use bolero::{Driver, ValueGenerator};

/// Longest input that is made. Limits of parsers lie above that and have tests of their own; more bytes only make a run
/// slower.
const INPUT_BYTES_MAX: usize = 32 << 10;

/// Numbers at the edges of what fields hold.
const EDGES: [u64; 12] =
    [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x7fff_ffff_ffff_ffff, u64::MAX];

/// What samples are, and so how they are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Bytes without a grammar, or with one that lengths and numbers make.
    Bytes,
    /// A JSON document.
    Json,
    /// Requests, one a line: a text and, from the first `{` on, a JSON document.
    Script,
    /// Lines of text, with words that mean something there.
    Text(&'static [&'static str]),
}

/// Choices out of a driver of bolero.
#[derive(Debug)]
pub struct Pick<'d, D>(pub &'d mut D);

impl<D: Driver> Pick<'_, D> {
    /// A number below `end`; 0 for none.
    pub fn below(&mut self, end: usize) -> usize {
        self.0.gen_usize(Bound::Included(&0), Bound::Excluded(&end.max(1))).unwrap_or(0)
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// Any number.
    pub fn word(&mut self) -> u64 {
        self.0.produce().unwrap_or(0)
    }

    /// A number at or near an edge.
    pub fn edge(&mut self) -> u64 {
        let near = self.below(3) as u64;
        EDGES[self.below(EDGES.len())].wrapping_add(near).wrapping_sub(1)
    }

    /// One of several.
    ///
    /// # Panics
    /// When there are none.
    pub fn one_of<'t, T>(&mut self, several: &'t [T]) -> &'t T {
        &several[self.below(several.len())]
    }

    /// One of the samples.
    ///
    /// # Panics
    /// When there are none.
    pub fn sample<'t>(&mut self, samples: &'t [Vec<u8>]) -> &'t [u8] {
        self.one_of::<Vec<u8>>(samples)
    }

    /// A place in a list of this length, and the end of a short or long piece from there.
    fn piece(&mut self, length: usize) -> (usize, usize) {
        let start = self.below(length + 1);
        let longest = if self.once_in(4) { length } else { 8 };
        (start, length.min(start + self.below(longest + 1)))
    }
}

/// Inputs made from samples.
#[derive(Clone, Debug)]
pub struct Mutants {
    samples: Vec<Vec<u8>>,
    form: Form,
}

impl Mutants {
    /// Changes of these samples.
    ///
    /// # Panics
    /// When there are none.
    pub fn new(samples: Vec<Vec<u8>>, form: Form) -> Self {
        assert!(!samples.is_empty(), "mutants need samples");
        Self { samples, form }
    }
}

impl ValueGenerator for Mutants {
    type Output = Vec<u8>;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Vec<u8>> {
        let mut pick = Pick(driver);
        if pick.once_in(32) {
            return Some((0..pick.below(64)).map(|_| pick.word() as u8).collect());
        }
        let mut input = pick.sample(&self.samples).to_vec();
        match self.form {
            Form::Bytes => mutate_bytes(&mut pick, &mut input, &self.samples),
            Form::Json => mutate_document(&mut pick, &mut input, &self.samples),
            Form::Script => mutate_script(&mut pick, &mut input, &self.samples),
            Form::Text(words) => mutate_text(&mut pick, &mut input, words, &self.samples),
        }
        // Below every grammar are bytes.
        if self.form != Form::Bytes && pick.once_in(8) {
            mutate_bytes(&mut pick, &mut input, &[]);
        }
        input.truncate(INPUT_BYTES_MAX);
        Some(input)
    }
}

/// Changes a JSON document; a sample that is none is changed as bytes.
fn mutate_document<D: Driver>(pick: &mut Pick<'_, D>, input: &mut Vec<u8>, samples: &[Vec<u8>]) {
    let Ok(mut tree) = serde_json::from_slice(input) else { return mutate_bytes(pick, input, samples) };
    let other = serde_json::from_slice(pick.sample(samples)).unwrap_or_default();
    crate::json::mutate(pick, &mut tree, &other);
    *input = tree.to_string().into_bytes();
}

/// Where the document of a script's line begins.
fn document_at(line: &[u8]) -> usize {
    line.iter().position(|b| *b == b'{').unwrap_or(line.len())
}

/// Changes a script: other requests, in another order, with other documents. What most lines say stays, since the later
/// ones build on the earlier.
fn mutate_script<D: Driver>(pick: &mut Pick<'_, D>, input: &mut Vec<u8>, samples: &[Vec<u8>]) {
    let mut lines: Vec<Vec<u8>> = lines_of(input).into_iter().map(<[u8]>::to_vec).collect();
    for _ in 0..1 + pick.below(4) {
        let at = pick.below(lines.len());
        let other = lines_of(pick.sample(samples));
        let other = pick.one_of::<&[u8]>(&other).to_vec();
        match pick.below(8) {
            0 if lines.len() > 1 => drop(lines.remove(at)),
            1 => lines.insert(at, lines[at].clone()),
            2 => lines.insert(at, other),
            3 => {
                let start = document_at(&lines[at]);
                let document = lines[at].split_off(start);
                mutate_bytes(pick, &mut lines[at], samples);
                lines[at].extend(document);
            }
            _ => {
                let start = document_at(&lines[at]);
                let mut document = lines[at].split_off(start);
                let others = [other[document_at(&other)..].to_vec()];
                mutate_document(pick, &mut document, &others);
                lines[at].append(&mut document);
            }
        }
    }
    *input = lines.join(&b'\n');
}

/// Changes bytes in a few places; pieces of `samples` may come in.
pub fn mutate_bytes<D: Driver>(pick: &mut Pick<'_, D>, input: &mut Vec<u8>, samples: &[Vec<u8>]) {
    for _ in 0..1 + pick.below(6) {
        let at = pick.below(input.len());
        match pick.below(8) {
            0 if !input.is_empty() => input[at] ^= 1 << pick.below(8),
            1 if !input.is_empty() => input[at] = pick.edge() as u8,
            2 => input.insert(at, pick.word() as u8),
            3 => input.truncate(at),
            4 => {
                let (start, end) = pick.piece(input.len());
                input.drain(start..end);
            }
            5 => {
                let (start, end) = pick.piece(input.len());
                let piece = input[start..end].to_vec();
                insert(input, at, &piece);
            }
            6 if !samples.is_empty() => {
                let sample = pick.sample(samples);
                let (start, end) = pick.piece(sample.len());
                insert(input, at, &sample[start..end]);
            }
            _ => overwrite_number(pick, input, at),
        }
    }
}

fn insert(input: &mut Vec<u8>, at: usize, piece: &[u8]) {
    if input.len() + piece.len() <= INPUT_BYTES_MAX {
        input.splice(at..at, piece.iter().copied());
    }
}

/// A number of 1, 2, 4 or 8 bytes, in either order, at an edge.
fn overwrite_number<D: Driver>(pick: &mut Pick<'_, D>, input: &mut [u8], at: usize) {
    let size = 1 << pick.below(4);
    let number = pick.edge();
    let bytes =
        if pick.once_in(2) { number.to_le_bytes()[..size].to_vec() } else { number.to_be_bytes()[8 - size..].to_vec() };
    if let Some(place) = input.get_mut(at..at + size) {
        place.copy_from_slice(&bytes);
    }
}

/// Changes text by lines and words; `words` and lines of `samples` may come in.
pub fn mutate_text<D: Driver>(pick: &mut Pick<'_, D>, input: &mut Vec<u8>, words: &[&str], samples: &[Vec<u8>]) {
    let mut lines: Vec<Vec<u8>> = input.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
    for _ in 0..1 + pick.below(5) {
        let at = pick.below(lines.len());
        match pick.below(9) {
            0 if lines.len() > 1 => drop(lines.remove(at)),
            1 => lines.insert(at, lines[at].clone()),
            2 => {
                let other = pick.below(lines.len());
                lines.swap(at, other);
            }
            3 => {
                let line = lines_of(pick.sample(samples));
                lines.insert(at, pick.one_of::<&[u8]>(&line).to_vec());
            }
            4 => {
                let spaces = pick.below(6);
                lines[at].splice(0..0, vec![b' '; spaces]);
            }
            5 => {
                let number = pick.edge().to_string();
                put_word(pick, &mut lines[at], number.as_bytes());
            }
            6 => {
                let long = vec![*pick.one_of(b"a([{$\"' \\"); 1 + pick.below(300)];
                put_word(pick, &mut lines[at], &long);
            }
            _ => {
                let word = *pick.one_of::<&str>(words);
                put_word(pick, &mut lines[at], word.as_bytes());
            }
        }
    }
    *input = lines.join(&b'\n');
}

fn lines_of(text: &[u8]) -> Vec<&[u8]> {
    text.split(|b| *b == b'\n').collect()
}

/// Puts a word somewhere in a line, over something or between.
fn put_word<D: Driver>(pick: &mut Pick<'_, D>, line: &mut Vec<u8>, word: &[u8]) {
    let (start, end) = pick.piece(line.len());
    let end = if pick.once_in(2) { start } else { end };
    line.splice(start..end, word.iter().copied());
}
