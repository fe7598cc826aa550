//! `highwater completions`

use clap::CommandFactory as _;

use crate::advice::{self, CliError};
use crate::args::{Args, Completions};
use crate::output;

pub(crate) fn run(args: &Completions) -> Result<u8, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "highwater", &mut script);
    output::data(&String::from_utf8_lossy(&script))?;
    Ok(advice::DONE)
}
