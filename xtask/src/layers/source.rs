//! A light reading of a crate's sources: which module names what.
//!
//! Not a parser: comments and texts are blanked, items under `#[cfg(test)]` are cut out, and what is left is read as
//! a row of words. Paths are resolved through `crate`, `self`, `super` and the names that modules import.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// One mention of a path.
#[derive(Debug)]
pub struct Reference {
    /// The module that mentions it; empty is the root.
    pub module: Vec<String>,
    /// The path as written.
    pub path: Vec<String>,
    /// The file, below `src`.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
}

/// What was read of a crate.
#[derive(Debug, Default)]
pub struct Crate {
    /// Every module, tests left out.
    pub modules: BTreeSet<Vec<String>>,
    /// Every path mentioned, tests left out.
    pub references: Vec<Reference>,
    /// By module and local name: the path it was imported from.
    imports: BTreeMap<(Vec<String>, String), Vec<String>>,
}

enum Found {
    Inside(Vec<String>),
    Outside(Vec<String>),
}

/// A name that is passed on more often than this is not followed further; it also ends circles of imports.
const MAX_HOPS: u32 = 16;

impl Crate {
    /// The module a reference leads to, if it stays in the crate.
    pub fn module_of(&self, reference: &Reference) -> Option<Vec<String>> {
        match self.resolve(&reference.module, &reference.path, MAX_HOPS) {
            Found::Inside(path) => Some(self.home(path)),
            Found::Outside(_) => None,
        }
    }

    /// The full path of a reference that leaves the crate.
    pub fn outside(&self, reference: &Reference) -> Option<Vec<String>> {
        match self.resolve(&reference.module, &reference.path, MAX_HOPS) {
            Found::Outside(path) => Some(path),
            Found::Inside(_) => None,
        }
    }

    /// The longest beginning of a path that is a module.
    fn home(&self, mut path: Vec<String>) -> Vec<String> {
        while !path.is_empty() && !self.modules.contains(&path) {
            path.pop();
        }
        path
    }

    fn resolve(&self, module: &[String], path: &[String], hops: u32) -> Found {
        let Some((first, rest)) = path.split_first() else { return Found::Outside(Vec::new()) };
        let mut at = match first.as_str() {
            "crate" => Vec::new(),
            "self" => module.to_vec(),
            "super" => module[..module.len().saturating_sub(1)].to_vec(),
            _ => {
                let mut below = module.to_vec();
                below.push(first.clone());
                if !self.modules.contains(&below) {
                    return match self.imports.get(&(module.to_vec(), first.clone())) {
                        Some(from) if hops > 0 => {
                            self.resolve(module, &[from.as_slice(), rest].concat(), hops - 1)
                        }
                        _ => Found::Outside(path.to_vec()),
                    };
                }
                below
            }
        };
        let mut rest = rest;
        while let Some((next, further)) = rest.split_first() {
            if next == "super" {
                at.pop();
                rest = further;
                continue;
            }
            let mut below = at.clone();
            below.push(next.clone());
            if !self.modules.contains(&below) {
                // Not a module: a name that this module passes on, or an item of its own.
                if let Some(from) = self.imports.get(&(at.clone(), next.clone()))
                    && hops > 0
                    && self.modules.contains(&at)
                {
                    return self.resolve(&at, &[from.as_slice(), further].concat(), hops - 1);
                }
                below.extend_from_slice(further);
                return Found::Inside(below);
            }
            at = below;
            rest = further;
        }
        Found::Inside(at)
    }

    fn add_file(&mut self, module: Vec<String>, file: &str, text: &str, skipped: &mut BTreeSet<Vec<String>>) {
        let text = without_tests(&scrub(text), |name| {
            let mut test = module.clone();
            test.push(name.to_owned());
            skipped.insert(test);
        });
        self.modules.insert(module.clone());
        Reader { krate: self, file, words: words(&text), at: 0, stack: vec![(module, 0)], depth: 0 }.read();
    }
}

/// Reads all sources below a crate's `src`.
pub fn read_crate(src: &Path) -> Result<Crate, String> {
    let mut files = Vec::new();
    let mut open = vec![src.to_owned()];
    while let Some(folder) = open.pop() {
        let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        for entry in entries {
            let path = entry.map_err(|e| format!("{}: {e}", folder.display()))?.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
                let below = path.strip_prefix(src).unwrap_or(&path).to_string_lossy().into_owned();
                files.push((below, text));
            }
        }
    }
    Ok(build(files))
}

/// A crate from texts, for tests: names below `src` and contents.
#[cfg(test)]
pub fn crate_of(files: &[(&str, &str)]) -> Crate {
    build(files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect())
}

fn build(mut files: Vec<(String, String)>) -> Crate {
    files.sort(); // a parent's file may name a child as a test, so its verdict is applied at the end
    let mut krate = Crate::default();
    let mut tests = BTreeSet::new();
    for (name, text) in &files {
        krate.add_file(module_of_file(name), name, text, &mut tests);
    }
    let is_test = |module: &[String]| (1..=module.len()).any(|n| tests.contains(&module[..n]));
    krate.modules.retain(|module| !is_test(module));
    krate.references.retain(|reference| !is_test(&reference.module));
    krate.imports.retain(|(module, _), _| !is_test(module));
    krate
}

