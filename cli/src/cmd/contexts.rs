//! `skein context …`: works on files alone, asks no master.

use serde::Serialize;

use crate::{
    args::ContextCommand,
    context::{Choice, Context, Store, parse_address, read},
    fail::{Failure, code},
    out::Out,
};

/// A context without its key.
#[derive(Serialize)]
struct Shown {
    name: String,
    current: bool,
    host: String,
    server_name: Option<String>,
    certificates: bool,
}

fn shown(store: &Store, name: &str) -> Result<Shown, Failure> {
    let context = store.get(name)?;
    Ok(Shown {
        name: name.to_owned(),
        current: store.current() == name,
        host: context.host,
        server_name: context.server_name,
        certificates: !context.key_pem.is_empty(),
    })
}

/// Runs one of the commands. `choice.host` is the address of a new context.
pub(crate) fn run(command: ContextCommand, store: &Store, choice: &Choice, out: Out) -> Result<(), Failure> {
    match command {
        ContextCommand::Create { certs, ca, cert, key, server_name, force, name } => {
            let Some(host) = choice.host.clone() else {
                let hint =
                    format!("skein context create --host tcp://HOST:{} --certs DIR {name}", skein_api::DEFAULT_PORT);
                return Err(Failure::new(code::USAGE, "a context needs the address of its master", Some(&hint)));
            };
            parse_address(&host)?;
            let mut context = Context { host, server_name, ..Default::default() };
            if let Some(dir) = certs.as_ref().or(choice.tls_dir.as_ref()) {
                context = context.with_certs(dir)?;
            }
            let pem = |path: Option<std::path::PathBuf>, old: String| path.map_or(Ok(old), |p| read(&p));
            context.ca_pem = pem(ca, context.ca_pem)?;
            context.certificate_pem = pem(cert, context.certificate_pem)?;
            context.key_pem = pem(key, context.key_pem)?;
            // Certificates that cannot be used are better found now than at the first command.
            context.client()?;
            store.create(&name, &context, force)?;
            out.note(&format!("context {name} is kept; `skein context use {name}` makes it the current one"));
            Ok(())
        }
        ContextCommand::Ls => {
            let mut all = Vec::new();
            for name in store.names() {
                match shown(store, &name) {
                    Ok(context) => all.push(context),
                    // One bad file does not hide the others.
                    Err(failure) => out.note(&failure.text),
                }
            }
            out.list(&all, &["NAME", "CURRENT", "HOST", "CERTIFICATES"], |c| {
                let mark = |b| if b { "yes" } else { "" }.to_owned();
                vec![c.name.clone(), mark(c.current), c.host.clone(), mark(c.certificates)]
            })
        }
        ContextCommand::Use { name } => {
            store.select(&name)?;
            out.note(&format!("the current context is {name} now"));
            Ok(())
        }
        ContextCommand::Rm { name } => store.remove(&name),
        ContextCommand::Show { name } => {
            let context = shown(store, &name.unwrap_or_else(|| store.current()))?;
            if out.json {
                return out.value(&context);
            }
            out.line(&format!("name: {}\nhost: {}", context.name, context.host))?;
            if let Some(name) = &context.server_name {
                out.line(&format!("server name: {name}"))?;
            }
            out.line(&format!("certificates: {}", if context.certificates { "yes" } else { "none" }))
        }
    }
}
