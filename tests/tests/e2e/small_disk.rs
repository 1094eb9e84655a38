//! A master whose disk is full, and one whose disk gives errors: it turns read-only, says so, loses nothing, and goes on.
//! A full disk is one to the change that needs more room; the store opens again, and what fits into it is taken.
//!
//! The disk is a real one to the kernel: a loop device of 24 MiB with a file system without a journal, mounted where the
//! master has its store. Errors come from the block layer: the device is shrunk under the file system, so that reads and
//! writes behind its end fail with EIO. What the page cache has of failed writes must not be taken for durable; at the end
//! the file system is mounted anew, and only what is on the device is left.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use xtask::{
    cluster::{Cluster, PATIENCE},
    lab::{Host, Lab, run, wait_for},
};

use super::{
    history::{self, History},
    lab,
    support::{Checks, add_node, skein},
};

/// Size of the disk.
const DISK_BYTES: &str = "24M";

/// What is left of a failing disk: the file system's superblock.
const LEFT_BYTES: &str = "64K";

/// Bytes of the specification of one service: a few of them need more room than a store has free pages.
const LARGE_BYTES: usize = 60_000;

/// Services that do not fit on the disk.
const LARGE_MAX: usize = 500;

struct SmallDisk {
    host: Host,
    image: PathBuf,
    /// Where it is mounted, in the host.
    dir: PathBuf,
    device: String,
}

impl SmallDisk {
    fn make(host: &Host) -> Result<Self> {
        let (image, dir) = (host.dir().join("disk.img"), host.dir().join("skein-master"));
        run(Command::new("truncate").args(["-s", DISK_BYTES]).arg(&image))?;
        run(Command::new("mkfs.ext2").args(["-q", "-F"]).arg(&image))?;
        std::fs::create_dir_all(&dir)?;
        let mut disk = Self { host: host.clone(), image, dir, device: String::new() };
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&mut self) -> Result<()> {
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(&self.image))?;
        self.device = device.trim().to_owned();
        let mounted = self.host.run(&[Path::new("mount"), Path::new(&self.device), &self.dir]);
        // Detached when nobody has it any more, however this ends.
        run(Command::new("losetup").args(["--detach", &self.device]))?;
        mounted.map(drop)
    }

    fn unmount(&self) -> Result<()> {
        self.host.run(&[Path::new("umount"), &self.dir]).map(drop)
    }

    fn ballast(&self) -> PathBuf {
        self.dir.join("ballast")
    }

    /// Leaves no block free.
    fn fill(&self) -> Result<()> {
        let fill = format!("cat /dev/zero > {} 2>/dev/null; test -s {0}", self.ballast().display());
        self.host.run(&["sh", "-c", &fill]).map(drop)
    }

    fn free(&self) -> Result<()> {
        self.host.run(&[Path::new("rm"), &self.ballast()]).map(drop)
    }

    fn saved(&self) -> PathBuf {
        self.image.with_extension("saved")
    }

    /// Whatever is read or written from now on behind the first bytes fails. What was written is on the disk.
    fn break_down(&self) -> Result<()> {
        self.host.run(&[Path::new("sync"), Path::new("-f"), &self.dir])?;
        run(Command::new("cp").arg("--sparse=always").arg(&self.image).arg(self.saved()))?;
        run(Command::new("truncate").args(["-s", LEFT_BYTES]).arg(&self.image))?;
        self.resize()
    }

    /// The device is what it was.
    fn repair(&self) -> Result<()> {
        let mut copy = Command::new("dd");
        copy.arg(format!("if={}", self.saved().display())).arg(format!("of={}", self.image.display()));
        run(copy.args(["bs=64K", "skip=1", "seek=1", "conv=notrunc,sparse", "status=none"]))?;
        run(Command::new("truncate").args(["-s", DISK_BYTES]).arg(&self.image))?;
        self.resize()
    }

    fn resize(&self) -> Result<()> {
        run(Command::new("losetup").args(["--set-capacity", &self.device])).map(drop)
    }
}

struct Test<'a> {
    cluster: &'a Cluster<'a>,
    disk: SmallDisk,
    history: History,
    checks: Checks,
}

