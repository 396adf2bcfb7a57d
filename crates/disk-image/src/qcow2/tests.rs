//! Unit tests of the structures.
