//! VHDX of hostile bytes: opened, walked, read, and written on.
#![no_main]

use disk_image::vhdx::{Reader, Writer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some(input) = stillpoint_fuzz::input(data) else { return };
    if input.options & 0x80 == 0 {
        stillpoint_fuzz::seal_vhdx(&input.file);
    }
    let parents = stillpoint_fuzz::parents(&input);
    if let Ok(reader) = Reader::open(input.file.clone(), parents.as_ref()) {
        stillpoint_fuzz::walk(&reader);
    }
    if input.options & 2 != 0
        && let Ok(writer) = Writer::open(input.file.copy(), parents.as_ref())
    {
        stillpoint_fuzz::write_on(&writer);
    }
});
