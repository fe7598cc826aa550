//! The `highwater` program: reads arguments, wires the engine up, renders.
//!
//! Everything a person reads is written here; the engine prints nothing.

mod advice;
mod args;
mod by_hand;
mod cgroup;
mod commands;
mod config;
mod cut_short;
mod disk_below;
mod doing;
mod dying;
mod effective;
mod env;
#[cfg(debug_assertions)]
mod faults;
mod front;
mod guard_process;
mod json;
mod json_events;
mod nearest;
mod output;
mod progress;
mod secrets;
mod settings;
mod several;
mod signals;
mod stats;
mod sys;
mod terminal;
mod times;
mod usage;
mod values;
mod watchdog;

use std::process::ExitCode;

use clap::Parser as _;

use crate::advice::CliError;
use crate::args::{Args, JsonStyle};
use crate::front::mover;

fn main() -> ExitCode {
    if guard_process::is_wanted() {
        #[cfg(debug_assertions)]
        faults::install();
        return guard_process::run();
    }
    let is_mover = mover::begin();
    if is_mover {
        #[cfg(debug_assertions)]
        faults::install();
    }
    let code = match Args::try_parse() {
        Ok(args) if !is_mover && front::is_needed(&args.command) => {
            match front::run(&args) {
                Some(code) => return ExitCode::from(code),
                // Nobody watches, and the work is done nevertheless.
                None => run(args),
            }
        }
        Ok(args) => run(args),
        Err(error) if !error.use_stderr() => {
            // Help and version are data and go to stdout.
            drop(error.print());
            return ExitCode::from(advice::DONE);
        }
        Err(error) => {
            let json = usage::wanted_json(std::env::args_os());
            if json == Some(true) {
                output::print_events();
            }
            fail(&usage::error(&error), json.is_some())
        }
    };
    output::end_of_events(code);
    mover::leave(code)
}

fn run(mut args: Args) -> u8 {
    let json = args.global.json_style.is_some();
    args.global.json = json;
    output::want_json(json);
    if args.global.json_style == Some(JsonStyle::Events) {
        output::print_events();
    }
    let done = settings::complete(&mut args).and_then(|effective| {
        let strict = args.global.strict;
        commands::run(args, &effective).map(|code| (code, strict))
    });
    match done {
        Ok((advice::DONE, true)) if output::has_warned() => advice::WARNED,
        Ok((code, _)) => code,
        Err(error) if error.is_broken_pipe() => advice::DONE,
        Err(error) => fail(&error, json),
    }
}

fn fail(error: &CliError, json: bool) -> u8 {
    let advice = advice::advise(error);
    output::print_error(error, &advice, json);
    advice.code
}
