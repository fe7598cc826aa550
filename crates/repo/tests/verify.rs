//! Whatever happens to an object of a repository, `verify` finds and names it,
//! and no restore gives a wrong byte.
//!
//! One repository in a real directory, plain and encrypted, with each codec; to
//! each kind of object each kind of harm, at every bit or length of the small
//! ones. Counted, so that the number of cases cannot shrink unseen.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test may panic, and docs/testing.md tells the numbers of cases"
)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use highwater_model::PointId;
use highwater_repo::{
    Compression, ImageRoot, RepoError, RepoErrorKind, Repository, Secret, VerifyDepth, VerifyError,
    VerifyOptions, VerifyReport, WriterOptions,
};
use highwater_store::{LocalStore, Store};
use support::*;
use tempfile::TempDir;

/// Where repositories of these tests lie: most of their time is file system.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        return TempDir::new_in(memory).unwrap();
    }
    TempDir::new().unwrap()
}

/// A repository with three points of two VMs.
struct Shelf {
    dir: TempDir,
    secret: Option<Secret>,
    points: Vec<(PointId, Image)>,
}

/// The chunks of an image that are not zero, by index, and its size.
struct Image {
    chunks: BTreeMap<u64, Vec<u8>>,
    size_bytes: u64,
}

impl Image {
    fn of(bytes: &[u8]) -> Self {
        let chunks = (0..).zip(bytes.chunks(CHUNK));
        let present = chunks.filter(|(_, chunk)| chunk.iter().any(|byte| *byte != 0));
        Self {
            chunks: present.map(|(at, chunk)| (at, chunk.to_vec())).collect(),
            size_bytes: bytes.len() as u64,
        }
    }
}

/// What a restore of all points came to.
#[derive(Debug, PartialEq, Eq)]
enum Restored {
    AllRight,
    SomeRefused,
}

impl Shelf {
    fn new(secret: Option<Secret>, compression: Compression) -> Self {
        let dir = scratch();
        let store: Arc<dyn Store> = Arc::new(LocalStore::new(dir.path()));
        let repo = init(store, secret.clone()).unwrap();
        let mut shelf = Self {
            dir,
            secret,
            points: Vec::new(),
        };
        // Two levels of pages, few chunks, the last short; one of them shared.
        let mut image = vec![0; CHUNK * 70 + 90];
        image[..CHUNK].fill(b'x');
        image[CHUNK * 66..CHUNK * 67].copy_from_slice(&text(1));
        image[CHUNK * 70..].copy_from_slice(&noise(1, 90));
        let first = shelf.save(&repo, compression, "web", 1, None, &image);
        image[CHUNK * 3..CHUNK * 4].copy_from_slice(&text(2));
        image[CHUNK * 70..].copy_from_slice(&noise(2, 90));
        shelf.save(&repo, compression, "web", 2, Some(first), &image);
        image[CHUNK..CHUNK * 2].copy_from_slice(&text(3));
        shelf.save(&repo, compression, "db", 3, None, &image);
        shelf
    }

    fn save(
        &mut self,
        repo: &Repository,
        compression: Compression,
        name: &str,
        at: i64,
        prev: Option<PointId>,
        bytes: &[u8],
    ) -> PointId {
        let options = WriterOptions {
            compression,
            ..options()
        };
        let writer = repo.writer(options).unwrap();
        let root = store_full(&writer, bytes).unwrap();
        let file = writer.add_bytes(&mut &b"nvram"[..], 5).unwrap();
        let mut manifest = manifest(&vm(name), at, &[root]);
        manifest.sequence = if prev.is_some() { 2 } else { 1 };
        manifest.prev = prev;
        manifest.files = vec![highwater_repo::SavedFile {
            role: "nvram".to_owned(),
            path: "/nvram/vars".to_owned(),
            mode: 0o600,
            captured_at: manifest.taken_at,
            image: file,
        }];
        writer.flush().unwrap().commit(&manifest).unwrap();
        self.points.push((manifest.point, Image::of(bytes)));
        manifest.point
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::new(LocalStore::new(self.dir.path()))
    }

