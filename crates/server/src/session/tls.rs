//! The server's own TLS leaf, made anew when two thirds of its life are over, and the clock as TLS wants it.

use super::SessionSettings;
use environment::Clock;
use identity::CERTIFICATE_LIFE;
use model::Timestamp;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::UnixTime;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub(super) struct TlsClock(pub Arc<dyn Clock>);

impl std::fmt::Debug for TlsClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsClock")
    }
}

impl rustls::time_provider::TimeProvider for TlsClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_micros(self.0.now_micros())))
    }
}

/// Gives each handshake a leaf that is valid now.
pub(super) struct FreshLeaf {
    settings: SessionSettings,
    current: Mutex<Option<(Arc<CertifiedKey>, Timestamp)>>,
}

impl std::fmt::Debug for FreshLeaf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FreshLeaf")
    }
}

impl FreshLeaf {
    pub(super) fn new(settings: SessionSettings) -> FreshLeaf {
        FreshLeaf { settings, current: Mutex::new(None) }
    }

    fn leaf(&self) -> Option<Arc<CertifiedKey>> {
        let now = self.settings.now();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((key, made)) = &*current
            // A clock that went back counts as old, too: the leaf must not lie in the agents' future.
            && now >= *made
            && now.since(*made) < CERTIFICATE_LIFE / 3 * 2
        {
            return Some(Arc::clone(key));
        }
        let made = self
            .settings
            .random()
            .and_then(|serial| Ok(self.settings.identity.issue_server_leaf(now, serial)?))
            .map_err(|problem| tracing::error!(%problem, "no TLS certificate can be made"))
            .ok()?;
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&made.key)
            .map_err(|error| tracing::error!(%error, "the TLS key cannot be used"))
            .ok()?;
        let key = Arc::new(CertifiedKey::new(made.chain, key));
        *current = Some((Arc::clone(&key), now));
        Some(key)
    }
}

impl ResolvesServerCert for FreshLeaf {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.leaf()
    }
}
