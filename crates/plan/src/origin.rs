//! Is a bitmap the one that was made with its mark?
//!
//! The hypervisor's record outlives a crash that its bitmap does not. Whoever
//! then adds a bitmap of the same name makes one that knows nothing of what was
//! written before, and looks like ours in every other way.

/// Which process ran the VM: process id, start time, boot id.
pub type Process = (u32, u64, String);

/// Whose a bitmap of a mark's name is. The worse is the greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// It was made with the mark.
    Mark,
    /// One of the two processes cannot be identified.
    Unknown,
    /// Somebody else made it.
    Another,
}

/// Decides whether a bitmap can be the one that was made with its mark.
///
/// A bitmap lives in the process that made it, and beyond that process only in
/// the image. One that another process holds without having read it from the
/// image (`is_in_image`) was made there, by somebody else. Of a process that
/// nobody can identify nothing is known, and so nothing is believed.
pub fn origin(made_by: Option<&Process>, held_by: Option<&Process>, is_in_image: bool) -> Origin {
    if is_in_image {
        return Origin::Mark;
    }
    match (made_by, held_by) {
        (Some(made_by), Some(held_by)) if made_by == held_by => Origin::Mark,
        (Some(_), Some(_)) => Origin::Another,
        (None, _) | (_, None) => Origin::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(made_by: Option<u32>, held_by: Option<u32>, is_in_image: bool, expected: Origin) {
        let process = |pid: Option<u32>| pid.map(|pid| (pid, 7, "boot".to_owned()));
        let (made_by, held_by) = (process(made_by), process(held_by));
        let found = origin(made_by.as_ref(), held_by.as_ref(), is_in_image);
        assert_eq!(found, expected, "{made_by:?} {held_by:?} {is_in_image}");
    }

    #[test]
    fn a_bitmap_that_another_process_did_not_read_from_the_image_is_not_the_marks() {
        check(Some(1), Some(1), false, Origin::Mark);
        check(Some(1), Some(2), false, Origin::Another);
        check(Some(1), Some(2), true, Origin::Mark);
    }

    #[test]
    fn of_a_process_that_nobody_can_identify_nothing_is_known() {
        // Two unknowns are equal, and prove nothing.
        check(None, None, false, Origin::Unknown);
        check(Some(1), None, false, Origin::Unknown);
        check(None, Some(1), false, Origin::Unknown);
        check(None, None, true, Origin::Mark);
    }

    #[test]
    fn a_process_id_that_came_round_again_is_another_process() {
        let made_by = (1, 7, "boot".to_owned());
        let later = (1, 8, "boot".to_owned());
        let rebooted = (1, 7, "next boot".to_owned());
        for held_by in [later, rebooted] {
            let found = origin(Some(&made_by), Some(&held_by), false);
            assert_eq!(found, Origin::Another);
        }
    }
}
