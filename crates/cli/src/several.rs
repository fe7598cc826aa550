//! What has come of several VMs so far, for whoever has to say so when the
//! command is cut short: the thread that knows may hang.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::advice;
use crate::json::OneOfSeveral;

static SO_FAR: Mutex<Option<SoFar>> = Mutex::new(None);

/// What has come of those that are done with.
#[derive(Debug, Default)]
pub(crate) struct SoFar {
    /// What goes into one document; empty where each was told at once.
    pub(crate) results: Vec<OneOfSeveral>,
    pub(crate) codes: Vec<u8>,
}

/// Begins with the first VM.
pub(crate) fn begin() {
    *so_far() = Some(SoFar::default());
}

/// Notes what came of one of them.
pub(crate) fn note(code: u8, result: Option<OneOfSeveral>) {
    if let Some(so_far) = &mut *so_far() {
        so_far.codes.push(code);
        so_far.results.extend(result);
    }
}

/// Hands out what there is, to whoever comes first; nothing if there are no
/// several VMs.
pub(crate) fn end() -> Option<SoFar> {
    so_far().take()
}

fn so_far() -> MutexGuard<'static, Option<SoFar>> {
    SO_FAR.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the exit code of a run over several VMs: their own if all ended
/// alike, 3 if some were backed up.
pub(crate) fn code_of_all(codes: &[u8]) -> u8 {
    if codes.contains(&advice::INTERRUPTED) {
        return advice::INTERRUPTED;
    }
    match codes {
        [] => advice::DONE,
        [first, rest @ ..] if rest.iter().all(|code| code == first) => *first,
        _ if codes.contains(&advice::DONE) || codes.contains(&advice::SOME_FAILED) => {
            advice::SOME_FAILED
        }
        _ => advice::FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::code_of_all;

    #[test]
    fn several_vms_end_with_3_only_if_some_were_backed_up() {
        for (codes, expected) in [
            (&[0, 0][..], 0),
            (&[0, 1], 3),
            (&[1, 0, 11], 3),
            (&[3, 1], 3),
            (&[3, 3], 3),
            (&[1, 1], 1),
            (&[11, 11], 11),
            (&[1, 11], 1),
            (&[0, 130], 130),
            (&[], 0),
        ] {
            assert_eq!(code_of_all(codes), expected, "{codes:?}");
        }
    }
}
