//! Providers of protected machines behind one trait.
