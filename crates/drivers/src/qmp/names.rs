//! What a session's objects in QEMU are called.
//!
//! A node's name has 31 characters at most, so it cannot hold session and disk:
//! it holds a part of a hash of both, and the session is found from the name of
//! the scratch file that the fleece is in.

use std::collections::BTreeSet;

use highwater_model::SessionId;

use super::layout::Layout;
use crate::export_name::session_of_scratch;

/// Returns the sessions whose scratch files QEMU has open.
pub(super) fn sessions(layout: &Layout) -> BTreeSet<SessionId> {
    let files = layout.nodes.values().map(|node| node.file.as_str());
    files.filter_map(session_of_scratch).collect()
}
