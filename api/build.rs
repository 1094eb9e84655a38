//! Generates the agent protocol from `proto/agent.proto` without a protoc binary (protox parses it).

fn main() {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    #[cfg(feature = "grpc")]
    {
        let descriptors =
            protox::compile(["proto/agent.proto"], ["proto"]).expect("proto/agent.proto is valid protobuf");
        tonic_prost_build::configure()
            .codec_path("crate::codec::Codec")
            .emit_package(true)
            .compile_fds(descriptors)
            .expect("code generation writes to OUT_DIR");
    }
}
