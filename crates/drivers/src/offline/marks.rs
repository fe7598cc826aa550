//! Takes marks off images that nobody has open.

use highwater_hypervisor::{ErrorKind, HypervisorError, MarkOrder, VmRef};
use highwater_model::step::{Step, pass};

use super::facts::OffDisk;
use super::image::Image;
use super::tools;
use super::witness::Witness;

/// Changes one mark. There are no records to be told about one.
pub(crate) fn change(
    vm: &VmRef,
    disks: &[OffDisk],
    order: &MarkOrder,
) -> Result<(), HypervisorError> {
    match order {
        MarkOrder::Remove(name) => {
            let name = name.to_string();
            let message = format!("cannot remove mark `{name}` of VM `{}`", vm.name);
            take_off(disks, &name, &message, |_| true)
        }
        MarkOrder::Distrust { name, nodes } => {
            let name = name.to_string();
            let message = format!("cannot take mark `{name}` off a disk of VM `{}`", vm.name);
            take_off(disks, &name, &message, |image| {
                nodes
                    .iter()
                    .any(|node| *node == image.path.to_string_lossy())
            })
        }
        MarkOrder::Redefine(_) => Ok(()),
    }
}

/// Removes the bitmaps of a mark, from as many images as it can.
fn take_off(
    disks: &[OffDisk],
    name: &str,
    message: &str,
    is_meant: impl Fn(&Image) -> bool,
) -> Result<(), HypervisorError> {
    let mut failed: Option<HypervisorError> = None;
    for disk in disks {
        let chain = disk.chain();
        let may_hold_marks = disk
            .format
            .as_deref()
            .is_none_or(|format| format == "qcow2");
        if let (true, Ok(_), Some(why)) = (may_hold_marks, &disk.top, &chain.unreadable) {
            // It may be there, so it is not said to be gone.
            let so_far = failed.take();
            let so_far = so_far.unwrap_or_else(|| HypervisorError::new(ErrorKind::Other, message));
            failed = Some(so_far.because(why.clone()));
        }
        let holders = chain
            .images
            .iter()
            .filter(|image| image.bitmap(name).is_some() && is_meant(image));
        let holders: Vec<&Image> = holders.collect();
        if holders.is_empty() {
            continue;
        }
        // To change an image is to break the backup of whoever reads it: another
        // host's, or user's, whose unfinished mark this may be.
        let witness = Witness::open(std::iter::once(&chain));
        if let Ok(Some(kept)) = witness.as_ref().map_or(Ok(None), Witness::keep) {
            return Err(
                HypervisorError::new(ErrorKind::Busy, message).because(format!(
                    "another program keeps `{}`: another backup of it runs",
                    kept.display()
                )),
            );
        }
        for image in holders {
            match tools::remove_bitmap(&image.path, name) {
                Ok(_) => pass(Step::BitmapRemoved),
                Err(error) => {
                    let so_far = failed.take();
                    let so_far =
                        so_far.unwrap_or_else(|| HypervisorError::new(error.kind, message));
                    failed = Some(
                        error
                            .because
                            .iter()
                            .fold(so_far.because(error.message), |so_far, because| {
                                so_far.because(because.clone())
                            }),
                    );
                }
            }
        }
    }
    match failed {
        None => Ok(()),
        Some(error) if error.kind == ErrorKind::Busy => {
            Err(error.hint("somebody has the image open: the mark is removed once it is closed"))
        }
        Some(error) => Err(error),
    }
}
