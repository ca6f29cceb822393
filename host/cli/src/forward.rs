//! One forwarded port, as it was typed.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use airlock_sandbox::client::Target;

/// `[ADDRESS:]HOST:GUEST`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Forward {
    pub(crate) listen: SocketAddr,
    pub(crate) target: Target,
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not [ADDRESS:]HOST:GUEST, with a port (0: any free one) for HOST and a port or a \
                 socket's absolute path for GUEST"
            )
        };
        let (address, rest) = address(text).unwrap_or_else(|| (Ipv4Addr::LOCALHOST.into(), text));
        let (host, guest) = rest.split_once(':').ok_or_else(wrong)?;
        let port: u16 = host.parse().map_err(|_| wrong())?;
        let target = if guest.starts_with('/') {
            Target::Unix(guest.to_owned().into())
        } else {
            let port: u16 = guest.parse().map_err(|_| wrong())?;
            if port == 0 {
                return Err(wrong());
            }
            Target::Tcp {
                host: "localhost".to_owned(),
                port,
            }
        };
        Ok(Self {
            listen: SocketAddr::new(address, port),
            target,
        })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Tcp { port, .. } => write!(f, "{port}"),
            Target::Unix(path) => f.write_str(&String::from_utf8_lossy(path)),
        }
    }
}

/// An address in front, if there is one: IPv6 in brackets.
fn address(text: &str) -> Option<(IpAddr, &str)> {
    let (address, rest) = match text.strip_prefix('[') {
        Some(text) => text.split_once("]:")?,
        None => text.split_once(':')?,
    };
    Some((address.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_bound_to_loopback_unless_an_address_is_given() {
        for (text, listen, shown) in [
            ("8080:80", "127.0.0.1:8080", "80"),
            ("0:1", "127.0.0.1:0", "1"),
            ("0.0.0.0:8080:80", "0.0.0.0:8080", "80"),
            ("[::1]:8080:80", "[::1]:8080", "80"),
            ("8080:/run/a:b", "127.0.0.1:8080", "/run/a:b"),
        ] {
            let forward: Forward = text.parse().unwrap();
            assert_eq!(forward.listen, listen.parse().unwrap(), "{text}");
            assert_eq!(forward.to_string(), shown);
        }
        for text in [
            "",
            "80",
            "80:",
            ":80",
            "80:0",
            "80:70000",
            "a:80",
            "80:a",
            "1.2.3.4:80",
            "::1:80:80",
        ] {
            assert!(text.parse::<Forward>().is_err(), "{text}");
        }
    }
}
