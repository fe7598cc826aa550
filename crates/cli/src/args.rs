//! What can be typed.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use highwater_engine::repository::Compression;

use crate::values;

/// Backup, recovery and instant restore for QEMU/KVM virtual machines.
#[derive(Debug, Parser)]
#[command(
    name = "highwater",
    version,
    max_term_width = 100,
    disable_help_subcommand = true
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, ClapArgs)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Configuration file instead of /etc/highwater/config.toml and
    /// ~/.config/highwater/config.toml [env: HIGHWATER_CONFIG]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Use the settings of [profile.NAME] in the configuration [env: HIGHWATER_PROFILE]
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) profile: Option<String>,
    /// Repository: a path or file:// URL [env: HIGHWATER_REPO]
    #[arg(short, long, global = true, value_name = "URL")]
    pub(crate) repo: Option<String>,
    /// Where the VMs are: a libvirt URI, qmp:/path/to.sock of one QEMU, or image:/a.qcow2,/b.raw
    /// of one VM that is off [default: qemu:///system as root, else qemu:///session]
    #[arg(short, long, global = true, value_name = "URI")]
    pub(crate) connect: Option<String>,
    /// Read the passphrase from the first line of a file [env: HIGHWATER_PASSWORD_FILE]
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        conflicts_with = "password_command"
    )]
    pub(crate) password_file: Option<PathBuf>,
    /// Read the passphrase from the first line a shell command prints [env: HIGHWATER_PASSWORD_COMMAND]
    #[arg(long, global = true, value_name = "COMMAND")]
    pub(crate) password_command: Option<String>,
    /// Key file of a repository made with --encryption keyfile [env: HIGHWATER_KEY_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
    /// Print JSON instead of text: one document, or one line per event
    #[arg(
        long = "json",
        global = true,
        value_enum,
        value_name = "STYLE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "document"
    )]
    pub(crate) json_style: Option<JsonStyle>,
    /// Print errors and warnings only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Tell more: the plan, the point in time, what is read and stored
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
    /// Show no progress while something runs
    #[arg(long, global = true)]
    pub(crate) no_progress: bool,
    /// Exit with 4 if there was a warning
    #[arg(long, global = true)]
    pub(crate) strict: bool,
    /// Whether any JSON is wanted.
    #[arg(skip)]
    pub(crate) json: bool,
    /// What the configuration says about secrets; flags and environment go first.
    #[arg(skip)]
    pub(crate) configured: ConfiguredSecrets,
}

/// Where the configuration says that secrets come from.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConfiguredSecrets {
    pub(crate) password_file: Option<PathBuf>,
    pub(crate) password_command: Option<String>,
    pub(crate) key_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum JsonStyle {
    /// One document at the end
    Document,
    /// One line per event
    Events,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a repository
    Init(Init),
    /// Back up running VMs
    Backup(Backup),
    /// List VMs and their restore points
    #[command(visible_alias = "snapshots")]
    List(List),
    /// Show one restore point
    Show(Show),
    /// Restore disks of a restore point
    Restore(Restore),
    /// Show what the repository holds and what it saves
    Stats,
    /// Show the effective settings and where each comes from
    Config,
    /// Print the completions of a shell
    Completions(Completions),
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man(Man),
    /// Say what is wrong at VMs, what the next backup would do, and repair it
    ///
    /// Looks at marks (checkpoints and bitmaps), jobs, leftovers of killed backups and what other
    /// programs left, and changes nothing without --fix. Exits with 4 if something needs fixing.
    ///
    /// Marks and internal snapshots do not get on: while a persistent bitmap is in an image, QEMU
    /// refuses to revert to an internal snapshot of it, and `qemu-img check -r` deletes internal
    /// snapshots. Run `highwater doctor VM --purge-marks` before either; the next backup then reads
    /// the disks as a whole and stores what changed.
    Doctor(Doctor),
    /// Check that the repository is whole and every restore point can be read
    #[command(visible_alias = "check")]
    Verify(Verify),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Init {
    /// How the repository is encrypted; must be said, there is no silent plain text
    #[arg(long, value_enum)]
    pub(crate) encryption: Option<Encryption>,
    /// Chunk size, a power of two from 64KiB to 4MiB
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = values::chunk_size)]
    pub(crate) chunk_size: highwater_model::ChunkSize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Encryption {
    /// Not at all
    None,
    /// With a passphrase
    Passphrase,
    /// With the content of --key-file
    Keyfile,
}

