//! The binary `skein`; everything is in the library beside it.

fn main() -> std::process::ExitCode {
    skein_cli::main()
}