    fn open(&self) -> Result<Repository, RepoError> {
        Repository::open(self.store(), self.secret.as_ref())
    }

    /// Verifies with the key, or without it where the key is what is damaged.
    fn verify(&self, depth: VerifyDepth) -> Result<VerifyReport, VerifyError> {
        match self.open() {
            Ok(repo) => repo.verify(&options_of(depth)),
            Err(_) => self.verify_without_key(depth),
        }
    }

    fn verify_without_key(&self, depth: VerifyDepth) -> Result<VerifyReport, VerifyError> {
        Repository::verify_without_key(self.store().as_ref(), &options_of(depth))
    }

    /// Restores every point; panics if wrong bytes come out.
    fn restore(&self) -> Restored {
        let Ok(repo) = self.open() else {
            return Restored::SomeRefused;
        };
        let list = repo.points().unwrap();
        let mut right = 0;
        for point in &list.points {
            let (_, wanted) = self
                .points
                .iter()
                .find(|(id, _)| *id == point.point)
                .unwrap();
            let disk = compare(&repo, &point.disks[0].image, wanted);
            let file = compare(&repo, &point.files[0].image, &Image::of(b"nvram"));
            right += usize::from(disk.is_ok() && file.is_ok());
        }
        if right == self.points.len() {
            Restored::AllRight
        } else {
            Restored::SomeRefused
        }
    }

    /// Returns the objects of a kind: `config`, `keys`, `packs`, `index` or `points`.
    fn objects(&self, kind: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        collect(&self.dir.path().join(kind), &mut found);
        found.sort();
        assert!(!found.is_empty() || self.secret.is_none(), "no {kind}");
        found
    }

    /// Packs of chunks (1) or of pages (2).
    fn packs(&self, kind: u8) -> Vec<PathBuf> {
        let mut packs = self.objects("packs");
        packs.retain(|path| fs::read(path).unwrap()[7] == kind);
        packs
    }

    fn name(&self, path: &Path) -> String {
        let path = path.strip_prefix(self.dir.path()).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

/// Reads an image; panics unless all of it is as wanted.
fn compare(repo: &Repository, root: &ImageRoot, wanted: &Image) -> Result<(), RepoError> {
    let image = repo.image(root)?;
    assert_eq!(root.size_bytes, wanted.size_bytes);
    let found = image.chunks().collect::<Result<Vec<_>, _>>()?;
    let present = found.iter().map(|(index, _)| *index);
    assert!(
        present.eq(wanted.chunks.keys().copied()),
        "chunks are missing or too many"
    );
    repo.fetch(&found, 1, &|index, chunk: &[u8]| {
        assert!(chunk == wanted.chunks[&index], "wrong bytes");
        Ok::<(), RepoError>(())
    })
}

fn text(seed: u8) -> Vec<u8> {
    let line = format!("chunk {seed} compresses well and is unlike the others\n");
    line.into_bytes().into_iter().cycle().take(CHUNK).collect()
}

fn collect(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_file() {
        return found.push(path.to_owned());
    }
    for entry in fs::read_dir(path).into_iter().flatten() {
        collect(&entry.unwrap().path(), found);
    }
}

fn options_of(depth: VerifyDepth) -> VerifyOptions<'static> {
    VerifyOptions {
        points: None,
        depth,
        threads: 1,
        progress: &|_| true,
    }
}

fn put(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::File::create(path).unwrap().write_all(bytes).unwrap();
}

/// What was done to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    Flip(usize),
    Cut(usize),
    Longer(usize),
    Delete,
    Other,
}

/// Harms one object in one way and looks what is said; puts it back.
fn try_harm(shelf: &Shelf, path: &Path, good: &[u8], harm: Harm, bytes: Option<&[u8]>) {
    match bytes {
        Some(bytes) => put(path, bytes),
        None => fs::remove_file(path).unwrap(),
    }
    let name = shelf.name(path);
    let what = format!("{name}: {harm:?}");
    let restored = shelf.restore();
    check_found(shelf, &name, harm, &what, &restored);
    put(path, good);
}

