//! The whole path on real engines: master, agents, overlay, compose. Each test has a lab and a cluster of its own.
//!
//! What is expected is what a user sees: `skein` prints it, containers reach each other, a message says what is wrong.

mod bad_input;
mod durability;
mod faults;
mod history;
mod kills;
mod net;
mod path;
mod published;
mod recovery;
mod relayed;
mod scheduling;
mod served;
mod small_disk;
mod support;
mod watched;
mod workloads;

use anyhow::Result;
use xtask::{
    cluster::{Cluster, NodeOptions},
    lab::{Lab, LabSpec},
};

/// A lab of that many hosts, with images.
fn lab(name: &str, hosts: usize, images: &[&str]) -> Result<Lab> {
    let lab = Lab::up(LabSpec::new(format!("{name}{}", std::process::id()), hosts))?;
    for image in images {
        lab.image(image)?;
    }
    Ok(lab)
}

/// A cluster whose hosts carry the label `host` with their name.
fn cluster(lab: &Lab) -> Result<Cluster<'_>> {
    Cluster::up(lab, |host| NodeOptions::label("host", host))
}
