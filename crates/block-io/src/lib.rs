//! Block devices: the waist of Stillpoint.
//!
//! Image formats, file systems and recovery points meet at one small trait, [`BlockDevice`]: a fixed number of
//! bytes that can be read at any offset and that knows which of its ranges may hold data. Writers add
//! [`WritableDevice`]. Wrappers of the same traits make every implementation testable against slow, limited and
//! failing storage.
//!
//! Refuses to know: image formats, file systems, the pool, who owns the bytes.
//!
//! Not a file: a device never grows or shrinks, has no position, and a read past its end is an error, never a
//! short read.
//!
//! Invariants
//! - What [`BlockDevice::next_allocated`] leaves out reads as zeros. (must: a backup skips it)
//! - A read fills the whole buffer or fails. (must)
//! - Every method may be called from several threads at once. (must)

mod device;
mod faulty;
mod file;
mod growable;
mod masked;
mod memory;
mod overlay;
mod slice;
mod throttled;

pub mod conformance;

pub use device::{Allocated, BlockDevice, DeviceError, WritableDevice};
pub use faulty::{Fault, FaultyDevice};
pub use file::FileDevice;
pub use growable::{DiskFile, GrowableFile, MemoryFile};
pub use masked::MaskedDevice;
pub use memory::MemoryDevice;
pub use model::ByteRange;
pub use overlay::OverlayDevice;
pub use slice::SliceDevice;
pub use throttled::{Pace, ThrottledDevice};
