//! What the demo prints. The only place of it that prints.
#![expect(
    clippy::print_stdout,
    reason = "a demo shows what it does; its output is what it is for"
)]

/// Heads a part of the story.
pub(crate) fn chapter(number: usize, title: &str) {
    println!("\n{number}  {title}");
    println!("{}", "-".repeat(title.len() + 3));
}

/// Says something in our own words.
pub(crate) fn say(line: &str) {
    println!("{line}");
}

/// Shows something the guest did.
pub(crate) fn guest(line: &str) {
    println!("guest   {line}");
}

/// Shows something that was done to the VM from outside.
pub(crate) fn host(line: &str) {
    println!("host    {line}");
}

/// Shows something that was compared, and held.
pub(crate) fn checked(line: &str) {
    println!("check   {line}");
}

/// Shows a command as a user types it.
pub(crate) fn command(line: &str) {
    println!("\n$ {line}");
}

/// Shows what a command answered.
pub(crate) fn output(text: &str) {
    for line in text.lines() {
        println!("| {line}");
    }
}

/// Leaves a line free, where a command's answer ends.
pub(crate) fn space() {
    println!();
}

/// Says why the demo has failed.
pub(crate) fn failure(error: &anyhow::Error) {
    println!("\nDEMO FAILED: {error:#}");
}
