//! The server's database: derived tables and history.
