//! Sessions of VMs that are off.
//!
//! ```text
//! keep      no other session of ours has these images; nobody has them open for writing
//! mark      the new bitmap is added to each image          (QEMU's tool takes the image's lock)
//! stamp     size, times and inode of every file            <- the point in time
//! export    a child shows the images, read-only
//! look      is everything as it was?  Also after the last byte, and before the commit
//! ```
//!
//! From the stamp on nothing may be written; that nothing was is proven by looking
//! again, and not by keeping others out: a VM may start at any moment (`yield`),
//! and then the session is lost. Its marks are not: the new one is in the images
//! since before the point, and records what the VM writes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use highwater_hypervisor::{
    BeginOrder, Begun, BegunDisk, Consistency, Ended, ErrorKind, Export, ExportAddress,
    HypervisorError, NewMark, Quiesce, ReadMode, VmRef, WhenStarted,
};
use highwater_model::step::{Step, pass};
use highwater_model::{Clock, MarkName, SessionId};

use super::exporter::{self, Exporter, Shown};
use super::facts::{OffDisk, why_not};
use super::image::Chain;
use super::witness::{Seen, Witness};
use super::{holders, tools};
use crate::directories::SessionPaths;

/// The sessions that this process has begun.
#[derive(Debug, Default)]
pub(crate) struct OfflineSessions {
    live: BTreeMap<SessionId, OfflineSession>,
}

#[derive(Debug)]
struct OfflineSession {
    exporter: Exporter,
    witness: Witness,
    /// Why it was lost, once it is: what was seen then may not be seen again.
    lost: Option<HypervisorError>,
}

/// What an order is about.
struct Ordered<'a> {
    target: &'a str,
    disk: &'a OffDisk,
    chain: Chain,
    since: Option<String>,
    export: String,
    marked: bool,
}

impl OfflineSessions {
    /// Whether this process has begun the session.
    pub(crate) fn has(&self, session: SessionId) -> bool {
        self.live.contains_key(&session)
    }

    /// Whether this process has begun none.
    pub(crate) fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Takes the point in time of a VM with these disks. Its consistency is what
    /// the caller knows of how the VM came to be off.
    pub(crate) fn begin(
        &mut self,
        order: &BeginOrder,
        disks: &[OffDisk],
        clock: &dyn Clock,
        consistency: Consistency,
    ) -> Result<Begun, HypervisorError> {
        if order.quiesce == Quiesce::Require {
            return Err(
                HypervisorError::new(ErrorKind::CannotFreeze, cannot_begin(&order.vm))
                    .because("the VM is off: there is no guest to freeze"),
            );
        }
        let ordered = match_disks(order, disks)?;
        let paths = SessionPaths::of_order(order);
        let chains = || ordered.iter().map(|one| &one.chain);
        let mut witness = Witness::open(chains()).map_err(|why| other(&order.vm, why))?;
        expect_no_device(order, &witness)?;
        keep(&order.vm, &witness)?;
        expect_no_writer(&order.vm, &witness)?;
        let mut warnings = Vec::new();
        let when_started = match (order.when_started, witness.blind_spot()) {
            (WhenStarted::Yield, Some(why)) => {
                warnings.push(format!(
                    "the VM cannot be started before its backup has ended: {why}, where a write \
                     leaves no trace"
                ));
                WhenStarted::Hold
            }
            (chosen, _) => chosen,
        };
        paths.create(&order.vm, None)?;
        pass(Step::DirectoriesMade);
        let mut marked = Vec::new();
        let begun = begin_prepared(
            order,
            &ordered,
            &paths,
            &mut witness,
            when_started,
            &mut marked,
            clock,
        );
        let (exporter, mut begun) = match begun {
            Ok(begun) => begun,
            Err(error) => return Err(undo(order, &paths, &marked, error)),
        };
        begun.consistency = consistency;
        if let Some(crashed) = ordered.iter().find(|one| has_crashed(&one.chain)) {
            begun.consistency = Consistency::Crash;
            warnings.push(format!(
                "the VM was not shut down in order, by what the image of disk `{}` says: its disks \
                 are as after a power cut",
                crashed.target
            ));
        }
        begun.warnings.extend(warnings);
        let session = OfflineSession {
            exporter,
            witness,
            lost: None,
        };
        self.live.insert(order.session, session);
        pass(Step::Started);
        Ok(begun)
    }

