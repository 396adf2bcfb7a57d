//! Do the documents speak of what is there? A test, no chore.
//!
//! - A code span `crates/x/src/y.rs::Type::function` names a file and items that are defined in it, so the walks in
//!   ARCHITECTURE.md cannot outlive the code they walk through.
//! - A relative link leads to a file.

use std::fs;
use std::path::{Path, PathBuf};

/// The root of the project. Asked for when it runs: a build folder may outlive the clone that it was built in.
fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from("."), |xtask| Path::new(&xtask).join(".."))
}

/// Every Markdown file of the root and of `docs/`.
fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("docs")];
    let listed =
        |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    found.extend(listed(&root()).filter(|path| path.is_file()));
    while let Some(folder) = folders.pop() {
        for path in listed(&folder) {
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    found.sort();
    found
}

/// A text without its fenced and indented blocks.
fn prose(text: &str) -> String {
    let mut fenced = false;
    let mut kept = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced && !line.starts_with("    ") {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

/// Whether a source defines an item of this name.
fn defines(source: &str, name: &str) -> bool {
    ["fn", "struct", "enum", "trait", "const", "static", "type", "mod"].iter().any(|kind| {
        let wanted = format!("{kind} {name}");
        source.match_indices(&wanted).any(|(at, found)| {
            let ends =
                source[at + found.len()..].chars().next().is_none_or(|c| !c.is_alphanumeric() && c != '_');
            let begins = source[..at].chars().next_back().is_none_or(|c| !c.is_alphanumeric() && c != '_');
            ends && begins
        })
    })
}

/// What is wrong with the names and links of a text that lies in `folder`.
fn faults(folder: &Path, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let text = prose(text);
    for span in text.split('`').skip(1).step_by(2) {
        let mut parts = span.split("::");
        let Some(path) =
            parts.next().filter(|path| path.starts_with("crates/") || path.starts_with("xtask/"))
        else {
            continue;
        };
        // `crates/*/src` and folders speak of many files.
        if !path.ends_with(".rs") || path.contains('*') {
            continue;
        }
        match fs::read_to_string(root().join(path)) {
            Err(error) => faults.push(format!("`{span}`: {path}: {error}")),
            Ok(source) => {
                for name in parts.filter(|name| {
                    // A type that is defined elsewhere may have its functions here.
                    !defines(&source, name) && !source.contains(&format!("impl {name} "))
                }) {
                    faults.push(format!("`{span}`: {path} does not define {name}"));
                }
            }
        }
    }
    for (at, _) in text.match_indices("](") {
        let target: String = text[at + 2..].chars().take_while(|c| *c != ')' && *c != '\n').collect();
        let file = target.split('#').next().unwrap_or_default();
        if !file.is_empty() && !file.contains("://") && !folder.join(file).exists() {
            faults.push(format!("link to {target}: no such file"));
        }
    }
    faults
}

#[test]
fn documents_name_what_is_there() {
    let documents = documents();
    assert!(documents.iter().any(|path| path.ends_with("ARCHITECTURE.md")), "{documents:?}");
    let mut found = Vec::new();
    for path in &documents {
        let text = fs::read_to_string(path).unwrap_or_default();
        let folder = path.parent().unwrap_or(Path::new("."));
        found.extend(faults(folder, &text).into_iter().map(|fault| format!("{}: {fault}", path.display())));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_name_that_is_gone_is_found() {
    let here = root();
    let of = |text: &str| faults(&here, text).len();
    assert_eq!(
        of("`xtask/src/documents.rs::faults` and `cargo xtask test`, [a](Cargo.toml#x), [b](https://x.y)"),
        0
    );
    assert_eq!(of("`xtask/src/documents.rs::faultless`"), 1);
    assert_eq!(of("`xtask/src/documents.rs::fault`"), 1, "a part of a name is another name");
    assert_eq!(of("`xtask/src/nothing.rs::faults`"), 1);
    assert_eq!(of("[a](docs/nothing.md)"), 1);
    assert_eq!(of("```\n[a](docs/nothing.md)\n```"), 0);
}
