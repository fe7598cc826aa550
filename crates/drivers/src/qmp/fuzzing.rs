//! Entry points of the fuzz targets, which tests replay; no part of the interface.
//!
//! They take any bytes at all. They panic if the crate panics, or breaks one of
//! the promises checked here.

use std::collections::BTreeMap;

use serde_json::Value;

use super::disks;
use super::files::Files;
use super::graph::Graph;
use super::layout::{About, Layout};
use super::wire::{self, Message, Splitter};

/// Reads the bytes as what a monitor or an agent says. It does not matter how
/// they are cut.
pub fn wire(bytes: &[u8]) {
    let mut whole = Splitter::default();
    let messages = whole.take(bytes);
    let mut pieces = Splitter::default();
    let mut found = Vec::new();
    for piece in bytes.chunks(7) {
        match pieces.take(piece) {
            // What follows such a byte is all that counts.
            Ok(_) if bytes.contains(&0xff) => return,
            Ok(more) => found.extend(more),
            Err(_) => {
                assert!(messages.is_err() || bytes.contains(&0xff));
                return;
            }
        }
    }
    let messages = messages.expect("in pieces it was understood");
    assert_eq!(messages, found);
    for message in messages {
        if let Ok(Message::Event(event)) = wire::message(&message) {
            assert!(event.name.len() <= 512);
        }
    }
}

/// Reads the bytes as QEMU's answers about nodes, devices and graph, with zero
/// bytes between them, and reports each disk.
pub fn layout(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    let mut texts = text.split('\0');
    let mut next = || {
        let text = texts.next().unwrap_or_default();
        serde_json::from_str::<Value>(text).unwrap_or_default()
    };
    let (nodes, devices, graph) = (next(), next(), next());
    let stats = Graph::from_stats(graph.clone());
    let graph = Graph::parse(graph).or(stats).unwrap_or_default();
    let about = |path: &str| About {
        serial: Some(path.to_owned()),
        ..About::default()
    };
    let Ok(layout) = Layout::put_together(nodes, devices, graph, &about) else {
        return;
    };
    let mut targets = std::collections::BTreeSet::new();
    for disk in &layout.disks {
        assert!(
            targets.insert(&disk.target),
            "two disks are called the same"
        );
        assert!(!disk.target.is_empty() && !disk.target.starts_with(['.', '-']));
        assert!(!disk.target.contains('/') && disk.target.len() < 128);
        // No process, and no path that is absolute: a fuzzer shall not look at
        // the files of this machine.
        if text.contains('/') {
            continue;
        }
        let facts = disks::facts(disk, &layout, &Files::default(), &BTreeMap::new());
        for bitmap in facts.bitmaps {
            assert!(layout.nodes.contains_key(&bitmap.node));
        }
    }
}
