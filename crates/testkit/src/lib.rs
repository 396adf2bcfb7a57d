//! Test builders: disks, image files, a fixed clock, the ledger.