    /// Looks whether the session stands; `None` if it is none of these.
    pub(crate) fn check(
        &mut self,
        vm: &VmRef,
        session: SessionId,
    ) -> Option<Result<(), HypervisorError>> {
        let known = self.live.get_mut(&session)?;
        if known.lost.is_none()
            && let Some(trouble) = known.trouble()
        {
            // At once: nobody has any use for what it shows.
            known.exporter.stop();
            // Later: to look through all processes takes its time.
            let because = trouble.named();
            known.lost = Some(HypervisorError::session_lost(vm, session, because));
        }
        Some(known.lost.clone().map_or(Ok(()), Err))
    }

    /// Whether a look at the session is urgent.
    pub(crate) fn is_alarmed(&mut self, session: SessionId) -> bool {
        let known = self.live.get_mut(&session);
        known.is_some_and(|known| known.lost.is_none() && known.trouble().is_some())
    }

    /// Ends the exporter, gives the images back and removes the directories.
    pub(crate) fn end(&mut self, order: &BeginOrder) -> Ended {
        let paths = SessionPaths::of_order(order);
        self.end_at(order.session, &paths)
    }

    /// As [`end`](Self::end), of a session that is known by its directories, too.
    pub(crate) fn end_at(&mut self, session: SessionId, paths: &SessionPaths) -> Ended {
        let known = self.live.remove(&session);
        let mut ended_job = known.is_some();
        // Stops it, and gives up the images.
        drop(known);
        if !ended_job {
            ended_job = end_stray(paths, session);
        }
        pass(Step::JobEnded);
        // No process of the VM's can be frozen: it has none.
        paths.note_thawed();
        let warnings = paths.remove();
        pass(Step::FilesRemoved);
        Ended {
            ended_job,
            warnings,
        }
    }
}

impl OfflineSession {
    /// Says what is wrong, if something is.
    fn trouble(&mut self) -> Option<Trouble> {
        let (because, open) = match self.witness.look() {
            Seen::Untouched => (self.exporter.ended()?, None),
            Seen::Open(image) => (
                format!(
                    "the VM was started, or another program writes: `{}` is open for writing",
                    image.display()
                ),
                Some(image),
            ),
            Seen::Written(image) => (
                format!(
                    "the VM was started meanwhile, or another program has written, or its owner \
                     or links were changed: `{}` is not as it was",
                    image.display()
                ),
                None,
            ),
            Seen::Unknown(image, why) => (
                format!(
                    "nobody can tell whether `{}` is as it was: {why}",
                    image.display()
                ),
                None,
            ),
        };
        Some(Trouble { because, open })
    }
}

/// What is wrong with a session.
struct Trouble {
    because: String,
    /// The image that somebody has open.
    open: Option<PathBuf>,
}

impl Trouble {
    /// Says who it is, too, as far as that can be seen.
    fn named(&self) -> String {
        let holders = self.open.as_deref().map(holders::of);
        format!("{}{}", self.because, holders.unwrap_or_default())
    }
}

fn cannot_begin(vm: &VmRef) -> String {
    format!("cannot begin a backup of VM `{}`", vm.name)
}

fn other(vm: &VmRef, because: impl Into<String>) -> HypervisorError {
    HypervisorError::new(ErrorKind::Other, cannot_begin(vm)).because(because)
}

