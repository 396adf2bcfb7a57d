//! Raw and probe: any name, any bytes. A guest's bytes must never decide the format.
#![no_main]

use disk_image::ImageFormat;
use disk_image::probe;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some(input) = stillpoint_fuzz::input(data) else { return };
    for name in ["disk", "disk.raw", "disk.img", "a.vhd.bak"] {
        let decision = probe::format_of(name, None, input.file.as_ref()).expect("a plain name");
        assert_eq!(decision.format, ImageFormat::Raw);
    }
    for name in ["disk.vhd", "disk.vhdx", "disk.qcow2", "disk.vmdk"] {
        let Ok(decision) = probe::format_of(name, None, input.file.as_ref()) else { continue };
        assert!(name.ends_with(decision.format.word()));
        if let Ok(opened) = probe::open(decision.format, input.file.clone(), &disk_image::NoParents) {
            assert_eq!(opened.disk.size(), opened.info.size);
            assert!(opened.info.parents.is_empty(), "no other file may be opened here");
        }
    }
    let raw = probe::open(ImageFormat::Raw, input.file.clone(), &disk_image::NoParents).expect("raw");
    stillpoint_fuzz::walk(raw.disk.as_ref());
});
