//! The server's identity key as a document of its pool.

use ::identity::ServerIdentity;
use environment::Randomness;
use model::{Code, Problem};
use storage_pool::Pool;

const DOCUMENT: &str = "server/identity";

/// The identity of the server of this pool; made at its first start.
pub fn server_identity(pool: &Pool, randomness: &dyn Randomness) -> Result<ServerIdentity, Problem> {
    if let Some(bytes) = pool.document(DOCUMENT) {
        return Ok(ServerIdentity::from_bytes(&bytes)?);
    }
    // A record that cannot be read may be the identity: a second one would lock out every agent.
    if let Some(record) = pool.state().unreadable.first() {
        return Err(Problem::new(
            Code::PoolDamaged,
            format!(
                "The pool holds no identity of its server, and {} cannot be read: it may have held it.",
                record.path
            ),
        )
        .about(record.path.clone()));
    }
    let mut serial = [0; 16];
    randomness
        .fill(&mut serial)
        .map_err(|error| Problem::new(Code::Internal, format!("No random numbers: {error}.")))?;
    let identity = ServerIdentity::generate(serial)?;
    pool.put_document(DOCUMENT, Some(&identity.to_bytes())).map_err(jobs::problem::pool)?;
    Ok(identity)
}
