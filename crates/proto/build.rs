//! Generates the messages, and with the feature `grpc` the stubs. No `protoc` is needed: protox is one in Rust.
use prost::Message as _;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = [
        "envoy/discovery.proto",
        "istio/workload.proto",
        "istio/security.proto",
        "istio/ca.proto",
        "tombolo/v1.proto",
        "tombolo/admin.proto",
        "tombolo/agent.proto",
        "tombolo/federation.proto",
    ];
    let set = protox::compile(files, ["proto"])?;
    std::fs::write(
        PathBuf::from(std::env::var("OUT_DIR")?).join("descriptors.bin"),
        set.encode_to_vec(),
    )?;
    let grpc = std::env::var_os("CARGO_FEATURE_GRPC").is_some();
    let mut config = tonic_prost_build::Config::new();
    config
        .enable_type_names()
        .type_name_domain(["."], "type.googleapis.com");
    // Encoded bytes are hashed into resource versions: the order of this map must not be random.
    config.btree_map([".istio.workload.Workload.services"]);
    tonic_prost_build::configure()
        .build_client(grpc)
        .build_server(grpc)
        .compile_fds_with_config(set, config)?;
    Ok(())
}
