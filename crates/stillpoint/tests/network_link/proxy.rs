//! A line of known delay and rate that can go dead.
//!
//! ```text
//! reader: token bucket of its direction -> queue with the time at which each piece arrives -> writer
//! ```

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes read at once.
const PIECE: usize = 64 * 1024;
/// Pieces on their way in one direction of one connection: more than rate times delay, and bounded.
const ON_THE_WAY: usize = 64;

/// A line.
pub struct Line {
    /// Where callers connect to.
    pub address: String,
    /// Bytes that callers sent, those that were lost included.
    pub up: Arc<AtomicU64>,
    dead: Arc<AtomicBool>,
    cut_at: Arc<AtomicU64>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

/// So many bytes a second for all connections together; a hundredth of a second at once.
struct Bucket {
    bytes_per_second: u64,
    paid_until: Mutex<Instant>,
}

impl Bucket {
    fn wait(&self, bytes: usize) {
        let cost = Duration::from_nanos(bytes as u64 * 1_000_000_000 / self.bytes_per_second);
        let until = {
            let mut paid = self.paid_until.lock().unwrap();
            *paid = (*paid).max(Instant::now() - Duration::from_millis(10)) + cost;
            *paid
        };
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    }
}

impl Line {
    /// A line from `listener` to `to`, `delay` each way.
    pub fn start(listener: TcpListener, to: String, delay: Duration, bytes_per_second: u64) -> Line {
        let address = listener.local_addr().unwrap().to_string();
        let line = Line {
            address,
            up: Arc::default(),
            dead: Arc::default(),
            cut_at: Arc::new(AtomicU64::new(u64::MAX)),
            open: Arc::default(),
        };
        let bucket = || Arc::new(Bucket { bytes_per_second, paid_until: Mutex::new(Instant::now()) });
        let (up_bucket, down_bucket) = (bucket(), bucket());
        let (up, dead, cut_at, open) =
            (line.up.clone(), line.dead.clone(), line.cut_at.clone(), line.open.clone());
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let Ok(near) = near else { return };
                let (up, dead, cut_at, open) = (up.clone(), dead.clone(), cut_at.clone(), open.clone());
                let (up_bucket, down_bucket, to) = (up_bucket.clone(), down_bucket.clone(), to.clone());
                std::thread::spawn(move || {
                    // The handshake of TCP takes a round trip, too.
                    std::thread::sleep(delay * 2);
                    let Ok(far) = TcpStream::connect(&to) else { return };
                    let _ = (near.set_nodelay(true), far.set_nodelay(true));
                    open.lock().unwrap().extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                    let (near_out, far_out) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                    let down = Arc::new(AtomicU64::new(0));
                    let never = Arc::new(AtomicU64::new(u64::MAX));
                    pass(near, far_out, delay, up_bucket, (up, cut_at), dead.clone());
                    pass(far, near_out, delay, down_bucket, (down, never), dead);
                });
            }
        });
        line
    }

    /// From that many further bytes up on, the line swallows everything.
    pub fn cut_after(&self, bytes: u64) {
        self.cut_at.store(self.up.load(Ordering::SeqCst) + bytes, Ordering::SeqCst);
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// The line is there again; what was connected over it is gone for good.
    pub fn mend(&self) {
        self.cut_at.store(u64::MAX, Ordering::SeqCst);
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.dead.store(false, Ordering::SeqCst);
    }
}

fn pass(
    mut from: TcpStream,
    mut to: TcpStream,
    delay: Duration,
    bucket: Arc<Bucket>,
    (passed, cut_at): (Arc<AtomicU64>, Arc<AtomicU64>),
    dead: Arc<AtomicBool>,
) {
    let (queue, arriving) = sync_channel::<(Instant, Vec<u8>)>(ON_THE_WAY);
    let dead_too = dead.clone();
    std::thread::spawn(move || {
        for (at, bytes) in arriving {
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            if !dead_too.load(Ordering::SeqCst) && to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            bucket.wait(count);
            let before = passed.fetch_add(count as u64, Ordering::SeqCst);
            let due = cut_at.load(Ordering::SeqCst);
            let mut kept = count;
            if before + count as u64 > due {
                // In the middle of whatever this is.
                kept = due.saturating_sub(before) as usize;
                if kept > 0 {
                    let _ = queue.send((Instant::now() + delay, buffer[..kept].to_vec()));
                    std::thread::sleep(delay + Duration::from_millis(5));
                }
                dead.store(true, Ordering::SeqCst);
                continue;
            }
            if !dead.load(Ordering::SeqCst)
                && queue.send((Instant::now() + delay, buffer[..kept].to_vec())).is_err()
            {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
    });
}