fn check_found(shelf: &Shelf, name: &str, harm: Harm, what: &str, restored: &Restored) {
    let report = shelf.verify(VerifyDepth::Data);
    if name == "config" {
        // Nothing can be opened, and the error names the object.
        let Err(VerifyError::Repo(error)) = report else {
            panic!("{what}: {report:?}");
        };
        let wanted = match harm {
            Harm::Delete => vec![RepoErrorKind::NoRepository],
            // A digit of the version, or a feature's name, may have changed.
            Harm::Flip(_) => vec![RepoErrorKind::Damaged, RepoErrorKind::NewerFormat],
            _ => vec![RepoErrorKind::Damaged],
        };
        assert!(wanted.contains(&error.kind()), "{what}: {error:?}");
        return;
    }
    let report = report.unwrap();
    let names = |path: Option<&str>| {
        let mut objects = report.damage.iter().map(|damage| &damage.object);
        objects.any(|object| object.path.as_deref() == path)
    };
    let kind = name.split('/').next().unwrap();
    match (kind, harm) {
        // Nobody knows how many there were: what they showed is missing.
        ("index" | "keys", Harm::Delete) => assert!(names(None), "{what}: {report:?}"),
        ("points", Harm::Delete) => {
            // The newest point of a VM leaves no trace; an older one is named
            // by the next.
            let point = name.rsplit('/').next().unwrap();
            let is_first = shelf.points[0].0.to_string() == point;
            let told = report
                .warnings
                .iter()
                .any(|warning| warning.contains(point));
            assert_eq!(told, is_first, "{what}: {report:?}");
            assert!(report.is_clean());
            return;
        }
        _ => assert!(names(Some(name)), "{what}: {report:?}"),
    }
    // What a restore refuses, a report names with its point.
    if *restored == Restored::SomeRefused && kind != "keys" {
        let hurts = report.damage.iter().any(|damage| !damage.points.is_empty());
        assert!(hurts, "{what}: {report:?}");
    }
    if *restored == Restored::AllRight {
        let hurt = report.damage.iter().any(|damage| !damage.points.is_empty());
        assert!(!hurt, "{what}: a whole point is called hurt: {report:?}");
    }
    // Of all the flipped bits, one in 16 is looked at in every way.
    if !matches!(harm, Harm::Flip(bit) if bit % 16 != 0) {
        check_structure(shelf, name, harm, what, &report);
        check_without_key(shelf, name, harm, what);
    }
}

/// Everything but the content of packs is looked at without `--read-data`.
fn check_structure(shelf: &Shelf, name: &str, harm: Harm, what: &str, full: &VerifyReport) {
    let flipped_pack = name.starts_with("packs/") && matches!(harm, Harm::Flip(_) | Harm::Other);
    if flipped_pack {
        return;
    }
    let report = shelf.verify(VerifyDepth::Structure).unwrap();
    let objects = |report: &VerifyReport| -> Vec<_> {
        report
            .damage
            .iter()
            .map(|damage| damage.object.clone())
            .collect()
    };
    assert_eq!(objects(&report), objects(full), "{what}");
}

fn check_without_key(shelf: &Shelf, name: &str, harm: Harm, what: &str) {
    let report = shelf.verify_without_key(VerifyDepth::Data).unwrap();
    // A whole manifest in another's place, and a lost index, show only with the key.
    let hidden = (name.starts_with("points/") && harm == Harm::Other)
        || (name.starts_with("index/") && harm == Harm::Delete);
    assert_eq!(report.is_clean(), hidden, "{what}: {report:?}");
}

/// How fine the flips are. With `HIGHWATER_EVERY_BIT` in the environment always
/// every bit of every object, which takes hours.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Grain {
    /// Every bit of every object.
    Bits,
    /// A bit of every byte; of large objects, of every n-th.
    Bytes,
}

/// Flips of one object that is not small.
const FLIPS: usize = 250;

