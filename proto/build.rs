//! Compiles agent.proto with protox, so that building needs no protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=agent.proto");
    let descriptors = protox::compile(["agent.proto"], ["."])?;
    prost_build::Config::new()
        // Payloads are slices of the receive buffer, not copies of it.
        .bytes(["."])
        .compile_fds(descriptors)?;
    Ok(())
}
