//! The storage pool: chunks, packs, index, replicas and recovery points on disk.
