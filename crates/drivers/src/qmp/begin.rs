//! Takes the point in time: all disks and the new mark, or nothing.

use std::path::PathBuf;
use std::time::Duration;

use highwater_hypervisor::{
    BeginOrder, Begun, BegunDisk, Consistency, DiskFacts, ErrorKind, Export, ExportAddress,
    HypervisorError, JobFacts, MarkSupport, Place, Quiesce, ReadMode, RootNode, RunState,
    ScratchReserve, VmFacts, VmRef,
};
use highwater_model::step::{Step, pass};

use super::QmpDriver;
use super::client::Client;
use super::disks::write_counters;
use super::error::explain;
use super::identity::state_of;
use super::iothreads;
use super::marks::{query_blocks, remove_bitmap};
use super::objects::Role;
use super::seen::Seen;
use super::sequence::{Found, Marked, Placed, Sequence, cannot_begin, has_resumed, sync_images};
use super::stop::state;
use super::watch::{Watch, Watched};
use crate::directories::{SessionPaths, refuse_without_room};
use crate::host::User;
use crate::names::export_name;
use crate::scratch_image::{self, Space, image_bytes};

/// Everything that was checked before anything is done.
struct Prepared {
    state: RunState,
    disks: Vec<Placed>,
    marked: Vec<Marked>,
}

impl QmpDriver {
    pub(super) fn begin_session(&mut self, order: &BeginOrder) -> Result<Begun, HypervisorError> {
        let facts = self.observe_vm(&order.vm)?;
        refuse_state(order, &facts)?;
        let client = self.client()?;
        let seen = Seen::read(&client).map_err(|error| explain(cannot_begin(&order.vm), &error))?;
        let prepared = Prepared {
            state: facts.run_state,
            disks: place(order, &facts, &seen)?,
            marked: marked(order, &facts)?,
        };
        iothreads::refuse_where_exports_kill(&client, &order.vm, &prepared.disks)?;
        let paths = SessionPaths::of_order(order);
        let qemu = self.process();
        paths.create(&order.vm, qemu.as_ref())?;
        pass(Step::DirectoriesMade);
        let qemu = qemu.map(|found| found.user);
        let begun = self.begin_prepared(order, &client, &prepared, &paths, qemu.as_ref());
        begun.map_err(|error| self.undo(order, error))
    }

    /// Everything after the directories were made; what fails here is undone by
    /// the caller.
    fn begin_prepared(
        &mut self,
        order: &BeginOrder,
        client: &Client,
        prepared: &Prepared,
        paths: &SessionPaths,
        qemu: Option<&User>,
    ) -> Result<Begun, HypervisorError> {
        let disks = &prepared.disks;
        if prepared.state == RunState::PausedOnError {
            paths.note_stopped_before()?;
        }
        let (reserve, key) = make_scratch(disks, paths, qemu)?;
        pass(Step::ScratchMade);
        let sequence = Sequence {
            client,
            order,
            disks,
            paths,
        };
        sequence.start_server()?;
        if let Some(mark) = &order.new_mark {
            sequence.add_bitmaps(mark, &prepared.marked)?;
        }
        if let Some(key) = &key {
            sequence.add_key(key)?;
        }
        for disk in disks {
            sequence.add_fleece(disk)?;
        }
        for disk in disks {
            sequence.add_filter(disk)?;
        }
        // Before the guest is frozen or stopped: both wait for it.
        sync_images(disks);
        let mut warnings = Vec::new();
        let frozen = self.freeze(order, prepared.state, paths, &mut warnings)?;
        let found = confirm_found(client, order, prepared.state)?;
        let taken_at = self.clock.now();
        let switched = sequence.switch_all(&found, &self.line);
        let (consistency, frozen_ms) =
            frozen.settle(order, switched.is_ok(), found.state, &mut warnings)?;
        paths.note_thawed();
        let stopped = switched?;
        let consistency = confirm_state(client, &order.vm, &found, consistency)?;
        for disk in disks {
            sequence.add_snapshot(disk)?;
        }
        sequence.merge()?;
        for disk in disks {
            sequence.export(disk)?;
        }
        pass(Step::Started);
        let watch = Watch {
            process: self.process().map(|found| found.identity),
            client: client.clone(),
            heard: client.heard().count,
            disks: disks
                .iter()
                .map(|disk| Watched::new(order.session, disk))
                .collect(),
            reserve: reserve.clone(),
            was_stopped_before: prepared.state == RunState::PausedOnError,
        };
        self.watches.insert(order.session, watch);
        let mut begun = Begun {
            exports: exports(order, paths, exact_within(client)),
            consistency,
            taken_at,
            frozen_ms,
            reads_images: false,
            stopped_us: stopped.map(microseconds),
            mark_created_s: order
                .new_mark
                .as_ref()
                .map(|_| taken_at.unix_ms().div_euclid(1000)),
            disks: Vec::new(),
            warnings,
            reserve: Some(reserve),
        };
        begun.disks = begun_disks(order, client, prepared)?;
        Ok(begun)
    }

