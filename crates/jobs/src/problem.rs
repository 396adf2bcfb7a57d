//! What an error means to a person: its code, and a hint where the code's own remedy is not the point.

use model::{Code, Problem};
use storage_pool::PoolError;
use transfer::{DeliveryError, ReceptionError};

/// An error of the pool.
pub fn pool(error: PoolError) -> Problem {
    let message = format!("{error}.");
    let code = match &error {
        PoolError::Io { .. } => Code::PoolIo,
        PoolError::Full { .. } | PoolError::Reserve { .. } => Code::PoolFull,
        PoolError::NoPool { .. } => Code::DataFolderMissing,
        PoolError::Exists { .. } => Code::TargetExists,
        PoolError::OtherPool { .. } => Code::OtherPool,
        PoolError::Damaged { .. } | PoolError::ChunkLost { .. } => Code::PoolDamaged,
        PoolError::TooNew { .. } => Code::PoolTooNew,
        PoolError::KeyMissing { .. } => Code::KeyMissing,
        PoolError::KeyWrong { .. } => Code::KeyWrong,
        PoolError::Busy { .. } => Code::PoolBusy,
        PoolError::Fenced { .. } => Code::PoolFenced,
        PoolError::ReadOnly | PoolError::Misuse(_) | PoolError::NoSuchDomain(_) => Code::Internal,
        PoolError::NoSuchPoint(_) | PoolError::NoSuchDisk { .. } => Code::NotFound,
        PoolError::Stopped { .. } => Code::ReclaimStopped,
        PoolError::Breaker { .. } => Code::ReclaimBreaker,
        PoolError::Kept { .. } => Code::PointLocked,
        PoolError::RecipientKept { .. } => Code::RecipientKept,
        PoolError::NotACopy { .. } => Code::NotACopy,
        PoolError::CopyDiverged { .. } => Code::CopyDiverged,
    };
    Problem::new(code, message)
}

/// An error of receiving blocks. `host` is what the host itself said, if it did: it knows better.
pub fn reception(error: ReceptionError, host: Option<Problem>) -> Problem {
    match (error, host) {
        (ReceptionError::Cancelled, _) => cancelled(),
        (ReceptionError::Store(error), _) => match error.0.downcast::<PoolError>() {
            Ok(error) => pool(*error),
            Err(error) => Problem::new(Code::Internal, format!("{error}.")),
        },
        (_, Some(problem)) => problem,
        (error @ ReceptionError::ProtocolBroken(_), None) => {
            Problem::new(Code::ProtocolBroken, format!("{error}."))
        }
        (error, None) => Problem::new(Code::AgentUnreachable, format!("{error}.")),
    }
}

/// An error of delivering a point. `host` as for [`reception`].
pub fn delivery(error: DeliveryError, host: Option<Problem>) -> Problem {
    match (error, host) {
        (DeliveryError::Cancelled, _) => cancelled(),
        (DeliveryError::Device(error), _) => Problem::new(Code::PointNotUsable, format!("{error}.")),
        (_, Some(problem)) => problem,
        (error @ DeliveryError::TargetTooSmall { .. }, None) => {
            Problem::new(Code::TargetFormat, format!("{error}."))
        }
        (error @ DeliveryError::NotVerified, None) => Problem::new(Code::TargetWrite, format!("{error}."))
            .hint("Check the target's storage and memory; what was written there cannot be trusted."),
        (error @ DeliveryError::ProtocolBroken(_), None) => {
            Problem::new(Code::ProtocolBroken, format!("{error}."))
        }
        (error, None) => Problem::new(Code::AgentUnreachable, format!("{error}.")),
    }
}

/// The job was cancelled.
pub fn cancelled() -> Problem {
    Problem::new(Code::Cancelled, "The job was cancelled.")
}
