//! Generates the messages and services of `proto/stillpoint.proto`, without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/stillpoint.proto");
    let files = protox::compile(["stillpoint.proto"], ["proto"])?;
    // Every `bytes` field is a slice of the received buffer, not a copy of it.
    tonic_prost_build::configure().bytes(".").emit_rerun_if_changed(false).compile_fds(files)?;
    Ok(())
}