fn match_disks<'a>(
    order: &'a BeginOrder,
    disks: &'a [OffDisk],
) -> Result<Vec<Ordered<'a>>, HypervisorError> {
    let refused = |kind, because: String| {
        HypervisorError::new(kind, cannot_begin(&order.vm)).because(because)
    };
    if order.disks.is_empty() {
        return Err(refused(
            ErrorKind::NoSuchDisk,
            "no disk is ordered".to_owned(),
        ));
    }
    let marks: &[String] = order.new_mark.as_ref().map_or(&[], |mark| &mark.disks);
    let mut ordered: Vec<Ordered<'a>> = Vec::with_capacity(order.disks.len());
    for wanted in &order.disks {
        let target = wanted.target.as_str();
        if ordered.iter().any(|known| known.target == target) {
            return Err(refused(
                ErrorKind::Other,
                format!("disk `{target}` is ordered twice"),
            ));
        }
        let disk = disks.iter().find(|disk| disk.target == target);
        let disk = disk
            .ok_or_else(|| refused(ErrorKind::NoSuchDisk, format!("it has no disk `{target}`")))?;
        let chain = disk.chain();
        if let Some(why) = why_not(disk, &chain) {
            return Err(refused(ErrorKind::Other, format!("disk `{target}`: {why}")));
        }
        let since = match &wanted.mode {
            ReadMode::All => None,
            ReadMode::Since(mark) => Some(mark.to_string()),
        };
        if let Some(mark) = &since {
            // In the image that the guest writes to: elsewhere alone it has missed
            // what was written since.
            let found = chain.top().and_then(|top| top.bitmap(mark));
            let is_good = |it: &highwater_hypervisor::BitmapFacts| it.recording && !it.inconsistent;
            if !found.is_some_and(is_good) {
                let because = format!("bitmap `{mark}` of disk `{target}` is missing or broken");
                return Err(refused(ErrorKind::BadMark, because));
            }
        }
        ordered.push(Ordered {
            target,
            disk,
            chain,
            since,
            export: crate::names::export_name(order.session, target),
            marked: marks.iter().any(|marked| marked == target),
        });
    }
    if let Some(stranger) = marks
        .iter()
        .find(|target| !ordered.iter().any(|one| one.target == target.as_str()))
    {
        return Err(refused(
            ErrorKind::NoSuchDisk,
            format!("disk `{stranger}` is to be marked, and is not ordered"),
        ));
    }
    Ok(ordered)
}

fn keep(vm: &VmRef, witness: &Witness) -> Result<(), HypervisorError> {
    match witness.keep() {
        Ok(None) => Ok(()),
        Ok(Some(image)) => Err(
            HypervisorError::new(ErrorKind::Busy, cannot_begin(vm)).because(format!(
                "another program keeps `{}`: another backup of it runs",
                image.display()
            )),
        ),
        Err(why) => Err(other(vm, why)),
    }
}

/// A device may be in use on another host, where no lock of this one is known, and
/// a write to it leaves no trace.
fn expect_no_device(order: &BeginOrder, witness: &Witness) -> Result<(), HypervisorError> {
    let (WhenStarted::Yield, Some(device)) = (order.when_started, witness.device()) else {
        return Ok(());
    };
    Err(
        HypervisorError::new(ErrorKind::WrongState, cannot_begin(&order.vm))
            .because(format!(
                "`{}` is a block device: whether somebody writes to it meanwhile, here or on \
                 another host, cannot be seen",
                device.display()
            ))
            .hint(
                "use `--offline hold` if nobody else, on no host, uses the device until the backup \
                 is done",
            ),
    )
}

fn expect_no_writer(vm: &VmRef, witness: &Witness) -> Result<(), HypervisorError> {
    let in_use = |because: String| {
        let error = HypervisorError::new(ErrorKind::WrongState, cannot_begin(vm)).because(because);
        error.hint("back it up while it runs, over libvirt or its QMP socket (`-c qmp:SOCKET`)")
    };
    match witness.writer() {
        Ok(None) => {}
        Ok(Some(image)) => {
            let (name, who) = (image.display(), holders::of(image));
            return Err(in_use(format!("`{name}` is in use by a running VM{who}")));
        }
        Err(why) => return Err(other(vm, why)),
    }
    match witness.paths().find(|path| holders::has_writer(path)) {
        None => Ok(()),
        Some(image) => {
            let (name, who) = (image.display(), holders::of(image));
            Err(in_use(format!(
                "`{name}` is open for writing, without QEMU's locks{who}"
            )))
        }
    }
}

