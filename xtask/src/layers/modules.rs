//! Modules beside each other must not need each other in a circle.
//!
//! A reference from `a::x` to `b::y` is an edge between `a` and `b`, wherever in the tree they are siblings. What a
//! child takes from its parent's own file, and a parent from its children, is no edge: they are one room. A name that
//! a parent passes on (`pub use b::Thing`) leads to where it comes from.

use super::place;
use super::source::{Crate, Reference};
use std::collections::{BTreeMap, BTreeSet};

/// Circles that are wanted, with the reason: crate, the modules, why. One that is gone must leave this table.
const EXCEPTIONS: &[(&str, &[&str], &str)] = &[];

type Graph<'a> = BTreeMap<String, BTreeMap<String, &'a Reference>>;

/// Every circle of modules in a crate.
pub fn check(name: &str, krate: &Crate) -> Vec<String> {
    let mut found = Vec::new();
    let mut excused = BTreeSet::new();
    let graph = graph(krate);
    for circle in circles(&graph) {
        let excuse = EXCEPTIONS.iter().find(|(k, modules, _)| *k == name && circle.iter().eq(modules.iter()));
        if let Some((_, modules, _)) = excuse {
            excused.insert(*modules);
            continue;
        }
        let mut edges = Vec::new();
        for from in &circle {
            for to in circle.iter().filter(|to| *to != from) {
                if let Some(reference) = graph.get(from).and_then(|edges| edges.get(to)) {
                    edges.push(format!("{from} -> {to} at {}", place(reference)));
                }
            }
        }
        found.push(format!("crate `{name}`: modules need each other: {}", edges.join("; ")));
    }
    for (_, modules, _) in
        EXCEPTIONS.iter().filter(|(k, modules, _)| *k == name && !excused.contains(modules))
    {
        found.push(format!(
            "crate `{name}`: the excepted circle of {} is gone; drop the exception",
            modules.join(", ")
        ));
    }
    found
}

/// Edges between siblings, by their full paths.
fn graph(krate: &Crate) -> Graph<'_> {
    let mut graph = Graph::new();
    for reference in &krate.references {
        let Some(target) = krate.module_of(reference) else { continue };
        let shared = reference.module.iter().zip(&target).take_while(|(a, b)| a == b).count();
        if let (Some(from), Some(to)) = (reference.module.get(..=shared), target.get(..=shared)) {
            graph.entry(from.join("::")).or_default().entry(to.join("::")).or_insert(reference);
        }
    }
    graph
}

/// Sets of modules that reach each other, each sorted.
fn circles(graph: &Graph<'_>) -> BTreeSet<Vec<String>> {
    let reach: BTreeMap<&String, BTreeSet<&String>> = graph
        .keys()
        .map(|from| {
            let mut seen = BTreeSet::new();
            let mut open = vec![from];
            while let Some(next) = open.pop() {
                for to in graph.get(next).into_iter().flat_map(BTreeMap::keys) {
                    if seen.insert(to) {
                        open.push(to);
                    }
                }
            }
            (from, seen)
        })
        .collect();
    let reaches = |a: &String, b: &String| reach.get(a).is_some_and(|seen| seen.contains(b));
    let mut circles = BTreeSet::new();
    for from in graph.keys().filter(|from| reaches(from, from)) {
        circles.insert(graph.keys().filter(|to| reaches(from, to) && reaches(to, from)).cloned().collect());
    }
    circles
}

#[cfg(test)]
mod tests {
    use super::super::source::crate_of;
    use super::*;

    #[test]
    fn a_circle_over_three_modules_is_found_with_its_places() {
        let krate = crate_of(&[
            ("lib.rs", "mod a; mod b; mod c; mod d;"),
            ("a.rs", "use crate::b::B;\npub struct A;"),
            ("b.rs", "\nuse super::c;\npub struct B;"),
            ("c/mod.rs", "mod deep;"),
            ("c/deep.rs", "fn f(a: &crate::a::A) {}"),
            ("d.rs", "use crate::a::A;"),
        ]);
        let found = check("any", &krate);
        assert_eq!(
            found,
            [
                "crate `any`: modules need each other: a -> b at a.rs:1; b -> c at b.rs:2; c -> a at c/deep.rs:1"
            ]
        );
    }

    #[test]
    fn a_name_passed_on_by_the_parent_leads_to_its_home() {
        let krate = crate_of(&[
            ("lib.rs", "mod a; mod b; pub use a::{A, other::Z as Y}; pub use b::B;"),
            ("a.rs", "use crate::B; pub struct A;"),
            ("b.rs", "use super::{A}; pub struct B;"),
        ]);
        assert_eq!(check("any", &krate).len(), 1);
    }

    #[test]
    fn siblings_below_count_and_tests_parents_and_children_do_not() {
        let below = crate_of(&[
            ("lib.rs", "mod p;"),
            ("p.rs", "mod x; mod y;"),
            ("p/x.rs", "use super::y;"),
            ("p/y.rs", "use crate::p::x::X;"),
        ]);
        assert_eq!(check("any", &below).len(), 1);
        let fine = crate_of(&[
            ("lib.rs", "mod a; mod b; const K: u8 = 1; use a::A;"),
            ("a.rs", "use crate::{K, b::B}; mod in_it; use in_it::I; #[cfg(test)] mod tests;"),
            ("a/in_it.rs", "use super::A; pub struct I;"),
            ("a/tests.rs", "use crate::b;"),
            ("b.rs", "use crate::K; #[cfg(test)]\nmod tests { use crate::a::A; }"),
        ]);
        assert_eq!(check("any", &fine), Vec::<String>::new());
    }
}
