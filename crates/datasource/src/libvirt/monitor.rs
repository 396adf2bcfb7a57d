//! QEMU's own monitor (QMP), reached through libvirt: bitmaps in QEMU's memory for disks whose format keeps none.
//!
//! libvirt marks a machine as tainted (`custom-monitor`) by the first command until its process ends; docs/guide/libvirt.md says so.
//! What QEMU answers and the order of the commands were measured: docs/design/0022.

use serde_json::{Value, json};

use super::rpc::{Connection, Domain, LibvirtError};

/// Bytes of disk for a bit: that of QEMU's persistent bitmaps too.
const GRANULARITY: u64 = 64 * 1024;

/// A disk of a running machine as QEMU knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    /// QEMU's name of its device: ends in the alias that libvirt gave it.
    qdev: String,
    /// The node that bitmaps are on.
    pub(super) name: String,
    /// QEMU's word for the format.
    driver: String,
    /// Bytes that the guest sees.
    pub(super) size: u64,
    bitmaps: Vec<Bitmap>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Bitmap {
    name: String,
    is_good: bool,
}

impl Node {
    /// Whether it is the disk of this alias.
    pub(super) fn is_of(&self, alias: &str) -> bool {
        !alias.is_empty() && self.qdev.split('/').any(|part| part == alias)
    }

    /// Whether it is an image itself and not a filter before one.
    pub(super) fn is_image(&self, format: &str) -> bool {
        let driver = if format == "vhd" { "vpc" } else { format };
        self.driver == driver
    }

    /// Whether a bitmap of this name has recorded every change since it was made.
    pub(super) fn has(&self, bitmap: &str) -> bool {
        self.bitmaps.iter().any(|one| one.name == bitmap && one.is_good)
    }

    /// Names of bitmaps that begin so.
    pub(super) fn bitmaps(&self, begin: &str) -> Vec<String> {
        let names = self.bitmaps.iter().map(|bitmap| bitmap.name.clone());
        names.filter(|name| name.starts_with(begin)).collect()
    }
}

/// Gives a command. A refusal by QEMU is a text; one by libvirt an error.
fn command(
    connection: &mut Connection,
    domain: &Domain,
    command: &Value,
) -> Result<Result<Value, String>, LibvirtError> {
    let answer = connection.monitor(domain, &command.to_string())?;
    let answer: Value = serde_json::from_str(&answer)
        .map_err(|error| LibvirtError::Protocol(format!("QEMU's answer is no JSON: {error}")))?;
    if let Some(error) = answer.get("error") {
        let text = error.get("desc").and_then(Value::as_str).unwrap_or("no reason was given");
        return Ok(Err(text.to_owned()));
    }
    Ok(Ok(answer.get("return").cloned().unwrap_or_default()))
}

