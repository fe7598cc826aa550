//! Mistakes in what was typed, told like every other error.

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::advice::CliError;

/// Returns what clap found as an error of ours.
pub(crate) fn error(error: &clap::Error) -> CliError {
    let text = error.to_string();
    let mut lines = text.lines();
    let first = lines.next().unwrap_or_default();
    let first = first.strip_prefix("error: ").unwrap_or(first).trim();
    // What is listed below the first line until the first blank one belongs to
    // it: the arguments that are missing, the values that are possible.
    let listed: Vec<&str> = lines
        .map(str::trim)
        .take_while(|line| !line.is_empty())
        .collect();
    let mut reason = first.to_owned();
    if !listed.is_empty() {
        reason.push(' ');
        reason.push_str(&listed.join(", "));
    }
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand
    ) {
        "no command is given".clone_into(&mut reason);
    }
    CliError::CommandLine {
        reason,
        hint: hint(error),
    }
}

fn hint(error: &clap::Error) -> String {
    for (kind, form) in [
        (ContextKind::SuggestedArg, ""),
        (ContextKind::SuggestedSubcommand, ""),
        (ContextKind::SuggestedValue, ""),
        (ContextKind::Suggested, "try: "),
    ] {
        match error.get(kind) {
            Some(ContextValue::String(word)) => return format!("{form}did you mean `{word}`?"),
            Some(ContextValue::Strings(words)) if !words.is_empty() => {
                return format!("did you mean `{}`?", words.join("` or `"));
            }
            Some(ContextValue::StyledStrs(tips)) if !tips.is_empty() => {
                return tips
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join("; ");
            }
            _ => {}
        }
    }
    let usage = match error.get(ContextKind::Usage) {
        Some(ContextValue::StyledStr(usage)) => usage.to_string(),
        _ => String::new(),
    };
    // `Usage: highwater backup [OPTIONS] <VM>...` names the command.
    let words = usage.strip_prefix("Usage:").unwrap_or_default();
    let command: Vec<&str> = words
        .split_whitespace()
        .take_while(|word| word.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'))
        .take_while(|word| !word.starts_with('-'))
        .collect();
    if command.is_empty() {
        "see `highwater --help`".to_owned()
    } else {
        format!("see `{} --help`", command.join(" "))
    }
}

/// Returns which JSON was asked for by arguments that could not be read.
pub(crate) fn wanted_json(args: impl Iterator<Item = std::ffi::OsString>) -> Option<bool> {
    let mut events = None;
    for arg in args.skip(1).take_while(|arg| arg != "--") {
        match arg.to_str() {
            Some("--json=events") => events = Some(true),
            Some(arg) if arg == "--json" || arg.starts_with("--json=") => {
                events.get_or_insert(false);
            }
            _ => {}
        }
    }
    events
}
