//! The small objects: keys and manifests, with the key and without.

use std::collections::{BTreeMap, HashMap, HashSet};

use highwater_model::PointId;
use highwater_store::{Listed, ObjectKey, ObjectKind, StoreErrorKind};

use crate::container::{self, CONTAINER_LEN_MAX, ContainerKind};
use crate::error::{RepoError, RepoErrorKind};
use crate::manifest::{ImageRoot, Manifest};
use crate::objects::Objects;
use crate::points;
use crate::seal::Cipher;
use crate::secret::{self, KeyState};
use crate::verify::Verification;
use crate::verify::findings::{FindingNo, flaw_of, is_damage, last_cause};
use crate::verify::report::{HurtPoint, VerifyError, VerifyPhase};
use crate::wire::wide;

/// What is kept of a manifest while its trees are walked; definitions are not.
pub(super) struct PointInfo {
    pub(super) vm: String,
    pub(super) point: PointId,
    pub(super) images: Vec<ImageInfo>,
}

/// One image of a point.
pub(super) struct ImageInfo {
    pub(super) name: ImageName,
    pub(super) root: ImageRoot,
}

/// What an image is in its point.
pub(super) enum ImageName {
    Disk(String),
    File { role: String, path: String },
}

impl PointInfo {
    fn new(manifest: Manifest) -> Self {
        let disk = |disk: crate::DiskRecord| ImageInfo {
            name: ImageName::Disk(disk.target),
            root: disk.image,
        };
        let file = |file: crate::SavedFile| ImageInfo {
            name: ImageName::File {
                role: file.role,
                path: file.path,
            },
            root: file.image,
        };
        let disks = manifest.disks.into_iter().map(disk);
        Self {
            vm: manifest.vm.name,
            point: manifest.point,
            images: disks.chain(manifest.files.into_iter().map(file)).collect(),
        }
    }
}

/// What tells of other points of the same VM.
struct Link {
    point: PointId,
    sequence: u64,
    prev: Option<PointId>,
}

/// The points of one folder.
#[derive(Default)]
struct Folder {
    vm: Option<String>,
    names: HashSet<String>,
    links: Vec<Link>,
    damaged: Vec<(FindingNo, String)>,
}

