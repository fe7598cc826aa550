//! The `highwater` program: reads arguments, wires the engine up, renders.
//!
//! Everything a person reads is written here; the engine prints nothing.

mod advice;
mod args;
mod commands;
mod env;
mod guard_process;
mod json;
mod output;
mod progress;
mod secrets;
mod settings;
mod signals;
mod times;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    if guard_process::is_wanted() {
        return guard_process::run();
    }
    let args = match args::Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version are data and go to stdout; mistakes to stderr.
            drop(error.print());
            return ExitCode::from(if error.use_stderr() {
                advice::USAGE
            } else {
                advice::DONE
            });
        }
    };
    let json = args.global.json;
    match commands::run(args) {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.is_broken_pipe() => ExitCode::from(advice::DONE),
        Err(error) => {
            let advice = advice::advise(&error);
            output::print_error(&error, &advice, json);
            ExitCode::from(advice.code)
        }
    }
}
