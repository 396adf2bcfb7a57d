//! Compressed clusters. Output is never more than a cluster, whatever the input says; decompression stops there, as the
//! specification asks.

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};
use zstd::zstd_safe::DParameter;

use super::Compression;

/// Largest zstd window, as a power of two: 8 MiB. A cluster has 2 MiB at most and no encoder needs a larger window for
/// that; a hostile frame may ask for gigabytes.
const MAX_WINDOW_LOG: u32 = 23;

/// The `size` bytes that `input` decompresses to. Bytes of `input` past the end of the stream are ignored: the length
/// in the descriptor is counted in sectors.
pub(super) fn decompress(kind: Compression, input: &[u8], size: usize) -> Result<Vec<u8>, String> {
    let mut output = vec![0u8; size];
    let done = match kind {
        Compression::Deflate => inflate(input, &mut output)?,
        Compression::Zstd => unzstd(input, &mut output)?,
    };
    if done != size {
        return Err(format!("it decompresses to {done} bytes, a cluster has {size}"));
    }
    Ok(output)
}

fn inflate(input: &[u8], output: &mut [u8]) -> Result<usize, String> {
    let mut stream = Decompress::new(false);
    loop {
        let (taken, given) = (stream.total_in(), stream.total_out());
        let rest_in = input.get(taken as usize..).unwrap_or_default();
        let rest_out = output.get_mut(given as usize..).unwrap_or_default();
        if rest_out.is_empty() {
            return Ok(given as usize);
        }
        let status = stream
            .decompress(rest_in, rest_out, FlushDecompress::None)
            .map_err(|error| format!("deflate: {error}"))?;
        let stuck = stream.total_in() == taken && stream.total_out() == given;
        if status == Status::StreamEnd || stuck {
            return Ok(stream.total_out() as usize);
        }
    }
}

fn unzstd(input: &[u8], output: &mut [u8]) -> Result<usize, String> {
    let say = |error: std::io::Error| format!("zstd: {error}");
    let mut decoder = Decoder::new().map_err(say)?;
    decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG)).map_err(say)?;
    let size = output.len();
    let mut input = InBuffer::around(input);
    let mut output = OutBuffer::around(output);
    while output.pos() < size {
        let before = (input.pos(), output.pos());
        let hint = decoder.run(&mut input, &mut output).map_err(say)?;
        if hint == 0 || before == (input.pos(), output.pos()) {
            break;
        }
    }
    Ok(output.pos())
}
