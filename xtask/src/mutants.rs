//! Breaks the program on purpose and demands that its tests notice.
//!
//! `tests/mutants/NAME.patch` begins with two comments, then comes a patch:
//!
//! ```text
//! # test: package(highwater-repo) & test(a_save_cut_off)
//! # why: the manifest is written first, so a crash leaves one without its packs
//! ```
//!
//! The filter's tests must pass without the patch and fail with it. All happens
//! in a copy of the work tree below `target/mutants`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::repository::{Repository, Text};

const DIRECTORY: &str = "tests/mutants/";

/// How nextest ends when a test has failed, and nothing else went wrong.
const TESTS_FAILED: i32 = 100;

struct Mutant {
    name: String,
    filter: String,
    patch: PathBuf,
}

/// Tries all mutants whose name contains `name`.
pub(crate) fn run(repository: &Repository, name: &str) -> Result<()> {
    let mutants: Vec<Mutant> = repository
        .texts()?
        .iter()
        .filter_map(|text| mutant(repository, text))
        .filter(|mutant| mutant.name.contains(name))
        .collect();
    if mutants.is_empty() {
        println!("no mutants in {DIRECTORY} named *{name}*");
        return Ok(());
    }
    let copy = Copy::make(repository)?;
    let mut results = Vec::new();
    let mut green = BTreeMap::new();
    for mutant in &mutants {
        println!("--- {}", mutant.name);
        let outcome = try_one(&copy, mutant, &mut green)?;
        results.push((mutant, outcome));
    }
    summarise(&results)
}

/// Returns what is wrong with the mutants' files.
pub(crate) fn faults(repository: &Repository, texts: &[Text]) -> Vec<String> {
    let mut faults = Vec::new();
    for text in texts.iter().filter(|text| is_mutant(text)) {
        for mark in ["# test: ", "# why: "] {
            if header(text, mark).is_none() {
                faults.push(format!("{}: has no line `{mark}...`", text.path));
            }
        }
        if let Err(error) = repository.git(&["apply", "--check", &text.path]) {
            faults.push(format!("{}: does not apply: {error}", text.path));
        }
    }
    faults
}

fn is_mutant(text: &Text) -> bool {
    text.path.starts_with(DIRECTORY) && text.has_extension("patch")
}

fn header<'t>(text: &'t Text, mark: &str) -> Option<&'t str> {
    text.text
        .lines()
        .take_while(|line| line.starts_with('#'))
        .find_map(|line| line.strip_prefix(mark))
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

