//! Mistakes in what was typed, told like every other error.

use clap::CommandFactory as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::advice::CliError;
use crate::args::Args;

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
    for kind in [
        ContextKind::SuggestedArg,
        ContextKind::SuggestedSubcommand,
        ContextKind::SuggestedValue,
    ] {
        match error.get(kind) {
            Some(ContextValue::String(word)) => return format!("did you mean `{word}`?"),
            Some(ContextValue::Strings(words)) if !words.is_empty() => {
                return format!("did you mean `{}`?", words.join("` or `"));
            }
            _ => {}
        }
    }
    let program = Args::command();
    let command = std::env::args()
        .skip(1)
        .find(|word| program.find_subcommand(word).is_some());
    match command {
        Some(command) => format!("see `highwater {command} --help`"),
        None => "see `highwater --help`".to_owned(),
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
