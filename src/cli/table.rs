//! Output for people: aligned tables, relative times, colours on a terminal only.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

/// Prints rows under a head, each column as wide as it needs to be; the last one is not padded.
pub(super) fn print(head: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| columns(cell));
        cells.chain(head.get(column).map(|cell| columns(cell))).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut out = io::stdout().lock();
    let mut line = |cells: &[String], is_head: bool| {
        let mut text = String::new();
        for (place, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            text.push_str(cell);
            if place + 1 < cells.len() {
                text.extend(std::iter::repeat_n(' ', width - columns(cell) + 2));
            }
        }
        if is_head { writeln!(out, "{}", dim(&text)) } else { writeln!(out, "{text}") }
    };
    let head: Vec<String> = head.iter().map(|cell| cell.to_uppercase()).collect();
    line(&head, true)?;
    rows.iter().try_for_each(|row| line(row, false))
}

/// A text that moves no cursor and turns no line round: control and bidirectional characters are escaped.
pub(super) fn visible(text: &str) -> String {
    let mut visible = String::with_capacity(text.len());
    for char in text.chars() {
        let turns =
            matches!(char, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if char.is_control() || turns {
            visible.extend(char.escape_unicode());
        } else {
            visible.push(char);
        }
    }
    visible
}

/// How many columns of a terminal a text takes: colours none, East Asian characters two.
fn columns(text: &str) -> usize {
    let mut is_escape = false;
    let mut columns = 0;
    for char in text.chars() {
        match char {
            '\u{1b}' => is_escape = true,
            'm' if is_escape => is_escape = false,
            _ if is_escape => {}
            '\u{1100}'..='\u{115f}' | '\u{2e80}'..='\u{a4cf}' | '\u{ac00}'..='\u{d7a3}' | '\u{ff00}'..='\u{ff60}' => {
                columns += 2;
            }
            _ => columns += 1,
        }
    }
    columns
}

fn coloured(text: &str, code: &str) -> String {
    if io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    } else {
        text.to_owned()
    }
}

pub(super) fn dim(text: &str) -> String {
    coloured(text, "2")
}

/// An endpoint's state, as good or bad as it is.
pub(super) fn state(state: &str) -> String {
    coloured(
        state,
        match state {
            "up" => "32",
            "down" => "31",
            _ => "33",
        },
    )
}

/// A span of time, short: `12s`, `3m`, `5h`, `2d`.
pub(super) fn span(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7_199 => format!("{}m", seconds / 60),
        7_200..=172_799 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A moment (RFC 3339) as seen from now: `3m ago`, `in 12s`.
pub(super) fn moment(text: &str, now: Duration) -> String {
    let Ok(at) = humantime::parse_rfc3339_weak(text) else { return text.to_owned() };
    let at = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    match at.checked_sub(now) {
        Some(ahead) if !ahead.is_zero() => format!("in {}", span(ahead.as_secs_f64().ceil())),
        Some(_) | None => format!("{} ago", span(now.saturating_sub(at).as_secs_f64())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short_and_seen_from_now() {
        let now = Duration::from_secs(1_795_000_000);
        for (text, expected) in [
            ("2026-11-18T11:06:40Z", "0s ago"),
            ("2026-11-18T11:06:30.5Z", "9s ago"),
            ("2026-11-18T11:16:40Z", "in 10m"),
            ("2026-11-15T11:06:40Z", "3d ago"),
            ("soon", "soon"),
        ] {
            assert_eq!(moment(text, now), expected, "{text}");
        }
        assert_eq!((columns("ab"), columns("王小明"), columns("\u{1b}[32mup\u{1b}[0m")), (2, 6, 2));
    }
}