fn mutant(repository: &Repository, text: &Text) -> Option<Mutant> {
    let name = text.path.strip_prefix(DIRECTORY)?.strip_suffix(".patch")?;
    Some(Mutant {
        name: name.to_owned(),
        filter: header(text, "# test: ")?.to_owned(),
        patch: repository.path(&text.path),
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Noticed,
    Survived,
    /// The tests fail, or there are none, without any mutant.
    NotGreenBefore,
    /// A mutant that does not compile proves nothing.
    DoesNotBuild,
}

fn try_one(copy: &Copy, mutant: &Mutant, green: &mut BTreeMap<String, bool>) -> Result<Outcome> {
    let is_green = match green.get(&mutant.filter) {
        Some(known) => *known,
        None => copy.test(&mutant.filter)? == Some(0),
    };
    green.insert(mutant.filter.clone(), is_green);
    if !is_green {
        return Ok(Outcome::NotGreenBefore);
    }
    copy.apply(&mutant.patch, &[])?;
    let code = copy.test(&mutant.filter);
    copy.apply(&mutant.patch, &["-R"])?;
    Ok(match code? {
        Some(0) => Outcome::Survived,
        Some(TESTS_FAILED) => Outcome::Noticed,
        _ => Outcome::DoesNotBuild,
    })
}

fn summarise(results: &[(&Mutant, Outcome)]) -> Result<()> {
    let width = results.iter().map(|(mutant, _)| mutant.name.len()).max();
    println!("\n{} mutants", results.len());
    for (mutant, outcome) in results {
        let word = match outcome {
            Outcome::Noticed => "noticed",
            Outcome::Survived => "SURVIVED: its tests pass",
            Outcome::NotGreenBefore => "INVALID: its tests fail, or there are none, without it",
            Outcome::DoesNotBuild => "INVALID: does not build",
        };
        println!(
            "  {:width$}  {word}",
            mutant.name,
            width = width.unwrap_or(0)
        );
    }
    let bad = results
        .iter()
        .filter(|(_, outcome)| *outcome != Outcome::Noticed)
        .count();
    if bad > 0 {
        bail!("{bad} of {} mutants were not noticed", results.len());
    }
    Ok(())
}

/// A copy of the work tree with a build directory of its own.
struct Copy {
    tree: PathBuf,
    target: PathBuf,
}

impl Copy {
    /// Brings the copy up to date. What has not changed keeps its time, so that
    /// Cargo builds again only what it must.
    fn make(repository: &Repository) -> Result<Self> {
        let base = repository.path("target/mutants");
        let copy = Self {
            tree: base.join("tree"),
            target: base.join("target"),
        };
        fs::create_dir_all(&copy.tree)?;
        let wanted = repository.files()?;
        for file in &wanted {
            // Listed, and deleted since.
            let Ok(bytes) = fs::read(repository.path(file)) else {
                continue;
            };
            let to = copy.tree.join(file);
            if fs::read(&to).ok().as_ref() != Some(&bytes) {
                if let Some(parent) = to.parent() {
                    fs::create_dir_all(parent)?;
                }
                fs::copy(repository.path(file), &to)
                    .with_context(|| format!("cannot write {}", to.display()))?;
            }
        }
        remove_others(&copy.tree, &copy.tree, &wanted)?;
        // What `make test` has set up outside of git.
        let python = copy.tree.join("target/py");
        if !python.exists() && repository.path("target/py").exists() {
            fs::create_dir_all(copy.tree.join("target"))?;
            std::os::unix::fs::symlink(repository.path("target/py"), python)?;
        }
        Ok(copy)
    }

    fn apply(&self, patch: &Path, options: &[&str]) -> Result<()> {
        let status = Command::new("git")
            .arg("apply")
            .args(options)
            .arg(patch)
            .current_dir(&self.tree)
            // The copy lies inside a repository but is none: else git would
            // look for the patch's files in the real tree.
            .env(
                "GIT_CEILING_DIRECTORIES",
                self.target.parent().unwrap_or(&self.tree),
            )
            .status()?;
        if !status.success() {
            bail!("{} does not apply", patch.display());
        }
        Ok(())
    }

    /// Runs the tests and returns how nextest ended.
    fn test(&self, filter: &str) -> Result<Option<i32>> {
        let mut nextest = Command::new(env!("CARGO"));
        nextest
            .args(["nextest", "run", "--no-tests=fail", "--no-fail-fast"])
            .args(["--status-level", "fail", "--failure-output", "never"])
            .args(["-E", filter])
            .current_dir(&self.tree)
            .env("CARGO_TARGET_DIR", &self.target)
            .stdin(Stdio::null());
        if let Some(package) = package(filter) {
            nextest.args(["-p", package]);
        }
        let status = nextest.status().context("cannot run cargo nextest")?;
        Ok(status.code())
    }
}

/// Returns the only package a filter names: then nothing else need be built.
fn package(filter: &str) -> Option<&str> {
    let mut named = filter.split("package(").skip(1);
    let (name, _) = named.next()?.split_once(')')?;
    let exact = name.trim_start_matches('=');
    let is_only = named.next().is_none() && !filter.contains(['|', '+', '!']);
    (is_only && exact.starts_with("highwater") && !exact.contains(['*', '?'])).then_some(exact)
}

/// Removes files of an earlier copy that have gone since.
fn remove_others(tree: &Path, dir: &Path, wanted: &[String]) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let relative = path.strip_prefix(tree)?.to_string_lossy().into_owned();
        if relative == "target" {
            continue;
        }
        if path.is_dir() {
            remove_others(tree, &path, wanted)?;
        } else if !wanted.contains(&relative) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn git(dir: &Path, args: &[&str]) {
        Repository::at(dir).git(args).unwrap();
    }

    /// A repository with one file and one mutant, and what is wrong with that.
    fn found(patch: &str) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        git(dir.path(), &["init", "-q"]);
        let put = |name: &str, text: &str| {
            let file = dir.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::io::Write::write_all(&mut fs::File::create(file).unwrap(), text.as_bytes())
                .unwrap();
        };
        put("a.txt", "one\n");
        put("tests/mutants/m.patch", patch);
        let repository = Repository::at(dir.path());
        let faults = faults(&repository, &repository.texts().unwrap());
        let short = |fault: String| fault.split(": error").next().unwrap_or(&fault).to_owned();
        faults.into_iter().map(short).collect()
    }

    const DIFF: &str = "--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-one\n+two\n";

    #[test]
    fn a_mutant_says_which_test_and_why_and_applies() {
        let good = format!("# test: test(x)\n# why: y\n{DIFF}");
        assert_eq!(found(&good), [""; 0]);
        assert_eq!(
            found(&format!("# why: y\n{DIFF}")),
            ["tests/mutants/m.patch: has no line `# test: ...`"]
        );
        assert_eq!(
            found(&format!("# test: test(x)\n# why: \n{DIFF}")),
            ["tests/mutants/m.patch: has no line `# why: ...`"]
        );
        let stale = good.replace("-one", "-three");
        assert!(found(&stale)[0].contains("does not apply"));
    }

    #[test]
    fn only_a_filter_of_one_package_narrows_the_build() {
        assert_eq!(
            package("package(highwater-repo) & test(x)"),
            Some("highwater-repo")
        );
        assert_eq!(package("package(=highwater) & test(x)"), Some("highwater"));
        assert_eq!(package("test(x)"), None);
        assert_eq!(package("package(highwater-repo) | test(x)"), None);
        assert_eq!(package("not package(repo) & !test(x)"), None);
    }
}
