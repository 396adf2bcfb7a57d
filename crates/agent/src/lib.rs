//! The agent: connects a host's datasources to a server.
