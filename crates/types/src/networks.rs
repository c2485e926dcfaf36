//! Names of networks: one text per network, and a second one for the members of it that only dial out.

/// Ends the name of the network of members that cannot be dialled: `<home network>~outbound`. They hold sessions to
/// the gateways of their home network, which are the way in to them.
pub const OUTBOUND_SUFFIX: &str = "~outbound";

/// Name of the resource about a network, where an empty name cannot stand: `~` for the network "".
pub const DEFAULT_NETWORK_RESOURCE: &str = "~";

/// The network of outbound-only members at home in `home`.
pub fn outbound_of(home: &str) -> String {
    format!("{home}{OUTBOUND_SUFFIX}")
}

/// True for a network of outbound-only members.
pub fn is_outbound(network: &str) -> bool {
    network.ends_with(OUTBOUND_SUFFIX)
}

/// The network whose gateways lead to `network`: itself, or the home of outbound-only members.
pub fn home_of(network: &str) -> &str {
    network.strip_suffix(OUTBOUND_SUFFIX).unwrap_or(network)
}

/// The resource name of a network.
pub fn resource_name(network: &str) -> &str {
    if network.is_empty() {
        DEFAULT_NETWORK_RESOURCE
    } else {
        network
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (home, outbound, resource) in [
            ("", "~outbound", "~"),
            ("west/lan", "west/lan~outbound", "west/lan"),
        ] {
            assert_eq!(outbound_of(home), outbound);
            assert_eq!((home_of(home), home_of(outbound)), (home, home));
            assert_eq!((is_outbound(home), is_outbound(outbound)), (false, true));
            assert_eq!(
                (resource_name(home), resource_name(outbound)),
                (resource, outbound)
            );
        }
    }
}
