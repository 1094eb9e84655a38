//! Arrivals of tasks with their sizes and durations.

use anyhow::{Context as _, Result, ensure};

/// What a task sets aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size {
    /// Cores.
    pub cores: u64,
    /// Memory, MiB.
    pub mem_mib: u64,
}

/// One task.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// When it comes, seconds from the start of the trace.
    pub at_s: u64,
    /// What it sets aside.
    pub size: Size,
    /// How long it stays, seconds; none: until after the end.
    pub stays_s: Option<u64>,
    /// What its tenant asked for at once has one number.
    pub batch: u64,
}

/// What is asked for in one go: neighbours of one batch that come at one instant and are of one size.
pub fn batches(arrivals: &[Arrival]) -> impl Iterator<Item = &[Arrival]> {
    arrivals.chunk_by(|a, b| (a.at_s, a.batch, a.size) == (b.at_s, b.batch, b.size))
}

/// Reads `arrival_s,cpu_cores,mem_gib,duration_s,batch_id`, a line for each arrival in the order of time, below a line of
/// names. A negative duration is one without an end.
///
/// # Errors
/// A line that is not of this form, with its number.
pub fn parse(text: &str) -> Result<Vec<Arrival>> {
    let lines = text.lines().enumerate().skip(1);
    let arrivals: Vec<Arrival> =
        lines.map(|(at, line)| arrival(line).with_context(|| format!("line {}", at + 1))).collect::<Result<_>>()?;
    ensure!(arrivals.is_sorted_by_key(|arrival| arrival.at_s), "arrivals are not in the order of time");
    Ok(arrivals)
}

fn arrival(line: &str) -> Result<Arrival> {
    let mut fields = line.split(',');
    let mut field = |name| fields.next().with_context(|| format!("{name} is missing"));
    let at_s = field("arrival_s")?.parse().context("arrival_s is no number")?;
    let cores = field("cpu_cores")?.parse().context("cpu_cores is no number")?;
    let mem_mib = mebibytes(field("mem_gib")?).context("mem_gib is no number of MiB")?;
    let stays: i64 = field("duration_s")?.parse().context("duration_s is no number")?;
    let batch = field("batch_id")?.parse().context("batch_id is no number")?;
    Ok(Arrival { at_s, size: Size { cores, mem_mib }, stays_s: u64::try_from(stays).ok(), batch })
}

/// GiB with at most two decimal digits, quarters of them; exact.
fn mebibytes(gib: &str) -> Option<u64> {
    let (whole, part) = gib.split_once('.').unwrap_or((gib, "0"));
    let quarters = match part {
        "0" | "00" => 0,
        "25" => 1,
        "5" | "50" => 2,
        "75" => 3,
        _ => return None,
    };
    Some(whole.parse::<u64>().ok()?.checked_mul(1024)? + quarters * 256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_arrivals() {
        let arrivals =
            parse("arrival_s,cpu_cores,mem_gib,duration_s,batch_id\n0,8,1.75,1050,1\n300,1,112,-1,2\n").unwrap();
        assert_eq!((arrivals[0].size, arrivals[0].stays_s), (Size { cores: 8, mem_mib: 1792 }, Some(1050)));
        assert_eq!((arrivals[1].size.mem_mib, arrivals[1].stays_s), (112 << 10, None));
    }

    #[test]
    fn neighbours_of_one_batch_instant_and_size_are_one_request() {
        let lines = ["0,1,1,5,1", "0,1,1,9,1", "0,2,1,5,1", "0,1,1,5,1", "0,1,1,5,2", "300,1,1,5,2"];
        let arrivals = parse(&format!("names\n{}\n", lines.join("\n"))).unwrap();
        let counts: Vec<_> = batches(&arrivals).map(<[Arrival]>::len).collect();
        assert_eq!(counts, [2, 1, 1, 1, 1]);
    }

    #[test]
    fn a_bad_line_is_named() {
        let text = |line: &str| format!("names\n{line}\n");
        let error = |line: &str| format!("{:#}", parse(&text(line)).unwrap_err());
        assert_eq!(error("0,1,1.3,5,1"), "line 2: mem_gib is no number of MiB");
        assert_eq!(error("0,1"), "line 2: mem_gib is missing");
        assert_eq!(error("0,1,1,5"), "line 2: batch_id is missing");
        assert!(parse("names\n5,1,1,1,1\n4,1,1,1,1\n").is_err());
    }
}
