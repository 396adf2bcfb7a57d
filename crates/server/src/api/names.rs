//! What a typed name means. Pure functions over plain lists: the one place where names are resolved.
//!
//! A datasource or host: the full id, then NAME or HOST/NAME, then a unique prefix of an id. A point: an id or unique
//! prefix, `latest`, or `@TIME`. What means two things is refused with the candidates, never guessed.

use model::{Code, Consistency, PointState, Problem, RecoveryPointId, Timestamp};
use protocol::api::Time;

/// The fewest digits of an id that count as a prefix; fewer would turn typing errors into hits.
pub const PREFIX_DIGITS: usize = 4;
/// The longest name of a datasource or host, in bytes.
pub const NAME_BYTES: usize = 255;
/// Candidates listed in a message.
const CANDIDATES: usize = 10;

/// Something with an id and a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named<'a> {
    /// Its id as text.
    pub id: &'a str,
    /// Its name.
    pub name: &'a str,
    /// The host or cluster it is on.
    pub host: Option<&'a str>,
}

/// A point, as far as its name goes. Lists of them are in the pool's order, oldest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamedPoint {
    /// The point.
    pub id: RecoveryPointId,
    /// When it was taken.
    pub time: Timestamp,
    /// Its state.
    pub state: PointState,
    /// Its consistency.
    pub consistency: Consistency,
}

/// Whether `name` may be given to a datasource: it must stay tellable from ids, options and points.
pub fn check_name(name: &str) -> Result<(), Problem> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > NAME_BYTES {
        "it is longer than 255 bytes"
    } else if name.chars().any(char::is_control) {
        "it has control characters"
    } else if name.contains(['/', '\\', ':']) {
        "it has a slash, backslash or colon"
    } else if name.starts_with(['@', '-', '.']) || name.trim() != name {
        "it begins with @, - or a dot, or has spaces around it"
    } else if name == "latest" || (name.len() == 32 && name.bytes().all(|c| c.is_ascii_hexdigit())) {
        "it could be taken for an id or a point"
    } else {
        return Ok(());
    };
    Err(Problem::new(Code::Usage, format!("{:?} cannot be a name: {reason}.", shortened(name)))
        .hint("Use letters, digits, dots, dashes and spaces."))
}

/// Finds the one `what` (`datasource`, `host`, `job`) that `text` means; the answer is its place in `all`.
pub fn resolve(what: &str, text: &str, all: &[Named<'_>]) -> Result<usize, Problem> {
    let hits = |test: &dyn Fn(&Named<'_>) -> bool| -> Vec<usize> {
        all.iter().enumerate().filter(|(_, item)| test(item)).map(|(at, _)| at).collect()
    };
    let with_host = |item: &Named<'_>| {
        text.split_once('/').is_some_and(|(host, name)| item.host == Some(host) && item.name == name)
    };
    let mut found = hits(&|item| item.id == text);
    if found.is_empty() {
        found = hits(&|item| item.name == text || with_host(item));
    }
    if found.is_empty() && is_prefix(text) {
        found = hits(&|item| item.id.starts_with(text));
    }
    match found.as_slice() {
        [one] => Ok(*one),
        [] => Err(not_found(what, text)),
        many => Err(ambiguous(
            what,
            text,
            many.iter().filter_map(|&at| all.get(at)).map(|item| match item.host {
                Some(host) => format!("{} ({host}/{})", item.id, item.name),
                None if item.name.is_empty() => item.id.to_owned(),
                None => format!("{} ({})", item.id, item.name),
            }),
        )),
    }
}

/// Finds the point that `text` means; the answer is its place in `all`.
///
/// `of` is the name of the datasource whose points `all` are; without it `all` are everyone's, and only ids mean
/// something. `latest` skips what is damaged, suspect, incomplete or deleted; `@TIME` only what is not there (any
/// more), so that a recovery of a damaged point is refused by its name and not quietly turned into an older one.
pub fn point(
    text: &str,
    of: Option<&str>,
    all: &[NamedPoint],
    min_consistency: Option<Consistency>,
) -> Result<usize, Problem> {
    let at = if text == "latest" || text.starts_with('@') {
        let Some(of) = of else {
            return Err(Problem::new(Code::Usage, format!("{text:?} needs a datasource."))
                .about(text)
                .hint("Name the datasource, or use the point's id."));
        };
        if text == "latest" {
            all.iter().rposition(|point| point.state.counts_as_latest()).ok_or_else(|| {
                Problem::new(Code::NotFound, format!("{of} has no good recovery point."))
                    .about(of)
                    .hint(format!("See what there is: `stillpoint recovery-point list {of}`."))
            })?
        } else {
            let wanted: Time = text
                .get(1..)
                .unwrap_or_default()
                .parse()
                .map_err(|reason: String| Problem::new(Code::Usage, format!("{reason}.")).about(text))?;
            // A typed time has whole seconds; a point of that very second counts.
            let until = wanted.0.0.saturating_add(Timestamp::SECOND - 1);
            all.iter()
                .rposition(|point| {
                    point.time.0 <= until
                        && !matches!(
                            point.state,
                            PointState::Receiving | PointState::SoftDeleted | PointState::Expired
                        )
                })
                .ok_or_else(|| {
                    Problem::new(Code::NotFound, format!("{of} has no recovery point at or before {wanted}."))
                        .about(of)
                })?
        }
    } else {
        let ids: Vec<String> = all.iter().map(|point| point.id.to_string()).collect();
        let named: Vec<Named<'_>> = ids.iter().map(|id| Named { id, name: "", host: None }).collect();
        if text.is_empty() {
            return Err(not_found("recovery point", text));
        }
        resolve("recovery point", text, &named)?
    };
    match (min_consistency, all.get(at)) {
        (Some(least), Some(point)) if point.consistency < least => Err(Problem::new(
            Code::BelowConsistency,
            format!(
                "Recovery point {} has consistency {}, {} was asked for at least.",
                point.id,
                point.consistency.word(),
                least.word()
            ),
        )
        .about(point.id.to_string())),
        _ => Ok(at),
    }
}

