use crate::{Names, lookup::lookup};
use hickory_proto::{
    op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME, PTR, SOA},
    },
    serialize::binary::{BinDecodable as _, BinDecoder},
};

/// Seconds that an answer may be kept, as ztunnel's and Istio's agents give: virtual addresses are stable.
const TTL_SECONDS: u32 = 30;
/// The same for the instances of a headless service, which come and go.
const HEADLESS_TTL_SECONDS: u32 = 5;
/// Seconds that "does not exist" may be kept: a service that was just made should be found soon.
const NEGATIVE_TTL_SECONDS: u32 = 5;
/// Bytes of a UDP answer at most, whatever the client offers: passes every path without fragments (an IPv6 packet of
/// 1,280 bytes; the DNS Flag Day 2020 figure).
const UDP_BYTES_MAX: u16 = 1232;
/// Bytes of a UDP answer that every client takes (RFC 1035 section 4.2.1), and the least that EDNS may name.
const UDP_BYTES_MIN: u16 = 512;

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    /// Own namespace: completes one-label names, is preferred among equal host names.
    pub namespace: &'a str,
    /// Search domains that are taken off a name to look for the rest in the mesh. A name so found is answered in place
    /// of whatever the host's own servers say about it; empty: names are taken as they are asked.
    pub search: &'a [String],
    /// True: the answer must fit the size that the client can take; false: DNS over TCP.
    pub udp: bool,
}

/// What to do with a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Send these bytes back.
    Reply(Vec<u8>),
    /// Not a mesh name: pass the query's bytes to the host's own servers.
    Forward,
    /// Not a query at all.
    Drop,
}

/// Answers one query (without the two length bytes of DNS over TCP).
///
/// Equal arguments give equal bytes; `seed` only shuffles the addresses.
pub fn answer(query: &[u8], names: &dyn Names, client: &Client<'_>, seed: u64) -> Answer {
    let mut decoder = BinDecoder::new(query);
    let Ok(header) = Header::read(&mut decoder) else {
        return Answer::Drop;
    };
    let asked = header.metadata;
    if asked.message_type != MessageType::Query {
        return Answer::Drop;
    }
    if asked.op_code != OpCode::Query {
        return Answer::Reply(bare(&asked, ResponseCode::NotImp));
    }
    if header.counts.queries != 1 {
        return Answer::Reply(bare(&asked, ResponseCode::FormErr));
    }
    let Ok(question) = Query::read(&mut decoder) else {
        return Answer::Reply(bare(&asked, ResponseCode::FormErr));
    };
    // What is not for the mesh is passed on without a look at the rest: its servers judge it.
    let Some(outcome) = find(&question, names, client, seed) else {
        return Answer::Forward;
    };
    let Ok(message) = Message::from_vec(query) else {
        return Answer::Reply(bare(&asked, ResponseCode::FormErr));
    };
    Answer::Reply(reply(&message, question, outcome, client.udp))
}

/// A SERVFAIL for this query, for example when no upstream server answered; none if it is not a query.
pub fn servfail(query: &[u8]) -> Option<Vec<u8>> {
    let mut decoder = BinDecoder::new(query);
    let asked = Header::read(&mut decoder).ok()?.metadata;
    if asked.message_type != MessageType::Query {
        return None;
    }
    // With the question, if it can be read: clients match answers by it.
    let Ok(message) = Message::from_vec(query) else {
        return Some(bare(&asked, ResponseCode::ServFail));
    };
    let mut response = Message::response(asked.id, asked.op_code);
    response.metadata = response_metadata(&asked);
    response.metadata.response_code = ResponseCode::ServFail;
    response.add_queries(message.queries.iter().cloned());
    if let Some(edns) = &message.edns {
        response.set_edns(echo(edns));
    }
    Some(
        response
            .to_vec()
            .unwrap_or_else(|_| bare(&asked, ResponseCode::ServFail)),
    )
}

/// The parts of an authoritative answer.
struct Outcome {
    code: ResponseCode,
    records: Vec<Record>,
    /// Owner of the SOA that says how long "nothing" holds; unset where there are records.
    zone: Option<Name>,
}

