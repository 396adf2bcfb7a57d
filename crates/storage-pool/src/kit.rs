//! Recovery kits (section 3.3): text for paper and safes.

use model::PoolId;

use crate::keys::Secret;

/// Whose copy of the root key it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecipientId(pub [u8; 16]);

impl std::str::FromStr for RecipientId {
    type Err = KitError;
    fn from_str(text: &str) -> Result<RecipientId, KitError> {
        unhex(text).map(RecipientId).ok_or(KitError::Missing("recipient"))
    }
}

impl std::fmt::Display for RecipientId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What opens a pool: a recipient and its secret.
#[derive(Debug, Clone)]
pub struct Recipient {
    /// The pool.
    pub pool: PoolId,
    /// Which wrapped copy.
    pub id: RecipientId,
    /// What unwraps it.
    pub secret: Secret,
}

/// Why a text is not a kit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KitError {
    /// A line is missing.
    #[error("the recovery kit has no readable line `{0}`")]
    Missing(&'static str),
    /// Both copies fail their check.
    #[error("the recovery kit is damaged: neither copy of the secret fits its check value")]
    Damaged,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0u8; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |c: u8| (c as char).to_digit(16);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(bytes)
}

fn check(pool: &str, recipient: &str, secret: &str) -> String {
    hex(&blake3::hash(format!("{pool}\n{recipient}\n{secret}").as_bytes()).as_bytes()[..4])
}

/// The text of a kit. `place` says where the pool was, for the person who finds the paper.
pub fn write(recipient: &Recipient, place: &str) -> String {
    let (pool, id, secret) =
        (recipient.pool.to_string(), recipient.id.to_string(), hex(recipient.secret.expose()));
    let check = check(&pool, &id, &secret);
    format!(
        "Stillpoint recovery kit. Whoever has this and the pool's files can read every recovery point.\n\
         Keep it away from the server, in two places. To recover with nothing else:\n\
         \x20 stillpoint recover disk --pool DIR --kit THIS-FILE NAME --point latest --disk 0 --to FILE\n\
         \n\
         kit-version: 1\n\
         place: {place}\n\
         pool-id: {pool}\n\
         recipient: {id}\n\
         secret: {secret}\n\
         check: {check}\n\
         secret-again: {secret}\n\
         check-again: {check}\n",
        place = place.replace(['\n', '\r'], " ")
    )
}

/// A kit that was read.
#[derive(Debug, Clone)]
pub struct Kit {
    /// What it opens.
    pub recipient: Recipient,
    /// A line of it that is damaged although the kit as a whole still serves.
    pub damage: Option<String>,
}

/// Reads a kit's text.
pub fn read(text: &str) -> Result<Kit, KitError> {
    let value = |name: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':').map(str::trim))
            .unwrap_or("")
    };
    let (pool, id) = (value("pool-id"), value("recipient"));
    let mut found = None;
    let mut damage = Vec::new();
    for (secret, stated) in [("secret", "check"), ("secret-again", "check-again")] {
        if check(pool, id, value(secret)) == value(stated) {
            found = found.or(unhex::<32>(value(secret)));
        } else {
            damage.push(format!("the lines `{secret}` and `{stated}` do not fit together"));
        }
    }
    // The pool and the recipient stand once; the check covers them, so a kit of which one copy fits has them right.
    let recipient = Recipient {
        pool: pool.parse().map_err(|_| KitError::Missing("pool-id"))?,
        id: RecipientId(unhex(id).ok_or(KitError::Missing("recipient"))?),
        secret: Secret::from_bytes(found.ok_or(KitError::Damaged)?),
    };
    if value("kit-version") != "1" {
        damage.push("the line `kit-version` is not 1".to_owned());
    }
    // The words around the values carry no meaning, and a changed letter there is found all the same.
    if damage.is_empty() && write(&recipient, value("place")) != text {
        damage.push("the text differs from what was written".to_owned());
    }
    Ok(Kit { recipient, damage: (!damage.is_empty()).then(|| damage.join("; ")) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kit() -> (Recipient, String) {
        let recipient = Recipient {
            pool: PoolId([0xab; 16]),
            id: RecipientId([0xcd; 16]),
            secret: Secret::from_bytes([0xef; 32]),
        };
        let text = write(&recipient, "/srv/pool on backup1");
        (recipient, text)
    }

    #[test]
    fn kits_round_trip_also_with_other_line_ends() {
        let (recipient, text) = kit();
        let read_back = read(&text).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(read_back.damage, None);
        assert_eq!(read_back.recipient.secret, recipient.secret);
        let windows = read(&text.replace('\n', "\r\n")).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(windows.recipient.id, recipient.id);
    }

    #[test]
    fn a_flipped_bit_never_gives_a_wrong_secret() {
        let (recipient, text) = kit();
        let mut unusable = 0;
        for bit in 0..text.len() * 8 {
            let mut bytes = text.clone().into_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            match read(&String::from_utf8_lossy(&bytes)) {
                Ok(found) => {
                    assert_eq!(found.recipient.secret, recipient.secret, "bit {bit}");
                    assert_eq!(found.recipient.pool, recipient.pool, "bit {bit}");
                    // The place is free text: a change there cannot be told from another place.
                    let line = text[..bit / 8].rfind('\n').map_or(0, |at| at + 1);
                    if !text[line..].starts_with("place: /") {
                        assert!(found.damage.is_some(), "bit {bit} was not noticed");
                    }
                }
                Err(_) => unusable += 1,
            }
        }
        assert!(unusable > 0);
    }
}
