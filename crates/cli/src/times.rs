//! Time as people write and read it.

use highwater_model::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// Returns local time to the second, with its offset.
pub(crate) fn show(time: Timestamp) -> String {
    jiff::Timestamp::from_millisecond(time.unix_ms()).map_or_else(
        |_| format!("{} ms", time.unix_ms()),
        |time| {
            time.to_zoned(TimeZone::system())
                .strftime("%Y-%m-%d %H:%M:%S")
                .to_string()
        },
    )
}

/// Returns UTC as RFC 3339, for JSON.
pub(crate) fn rfc3339(time: Timestamp) -> String {
    jiff::Timestamp::from_millisecond(time.unix_ms())
        .map_or_else(|_| String::new(), |time| time.to_string())
}

/// Reads `2026-11-20`, `2026-11-20T03:00`, with seconds, with `Z` or an
/// offset; local time without one. The end of what is named is meant: a date
/// alone is its last moment, a minute its last.
pub(crate) fn parse(text: &str) -> Option<Timestamp> {
    let text = text.replace(' ', "T");
    let moment = zoned(&text).or_else(|| local(&text))?;
    Some(Timestamp::from_unix_ms(
        moment.as_millisecond().saturating_add(999),
    ))
}

/// With `Z` or an offset; `2026-11-20T03:00Z` is the whole minute.
fn zoned(text: &str) -> Option<jiff::Timestamp> {
    let time = text.find('T')?;
    let zone = text
        .get(time..)?
        .find(['Z', 'z', '+', '-'])?
        .checked_add(time)?;
    let (clock, zone) = text.split_at_checked(zone)?;
    let seconds = if clock.matches(':').count() == 1 {
        ":59"
    } else {
        ""
    };
    format!("{clock}{seconds}{zone}").parse().ok()
}

fn local(text: &str) -> Option<jiff::Timestamp> {
    let full = match text.len() {
        // A date; a date with hours and minutes.
        10 => format!("{text}T23:59:59"),
        16 => format!("{text}:59"),
        _ => text.to_owned(),
    };
    let civil: DateTime = full.parse().ok()?;
    TimeZone::system().to_timestamp(civil).ok()
}

/// Returns the local offset from UTC at a moment, minutes.
pub(crate) fn utc_offset_minutes(time: Timestamp) -> i32 {
    jiff::Timestamp::from_millisecond(time.unix_ms())
        .map_or(0, |time| TimeZone::system().to_offset(time).seconds() / 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_means_the_end_of_what_it_names() {
        for (text, expected) in [
            ("2026-11-20T03:00:00Z", "2026-11-20T03:00:00.999Z"),
            ("2026-11-20T03:00Z", "2026-11-20T03:00:59.999Z"),
            ("2026-11-20T03:00+01:00", "2026-11-20T02:00:59.999Z"),
        ] {
            assert_eq!(
                parse(text).map(rfc3339).as_deref(),
                Some(expected),
                "{text}"
            );
        }
        for text in ["2026-11-20", "2026-11-20T03:00", "2026-11-20 03:00:10"] {
            assert!(parse(text).is_some(), "{text}");
        }
        for text in [
            "",
            "yesterday",
            "2026-13-01",
            "2026-11-20T25:00Z",
            "T+",
            "\u{e4}T\u{e4}-",
        ] {
            assert!(parse(text).is_none(), "{text}");
        }
    }
}