impl Verification<'_> {
    pub(super) fn check_keys(&mut self) -> Result<(), VerifyError> {
        let what = "read the keys of the repository";
        let states = secret::inspect(self.store, self.config.id)
            .map_err(|error| RepoError::store(what, error))?;
        let encrypted = self.config.cipher != Cipher::None;
        let (mut usable, mut foreign) = (0_u64, 0_u64);
        for (key, state) in states {
            match state {
                KeyState::Ours if encrypted => usable = usable.saturating_add(1),
                KeyState::Ours | KeyState::Foreign => foreign = foreign.saturating_add(1),
                KeyState::Damaged(flaw) => {
                    self.findings.note(&key, flaw.to_string());
                }
            }
        }
        self.checked.keys = usable;
        if encrypted && usable == 0 {
            let why = "it is encrypted, and no usable key is there: nobody can read it";
            self.findings.note_unnamed(ObjectKind::Key, why);
        }
        if foreign > 0 {
            self.warnings.push(format!(
                "keys: {foreign} of another repository (an `init` that lost a race leaves one)"
            ));
        }
        Ok(())
    }

    /// Reads the manifests that were asked for.
    pub(super) fn check_points(
        &mut self,
        objects: &Objects,
    ) -> Result<Vec<PointInfo>, VerifyError> {
        let listed = self.list_points()?;
        let wanted: Option<HashSet<ObjectKey>> = self.options.points.map(|points| {
            let key =
                |(vm, point): &(crate::VmIdentity, PointId)| points::key_of(objects, vm, *point);
            points.iter().map(key).collect()
        });
        let mut folders: BTreeMap<String, Folder> = BTreeMap::new();
        let mut infos = Vec::new();
        let mut foreign_marks = 0_u64;
        let total = wide(wanted.as_ref().map_or(listed.len(), HashSet::len));
        for Listed { key, .. } in &listed {
            if wanted.as_ref().is_some_and(|wanted| !wanted.contains(key)) {
                continue;
            }
            self.checked.points = self.checked.points.saturating_add(1);
            self.tell(VerifyPhase::Points, self.checked.points, total)?;
            let (folder, name) = key.name().split_once('/').unwrap_or_default();
            let folder = folders.entry(folder.to_owned()).or_default();
            folder.names.insert(name.to_owned());
            match points::read(objects, key) {
                Ok(Some(manifest)) => {
                    let mark = manifest.mark.as_ref();
                    let is_foreign = mark.is_some_and(|mark| !mark.name.is_of(self.config.id));
                    foreign_marks = foreign_marks.saturating_add(u64::from(is_foreign));
                    folder.vm = Some(manifest.vm.name.clone());
                    folder.links.push(Link {
                        point: manifest.point,
                        sequence: manifest.sequence,
                        prev: manifest.prev,
                    });
                    self.checked.disks = self
                        .checked
                        .disks
                        .saturating_add(wide(manifest.disks.len()));
                    self.checked.files = self
                        .checked
                        .files
                        .saturating_add(wide(manifest.files.len()));
                    infos.push(PointInfo::new(manifest));
                }
                // Deleted since it was listed.
                Ok(None) => self.checked.points = self.checked.points.saturating_sub(1),
                Err(error) if is_damage(&error) => {
                    let number = self.findings.note(key, last_cause(&error));
                    folder.damaged.push((number, name.to_owned()));
                }
                Err(error) if error.kind() == RepoErrorKind::NewerFormat => {
                    self.warnings.push(format!(
                        "{key}: not checked, a newer version made it: {}",
                        last_cause(&error)
                    ));
                }
                Err(error) => return Err(error.into()),
            }
        }
        if foreign_marks > 0 {
            self.warnings.push(format!(
                "restore points with the mark of another repository: {foreign_marks}; \
                 has `config` been replaced?"
            ));
        }
        for folder in folders.into_values() {
            self.tell_of_folder(folder);
        }
        Ok(infos)
    }

    fn tell_of_folder(&mut self, mut folder: Folder) {
        for (number, point) in folder.damaged {
            self.points_hurt.insert(point.clone());
            if let Some(damage) = self.findings.get_mut(number) {
                damage.points.push(HurtPoint {
                    vm: folder.vm.clone(),
                    point,
                    lost: true,
                    disks: Vec::new(),
                    files: Vec::new(),
                });
            }
        }
        if self.options.points.is_some() {
            return;
        }
        folder.links.sort_by_key(|link| link.point);
        let known: HashMap<PointId, u64> = folder
            .links
            .iter()
            .map(|link| (link.point, link.sequence))
            .collect();
        let mut newest = 0_u64;
        for link in folder.links {
            let gone = link.prev.filter(|prev| {
                !known.contains_key(prev) && !folder.names.contains(&prev.to_string())
            });
            if let Some(gone) = gone {
                let number = link.sequence.saturating_sub(1);
                let more = number.saturating_sub(newest).saturating_sub(1);
                let before = match more {
                    0 => String::new(),
                    more => format!(", nor are {more} before it"),
                };
                self.warnings.push(format!(
                    "VM {}: restore point {gone} (number {number}) is not there{before}; \
                     number {} names it",
                    folder.vm.as_deref().unwrap_or("?"),
                    link.sequence
                ));
            }
            newest = newest.max(link.sequence);
        }
    }

    /// Checks of manifests what shows without the key.
    pub(super) fn check_sealed_points(&mut self) -> Result<(), VerifyError> {
        let listed = self.list_points()?;
        for Listed { key, .. } in &listed {
            self.checked.points = self.checked.points.saturating_add(1);
            self.tell(VerifyPhase::Points, self.checked.points, wide(listed.len()))?;
            let flaw = match self.store.get(key, CONTAINER_LEN_MAX) {
                Ok(bytes) => {
                    let kind = ContainerKind::Manifest;
                    let checked = container::check_without_key(kind, self.config.cipher, &bytes);
                    checked.err().map(|flaw| flaw.to_string())
                }
                Err(error) if error.kind() == StoreErrorKind::NotFound => continue,
                Err(error) => Some(
                    flaw_of(&error)
                        .ok_or_else(|| RepoError::store(format!("read `{key}`"), error))?,
                ),
            };
            let Some(flaw) = flaw else { continue };
            let point = key.name().rsplit('/').next().unwrap_or_default().to_owned();
            self.points_hurt.insert(point.clone());
            let number = self.findings.note(key, flaw);
            if let Some(damage) = self.findings.get_mut(number) {
                damage.points.push(HurtPoint {
                    vm: None,
                    point,
                    lost: true,
                    disks: Vec::new(),
                    files: Vec::new(),
                });
            }
        }
        Ok(())
    }

    fn list_points(&self) -> Result<Vec<Listed>, VerifyError> {
        let listed = self.store.list(ObjectKind::Point, "");
        Ok(listed.map_err(|error| RepoError::store("list restore points", error))?)
    }
}