    /// Takes back what a failed start has done so far.
    fn undo(&mut self, order: &BeginOrder, error: HypervisorError) -> HypervisorError {
        let mut left = match self.end_session(order) {
            Ok(ended) => ended.warnings,
            Err(error) => vec![error.to_string()],
        };
        if let Some(mark) = &order.new_mark {
            // The name is unguessable and used once: whatever has it was made here.
            left.extend(self.remove_new(&order.vm, &mark.name.to_string()).err());
        }
        let mut error = left.into_iter().fold(error, HypervisorError::leaving);
        if error.kind == ErrorKind::Unreachable && self.line.is_over() {
            // Nobody has to wait until it is back.
            error.kind = ErrorKind::WrongState;
        }
        error
    }

    fn remove_new(&mut self, vm: &VmRef, mark: &str) -> Result<(), String> {
        let client = match self.expect_vm(vm) {
            Ok(client) => client,
            // What was only in its memory is gone with it; what it had written
            // into its images by then, the next run finds.
            Err(error) if error.kind == ErrorKind::NoSuchVm || self.line.is_over() => {
                return Ok(());
            }
            Err(error) => return Err(error.to_string()),
        };
        let words = |error: super::error::QmpError| error.to_string();
        for node in query_blocks(&client).map_err(words)?.holders(mark) {
            remove_bitmap(&client, &node, mark).map_err(words)?;
        }
        Ok(())
    }
}

/// Refuses a VM that is in no state for a backup. Nothing has been done yet.
fn refuse_state(order: &BeginOrder, facts: &VmFacts) -> Result<(), HypervisorError> {
    let refused = |kind, because: &str| {
        Err(HypervisorError::new(kind, cannot_begin(&order.vm)).because(because))
    };
    match facts.run_state {
        RunState::Running | RunState::Paused | RunState::PausedOnError => {}
        RunState::NotResumed => {
            return refused(
                ErrorKind::WrongState,
                "it was loaded or moved and has not run since: its images are not QEMU's own",
            );
        }
        RunState::Off | RunState::Other => {
            let because = format!("the VM does not run (it is {:?})", facts.run_state);
            return refused(ErrorKind::WrongState, &because.to_lowercase());
        }
    }
    if facts.run_state != RunState::Running && order.quiesce == Quiesce::Require {
        return refused(
            ErrorKind::CannotFreeze,
            "the VM is paused, so its agent cannot answer",
        );
    }
    let Some(job) = &facts.job else {
        return Ok(());
    };
    let what = match job {
        JobFacts::Ours(session) => format!("session {session} of Highwater runs"),
        JobFacts::ForeignBackup(Some(to)) => format!("another backup runs, to `{to}`"),
        JobFacts::ForeignBackup(None) => "another backup runs".to_owned(),
        JobFacts::Forgotten => "a job runs that nobody can end".to_owned(),
        JobFacts::Other(kind) => format!("a job runs ({kind})"),
    };
    refused(ErrorKind::Busy, &what)
}

