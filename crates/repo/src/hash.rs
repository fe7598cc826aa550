//! Names of chunks, pages, VMs and roots: keyed BLAKE3 with one key per use,
//! so that no hash of one use can ever be taken for one of another.

use highwater_model::{ChunkSize, ObjectId, RootHash};

use crate::manifest::{ImageRoot, VmIdentity};
use crate::wire::to_hex;

/// A key that ids are made with; all zero in a repository that is not encrypted.
pub(crate) type IdKey = [u8; 32];

/// The keys of the four uses.
pub(crate) struct IdKeys {
    chunk: [u8; 32],
    page: [u8; 32],
    vm: [u8; 32],
    root: [u8; 32],
}

impl IdKeys {
    pub(crate) fn derive(key: &IdKey) -> Self {
        Self {
            chunk: blake3::derive_key("highwater 1 chunk id", key),
            page: blake3::derive_key("highwater 1 page id", key),
            vm: blake3::derive_key("highwater 1 vm key", key),
            root: blake3::derive_key("highwater 1 root", key),
        }
    }

    pub(crate) fn chunk_id(&self, bytes: &[u8]) -> ObjectId {
        ObjectId::from_bytes(blake3::keyed_hash(&self.chunk, bytes).into())
    }

    pub(crate) fn page_id(&self, bytes: &[u8]) -> ObjectId {
        ObjectId::from_bytes(blake3::keyed_hash(&self.page, bytes).into())
    }

    /// Returns the folder of a VM's points. UUIDs outlive renames, so they come
    /// first; an all-zero one is none.
    pub(crate) fn vm_key(&self, vm: &VmIdentity) -> String {
        let uuid = vm.uuid.as_deref().map(str::to_ascii_lowercase);
        let text = match uuid.filter(|uuid| uuid.bytes().any(|b| !matches!(b, b'0' | b'-'))) {
            Some(uuid) => format!("uuid:{uuid}"),
            None => format!("name:{}", vm.name),
        };
        let hash = blake3::keyed_hash(&self.vm, text.as_bytes());
        let [first, _] = *hash.as_bytes().as_chunks::<16>().0 else {
            unreachable!("32 = 2 * 16")
        };
        to_hex(&first)
    }

    /// Returns the hash that binds size, chunk size and content.
    pub(crate) fn root_hash(
        &self,
        size: u64,
        chunk: ChunkSize,
        top: Option<&ObjectId>,
    ) -> RootHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.root);
        hasher.update(&size.to_le_bytes());
        hasher.update(&u32::from(chunk).to_le_bytes());
        hasher.update(&[depth(size, chunk), u8::from(top.is_some())]);
        hasher.update(top.map_or(&[0; 32], |top| top.as_bytes()));
        RootHash::from_bytes(hasher.finalize().into())
    }

    pub(crate) fn root(
        &self,
        size_bytes: u64,
        chunk: ChunkSize,
        top: Option<ObjectId>,
    ) -> ImageRoot {
        let hash = self.root_hash(size_bytes, chunk, top.as_ref());
        ImageRoot {
            hash,
            size_bytes,
            chunk_bytes: chunk,
            top,
        }
    }

    pub(crate) fn proves(&self, root: &ImageRoot) -> bool {
        root.hash == self.root_hash(root.size_bytes, root.chunk_bytes, root.top.as_ref())
    }
}

/// Children of one tree page.
pub(crate) const FAN_OUT: u64 = 64;

/// Returns the number of levels of pages: the least that hold all chunks; none
/// for an image of no bytes.
pub(crate) fn depth(size: u64, chunk: ChunkSize) -> u8 {
    let mut pages = chunk.count(size);
    let mut levels = 0_u8;
    while pages > 1 || (pages == 1 && levels == 0) {
        pages = pages.div_ceil(FAN_OUT);
        levels = levels.saturating_add(1);
    }
    levels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_the_least_number_of_levels_that_hold_all_chunks() {
        let chunk = ChunkSize::DEFAULT;
        for (chunks, levels) in [
            (0, 0),
            (1, 1),
            (2, 1),
            (64, 1),
            (65, 2),
            (4096, 2),
            (4097, 3),
            (1 << 47, 8),
        ] {
            assert_eq!(
                depth(chunks * chunk.bytes(), chunk),
                levels,
                "{chunks} chunks"
            );
        }
        assert_eq!(depth(1, chunk), 1);
    }

    #[test]
    fn the_four_uses_never_share_a_hash() {
        let keys = IdKeys::derive(&[0; 32]);
        let distinct: std::collections::HashSet<_> =
            [keys.chunk, keys.page, keys.vm, keys.root].into();
        assert_eq!(distinct.len(), 4);
    }

    #[test]
    fn an_all_zero_uuid_is_none() {
        let keys = IdKeys::derive(&[7; 32]);
        let key = |name: &str, uuid: Option<&str>| {
            keys.vm_key(&VmIdentity {
                name: name.into(),
                uuid: uuid.map(Into::into),
            })
        };
        let zero = "00000000-0000-0000-0000-000000000000";
        assert_eq!(key("a", Some(zero)), key("a", None));
        assert_ne!(key("a", None), key("b", None));
        assert_eq!(key("a", Some("AB-1")), key("b", Some("ab-1")));
        assert_eq!(key("a", None).len(), 32);
    }
}
