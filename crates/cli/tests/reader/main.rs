//! The page docs/format.md is enough: a reader written from it alone agrees
//! with the program, byte for byte, and refuses what the program refuses.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a test may stop at the first surprise"
)]

#[path = "../lab/support.rs"]
#[allow(dead_code, reason = "the lab's tests need more of it than these")]
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Vm, tool};
use tempfile::TempDir;

use crate::support::{Bed, mode, point};

const MIB: u64 = 1 << 20;
const CHUNKS: u8 = 1;
const PAGES: u8 = 2;
const PASSPHRASE: &str = "correct horse battery";

/// A repository, and how the program and the reader are told its secret.
struct Sides {
    bed: Bed,
    program: Vec<String>,
    reader: Vec<String>,
    secret: TempDir,
}

impl Sides {
    fn plain(init: &[&str]) -> Result<Self> {
        let secret = TempDir::new()?;
        let bed = Bed::with_init(&[&["--encryption", "none"], init].concat(), None)?;
        Ok(Self {
            bed,
            program: Vec::new(),
            reader: Vec::new(),
            secret,
        })
    }

    fn passphrase(init: &[&str]) -> Result<Self> {
        let secret = TempDir::new()?;
        let file = keep(&secret, "passphrase", format!("{PASSPHRASE}\n").as_bytes())?;
        let init = [&["--encryption", "passphrase"], init].concat();
        let bed = Bed::with_init(&init, Some(PASSPHRASE))?;
        let reader = vec!["--passphrase-file".to_owned(), file];
        Ok(Self {
            bed,
            program: Vec::new(),
            reader,
            secret,
        })
    }

    fn key_file(init: &[&str]) -> Result<Self> {
        let secret = TempDir::new()?;
        // The line end in it and after it belong to the key: all bytes count.
        let file = keep(
            &secret,
            "key",
            b"\x00\xffkey\nof more than 32 bytes, with a line end\n",
        )?;
        let told = ["--key-file", &file];
        let bed = Bed::with_init(
            &[&["--encryption", "keyfile"], &told[..], init].concat(),
            None,
        )?;
        let told = told.map(str::to_owned).to_vec();
        Ok(Self {
            bed,
            program: told.clone(),
            reader: told,
            secret,
        })
    }

    fn vm(&self) -> Result<Vm> {
        // More than 64 * 64 chunks of 64 KiB: three levels of pages. The other
        // one ends in the middle of a chunk.
        let web01 = self
            .bed
            .lab
            .vm("web01")
            .disk(DiskSpec::qcow2("vda", 300 * MIB));
        web01.disk(DiskSpec::qcow2("vdb", 10 * MIB + 512)).start()
    }

    fn backup(&self, vm: &Vm, args: &[&str]) -> Result<(String, String)> {
        let told: Vec<&str> = self.program.iter().map(String::as_str).collect();
        let report = self.bed.backup(vm, &[&told, args].concat())?;
        Ok((point(&report), mode(&report, "vda")))
    }

    /// Restores one disk by the program.
    fn restore(&self, point: &str, disk: &str, to: &Path) -> Result<()> {
        let to = to.to_str().context("a path is text")?;
        let args = ["restore", point, "-d", disk, "--format", "raw", "--to", to];
        let told: Vec<&str> = self.program.iter().map(String::as_str).collect();
        self.bed.run(&[&args[..], &told].concat()).map(drop)
    }

    /// Runs the reader; an error holds its one line.
    fn read(&self, args: &[&str]) -> Result<String> {
        self.read_with(&self.reader, args)
    }

