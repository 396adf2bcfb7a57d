//! Both ends of moving blocks: read, hash, compress, credits, resume, audit.
