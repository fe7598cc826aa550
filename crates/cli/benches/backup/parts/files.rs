//! Everything, encrypted, beside programs that back up files.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use highwater_testkit::{DiskSpec, GIB, Lab, MIB};

use crate::bed::{self, Bed};
use crate::bound::{Limit, goal};
use crate::disk;
use crate::measure::{self, Cost};
use crate::programs;
use crate::stage::{Part, Stage, Step, take_turns};
use crate::table::{OURS, Table};

const DISK_BYTES: u64 = 6 * GIB;
/// With what the file system itself writes: 4.3 GB.
const FILES_BYTES: u64 = 4050 * MIB;
const WHAT: &str = "full of 6 GiB, encrypted, compressed";

/// A program that backs up files.
struct Peer {
    who: &'static str,
    program: &'static str,
    init: &'static [&'static str],
    backup: &'static [&'static str],
}

const PEERS: [Peer; 3] = [
    Peer {
        who: "restic",
        program: "restic",
        init: &["init"],
        backup: &["backup", "--compression", "auto"],
    },
    Peer {
        who: "rustic, fixed 1 MiB",
        program: "rustic",
        init: &[
            "init",
            "--set-compression",
            "1",
            "--set-chunker",
            "fixed_size",
            "--set-chunk-size",
            "1MiB",
        ],
        backup: &["backup"],
    },
    Peer {
        who: "borg, fixed 4 MiB, zstd,1",
        program: "borg",
        init: &["init", "-e", "repokey-blake2"],
        backup: &[
            "create",
            "--sparse",
            "--compression",
            "zstd,1",
            "--chunker-params",
            "fixed,4194304",
            "::one",
        ],
    },
];

pub(super) fn run(stage: &mut Stage) -> Result<Part> {
    let lab = Lab::start()?;
    let image = lab.path("disk.raw");
    let files_bytes = disk::raw_with_files(&image, DISK_BYTES, stage.scaled(FILES_BYTES))?;
    let bed = Bed::start(&lab, "web01", DiskSpec::existing("vda", &image, "raw"))?;
    let password = bed::password_file(&lab)?;
    let (here, absent): (Vec<&Peer>, Vec<&Peer>) = PEERS
        .iter()
        .partition(|peer| programs::is_installed(peer.program));
    let mut table = Table::default();
    let ours = || {
        let repo = bed.encrypted_repository(lab.path("repo"))?;
        bed.full_into(&repo, "zstd:1")
    };
    let theirs: Vec<_> = here
        .iter()
        .map(|peer| (peer.who, || peer.back_up(&lab, &password, &image)))
        .collect();
    for round in 0..stage.rounds {
        let mut steps: Vec<Step<'_>> = vec![((WHAT, OURS), &ours)];
        for (who, step) in &theirs {
            steps.push(((WHAT, *who), step));
        }
        take_turns(&mut table, round, &steps)?;
    }
    let seconds = |who| table.median((WHAT, who), |cost: &Cost| cost.wall_seconds);
    let fastest = here
        .iter()
        .map(|peer| peer.who)
        .min_by(|a, b| seconds(a).total_cmp(&seconds(b)))
        .unwrap_or("nobody");
    let bounds = vec![
        goal(
            &format!("full, encrypted: times faster than the fastest ({fastest})"),
            table.times_faster(WHAT, fastest),
            Limit::AtLeast(2.0),
        ),
        goal(
            &format!("full, encrypted: times the processor time of the fastest ({fastest})"),
            table.ratio((WHAT, OURS), (WHAT, fastest), Cost::all_cpu_seconds),
            Limit::AtMost(0.5),
        ),
    ];
    let mut about = format!(
        "A raw disk of {} GiB, ext4 with {} MiB of files, and all repositories on tmpfs. The others back up the raw image as a file; Highwater the disk of the running VM, and QEMU's processor time counts as its own.",
        DISK_BYTES / GIB,
        files_bytes / MIB
    );
    for peer in absent {
        write!(about, " Not installed: {}.", peer.program)?;
    }
    Ok(Part {
        about,
        table,
        bounds,
    })
}

impl Peer {
    /// Backs up the image into a new repository, which is removed.
    fn back_up(&self, lab: &Lab, password: &Path, image: &Path) -> Result<Cost> {
        let repo = lab.path(self.program);
        measure::run(self.command(lab, &repo, password)?.args(self.init), None)?;
        let mut command = self.command(lab, &repo, password)?;
        let (_, cost) = measure::run(command.args(self.backup).arg(image), None)?;
        let cost = cost.with_stored(&repo)?;
        bed::remove(&repo)?;
        Ok(cost)
    }

    fn command(&self, lab: &Lab, repo: &Path, password: &Path) -> Result<Command> {
        let mut command = Command::new(self.program);
        let home: PathBuf = lab.path(&format!("{}-home", self.program));
        command
            .env("HOME", &home)
            .env("RESTIC_REPOSITORY", repo)
            .env("RESTIC_PASSWORD_FILE", password)
            .env("RUSTIC_REPOSITORY", repo)
            .env("RUSTIC_PASSWORD_FILE", password)
            .env("BORG_REPO", repo)
            .env("BORG_BASE_DIR", &home)
            .env("BORG_PASSPHRASE", std::fs::read_to_string(password)?);
        Ok(command)
    }
}