    fn read_with(&self, secret: &[String], args: &[&str]) -> Result<String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let python = root.join("target/py/bin/python");
        ensure!(
            python.exists(),
            "{}: missing; run scripts/setup.sh",
            python.display()
        );
        let reader = tool(python).arg(root.join("tests/independent_reader.py"));
        reader.arg(self.bed.repo()).args(secret).args(args).run()
    }

    /// Restores one disk by the reader.
    fn read_disk(&self, point: &str, disk: &str, to: &Path) -> Result<()> {
        let id = point.strip_prefix("id:").context("a point has an id")?;
        let to = to.to_str().context("a path is text")?;
        self.read(&["restore", id, disk, to]).map(drop)
    }

    /// Fails unless both restore the same bytes.
    fn assert_agreed(&self, point: &str, disk: &str) -> Result<()> {
        let (ours, theirs) = (
            self.secret.path().join("ours"),
            self.secret.path().join("theirs"),
        );
        self.restore(point, disk, &ours)?;
        self.read_disk(point, disk, &theirs)?;
        let same = fs::read(&ours)? == fs::read(&theirs)?;
        ensure!(
            same,
            "{point} {disk}: program and reader restore different bytes"
        );
        fs::remove_file(ours)?;
        Ok(fs::remove_file(theirs)?)
    }

    /// Fails unless both refuse to restore, and leave no file.
    fn assert_refused(&self, point: &str, what: &str) -> Result<()> {
        let to = self.secret.path().join("damaged");
        let program = self.restore(point, "vda", &to);
        ensure!(
            program.is_err() && !to.exists(),
            "the program restored with damage: {what}"
        );
        let reader = self.read_disk(point, "vda", &to);
        ensure!(!to.exists(), "the reader left a file with damage: {what}");
        let error = reader
            .err()
            .with_context(|| format!("the reader took damage: {what}"))?;
        ensure!(
            format!("{error:#}").contains("error: "),
            "not one line: {error:#}"
        );
        ensure!(
            !format!("{error:#}").contains("Traceback"),
            "the reader fell: {error:#}"
        );
        Ok(())
    }

    /// Fails unless the reader refuses the pack, and the program either does
    /// so too or, reading one record and not all of the pack, is right.
    fn assert_never_wrong(&self, point: &str, right: &Path, at: usize) -> Result<()> {
        let to = self.secret.path().join("damaged");
        if self.restore(point, "vda", &to).is_ok() {
            ensure!(
                fs::read(&to)? == fs::read(right)?,
                "wrong bytes with damage at {at}"
            );
            fs::remove_file(&to)?;
        }
        ensure!(
            self.read_disk(point, "vda", &to).is_err(),
            "the reader took damage at {at}"
        );
        Ok(())
    }
}

fn keep(dir: &TempDir, name: &str, bytes: &[u8]) -> Result<String> {
    let path = dir.path().join(name);
    fs::write(&path, bytes)?;
    Ok(path.to_str().context("a path is text")?.to_owned())
}

