//! Which crate may use which.

use crate::workspace::{Member, Need};
use std::collections::BTreeSet;

/// The drawing in ARCHITECTURE.md as a table, left to right: a crate and what it may use directly.
/// Moving a wall means changing both, with the reason in docs/design/.
const ALLOWED: &[(&str, &str)] = &[
    ("xtask", ""),
    // Measures the machine, not us.
    ("bench", "model"),
    // The program wires: it alone may see every room.
    (
        "stillpoint",
        "cli server agent jobs datasource catalog storage-pool transfer filesystem disk-image protocol identity \
         block-io environment model nbd",
    ),
    ("cli", "protocol model"),
    ("server", "jobs catalog storage-pool transfer filesystem protocol identity block-io environment model"),
    ("agent", "datasource transfer protocol identity disk-image block-io environment model"),
    ("jobs", "catalog storage-pool transfer filesystem block-io environment model"),
    ("datasource", "disk-image block-io environment model nbd"),
    ("catalog", "environment model"),
    ("storage-pool", "block-io environment model"),
    ("transfer", "block-io environment model"),
    ("filesystem", "block-io model"),
    ("disk-image", "block-io model"),
    ("nbd", "block-io model"),
    ("protocol", "model"),
    // Keys and certificates of servers and agents.
    ("identity", "environment model"),
    ("block-io", "model"),
    ("environment", "model"),
    ("model", ""),
];

/// Every edge that the table does not allow.
pub fn check(members: &[Member]) -> Vec<String> {
    let mut found = Vec::new();
    for member in members {
        if row(&member.name).is_none() {
            found.push(format!("crate `{}` is not in the table of allowed edges", member.name));
            continue;
        }
        for (needed, need) in &member.needs {
            let allowed = match need {
                Need::Product => row(&member.name).is_some_and(|mut row| row.any(|used| used == needed)),
                // Tests of a crate may look at everything to its right.
                Need::Tests => reachable(&member.name).contains(needed.as_str()),
            };
            if !allowed {
                let kind = if *need == Need::Tests { "its tests use" } else { "uses" };
                found.push(format!("crate `{}` {kind} `{needed}`, which is not drawn", member.name));
            }
        }
    }
    found
}

fn row(name: &str) -> Option<impl Iterator<Item = &'static str>> {
    ALLOWED.iter().find(|(member, _)| *member == name).map(|(_, uses)| uses.split_whitespace())
}

fn reachable(from: &str) -> BTreeSet<&'static str> {
    let mut seen = BTreeSet::new();
    let mut open: Vec<&str> = vec![from];
    while let Some(next) = open.pop() {
        for used in row(next).into_iter().flatten() {
            if seen.insert(used) {
                open.push(used);
            }
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, needs: &[(&str, Need)]) -> Member {
        let needs = needs.iter().map(|(n, k)| ((*n).to_owned(), *k)).collect();
        Member { name: name.to_owned(), folder: "".into(), needs }
    }

    #[test]
    fn the_table_itself_has_no_cycle_and_no_unknown_name() {
        for (name, uses) in ALLOWED {
            assert!(!reachable(name).contains(name), "{name} reaches itself");
            for used in uses.split_whitespace() {
                assert!(row(used).is_some(), "{name} uses {used}, which has no row");
            }
        }
    }

    #[test]
    fn an_edge_against_the_direction_is_found() {
        let found = check(&[member("model", &[("block-io", Need::Product)])]);
        assert_eq!(found, ["crate `model` uses `block-io`, which is not drawn"]);
        assert!(check(&[member("block-io", &[("model", Need::Product)])]).is_empty());
    }

    #[test]
    fn tests_may_look_right_but_not_left() {
        let right = member("stillpoint", &[("disk-image", Need::Tests)]);
        assert!(check(&[right]).is_empty());
        assert_eq!(check(&[member("storage-pool", &[("jobs", Need::Tests)])]).len(), 1);
    }

    #[test]
    fn a_crate_without_a_row_is_found() {
        assert_eq!(check(&[member("helpers", &[])]).len(), 1);
    }
}
