//! A hostile manifest as the parent of a backup.

use std::collections::BTreeSet;
use std::path::PathBuf;

use highwater_hypervisor::{
    Agent, BitmapFacts, ChainLink, CheckpointFacts, DiskFacts, DiskSource, MarkSupport, Place,
    RootNode, RunState, VmFacts, VmRef, WriteErrorPolicy,
};
use highwater_plan::{DiskPlan, Level};
use highwater_repo::{Compression, DiskRecord, Manifest, MarkRecord, fuzzing};

use super::observe::{History, plan_disks};
use super::{BackupOptions, Quiesce, Tuning};

/// Puts the bytes into a repository as the JSON of a manifest and plans the
/// next backup of its VM, whose disks are all as the manifest tells.
///
/// An increment is only planned on a tree of the repository's chunk size whose
/// top can be read, of a disk that carries the mark and did not shrink.
pub(crate) fn manifest(json: &[u8]) {
    let (repo, Some(manifest)) = fuzzing::manifest(json) else {
        return;
    };
    let facts = facts(&manifest);
    let Ok(history) = History::load(&repo, &manifest.vm, &facts, &|_| true) else {
        return;
    };
    for level in [Level::Auto, Level::Incremental, Level::Differential] {
        for planned in plan_disks(&repo, &options(level), &facts, &history) {
            let (DiskPlan::Incremental { parent, .. } | DiskPlan::Differential { parent, .. }) =
                &planned.plan
            else {
                assert!(planned.parent_image.is_none());
                continue;
            };
            assert_eq!(*parent, manifest.point);
            let image = planned.parent_image.expect("an increment has a parent");
            let record = manifest
                .disks
                .iter()
                .find(|disk| disk.target == planned.facts.target && disk.image == image)
                .expect("the parent is a disk of this name");
            assert!(record.marked && manifest.mark.is_some());
            assert!(image.chunk_bytes == repo.chunk_size());
            assert!(image.size_bytes <= planned.facts.size_bytes);
            let reader = repo.image(&image).expect("its root is proven");
            assert!(reader.chunks().next().is_none_or(|first| first.is_ok()));
        }
    }
}

/// A VM that is in every respect as the manifest says, except that a disk is
/// named once only.
fn facts(manifest: &Manifest) -> VmFacts {
    let mut seen = BTreeSet::new();
    let disks = manifest.disks.iter().take(16);
    let mark = manifest.mark.as_ref();
    VmFacts {
        vm: VmRef {
            name: manifest.vm.name.clone(),
            uuid: manifest.vm.uuid.clone(),
        },
        run_state: RunState::Running,
        persistent: true,
        definition: manifest.definition.clone(),
        firmware: Vec::new(),
        tpm_state: None,
        disks: disks
            .filter(|disk| seen.insert(disk.target.clone()))
            .map(|disk| disk_facts(disk, mark))
            .collect(),
        skipped: Vec::new(),
        checkpoints: mark.map(checkpoint).into_iter().collect(),
        expects_records: true,
        job: None,
        agent: Agent::Missing,
        process: None,
        versions: Vec::new(),
    }
}

fn checkpoint(mark: &MarkRecord) -> CheckpointFacts {
    CheckpointFacts {
        name: mark.name.to_string(),
        mark: Some(mark.name.clone()),
        nonce: Some(mark.nonce),
        created_s: mark.created_s,
        disks: mark.disks.clone(),
    }
}

fn disk_facts(disk: &DiskRecord, mark: Option<&MarkRecord>) -> DiskFacts {
    let bitmap = |mark: &MarkRecord| BitmapFacts {
        name: mark.name.to_string(),
        node: "node".to_owned(),
        granularity: disk.evidence.granularity.unwrap_or(65536),
        recording: true,
        persistent: true,
        in_image: true,
        busy: false,
        inconsistent: false,
        dirty_bytes: 0,
    };
    let chain = disk.evidence.chain.iter().map(|link| ChainLink {
        name: link.name.clone(),
        format: link.format.clone(),
        place: Place::Host,
        node: Some("node".to_owned()),
        inode: link.inode,
        file_bytes: link.stamp.map(|stamp| stamp.0),
        modified_ns: link.stamp.map(|stamp| stamp.1),
        changed_ns: link.stamp.map(|stamp| stamp.2),
    });
    DiskFacts {
        target: disk.target.clone(),
        serial: disk.evidence.serial.clone(),
        device: disk.evidence.device.clone(),
        device_known: !disk.evidence.device_unknown,
        source: DiskSource::File(PathBuf::from("/image")),
        format: disk.format.clone(),
        size_bytes: disk.image.size_bytes,
        file_bytes: None,
        marks: MarkSupport::Yes,
        chain: chain.collect(),
        bitmaps: mark.map(bitmap).into_iter().collect(),
        root_node: RootNode::Same,
        write_errors: WriteErrorPolicy::Pause,
        encrypted: false,
        counters: None,
    }
}

fn options(level: Level) -> BackupOptions {
    BackupOptions {
        level,
        only_disks: Vec::new(),
        without_disks: Vec::new(),
        quiesce: Quiesce::Off,
        freeze_mountpoints: Vec::new(),
        offline: super::Offline::Yield,
        start_paused: false,
        scratch_dir: PathBuf::new(),
        socket_dir: PathBuf::new(),
        compression: Compression::None,
        tuning: Tuning::default(),
        threshold: None,
        audit: None,
        tags: Vec::new(),
        group: None,
        host: String::new(),
        utc_offset_minutes: 0,
    }
}
