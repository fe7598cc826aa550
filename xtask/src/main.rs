//! The project's own chores: `cargo xtask tidy`, `cargo xtask mutants [NAME]`.
//!
//! `make check` and `make mutants` call them.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a chore talks to the person who runs it"
)]

mod mutants;
mod repository;
mod tidy;

use std::process::ExitCode;

use anyhow::{Result, bail};

use repository::Repository;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let repository = Repository::here()?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["tidy"] => {
            let faults = tidy::faults(&repository)?;
            for fault in &faults {
                eprintln!("{fault}");
            }
            if !faults.is_empty() {
                bail!("{} fault(s)", faults.len());
            }
            Ok(())
        }
        ["mutants"] => mutants::run(&repository, ""),
        ["mutants", name] => mutants::run(&repository, name),
        _ => bail!("usage: cargo xtask tidy | mutants [NAME]"),
    }
}
