//! What a person or a script reads: data to stdout, everything else to stderr.

use std::io::Write;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::tz::TimeZone;
use model::{Problem, Timestamp};
use protocol::api::{ProblemBody, Progress, Time};
use serde::Serialize;

use crate::program::Say;

/// Where output goes, and what is on the other end.
pub struct Streams {
    /// Data.
    pub stdout: Box<dyn Write + Send>,
    /// Progress, messages, hints.
    pub stderr: Box<dyn Write + Send>,
    /// Whether stderr is a terminal: only then there are bars and questions.
    pub terminal: bool,
    /// Local time.
    pub zone: TimeZone,
    /// Now.
    pub now: fn() -> Timestamp,
    /// Reads a line of a person's answer.
    pub answer: fn() -> String,
}

/// Writes in the chosen way.
pub struct Output {
    streams: Mutex<Streams>,
    /// One JSON object a line.
    pub json: bool,
    zone: TimeZone,
    now: fn() -> Timestamp,
    answer: fn() -> String,
    /// Whether stderr is a terminal.
    pub terminal: bool,
    bar: Mutex<Option<ProgressBar>>,
    /// Set by Ctrl-C.
    pub stop: Arc<AtomicBool>,
}

impl Output {
    /// For `streams`, as the options say.
    pub fn new(streams: Streams, json: bool, utc: bool) -> Output {
        let zone = if utc { TimeZone::UTC } else { streams.zone.clone() };
        let (now, answer, terminal) = (streams.now, streams.answer, streams.terminal);
        Output {
            streams: Mutex::new(streams),
            json,
            zone,
            now,
            answer,
            terminal,
            bar: Mutex::new(None),
            stop: Arc::default(),
        }
    }

    /// Now.
    pub fn now(&self) -> Timestamp {
        (self.now)()
    }

    /// Times are shown and read in it.
    pub fn zone(&self) -> &TimeZone {
        &self.zone
    }

    /// A line of data for a person; nothing with `--json`. A closed pipe is no error.
    pub fn text(&self, line: &str) {
        if !self.json {
            self.raw(line);
        }
    }

    /// A line to stdout, whatever was asked for.
    pub fn raw(&self, line: &str) {
        if let Ok(mut streams) = self.streams.lock() {
            let _ = writeln!(streams.stdout, "{line}");
            let _ = streams.stdout.flush();
        }
    }

    /// A line for a person on stderr.
    pub fn message(&self, line: &str) {
        let write = || {
            if let Ok(mut streams) = self.streams.lock() {
                let _ = writeln!(streams.stderr, "{line}");
            }
        };
        match self.bar.lock().ok().and_then(|bar| bar.clone()) {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// An object as a line of JSON, its `type` in front; nothing without `--json`.
    pub fn object<T: Serialize>(&self, kind: &str, value: &T) {
        if self.json {
            self.raw(&line_of(kind, value));
        }
    }

    /// A problem, as the last thing said.
    pub fn problem(&self, problem: &Problem) {
        if self.json {
            self.raw(&line_of("error", &ProblemBody::from(problem.clone())));
        } else {
            self.message(&format!("error: {}: {}", problem.code, printable(&problem.message)));
            if !problem.hint.is_empty() {
                self.message(&format!("hint: {}", printable(&problem.hint)));
            }
        }
    }

    /// Rows under headings, aligned; nothing with `--json`.
    pub fn table(&self, headings: &[&str], rows: &[Vec<String>]) {
        if self.json {
            return;
        }
        let mut widths: Vec<usize> = headings.iter().map(|heading| heading.len()).collect();
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        // All of it at once: standard output writes each line by itself otherwise.
        let mut text = String::new();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            for (cell, width) in cells.zip(&widths) {
                text.push_str(cell);
                text.extend(std::iter::repeat_n(' ', (width + 2).saturating_sub(cell.chars().count())));
            }
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
        };
        line(&mut headings.iter().copied());
        for row in rows {
            line(&mut row.iter().map(String::as_str));
        }
        self.raw(text.strip_suffix('\n').unwrap_or(&text));
    }

    /// A time with its offset from UTC.
    pub fn time(&self, time: Time) -> String {
        i64::try_from(time.0.0)
            .ok()
            .and_then(|micros| jiff::Timestamp::from_microsecond(micros).ok())
            .map_or_else(
                || time.to_string(),
                |at| at.to_zoned(self.zone.clone()).strftime("%Y-%m-%d %H:%M:%S %:z").to_string(),
            )
    }

    /// How long ago.
    pub fn age(&self, time: Time) -> String {
        seconds(self.now().since(time.0) / Timestamp::SECOND)
    }

    /// Asks on a terminal to type `name`; elsewhere, and on any other answer, refuses.
    pub fn confirm(&self, what: &str, name: &str, yes: bool) -> Result<(), Problem> {
        if yes {
            return Ok(());
        }
        let refused = |why: &str| Problem::new(model::Code::NeedsYes, format!("{what} {why}.")).about(name);
        if !self.terminal || self.json {
            return Err(refused("was not confirmed"));
        }
        self.message(&format!("{what}. Type {name} to confirm:"));
        if (self.answer)().trim() == name {
            Ok(())
        } else {
            Err(refused("was not confirmed: another name was typed"))
        }
    }

    /// Asks yes or no; no where there is no terminal.
    pub fn ask(&self, question: &str) -> bool {
        self.terminal && {
            self.message(question);
            matches!((self.answer)().trim(), "y" | "yes")
        }
    }

    /// Takes the bar away.
    pub fn end_progress(&self) {
        if let Some(bar) = self.bar.lock().ok().and_then(|mut bar| bar.take()) {
            bar.finish_and_clear();
        }
    }
}

impl Say for Output {
    fn line(&self, text: &str) {
        if self.json {
            self.object("message", &serde_json::json!({ "message": text }));
        } else {
            self.message(text);
        }
    }

