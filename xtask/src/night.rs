//! The night: every campaign of [`crate::campaigns`] for its share of the time, as many at once as there are cores, and a
//! table of what they did.
//!
//! A campaign with a share runs in shifts, each with a seed of its own, until its time is over; one without runs once. A
//! shift that fails ends its campaign, is written down with the command that repeats it, and the others go on.

use crate::campaigns::{CAMPAIGNS, Campaign, command};
use crate::run;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A shift that takes this long hangs.
const LIMIT: Duration = Duration::from_secs(40 * 60);
/// What runs once, to its end, may take this long.
const WHOLE_LIMIT: Duration = Duration::from_secs(6 * 3600);
/// A shift should not take much longer than this, so that a campaign ends near its time.
const SHIFT: u64 = 300;

/// What a campaign did.
#[derive(Debug, Default)]
struct Outcome {
    shifts: u64,
    took: Duration,
    /// The first seed and the last.
    seeds: Option<(u64, u64)>,
    /// Sums of what its `result:` lines count.
    counts: BTreeMap<String, u64>,
    skipped: Option<String>,
    /// The command that repeats a failure, and the end of what it said.
    failed: Option<String>,
}

/// Runs the night for so many minutes and appends its table to `file`.
pub fn run(minutes: u64, seed: u64, file: &Path) -> Result<(), String> {
    let begun = run::output(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]))?.trim().to_owned();
    let commit = run::output(run::in_root("git").args(["describe", "--always", "--dirty"]))
        .map_or("unknown".to_owned(), |text| text.trim().to_owned());
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    println!("night: {minutes} minutes, {cores} cores, seed {seed}, commit {commit}");
    // Everything once, so that no shift waits for a compiler.
    run::run(run::cargo().args(["test", "--locked", "--workspace", "--no-run"]))?;
    let began = Instant::now();
    let total = minutes * 60 * cores as u64;
    let shares: u64 = CAMPAIGNS.iter().map(|campaign| campaign.share).sum();
    let outcomes: Mutex<Vec<Outcome>> = Mutex::new(Vec::new());
    let mut queue: Vec<(usize, u64)> = Vec::new();
    for (number, campaign) in CAMPAIGNS.iter().enumerate() {
        // One long campaign at the end would leave the other cores idle: each is done in as many parts as there are
        // cores.
        let parts = if campaign.share == 0 { 1 } else { cores as u64 };
        queue.extend((0..parts).map(|_| (number, total * campaign.share / shares / parts)));
        lock(&outcomes).push(Outcome::default());
    }
    queue.sort_by_key(|(_, seconds)| if *seconds == 0 { 0 } else { u64::MAX - seconds });
    let queue = Mutex::new(queue.into_iter().collect::<std::collections::VecDeque<_>>());
    let next_seed = Mutex::new(seed);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let next = lock(&queue).pop_front();
                    let Some((number, seconds)) = next else { return };
                    let Some(campaign) = CAMPAIGNS.get(number) else { return };
                    work(campaign, seconds, &next_seed, &outcomes, number);
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let table = table(&begun, &commit, cores, seed, began.elapsed(), &outcomes);
    println!("\n{table}");
    let mut out = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(file)
        .map_err(|error| format!("cannot append to {}: {error}", file.display()))?;
    writeln!(out, "{table}").map_err(|error| format!("cannot write {}: {error}", file.display()))?;
    let failed = outcomes.iter().filter(|outcome| outcome.failed.is_some()).count();
    if failed == 0 { Ok(()) } else { Err(format!("{failed} campaigns found something")) }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One part of a campaign, shift after shift.
fn work(campaign: &Campaign, seconds: u64, seed: &Mutex<u64>, outcomes: &Mutex<Vec<Outcome>>, number: usize) {
    let with = |change: &dyn Fn(&mut Outcome)| {
        if let Some(outcome) = lock(outcomes).get_mut(number) {
            change(outcome);
        }
    };
    if let Some(file) = campaign.missing() {
        return with(&|outcome| outcome.skipped = Some(format!("no {file}")));
    }
    let began = Instant::now();
    loop {
        let left = seconds.saturating_sub(began.elapsed().as_secs());
        let seed = {
            let mut next = lock(seed);
            // Campaigns that live one life for each seed from theirs on must not live those of the next shift.
            *next += 1_000_000;
            *next
        };
        println!("night: {}, seed {seed}, {left} s left", campaign.name);
        let shift = Instant::now();
        let command = command(campaign.night, seed, left.clamp(20, SHIFT));
        let limit = if campaign.share == 0 { WHOLE_LIMIT } else { LIMIT };
        let ran = listen(&mut run::with_deadline(command, limit));
        let (counts, failed) = match ran {
            Ok((counts, None)) => (counts, None),
            Ok((counts, Some(said))) => (counts, Some(said)),
            Err(error) => (BTreeMap::new(), Some(error)),
        };
        let failed =
            failed.map(|said| format!("{}\n\n{said}", repeat(campaign.night, seed, left.clamp(20, SHIFT))));
        if let Some(said) = &failed {
            println!("night: FAILED {}: {said}", campaign.name);
        }
        with(&|outcome| {
            outcome.shifts += 1;
            outcome.took += shift.elapsed();
            let first = outcome.seeds.map_or(seed, |(first, _)| first.min(seed));
            outcome.seeds = Some((first, seed));
            for (what, count) in &counts {
                *outcome.counts.entry(what.clone()).or_default() += count;
            }
            if outcome.failed.is_none() {
                outcome.failed.clone_from(&failed);
            }
        });
        if failed.is_some() || began.elapsed().as_secs() + 10 > seconds {
            return;
        }
    }
}

