//! Entry point of the fuzz target, which tests replay; no part of the interface.

use crate::Qcow2Reader;

/// Reads the bytes as a qcow2 image, with all its bitmaps.
///
/// It panics if the crate panics, or reads more than it may.
pub fn qcow2(bytes: &[u8]) {
    const BUDGET_BYTES: u64 = 1 << 20;
    let Ok(Some(image)) = Qcow2Reader::open(bytes) else {
        return;
    };
    let Ok(bitmaps) = image.bitmaps() else { return };
    let mut budget = BUDGET_BYTES;
    for bitmap in &bitmaps {
        if let Ok(dirty) = image.count_dirty(bitmap, &mut budget) {
            let granularity = u64::from(bitmap.granularity());
            let whole = image
                .header()
                .size_bytes
                .div_ceil(granularity)
                .saturating_mul(granularity);
            assert!(dirty <= whole, "more than the whole disk is dirty");
        }
    }
    assert!(budget <= BUDGET_BYTES);
}
