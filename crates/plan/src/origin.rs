//! Is a bitmap the one that was made with its mark?
//!
//! The hypervisor's record outlives a crash that its bitmap does not. Whoever
//! then adds a bitmap of the same name makes one that knows nothing of what was
//! written before, and looks like ours in every other way.

/// Which process ran the VM: process id, start time, boot id.
pub type Process = (u32, u64, String);

/// Decides whether a bitmap can be the one that was made with its mark.
///
/// A bitmap lives in the process that made it, and beyond that process only in
/// the image. One that another process holds without having read it from the
/// image (`is_in_image`) was made there, by somebody else. A process that
/// nobody can identify counts as another one.
pub fn is_original(
    made_by: Option<&Process>,
    held_by: Option<&Process>,
    is_in_image: bool,
) -> bool {
    is_in_image || (made_by.is_some() && made_by == held_by)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(made_by: Option<u32>, held_by: Option<u32>, is_in_image: bool, expected: bool) {
        let process = |pid: Option<u32>| pid.map(|pid| (pid, 7, "boot".to_owned()));
        let (made_by, held_by) = (process(made_by), process(held_by));
        let found = is_original(made_by.as_ref(), held_by.as_ref(), is_in_image);
        assert_eq!(found, expected, "{made_by:?} {held_by:?} {is_in_image}");
    }

    #[test]
    fn a_bitmap_that_another_process_did_not_read_from_the_image_is_not_the_marks() {
        check(Some(1), Some(1), false, true);
        check(Some(1), Some(2), false, false);
        check(Some(1), Some(2), true, true);
        // Two unknowns are equal, and prove nothing.
        check(None, None, false, false);
        check(Some(1), None, false, false);
        check(None, Some(1), false, false);
        check(None, None, true, true);
    }

    #[test]
    fn a_process_id_that_came_round_again_is_another_process() {
        let made_by = (1, 7, "boot".to_owned());
        let later = (1, 8, "boot".to_owned());
        let rebooted = (1, 7, "next boot".to_owned());
        for held_by in [later, rebooted] {
            assert!(!is_original(Some(&made_by), Some(&held_by), false));
        }
    }
}