/// Finds where each disk's filter goes, or says why it cannot.
fn place(order: &BeginOrder, facts: &VmFacts, seen: &Seen) -> Result<Vec<Placed>, HypervisorError> {
    let refused = |kind, because: String| {
        HypervisorError::new(kind, cannot_begin(&order.vm)).because(because)
    };
    if order.disks.is_empty() {
        return Err(refused(ErrorKind::NoSuchDisk, "no disk is ordered".into()));
    }
    let mut placed: Vec<Placed> = Vec::with_capacity(order.disks.len());
    for wanted in &order.disks {
        let target = &wanted.target;
        if placed.iter().any(|known| known.target == *target) {
            let because = format!("disk `{target}` is ordered twice");
            return Err(refused(ErrorKind::Other, because));
        }
        let disk = disk_of(order, facts, target)?;
        let cannot = |because: &str| {
            refused(
                ErrorKind::Other,
                format!("disk `{target}` cannot be read: {because}"),
            )
        };
        match &disk.root_node {
            RootNode::Same => {}
            RootNode::Differs { guest, exported } => {
                return Err(cannot(&format!(
                    "its guest writes to node `{guest}`, not to `{exported}`"
                )));
            }
            RootNode::Unknown(why) => return Err(cannot(why)),
        }
        let node = node_of(disk).ok_or_else(|| cannot("QEMU does not tell its node"))?;
        let mut devices = seen
            .devices
            .iter()
            .filter(|device| seen.path(device).contains(&node));
        let (Some(device), None) = (devices.next(), devices.next()) else {
            return Err(cannot("not exactly one device of the guest writes to it"));
        };
        if let ReadMode::Since(mark) = &wanted.mode {
            let name = mark.to_string();
            let bitmap = disk
                .bitmaps
                .iter()
                .find(|bitmap| bitmap.name == name && bitmap.node == node);
            if bitmap.is_none_or(|bitmap| bitmap.inconsistent || bitmap.busy || !bitmap.recording) {
                let because = format!("mark `{name}` of disk `{target}` cannot be used");
                return Err(refused(ErrorKind::BadMark, because));
            }
        }
        let (seat, below) = seen.seat(device);
        placed.push(Placed {
            target: target.clone(),
            mode: wanted.mode.clone(),
            node: node.to_owned(),
            seat,
            below,
            device: device.path.clone(),
            size_bytes: disk.size_bytes,
            encrypted: disk.encrypted,
            image: image_of(disk),
        });
    }
    Ok(placed)
}

fn disk_of<'a>(
    order: &BeginOrder,
    facts: &'a VmFacts,
    target: &str,
) -> Result<&'a DiskFacts, HypervisorError> {
    let found = facts.disks.iter().find(|disk| disk.target == target);
    found.ok_or_else(|| {
        let skipped = facts.skipped.iter().find(|disk| disk.target == target);
        let because = match skipped {
            Some(disk) => format!("disk `{target}` cannot be backed up ({:?})", disk.reason),
            None => format!("it has no disk `{target}`"),
        };
        HypervisorError::new(ErrorKind::NoSuchDisk, cannot_begin(&order.vm)).because(because)
    })
}

/// Returns the node of the topmost image: it carries marks.
fn node_of(disk: &DiskFacts) -> Option<&str> {
    disk.chain.first()?.node.as_deref()
}

fn image_of(disk: &DiskFacts) -> Option<PathBuf> {
    let link = disk.chain.first()?;
    match link.place {
        Place::Host => Some(PathBuf::from(&link.name)),
        Place::Network => None,
    }
}

/// Returns where the new mark's bitmaps go.
fn marked(order: &BeginOrder, facts: &VmFacts) -> Result<Vec<Marked>, HypervisorError> {
    let targets = order.new_mark.iter().flat_map(|mark| &mark.disks);
    let one = |target: &String| {
        let disk = disk_of(order, facts, target)?;
        let cannot = |because: String| {
            HypervisorError::new(ErrorKind::BadMark, cannot_begin(&order.vm)).because(because)
        };
        let persistent = match disk.marks {
            MarkSupport::Yes => true,
            MarkSupport::WhileRunning(_) => false,
            MarkSupport::No(why) => {
                return Err(cannot(format!(
                    "disk `{target}` cannot hold a mark ({why:?})"
                )));
            }
        };
        let node = node_of(disk)
            .ok_or_else(|| cannot(format!("QEMU does not tell the node of disk `{target}`")))?;
        Ok(Marked {
            target: target.clone(),
            node: node.to_owned(),
            persistent,
        })
    };
    targets.map(one).collect()
}

/// Makes the scratch files. They may run full: that breaks the snapshot, and
/// costs no guest a write.
fn make_scratch(
    disks: &[Placed],
    paths: &SessionPaths,
    qemu: Option<&User>,
) -> Result<(ScratchReserve, Option<String>), HypervisorError> {
    let sizes = disks.iter().map(|disk| disk.size_bytes);
    let needed = scratch_image::room_bytes(sizes.fold(0, u64::saturating_add));
    refuse_without_room(paths.scratch_dir(), needed)?;
    let is_encrypted = disks.iter().any(|disk| disk.encrypted);
    let key = is_encrypted.then(scratch_image::new_key);
    if let Some(key) = &key {
        scratch_image::write_key(&paths.key(), key)?;
    }
    for disk in disks {
        let key = paths.key();
        let key = disk.encrypted.then_some(key.as_path());
        let bytes = image_bytes(disk.size_bytes);
        let path = paths.scratch(&disk.target);
        scratch_image::create(&path, bytes, Space::AsNeeded, key, qemu)?;
    }
    if key.is_some() {
        scratch_image::remove_key(&paths.key())?;
    }
    let reserve = ScratchReserve {
        dir: paths.scratch_dir().to_path_buf(),
        bytes: scratch_image::reserve_bytes(needed),
    };
    Ok((reserve, key))
}

