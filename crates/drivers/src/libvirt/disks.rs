//! Facts about one disk, put together from its definition, QEMU and the host.

use std::path::{Path, PathBuf};

use highwater_hypervisor::{
    BitmapFacts, ChainLink, DiskFacts, DiskSource, MarkSupport, NoMarks, Place, SkipReason,
    WriteCounters,
};

use highwater_model::DATA_FILE_FORMAT;

use super::domain_xml::{DiskXml, LinkXml, SourceXml};
use crate::blocks::Blocks;
use crate::host;

/// What the connection knows beyond the definition; asked for one disk at a time.
pub(crate) trait DiskQueries {
    /// Resolves a volume of a pool.
    fn volume_path(&self, pool: &str, volume: &str) -> Option<PathBuf>;
    /// Size the guest sees.
    fn capacity(&self, target: &str) -> Option<u64>;
    /// What the guest has written.
    fn counters(&self, target: &str) -> Option<WriteCounters>;
}

/// Says why a disk is never part of a backup, if it is not.
pub(crate) fn skip_reason(disk: &DiskXml) -> Option<SkipReason> {
    let Some(top) = disk.chain.first() else {
        return Some(SkipReason::Empty);
    };
    match disk.device.as_str() {
        "cdrom" => return Some(SkipReason::Cdrom),
        "floppy" => return Some(SkipReason::Floppy),
        "lun" => return Some(SkipReason::PassedThrough),
        _ => {}
    }
    if top.source == SourceXml::PassedThrough {
        return Some(SkipReason::PassedThrough);
    }
    if disk.transient {
        return Some(SkipReason::Transient);
    }
    if disk.readonly {
        return Some(SkipReason::ReadOnly);
    }
    disk.shareable.then_some(SkipReason::Shareable)
}

/// Reports one disk of a VM that is on.
///
/// Returns `None` for a disk without an image, which [`skip_reason`] names.
pub(crate) fn facts(
    disk: &DiskXml,
    blocks: &Blocks,
    queries: &impl DiskQueries,
) -> Option<DiskFacts> {
    let top = disk.chain.first()?;
    let exported = top.index.and_then(|index| blocks.libvirt_node(index));
    let node = exported.and_then(|name| blocks.nodes.get(name));
    let chain: Vec<ChainLink> = disk
        .chain
        .iter()
        .flat_map(|link| {
            let image = chain_link(&link.source, &link.format, link.index, blocks, queries);
            let data = link.data.as_ref().map(|data| {
                // Without a name that is understood it cannot be seen either.
                let source = data.source.as_ref().unwrap_or(&SourceXml::PassedThrough);
                chain_link(source, DATA_FILE_FORMAT, data.index, blocks, queries)
            });
            std::iter::once(image).chain(data)
        })
        .collect();
    Some(DiskFacts {
        target: disk.target.clone(),
        serial: disk.serial.clone(),
        device: disk.alias.clone(),
        device_known: true,
        source: disk_source(&top.source, queries)?,
        format: top.format.clone(),
        size_bytes: node
            .map(|node| node.size_bytes)
            .filter(|bytes| *bytes > 0)
            .or_else(|| queries.capacity(&disk.target))
            .unwrap_or_default(),
        file_bytes: chain.first().and_then(|link| link.file_bytes),
        marks: mark_support(top, node.and_then(|node| node.compat.as_deref()), queries),
        bitmaps: bitmaps(disk, blocks),
        root_node: blocks.root_node(disk.alias.as_deref(), exported),
        write_errors: disk.write_errors,
        encrypted: disk.encrypted,
        counters: queries.counters(&disk.target),
        chain,
    })
}

pub(super) fn local_path(source: &SourceXml, queries: &impl DiskQueries) -> Option<PathBuf> {
    match source {
        SourceXml::File(path) | SourceXml::Block(path) => Some(path.clone()),
        SourceXml::Volume { pool, volume } => queries.volume_path(pool, volume),
        SourceXml::Network(_) | SourceXml::PassedThrough => None,
    }
}