/// Writes bytes that no codec makes smaller.
fn write_noise(bed: &Bed, vm: &Vm, disk: &str, at: &str, seed: u64) -> Result<()> {
    let mut state = seed;
    let noise = std::iter::repeat_with(|| {
        // Xorshift: the same bytes in each run.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let noise: Vec<u8> = noise.take(1 << 17).flatten().collect();
    let path = bed.lab.path("noise");
    fs::write(&path, noise)?;
    vm.write(disk, &format!("write -s {} {at} 1M", path.display()))
}

/// Returns the packs of a kind.
fn packs(repo: &Path, kind: u8) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for folder in fs::read_dir(repo.join("packs"))? {
        for pack in fs::read_dir(folder?.path())? {
            let path = pack?.path();
            if fs::read(&path)?[7] == kind {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Returns the codecs that occur in the chunks of a repository.
fn codecs(repo: &Path) -> Result<BTreeSet<u8>> {
    let mut seen = BTreeSet::new();
    for pack in packs(repo, CHUNKS)? {
        let bytes = fs::read(pack)?;
        let mut at = 48;
        while let Some(header) = bytes.get(at..at + 44) {
            seen.insert(header[40]);
            at += 44 + u32::from_le_bytes(header[36..40].try_into()?) as usize;
        }
    }
    Ok(seen)
}

/// Makes a chain of points with every codec and compares all of it.
fn check(sides: &Sides) -> Result<()> {
    let vm = sides.vm()?;
    let bed = &sides.bed;
    vm.write("vda", "write -P 1 0 3M")?;
    vm.write("vda", "write -P 2 290M 65k")?;
    write_noise(bed, &vm, "vda", "5M", 1)?;
    let mut points = vec![sides.backup(&vm, &["--compression", "zstd"])?];
    vm.write("vda", "write -P 3 1000k 100k")?;
    vm.write("vda", "write -z 2M 512k")?;
    vm.write("vdb", "write -P 4 10M 512")?;
    points.push(sides.backup(&vm, &["--compression", "lz4"])?);
    write_noise(bed, &vm, "vda", "299M", 2)?;
    vm.write("vdb", "write -P 5 4M 1M")?;
    points.push(sides.backup(&vm, &["--compression", "none"])?);
    points.push(sides.backup(&vm, &["-l", "full"])?);
    let modes: Vec<&str> = points.iter().map(|(_, mode)| mode.as_str()).collect();
    assert_eq!(modes[1..3], ["incremental"; 2], "{modes:?}");
    assert!(codecs(&bed.repo())?.is_superset(&BTreeSet::from([0, 1])));
    let listed = sides.read(&["list"])?;
    assert_eq!(listed.lines().count(), points.len(), "{listed}");
    for (point, _) in &points {
        assert!(listed.contains(point.trim_start_matches("id:")), "{listed}");
        sides.assert_agreed(point, "vda")?;
        sides.assert_agreed(point, "vdb")?;
    }
    Ok(())
}

#[test]
fn the_page_is_enough_to_read_a_plain_repository() -> Result<()> {
    check(&Sides::plain(&[])?)
}

#[test]
fn chunks_stored_with_lz4_are_read_as_the_page_says() -> Result<()> {
    let sides = Sides::plain(&[])?;
    let vm = sides.vm()?;
    vm.write("vda", "write -P 1 100k 3M")?;
    let (point, _) = sides.backup(&vm, &["--compression", "lz4"])?;
    assert_eq!(codecs(&sides.bed.repo())?, BTreeSet::from([2]));
    sides.assert_agreed(&point, "vda")
}

#[test]
fn the_page_is_enough_to_read_a_repository_with_a_passphrase() -> Result<()> {
    check(&Sides::passphrase(&[])?)
}

#[test]
fn the_page_is_enough_to_read_a_repository_with_a_key_file_and_large_chunks() -> Result<()> {
    check(&Sides::key_file(&["--chunk-size", "1MiB"])?)
}

#[test]
fn without_its_key_a_repository_is_closed_to_the_reader_too() -> Result<()> {
    let sides = Sides::passphrase(&[])?;
    let wrong = keep(&sides.secret, "wrong", b"another passphrase")?;
    for secret in [vec![], vec!["--passphrase-file".to_owned(), wrong]] {
        let error = sides
            .read_with(&secret, &["list"])
            .expect_err("the key is not there");
        assert!(
            format!("{error:#}").contains("keys: none opens"),
            "{error:#}"
        );
    }
    Ok(())
}

#[test]
fn what_is_damaged_is_refused_by_program_and_reader_alike() -> Result<()> {
    for sides in [Sides::plain(&[])?, Sides::key_file(&[])?] {
        let vm = sides.vm()?;
        vm.write("vda", "write -P 1 0 3M")?;
        write_noise(&sides.bed, &vm, "vda", "5M", 1)?;
        let (point, _) = sides.backup(&vm, &["-d", "vda"])?;
        let repo = sides.bed.repo();
        let chunks = &packs(&repo, CHUNKS)?[0];
        let pages = &packs(&repo, PAGES)?[0];
        let manifest = only_file(&only_file(&repo.join("points"))?)?;
        // With its only index file left out, nothing can be found.
        let index = only_file(&repo.join("index"))?;
        for path in [chunks, pages, &index, &manifest, &repo.join("config")] {
            let whole = fs::read(path)?;
            // In a pack: in the first payload, and at the end of the last one.
            for at in [48 + 44 + 3, whole.len() - 1] {
                flip(path, &whole, at)?;
                sides.assert_refused(&point, &format!("{} at {at}", path.display()))?;
            }
            fs::write(path, &whole[..whole.len() - 1])?;
            sides.assert_refused(&point, &format!("{} cut short", path.display()))?;
            fs::write(path, &whole)?;
        }
        sides.assert_agreed(&point, "vda")?;
    }
    Ok(())
}

#[test]
fn the_program_restores_right_bytes_or_none_where_the_reader_finds_a_pack_changed() -> Result<()> {
    let sides = Sides::plain(&[])?;
    let vm = sides.vm()?;
    vm.write("vda", "write -P 1 0 3M")?;
    let (point, _) = sides.backup(&vm, &["-d", "vda"])?;
    let right = sides.secret.path().join("right");
    sides.restore(&point, "vda", &right)?;
    for kind in [CHUNKS, PAGES] {
        let pack = &packs(&sides.bed.repo(), kind)?[0];
        let whole = fs::read(pack)?;
        // The magic, the kind, the cipher, the salt, and the header of the
        // first record: id, lengths, codec, reserved.
        for at in [0, 7, 8, 20, 50, 80, 84, 88, 90] {
            flip(pack, &whole, at)?;
            sides.assert_never_wrong(&point, &right, at)?;
        }
        fs::write(pack, &whole)?;
    }
    Ok(())
}

/// Writes the file with one bit changed.
fn flip(path: &Path, whole: &[u8], at: usize) -> Result<()> {
    let mut damaged = whole.to_vec();
    damaged[at] ^= 1;
    Ok(fs::write(path, &damaged)?)
}

fn only_file(dir: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(dir)?;
    let path = entries.next().context("an empty folder")??.path();
    ensure!(
        entries.next().is_none(),
        "more than one file in {}",
        dir.display()
    );
    Ok(path)
}
