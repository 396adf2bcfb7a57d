//! What a person types: rates, durations, times, paths, lists of changed extents. Turned at once into what is needed.

use jiff::tz::TimeZone;
use model::{Code, Identity, Network, Problem, Stop, Timestamp};
use protocol::api::{DiskFormat, LimitHours, RateLimit, Time};

fn usage(message: impl Into<String>) -> Problem {
    Problem::new(Code::Usage, message)
}

/// A disk format, by its word.
pub fn format(text: &str) -> Result<DiskFormat, String> {
    text.parse()
}

/// Whole seconds from `90s`, `15m`, `24h`, `30d`, `2w`. Nothing needs no unit: `0`.
pub fn duration(text: &str) -> Result<u64, String> {
    if text == "0" {
        return Ok(0);
    }
    let wrong = || format!("{text:?} is not a duration: expected a number with s, m, h, d or w, such as 24h");
    if text == "0" {
        return Ok(0);
    }
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (digits, unit) = text.split_at(split);
    let seconds = match unit {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3_600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return Err(wrong()),
    };
    digits.parse::<u64>().ok().and_then(|number| number.checked_mul(seconds)).ok_or_else(wrong)
}

/// Bytes from `0`, `512MiB`, `1GiB`, `2TiB`; `MB`, `GB` and `TB` are powers of ten.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("{text:?} is not a size: expected a number with MiB, GiB or TiB, such as 1GiB, or 0");
    if text == "0" {
        return Ok(0);
    }
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (digits, unit) = text.split_at(split);
    let bytes: u64 = match unit {
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    digits.parse::<u64>().ok().and_then(|number| number.checked_mul(bytes)).ok_or_else(wrong)
}

/// Who a recovered machine is.
pub fn identity(text: &str) -> Result<Identity, String> {
    match text {
        "new" => Ok(Identity::New),
        "keep" => Ok(Identity::Keep),
        _ => Err("an identity is new or keep".to_owned()),
    }
}

/// How a running machine is stopped.
pub fn stop(text: &str) -> Result<Stop, String> {
    match text {
        "graceful" => Ok(Stop::Graceful),
        "now" => Ok(Stop::Now),
        _ => Err("a machine is stopped graceful or now".to_owned()),
    }
}

/// What the adapters of a recovered machine are connected to: `keep`, `disconnect`, `lan=test,br0=br1`.
pub fn network(text: &str) -> Result<Network, String> {
    match text {
        "keep" => return Ok(Network::Keep),
        "disconnect" => return Ok(Network::Disconnect),
        _ => {}
    }
    let pairs = text.split(',').map(|pair| match pair.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() => Ok((old.to_owned(), new.to_owned())),
        _ => Err(format!("{pair:?} is neither keep nor disconnect nor OLD=NEW")),
    });
    pairs.collect::<Result<_, String>>().map(Network::Map)
}

/// A rate: `50MB/s`, `400Mbit/s`, `1.5GiB/s`, with hours `50MB/s@mon-fri/08:00-18:00`. `zone` gives the hours' offset.
pub fn rate(text: &str, zone: &TimeZone, now: Timestamp) -> Result<RateLimit, Problem> {
    let hint = "Write a unit, such as 50MB/s, 400Mbit/s or 50MB/s@mon-fri/08:00-18:00.";
    let wrong = |why: &str| usage(format!("{text:?} is not a rate: {why}.")).about(text).hint(hint);
    let (amount, hours) = text.split_once('@').map_or((text, None), |(amount, hours)| (amount, Some(hours)));
    let split =
        amount.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(|| wrong("it has no unit"))?;
    let (number, unit) = amount.split_at(split);
    let unit = unit.strip_suffix("/s").ok_or_else(|| wrong("the unit does not end in /s"))?;
    let bits: u64 = match unit {
        "B" => 8,
        "kB" => 8_000,
        "MB" => 8_000_000,
        "GB" => 8_000_000_000,
        "KiB" => 8 << 10,
        "MiB" => 8 << 20,
        "GiB" => 8 << 30,
        "kbit" => 1_000,
        "Mbit" => 1_000_000,
        "Gbit" => 1_000_000_000,
        _ => return Err(wrong("the unit is not known")),
    };
    let number: f64 = number.parse().map_err(|_| wrong("the number is not one"))?;
    let bytes_per_second = (number * bits as f64 / 8.0) as u64;
    if bytes_per_second == 0 || !number.is_finite() {
        return Err(wrong("it is nothing"));
    }
    let hours = match hours {
        Some(words) => {
            Some(limit_hours(words, zone, now).ok_or_else(|| wrong("the hours are not DAYS/HH:MM-HH:MM"))?)
        }
        None => None,
    };
    Ok(RateLimit { bytes_per_second, hours })
}

