//! Where to listen, as it may be typed.

use std::fmt;
use std::str::FromStr;

/// An address, or a name that has one, and a port. Without an address, all that the machine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// Empty for all; an IPv6 address stands here without its brackets.
    pub host: String,
    pub port: u16,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Listen, String> {
        let (host, port) = text.rsplit_once(':').ok_or_else(expected)?;
        let port = port.parse().map_err(|_| expected())?;
        let bracketed = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = bracketed.unwrap_or(host);
        let odd = |c: char| c.is_whitespace() || matches!(c, '/' | '[' | ']' | '@');
        if host.contains(odd) || bracketed.is_none() && host.contains(':') {
            return Err(expected());
        }
        Ok(Listen {
            host: host.to_owned(),
            port,
        })
    }
}

fn expected() -> String {
    "expected ADDRESS:PORT, such as 127.0.0.1:9464 or [::1]:9464; :9464 is every address of the \
     machine"
        .to_owned()
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_port_and_an_ipv6_address_brackets() {
        for (text, host) in [
            ("127.0.0.1:9464", "127.0.0.1"),
            ("[::1]:9464", "::1"),
            (":9464", ""),
            ("localhost:9464", "localhost"),
        ] {
            let listen: Listen = text.parse().unwrap();
            assert_eq!((listen.host.as_str(), listen.port), (host, 9464), "{text}");
            assert_eq!(listen.to_string(), text);
        }
        for text in [
            "",
            "9464",
            "localhost",
            "localhost:",
            "localhost:65536",
            "localhost:-1",
            "::1:9464",
            "http://localhost:9464",
            "localhost:9464/metrics",
            "user@localhost:9464",
        ] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
    }
}
