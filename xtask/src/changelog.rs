//! The changelog, put together from its fragments: changelog/README.md says what one looks like.

use crate::workspace;
use std::collections::BTreeMap;
use std::path::Path;

/// Kinds of change in the order they are printed.
const KINDS: &[&str] = &["Security", "Fixed", "Changed", "Removed", "Added"];

/// Prints the changelog, or only checks its fragments.
pub fn run(check_only: bool) -> Result<(), String> {
    let folder = workspace::read()?.root.join("changelog");
    let mut releases: Vec<String> = entries(&folder)?
        .into_iter()
        .filter(|name| name != "unreleased" && folder.join(name).is_dir())
        .collect();
    releases.sort_by_key(|name| std::cmp::Reverse(version(name)));
    let mut text = "# Changelog\n".to_owned();
    for release in ["unreleased".to_owned()].into_iter().chain(releases) {
        text += &section(&release, &read(&folder.join(&release))?)?;
    }
    if !check_only {
        print!("{text}");
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))? {
        let entry = entry.map_err(|e| format!("{}: {e}", folder.display()))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// The fragments of one release: name and contents.
fn read(folder: &Path) -> Result<Vec<(String, String)>, String> {
    let names = entries(folder)?.into_iter().filter(|name| !name.starts_with('.'));
    names
        .map(|name| {
            let path = folder.join(&name);
            let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            Ok((name, text))
        })
        .collect()
}

/// `1.10.0_2027-01-31` sorts after `1.9.0_..`.
fn version(folder: &str) -> Vec<u64> {
    folder.split(['.', '_', '-']).map(|part| part.parse().unwrap_or(0)).collect()
}

fn section(release: &str, fragments: &[(String, String)]) -> Result<String, String> {
    let mut by_kind: BTreeMap<usize, String> = BTreeMap::new();
    for (name, text) in fragments {
        let (kind, entry) = parse(text).map_err(|reason| format!("changelog/{release}/{name}: {reason}"))?;
        *by_kind.entry(kind).or_default() += &entry;
    }
    let title = match release.split_once('_') {
        Some((version, date)) => format!("{version} ({date})"),
        None => "Unreleased".to_owned(),
    };
    let mut text = format!("\n## {title}\n");
    for (kind, entries) in by_kind {
        text += &format!("\n### {}\n\n{entries}", KINDS.get(kind).copied().unwrap_or_default());
    }
    Ok(text)
}

/// A fragment as the number of its kind and its entry in the list.
fn parse(text: &str) -> Result<(usize, String), String> {
    let mut lines = text.lines();
    let head = lines.next().unwrap_or_default();
    let (kind, title) = head.split_once(": ").ok_or("the first line is not `Kind: sentence`")?;
    let kind = KINDS
        .iter()
        .position(|k| *k == kind)
        .ok_or_else(|| format!("the kind `{kind}` is none of {}", KINDS.join(", ")))?;
    if title.chars().count() > 80 || title.trim().is_empty() || title.ends_with('.') {
        return Err("the title has 1 to 80 characters and no full stop".to_owned());
    }
    if lines.next().is_some_and(|line| !line.is_empty()) {
        return Err("the second line is not empty".to_owned());
    }
    let body: Vec<&str> = lines.collect();
    if body.iter().all(|line| line.trim().is_empty()) {
        return Err("there is no text below the title".to_owned());
    }
    let mut entry = format!("- **{title}.**");
    for line in body {
        entry += if line.is_empty() { "\n" } else { "\n  " };
        entry += line;
    }
    entry.push('\n');
    Ok((kind, entry))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn fragments_become_a_list_by_kind() {
        let fragments = [
            ("a.md".to_owned(), "Added: Disks\n\nOne can.\nTwo too.\n".to_owned()),
            ("b.md".to_owned(), "Fixed: Holes\n\nGone.\n".to_owned()),
        ];
        let text = section("0.2.0_2027-01-31", &fragments).unwrap();
        assert_eq!(
            text,
            "\n## 0.2.0 (2027-01-31)\n\n### Fixed\n\n- **Holes.**\n  Gone.\n\n### Added\n\n- **Disks.**\n  One can.\n  Two too.\n"
        );
    }

    #[test]
    fn malformed_fragments_are_refused() {
        for bad in ["", "Added\n\nx", "New: x\n\nx", "Added: x.\n\nx", "Added: x\nx", "Added: x\n\n"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn releases_sort_by_number() {
        assert!(version("1.10.0_2027-01-01") > version("1.9.0_2028-01-01"));
    }
}
