//! The layer check: is the house still built as it is drawn in ARCHITECTURE.md?
//!
//! - [`edges`]: a crate uses only the crates that its row in the table allows.
//! - [`modules`]: no two modules beside each other need each other, directly or round a corner.
//! - [`outside`]: the core reaches files, clock, randomness and sockets only through `environment`.
//!
//! The last two read the sources themselves ([`source`]). They see `use` and written-out paths, not macros; that is
//! enough to notice a wall that moved, and needs no compiler.

mod edges;
mod modules;
mod outside;
mod source;

use crate::workspace;
use source::Reference;

/// Runs all three and lists everything found.
pub fn run() -> Result<(), String> {
    let house = workspace::read()?;
    let mut found = edges::check(&house.members);
    let mut modules_seen = 0;
    for member in &house.members {
        let krate = source::read_crate(&member.folder.join("src"))?;
        modules_seen += krate.modules.len();
        found.extend(modules::check(&member.name, &krate));
        found.extend(outside::check(&member.name, &krate));
    }
    if found.is_empty() {
        eprintln!("xtask: layers hold: {} crates, {modules_seen} modules", house.members.len());
        return Ok(());
    }
    for line in &found {
        eprintln!("layers: {line}");
    }
    Err(format!("{} places break the layers; the tables are in xtask/src/layers/", found.len()))
}

/// `file:line` of a reference, for a message.
fn place(reference: &Reference) -> String {
    format!("{}:{}", reference.file, reference.line)
}
