//! Licences, banned crates and sources of every dependency.
//!
//! The policy is deny.toml, in the words of cargo-deny, of which this understands the part that the file uses: so the
//! check costs a second here and not a build of several minutes, and cargo-deny says the same where somebody has it.

use crate::workspace;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Policy {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ban {
    name: String,
    reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Sources {
    unknown_registry: String,
    unknown_git: String,
}

/// Checks every package of the dependency tree, for all targets.
pub fn run() -> Result<(), String> {
    let path = workspace::read()?.root.join("deny.toml");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let policy: Policy = toml::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let packages = workspace::packages()?;
    let found: Vec<String> = packages.iter().flat_map(|package| check(&policy, package)).collect();
    if found.is_empty() {
        eprintln!("xtask: licences, bans and sources of {} packages are in order", packages.len());
        return Ok(());
    }
    for line in &found {
        eprintln!("licences: {line}");
    }
    Err(format!("{} packages are not in order; the policy is deny.toml", found.len()))
}

fn check(policy: &Policy, package: &Value) -> Vec<String> {
    let name = package["name"].as_str().unwrap_or("?");
    let told = format!("{name} {}", package["version"].as_str().unwrap_or("?"));
    let mut found = Vec::new();
    if let Some(ban) = policy.bans.deny.iter().find(|ban| ban.name == name) {
        found.push(format!("{told} is banned: {}", ban.reason));
    }
    match package["license"].as_str() {
        Some(expression) => match allowed(expression, &policy.licenses.allow) {
            Ok(true) => {}
            Ok(false) => found.push(format!("{told} has the licence `{expression}`, which is not allowed")),
            Err(reason) => found.push(format!("{told} has the licence `{expression}`: {reason}")),
        },
        None => found.push(format!("{told} names no licence")),
    }
    match package["source"].as_str() {
        None => {} // ours
        Some(source) if source.starts_with("registry+") && policy.sources.unknown_registry == "deny" => {}
        Some(source) if source.starts_with("git+") && policy.sources.unknown_git != "deny" => {}
        Some(source) => found.push(format!("{told} comes from {source}, not from the registry")),
    }
    found
}

/// Whether an SPDX expression can be met with allowed licences alone.
fn allowed(expression: &str, allow: &[String]) -> Result<bool, String> {
    // `MIT/Apache-2.0` is the old way to write OR.
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let verdict = any(&mut words, allow)?;
    match words.next() {
        None => Ok(verdict),
        Some(word) => Err(format!("`{word}` was not expected there")),
    }
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words<'_>, allow: &[String]) -> Result<bool, String> {
    let mut verdict = all(words, allow)?;
    while words.next_if_eq(&"OR").is_some() {
        verdict |= all(words, allow)?;
    }
    Ok(verdict)
}

fn all(words: &mut Words<'_>, allow: &[String]) -> Result<bool, String> {
    let mut verdict = one(words, allow)?;
    while words.next_if_eq(&"AND").is_some() {
        verdict &= one(words, allow)?;
    }
    Ok(verdict)
}

fn one(words: &mut Words<'_>, allow: &[String]) -> Result<bool, String> {
    match words.next() {
        Some("(") => {
            let verdict = any(words, allow)?;
            words.next_if_eq(&")").map(|_| verdict).ok_or_else(|| "a bracket is not closed".to_owned())
        }
        Some(licence) if !matches!(licence, ")" | "AND" | "OR" | "WITH") => {
            let mut licence = licence.to_owned();
            if words.next_if_eq(&"WITH").is_some() {
                let exception = words.next().ok_or("no exception after WITH")?;
                licence = format!("{licence} WITH {exception}");
            }
            // An exception only ever grants more than its licence.
            let plain = licence.split(" WITH ").next().unwrap_or_default();
            Ok(allow.iter().any(|a| *a == licence || a == plain))
        }
        _ => Err("a licence is missing".to_owned()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn verdict(expression: &str) -> Result<bool, String> {
        allowed(expression, &["MIT".to_owned(), "Apache-2.0".to_owned(), "Zlib".to_owned()])
    }

    #[test]
    fn expressions_are_weighed() {
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-3.0 OR MIT",
            "Apache-2.0 WITH LLVM-exception",
            "(MIT OR ISC) AND Zlib",
        ] {
            assert_eq!(verdict(good), Ok(true), "{good}");
        }
        for bad in ["GPL-3.0-only", "MIT AND ISC", "(ISC OR LGPL-2.1) AND MIT", "MITX"] {
            assert_eq!(verdict(bad), Ok(false), "{bad}");
        }
        for broken in ["", "(MIT", "MIT OR", "MIT MIT", "AND"] {
            assert!(verdict(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn a_ban_a_strange_source_and_a_missing_licence_are_each_named() {
        let policy: Policy = toml::from_str(
            "[licenses]\nallow = ['MIT']\n[bans]\ndeny = [{ name = 'ring', reason = 'one TLS' }]\n[sources]\nunknown-registry = 'deny'\nunknown-git = 'deny'",
        )
        .unwrap();
        let package =
            serde_json::json!({ "name": "ring", "version": "1.0.0", "source": "git+ssh://somewhere" });
        assert_eq!(check(&policy, &package).len(), 3);
        let ours = serde_json::json!({ "name": "model", "version": "0.1.0", "license": "MIT" });
        assert!(check(&policy, &ours).is_empty());
    }
}