/// Everything after the directories were made; what fails here is undone by the
/// caller. `marked` are the images that have the new mark.
fn begin_prepared<'a>(
    order: &BeginOrder,
    ordered: &'a [Ordered<'_>],
    paths: &SessionPaths,
    witness: &mut Witness,
    when_started: WhenStarted,
    marked: &mut Vec<&'a Path>,
    clock: &dyn Clock,
) -> Result<(Exporter, Begun), HypervisorError> {
    let mut warnings = Vec::new();
    if let Some(mark) = &order.new_mark {
        warnings = add_marks(mark, ordered, witness, marked)?;
    }
    if when_started == WhenStarted::Hold {
        // Not earlier: it would keep QEMU's tool from adding the mark.
        witness.hold().map_err(|why| other(&order.vm, why))?;
    }
    let stamped = witness.stamp().map_err(|why| other(&order.vm, why));
    // Not later than the point: what a clock says of it must not lie ahead.
    let taken_at = clock.now();
    stamped?;
    let chains = ordered
        .iter()
        .map(|one| look_again(order, one))
        .collect::<Result<Vec<_>, _>>()?;
    let shown: Vec<Shown<'_>> = ordered
        .iter()
        .zip(&chains)
        .map(|(one, chain)| Shown {
            chain,
            export: &one.export,
            since: one.since.as_deref(),
        })
        .collect();
    let socket = paths.socket();
    let exporter =
        Exporter::start(&socket, order.session, &shown).map_err(|error| under(&order.vm, error))?;
    pass(Step::OffExported);
    let begun_disks = ordered
        .iter()
        .zip(&chains)
        .map(|(one, chain)| begun_disk(order, one, chain, marked))
        .collect::<Result<Vec<_>, _>>()?;
    // All that was read since the stamp may have been read while somebody wrote.
    match witness.look() {
        Seen::Untouched => {}
        Seen::Open(image) | Seen::Written(image) => {
            let because = format!("`{}` is being written: the VM starts", image.display());
            return Err(
                HypervisorError::new(ErrorKind::WrongState, cannot_begin(&order.vm))
                    .because(because),
            );
        }
        Seen::Unknown(image, why) => {
            return Err(other(&order.vm, format!("`{}`: {why}", image.display())));
        }
    }
    let exports = ordered.iter().map(|one| Export {
        target: one.target.to_owned(),
        address: ExportAddress::Unix(socket.clone()),
        dirty_context: one
            .since
            .as_ref()
            .map(|_| format!("qemu:dirty-bitmap:{}", one.export)),
        name: one.export.clone(),
        exact_within: None,
    });
    let begun = Begun {
        exports: exports.collect(),
        consistency: Consistency::Offline,
        taken_at,
        frozen_ms: None,
        reads_images: true,
        stopped_us: None,
        mark_created_s: order
            .new_mark
            .as_ref()
            .map(|_| taken_at.unix_ms().div_euclid(1000)),
        disks: begun_disks,
        warnings,
        reserve: None,
    };
    Ok((exporter, begun))
}

/// Whether the QEMU that had the image open last did not close it. Of the bitmaps
/// only our marks tell: another program may leave a broken one there for ever.
fn has_crashed(chain: &Chain) -> bool {
    chain.top().is_some_and(|top| {
        let is_mark = |name: &str| name.parse::<MarkName>().is_ok();
        let mut bitmaps = top.bitmaps.iter();
        top.header().is_some_and(|header| header.is_dirty)
            || bitmaps.any(|it| it.inconsistent && is_mark(&it.name))
    })
}

