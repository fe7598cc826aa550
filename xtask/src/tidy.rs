//! Rules that a person would forget to check.
//!
//! Each rule is a function from the project's texts to the faults it finds, so
//! that the tests can plant one fault and see it found.

mod edges;
mod faults;
mod licences;
mod modules;
mod source;
mod texts;

use anyhow::Result;

use crate::mutants;
use crate::repository::Repository;

/// Returns all faults, one line each.
pub(crate) fn faults(repository: &Repository) -> Result<Vec<String>> {
    let texts = repository.texts()?;
    let mut faults = Vec::new();
    faults.extend(edges::faults(&texts));
    faults.extend(faults::faults(&texts));
    faults.extend(modules::faults(&texts));
    faults.extend(source::faults(&texts));
    faults.extend(texts::faults(&texts));
    faults.extend(mutants::faults(repository, &texts));
    faults.extend(licences::faults(repository)?);
    Ok(faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_project_is_tidy() {
        let found = faults(&Repository::here().unwrap()).unwrap();
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}
