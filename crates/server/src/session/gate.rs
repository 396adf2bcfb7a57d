//! What the handshake proved of a caller.

use identity::PeerCertificate;
use std::net::SocketAddr;
use std::sync::Arc;

/// Who is at the other end: an extension of every request.
#[derive(Debug, Clone)]
pub struct Gate {
    /// The address.
    pub remote: SocketAddr,
    /// The certificate, proved in the handshake; `None` if none was shown. Whether it is still good is for each
    /// request to ask.
    pub certificate: Option<Arc<PeerCertificate>>,
}
