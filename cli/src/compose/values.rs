//! The small languages inside values: durations, sizes, CPUs, ports, mounts, shell words, names.
//!
//! Pure: text in, value or "expected …, found …" out. Must not know positions or keys.

use std::net::IpAddr;

use skein_api::{PortPublish, Protocol};

/// Milliseconds of a duration such as `1m30s`, `1.5h`, `500ms` (Compose specification, "Specifying durations").
///
/// # Errors
/// What was expected.
pub fn duration_ms(text: &str) -> Result<u64, String> {
    let bad = || format!("expected a duration such as 1m30s, found {text:?}");
    if text == "0" {
        return Ok(0);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
        let number: f64 = rest[..digits].parse().map_err(|_| bad())?;
        let unit = rest[digits..].find(|c: char| c.is_ascii_digit() || c == '.').map_or(rest.len(), |n| digits + n);
        let ms = match &rest[digits..unit] {
            "ns" => 1e-6,
            "us" | "µs" => 1e-3,
            "ms" => 1.0,
            "s" => 1e3,
            "m" => 60e3,
            "h" => 3_600e3,
            "d" => 86_400e3,
            _ => return Err(bad()),
        };
        total += number * ms;
        rest = &rest[unit..];
    }
    if text.is_empty() || total > u64::MAX as f64 {
        return Err(bad());
    }
    // A duration that is not zero must not become zero, which means "none".
    Ok(if total > 0.0 { (total.round() as u64).max(1) } else { 0 })
}

/// Bytes of a size such as `64m`, `1.5g`, `1024`, `2gb`, `1KiB`: powers of 1024 (Compose specification, "Specifying
/// byte values").
///
/// # Errors
/// What was expected.
pub fn size_bytes(text: &str) -> Result<u64, String> {
    let bad = || format!("expected a size such as 64m or 1.5g, found {text:?}");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().map_err(|_| bad())?;
    let factor: u64 = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        "p" | "pb" | "pib" => 1 << 50,
        _ => return Err(bad()),
    };
    let bytes = number * factor as f64;
    // 2^63: what the engine's signed field can hold.
    if bytes >= 9.2e18 {
        return Err(format!("the size {text:?} is too large"));
    }
    Ok(bytes as u64)
}

/// Billionths of a CPU of a number such as `0.5`.
///
/// # Errors
/// What was expected.
pub fn nano_cpus(text: &str) -> Result<u64, String> {
    let bad = || format!("expected a number of CPUs such as 0.5, found {text:?}");
    let number: f64 = text.parse().map_err(|_| bad())?;
    if !(0.0..=1e6).contains(&number) {
        return Err(bad());
    }
    Ok((number * 1e9).round() as u64)
}

/// Splits a command line into words as a shell does: white space, `'…'`, `"…"`, `\`. No variables, no patterns, no
/// comments.
///
/// # Errors
/// A quote is not closed, or the line ends with a backslash.
pub fn shell_words(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    let open = |quote: char| format!("the quote {quote} in {line:?} is not closed");
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\n' | '\r' => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next().ok_or_else(|| open('\''))? {
                        '\'' => break,
                        c => word.push(c),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next().ok_or_else(|| open('"'))? {
                        '"' => break,
                        // POSIX shell, 2.2.3: within double quotes a backslash escapes these only.
                        '\\' => match chars.next().ok_or_else(|| open('"'))? {
                            '\n' => {}
                            c @ ('"' | '\\' | '$' | '`') => word.push(c),
                            c => word.extend(['\\', c]),
                        },
                        c => word.push(c),
                    }
                }
            }
            '\\' => match chars.next() {
                Some('\n') => {}
                Some(c) => word.get_or_insert_default().push(c),
                None => return Err(format!("{line:?} ends with a backslash")),
            },
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

/// First and last port of `80` or `8000-8003`.
fn port_range(text: &str) -> Result<(u16, u16), String> {
    let one = |t: &str| t.parse::<u16>().ok().filter(|p| *p > 0 && !t.starts_with('+'));
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (one(first), one(last)) {
        (Some(first), Some(last)) if first <= last => Ok((first, last)),
        _ => Err(format!("expected a port of 1 to 65535 or a range of them, found {text:?}")),
    }
}

