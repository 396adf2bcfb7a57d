//! The core reaches the outside only through the traits of `environment`.
//!
//! That is what makes it run under a simulator with a fixed clock, a crashing disk and a seed. Methods that reach out
//! without naming it (`path.exists()`) are not seen here; a review has to.

use super::place;
use super::source::Crate;

/// Crates that must not touch the outside themselves.
const CORE: &[&str] = &["model", "transfer", "storage-pool", "jobs"];

/// What counts as the outside: paths, or beginnings of paths.
const OUTSIDE: &[&[&str]] = &[
    &["std", "fs"],
    &["std", "net"],
    &["std", "os", "unix", "net"],
    &["std", "os", "unix", "fs"],
    &["std", "time", "SystemTime"],
    &["std", "time", "Instant"],
    &["std", "thread", "sleep"],
    &["rustix"],
    &["tokio"],
    &["rand"],
    &["getrandom"],
    &["fastrand"],
    &["tempfile"],
];

/// Modules of the core that are allowed to, with the reason. A module named `sys` always is: it is the place for a
/// system call that has no trait.
const EXCEPTIONS: &[(&str, &str, &str)] = &[];

/// Every reference out of a core crate that does not go through `environment`.
pub fn check(name: &str, krate: &Crate) -> Vec<String> {
    if !CORE.contains(&name) {
        return Vec::new();
    }
    let excepted = |module: &[String]| {
        let path = module.join("::");
        module.iter().any(|part| part == "sys") || EXCEPTIONS.iter().any(|(k, m, _)| *k == name && *m == path)
    };
    let mut found: Vec<String> = krate
        .references
        .iter()
        .filter(|reference| !excepted(&reference.module))
        .filter_map(|reference| {
            let outside = krate.outside(reference)?;
            let hit = OUTSIDE
                .iter()
                .any(|p| outside.len() >= p.len() && p.iter().zip(&outside).all(|(a, b)| a == b));
            hit.then(|| {
                format!(
                    "{}: `{name}` reaches for `{}`; go through `environment`",
                    place(reference),
                    outside.join("::")
                )
            })
        })
        .collect();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::super::source::crate_of;
    use super::*;

    #[test]
    fn a_clock_is_found_however_it_is_written() {
        let krate = crate_of(&[
            ("lib.rs", "mod a; mod b; mod c; mod sys;"),
            ("a.rs", "use std::time::{Duration, Instant};\nfn f() { Instant::now(); }"),
            ("b.rs", "use std::time;\nfn f() { time::SystemTime::now(); }"),
            ("c.rs", "use std::thread::{self as t};\nfn f() { t::sleep(d); }"),
            ("sys.rs", "use std::fs::File;"),
        ]);
        let found = check("storage-pool", &krate).join("\n");
        assert!(found.contains("a.rs:1") && found.contains("b.rs:2") && found.contains("c.rs:2"), "{found}");
        assert!(!found.contains("sys.rs") && !found.contains("Duration"), "{found}");
        assert!(check("cli", &krate).is_empty());
    }

    #[test]
    fn comments_texts_and_tests_do_not_count() {
        let krate = crate_of(&[(
            "lib.rs",
            "//! std::fs::read\nconst A: &str = \"std::fs::read\"; /* std::fs::read */\n#[cfg(test)]\nmod tests { use std::fs; }",
        )]);
        assert!(check("model", &krate).is_empty());
    }
}
