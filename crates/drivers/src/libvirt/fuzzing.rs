//! Entry points of the fuzz targets, which tests replay; no part of the interface.
//!
//! Both take any bytes at all. They panic if the crate panics, or breaks one of
//! the promises checked here.

use std::collections::BTreeSet;
use std::path::PathBuf;

use highwater_hypervisor::WriteCounters;

use super::disks::{self, DiskQueries};
use super::domain_xml::{self, DomainXml, SourceXml};
use super::xml::CHAIN_MAX;
use super::{backup_xml, record_xml};
use crate::blocks::{Blocks, version};

/// Reads the bytes as each of the texts that libvirt sends.
///
/// Each disk of a definition has a name of its own that leads out of no
/// directory. What we write about a disk is read back as it was.
pub fn xml(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    if let Ok(domain) = domain_xml::parse(text) {
        check_disks(&domain);
        let _described: Vec<_> = domain.disks.iter().map(disks::skip_reason).collect();
    }
    drop(record_xml::backup_job(text));
    if let Ok(mut facts) = record_xml::checkpoint(text) {
        facts.disks.truncate(16);
        let written = backup_xml::checkpoint(&facts.name, None, facts.created_s, &facts.disks);
        let again = record_xml::checkpoint(&written).expect("what we write is read");
        assert_eq!(again.disks, facts.disks, "{written}");
        assert_eq!(again.mark, facts.mark, "{written}");
    }
}

fn check_disks(domain: &DomainXml) {
    let mut seen = BTreeSet::new();
    for disk in &domain.disks {
        assert!(seen.insert(&disk.target), "two disks are called the same");
        assert!(!disk.target.is_empty() && !disk.target.starts_with('.'));
        let is_harmful = |letter: char| letter == '/' || letter.is_control();
        assert!(!disk.target.contains(is_harmful), "{:?}", disk.target);
        assert!(disk.chain.len() <= CHAIN_MAX);
    }
}

/// Reads the bytes as QEMU's answers about nodes, devices, graph and version,
/// with zero bytes between them, and asks about each device that is there.
pub fn replies(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    let mut texts = text.split('\0');
    let mut next = || texts.next().unwrap_or_default();
    let (nodes, devices, graph) = (next(), next(), next());
    drop(version(next()));
    let Ok(mut blocks) = Blocks::parse(nodes, devices) else {
        return;
    };
    drop(blocks.add_graph(graph));
    let _needed = blocks.needs_graph();
    let definition = include_str!("testdata/domain.xml");
    let domain = domain_xml::parse(definition).expect("it is a definition");
    for mut disk in domain.disks {
        // No path: a fuzzer shall not look at the files of this machine.
        for link in &mut disk.chain {
            link.source = SourceXml::Network("nbd://host/export".to_owned());
        }
        let facts = disks::facts(&disk, &blocks, &Nothing);
        for bitmap in facts.into_iter().flat_map(|facts| facts.bitmaps) {
            assert!(blocks.holders(&bitmap.name).contains(&bitmap.node));
        }
    }
    for device in &blocks.devices {
        let exported = device.node.as_deref();
        let _compared = blocks.root_node(Some(&device.qdev), exported);
    }
}

/// A connection that knows nothing.
struct Nothing;

impl DiskQueries for Nothing {
    fn volume_path(&self, _: &str, _: &str) -> Option<PathBuf> {
        None
    }

    fn capacity(&self, _: &str) -> Option<u64> {
        None
    }

    fn counters(&self, _: &str) -> Option<WriteCounters> {
        None
    }
}
