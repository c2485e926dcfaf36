use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Connections that have not shown who they are yet, by source: a bounded number of each and of all, so that nobody
/// without a certificate takes the places of those who have one.
#[derive(Debug)]
pub struct HalfOpen {
    per_source_max: usize,
    max: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    all: usize,
    sources: HashMap<IpAddr, usize>,
}

/// The place of one connection, given back when dropped.
#[derive(Debug)]
pub struct HalfOpenPlace {
    half_open: Arc<HalfOpen>,
    source: IpAddr,
}

/// One IPv6 /64 is one source: a host has as many addresses of it as it likes.
fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
    }
}

impl HalfOpen {
    /// At most `max` places, `per_source_max` of them for one source.
    pub fn new(per_source_max: usize, max: usize) -> Arc<Self> {
        Arc::new(Self {
            per_source_max,
            max,
            table: Mutex::default(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection; `None`: close it.
    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Option<HalfOpenPlace> {
        let source = source_of(address);
        let mut table = self.table();
        let of_source = table.sources.get(&source).copied().unwrap_or(0);
        if table.all >= self.max || of_source >= self.per_source_max {
            return None;
        }
        table.all += 1;
        table.sources.insert(source, of_source + 1);
        drop(table);
        Some(HalfOpenPlace {
            half_open: Arc::clone(self),
            source,
        })
    }
}

impl Drop for HalfOpenPlace {
    fn drop(&mut self) {
        let mut table = self.half_open.table();
        table.all -= 1;
        if let Some(count) = table.sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                table.sources.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_given_back() {
        let half_open = HalfOpen::new(2, 3);
        let enter = |address: &str| half_open.enter(address.parse().unwrap());
        let first = enter("192.0.2.1");
        let second = enter("::ffff:192.0.2.1");
        assert!(first.is_some() && second.is_some() && enter("192.0.2.1").is_none());
        let third = enter("2001:db8::1");
        assert!(third.is_some() && enter("192.0.2.3").is_none(), "of all");
        drop(first);
        let fourth = enter("2001:db8::2");
        assert!(fourth.is_some());
        drop(second);
        assert!(enter("2001:db8::ffff").is_none(), "one /64 is one source");
        assert!(enter("2001:db8:0:1::1").is_some());
        drop((third, fourth));
        let table = half_open.table();
        assert!(table.all == 0 && table.sources.is_empty());
    }
}