fn is_prefix(text: &str) -> bool {
    (PREFIX_DIGITS..=32).contains(&text.len()) && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

fn not_found(what: &str, text: &str) -> Problem {
    let text = shortened(text);
    Problem::new(Code::NotFound, format!("There is no {what} {text:?}.")).about(text)
}

fn ambiguous(what: &str, text: &str, candidates: impl Iterator<Item = String>) -> Problem {
    let all: Vec<String> = candidates.collect();
    let listed = all.iter().take(CANDIDATES).cloned().collect::<Vec<_>>().join(", ");
    let rest = match all.len().saturating_sub(CANDIDATES) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Problem::new(Code::Ambiguous, format!("{text:?} means {} {what}s: {listed}{rest}.", all.len()))
        .about(text)
}

/// A typed text, short enough for a message.
fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const IDS: [&str; 3] = [
        "aaaa0000000000000000000000000000",
        "aaaa1111111111111111111111111111",
        "bbbb0000000000000000000000000000",
    ];

    fn machines() -> Vec<Named<'static>> {
        vec![
            Named { id: IDS[0], name: "web", host: Some("hv1") },
            Named { id: IDS[1], name: "web", host: Some("hv2") },
            Named { id: IDS[2], name: "aaaa1", host: None },
        ]
    }

    #[test]
    fn a_name_means_one_thing_or_is_refused_with_candidates() {
        let all = machines();
        for (text, found) in [
            ("hv1/web", Ok(0)),
            ("hv2/web", Ok(1)),
            (IDS[1], Ok(1)),
            ("bbbb", Ok(2)),
            ("aaaa1", Ok(2)),
            ("aaaa11", Ok(1)),
            ("web", Err(Code::Ambiguous)),
            ("aaaa", Err(Code::Ambiguous)),
            ("bbb", Err(Code::NotFound)),
            ("", Err(Code::NotFound)),
            ("hv3/web", Err(Code::NotFound)),
            ("BBBB", Err(Code::NotFound)),
        ] {
            assert_eq!(resolve("datasource", text, &all).map_err(|p| p.code), found, "{text}");
        }
        let message = resolve("datasource", "web", &all).unwrap_err().message;
        assert!(message.contains("hv1/web") && message.contains("hv2/web"), "{message}");
    }

    fn points() -> Vec<NamedPoint> {
        use Consistency::{Application, Crash};
        use PointState::{Committed, Damaged, SoftDeleted, Suspect, Verified};
        [
            (10_500_000, Verified, Application),
            (20_000_000, Committed, Crash),
            (30_000_000, Damaged, Crash),
            (40_000_000, Suspect, Crash),
            (50_000_000, SoftDeleted, Crash),
        ]
        .iter()
        .enumerate()
        .map(|(at, &(time, state, consistency))| NamedPoint {
            id: RecoveryPointId([at as u8; 16]),
            time: Timestamp(time),
            state,
            consistency,
        })
        .collect()
    }

    #[test]
    fn points_by_latest_time_and_prefix() {
        let all = points();
        let find = |text: &str, least| point(text, Some("web"), &all, least).map_err(|p| p.code);
        assert_eq!(find("latest", None), Ok(1), "damaged, suspect and deleted ones do not count");
        assert_eq!(find("@1970-01-01T00:00:10Z", None), Ok(0), "a point of that very second counts");
        assert_eq!(find("@1970-01-01T00:00:09Z", None), Err(Code::NotFound));
        assert_eq!(find("@1970-01-01T00:00:35Z", None), Ok(2), "damaged, and refused by its name later");
        assert_eq!(find("@2000-01-01T00:00:00Z", None), Ok(3), "deleted ones are not there");
        assert_eq!(find("@yesterday", None), Err(Code::Usage));
        assert_eq!(find("0404", None), Ok(4));
        assert_eq!(find("latest", Some(Consistency::File)), Err(Code::BelowConsistency));
        assert_eq!(point("latest", None, &all, None).map_err(|p| p.code), Err(Code::Usage));
    }

    #[test]
    fn names_that_could_mean_something_else_are_refused() {
        for good in ["web", "Web Server 1", "vm-1.example", "Größe"] {
            check_name(good).unwrap();
        }
        for bad in ["", "a/b", "latest", "@x", "-x", " x", "a\nb", "..", "c:d", IDS[0], &"x".repeat(256)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
