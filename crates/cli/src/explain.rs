//! Error codes, explained: one code on the screen, all of them as `docs/error-codes.md`.

use model::Code;

/// What is said about a code.
#[derive(Debug, serde::Serialize)]
pub struct Explanation {
    /// The code.
    pub code: Code,
    /// What it is.
    pub title: &'static str,
    /// What leads to it.
    pub cause: &'static str,
    /// What to do.
    pub remedy: &'static str,
    /// The exit status of a command that ends with it.
    pub exit_status: u8,
}

/// Explains a code.
pub fn explain(code: Code) -> Explanation {
    Explanation {
        code,
        title: code.title(),
        cause: code.cause(),
        remedy: code.remedy(),
        exit_status: code.exit_status() as u8,
    }
}

/// The page of all codes.
pub fn page() -> String {
    let mut text = String::from(
        "# Error codes\n\nMade from `crates/model/src/problem.rs`; do not edit. `stillpoint explain CODE` tells the same.\n\n\
         | exit status | meaning |\n|---|---|\n| 0 | done |\n| 1 | failed |\n| 2 | wrong usage, ambiguous name |\n\
         | 3 | done with warnings |\n| 4 | not found |\n| 5 | refused by policy, lock, missing approval or an existing target |\n\
         | 6 | damaged data |\n| 7 | no contact with server or agent |\n| 8 | busy: another writer |\n\
         | 9 | key missing or wrong |\n| 10 | no space |\n| 130 | cancelled |\n",
    );
    for &code in Code::ALL {
        let it = explain(code);
        text.push_str(&format!(
            "\n## {code}: {}\n\n{}\n\n*What to do:* {}\n\nExit status {}.\n",
            it.title, it.cause, it.remedy, it.exit_status
        ));
    }
    text
}