/// The transport protocol of a port.
///
/// # Errors
/// Anything but `tcp` and `udp`.
pub fn protocol(text: &str) -> Result<Protocol, String> {
    match text.to_ascii_lowercase().as_str() {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        _ => Err(format!("expected the protocol tcp or udp, found {text:?}")),
    }
}

/// Ports of the container, and those of the host if given: each pair of one length, or one container port.
///
/// # Errors
/// What was expected.
pub fn pair_ports(
    container: &str,
    host: Option<&str>,
    host_ip: Option<IpAddr>,
    protocol: Protocol,
) -> Result<Vec<PortPublish>, String> {
    let (first, last) = port_range(container)?;
    let host_first = match host.filter(|h| !h.is_empty() && *h != "0") {
        None => None,
        Some(host) => {
            let (host_first, host_last) = port_range(host)?;
            if host_last - host_first != last - first {
                return Err(format!(
                    "expected as many ports of the host as of the container, found {} ({host}) for {} ({container})",
                    host_last - host_first + 1,
                    last - first + 1
                ));
            }
            Some(host_first)
        }
    };
    let publish = |port: u16| PortPublish {
        protocol,
        container_port: port,
        host_port: host_first.map_or(0, |h| h + (port - first)),
        host_ip,
    };
    Ok((first..=last).map(publish).collect())
}

/// A port in the short form: `[[address:]host:]container[/protocol]`, ports or ranges, IPv6 addresses in brackets.
///
/// # Errors
/// What was expected.
pub fn ports_short(text: &str) -> Result<Vec<PortPublish>, String> {
    let (rest, proto) = match text.rsplit_once('/') {
        Some((rest, proto)) => (rest, protocol(proto)?),
        None => (text, Protocol::Tcp),
    };
    let (front, container) = rest.rsplit_once(':').map_or((None, rest), |(f, c)| (Some(f), c));
    let Some(front) = front else { return pair_ports(container, None, None, proto) };
    let bad_ip = |ip: &str| format!("expected an IP address before the host's port, found {ip:?}");
    let (ip, host) = match front.rsplit_once(':') {
        None => (None, front),
        Some((ip, host)) => {
            let bare = ip.strip_prefix('[').and_then(|i| i.strip_suffix(']')).unwrap_or(ip);
            (Some(bare.parse::<IpAddr>().map_err(|_| bad_ip(ip))?), host)
        }
    };
    pair_ports(container, Some(host), ip, proto)
}

/// The name of a stack made from any text: lower case, only letters, digits, `-` and `_`, starting with one of the
/// first two. May be empty.
pub fn normalise_name(text: &str) -> String {
    let lower = text.to_lowercase();
    let kept = lower.chars().filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-' || *c == '_');
    kept.skip_while(|c| *c == '-' || *c == '_').collect()
}

