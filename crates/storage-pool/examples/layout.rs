//! How the newest point of each machine lies in a pool, and what writing scattered leaves again does to it.
//!
//! `layout POOL KIT [BUDGET-MIB]`: prints a line a point; with a budget the leaves are written again (as a writer).
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use environment::{FolderFiles, SystemClock, SystemRandomness};
use storage_pool::{Access, Pool, World, kit};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [pool, kit_path, budget @ ..] = words.as_slice() else { panic!("layout POOL KIT [BUDGET-MIB]") };
    let kit = kit::read(&std::fs::read_to_string(kit_path).unwrap()).unwrap().recipient;
    let world = World {
        files: Arc::new(FolderFiles::new(pool)),
        clock: Arc::new(SystemClock),
        randomness: Arc::new(SystemRandomness),
    };
    let access = match budget {
        [] => Access::Read,
        _ => Access::Write { server: [9; 16], name: "layout".to_owned() },
    };
    let pool = Arc::new(Pool::open(world, &kit, access).unwrap());
    let newest: std::collections::BTreeMap<_, _> =
        pool.state().in_order().map(|point| (point.datasource, point.id)).collect();
    for point in newest.into_values() {
        println!("{:?}", pool.layout(point).unwrap());
        if let [mib] = budget {
            println!("{:?}", pool.relay(point, None, mib.parse::<u64>().unwrap() << 20).unwrap());
            println!("{:?}", pool.layout(point).unwrap());
        }
    }
}