/// The command of a shift as a person types it.
fn repeat(words: &str, seed: u64, seconds: u64) -> String {
    let words = words.replace("{seed}", &seed.to_string()).replace("{seconds}", &seconds.to_string());
    let at = words.find("test ").or_else(|| words.find("run ")).unwrap_or(0);
    format!("{}cargo {}", &words[..at], &words[at..])
}

/// Runs a shift: the sums of its `result:` lines, and the end of what it said if it failed.
fn listen(command: &mut Command) -> Result<(BTreeMap<String, u64>, Option<String>), String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start a shift: {error}"))?;
    let mut counts = BTreeMap::new();
    let mut last: Vec<String> = Vec::new();
    let errors = child.stderr.take().map(|stream| {
        std::thread::spawn(move || {
            let lines = BufReader::new(stream).lines().map_while(Result::ok);
            lines.fold(Vec::new(), |mut last: Vec<String>, line| {
                keep_last(&mut last, line);
                last
            })
        })
    });
    if let Some(stream) = child.stdout.take() {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if let Some((_, result)) = line.split_once("result: ") {
                count(result, &mut counts);
            }
            keep_last(&mut last, line);
        }
    }
    if let Some(Ok(lines)) = errors.map(std::thread::JoinHandle::join) {
        last.extend(lines);
    }
    let status = child.wait().map_err(|error| format!("cannot wait for a shift: {error}"))?;
    Ok((counts, (!status.success()).then(|| last.join("\n"))))
}

fn keep_last(last: &mut Vec<String>, line: String) {
    if last.len() >= 60 {
        last.remove(0);
    }
    last.push(line);
}

/// Adds `N things, N other things`.
fn count(result: &str, counts: &mut BTreeMap<String, u64>) {
    for part in result.split(',') {
        if let Some((number, what)) = part.trim().split_once(' ')
            && let Ok(number) = number.parse::<u64>()
        {
            *counts.entry(what.trim().to_owned()).or_default() += number;
        }
    }
}

fn table(begun: &str, commit: &str, cores: usize, seed: u64, took: Duration, outcomes: &[Outcome]) -> String {
    let mut text = format!(
        "## Night of {begun}\n\nCommit {commit}, {cores} cores, seed {seed}, {} minutes of wall time.\n\n\
         | campaign | minutes of one core's lane | shifts | seeds | did | result |\n|---|---|---|---|---|---|\n",
        took.as_secs().div_ceil(60)
    );
    for (campaign, outcome) in CAMPAIGNS.iter().zip(outcomes) {
        let counts: Vec<String> =
            outcome.counts.iter().map(|(what, count)| format!("{} {what}", grouped(*count))).collect();
        let seeds = outcome.seeds.map_or(String::new(), |(first, last)| format!("{first}..{last}"));
        let result = match (&outcome.skipped, &outcome.failed) {
            (Some(why), _) => format!("skipped: {why}"),
            (None, Some(_)) => "**FAILED**".to_owned(),
            (None, None) => "nothing found".to_owned(),
        };
        let _ = writeln!(
            text,
            "| {} | {:.1} | {} | {seeds} | {} | {result} |",
            campaign.name,
            outcome.took.as_secs_f64() / 60.0,
            outcome.shifts,
            counts.join(", ")
        );
    }
    for (campaign, outcome) in CAMPAIGNS.iter().zip(outcomes) {
        if let Some(failed) = &outcome.failed {
            let _ = write!(text, "\n{} failed:\n\n```text\n{failed}\n```\n", campaign.name);
        }
    }
    text
}

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_shifts_add_up() {
        let mut counts = BTreeMap::new();
        count("5 kills, 2 disks recovered", &mut counts);
        count("7 kills, and more", &mut counts);
        assert_eq!(counts["kills"], 12);
        assert_eq!(counts["disks recovered"], 2);
        assert_eq!(counts.len(), 2);
    }

    #[test]
    fn a_failed_shift_can_be_repeated() {
        assert_eq!(
            repeat("A=1 SEED={seed} test -p x -- --nocapture", 5, 9),
            "A=1 SEED=5 cargo test -p x -- --nocapture"
        );
        assert_eq!(repeat("run -p x -- {seconds}", 5, 9), "cargo run -p x -- 9");
    }

    #[test]
    fn a_night_fails_only_when_a_campaign_does_and_names_what_it_left_out() {
        let mut outcomes: Vec<Outcome> = CAMPAIGNS.iter().map(|_| Outcome::default()).collect();
        outcomes[0].counts.insert("crash points".to_owned(), 1_234_567);
        outcomes[1].skipped = Some("no /dev/fuse".to_owned());
        outcomes[2].failed = Some("cargo test".to_owned());
        let text = table("today", "abc", 2, 1, Duration::from_secs(90), &outcomes);
        assert!(text.contains("1,234,567 crash points"), "{text}");
        assert!(text.contains("skipped: no /dev/fuse") && text.contains("**FAILED**"), "{text}");
    }

    #[test]
    fn large_numbers_are_readable() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_000), "1,000");
        assert_eq!(grouped(30_000_000), "30,000,000");
    }
}
