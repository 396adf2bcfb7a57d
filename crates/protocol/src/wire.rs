//! Between the generated messages and the words of `model`: problems, versions, limits.
//!
//! What comes from the other side is checked here once: ids have 16 bytes, a problem's code is one of ours.

use crate::v0;
use model::{Code, Consistency, Problem, Unfrozen};
use tonic::Status;

/// The lowest version of the protocol that this program speaks.
pub const LOWEST_VERSION: u32 = 0;
/// The highest version of the protocol that this program speaks.
pub const HIGHEST_VERSION: u32 = 0;
/// Largest payload of one data packet.
pub const PAYLOAD_BYTES: usize = 1 << 20;
/// Largest encoded packet or control message that is read: a payload and the few bytes around it.
pub const MESSAGE_BYTES: usize = PAYLOAD_BYTES + 64 * 1024;
/// Most ranges of one order, all its pages together (16 million changes of 64 KiB are a terabyte).
pub const LIST_RANGES: usize = 1 << 24;
/// Ranges in one page of a list: at 20 bytes each at most, well under [`MESSAGE_BYTES`].
pub const PAGE_RANGES: usize = 32 * 1024;
/// Receive window of a stream. The default of 64 KiB stalls on real networks: 16 MiB carry 400 MB/s over 40 ms.
pub const STREAM_WINDOW: u32 = 16 << 20;
/// Receive window of a connection.
pub const CONNECTION_WINDOW: u32 = 32 << 20;
/// Largest HTTP/2 frame.
pub const FRAME_BYTES: u32 = 1 << 20;
/// Longest text from the other side that is kept (host name, message of a problem).
const TEXT_CHARACTERS: usize = 4096;

#[allow(clippy::unnecessary_min_or_max)] // Not for ever: these are the bounds that will move.
/// The version to speak with a side that speaks `lowest..=highest`: the highest common one.
pub fn choose_version(lowest: u32, highest: u32) -> Result<u32, Problem> {
    let version = highest.min(HIGHEST_VERSION);
    if version < lowest.max(LOWEST_VERSION) {
        return Err(Problem::new(
            Code::ProtocolVersion,
            format!(
                "The other side speaks protocol versions {lowest} to {highest}, this program {LOWEST_VERSION} to \
                 {HIGHEST_VERSION}."
            ),
        ));
    }
    Ok(version)
}

/// Text of the other side, cut to a length that fits a log line or a table, without control characters.
pub fn tame(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TEXT_CHARACTERS).collect()
}

/// An id from the wire; the problem [`Code::ProtocolBroken`] if it has not 16 bytes.
pub fn id<'a, T: TryFrom<&'a [u8], Error = model::id::NotAnId>>(
    what: &str,
    bytes: &'a [u8],
) -> Result<T, Problem> {
    T::try_from(bytes).map_err(|_| broken(format!("The {what} has {} bytes, expected 16.", bytes.len())))
}

/// The other side did what the protocol does not allow.
pub fn broken(message: impl Into<String>) -> Problem {
    Problem::new(Code::ProtocolBroken, message)
}

impl From<&Problem> for v0::Problem {
    fn from(problem: &Problem) -> v0::Problem {
        v0::Problem {
            code: u32::from(problem.code.number()),
            message: problem.message.clone(),
            object: problem.object.clone(),
            hint: problem.hint.clone(),
        }
    }
}

impl From<v0::Problem> for Problem {
    fn from(problem: v0::Problem) -> Problem {
        let known = Code::ALL.iter().copied().find(|code| u32::from(code.number()) == problem.code);
        let message = match known {
            Some(_) => tame(&problem.message),
            // A newer program on the other side.
            None => format!("SP-{:04}: {}", problem.code, tame(&problem.message)),
        };
        Problem {
            code: known.unwrap_or(Code::Internal),
            message,
            object: tame(&problem.object),
            hint: tame(&problem.hint),
        }
    }
}