impl Outcome {
    fn records(records: Vec<Record>, zone: &Name) -> Self {
        let zone = records.is_empty().then(|| zone.clone());
        Self {
            code: ResponseCode::NoError,
            records,
            zone,
        }
    }

    fn nothing(code: ResponseCode, zone: Option<Name>) -> Self {
        Self {
            code,
            records: Vec::new(),
            zone,
        }
    }
}

/// None: not for the mesh.
fn find(question: &Query, names: &dyn Names, client: &Client<'_>, seed: u64) -> Option<Outcome> {
    if question.query_type() == RecordType::PTR
        && let Some(outcome) = find_reverse(question, names)
    {
        return Some(outcome);
    }
    let host = text(question.name());
    let ours = names.is_mesh_name(&host);
    let found = lookup(names, &host, client.namespace, client.search);
    if !ours && found.is_none() {
        return None;
    }
    // A name that others know too (an external service) is ours for its addresses only. HTTPS and SVCB carry hints of
    // addresses, so a real answer would lead around the mesh.
    let leads_to_addresses = matches!(
        question.query_type(),
        RecordType::A | RecordType::AAAA | RecordType::ANY | RecordType::HTTPS | RecordType::SVCB
    );
    if !ours && !leads_to_addresses {
        return None;
    }
    let zone = if ours {
        name_of(names.mesh_domain())?
    } else {
        question.name().clone()
    };
    if !matches!(question.query_class(), DNSClass::IN | DNSClass::ANY) {
        return Some(Outcome::nothing(ResponseCode::Refused, None));
    }
    let Some(found) = found else {
        let code = if has_names_below(&host, names.mesh_domain()) {
            ResponseCode::NoError
        } else {
            ResponseCode::NXDomain
        };
        return Some(Outcome::nothing(code, Some(zone)));
    };
    let ttl = if found.addresses.headless {
        HEADLESS_TTL_SECONDS
    } else {
        TTL_SECONDS
    };
    let addresses = &found.addresses;
    let mut data: Vec<RData> = if question.query_type() == RecordType::A {
        addresses.v4.iter().map(|&ip| RData::A(A(ip))).collect()
    } else if question.query_type() == RecordType::AAAA {
        addresses.v6.iter().map(|&ip| RData::AAAA(AAAA(ip))).collect()
    } else {
        Vec::new()
    };
    shuffle(&mut data, seed);
    let mut records = Vec::with_capacity(data.len() + 1);
    let mut owner = question.name().clone();
    if let Some(alias_of) = found.alias_of.as_deref().and_then(name_of) {
        records.push(Record::from_rdata(
            owner,
            ttl,
            RData::CNAME(CNAME(alias_of.clone())),
        ));
        owner = alias_of;
    }
    records.extend(
        data.into_iter()
            .map(|data| Record::from_rdata(owner.clone(), ttl, data)),
    );
    Some(Outcome::records(records, &zone))
}

/// The name of a virtual address. None: not one of ours.
fn find_reverse(question: &Query, names: &dyn Names) -> Option<Outcome> {
    let net = question.name().parse_arpa_name().ok()?;
    if net.prefix_len() != net.max_prefix_len() || !names.is_mesh_address(net.addr()) {
        return None;
    }
    let zone = question.name().base_name();
    let Some(host) = names.host_of(net.addr()).as_deref().and_then(name_of) else {
        return Some(Outcome::nothing(ResponseCode::NXDomain, Some(zone)));
    };
    let record = Record::from_rdata(question.name().clone(), TTL_SECONDS, RData::PTR(PTR(host)));
    Some(Outcome::records(vec![record], &zone))
}

/// True for the mesh domain, `svc` below it and the namespaces below that: they have no address, but names below them,
/// and a resolver that walks down label by label must not be told that nothing is there (RFC 8020).
fn has_names_below(host: &str, domain: &str) -> bool {
    let Some(rest) = host.strip_suffix(domain) else {
        return false;
    };
    let rest = rest.trim_end_matches('.');
    rest.is_empty()
        || rest == "svc"
        || rest
            .strip_suffix(".svc")
            .is_some_and(|namespace| !namespace.contains('.'))
}

