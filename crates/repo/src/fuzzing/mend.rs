//! Hashes made to fit what was changed.

use crate::wire::narrow;

/// Makes the hashes of an index file fit its bytes, as far as its counts fit
/// its length (docs/format.md).
pub(super) fn mend_index(bytes: &mut [u8]) {
    const HEADER: usize = 64;
    const BLOCK: usize = 4096;
    let Some(counts) = bytes
        .get(8..24)
        .and_then(|part| part.as_chunks::<4>().0.first_chunk::<4>())
    else {
        return;
    };
    let [supersedes, packs, low, high] = counts.map(u32::from_le_bytes);
    let rows = u64::from(high) << 32 | u64::from(low);
    let blocks = rows.div_ceil(84);
    let words = rows.saturating_mul(10).div_ceil(64);
    let tables = u64::from(supersedes)
        .saturating_mul(32)
        .saturating_add(u64::from(packs).saturating_mul(48))
        .saturating_add(blocks.saturating_add(words).saturating_mul(8));
    let Ok(tables) = narrow(tables) else { return };
    let Some((head, rest)) = bytes.split_at_mut_checked(HEADER) else {
        return;
    };
    let Some((tables, rows)) = rest.split_at_mut_checked(tables) else {
        return;
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(head.get(..24).unwrap_or_default());
    hasher.update(tables);
    if let Some(hash) = head.get_mut(24..56) {
        hash.copy_from_slice(hasher.finalize().as_bytes());
    }
    for block in rows.chunks_exact_mut(BLOCK) {
        mend_tail(block);
    }
}

/// Makes the last 32 bytes the hash of those before them.
pub(super) fn mend_tail(bytes: &mut [u8]) {
    if let Some((hashed, hash)) = bytes.split_last_chunk_mut::<32>() {
        *hash = *blake3::hash(hashed).as_bytes();
    }
}

/// Returns a configuration whose second line is the hash of its first.
pub(super) fn mend_config(bytes: &[u8]) -> Vec<u8> {
    let line = bytes
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let hash = blake3::hash(line).to_hex();
    [line, b"\n", hash.as_bytes(), b"\n"].concat()
}
