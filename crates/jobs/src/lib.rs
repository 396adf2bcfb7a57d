//! What the product does: protect, synchronise, check, recover, verify, prune, reclaim.
