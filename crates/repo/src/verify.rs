//! Proves a repository: is every object what was written, and can every restore
//! point be read?
//!
//! ```text
//! keys ▸ manifests ▸ index files ▸ packs there? ▸ trees ▸ [data] ▸ whose fault? ▸ what is hurt?
//! ```
//!
//! Manifests are listed before index files and packs: what a point needs is
//! durable before the point exists, so a backup that runs meanwhile is never
//! taken for damage. Damage ends nothing: it becomes a finding, one per object.
//!
//! In memory, whatever the repository's size: the tables of the index (as in
//! every reader), 80 MiB that remember visited pages, 36 MiB of chunks to look
//! up, about 110 bytes per pack, a few kilobytes per point, and 9 MiB per thread
//! that reads data. Where there is damage, also 80 MiB of visited pages and at
//! most 200 MiB of its ranges and objects; beyond that the report says that it
//! is not complete.

mod data;
mod findings;
mod hurt;
mod index_scan;
mod report;
mod seen;
mod small;
mod tables;
mod walk;

use std::collections::HashSet;

use highwater_store::Store;

use crate::config::Config;
use crate::error::RepoError;
use crate::objects::Objects;
use crate::repository::{Repository, need_config};
use crate::seal::Cipher;
use crate::wire::wide;

pub use report::{
    Checked, Damage, DamagedObject, HurtFile, HurtImage, HurtPoint, Progress, VerifyDepth,
    VerifyError, VerifyOptions, VerifyPhase, VerifyReport,
};

use data::BadPacks;
use findings::Findings;
use walk::Walked;

impl Repository {
    /// Verifies the repository.
    pub fn verify(&self, options: &VerifyOptions<'_>) -> Result<VerifyReport, VerifyError> {
        let objects = self.objects.as_ref();
        let verification = Verification {
            objects: Some(objects),
            ..Verification::new(objects.store.as_ref(), &objects.config, options)
        };
        verification.run()
    }

    /// Verifies all of an encrypted repository that can be without its key:
    /// names, hashes, lengths, and the index against packs. Which points damage
    /// hurts cannot be told, nor whether manifests have changed places.
    pub fn verify_without_key(
        store: &dyn Store,
        options: &VerifyOptions<'_>,
    ) -> Result<VerifyReport, VerifyError> {
        let (config, _) = need_config(store)?;
        if options.points.is_some() {
            let why = "which restore point is meant cannot be told without the key";
            return Err(RepoError::usage("verify a restore point", why).into());
        }
        Verification::new(store, &config, options).run()
    }
}

/// What nobody can check without the key.
const UNCHECKED_WITHOUT_KEY: [&str; 3] = [
    "what manifests say, and whether one lies in the place of another",
    "trees: whether all chunks and pages are there, and which restore points damage hurts",
    "whether the key objects open anything",
];
const UNCHECKED_DATA: [&str; 1] =
    ["the sealed content of records (their stored bytes were hashed)"];

/// One verification under way.
struct Verification<'a> {
    store: &'a dyn Store,
    config: &'a Config,
    /// `None` without the key.
    objects: Option<&'a Objects>,
    options: &'a VerifyOptions<'a>,
    findings: Findings,
    warnings: Vec<String>,
    checked: Checked,
    points_hurt: HashSet<String>,
}

impl<'a> Verification<'a> {
    fn new(store: &'a dyn Store, config: &'a Config, options: &'a VerifyOptions<'a>) -> Self {
        Self {
            store,
            config,
            objects: None,
            options,
            findings: Findings::default(),
            warnings: Vec::new(),
            checked: Checked::default(),
            points_hurt: HashSet::new(),
        }
    }

    fn run(mut self) -> Result<VerifyReport, VerifyError> {
        self.check_keys()?;
        let truncated = match self.objects {
            Some(objects) => self.with_key(objects)?,
            None => self.without_key()?,
        };
        self.checked.points_hurt = wide(self.points_hurt.len());
        let unchecked = match (self.objects, self.options.depth) {
            (Some(_), _) => Vec::new(),
            (None, VerifyDepth::Structure) => UNCHECKED_WITHOUT_KEY.to_vec(),
            (None, VerifyDepth::Data) => UNCHECKED_WITHOUT_KEY
                .into_iter()
                .chain(UNCHECKED_DATA)
                .collect(),
        };
        Ok(VerifyReport {
            repository: self.config.id,
            encrypted: self.config.cipher != Cipher::None,
            checked: self.checked,
            damage: self.findings.into_damage(),
            warnings: self.warnings,
            unchecked,
            truncated,
        })
    }

    /// Returns whether there was more damage than could be remembered.
    fn with_key(&mut self, objects: &'a Objects) -> Result<bool, VerifyError> {
        let points = self.check_points(objects)?;
        // The repository may have been opened long ago.
        objects.index.refresh()?;
        let mut tables = self.check_index()?;
        self.check_packs(&mut tables)?;
        let Walked { mut bad, used } = self.walk(objects, &points)?;
        let only = self.options.points.is_some().then_some(&used);
        let packs = match self.options.depth {
            VerifyDepth::Structure => BadPacks::new(),
            VerifyDepth::Data => self.read_data(&tables, only)?,
        };
        self.blame(objects, &tables, &packs, &mut bad)?;
        self.find_hurt(objects, &points, &bad)?;
        self.tell_of_missing_packs(&tables, true);
        Ok(bad.is_truncated())
    }

    fn without_key(&mut self) -> Result<bool, VerifyError> {
        self.check_sealed_points()?;
        let mut tables = self.check_index()?;
        self.check_packs(&mut tables)?;
        if self.options.depth == VerifyDepth::Data {
            self.read_data(&tables, None)?;
        }
        self.tell_of_missing_packs(&tables, false);
        Ok(false)
    }

    /// Tells how far it is; ends the work if that is wished.
    fn tell(&self, phase: VerifyPhase, done: u64, total: u64) -> Result<(), VerifyError> {
        if (self.options.progress)(Progress { phase, done, total }) {
            return Ok(());
        }
        Err(VerifyError::Interrupted)
    }
}