fn word_of(client: &Client, vm: &VmRef) -> Result<String, HypervisorError> {
    state(client).map_err(|error| explain(cannot_begin(vm), &error))
}

/// Asks once more how the guest runs: seconds have gone by since it was looked
/// at, and what was decided by that (freeze it, stop it) holds no longer if
/// somebody let it run or stopped it meanwhile.
fn confirm_found(
    client: &Client,
    order: &BeginOrder,
    then: RunState,
) -> Result<Found, HypervisorError> {
    // Before the question: what comes between the two is heard later.
    let heard = client.heard().count;
    let word = word_of(client, &order.vm)?;
    let state = state_of(&word);
    if state == then {
        return Ok(Found { state, word, heard });
    }
    Err(
        HypervisorError::new(ErrorKind::WrongState, cannot_begin(&order.vm)).because(format!(
            "somebody let the guest run or stopped it meanwhile (it is {word} now)"
        )),
    )
}

/// A guest that was resumed meanwhile was not paused at the point in time, or
/// nobody can prove it.
fn confirm_state(
    client: &Client,
    vm: &VmRef,
    found: &Found,
    consistency: Consistency,
) -> Result<Consistency, HypervisorError> {
    if consistency != Consistency::Paused {
        return Ok(consistency);
    }
    // One that ran for a moment only has the same word again.
    let has_run = word_of(client, vm)? != found.word || has_resumed(client, found.heard);
    Ok(if has_run {
        Consistency::Crash
    } else {
        Consistency::Paused
    })
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// What of a point in time QEMU shows rightly.
///
/// Where a read begins in what was copied to the fleece and ends beyond it, QEMU
/// 7.2 takes all of it from the disk, with what the guest has written since the
/// point; and so does what it says of zeroes (seen with 7.2.22; put right in 8.0,
/// `hbitmap_status`). Nothing tells 8.0 from 7.2 as surely as what came with 9.0
/// tells that. Right in any case is what lies in one cluster of the filter.
fn exact_within(client: &Client) -> Option<u64> {
    (!iothreads::is_safe(client)).then_some(scratch_image::CLUSTER_BYTES)
}

fn exports(order: &BeginOrder, paths: &SessionPaths, exact_within: Option<u64>) -> Vec<Export> {
    let export = |disk: &highwater_hypervisor::DiskOrder| {
        let bitmap = Role::Changed.name(order.session, &disk.target);
        Export {
            target: disk.target.clone(),
            address: ExportAddress::Unix(paths.socket()),
            name: export_name(order.session, &disk.target),
            dirty_context: match &disk.mode {
                ReadMode::All => None,
                ReadMode::Since(_) => Some(format!("qemu:dirty-bitmap:{bitmap}")),
            },
            exact_within,
        }
    };
    order.disks.iter().map(export).collect()
}

/// Learns what proves the new mark next time, and makes sure that it is there:
/// a mark that does not record would have the next backup read everything, and
/// one on the wrong node would have it miss what changed.
fn begun_disks(
    order: &BeginOrder,
    client: &Client,
    prepared: &Prepared,
) -> Result<Vec<BegunDisk>, HypervisorError> {
    let failed = |error: &super::error::QmpError| explain(cannot_begin(&order.vm), error);
    let counters = write_counters(client).map_err(|error| failed(&error))?;
    let blocks = query_blocks(client).map_err(|error| failed(&error))?;
    let granularity = |target: &str| {
        let marked = prepared.marked.iter().find(|it| it.target == target);
        let (Some(marked), Some(mark)) = (marked, &order.new_mark) else {
            return Ok(None);
        };
        let name = mark.name.to_string();
        let node = blocks.nodes.get(&marked.node);
        let bitmap = node.and_then(|node| node.bitmaps.iter().find(|it| it.name == name));
        let what = match bitmap {
            None => "is not there",
            Some(bitmap) if !bitmap.recording || bitmap.inconsistent => "does not record",
            Some(bitmap) if bitmap.persistent != marked.persistent => "is kept in another way",
            Some(bitmap) => return Ok(Some(bitmap.granularity)),
        };
        Err(
            HypervisorError::new(ErrorKind::BadMark, cannot_begin(&order.vm))
                .because(format!("the new bitmap of disk `{target}` {what}")),
        )
    };
    prepared
        .disks
        .iter()
        .map(|disk| {
            Ok(BegunDisk {
                target: disk.target.clone(),
                granularity: granularity(&disk.target)?,
                counters: counters.get(&disk.device).copied(),
            })
        })
        .collect()
}