/// Adds the new mark, and says which disks do not get it.
fn add_marks<'a>(
    mark: &NewMark,
    ordered: &'a [Ordered<'_>],
    witness: &Witness,
    marked: &mut Vec<&'a Path>,
) -> Result<Vec<String>, HypervisorError> {
    let name = mark.name.to_string();
    let mut warnings = Vec::new();
    for one in ordered.iter().filter(|one| one.marked) {
        let Some(top) = one.chain.top() else { continue };
        // Before it is tried: a tool that is killed may have done it.
        marked.push(&top.path);
        match tools::add_bitmap(&top.path, &name) {
            Ok(()) => pass(Step::OffMarkAdded),
            // Nobody writes, but somebody has nobody write, for as long as it runs.
            Err(error) if error.kind == ErrorKind::Busy && witness.writer() == Ok(None) => {
                marked.pop();
                warnings.push(format!(
                    "disk `{}` gets no new mark: `{}` is in use below the disk of another VM{}",
                    one.target,
                    top.path.display(),
                    holders::of(&top.path)
                ));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(warnings)
}

/// Looks at a disk's images once more, now that each write to them is seen: what was
/// seen before the stamp may have been changed before it.
fn look_again(order: &BeginOrder, one: &Ordered<'_>) -> Result<Chain, HypervisorError> {
    let now = one.disk.chain();
    let mark = order.new_mark.as_ref().map(|mark| mark.name.to_string());
    if now.is_still(&one.chain, mark.as_deref().unwrap_or_default()) {
        return Ok(now);
    }
    Err(
        HypervisorError::new(ErrorKind::WrongState, cannot_begin(&order.vm)).because(format!(
            "the images of disk `{}` were changed while its backup began",
            one.target
        )),
    )
}

/// Makes sure that the new bitmap is there, and records.
fn begun_disk(
    order: &BeginOrder,
    one: &Ordered<'_>,
    now: &Chain,
    marked: &[&Path],
) -> Result<BegunDisk, HypervisorError> {
    let mut begun = BegunDisk {
        target: one.target.to_owned(),
        granularity: None,
        counters: None,
    };
    let (Some(mark), Some(top)) = (&order.new_mark, now.top()) else {
        return Ok(begun);
    };
    if !one.marked || !marked.contains(&top.path.as_path()) {
        return Ok(begun);
    }
    match top.bitmap(&mark.name.to_string()) {
        Some(bitmap) if bitmap.recording && !bitmap.inconsistent => {
            begun.granularity = Some(bitmap.granularity);
            Ok(begun)
        }
        Some(_) | None => Err(
            HypervisorError::new(ErrorKind::BadMark, cannot_begin(&order.vm)).because(format!(
                "the new bitmap of disk `{}` does not record",
                one.target
            )),
        ),
    }
}

/// Puts an error of a part under the message of the whole.
fn under(vm: &VmRef, error: HypervisorError) -> HypervisorError {
    let mut whole = HypervisorError::new(error.kind, cannot_begin(vm)).because(error.message);
    whole.because.extend(error.because);
    whole.hint = error.hint;
    whole
}

/// Takes back what a failed start has done so far.
fn undo(
    order: &BeginOrder,
    paths: &SessionPaths,
    marked: &[&Path],
    error: HypervisorError,
) -> HypervisorError {
    let mut left = Vec::new();
    if let Some(mark) = &order.new_mark {
        let name = mark.name.to_string();
        for image in marked {
            match tools::remove_bitmap(image, &name) {
                Ok(_) => {}
                // The VM runs, or another tool has it. The bitmap does no harm, and
                // is removed when nobody has the image open.
                Err(kept) => left.push(kept.to_string()),
            }
        }
    }
    left.extend(paths.remove());
    left.into_iter().fold(error, HypervisorError::leaving)
}

/// Ends the exporter of a dead session, if it has outlived whoever began it. The
/// kernel kills it with its parent, so this is for a kernel that did not.
pub(crate) fn end_stray(paths: &SessionPaths, session: SessionId) -> bool {
    let socket = paths.socket();
    let Some(dir) = socket.parent() else {
        return false;
    };
    let note = exporter::note(dir, session);
    holders::end_process_of_note(&note)
}
