//! The days of a generated disk (`testbed/make-workload.py`), block by block.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

/// Bytes of a block: the generator's granularity, and the pool's.
pub const BLOCK: usize = 65_536;

/// The content of a block that is not all zeros.
pub type Block = Arc<[u8]>;

/// A disk as it was on one day.
pub struct Version {
    /// `None`: zeros.
    pub blocks: Vec<Option<Block>>,
    /// Blocks with other content than the day before; on the first day, all with content. Ascending.
    pub changed: Vec<usize>,
}

fn content(bytes: &[u8]) -> Option<Block> {
    bytes.iter().any(|&byte| byte != 0).then(|| {
        let mut block = vec![0; BLOCK];
        block[..bytes.len()].copy_from_slice(bytes);
        block.into()
    })
}

/// Fills `buf` as far as the file goes.
fn read(file: &mut File, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut have = 0;
    while have < buf.len() {
        match file.read(&mut buf[have..])? {
            0 => break,
            more => have += more,
        }
    }
    Ok(have)
}

/// The days of `vm` below `folder`, from the first.
pub fn versions(folder: &Path, vm: &str) -> Result<Vec<Version>, String> {
    let place = folder.join(vm);
    let at = |name: String| place.join(name);
    let failed = |path: &Path| {
        let shown = path.display().to_string();
        move |error: std::io::Error| format!("{shown}: {error}")
    };
    let path = at("day1.raw".to_owned());
    let mut disk = File::open(&path).map_err(failed(&path))?;
    let mut blocks = Vec::new();
    let mut buf = vec![0; BLOCK];
    loop {
        let have = read(&mut disk, &mut buf).map_err(failed(&path))?;
        if have == 0 {
            break;
        }
        blocks.push(content(&buf[..have]));
    }
    let changed = (0..blocks.len()).filter(|&index| blocks[index].is_some()).collect();
    let mut days = vec![Version { blocks: blocks.clone(), changed }];
    for day in 2.. {
        let path = at(format!("day{day}.json"));
        let Ok(text) = std::fs::read(&path) else { break };
        let list: serde_json::Value =
            serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        let extents = list["extents"].as_array().ok_or(format!("{}: no extents", path.display()))?;
        let path = at(format!("day{day}.delta"));
        let mut delta = File::open(&path).map_err(failed(&path))?;
        let mut changed = Vec::new();
        for extent in extents {
            let number = |name: &str| extent[name].as_u64().unwrap_or(0) as usize / BLOCK;
            for index in number("start")..number("start") + number("length") {
                let past = || format!("{}: the list reaches past the disk", path.display());
                let block = blocks.get_mut(index).ok_or_else(past)?;
                if extent["type"] == "zero" {
                    *block = None;
                    continue;
                }
                if read(&mut delta, &mut buf).map_err(failed(&path))? < BLOCK {
                    return Err(format!("{}: is shorter than its list", path.display()));
                }
                *block = content(&buf);
                changed.push(index);
            }
        }
        days.push(Version { blocks: blocks.clone(), changed });
    }
    Ok(days)
}
