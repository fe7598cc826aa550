//! Any bytes as one object: a pack, an index, a manifest, a key.

use std::collections::BTreeSet;
use std::sync::Arc;

use highwater_model::{ObjectId, PointId, RepoId, Timestamp};
use highwater_store::testing::MemStore;
use highwater_store::{ObjectKey, ObjectKind, Store as _};
use zeroize::Zeroizing;

use super::mend::{mend_config, mend_index};
use super::whole;
use crate::compress::Decompressor;
use crate::config::Config;
use crate::container::{self, ContainerKind};
use crate::hash::IdKeys;
use crate::image::ImageReader;
use crate::index::IndexSet;
use crate::manifest::{ImageRoot, Manifest, VmIdentity};
use crate::pack::{
    HEADER_LEN, PLAIN_LEN_MAX, PackHeader, PackKind, RECORD_HEADER_LEN, RecordHeader, open_record,
};
use crate::page::{Page, check_bounds};
use crate::repository::Repository;
use crate::seal::{SealKey, Sealer};
use crate::secret;
use crate::wire::{narrow, to_hex, wide};

/// Reads the bytes as a pack: header, then record after record.
///
/// A record that opens has the length and the id that its header tells, whatever
/// lay in the buffer before.
pub fn pack(bytes: &[u8]) {
    let Ok(header) = PackHeader::decode(bytes) else {
        return;
    };
    let key = SealKey(Zeroizing::new([3; 32]));
    let is_sealed = header.cipher.overhead() > 0;
    let sealer = Sealer::for_pack(is_sealed.then_some(&key), &header.salt);
    let mut at = HEADER_LEN;
    // More records than a fuzzer's input holds.
    for _ in 0..64 {
        let rest = bytes.get(at..).unwrap_or_default();
        let Ok(record) = RecordHeader::decode(rest) else {
            return;
        };
        let payload = narrow(record.payload_len.into()).unwrap_or(usize::MAX);
        let len = RECORD_HEADER_LEN.saturating_add(payload);
        let Some(stored) = rest.get(..len) else {
            return;
        };
        let offset = u32::try_from(at).unwrap_or(u32::MAX);
        let open = |leftover: u8| {
            let mut plain = vec![leftover; 100];
            let mut decompressor = Decompressor::default();
            let (kind, stored) = (header.kind, &mut stored.to_vec());
            open_record(&sealer, kind, offset, stored, &mut decompressor, &mut plain)
                .map(|id| (id, plain))
        };
        let opened = open(0);
        assert!(opened == open(0xff), "a record shows what lay there before");
        if let Ok((id, plain)) = opened {
            assert_eq!(id, record.id);
            assert!(record.plain_len <= PLAIN_LEN_MAX);
            assert_eq!(wide(plain.len()), u64::from(record.plain_len));
            if header.kind == PackKind::Pages {
                page(&plain);
            }
        }
        at = at.saturating_add(len);
    }
}

/// A page that is accepted has one form only, and nothing beyond the image's end.
fn page(bytes: &[u8]) {
    let Ok(page) = Page::decode(bytes) else {
        return;
    };
    let mut again = Vec::new();
    page.encode(&mut again);
    assert!(again == bytes, "a page has two forms");
    for (level, number, chunks) in [
        (0, 0, 1),
        (0, 3, 200),
        (1, 0, 4097),
        (9, u64::MAX, u64::MAX),
    ] {
        let children = (0..level).fold(chunks, |count: u64, _| count.div_ceil(64));
        if check_bounds(&page, level, number, chunks).is_ok() {
            let first = number.saturating_mul(64);
            let beyond = (0..64_u64)
                .filter(|slot| first.saturating_add(*slot) >= children)
                .any(|slot| narrow(slot).is_ok_and(|slot| page.child(slot).is_some()));
            assert!(!beyond, "a page reaches beyond the image");
        }
    }
}

