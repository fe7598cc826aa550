//! Which blocks that a bitmap calls clean are read again before it is believed?
//!
//! Nothing tells who cleared a bitmap, or who wrote around it. So what it calls
//! clean is compared with what was stored, at a few places where a lie shows
//! most likely and at some where nobody expects to be watched:
//!
//! ```text
//! 1  the blocks most often written before
//! 2  what any mount changes: partition tables, superblocks
//! 3  the highest block that is stored as data and clean: a shrink that was
//!    undone by a grow cuts a suffix off, and the bitmap does not tell
//! 4  random ones: half of them anywhere, half on blocks that are stored as data
//! 5  blocks beyond the smallest size the disk ever had, evenly spread
//! ```
//!
//! The order is the order of importance: a budget cuts it from the end.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::hot::{HOT_MAX, HotChunk};
use crate::strata::{Strata, mixed};
use crate::why::Why;

/// Bytes of a disk's beginning in which partition tables are looked for.
pub const MOUNTED_BYTES: u64 = 64 << 10;
/// Random blocks, unless the user names another number.
const RANDOM: u64 = 64;
/// Random blocks at least where the audit decides whether a mark is believed.
const RANDOM_MANDATORY: u64 = 1024;
/// Blocks read in all by an audit that nobody asked for: at 64 KiB each 16 MiB.
const READS_MAX: u64 = 256;
/// How long an audit may take that nobody asked for. It stands between the
/// point in time and the copy.
const TIME_MAX: Duration = Duration::from_millis(500);

/// How much depends on an audit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AuditDuty {
    /// It may find a lie, and is cut short where it would take long.
    Sampled,
    /// Without it the disk is read as a whole, for this reason.
    Mandatory(Why),
}

/// What the user wants of an audit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AuditWish {
    /// So many random blocks.
    Blocks(u64),
    /// So many percent of all blocks, at most 100.
    Percent(u8),
}

/// What is known before an audit.
#[derive(Debug, Clone, Copy)]
pub struct AuditView<'a> {
    /// Blocks that can be compared: those that the parent's image holds whole.
    pub chunks: u64,
    /// Bytes of a block.
    pub chunk_bytes: u64,
    /// The blocks most often written before.
    pub hot: &'a [HotChunk],
    /// Offsets of what any mount changes.
    pub mounted: &'a [u64],
    /// The smallest size the disk was ever seen with, bytes.
    pub smallest_bytes: u64,
    /// Name of the mark. A run that died after it noticed a lie is followed by
    /// one that looks at the same blocks and notices it again.
    pub mark: &'a str,
    /// How much depends on it.
    pub duty: AuditDuty,
    /// What the user wants.
    pub wish: Option<AuditWish>,
}

/// The blocks of an audit, in their order.
#[derive(Debug, Clone)]
pub struct AuditChoice {
    /// 1 and 2.
    pub places: Vec<u64>,
    /// 4, on whatever block they fall.
    pub anywhere: Strata,
    /// 4, each moved on to the next block that is stored as data.
    pub on_data: Strata,
    /// 5.
    pub beyond: Strata,
    /// Blocks read at most; none: all of the above.
    pub reads_max: Option<u64>,
    /// Time it may take; none: as long as it takes.
    pub time_max: Option<Duration>,
}

/// Chooses the blocks of an audit.
pub fn choose_audit(view: &AuditView<'_>) -> AuditChoice {
    let is_limited = view.duty == AuditDuty::Sampled && view.wish.is_none();
    let places = places(view);
    let (anywhere, on_data) = random_counts(view);
    let seed = view.mark.bytes().fold(0, |seed, byte| {
        mixed(seed ^ u64::from(byte).wrapping_add(0x100))
    });
    let smallest = view.smallest_bytes / view.chunk_bytes.max(1);
    let random = anywhere.saturating_add(on_data);
    // One for the highest block of data.
    let before = random.saturating_add(places.len() as u64 + 1);
    let left = match view.duty {
        AuditDuty::Sampled => READS_MAX.saturating_sub(before),
        AuditDuty::Mandatory(_) => RANDOM_MANDATORY,
    };
    AuditChoice {
        places,
        anywhere: Strata::new(mixed(seed ^ 1), 0, view.chunks, anywhere),
        on_data: Strata::new(mixed(seed ^ 2), 0, view.chunks, on_data),
        beyond: Strata::new(mixed(seed ^ 3), smallest, view.chunks, left),
        reads_max: is_limited.then_some(READS_MAX),
        time_max: is_limited.then_some(TIME_MAX),
    }
}

fn places(view: &AuditView<'_>) -> Vec<u64> {
    let hot = view.hot.iter().take(HOT_MAX).map(|hot| hot.chunk);
    let mounted = view.mounted.iter();
    let mounted = mounted.map(|offset| offset / view.chunk_bytes.max(1));
    let mut seen = BTreeSet::new();
    hot.chain(mounted)
        .filter(|chunk| *chunk < view.chunks && seen.insert(*chunk))
        .collect()
}

/// Returns how many random blocks there are anywhere, and on data.
fn random_counts(view: &AuditView<'_>) -> (u64, u64) {
    let wished = match view.wish {
        None => RANDOM,
        Some(AuditWish::Blocks(blocks)) => blocks,
        // All of them: then none may be left to chance.
        Some(AuditWish::Percent(100..)) => return (view.chunks, 0),
        Some(AuditWish::Percent(percent)) => {
            let blocks = (u128::from(view.chunks) * u128::from(percent)).div_ceil(100);
            u64::try_from(blocks).unwrap_or(u64::MAX)
        }
    };
    let count = match view.duty {
        AuditDuty::Sampled => wished,
        AuditDuty::Mandatory(_) => wished.max(RANDOM_MANDATORY),
    };
    if count >= view.chunks {
        return (view.chunks, 0);
    }
    (count.div_ceil(2), count / 2)
}

#[cfg(test)]
mod tests;