fn text(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn node(block: &Value) -> Option<Node> {
    let inserted = block.get("inserted")?;
    let is = |bitmap: &Value, name: &str| bitmap.get(name).and_then(Value::as_bool).unwrap_or(false);
    let bitmaps = inserted.get("dirty-bitmaps").and_then(Value::as_array).into_iter().flatten();
    Some(Node {
        qdev: text(block, "qdev"),
        name: text(inserted, "node-name"),
        driver: text(inserted, "drv"),
        size: inserted.get("image")?.get("virtual-size")?.as_u64()?,
        bitmaps: bitmaps
            .map(|bitmap| Bitmap {
                name: text(bitmap, "name"),
                is_good: is(bitmap, "recording")
                    && !is(bitmap, "busy")
                    && !is(bitmap, "inconsistent")
                    && bitmap.get("granularity").and_then(Value::as_u64) == Some(GRANULARITY),
            })
            .collect(),
    })
}

/// The disks of a machine. While a backup job runs they are filters, so they are asked for before.
pub(super) fn nodes(
    connection: &mut Connection,
    domain: &Domain,
) -> Result<Result<Vec<Node>, String>, LibvirtError> {
    let answer = command(connection, domain, &json!({"execute": "query-block"}))?;
    Ok(answer.map(|blocks| blocks.as_array().into_iter().flatten().filter_map(node).collect()))
}

/// Makes a bitmap of this name on each of the nodes, or on none.
pub(super) fn add(
    connection: &mut Connection,
    domain: &Domain,
    nodes: &[&Node],
    name: &str,
) -> Result<Result<(), String>, LibvirtError> {
    let actions: Vec<Value> = nodes
        .iter()
        .map(|node| {
            let data = json!({"node": node.name, "name": name, "granularity": GRANULARITY});
            json!({"type": "block-dirty-bitmap-add", "data": data})
        })
        .collect();
    let order = json!({"execute": "transaction", "arguments": {"actions": actions}});
    Ok(command(connection, domain, &order)?.map(drop))
}

/// Lets the NBD server of the running backup job show a copy of bitmap `base` of `node` beside the view of the disk, in an export `export`.
///
/// `view` is the node of that view. The copy does not record, so it may be read while the machine goes on.
pub(super) fn export(
    connection: &mut Connection,
    domain: &Domain,
    node: &Node,
    base: &str,
    copy: &str,
    view: &str,
    export: &str,
) -> Result<Result<(), String>, LibvirtError> {
    let made = json!({"node": node.name, "name": copy, "granularity": GRANULARITY, "disabled": true});
    let merged = json!({"node": node.name, "target": copy, "bitmaps": [base]});
    let actions = json!([
        {"type": "block-dirty-bitmap-add", "data": made},
        {"type": "block-dirty-bitmap-merge", "data": merged},
    ]);
    let order = json!({"execute": "transaction", "arguments": {"actions": actions}});
    if let Err(why) = command(connection, domain, &order)? {
        return Ok(Err(why));
    }
    let order = json!({"execute": "block-export-add", "arguments": {
        "type": "nbd", "id": export, "node-name": view, "name": export, "writable": false,
        "bitmaps": [{"node": node.name, "name": copy}],
    }});
    Ok(command(connection, domain, &order)?.map(drop))
}

/// Removes a bitmap; one that is gone is.
pub(super) fn remove(
    connection: &mut Connection,
    domain: &Domain,
    node: &Node,
    name: &str,
) -> Result<Result<(), String>, LibvirtError> {
    let arguments = json!({"node": node.name, "name": name});
    let order = json!({"execute": "block-dirty-bitmap-remove", "arguments": arguments});
    Ok(command(connection, domain, &order)?.map(drop))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// As QEMU 10.0 answers.
    const BLOCK: &str = r#"{"device": "", "qdev": "/machine/peripheral/virtio-disk0/virtio-backend", "inserted": {
        "node-name": "libvirt-3-format", "drv": "raw", "image": {"virtual-size": 268435456, "format": "raw"},
        "dirty-bitmaps": [
            {"name": "good", "recording": true, "persistent": false, "busy": false, "granularity": 65536, "count": 1},
            {"name": "busy", "recording": true, "persistent": false, "busy": true, "granularity": 65536, "count": 1},
            {"name": "off", "recording": false, "persistent": false, "busy": false, "granularity": 65536, "count": 1},
            {"name": "broken", "recording": true, "inconsistent": true, "busy": false, "granularity": 65536, "count": 1},
            {"name": "fine", "recording": true, "persistent": false, "busy": false, "granularity": 512, "count": 1}]}}"#;

    #[test]
    fn only_a_bitmap_that_recorded_everything_counts() {
        let found = node(&serde_json::from_str(BLOCK).unwrap()).unwrap();
        assert!(found.is_of("virtio-disk0") && !found.is_of("virtio-disk") && !found.is_of("virtio-disk01"));
        assert!(found.is_image("raw") && !found.is_image("vhdx"));
        assert_eq!(found.size, 256 << 20);
        for (name, is_good) in
            [("good", true), ("busy", false), ("off", false), ("broken", false), ("fine", false), ("", false)]
        {
            assert_eq!(found.has(name), is_good, "{name}");
        }
        assert_eq!(found.bitmaps("b"), ["busy", "broken"]);
        let bare =
            r#"{"qdev": "x", "inserted": {"node-name": "n", "drv": "vpc", "image": {"virtual-size": 512}}}"#;
        let bare = node(&serde_json::from_str(bare).unwrap()).unwrap();
        assert!(bare.is_image("vhd") && !bare.has("good"));
        assert_eq!(node(&serde_json::from_str(r#"{"device": "cd"}"#).unwrap()), None);
    }
}