impl Test<'_> {
    /// Does this while the master does nothing, as if it came at one moment.
    fn at_once(&self, work: impl FnOnce(&SmallDisk) -> Result<()>) -> Result<()> {
        let master = self.cluster.process("master", "skein-master")?;
        master.signal(Signal::SIGSTOP)?;
        let done = work(&self.disk);
        master.signal(Signal::SIGCONT)?;
        done
    }

    /// What the master knows can be read, and its log says what happened.
    fn is_of_use(&mut self, name: &str, why: &str) -> Result<()> {
        let listed = skein(self.cluster, &["network", "ls"])?;
        self.checks.fine(&format!("{name}: reading"), &listed);
        let log = self.cluster.process("master", "skein-master")?.log()?;
        self.checks.words(&format!("{name}: log"), &log, &["read-only", why]);
        Ok(())
    }

    /// The master says that it is read-only, and why, wherever one looks.
    fn says_so(&mut self, name: &str, why: &str) -> Result<()> {
        let said = skein(self.cluster, &["network", "create", "refused"])?;
        self.checks.refused(&format!("{name}: changes"), &said, 1, &[why, "skein info"]);
        let info = self.cluster.skein(&["info"])?;
        self.checks.words(&format!("{name}: info"), &info, &["read-only: ", why]);
        self.is_of_use(name, why)
    }

    /// By itself the master goes on, with everything that was acknowledged.
    fn goes_on(&mut self, name: &str) -> Result<()> {
        wait_for(&format!("{name}: the master to take changes again"), PATIENCE, || {
            let info = self.cluster.skein(&["info"])?;
            Ok((!info.contains("read-only")).then_some(()))
        })?;
        self.history.verify().with_context(|| name.to_owned())?;
        self.history.start();
        self.history.wait_for(50)?;
        self.history.settle()?;
        self.history.verify().with_context(|| format!("{name}: later"))
    }

    fn full(&mut self) -> Result<()> {
        self.history.start();
        self.history.wait_for(20)?;
        self.disk.fill()?;
        for number in 0.. {
            let text = "x".repeat(LARGE_BYTES);
            let file =
                format!("services: {{large: {{image: i, environment: {{TEXT: {text}}}, deploy: {{replicas: 0}}}}}}");
            let stack = format!("large{number}");
            let file = self.cluster.compose_file(&stack, &file)?.display().to_string();
            let said = skein(self.cluster, &["up", "-f", &file, "-p", &stack, "--yes"])?;
            if said.code != 0 {
                self.checks.refused("full: a large change", &said, 1, &["the disk is full", "skein info"]);
                break;
            }
            anyhow::ensure!(number < LARGE_MAX, "the disk does not fill");
        }
        self.history.settle()?;
        // Small changes may still fit into the store's free pages: then it is open again already, and takes them.
        let small = skein(self.cluster, &["network", "create", "small"])?;
        if small.code != 0 {
            self.checks.refused("full: a small change", &small, 1, &["the disk is full", "skein info"]);
        }
        self.is_of_use("full", "the disk is full")?;
        self.disk.free()?;
        self.goes_on("full")?;
        let kept = skein(self.cluster, &["network", "inspect", "small"])?;
        let as_told = small.code != 0 || kept.code == 0;
        self.checks.ensure("full: a small change that was taken is there", as_told, format_args!("{kept:?}"));
        Ok(())
    }

    fn errors(&mut self) -> Result<()> {
        self.history.start();
        self.history.wait_for(20)?;
        self.at_once(SmallDisk::break_down)?;
        // They stop when the first is refused.
        self.history.wait_for_end()?;
        self.history.settle()?;
        self.says_so("errors", "Input/output error")?;
        self.at_once(SmallDisk::repair)?;
        self.goes_on("errors")
    }

    /// Nothing but what is on the device.
    fn mounted_anew(&mut self) -> Result<()> {
        self.history.start();
        self.history.wait_for(20)?;
        self.cluster.process("master", "skein-master")?.kill()?;
        self.history.settle()?;
        self.disk.unmount()?;
        self.disk.mount()?;
        self.cluster.start_master()?;
        self.goes_on("mounted anew")
    }
}

fn all(lab: &Lab, seed: u64) -> Result<()> {
    let cluster = Cluster::of(lab);
    let disk = SmallDisk::make(cluster.master())?;
    cluster.start_master()?;
    add_node(&cluster, "n1")?;
    let history = History::new(cluster.socket(), "n1", false, seed)?;
    let mut test = Test { cluster: &cluster, disk, history, checks: Checks::default() };
    test.full()?;
    test.errors()?;
    test.mounted_anew()?;
    test.checks.finish()
}

#[test]
fn full_and_failing_disks_are_told_and_survived() -> Result<()> {
    let seed = history::seed()?;
    let lab = lab("disk", 0, &[])?;
    all(&lab, seed).with_context(|| lab.logs(40)).with_context(|| format!("seed {seed}"))
}