/// Returns the numbers of the bits to flip.
fn flips(good: &[u8], grain: Grain) -> Vec<usize> {
    if grain == Grain::Bits || std::env::var_os("HIGHWATER_EVERY_BIT").is_some() {
        return (0..good.len() * 8).collect();
    }
    // Headers in any case; of long zeroes, which fill up index blocks, few.
    let counts = |at: &usize| *at < 128 || good[*at] != 0 || at.is_multiple_of(32);
    let bytes: Vec<usize> = (0..good.len()).filter(counts).collect();
    let step = 1 + bytes.len() / FLIPS;
    let (head, rest) = bytes.split_at(bytes.len().min(128));
    let rest = rest.iter().step_by(step);
    head.iter().chain(rest).map(|at| at * 8 + at % 8).collect()
}

/// Does every harm to every object of `paths`; returns how many.
fn harm_all(shelf: &Shelf, paths: &[PathBuf], others: &[Vec<u8>], grain: Grain) -> usize {
    let mut cases = 0;
    let mut harm = |path: &Path, good: &[u8], harm: Harm, bytes: Option<&[u8]>| {
        cases += 1;
        try_harm(shelf, path, good, harm, bytes);
    };
    for path in paths {
        let good = fs::read(path).unwrap();
        for bit in flips(&good, grain) {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            harm(path, &good, Harm::Flip(bit), Some(&bad));
        }
        for len in (0..good.len()).step_by(1 + good.len() / 32) {
            harm(path, &good, Harm::Cut(len), Some(&good[..len]));
        }
        for more in [1, 44, 4096] {
            for byte in [0, 0xff] {
                let bad = [good.as_slice(), &vec![byte; more]].concat();
                harm(path, &good, Harm::Longer(more), Some(&bad));
            }
        }
        harm(path, &good, Harm::Delete, None);
        for other in others.iter().filter(|other| **other != good) {
            harm(path, &good, Harm::Other, Some(other));
        }
    }
    cases
}

/// Returns the bytes of objects of a kind: of this repository, and of a strange one.
fn others(shelf: &Shelf, strange: &Shelf, kind: &str) -> Vec<Vec<u8>> {
    let all = shelf.objects(kind).into_iter().chain(strange.objects(kind));
    all.map(|path| fs::read(path).unwrap()).collect()
}

const CODECS: [Compression; 3] = [Compression::Zstd(1), Compression::Lz4, Compression::None];

/// Harms all objects of a kind, in plain and encrypted repositories.
fn check(kind: &str, codecs: &[Compression], grain: Grain, cases_min: usize) {
    let mut cases = 0;
    for secret in [None, Some(key_file())] {
        for codec in codecs {
            let shelf = Shelf::new(secret.clone(), *codec);
            let strange = Shelf::new(secret.clone(), *codec);
            assert_eq!(shelf.restore(), Restored::AllRight);
            let report = shelf.verify(VerifyDepth::Data).unwrap();
            assert!(
                report.is_clean() && report.warnings.is_empty(),
                "{report:?}"
            );
            let (folder, paths) = match kind {
                "chunks" => ("packs", shelf.packs(1)),
                "pages" => ("packs", shelf.packs(2)),
                kind => (kind, shelf.objects(kind)),
            };
            let others = match kind {
                // Another configuration of the same shape is no damage: nothing
                // but the repository's id is in it (see below).
                "config" => Vec::new(),
                _ => others(&shelf, &strange, folder),
            };
            cases += harm_all(&shelf, &paths, &others, grain);
        }
    }
    println!("{kind}: {cases} cases");
    assert!(cases >= cases_min, "only {cases} cases of {kind}");
}

#[test]
fn harm_to_the_config_is_found() {
    check("config", &CODECS[..1], Grain::Bits, 3500);
}

#[test]
fn harm_to_a_key_is_found() {
    check("keys", &CODECS[..1], Grain::Bits, 2500);
}

#[test]
fn harm_to_a_manifest_is_found() {
    check("points", &CODECS[..1], Grain::Bytes, 1900);
}

#[test]
fn harm_to_an_index_file_is_found() {
    check("index", &CODECS[..1], Grain::Bytes, 1900);
}

#[test]
fn harm_to_a_pack_of_chunks_is_found() {
    check("chunks", &CODECS, Grain::Bytes, 6000);
}

#[test]
fn harm_to_a_pack_of_pages_is_found() {
    check("pages", &CODECS[..1], Grain::Bytes, 1700);
}
