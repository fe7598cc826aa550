//! Reads blocks again that a bitmap calls clean, before it is believed.
//!
//! Which blocks, and in what order, the planner chose ([`highwater_plan::choose_audit`]). Here
//! the bitmap is asked about them, the clean ones are read from the session's
//! export, and their ids are compared with those of the parent's tree.

mod auditor;

use highwater_nbd::Connection;
use highwater_plan::{AuditDuty, AuditWish, HotChunk, Why};
use highwater_repo::{RepoError, RepoErrorKind};

use super::copy::CopyError;
use super::disk_copy::Disk;
use auditor::{Auditor, End};

/// What is audited of a disk.
#[derive(Debug, Clone)]
pub(super) struct AuditOrder {
    /// Name of the mark that is doubted.
    pub(super) mark: String,
    pub(super) hot: Vec<HotChunk>,
    pub(super) smallest_bytes: u64,
    pub(super) duty: AuditDuty,
    pub(super) wish: Option<AuditWish>,
}

/// What came of an audit.
#[derive(Debug, Clone, Default)]
pub(super) struct Audited {
    /// Blocks that were read and compared.
    pub(super) blocks: u64,
    /// Why the disk must be read as a whole, if it must.
    pub(super) rescan: Option<Rescan>,
    /// What the user is told though the increment goes on. The connection
    /// cannot be used any more then.
    pub(super) warning: Option<String>,
}

/// Why a disk is read as a whole though the plan was an increment.
#[derive(Debug, Clone)]
pub(super) struct Rescan {
    pub(super) why: Why,
    /// What the user is told.
    pub(super) warning: String,
}

impl Rescan {
    /// The parent's tree cannot be read where it is needed.
    pub(super) fn of_damage(disk: &str, source: &RepoError) -> Self {
        Self {
            why: Why::ParentDamaged,
            warning: format!(
                "disk {disk} was read as a whole: {}",
                super::report::chain(source).join(": ")
            ),
        }
    }

    pub(super) fn is_of_a_lie(&self) -> bool {
        self.why == Why::BitmapLied
    }

    pub(super) fn is_of_damage(&self) -> bool {
        self.why == Why::ParentDamaged
    }
}

/// Audits a disk over the connection on which its bitmap is exported.
///
/// An error means that the disk, or the session, is lost; that it cannot be
/// trusted is none.
pub(super) fn audit(
    disk: &Disk<'_>,
    connection: &mut Connection,
    context: &str,
    order: &AuditOrder,
) -> Result<Audited, CopyError> {
    let Some(parent) = &disk.job.parent else {
        return Ok(Audited::default());
    };
    let size_bytes = connection.export().size_bytes;
    let chunk_size = disk.shared.chunk_size;
    // The last block of a parent that has grown since is read in any case.
    let chunks = if size_bytes == parent.size_bytes {
        chunk_size.count(size_bytes)
    } else {
        parent.size_bytes.min(size_bytes) / chunk_size.bytes()
    };
    let mut blocks = 0;
    let outcome = disk
        .shared
        .repo
        .image(parent)
        .map_err(End::from)
        .and_then(|image| {
            let mut auditor = Auditor {
                disk,
                connection,
                context,
                image,
                size_bytes,
                chunks,
                reads_left: None,
                deadline: None,
                blocks: &mut blocks,
            };
            auditor.run(order)
        });
    let name = &disk.job.target;
    let mut warning = None;
    let rescan = match outcome {
        Ok(()) | Err(End::Budget) => None,
        Err(End::Unreadable(_)) if disk.stopped() => return Err(CopyError::Interrupted),
        Err(End::Unreadable(error)) => match order.duty {
            // What cannot be proven is not believed.
            AuditDuty::Mandatory(why) => Some(Rescan {
                why,
                warning: format!(
                    "disk {name} was read as a whole: its audit could not be finished: {}",
                    chain(&error)
                ),
            }),
            // The block is as it was, by all that is known, and is stored. To
            // fail the disk would end its backups until somebody mends it.
            AuditDuty::Sampled => {
                warning = Some(format!(
                    "the audit of disk {name} ended early: {}; what changed was read, so this \
                     restore point is whole, but the storage below the disk may be failing",
                    chain(&error)
                ));
                None
            }
        },
        Err(End::Lie(chunk)) => {
            let start = chunk.saturating_mul(chunk_size.bytes());
            let end = start.saturating_add(chunk_size.bytes()).min(size_bytes);
            Some(Rescan {
                why: Why::BitmapLied,
                warning: format!(
                    "bitmap lied: disk {name}: bytes {start:#x} to {end:#x} are not those of the \
                     last backup, and `{}` calls them clean; the whole disk was read instead",
                    order.mark
                ),
            })
        }
        Err(End::Failed(CopyError::Store { source }))
            if source.kind() == RepoErrorKind::Damaged =>
        {
            Some(Rescan::of_damage(name, &source))
        }
        Err(End::Failed(error)) => return Err(error),
    };
    Ok(Audited {
        blocks,
        rescan,
        warning,
    })
}

fn chain(error: &dyn std::error::Error) -> String {
    super::report::chain(error).join(": ")
}