/// A problem as the end of a call. The whole problem goes into the status' details.
pub fn to_status(problem: &Problem) -> Status {
    let code = match problem.code {
        Code::Unauthorised | Code::TokenRefused | Code::HostRevoked | Code::CertificateExpired => {
            tonic::Code::PermissionDenied
        }
        Code::ProtocolVersion => tonic::Code::Unimplemented,
        Code::ProtocolBroken => tonic::Code::InvalidArgument,
        Code::NoContact | Code::AgentUnreachable => tonic::Code::Unavailable,
        Code::Internal => tonic::Code::Internal,
        _ => tonic::Code::FailedPrecondition,
    };
    let details = prost::Message::encode_to_vec(&v0::Problem::from(problem));
    // Header values are short; the details hold the rest.
    let message: String = problem.message.chars().take(200).collect();
    Status::with_details(code, message, details.into())
}

/// The problem that ended a call; without one in the details, the connection was lost ([`Code::NoContact`]) or the
/// other side is not ours ([`Code::ProtocolBroken`]).
pub fn from_status(status: &Status) -> Problem {
    if let Ok(problem) = <v0::Problem as prost::Message>::decode(status.details())
        && problem.code != 0
    {
        return problem.into();
    }
    let code = match status.code() {
        tonic::Code::Unimplemented | tonic::Code::InvalidArgument | tonic::Code::OutOfRange => {
            Code::ProtocolBroken
        }
        _ => Code::NoContact,
    };
    Problem::new(code, format!("The call failed: {} ({:?}).", tame(status.message()), status.code()))
}

impl From<Consistency> for v0::Consistency {
    fn from(level: Consistency) -> v0::Consistency {
        match level {
            Consistency::Crash => v0::Consistency::Crash,
            Consistency::File => v0::Consistency::File,
            Consistency::Application => v0::Consistency::Application,
            Consistency::Offline => v0::Consistency::Offline,
        }
    }
}

impl From<Unfrozen> for v0::Unfrozen {
    fn from(choice: Unfrozen) -> v0::Unfrozen {
        match choice {
            Unfrozen::Crash => v0::Unfrozen::Crash,
            Unfrozen::Fail => v0::Unfrozen::Fail,
            Unfrozen::Pause => v0::Unfrozen::Pause,
        }
    }
}

impl From<v0::Unfrozen> for Unfrozen {
    fn from(choice: v0::Unfrozen) -> Unfrozen {
        match choice {
            v0::Unfrozen::Crash => Unfrozen::Crash,
            v0::Unfrozen::Fail => Unfrozen::Fail,
            v0::Unfrozen::Pause => Unfrozen::Pause,
        }
    }
}

impl v0::Consistency {
    /// The level in our words; `None` if unspecified.
    pub fn level(self) -> Option<Consistency> {
        match self {
            v0::Consistency::Unspecified => None,
            v0::Consistency::Crash => Some(Consistency::Crash),
            v0::Consistency::File => Some(Consistency::File),
            v0::Consistency::Application => Some(Consistency::Application),
            v0::Consistency::Offline => Some(Consistency::Offline),
        }
    }
}

impl From<model::ByteRange> for v0::Range {
    fn from(range: model::ByteRange) -> v0::Range {
        v0::Range { offset: range.start, length: range.end.saturating_sub(range.start) }
    }
}

/// Takes long lists out of an order: the pages to send before the command.
pub fn take_pages(command: &mut v0::Command) -> Vec<v0::ListPage> {
    let mut pages = Vec::new();
    let id = command.id;
    if let Some(v0::command::Kind::Send(order)) = &mut command.kind {
        for disk in &mut order.disks {
            let Some(v0::disk_read::Mode::Extents(list)) = &mut disk.mode else { continue };
            if list.ranges.len() <= PAGE_RANGES / 32 {
                continue;
            }
            for (page, ranges) in std::mem::take(&mut list.ranges).chunks(PAGE_RANGES).enumerate() {
                list.pages = list.pages.saturating_add(1);
                pages.push(v0::ListPage {
                    command: id,
                    disk: disk.disk,
                    page: page as u32,
                    ranges: ranges.to_vec(),
                });
            }
        }
    }
    pages
}

