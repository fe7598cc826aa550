//! Disks of a domain that is off, told by their images.

use highwater_hypervisor::{DiskFacts, DiskSource};

use super::disks::{DiskQueries, disk_source, local_path};
use super::domain_xml::{DiskXml, SourceXml};
use crate::offline::{OffDisk, Stated, StatedData, StatedImage};

/// Reports a disk of a domain that is off.
pub(super) fn facts(disk: &DiskXml, queries: &impl DiskQueries) -> Option<DiskFacts> {
    let mut facts = off_disk(disk, queries)?.facts();
    if facts.size_bytes == 0 {
        facts.size_bytes = queries.capacity(&disk.target).unwrap_or_default();
    }
    Some(facts)
}

/// Says what has to be known of a disk to look at its images.
pub(super) fn off_disk(disk: &DiskXml, queries: &impl DiskQueries) -> Option<OffDisk> {
    let top = disk.chain.first()?;
    let source = disk_source(&top.source, queries)?;
    let file = match &source {
        _ if disk.sliced => Err("it is a part of its image (`<slices>`)".to_owned()),
        DiskSource::File(path) | DiskSource::Block(path) => Ok(path.clone()),
        DiskSource::Volume { path, .. } => path
            .clone()
            .ok_or_else(|| "libvirt does not tell where its volume is".to_owned()),
        DiskSource::Network(uri) => Err(format!("`{uri}` is no file of this host")),
    };
    Some(OffDisk {
        target: disk.target.clone(),
        serial: disk.serial.clone(),
        device: disk.alias.clone(),
        device_known: true,
        source,
        top: file,
        format: Some(top.format.clone()),
        write_errors: disk.write_errors,
        encrypted: disk.encrypted,
        stated: Some(stated(disk, queries)),
    })
}

/// What libvirt believes before what the images say.
fn stated(disk: &DiskXml, queries: &impl DiskQueries) -> Stated {
    let file = |source: &SourceXml| local_path(source, queries);
    let images = disk.chain.iter().map(|link| StatedImage {
        file: file(&link.source),
        format: link.format.clone(),
        data_file: match &link.data {
            None => StatedData::Unsaid,
            Some(data) => data
                .source
                .as_ref()
                .and_then(file)
                .map_or(StatedData::Elsewhere, StatedData::File),
        },
    });
    Stated {
        images: images.collect(),
        ends: disk.ends,
    }
}
