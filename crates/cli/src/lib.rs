//! The command line: words in, API calls out.
