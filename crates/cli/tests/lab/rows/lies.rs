//! Bitmaps that lie.

pub(super) use crate::audit::{
    bitmap_cleared, lie_found_by_a_differential, shrunk_and_grown, writes_in_no_bitmap,
};