    fn step(&self, human: &str, kind: &str, figures: serde_json::Value) {
        if self.json {
            self.object(kind, &figures);
        } else {
            self.raw(human);
        }
    }

    fn progress(&self, progress: &Progress) {
        if !self.terminal || self.json {
            return;
        }
        let Ok(mut held) = self.bar.lock() else { return };
        let bar = held.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(progress.bytes_total, ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{prefix:12} {wide_bar} {percent:>3}% {msg}") {
                bar.set_style(style);
            }
            bar
        });
        if let Some(total) = progress.bytes_total {
            bar.set_length(total.max(1));
        }
        bar.set_position(progress.bytes_done);
        bar.set_prefix(progress.phase.clone());
        bar.set_message(progress_text(progress));
    }

    fn cancelled(&self) -> &AtomicBool {
        &self.stop
    }
}

/// `12.5 GiB, 105.0 MiB/s, 2 min left, 63 % known`.
pub fn progress_text(progress: &Progress) -> String {
    let mut parts = vec![bytes(progress.bytes_done), format!("{}/s", bytes(progress.bytes_per_second))];
    if let Some(left) = progress.seconds_left {
        parts.push(format!("{} left", seconds(left)));
    }
    let seen = progress.bytes_stored.saturating_add(progress.bytes_deduplicated);
    if progress.bytes_deduplicated > 0 {
        parts.push(format!(
            "{} % already stored",
            progress.bytes_deduplicated.saturating_mul(100) / seen.max(1)
        ));
    }
    parts.join(", ")
}

/// The object as one line with `type` as its first field; other fields keep their order.
pub fn line_of<T: Serialize>(kind: &str, value: &T) -> String {
    let text = serde_json::to_string(value).unwrap_or_else(|_| "{}".to_owned());
    let rest = text.strip_prefix('{').unwrap_or("}");
    let comma = if rest.starts_with('}') { "" } else { "," };
    format!("{{\"type\":\"{kind}\"{comma}{rest}")
}

/// Names come from guests and files: nothing in them may steer a terminal.
pub fn printable(text: &str) -> String {
    let is_safe = |c: char| (!c.is_control() || c == '\n') && !('\u{202a}'..='\u{202e}').contains(&c);
    if text.chars().all(is_safe) {
        return text.to_owned();
    }
    text.chars().map(|c| if is_safe(c) { c } else { '\u{fffd}' }).collect()
}

/// A size in KiB, MiB, GiB or TiB.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1_024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1_024.0;
    let mut unit = 0;
    while value >= 1_023.95 && unit + 1 < UNITS.len() {
        value /= 1_024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS.get(unit).copied().unwrap_or_default())
}

/// A duration in its two largest units.
pub fn seconds(count: u64) -> String {
    match count {
        0..=59 => format!("{count} s"),
        60..=3_599 => format!("{} min {} s", count / 60, count % 60),
        3_600..=86_399 => format!("{} h {} min", count / 3_600, count / 60 % 60),
        _ => format!("{} d {} h", count / 86_400, count / 3_600 % 24),
    }
}