pub(super) fn disk_source(source: &SourceXml, queries: &impl DiskQueries) -> Option<DiskSource> {
    Some(match source {
        SourceXml::File(path) => DiskSource::File(path.clone()),
        SourceXml::Block(path) => DiskSource::Block(path.clone()),
        SourceXml::Volume { pool, volume } => DiskSource::Volume {
            pool: pool.clone(),
            volume: volume.clone(),
            path: queries.volume_path(pool, volume),
        },
        SourceXml::Network(uri) => DiskSource::Network(uri.clone()),
        SourceXml::PassedThrough => return None,
    })
}

fn chain_link(
    source: &SourceXml,
    format: &str,
    index: Option<u32>,
    blocks: &Blocks,
    queries: &impl DiskQueries,
) -> ChainLink {
    let path = local_path(source, queries);
    let identity = path.as_deref().and_then(host::file_identity);
    ChainLink {
        name: match (source, &path) {
            (_, Some(path)) => path.to_string_lossy().into_owned(),
            (SourceXml::Network(uri), None) => uri.clone(),
            (SourceXml::Volume { pool, volume }, None) => format!("{pool}/{volume}"),
            (SourceXml::File(path) | SourceXml::Block(path), None) => {
                path.to_string_lossy().into_owned()
            }
            (SourceXml::PassedThrough, None) => String::new(),
        },
        format: format.to_owned(),
        place: match source {
            SourceXml::Network(_) => Place::Network,
            // A volume that libvirt finds no path of counts as one of this
            // host that cannot be seen: nothing is known, so nothing is believed.
            SourceXml::File(_)
            | SourceXml::Block(_)
            | SourceXml::Volume { .. }
            | SourceXml::PassedThrough => Place::Host,
        },
        node: index
            .and_then(|index| blocks.libvirt_node(index))
            .map(str::to_owned),
        inode: identity.map(|identity| identity.inode),
        file_bytes: identity.and_then(|identity| identity.bytes),
        modified_ns: identity.and_then(|identity| identity.modified_ns),
        changed_ns: identity.and_then(|identity| identity.changed_ns),
    }
}

/// A mark is only promised where it is proven to fit: an image whose version
/// nobody can tell counts as one that cannot hold it.
fn mark_support(top: &LinkXml, compat: Option<&str>, queries: &impl DiskQueries) -> MarkSupport {
    if top.format != "qcow2" {
        return MarkSupport::No(NoMarks::NotQcow2);
    }
    let version_of = |path: PathBuf| host::qcow2_version(Path::new(&path));
    match compat {
        Some("0.10") => MarkSupport::No(NoMarks::Qcow2Version2),
        Some(_) => MarkSupport::Yes,
        None => match local_path(&top.source, queries).and_then(version_of) {
            Some(2) => MarkSupport::No(NoMarks::Qcow2Version2),
            Some(_) => MarkSupport::Yes,
            None => MarkSupport::No(NoMarks::NotQcow2),
        },
    }
}

/// Collects the bitmaps of every node that libvirt made for the chain, and of
/// whatever node the guest really writes to.
fn bitmaps(disk: &DiskXml, blocks: &Blocks) -> Vec<BitmapFacts> {
    let numbers = disk
        .chain
        .iter()
        .flat_map(|link| [link.index, link.data.as_ref().and_then(|data| data.index)])
        .flatten();
    let mut nodes: Vec<&str> = numbers
        .flat_map(|index| blocks.libvirt_nodes(index))
        .collect();
    nodes.extend(
        disk.alias
            .as_deref()
            .and_then(|alias| blocks.root_of(alias)),
    );
    nodes.sort_unstable();
    nodes.dedup();
    nodes
        .into_iter()
        .filter_map(|node| blocks.nodes.get(node))
        .flat_map(|node| node.bitmaps.iter().cloned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libvirt::domain_xml;

    #[test]
    fn every_disk_that_is_left_out_has_its_reason() {
        let domain = domain_xml::parse(include_str!("testdata/domain.xml")).unwrap();
        let skipped: Vec<_> = domain
            .disks
            .iter()
            .filter_map(|disk| Some((disk.target.as_str(), skip_reason(disk)?)))
            .collect();
        assert_eq!(
            skipped,
            [
                ("vdg", SkipReason::Shareable),
                ("vdh", SkipReason::Transient),
                ("vdi", SkipReason::ReadOnly),
                ("sda", SkipReason::Cdrom),
                ("sdb", SkipReason::Empty),
                ("vdl", SkipReason::PassedThrough),
            ]
        );
    }
}