/// Checks the name of a service, network or volume: letters, digits, `.`, `-`, `_`, starting with one of the first two.
///
/// # Errors
/// What was expected.
pub fn check_name(what: &str, name: &str) -> Result<(), String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(fine) {
        return Ok(());
    }
    Err(format!(
        "{name:?} cannot be the name of a {what}: expected letters, digits, \".\", \"-\" and \"_\", a letter or digit first"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show<T: std::fmt::Debug>(result: Result<T, String>) -> String {
        match result {
            Ok(v) => format!("{v:?}"),
            Err(e) => e,
        }
    }

    #[test]
    fn durations() {
        let check = |text: &str, expected: &str| assert_eq!(show(duration_ms(text)), expected, "{text}");
        check("1m30s", "90000");
        check("10s", "10000");
        check("1.5h", "5400000");
        check("2d", "172800000");
        check("500ms", "500");
        check("1500us", "2");
        check("1ns", "1");
        check("0", "0");
        check("0s", "0");
        check("1h5m30s20ms", "3930020");
        for bad in ["", "5", "s", "1x", "1 s", "-1s", "1.2.3s", "1s5", "1e400s"] {
            check(bad, &format!("expected a duration such as 1m30s, found {bad:?}"));
        }
    }

    #[test]
    fn sizes() {
        let check = |text: &str, expected: &str| assert_eq!(show(size_bytes(text)), expected, "{text}");
        check("64m", "67108864");
        check("1.5g", "1610612736");
        check("1024", "1024");
        check("100b", "100");
        check("2Gb", "2147483648");
        check("1KiB", "1024");
        check("1 kb", "1024");
        check("0", "0");
        check("9999999t", "the size \"9999999t\" is too large");
        for bad in ["", "m", "-1", "1x", "1.2.3m", "64 m b"] {
            check(bad, &format!("expected a size such as 64m or 1.5g, found {bad:?}"));
        }
    }

    #[test]
    fn cpus() {
        let check = |text: &str, expected: &str| assert_eq!(show(nano_cpus(text)), expected, "{text}");
        check("0.5", "500000000");
        check("2", "2000000000");
        check("0.001", "1000000");
        for bad in ["", "-1", "half", "NaN", "inf"] {
            check(bad, &format!("expected a number of CPUs such as 0.5, found {bad:?}"));
        }
    }

    #[test]
    fn words() {
        let check = |line: &str, expected: &str| assert_eq!(show(shell_words(line)), expected, "{line}");
        check("", "[]");
        check("  a  b\tc\n", r#"["a", "b", "c"]"#);
        check("sh -c 'echo $X; # x'", r#"["sh", "-c", "echo $X; # x"]"#);
        check("a\"b c\"d ''", r#"["ab cd", ""]"#);
        check(r#""a\"b\n\\" c\ d"#, r#"["a\"b\\n\\", "c d"]"#);
        check("echo #no comment", r##"["echo", "#no", "comment"]"##);
        check("a 'b", "the quote ' in \"a 'b\" is not closed");
        check("a \"b", "the quote \" in \"a \\\"b\" is not closed");
        check("a \\", "\"a \\\\\" ends with a backslash");
    }

    #[test]
    fn ports() {
        let check = |text: &str, expected: &str| {
            let got = ports_short(text).map(|ports| {
                let show = |p: &PortPublish| {
                    let ip = p.host_ip.map(|ip| format!("{ip} ")).unwrap_or_default();
                    let udp = if p.protocol == Protocol::Udp { "/udp" } else { "" };
                    format!("{ip}{}>{}{udp}", p.host_port, p.container_port)
                };
                ports.iter().map(show).collect::<Vec<_>>().join(", ")
            });
            assert_eq!(got.unwrap_or_else(|e| e), expected, "{text}");
        };
        check("80", "0>80");
        check("8080:80", "8080>80");
        check("22:22", "22>22");
        check("53:53/udp", "53>53/udp");
        check("53:53/UDP", "53>53/udp");
        check("3000-3002", "0>3000, 0>3001, 0>3002");
        check("8000-8002:80-82", "8000>80, 8001>81, 8002>82");
        check("127.0.0.1:8080:80", "127.0.0.1 8080>80");
        check("127.0.0.1::80", "127.0.0.1 0>80");
        check("[::1]:8080:80/tcp", "::1 8080>80");
        check("::1:8080:80", "::1 8080>80");
        check("0:80", "0>80");
        check("8000-8001:80", "expected as many ports of the host as of the container, found 2 (8000-8001) for 1 (80)");
        check("x", "expected a port of 1 to 65535 or a range of them, found \"x\"");
        check("0", "expected a port of 1 to 65535 or a range of them, found \"0\"");
        check("65536:80", "expected a port of 1 to 65535 or a range of them, found \"65536\"");
        check("90-80", "expected a port of 1 to 65535 or a range of them, found \"90-80\"");
        check("80/sctp", "expected the protocol tcp or udp, found \"sctp\"");
        check("localhost:80:80", "expected an IP address before the host's port, found \"localhost\"");
        check("", "expected a port of 1 to 65535 or a range of them, found \"\"");
    }

    #[test]
    fn names() {
        let check = |text: &str, expected: &str| assert_eq!(normalise_name(text), expected);
        check("My App.v2", "myappv2");
        check("_-x_y-Z", "x_y-z");
        check("…", "");
        assert_eq!(show(check_name("service", "web-1.a_B")), "()");
        assert_eq!(
            show(check_name("service", "a b")),
            "\"a b\" cannot be the name of a service: expected letters, digits, \".\", \"-\" and \"_\", a letter or digit first"
        );
        assert!(check_name("volume", "-x").is_err() && check_name("volume", "").is_err());
    }
}