fn module_of_file(name: &str) -> Vec<String> {
    let name = name.trim_end_matches(".rs");
    let mut parts: Vec<String> = name.split('/').map(str::to_owned).collect();
    match parts.last().map(String::as_str) {
        Some("mod") => drop(parts.pop()),
        Some("lib" | "main") if parts.len() == 1 => parts.clear(),
        _ => {}
    }
    parts
}

struct Reader<'a> {
    krate: &'a mut Crate,
    file: &'a str,
    words: Vec<(String, usize)>,
    at: usize,
    /// Modules written in place that are open here, with the depth of braces they opened at.
    stack: Vec<(Vec<String>, usize)>,
    depth: usize,
}

impl Reader<'_> {
    fn word(&self, ahead: usize) -> &str {
        self.words.get(self.at + ahead).map_or("", |(word, _)| word)
    }

    fn line(&self) -> usize {
        self.words.get(self.at).map_or(0, |(_, line)| *line)
    }

    fn module(&self) -> Vec<String> {
        self.stack.last().map(|(module, _)| module.clone()).unwrap_or_default()
    }

    fn read(&mut self) {
        while self.at < self.words.len() {
            match self.word(0) {
                "{" => self.depth += 1,
                "}" => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.stack.len() > 1
                        && self.stack.last().is_some_and(|(_, depth)| *depth == self.depth)
                    {
                        self.stack.pop();
                    }
                }
                "mod" if self.word(2) == "{" => {
                    let mut module = self.module();
                    module.push(self.word(1).to_owned());
                    self.krate.modules.insert(module.clone());
                    self.stack.push((module, self.depth));
                    self.depth += 1;
                    self.at += 2;
                }
                "use" => {
                    self.at += 1;
                    self.use_tree(Vec::new());
                    continue;
                }
                first if is_name(first) && self.word(1) == "::" => {
                    self.path();
                    continue;
                }
                _ => {}
            }
            self.at += 1;
        }
    }

    /// A written-out path: `a::b::c`, generic arguments left to the next round.
    fn path(&mut self) {
        let line = self.line();
        let mut path = vec![self.word(0).to_owned()];
        self.at += 1;
        while self.word(0) == "::" && is_name(self.word(1)) {
            path.push(self.word(1).to_owned());
            self.at += 2;
        }
        if path.len() > 1 {
            self.mention(path, line);
        } else {
            self.at += usize::from(self.word(0) == "::");
        }
    }

    /// One branch of a `use`, up to `,`, `}` or `;`.
    fn use_tree(&mut self, mut path: Vec<String>) {
        let line = self.line();
        let mut alias = None;
        loop {
            match self.word(0) {
                "{" => {
                    self.at += 1;
                    while !matches!(self.word(0), "}" | ";" | "") {
                        self.use_tree(path.clone());
                        self.at += usize::from(self.word(0) == ",");
                    }
                    self.at += usize::from(self.word(0) == "}");
                    return;
                }
                "as" => {
                    alias = Some(self.word(1).to_owned());
                    self.at += 2;
                }
                "::" => self.at += 1,
                "*" => {
                    self.at += 1;
                    self.mention(path, line);
                    return;
                }
                name if is_name(name) => {
                    // `use a::{self}` names `a` itself.
                    if name != "self" || path.is_empty() {
                        path.push(name.to_owned());
                    }
                    self.at += 1;
                }
                _ => break,
            }
        }
        let name = alias.or_else(|| path.last().cloned());
        if let Some(name) = name
            && path.len() > usize::from(name == *path.first().unwrap_or(&name))
        {
            self.krate.imports.insert((self.module(), name), path.clone());
        }
        self.mention(path, line);
    }

    fn mention(&mut self, path: Vec<String>, line: usize) {
        if !path.is_empty() {
            let (module, file) = (self.module(), self.file.to_owned());
            self.krate.references.push(Reference { module, path, file, line });
        }
    }
}

fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_alphabetic() || c == '_') && word != "as"
}

/// Words, `::` and single signs, each with its line.
fn words(text: &str) -> Vec<(String, usize)> {
    let mut words = Vec::new();
    let mut line = 1;
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == '\n' {
            line += 1;
        } else if c.is_alphanumeric() || c == '_' {
            let mut word = String::from(c);
            while let Some(next) = rest.next_if(|n| n.is_alphanumeric() || *n == '_') {
                word.push(next);
            }
            words.push((word, line));
        } else if c == ':' && rest.next_if_eq(&':').is_some() {
            words.push(("::".to_owned(), line));
        } else if !c.is_whitespace() {
            words.push((c.to_string(), line));
        }
    }
    words
}

