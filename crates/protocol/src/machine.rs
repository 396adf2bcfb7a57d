//! The definition of a machine made of image files, as the server first writes it and the host reads it.
//!
//! Afterwards the definition is text that only hosts read. `datasource::MachineSpec` is the reading side; a test of
//! the agent holds the two together.

use model::DatasourceId;

/// One image file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// Absolute path on the host.
    pub path: String,
    /// `raw`, `vhd`, `vhdx`, `qcow2`; by name and magic if absent.
    pub format: Option<String>,
}

/// The definition of a machine of the provider `images`.
pub fn images_definition(id: DatasourceId, name: &str, images: &[ImageFile], allow_backing: &[String]) -> String {
    let disks: Vec<serde_json::Value> = images
        .iter()
        .map(|image| match &image.format {
            Some(format) => serde_json::json!({ "path": image.path, "format": format }),
            None => serde_json::json!({ "path": image.path }),
        })
        .collect();
    serde_json::json!({
        "id": id,
        "name": name,
        "source": { "provider": "images", "disks": disks, "allow_backing": allow_backing },
    })
    .to_string()
}
