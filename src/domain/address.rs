//! Which addresses a push may go to: public ones, and those of networks that the operator allows (contract §5).
//!
//! The rule is asked about the very address that is connected to, after the host name was resolved; nothing here looks
//! at names, but for literals in disguise.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

const fn v4(a: u8, b: u8, c: u8, d: u8, len: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), len)
}

const fn v6(a: u16, b: u16, c: u16, len: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), len)
}

/// IPv4 ranges that are not public, by the IANA special-purpose registry, and metadata services that look public.
const FORBIDDEN_V4: [Ipv4Net; 19] = [
    v4(0, 0, 0, 0, 8),        // this network
    v4(10, 0, 0, 0, 8),       // private
    v4(100, 64, 0, 0, 10),    // CGNAT; 100.100.100.200 is Alibaba's metadata
    v4(127, 0, 0, 0, 8),      // loopback
    v4(169, 254, 0, 0, 16),   // link-local; 169.254.169.254 is most clouds' metadata
    v4(172, 16, 0, 0, 12),    // private
    v4(192, 0, 0, 0, 24),     // protocol assignments; 192.0.0.192 is Oracle's metadata
    v4(192, 0, 2, 0, 24),     // documentation
    v4(192, 31, 196, 0, 24),  // AS112
    v4(192, 52, 193, 0, 24),  // AMT
    v4(192, 88, 99, 0, 24),   // 6to4 relays
    v4(192, 168, 0, 0, 16),   // private
    v4(192, 175, 48, 0, 24),  // AS112
    v4(198, 18, 0, 0, 15),    // benchmarking
    v4(198, 51, 100, 0, 24),  // documentation
    v4(203, 0, 113, 0, 24),   // documentation
    v4(224, 0, 0, 0, 4),      // multicast
    v4(240, 0, 0, 0, 4),      // reserved, and broadcast
    v4(168, 63, 129, 16, 32), // Azure's wire server
];

/// The only IPv6 range that is public.
const PUBLIC_V6: Ipv6Net = v6(0x2000, 0, 0, 3);

/// What of it is not.
const FORBIDDEN_V6: [Ipv6Net; 5] = [
    v6(0x2001, 0, 0, 23),         // Teredo, ORCHID, benchmarking
    v6(0x2001, 0xdb8, 0, 32),     // documentation
    v6(0x2002, 0, 0, 16),         // 6to4
    v6(0x2620, 0x4f, 0x8000, 48), // AS112
    v6(0x3fff, 0, 0, 20),         // documentation
];

/// The rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressRule {
    /// Networks that are allowed although they are not public (`push.allow_networks`).
    pub allowed: Vec<IpNet>,
}

impl AddressRule {
    /// Everything, for addresses of the operator's own.
    #[must_use]
    pub fn any() -> AddressRule {
        AddressRule { allowed: vec![IpNet::V4(v4(0, 0, 0, 0, 0)), IpNet::V6(v6(0, 0, 0, 0))] }
    }

    /// Whether a push may connect to this address.
    #[must_use]
    pub fn permits(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.allowed.iter().any(|net| net.contains(&address)) || is_public(address)
    }
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !FORBIDDEN_V4.iter().any(|net| net.contains(&address)),
        IpAddr::V6(address) => PUBLIC_V6.contains(&address) && !FORBIDDEN_V6.iter().any(|net| net.contains(&address)),
    }
}

/// The address that a URL's host is a literal of, also in the forms that `inet_aton` takes (`127.1`, `2130706433`,
/// `0x7f.0.0.1`, `0177.1`); `None` for a name.
#[must_use]
pub fn literal(host: &str) -> Option<IpAddr> {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let host = host.strip_suffix('.').unwrap_or(host);
    if let Ok(address) = host.parse() {
        return Some(address);
    }
    let parts: Vec<u32> = host.split('.').map(aton_number).collect::<Option<_>>()?;
    let (last, bytes) = parts.split_last()?;
    if bytes.len() > 3 || bytes.iter().any(|byte| *byte > 255) {
        return None;
    }
    let room = 32 - 8 * bytes.len() as u32;
    if u64::from(*last) >> room != 0 {
        return None;
    }
    let high = bytes.iter().enumerate().fold(0, |sum, (place, byte)| sum | byte << (24 - 8 * place));
    Some(IpAddr::V4(Ipv4Addr::from_bits(high | last)))
}

