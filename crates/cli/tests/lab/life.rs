//! The random life of a VM: whatever happens to it, in whatever order, every
//! restore point is what the disks were at its moment, every plain backup
//! succeeds, nothing of ours is left over, and nothing of others is touched.
//!
//! A seed draws what happens; a model knows what must be. `docs/testing.md`
//! tells how to replay a life, and how to let them go on for hours.

mod act;
mod backup;
mod bytes;
mod check;
mod draw;
mod found;
mod held;
mod model;
mod others;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use highwater_testkit::Vm;
use highwater_testkit::workload::Random;

use crate::support::Bed;
use draw::Operation;
use model::Model;

/// A VM, what has happened to it, and what must be.
struct Life {
    vm: Vm,
    model: Model,
    /// So that each file has a name of its own.
    files: u64,
    /// What happened, for whoever has to find out why it went wrong.
    log: Vec<String>,
    bed: Bed,
}

impl Life {
    fn begin(seed: u64) -> Result<Self> {
        let bed = Bed::start()?;
        let (repo, key) = (bed.lab.path("repo2"), bed.lab.path("key"));
        std::fs::write(&key, seed.to_be_bytes().repeat(8))?;
        std::fs::set_permissions(&key, Permissions::from_mode(0o600))?;
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let other = [
            "-r".to_owned(),
            text(&repo),
            "--key-file".to_owned(),
            text(&key),
        ];
        let mut random = Random(seed);
        let chunk = ["64KiB", "256KiB", "1MiB"][usize::try_from(random.below(3))?];
        let mut init = vec!["init", "--encryption", "keyfile", "--chunk-size", chunk];
        init.extend(other.iter().map(String::as_str));
        bed.run(&init)?;
        let mut model = Model::draw(&mut random, [Vec::new(), other.to_vec()]);
        let mut vm = bed.lab.vm("web01");
        for disk in &model.disks {
            vm = vm.disk(disk.kind.spec(disk.name, disk.bytes.len()));
        }
        let vm = vm.start()?;
        for disk in &mut model.disks {
            disk.chain = vec![vm.image(disk.name)];
        }
        let disks: Vec<String> = model
            .disks
            .iter()
            .map(|disk| format!("{} {:?} {:?}", disk.name, disk.kind, disk.bytes))
            .collect();
        Ok(Self {
            vm,
            model,
            files: 0,
            log: vec![format!(
                "a VM with {}; other chunks: {chunk}",
                disks.join(", ")
            )],
            bed,
        })
    }

    fn note(&mut self, text: &str) {
        self.log.push(format!("       {text}"));
    }

    /// The next operation. What it draws changes nothing for later ones.
    fn step(&mut self, seed: u64, number: u64) -> Result<()> {
        let mut random = Random(seed ^ (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let operation = Operation::draw(&self.model, &mut random);
        self.log.push(format!("{number:5}  {operation:?}"));
        let began = Instant::now();
        self.act(&operation, &mut random)?;
        let seconds = began.elapsed().as_secs_f64();
        if seconds > 5.0 {
            self.note(&format!("it took {seconds:.1} s"));
        }
        Ok(())
    }

    fn act(&mut self, operation: &Operation, random: &mut Random) -> Result<()> {
        match *operation {
            Operation::Writes {
                disk,
                count,
                flushed,
            } => self.write(&[disk], count, flushed, random),
            Operation::Backup {
                repository,
                ref options,
                fresh_runtime,
            } => self.back_up(repository, options, fresh_runtime),
            Operation::Held {
                repository,
                step,
                meanwhile,
            } => self.held(repository, step, meanwhile, random),
            Operation::Restore {
                repository,
                nth,
                one_disk,
                format,
            } => self.check_any(repository, nth, one_disk, format),
            Operation::Verify {
                repository,
                read_data,
            } => self.verify(repository, read_data),
            Operation::List { repository, nth } => self.check_list(repository, nth),
            Operation::Look => self.look(),
            Operation::Doctor { repository, what } => self.doctor(repository, what),
            Operation::Vm(what) => self.vm_life(what),
            Operation::Disk { disk, what } => self.disk_life(disk, what, random),
            Operation::Harm {
                repository,
                disk,
                what,
            } => self.harm(repository, disk, what),
            Operation::Foreign(what) => self.foreign(what),
        }
    }

    /// A plain backup into each repository, and then everything is compared.
    fn end(&mut self) -> Result<()> {
        self.log.push("  end".to_owned());
        if self.model.power == model::Power::Off {
            self.vm_life(draw::VmLife::Start)?;
        }
        for repository in 0..self.model.repositories.len() {
            self.back_up(repository, &[], false)?;
        }
        self.check_all()
    }

    fn live(&mut self, seed: u64, operations: u64) -> Result<()> {
        for number in 0..operations {
            self.step(seed, number)?;
        }
        self.end()
    }
}

/// Fails unless a VM outlives so many operations with every promise kept.
fn live(seed: u64, operations: u64) -> Result<()> {
    let mut life = Life::begin(seed)?;
    let lived = life.live(seed, operations);
    lived.map_err(|error| {
        anyhow!(
            "{error:#}\n\nlibvirtd says:\n{}\n\nwhat happened:\n{}\n\nreplay: {}",
            life.bed.lab.libvirtd_log(),
            life.log.join("\n"),
            replay(seed, operations)
        )
    })
}

fn replay(seed: u64, operations: u64) -> String {
    format!(
        "HIGHWATER_LIFE_SEED={seed} HIGHWATER_LIFE_OPERATIONS={operations} cargo nextest run \
         -p highwater --test lab -E 'test(=life::a_life_of_any_seed_loses_nothing)'"
    )
}

#[test]
fn a_random_life_loses_nothing() -> Result<()> {
    live(1, 60)
}

#[test]
fn another_random_life_loses_nothing() -> Result<()> {
    live(2, 60)
}

pub(crate) fn number(variable: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(variable) else {
        return Ok(None);
    };
    let parsed = text.parse();
    parsed
        .map(Some)
        .with_context(|| format!("{variable}={text}"))
}

/// Of one seed, or of one after the other for some time (`make soak`).
#[test]
fn a_life_of_any_seed_loses_nothing() -> Result<()> {
    let first = number("HIGHWATER_LIFE_SEED")?.unwrap_or(3);
    let operations = number("HIGHWATER_LIFE_OPERATIONS")?.unwrap_or(60);
    let seconds = number("HIGHWATER_LIFE_SECONDS")?.unwrap_or(0);
    let began = Instant::now();
    for seed in first.. {
        live(seed, operations)?;
        let lived = (seed - first + 1) * operations;
        let since = began.elapsed();
        eprintln!(
            "seeds {first} to {seed}: {lived} operations survived in {} s, {} a minute",
            since.as_secs(),
            lived * 60 / since.as_secs().max(1)
        );
        if since >= Duration::from_secs(seconds) {
            break;
        }
    }
    Ok(())
}
