//! What cargo knows about this workspace.

use crate::run;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Our crates and where things are.
pub struct Workspace {
    /// The folder of the root manifest.
    pub root: PathBuf,
    /// The folder cargo builds into.
    pub target: PathBuf,
    /// Members, by name.
    pub members: Vec<Member>,
}

/// One crate of ours.
pub struct Member {
    /// The name of the package.
    pub name: String,
    /// The folder of its manifest.
    pub folder: PathBuf,
    /// Crates of ours it needs, with the kind of the need.
    pub needs: Vec<(String, Need)>,
}

/// What a dependency is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The program or library itself, or its build script.
    Product,
    /// Tests only.
    Tests,
}

/// The metadata of every package that is built for some target, with all our features.
///
/// Cargo.lock and cargo's metadata also hold packages that a feature only mentions (`ring?/std`), so this takes the
/// names from `cargo tree`, which resolves features as a build does.
pub fn packages() -> Result<Vec<Value>, String> {
    let mut tree = run::cargo();
    tree.args(["tree", "--locked", "--workspace", "--all-features", "--target", "all", "--edges", "all"]);
    tree.args(["--prefix", "none", "--format", "{p}"]);
    let tree = run::output(&mut tree)?;
    let built: BTreeSet<(&str, &str)> = tree
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.next()?.strip_prefix('v')?))
        })
        .collect();
    let mut json = metadata(&["--locked"])?;
    let mut packages = match json["packages"].take() {
        Value::Array(packages) => packages,
        _ => return Err("cargo metadata lists no packages".to_owned()),
    };
    packages.retain(|package| match (package["name"].as_str(), package["version"].as_str()) {
        (Some(name), Some(version)) => built.contains(&(name, version)),
        _ => true, // for the check to complain about
    });
    if packages.len() < built.len() {
        return Err(format!(
            "cargo tree names {} packages, cargo metadata {} of them",
            built.len(),
            packages.len()
        ));
    }
    Ok(packages)
}

/// The workspace without its dependencies; needs no network.
pub fn read() -> Result<Workspace, String> {
    let json = metadata(&["--no-deps"])?;
    let text = |value: &Value, key: &str| {
        value[key].as_str().map(str::to_owned).ok_or_else(|| format!("cargo metadata has no text `{key}`"))
    };
    let mut members = Vec::new();
    for package in json["packages"].as_array().into_iter().flatten() {
        let mut needs = Vec::new();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            if dependency["path"].is_string() {
                let need = if dependency["kind"] == "dev" { Need::Tests } else { Need::Product };
                needs.push((text(dependency, "name")?, need));
            }
        }
        let manifest = PathBuf::from(text(package, "manifest_path")?);
        let folder = manifest.parent().ok_or("a manifest without a folder")?.to_owned();
        members.push(Member { name: text(package, "name")?, folder, needs });
    }
    members.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Workspace {
        root: text(&json, "workspace_root")?.into(),
        target: text(&json, "target_directory")?.into(),
        members,
    })
}

fn metadata(flags: &[&str]) -> Result<Value, String> {
    let mut command = run::cargo();
    command.args(["metadata", "--format-version", "1"]).args(flags);
    let text = run::output(&mut command)?;
    serde_json::from_str(&text).map_err(|e| format!("cargo metadata is not JSON: {e}"))
}