fn limit_hours(text: &str, zone: &TimeZone, now: Timestamp) -> Option<LimitHours> {
    const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
    let (day_words, span) = text.split_once('/')?;
    let index = |word: &str| DAYS.iter().position(|day| *day == word);
    let mut days = [false; 7];
    for part in day_words.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (mut at, last) = (index(first)?, index(last)?);
        loop {
            *days.get_mut(at)? = true;
            if at == last {
                break;
            }
            at = (at + 1) % 7;
        }
    }
    let minute = |text: &str| -> Option<u16> {
        let (hour, minute) = text.split_once(':')?;
        let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
        ((hour < 24 && minute < 60) || (hour == 24 && minute == 0)).then_some(hour * 60 + minute)
    };
    let (from, to) = span.split_once('-')?;
    let (from_minute, to_minute) = (minute(from)?, minute(to)?);
    let instant = jiff::Timestamp::from_microsecond(i64::try_from(now.0).ok()?).ok()?;
    Some(LimitHours { days, from_minute, to_minute, offset_seconds: zone.to_offset(instant).seconds() })
}

/// A point as the API wants it, and how a typed time was understood.
///
/// `@2026-11-22 21:56` without a zone is local time.
pub fn point(text: &str, zone: &TimeZone) -> Result<(String, Option<String>), Problem> {
    let Some(typed) = text.strip_prefix('@') else { return Ok((text.to_owned(), None)) };
    let wrong = || {
        usage(format!("{typed:?} is not a time."))
            .about(text)
            .hint("Write @2026-11-22T21:56:27Z, or @2026-11-22T21:56 in local time.")
    };
    let (instant, echo) = if let Ok(instant) = typed.parse::<jiff::Timestamp>() {
        (instant, None)
    } else {
        let civil: jiff::civil::DateTime = typed.parse().map_err(|_| wrong())?;
        let zoned = civil.to_zoned(zone.clone()).map_err(|_| wrong())?;
        (zoned.timestamp(), Some(zoned.strftime("%Y-%m-%d %H:%M:%S %:z").to_string()))
    };
    let micros = u64::try_from(instant.as_microsecond()).map_err(|_| wrong())?;
    Ok((format!("@{}", Time(Timestamp(micros))), echo))
}

/// `HOST:PATH` or `PATH`. One letter before a colon is a drive, not a host; a relative name may have a colon in it.
pub fn host_path(text: &str) -> (Option<&str>, &str) {
    match text.split_once(':') {
        Some((host, path))
            if host.len() > 1
                && !host.contains(['/', '\\'])
                && !host.starts_with('.')
                && (path.starts_with(['/', '\\']) || path.get(1..2) == Some(":")) =>
        {
            (Some(host), path)
        }
        _ => (None, text),
    }
}

/// `DISK=FILE` split.
pub fn disk_file(text: &str) -> Result<(u32, &str), Problem> {
    text.split_once('=').and_then(|(disk, file)| Some((disk.parse().ok()?, file))).ok_or_else(|| {
        usage(format!("{text:?} is not DISK=FILE."))
            .about(text)
            .hint("Write --changed-extents 0=FILE; disks count from 0.")
    })
}