fn aton_number(text: &str) -> Option<u32> {
    let lower = text.to_ascii_lowercase();
    match lower.strip_prefix("0x") {
        Some("") => Some(0),
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None if lower.len() > 1 && lower.starts_with('0') => u32::from_str_radix(&lower, 8).ok(),
        None if lower.starts_with('+') => None,
        None => lower.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn permits(address: &str) -> bool {
        AddressRule::default().permits(address.parse().unwrap())
    }

    #[test]
    fn each_range_is_forbidden_from_its_first_to_its_last_address_and_no_further() {
        // (first, last, is the one before public, is the one after)
        let table = [
            ("0.0.0.0", "0.255.255.255", None, Some(true)),
            ("10.0.0.0", "10.255.255.255", Some(true), Some(true)),
            ("100.64.0.0", "100.127.255.255", Some(true), Some(true)),
            ("127.0.0.0", "127.255.255.255", Some(true), Some(true)),
            ("168.63.129.16", "168.63.129.16", Some(true), Some(true)),
            ("169.254.0.0", "169.254.255.255", Some(true), Some(true)),
            ("172.16.0.0", "172.31.255.255", Some(true), Some(true)),
            ("192.0.0.0", "192.0.0.255", Some(true), Some(true)),
            ("192.0.2.0", "192.0.2.255", Some(true), Some(true)),
            ("192.31.196.0", "192.31.196.255", Some(true), Some(true)),
            ("192.52.193.0", "192.52.193.255", Some(true), Some(true)),
            ("192.88.99.0", "192.88.99.255", Some(true), Some(true)),
            ("192.168.0.0", "192.168.255.255", Some(true), Some(true)),
            ("192.175.48.0", "192.175.48.255", Some(true), Some(true)),
            ("198.18.0.0", "198.19.255.255", Some(true), Some(true)),
            ("198.51.100.0", "198.51.100.255", Some(true), Some(true)),
            ("203.0.113.0", "203.0.113.255", Some(true), Some(true)),
            ("224.0.0.0", "239.255.255.255", Some(true), Some(false)),
            ("240.0.0.0", "255.255.255.255", Some(false), None),
            ("::", "1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", None, Some(true)),
            ("2001::", "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff", Some(true), Some(true)),
            ("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", Some(true), Some(true)),
            ("2002::", "2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Some(true), Some(true)),
            ("2620:4f:8000::", "2620:4f:8000:ffff:ffff:ffff:ffff:ffff", Some(true), Some(true)),
            ("3fff::", "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff", Some(true), Some(true)),
            ("4000::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Some(true), None),
        ];
        for (first, last, before, after) in table {
            assert!(!permits(first) && !permits(last), "{first} to {last}");
            let step = |address: &str, up: bool| match address.parse().unwrap() {
                IpAddr::V4(v4) => {
                    let bits = v4.to_bits();
                    IpAddr::V4(Ipv4Addr::from_bits(if up { bits + 1 } else { bits - 1 }))
                }
                IpAddr::V6(v6) => {
                    let bits = v6.to_bits();
                    IpAddr::V6(Ipv6Addr::from_bits(if up { bits + 1 } else { bits - 1 }))
                }
            };
            let rule = AddressRule::default();
            if let Some(is_public) = before {
                assert_eq!(rule.permits(step(first, false)), is_public, "before {first}");
            }
            if let Some(is_public) = after {
                assert_eq!(rule.permits(step(last, true)), is_public, "after {last}");
            }
        }
    }

    #[test]
    fn metadata_services_and_translated_forms_are_forbidden() {
        for address in [
            "169.254.169.254",
            "169.254.170.2",
            "100.100.100.200",
            "192.0.0.192",
            "168.63.129.16",
            "fd00:ec2::254",
            "fd20:ce::254",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::808:808",
            "64:ff9b:1::a00:1",
            "2002:7f00:1::",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "100::1",
            "5f00::1",
        ] {
            assert!(!permits(address), "{address}");
        }
        for address in ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8"] {
            assert!(permits(address), "{address}");
        }
    }

    #[test]
    fn allowed_networks_are_allowed_and_nothing_beside_them() {
        let rule = AddressRule { allowed: vec!["10.20.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()] };
        for (address, is_permitted) in [
            ("10.20.0.1", true),
            ("::ffff:10.20.0.1", true),
            ("10.21.0.0", false),
            ("fd00::1", true),
            ("fc00::1", false),
            ("8.8.8.8", true),
        ] {
            assert_eq!(rule.permits(address.parse().unwrap()), is_permitted, "{address}");
        }
        assert!(AddressRule::any().permits("127.0.0.1".parse().unwrap()));
        assert!(AddressRule::any().permits("::1".parse().unwrap()));
    }

    #[test]
    fn literals_are_seen_in_every_form() {
        let v4 = |text: &str| Some(IpAddr::V4(text.parse().unwrap()));
        for (host, expected) in [
            ("127.0.0.1", v4("127.0.0.1")),
            ("127.1", v4("127.0.0.1")),
            ("2130706433", v4("127.0.0.1")),
            ("0x7f.1", v4("127.0.0.1")),
            ("0x7F000001", v4("127.0.0.1")),
            ("017700000001", v4("127.0.0.1")),
            ("0177.0.0.1", v4("127.0.0.1")),
            ("127.0.0.1.", v4("127.0.0.1")),
            ("10.1.2", v4("10.1.0.2")),
            ("0", v4("0.0.0.0")),
            ("[::1]", Some("::1".parse().unwrap())),
            ("[::ffff:127.0.0.1]", Some("::ffff:127.0.0.1".parse().unwrap())),
            ("example.com", None),
            ("1.2.3.4.5", None),
            ("256.1.1.1", None),
            ("4294967296", None),
            ("1.2.3.256", None),
            ("a.1", None),
            ("", None),
        ] {
            assert_eq!(literal(host), expected, "{host}");
        }
    }

    proptest! {
        #[test]
        fn an_ipv4_address_in_ipv6_form_is_judged_no_milder_than_itself(bits: u32) {
            let address = Ipv4Addr::from_bits(bits);
            let rule = AddressRule::default();
            let verdict = rule.permits(IpAddr::V4(address));
            prop_assert_eq!(rule.permits(IpAddr::V6(address.to_ipv6_mapped())), verdict);
            // Forms that are translated on the way are never let through.
            prop_assert!(!rule.permits(IpAddr::V6(address.to_ipv6_compatible())));
            let nat64 = Ipv6Addr::from_bits((0x64_ff9b << 96) | u128::from(bits));
            prop_assert!(!rule.permits(IpAddr::V6(nat64)));
            let six_to_four = Ipv6Addr::from_bits((0x2002 << 112) | (u128::from(bits) << 80));
            prop_assert!(!rule.permits(IpAddr::V6(six_to_four)));
        }
    }
}
