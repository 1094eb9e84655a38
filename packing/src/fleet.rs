//! Hosts, and what is set aside on them.

use crate::trace::Size;

/// Kinds of hosts, each as often as the others and in turn: cores and GiB.
pub type Kinds = [(u64, u64)];

/// What each host offers.
pub fn fleet(kinds: &Kinds, hosts: usize) -> Vec<Size> {
    kinds.iter().cycle().take(hosts).map(|&(cores, gib)| Size { cores, mem_mib: gib << 10 }).collect()
}

/// What is set aside on each host of a fleet.
#[derive(Clone, Debug)]
pub struct Loads {
    /// `[hosts]`: what it offers.
    pub offered: Vec<Size>,
    /// `[hosts]`: what is set aside.
    pub used: Vec<Size>,
    /// `[hosts]`: how many tasks.
    pub tasks: Vec<u32>,
}

impl Loads {
    /// A fleet on which nothing runs.
    pub fn new(offered: Vec<Size>) -> Self {
        let hosts = offered.len();
        Self { offered, used: vec![Size { cores: 0, mem_mib: 0 }; hosts], tasks: vec![0; hosts] }
    }

    /// Whether one more fits.
    pub fn fits(&self, host: usize, size: Size) -> bool {
        let (used, offered) = (self.used[host], self.offered[host]);
        used.cores + size.cores <= offered.cores && used.mem_mib + size.mem_mib <= offered.mem_mib
    }

    /// Sets aside.
    ///
    /// # Panics
    /// It does not fit.
    pub fn add(&mut self, host: usize, size: Size) {
        assert!(self.fits(host, size), "{size:?} is more than host {host} has left");
        self.used[host].cores += size.cores;
        self.used[host].mem_mib += size.mem_mib;
        self.tasks[host] += 1;
    }

    /// Gives back what was set aside.
    pub fn remove(&mut self, host: usize, size: Size) {
        self.used[host].cores -= size.cores;
        self.used[host].mem_mib -= size.mem_mib;
        self.tasks[host] -= 1;
    }

    /// Shares of CPU and memory of a host that would be set aside with one more.
    pub fn shares_with(&self, host: usize, size: Size) -> (f64, f64) {
        let (used, offered) = (self.used[host], self.offered[host]);
        let share = |used: u64, offered: u64| used as f64 / offered as f64;
        (share(used.cores + size.cores, offered.cores), share(used.mem_mib + size.mem_mib, offered.mem_mib))
    }

    /// Percent of all CPU and of all memory that is set aside.
    pub fn allocated(&self) -> (f64, f64) {
        let percent = |of: fn(&Size) -> u64| {
            let sum = |sizes: &[Size]| sizes.iter().map(of).sum::<u64>() as f64;
            100.0 * sum(&self.used) / sum(&self.offered)
        };
        (percent(|size| size.cores), percent(|size| size.mem_mib))
    }

    /// Hosts without a task.
    pub fn empty(&self) -> usize {
        self.tasks.iter().filter(|tasks| **tasks == 0).count()
    }

    /// How many tasks of a size still fit, on all hosts together.
    pub fn slots(&self, size: Size) -> u64 {
        let on = |(offered, used): (&Size, &Size)| {
            ((offered.cores - used.cores) / size.cores).min((offered.mem_mib - used.mem_mib) / size.mem_mib)
        };
        self.offered.iter().zip(&self.used).map(on).sum()
    }

    /// Standard deviation over hosts of the larger share, in percent of a host.
    pub fn imbalance(&self) -> f64 {
        let nothing = Size { cores: 0, mem_mib: 0 };
        let larger = |host| {
            let (cpu, memory) = self.shares_with(host, nothing);
            100.0 * cpu.max(memory)
        };
        let shares: Vec<f64> = (0..self.offered.len()).map(larger).collect();
        let mean = shares.iter().sum::<f64>() / shares.len() as f64;
        (shares.iter().map(|share| (share - mean).powi(2)).sum::<f64>() / shares.len() as f64).sqrt()
    }
}