/// Lower case, without the trailing dot. What cannot be in a host name, a dot within a label above all, becomes a
/// character that no mesh name has.
fn text(name: &Name) -> String {
    let mut text = String::with_capacity(name.len());
    for label in name.iter() {
        if !text.is_empty() {
            text.push('.');
        }
        text.extend(label.iter().map(|&byte| match byte {
            b'.' => char::REPLACEMENT_CHARACTER,
            byte if byte.is_ascii_graphic() => char::from(byte.to_ascii_lowercase()),
            _ => char::REPLACEMENT_CHARACTER,
        }));
    }
    text
}

fn name_of(host: &str) -> Option<Name> {
    Name::from_labels(host.split('.').map(str::as_bytes)).ok()
}

fn response_metadata(asked: &Metadata) -> Metadata {
    let mut metadata = Metadata::response_from_request(asked);
    metadata.recursion_available = true;
    metadata
}

/// A header alone, for queries that cannot be read further.
fn bare(asked: &Metadata, code: ResponseCode) -> Vec<u8> {
    let mut message = Message::response(asked.id, asked.op_code);
    message.metadata = response_metadata(asked);
    message.metadata.response_code = code;
    message.to_vec().unwrap_or_default()
}

fn echo(asked: &Edns) -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(asked.max_payload().max(UDP_BYTES_MIN));
    edns
}

fn reply(query: &Message, question: Query, outcome: Outcome, udp: bool) -> Vec<u8> {
    let mut message = Message::response(query.metadata.id, OpCode::Query);
    message.metadata = response_metadata(&query.metadata);
    message.metadata.authoritative = outcome.code != ResponseCode::Refused;
    message.metadata.response_code = outcome.code;
    message.add_query(question);
    let mut limit = UDP_BYTES_MIN;
    if let Some(edns) = &query.edns {
        limit = edns.max_payload().clamp(UDP_BYTES_MIN, UDP_BYTES_MAX);
        message.set_edns(echo(edns));
        if edns.version() > 0 {
            message.metadata.authoritative = false;
            message.metadata.response_code = ResponseCode::BADVERS;
            return encode(message, u16::MAX);
        }
    }
    if let Some(zone) = outcome.zone {
        message.add_authority(soa(zone));
    }
    message.answers = outcome.records;
    encode(message, if udp { limit } else { u16::MAX })
}

fn soa(zone: Name) -> Record {
    let server = |label: &str| zone.prepend_label(label).unwrap_or_else(|_| zone.clone());
    let data = SOA::new(
        server("ns"),
        server("hostmaster"),
        1,
        3600,
        600,
        86_400,
        NEGATIVE_TTL_SECONDS,
    );
    Record::from_rdata(zone, NEGATIVE_TTL_SECONDS, RData::SOA(data))
}

/// Encodes within `limit` bytes: as many answers as fit, the rest told by the truncation bit.
fn encode(mut message: Message, limit: u16) -> Vec<u8> {
    let fits = |message: &Message| {
        message
            .to_vec()
            .ok()
            .filter(|bytes| bytes.len() <= usize::from(limit))
    };
    if let Some(bytes) = fits(&message) {
        return bytes;
    }
    message.metadata.truncation = true;
    let mut all = std::mem::take(&mut message.answers);
    let (mut low, mut high) = (0, all.len());
    while low < high {
        let middle = (low + high).div_ceil(2);
        message.answers = all[..middle].to_vec();
        if fits(&message).is_some() {
            low = middle
        } else {
            high = middle - 1
        }
    }
    all.truncate(low);
    message.answers = all;
    fits(&message).unwrap_or_else(|| bare(&message.metadata, ResponseCode::ServFail))
}

/// Fisher-Yates with splitmix64.
fn shuffle<T>(items: &mut [T], mut seed: u64) {
    for last in (1..items.len()).rev() {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // The remainder is below `last + 1`, so it fits; its bias at such sizes is far below what anyone can see.
        items.swap(last, ((z ^ (z >> 31)) % (last as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests;
