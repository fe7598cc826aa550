//! Restore points: their manifests, and the one write that makes one.

use highwater_model::PointId;
use highwater_store::{Listed, ObjectKey, ObjectKind, StoreErrorKind};

use crate::container::{self, CONTAINER_LEN_MAX, ContainerKind};
use crate::error::{Flaw, RepoError, RepoErrorKind};
use crate::manifest::{Manifest, VmIdentity};
use crate::objects::Objects;

/// The restore points that were found.
#[derive(Debug, Default)]
pub struct PointList {
    /// Their manifests by id, which is the order of one VM's backups even where
    /// the clock went back.
    pub points: Vec<Manifest>,
    /// Manifests that cannot be used.
    pub damaged: Vec<DamagedPoint>,
}

/// A manifest that cannot be used.
#[derive(Debug)]
pub struct DamagedPoint {
    /// The folder of its VM.
    pub vm_key: String,
    /// Its name, which should be a point's id.
    pub name: String,
    /// What is wrong.
    pub error: RepoError,
}

/// Returns all points in `folder` (`<vm key>/`, or empty for all).
pub(crate) fn list(objects: &Objects, folder: &str) -> Result<PointList, RepoError> {
    let listed = objects
        .store
        .list(ObjectKind::Point, folder)
        .map_err(|error| RepoError::store("list restore points", error))?;
    let mut list = PointList::default();
    for Listed { key, .. } in listed {
        match read(objects, &key) {
            Ok(Some(manifest)) => list.points.push(manifest),
            // Deleted since it was listed.
            Ok(None) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    RepoErrorKind::Damaged | RepoErrorKind::NewerFormat
                ) =>
            {
                let (vm_key, name) = key.name().split_once('/').unwrap_or_default();
                let (vm_key, name) = (vm_key.to_owned(), name.to_owned());
                list.damaged.push(DamagedPoint {
                    vm_key,
                    name,
                    error,
                });
            }
            Err(error) => return Err(error),
        }
    }
    list.points.sort_by_key(|manifest| manifest.point);
    Ok(list)
}

/// Returns the ids of a VM's points, oldest first; what is named otherwise is
/// nobody's point.
pub(crate) fn ids(objects: &Objects, vm: &VmIdentity) -> Result<Vec<PointId>, RepoError> {
    let folder = format!("{}/", objects.ids.vm_key(vm));
    let listed = objects
        .store
        .list(ObjectKind::Point, &folder)
        .map_err(|error| RepoError::store("list restore points", error))?;
    let names = listed
        .iter()
        .filter_map(|listed| listed.key.name().rsplit('/').next());
    let mut ids: Vec<PointId> = names.filter_map(|name| name.parse().ok()).collect();
    ids.sort();
    Ok(ids)
}

/// Reads one manifest.
pub(crate) fn manifest(
    objects: &Objects,
    vm: &VmIdentity,
    point: PointId,
) -> Result<Manifest, RepoError> {
    let found = read(objects, &key_of(objects, vm, point))?;
    let missing = || {
        RepoError::new(
            RepoErrorKind::Damaged,
            format!("read restore point {point}"),
        )
    };
    found.ok_or_else(|| missing().because("it is not there"))
}

/// Says whether a point's manifest exists.
pub(crate) fn exists(
    objects: &Objects,
    vm: &VmIdentity,
    point: PointId,
) -> Result<bool, RepoError> {
    match objects.store.size(&key_of(objects, vm, point)) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(false),
        Err(error) => Err(RepoError::store(
            format!("look for restore point {point}"),
            error,
        )),
    }
}

pub(crate) fn read(objects: &Objects, key: &ObjectKey) -> Result<Option<Manifest>, RepoError> {
    let what = || format!("read `{key}`");
    let bytes = match objects.store.get(key, CONTAINER_LEN_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == StoreErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(RepoError::store(what(), error)),
    };
    let damaged = |flaw| RepoError::damaged(what(), flaw);
    let plain = container::open(ContainerKind::Manifest, key, objects.seal.as_ref(), &bytes)
        .map_err(damaged)?;
    let version: Version =
        serde_json::from_slice(&plain).map_err(|_| damaged(Flaw("it is not a manifest")))?;
    if version.version != MANIFEST_VERSION {
        let why = format!("it has version {}", version.version);
        return Err(RepoError::new(RepoErrorKind::NewerFormat, what()).because(why));
    }
    let manifest: Manifest = serde_json::from_slice(&plain)
        .map_err(|error| RepoError::new(RepoErrorKind::Damaged, what()).because(error))?;
    // Without encryption nothing else ties the content to the name.
    if key_of(objects, &manifest.vm, manifest.point) != *key {
        return Err(damaged(Flaw("it is the manifest of another point")));
    }
    check_roots(objects, &manifest).map_err(damaged)?;
    Ok(Some(manifest))
}

/// Writes the manifest. Last: until this object exists nothing refers to the
/// packs and the index below it, so a crash before this costs space, never a
/// restore point.
pub(crate) fn commit(objects: &Objects, manifest: &Manifest) -> Result<(), RepoError> {
    let what = || format!("commit restore point {}", manifest.point);
    if manifest.version != MANIFEST_VERSION {
        return Err(RepoError::usage(what(), "its manifest has a wrong version"));
    }
    check_roots(objects, manifest).map_err(|flaw| RepoError::usage(what(), flaw.to_string()))?;
    let key = key_of(objects, &manifest.vm, manifest.point);
    let plain = serde_json::to_vec(manifest)
        .map_err(|error| RepoError::new(RepoErrorKind::Usage, what()).because(error))?;
    // What could not be read back would be no restore point.
    let again = serde_json::from_slice::<Manifest>(&plain);
    if !again.is_ok_and(|again| again == *manifest) {
        return Err(RepoError::usage(what(), "its manifest has too long a list"));
    }
    let object = container::seal(ContainerKind::Manifest, &key, objects.seal.as_ref(), &plain)
        .ok_or_else(|| RepoError::usage(what(), "its manifest is too large"))?;
    objects.store.put(&key, &[&object]).map_err(|error| {
        if error.maybe_done() {
            return RepoError::new(RepoErrorKind::CommitUnknown, what()).because(error);
        }
        RepoError::store(what(), error)
    })
}

const MANIFEST_VERSION: u32 = 1;

#[derive(serde::Deserialize)]
struct Version {
    version: u32,
}

fn check_roots(objects: &Objects, manifest: &Manifest) -> Result<(), Flaw> {
    let disks = manifest.disks.iter().map(|disk| &disk.image);
    let files = manifest.files.iter().map(|file| &file.image);
    if disks.chain(files).all(|root| objects.ids.proves(root)) {
        return Ok(());
    }
    Err(Flaw(
        "the root hash of an image does not match its size and top page",
    ))
}

pub(crate) fn key_of(objects: &Objects, vm: &VmIdentity, point: PointId) -> ObjectKey {
    let name = format!("{}/{point}", objects.ids.vm_key(vm));
    ObjectKey::new(ObjectKind::Point, name).expect("hexadecimal and base 32 are good names")
}