/// The extents of a change tracker's file.
pub fn extents(file: &str, bytes: &[u8]) -> Result<Vec<(u64, u64)>, Problem> {
    serde_json::from_slice(bytes).map_err(|error| {
        Problem::new(
            Code::ChangedExtents,
            format!("{file}: not a list [[offset,length],..] of bytes: {error}."),
        )
        .about(file)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_a_unit() {
        for (text, bytes) in [("0", 0), ("64MiB", 64 << 20), ("1GiB", 1 << 30), ("2TB", 2_000_000_000_000)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "1", "GiB", "1.5GiB", "1 GiB", "99999999999TiB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_need_a_unit() {
        let now = Timestamp(1_795_384_587_000_000);
        let read = |text: &str| rate(text, &TimeZone::fixed(jiff::tz::offset(2)), now);
        for (text, bytes) in
            [("50MB/s", 50_000_000), ("400Mbit/s", 50_000_000), ("1.5KiB/s", 1_536), ("1GiB/s", 1 << 30)]
        {
            assert_eq!(read(text).unwrap(), RateLimit { bytes_per_second: bytes, hours: None }, "{text}");
        }
        for bad in [
            "50",
            "50MB",
            "MB/s",
            "50mb/s",
            "0MB/s",
            "50MB/s@",
            "50MB/s@mon",
            "50MB/s@mon/8-9",
            "5MB/s@x/08:00-09:00",
        ] {
            let problem = read(bad).unwrap_err();
            assert_eq!((problem.code, problem.exit_status() as u8), (Code::Usage, 2), "{bad}");
        }
        let hours = read("50MB/s@fri-mon,wed/08:00-18:30").unwrap().hours.unwrap();
        assert_eq!(hours.days, [true, false, true, false, true, true, true]);
        assert_eq!((hours.from_minute, hours.to_minute, hours.offset_seconds), (480, 1_110, 7_200));
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("24h"), Ok(86_400));
        assert_eq!(duration("0s"), Ok(0));
        for bad in ["24", "h", "-1h", "1y", "99999999999999999999w"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn typed_times_are_local_and_echoed_with_their_zone() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        assert_eq!(point("latest", &zone).unwrap(), ("latest".into(), None));
        assert_eq!(point("@2026-11-22T21:56:27Z", &zone).unwrap(), ("@2026-11-22T21:56:27Z".into(), None));
        assert_eq!(
            point("@2026-11-22 21:56", &zone).unwrap(),
            ("@2026-11-22T19:56:00Z".into(), Some("2026-11-22 21:56:00 +02:00".into()))
        );
        assert!(point("@soon", &zone).is_err());
    }

    #[test]
    fn a_drive_is_not_a_host() {
        for (text, host, path) in [
            ("/a/b", None, "/a/b"),
            ("a.img", None, "a.img"),
            ("C:\\a.vhdx", None, "C:\\a.vhdx"),
            ("hv1:/a", Some("hv1"), "/a"),
            ("hv1.example:/a", Some("hv1.example"), "/a"),
            ("hv1:C:\\a", Some("hv1"), "C:\\a"),
            ("./x:y", None, "./x:y"),
            ("/a:b", None, "/a:b"),
        ] {
            assert_eq!(host_path(text), (host, path), "{text}");
        }
    }

    #[test]
    fn extents_are_pairs_of_bytes() {
        assert_eq!(extents("f", b"[[0,5],[7,1]]").unwrap(), [(0, 5), (7, 1)]);
        for bad in ["", "{}", "[[0]]", "[[0,-1]]", "[[0,1.5]]", "[[0,1,2]]"] {
            assert_eq!(extents("f", bad.as_bytes()).unwrap_err().exit_status() as u8, 2, "{bad}");
        }
    }
}
