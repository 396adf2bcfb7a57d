//! The `stillpoint` program: server, agent and command line in one.
fn main() {}
