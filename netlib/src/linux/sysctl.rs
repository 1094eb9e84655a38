//! Owns reading and writing sysctls. `/proc/sys/net` shows the namespace of the thread that looks, so these functions
//! run on a thread inside it. It knows no netlink. No tasks, no channels.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

const ROOT: &str = "/proc/sys";

/// Reads sysctls by path; one segment of each may be `*`. What cannot be read is left out: IPv6 may be switched off.
pub(super) fn read(patterns: &[String]) -> BTreeMap<String, String> {
    patterns
        .iter()
        .flat_map(|pattern| expand(pattern))
        .filter_map(|path| {
            let value = fs::read_to_string(Path::new(ROOT).join(&path)).ok()?;
            Some((path, value.trim().to_owned()))
        })
        .collect()
}

fn expand(pattern: &str) -> Vec<String> {
    let Some((head, tail)) = pattern.split_once('*') else {
        return vec![pattern.to_owned()];
    };
    let Ok(entries) = fs::read_dir(Path::new(ROOT).join(head)) else {
        return Vec::new();
    };
    entries.flatten().filter_map(|entry| Some(format!("{head}{}{tail}", entry.file_name().to_str()?))).collect()
}

/// Writes a sysctl.
pub(super) fn write(path: &str, value: &str) -> io::Result<()> {
    let file: PathBuf = Path::new(ROOT).join(path);
    // Not `fs::write`: creating makes no sense here, and a missing sysctl shall say so.
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).open(file)?;
    io::Write::write_all(&mut file, value.as_bytes())
}
