//! Peers that break the NBD protocol, seen from the whole backup: the disk that
//! cannot be read is left out, the others are in the point.
