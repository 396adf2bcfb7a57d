//! From the words of jobs and pool to those of the API.

use std::borrow::Cow;

use model::Problem;
use protocol::api;
use serde::Deserialize;

/// The image format that a disk's description names: text that is the host's, of which the server shows this one word.
pub(crate) fn image_format(description: &str) -> String {
    #[derive(Deserialize)]
    struct Described<'a> {
        #[serde(borrow)]
        format: Cow<'a, str>,
    }
    serde_json::from_str::<Described<'_>>(description)
        .ok()
        .map(|it| it.format.into_owned())
        .unwrap_or_default()
}

/// Damage of the pool for people.
pub(crate) fn damage(damage: &storage_pool::Damage) -> api::Damage {
    match damage {
        storage_pool::Damage::File { path, offset, reason, derived } => api::Damage {
            file: path.clone(),
            datasource: String::new(),
            recovery_point: None,
            disk: None,
            offset: *offset,
            length: 0,
            reason: if *derived { format!("{reason}; derived: it is made again") } else { reason.clone() },
        },
        storage_pool::Damage::Point { point, machine, disk, range, reason } => api::Damage {
            file: String::new(),
            datasource: machine.clone(),
            recovery_point: Some(*point),
            disk: Some(*disk),
            offset: range.start,
            length: range.len(),
            reason: reason.clone(),
        },
    }
}

/// What a transfer counted.
pub(crate) fn transfer_figures(figures: &transfer::Figures, stored: u64) -> api::Figures {
    api::Figures {
        bytes_logical: Some(figures.bytes_logical),
        bytes_listed: Some(figures.bytes_listed),
        bytes_read: Some(figures.bytes_read),
        bytes_audited: Some(figures.bytes_audited),
        bytes_changed: Some(figures.bytes_changed),
        bytes_transferred: Some(figures.bytes_transferred),
        bytes_stored: Some(stored),
        ..api::Figures::default()
    }
}

/// Puts damage into figures, as much as a line can hold.
pub(crate) fn list_damage(figures: &mut api::Figures, all: &[storage_pool::Damage]) {
    figures.damage = all.iter().take(api::Figures::DAMAGE_ITEMS).map(damage).collect();
    let left = all.len().saturating_sub(api::Figures::DAMAGE_ITEMS);
    figures.damage_unlisted = (left > 0).then_some(left as u64);
}

/// A warning that points were lost in part.
pub(crate) fn damage_warning(message: String) -> Problem {
    Problem::new(model::Code::PoolDamaged, message)
}
