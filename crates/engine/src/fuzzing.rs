//! Entry points of the fuzz targets, which tests replay; no part of the interface.

/// Takes any bytes as a manifest and plans the next backup on it.
pub fn manifest(json: &[u8]) {
    crate::backup::fuzzing::manifest(json);
}