/// Puts the pages that came before a command back into its order. A missing, doubled or foreign page is a broken
/// protocol: an incomplete list of changes must never be taken for a complete one (INV-22).
pub fn put_pages(command: &mut v0::Command, pages: Vec<v0::ListPage>) -> Result<(), Problem> {
    let mut pages = pages.into_iter().peekable();
    if let Some(v0::command::Kind::Send(order)) = &mut command.kind {
        for disk in &mut order.disks {
            let Some(v0::disk_read::Mode::Extents(list)) = &mut disk.mode else { continue };
            for expected in 0..std::mem::take(&mut list.pages) {
                match pages.next() {
                    Some(page)
                        if (page.command, page.disk, page.page) == (command.id, disk.disk, expected) =>
                    {
                        list.ranges.extend(page.ranges);
                    }
                    _ => {
                        return Err(broken(format!(
                            "Page {expected} of the list of disk {} is missing.",
                            disk.disk
                        )));
                    }
                }
            }
        }
    }
    match pages.next() {
        None => Ok(()),
        Some(page) => Err(broken(format!("Page {} of disk {} belongs to no list.", page.page, page.disk))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn versions_meet_or_are_refused() {
        assert_eq!(choose_version(0, 0), Ok(0));
        assert_eq!(choose_version(0, 7), Ok(HIGHEST_VERSION));
        for (lowest, highest) in [(HIGHEST_VERSION + 1, HIGHEST_VERSION + 3), (5, 2)] {
            let problem = choose_version(lowest, highest).unwrap_err();
            assert_eq!(problem.code, Code::ProtocolVersion);
        }
    }

    #[test]
    fn problems_survive_a_status() {
        let problem = Problem::new(Code::HostRevoked, "é".repeat(900)).about("hv1").hint("x");
        assert_eq!(from_status(&to_status(&problem)), problem);
        assert_eq!(from_status(&Status::unavailable("gone")).code, Code::NoContact);
        let unknown = v0::Problem { code: 9999, message: "new\u{7}".into(), ..Default::default() };
        assert_eq!(Problem::from(unknown).message, "SP-9999: new");
    }

    #[test]
    fn long_lists_travel_in_pages_and_incomplete_ones_are_refused() {
        let ranges: Vec<v0::Range> =
            (0..PAGE_RANGES as u64 * 2 + 5).map(|n| v0::Range { offset: n << 40, length: 1 << 62 }).collect();
        let disk = |disk, ranges| v0::DiskRead {
            disk,
            mode: Some(v0::disk_read::Mode::Extents(v0::ChangedExtents { ranges, pages: 0 })),
            ..Default::default()
        };
        let order = v0::SendOrder {
            disks: vec![disk(0, ranges.clone()), disk(1, ranges[..3].to_vec()), disk(2, ranges)],
            ..Default::default()
        };
        let whole = v0::Command { id: 4, kind: Some(v0::command::Kind::Send(order)) };
        let mut sent = whole.clone();
        let pages = take_pages(&mut sent);
        assert_eq!(pages.len(), 6);
        assert!(pages.iter().all(|page| prost::Message::encoded_len(page) < MESSAGE_BYTES));
        assert!(prost::Message::encoded_len(&sent) < MESSAGE_BYTES);
        let mut got = sent.clone();
        put_pages(&mut got, pages.clone()).unwrap();
        assert_eq!(got, whole);
        for lost in 0..pages.len() {
            let mut pages = pages.clone();
            pages.remove(lost);
            assert!(put_pages(&mut sent.clone(), pages).is_err());
        }
        let mut doubled = pages.clone();
        doubled.push(pages[0].clone());
        assert!(put_pages(&mut sent.clone(), doubled).is_err());
    }
}