/// Blanks comments, texts and single characters; lines stay where they are.
fn scrub(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let end = match at(i) {
            '/' if at(i + 1) == '/' => (i..chars.len()).find(|&j| at(j) == '\n').unwrap_or(chars.len()),
            '/' if at(i + 1) == '*' => end_of_block_comment(&chars, i),
            '"' => end_of_text(&chars, i),
            'r' if matches!(at(i + 1), '"' | '#') && !name_before(&chars, i) => {
                match end_of_raw_text(&chars, i + 1) {
                    Some(end) => end,
                    None => i,
                }
            }
            // A lifetime has no closing quote after one character.
            '\'' if at(i + 1) == '\\' => {
                (i + 3..chars.len()).find(|&j| at(j) == '\'').map_or(chars.len(), |end| end + 1)
            }
            '\'' if at(i + 2) == '\'' => i + 3,
            _ => i,
        };
        if end == i {
            out.push(at(i));
            i += 1;
        } else {
            out.extend(chars[i..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            i = end;
        }
    }
    out
}

/// Whether the letter at `i` ends a longer name. `b` and `c` before it make byte and C texts.
fn name_before(chars: &[char], i: usize) -> bool {
    let before = |n: usize| i.checked_sub(n).and_then(|j| chars.get(j)).copied().unwrap_or(' ');
    let in_name = |c: char| c.is_alphanumeric() || c == '_';
    in_name(before(1)) && (in_name(before(2)) || !matches!(before(1), 'b' | 'c'))
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let (mut depth, mut i) = (0, start);
    while i < chars.len() {
        match (chars.get(i), chars.get(i + 1)) {
            (Some('/'), Some('*')) => (depth, i) = (depth + 1, i + 2),
            (Some('*'), Some('/')) => {
                (depth, i) = (depth - 1, i + 2);
                if depth == 0 {
                    return i;
                }
            }
            _ => i += 1,
        }
    }
    chars.len()
}

fn end_of_text(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while let Some(c) = chars.get(i) {
        match c {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    chars.len()
}

fn end_of_raw_text(chars: &[char], hashes_at: usize) -> Option<usize> {
    let hashes = chars[hashes_at..].iter().take_while(|c| **c == '#').count();
    let open = hashes_at + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let closes = |j: usize| {
        chars[j] == '"' && chars[j + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes
    };
    Some((open + 1..chars.len()).find(|&j| closes(j)).map_or(chars.len(), |j| j + 1 + hashes))
}

/// Cuts out items under `#[cfg(test)]` and tells of modules so marked that stand in another file.
fn without_tests(text: &str, mut elsewhere: impl FnMut(&str)) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((at, mark)) =
        ["#[cfg(test)]", "#[cfg(all(test"].iter().filter_map(|mark| Some((rest.find(mark)?, mark))).min()
    {
        out.push_str(&rest[..at]);
        let item = &rest[at..];
        let mut end = item.len();
        // The item starts after its attributes and ends with its block, or with a `;` outside of brackets.
        let (mut braces, mut brackets) = (0_i32, 0_i32);
        for (i, c) in item.char_indices() {
            match c {
                '(' | '[' => brackets += 1,
                ')' | ']' => brackets -= 1,
                '{' => braces += 1,
                '}' => braces -= 1,
                _ => {}
            }
            let closed = (c == '}' || c == ';') && braces == 0 && brackets == 0;
            if closed || braces < 0 {
                end = if closed { i + 1 } else { i };
                break;
            }
        }
        let cut = &item[..end.max(mark.len())];
        if let [.., keyword, name, sign] = words(cut).as_slice()
            && keyword.0 == "mod"
            && sign.0 == ";"
        {
            elsewhere(&name.0);
        }
        out.extend(cut.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &item[cut.len()..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_texts_and_characters_are_blanked_in_place() {
        let text = "a /* x /* y */ z */ b // c\n\"d \\\" e\" f r#\"g \" h\"# i b\"j\" 'k' '\\'' &'l m r::n";
        assert_eq!(
            scrub(text).split_whitespace().collect::<Vec<_>>(),
            ["a", "b", "f", "i", "b", "&'l", "m", "r::n"]
        );
        assert_eq!(scrub(text).lines().count(), 2);
    }

    #[test]
    fn test_items_are_cut_and_nothing_more() {
        let mut named = Vec::new();
        let text = "#[cfg(test)]\n#[allow(x)]\nmod tests { fn a() { b[0]; } }\nfn kept(a: [u8; 3]) {}\n#[cfg(test)] mod far;\nkeep;";
        let left = without_tests(text, |name| named.push(name.to_owned()));
        assert!(!left.contains('b') && left.contains("fn kept") && left.contains("keep;"), "{left}");
        assert_eq!(named, ["far"]);
        assert_eq!(left.lines().count(), text.lines().count());
    }

    #[test]
    fn use_trees_give_every_branch() {
        let krate = crate_of(&[("lib.rs", "use a::{b::{self, C as D}, e::*}; fn f() { D::new(); }")]);
        let paths: Vec<String> =
            krate.references.iter().filter_map(|r| krate.outside(r)).map(|p| p.join("::")).collect();
        assert_eq!(paths, ["a::b", "a::b::C", "a::e", "a::b::C::new"]);
    }
}