#[derive(Debug, Default, ClapArgs)]
pub(crate) struct Backup {
    /// VMs, by name or UUID
    #[arg(
        value_name = "VM",
        required_unless_present_any = ["all", "name"],
        conflicts_with = "all"
    )]
    pub(crate) vms: Vec<String>,
    /// Back up every VM of the connection, those that are off included (see --offline)
    #[arg(long)]
    pub(crate) all: bool,
    /// What the VM behind -c qmp: or image: is called, where it does not say so itself
    #[arg(long, value_name = "NAME", conflicts_with_all = ["vms", "all"], value_parser = values::label)]
    pub(crate) name: Option<String>,
    /// What to read
    #[arg(short, long, value_enum, default_value_t = Level::Auto)]
    pub(crate) level: Level,
    /// Back up only this disk (may be repeated)
    #[arg(short = 'd', long = "disk", short_alias = 'i', value_name = "DISK")]
    pub(crate) disks: Vec<String>,
    /// Leave this disk out (may be repeated)
    #[arg(short = 'x', long = "exclude", value_name = "DISK")]
    pub(crate) exclude: Vec<String>,
    /// Freeze the guest's file systems through its agent [default: try]
    #[arg(long, value_enum)]
    pub(crate) quiesce: Option<Quiesce>,
    /// Freeze only this mount point (may be repeated)
    #[arg(long = "freeze-mountpoint", value_name = "PATH")]
    pub(crate) freeze_mountpoints: Vec<String>,
    /// What to do about a VM that is off [default: yield]
    #[arg(long, value_enum)]
    pub(crate) offline: Option<Offline>,
    /// Start a VM that is off, paused, for as long as the backup takes, instead of reading its images
    #[arg(long)]
    pub(crate) start_paused: bool,
    /// Directory for scratch files, on local storage with room for what the guest writes meanwhile
    #[arg(long, value_name = "DIR")]
    pub(crate) scratch_dir: Option<PathBuf>,
    /// Threads that hash and compress [default: number of cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) workers: Option<u16>,
    /// Compression: zstd[:N], lz4 or none [default: zstd]
    #[arg(long, value_name = "METHOD", value_parser = values::compression)]
    pub(crate) compression: Option<Compression>,
    /// Make no restore point if less than this is dirty
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub(crate) threshold: Option<u64>,
    /// Read no faster than this many bytes per second, such as 50MiB
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    pub(crate) limit: Option<u64>,
    /// Read this many random blocks again that the bitmap calls clean, or percent of all: 500 or 10% [default: 64, within half a second]
    #[arg(long, value_name = "N|PCT", value_parser = values::audit)]
    pub(crate) audit: Option<values::Audit>,
    /// Tell what a backup would read, and change nothing
    #[arg(long)]
    pub(crate) estimate: bool,
    /// Tag to keep with the restore point (may be repeated)
    #[arg(long = "tag", value_name = "TAG", value_parser = values::label)]
    pub(crate) tags: Vec<String>,
    /// Group to keep with the restore point, the same for all VMs of the call
    #[arg(long, value_name = "NAME", value_parser = values::label)]
    pub(crate) group: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum Level {
    /// Incremental where it is safe, else everything
    #[default]
    Auto,
    /// Everything, and a new mark
    Full,
    /// Incremental, or fail
    Incremental,
    /// What changed since the mark, without moving it
    Differential,
    /// Everything, without touching any mark
    Copy,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Quiesce {
    /// Never
    Off,
    /// If the agent answers
    Try,
    /// Or fail
    Require,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Offline {
    /// Read its images; whoever starts it meanwhile gets it at once, and the backup fails
    Yield,
    /// Read its images, and keep everybody from starting it until the backup is done
    Hold,
    /// Leave it alone
    Refuse,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct List {
    /// List the restore points of this VM
    pub(crate) vm: Option<String>,
    /// List the restore points of all VMs
    #[arg(long)]
    pub(crate) all: bool,
    /// Only points with this tag (may be repeated: with all of them)
    #[arg(long = "tag", value_name = "TAG")]
    pub(crate) tags: Vec<String>,
    /// Only points of this group
    #[arg(long, value_name = "NAME")]
    pub(crate) group: Option<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Completions {
    /// Shell
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Man {
    /// Directory, which exists
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Show {
    /// VM, VM@ID, VM@latest, VM@2026-11-20T03:00, VM~2 or id:ID
    #[arg(value_name = "POINT")]
    pub(crate) point: String,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Restore {
    /// VM, VM@ID, VM@latest, VM@2026-11-20T03:00, VM~2 or id:ID
    #[arg(value_name = "POINT")]
    pub(crate) point: String,
    /// Directory; or with one -d a new file, or - for stdout
    #[arg(long, value_name = "DIR|FILE|-")]
    pub(crate) to: PathBuf,
    /// Restore only this disk (may be repeated)
    #[arg(short = 'd', long = "disk", short_alias = 'i', value_name = "DISK")]
    pub(crate) disks: Vec<String>,
    /// Image format [default: the source's]
    #[arg(long, value_enum)]
    pub(crate) format: Option<Format>,
    /// Restore no faster than this many bytes per second, such as 50MiB
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    pub(crate) limit: Option<u64>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Verify {
    /// Check only these restore points and what they need [default: the whole repository]
    #[arg(value_name = "POINT")]
    pub(crate) points: Vec<String>,
    /// Read every byte: hash each pack, open each chunk and prove its content
    #[arg(long)]
    pub(crate) read_data: bool,
    /// Check what of an encrypted repository can be checked without its key
    #[arg(long, conflicts_with = "points")]
    pub(crate) no_key: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Doctor {
    /// VMs, by name or UUID
    #[arg(
        value_name = "VM",
        required_unless_present_any = ["all", "name"],
        conflicts_with = "all"
    )]
    pub(crate) vms: Vec<String>,
    /// What the VM behind -c qmp: or image: is called, where it does not say so itself
    #[arg(long, value_name = "NAME", conflicts_with_all = ["vms", "all"], value_parser = values::label)]
    pub(crate) name: Option<String>,
    /// Look at every VM of the connection, those that are off included
    #[arg(long)]
    pub(crate) all: bool,
    /// Repair what can be repaired; foreign checkpoints, bitmaps and jobs are left alone
    #[arg(long)]
    pub(crate) fix: bool,
    /// With --fix, remove what this program has left at the VM, too
    #[arg(long, value_enum, value_name = "PROGRAM", requires = "fix")]
    pub(crate) foreign: Option<Foreign>,
    /// Remove all marks of this repository, and repair what --fix repairs
    #[arg(long)]
    pub(crate) purge_marks: bool,
    /// Directory in which backups make scratch files
    #[arg(long, value_name = "DIR")]
    pub(crate) scratch_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Foreign {
    /// qmpbackup: its nodes, filters, jobs, bitmaps and fleece images
    Qmpbackup,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// qcow2 version 3
    Qcow2,
    /// Raw, sparse
    Raw,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_of_arguments_is_sound() {
        Args::command().debug_assert();
    }
}