/// Loads the bytes as an index file and looks up every id in its blocks.
///
/// What is found has the id asked for and lies in a pack that exists with the
/// length that the file tells.
pub fn index(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    mend_index(&mut bytes);
    let shelf = MemStore::of_whole_objects();
    let name = |byte: u8| to_hex(&[byte; 32]);
    let make = |kind, byte| ObjectKey::new(kind, name(byte)).expect("hexadecimal is a good name");
    shelf.damage(&make(ObjectKind::Index, 0), &bytes);
    shelf.damage(&make(ObjectKind::Pack, 0), &[0; 4096]);
    shelf.damage(&make(ObjectKind::Pack, 1), &[1; 100]);
    let shelf = Arc::new(shelf);
    let set = IndexSet::open(shelf.clone()).expect("a store in memory does not fail");
    let blocks = bytes.rchunks_exact(4096).take(8);
    let rows: BTreeSet<ObjectId> = blocks
        .flat_map(|block| block.as_chunks::<48>().0)
        .filter_map(|row| row.first_chunk::<32>())
        .map(|id| ObjectId::from_bytes(*id))
        .chain([
            ObjectId::from_bytes([0; 32]),
            ObjectId::from_bytes([255; 32]),
        ])
        .collect();
    for id in rows {
        let places = set.places(&id, 8).expect("a store in memory does not fail");
        for place in places {
            assert_eq!(place.record.id, id);
            assert_eq!(shelf.size(&place.pack()).ok(), Some(place.pack_len));
        }
    }
}

/// Puts the bytes into a repository as the JSON of a manifest, root hashes made
/// to fit, and lists the points.
///
/// One that is listed is written as it was read. Returns the repository, and
/// the manifest if it was accepted.
pub fn manifest(json: &[u8]) -> (Repository, Option<Manifest>) {
    let shelf = whole::plain().shelf.fork();
    let ids = IdKeys::derive(&[0; 32]);
    let parsed: Option<Manifest> = serde_json::from_slice(json).ok();
    let mend = |root: &mut ImageRoot| {
        root.hash = ids.root_hash(root.size_bytes, root.chunk_bytes, root.top.as_ref());
    };
    let (vm, point, json) = if let Some(mut manifest) = parsed {
        for disk in &mut manifest.disks {
            mend(&mut disk.image);
        }
        for file in &mut manifest.files {
            mend(&mut file.image);
        }
        let json = serde_json::to_vec(&manifest).expect("what was JSON becomes JSON");
        (manifest.vm, manifest.point, json)
    } else {
        let vm = VmIdentity {
            name: String::new(),
            uuid: None,
        };
        let point = PointId::new(Timestamp::from_unix_ms(1));
        (vm, point, json.to_vec())
    };
    let name = format!("{}/{point}", ids.vm_key(&vm));
    let key = ObjectKey::new(ObjectKind::Point, name).expect("hexadecimal and base 32 are names");
    for old in shelf.keys() {
        if old.kind() == ObjectKind::Point {
            drop(shelf.delete(&old));
        }
    }
    let object = container::seal(ContainerKind::Manifest, &key, None, &json)
        .expect("a fuzzer's input is short");
    shelf.damage(&key, &object);
    let repo = Repository::open(Arc::new(shelf), None).expect("its configuration is whole");
    let mut list = repo.points().expect("a store in memory does not fail");
    assert_eq!(
        list.points.len().saturating_add(list.damaged.len()),
        1,
        "a point is gone without a word"
    );
    let accepted = list.points.pop();
    if let Some(manifest) = &accepted {
        let json = serde_json::to_vec(manifest).expect("what was JSON becomes JSON");
        let again: Manifest = serde_json::from_slice(&json).expect("what was written is read");
        assert!(again == *manifest, "a manifest changes when it is written");
        for disk in manifest.disks.iter().take(16) {
            walk(&repo.image(&disk.image).expect("its root hash fits"));
        }
    }
    (repo, accepted)
}

/// Chunks ascend and lie within the image, and each is the one found directly.
fn walk(image: &ImageReader) {
    let root = image.root();
    let count = root.chunk_bytes.count(root.size_bytes);
    let mut next = 0;
    for step in image.chunks().take(200) {
        let Ok((chunk, id)) = step else { return };
        assert!(chunk >= next && chunk < count, "chunks are out of order");
        assert_eq!(image.chunk(chunk).ok(), Some(Some(id)));
        next = chunk.saturating_add(1);
    }
}

/// Reads the bytes as a configuration if the first one is even, else as a key
/// object, which is then tried if that is little work.
pub fn key(bytes: &[u8]) {
    let Some((choice, body)) = bytes.split_first() else {
        return;
    };
    if choice % 2 == 1 {
        secret::fuzz(RepoId::from_bytes([1; 16]), body);
        return;
    }
    drop(Config::decode(body));
    if let Ok(config) = Config::decode(&mend_config(body)) {
        let again = Config::decode(&config.encode()).expect("what was written is read");
        assert!(
            again == config,
            "a configuration changes when it is written"
        );
    }
}
