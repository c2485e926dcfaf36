//! The control stream as a state machine without IO: a response in, the request to send back out.
//!
//! Source: incremental xDS (envoy.service.discovery.v3) as Istio's ambient clients speak it: one stream, one initial
//! request per type with the versions held, ACK = the nonce, NACK = nonce and error with the good resources applied.

use crate::Health;
use std::collections::{BTreeSet, HashMap};
use tombolo_proto::{
    envoy::config::core::v3::Node,
    google::rpc,
    type_url,
    xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource},
};
use tombolo_snapshot::{Rejected, Snapshot};

/// Types that a node asks for, in the order of the initial requests: who is trusted and what is allowed come before
/// whom to call.
pub const TYPES: [&str; 7] = [
    type_url::TRUST_BUNDLE,
    type_url::REVOCATIONS,
    type_url::AUTHORIZATION,
    type_url::EXPOSURE,
    type_url::SERVICE_VIP,
    type_url::NETWORK_GATEWAYS,
    type_url::ADDRESS,
];

/// What a gateway asks for beside that: the services that other trust domains may call.
const GATEWAY_TYPES: [&str; 8] = {
    let mut types = [type_url::EXPORTED_SERVICE; 8];
    let mut i = 0;
    while i < TYPES.len() {
        types[i] = TYPES[i];
        i += 1;
    }
    types
};

/// Longest text of a NACK: a response with 100,000 bad resources is not answered with megabytes.
const NACK_BYTES_MAX: usize = 4096;
/// google.rpc.Code INVALID_ARGUMENT.
const INVALID_ARGUMENT: i32 = 3;
/// google.rpc.Code INTERNAL: what Istio's health reports carry.
const INTERNAL: i32 = 13;

/// What a response is applied to: the snapshot, or a stand-in in tests.
pub trait World {
    /// Resource name to version held.
    fn held(&self, type_url: &str) -> HashMap<String, String>;
    /// Takes the good resources, returns the bad ones.
    fn apply(&mut self, type_url: &str, resources: Vec<Resource>, removed: &[String]) -> Vec<Rejected>;
}

impl World for Snapshot {
    fn held(&self, type_url: &str) -> HashMap<String, String> {
        Self::held(self, type_url)
    }

    fn apply(&mut self, type_url: &str, resources: Vec<Resource>, removed: &[String]) -> Vec<Rejected> {
        Self::apply(self, type_url, resources, removed)
    }
}

/// What came of a response.
#[derive(Debug, Default)]
pub struct Handled {
    /// ACK or NACK; none for a type that was not asked for.
    pub request: Option<DeltaDiscoveryRequest>,
    /// The type, if it is one of [`TYPES`].
    pub type_url: Option<&'static str>,
    /// The world may be another one now. An empty first response counts: it says that there is nothing.
    pub changed: bool,
    /// What was refused.
    pub rejected: Vec<Rejected>,
}

/// State of one stream. Made anew for each.
#[derive(Debug)]
pub struct Ads {
    node: Node,
    exposure: String,
    types: &'static [&'static str],
    answered: BTreeSet<&'static str>,
    started: bool,
    reported: Option<Health>,
}

impl Ads {
    /// A stream of `node`, whose own workload is `own` (`namespace/name`).
    pub fn new(node: Node, own: String) -> Self {
        Self {
            node,
            exposure: own,
            types: &TYPES,
            answered: BTreeSet::new(),
            started: false,
            reported: None,
        }
    }

    /// The stream of a gateway, which has to know what is exported.
    #[must_use]
    pub fn of_gateway(self) -> Self {
        Self {
            types: &GATEWAY_TYPES,
            ..self
        }
    }

    /// The first requests: one per type, the first with the node.
    pub fn start(&mut self, world: &impl World) -> Vec<DeltaDiscoveryRequest> {
        self.started = true;
        let mut node = Some(std::mem::take(&mut self.node));
        let request = |type_url: &'static str| DeltaDiscoveryRequest {
            node: node.take(),
            type_url: type_url.to_owned(),
            // All types are wildcards but the one resource that is about this node alone.
            resource_names_subscribe: if type_url == type_url::EXPOSURE {
                vec![self.exposure.clone()]
            } else {
                vec![]
            },
            initial_resource_versions: world.held(type_url),
            ..Default::default()
        };
        self.types.iter().copied().map(request).collect()
    }

    /// Applies a response to `world` and says what to send.
    pub fn handle_response(&mut self, response: DeltaDiscoveryResponse, world: &mut impl World) -> Handled {
        let Some(type_url) = self
            .types
            .iter()
            .copied()
            .find(|known| *known == response.type_url)
        else {
            return Handled::default();
        };
        let first = self.answered.insert(type_url);
        let changed = first || !response.resources.is_empty() || !response.removed_resources.is_empty();
        let rejected = if changed {
            world.apply(type_url, response.resources, &response.removed_resources)
        } else {
            Vec::new()
        };
        let error_detail = (!rejected.is_empty()).then(|| rpc::Status {
            code: INVALID_ARGUMENT,
            message: nack_text(&rejected),
            details: vec![],
        });
        let request = DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            response_nonce: response.nonce,
            error_detail,
            ..Default::default()
        };
        Handled {
            request: Some(request),
            type_url: Some(type_url),
            changed,
            rejected,
        }
    }

    /// The report of a state that this stream has not reported yet. Nothing while the health is unknown, so that a
    /// restart of the agent reports no application dead that it has not asked.
    pub fn report(&mut self, health: &Health) -> Option<DeltaDiscoveryRequest> {
        if !self.started || *health == Health::Unknown || self.reported.as_ref() == Some(health) {
            return None;
        }
        self.reported = Some(health.clone());
        let error_detail = match health {
            Health::Unknown | Health::Healthy => None,
            Health::Unhealthy(reason) => Some(rpc::Status {
                code: INTERNAL,
                message: reason.clone(),
                details: vec![],
            }),
        };
        Some(DeltaDiscoveryRequest {
            type_url: type_url::HEALTH.to_owned(),
            error_detail,
            ..Default::default()
        })
    }

    /// True once every type was answered on this stream.
    pub fn is_synced(&self) -> bool {
        self.answered.len() == self.types.len()
    }

    /// True once anything was answered: the stream works.
    pub fn is_answered(&self) -> bool {
        !self.answered.is_empty()
    }
}

fn nack_text(rejected: &[Rejected]) -> String {
    let mut text = String::new();
    for (i, Rejected { name, reason }) in rejected.iter().enumerate() {
        let line = format!("{}{name}: {reason}", if i == 0 { "" } else { "; " });
        if text.len() + line.len() > NACK_BYTES_MAX {
            text.push_str(&format!("; and {} more", rejected.len() - i));
            break;
        }
        text.push_str(&line);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Refuses every resource whose name starts with "bad".
    #[derive(Default)]
    struct Fake {
        held: HashMap<&'static str, HashMap<String, String>>,
        applied: Vec<String>,
    }

    impl World for Fake {
        fn held(&self, type_url: &str) -> HashMap<String, String> {
            self.held.get(type_url).cloned().unwrap_or_default()
        }

        fn apply(&mut self, type_url: &str, resources: Vec<Resource>, removed: &[String]) -> Vec<Rejected> {
            let short = type_url.rsplit('.').next().unwrap();
            let (bad, good): (Vec<_>, Vec<_>) =
                resources.into_iter().partition(|r| r.name.starts_with("bad"));
            self.applied
                .extend(good.iter().map(|r| format!("{short} +{}", r.name)));
            self.applied
                .extend(removed.iter().map(|r| format!("{short} -{r}")));
            bad.into_iter()
                .map(|r| Rejected {
                    name: r.name,
                    reason: "no".into(),
                })
                .collect()
        }
    }

    fn ads() -> Ads {
        Ads::new(
            Node {
                id: "n".into(),
                ..Default::default()
            },
            "shop/catalog-1".into(),
        )
    }

    fn response(type_url: &str, nonce: &str, resources: &[&str], removed: &[&str]) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse {
            type_url: type_url.into(),
            nonce: nonce.into(),
            resources: resources
                .iter()
                .map(|n| Resource {
                    name: (*n).into(),
                    ..Default::default()
                })
                .collect(),
            removed_resources: removed.iter().map(|n| (*n).into()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn the_first_requests() {
        let mut fake = Fake::default();
        fake.held
            .insert(type_url::ADDRESS, HashMap::from([("uid".into(), "v1".into())]));
        let requests = ads().start(&fake);
        assert_eq!(
            requests.iter().map(|r| r.type_url.as_str()).collect::<Vec<_>>(),
            TYPES
        );
        let with_node: Vec<_> = requests.iter().map(|r| r.node.is_some()).collect();
        assert_eq!(
            with_node,
            [true, false, false, false, false, false, false],
            "the node goes with the first alone"
        );
        for request in &requests {
            let exposure = request.type_url == type_url::EXPOSURE;
            assert_eq!(
                request.resource_names_subscribe,
                if exposure { vec!["shop/catalog-1"] } else { vec![] }
            );
            assert!(request.response_nonce.is_empty() && request.error_detail.is_none());
            assert_eq!(
                request.initial_resource_versions.len(),
                usize::from(request.type_url == type_url::ADDRESS)
            );
        }
    }

    #[test]
    fn answers() {
        // type, resources, removed -> what was applied, error text, whether the world changed
        type Case<'a> = (
            &'a str,
            &'a [&'a str],
            &'a [&'a str],
            &'a [&'a str],
            Option<&'a str>,
            bool,
        );
        let cases: [Case<'_>; 5] = [
            (type_url::ADDRESS, &[], &[], &[], None, true),
            (type_url::ADDRESS, &[], &[], &[], None, false),
            (
                type_url::ADDRESS,
                &["a", "b"],
                &["c"],
                &["Address +a", "Address +b", "Address -c"],
                None,
                true,
            ),
            (
                type_url::AUTHORIZATION,
                &["bad1", "ok", "bad2"],
                &[],
                &["Authorization +ok"],
                Some("bad1: no; bad2: no"),
                true,
            ),
            (
                type_url::AUTHORIZATION,
                &[],
                &["x"],
                &["Authorization -x"],
                None,
                true,
            ),
        ];
        let (mut ads, mut fake) = (ads(), Fake::default());
        ads.start(&fake);
        for (i, (type_url, resources, removed, applied, error, changed)) in cases.into_iter().enumerate() {
            fake.applied.clear();
            let nonce = i.to_string();
            let handled = ads.handle_response(response(type_url, &nonce, resources, removed), &mut fake);
            let request = handled.request.unwrap();
            assert_eq!(
                (request.type_url.as_str(), request.response_nonce.as_str()),
                (type_url, nonce.as_str())
            );
            assert_eq!(request.error_detail.map(|d| d.message).as_deref(), error, "{i}");
            assert!(request.node.is_none() && request.initial_resource_versions.is_empty());
            assert_eq!(
                (fake.applied.as_slice(), handled.changed),
                (applied.map_str().as_slice(), changed),
                "{i}"
            );
        }
    }

    trait MapStr {
        fn map_str(&self) -> Vec<String>;
    }
    impl MapStr for &[&str] {
        fn map_str(&self) -> Vec<String> {
            self.iter().map(|s| (*s).to_owned()).collect()
        }
    }

    #[test]
    fn unknown_types_are_passed_over_and_all_known_ones_make_it_synced() {
        let (mut ads, mut fake) = (ads(), Fake::default());
        ads.start(&fake);
        let handled = ads.handle_response(response("type.googleapis.com/x.Y", "1", &["a"], &[]), &mut fake);
        assert!(handled.request.is_none() && !handled.changed && fake.applied.is_empty());
        for (i, type_url) in TYPES.into_iter().enumerate() {
            assert!(!ads.is_synced(), "{i}");
            ads.handle_response(response(type_url, "1", &[], &[]), &mut fake);
        }
        assert!(ads.is_synced() && ads.is_answered());
    }

    #[test]
    fn health_is_reported_on_change_and_on_each_stream() {
        let fake = Fake::default();
        let unhealthy = Health::Unhealthy("connection refused".into());
        let mut first = ads();
        assert!(
            first.report(&Health::Healthy).is_none(),
            "not before the first request"
        );
        first.start(&fake);
        assert!(first.report(&Health::Unknown).is_none());
        let sent: Vec<_> = [
            &Health::Healthy,
            &Health::Healthy,
            &unhealthy,
            &unhealthy,
            &Health::Healthy,
        ]
        .into_iter()
        .map(|health| {
            first
                .report(health)
                .map(|r| r.error_detail.map(|d| (d.code, d.message)))
        })
        .collect();
        assert_eq!(
            sent,
            [
                Some(None),
                None,
                Some(Some((13, "connection refused".into()))),
                None,
                Some(None)
            ]
        );
        let mut second = ads();
        second.start(&fake);
        let again = second.report(&unhealthy).unwrap();
        assert_eq!(again.type_url, type_url::HEALTH);
        assert!(again.response_nonce.is_empty());
    }

    #[test]
    fn a_nack_is_bounded() {
        let rejected: Vec<_> = (0..100_000)
            .map(|i| Rejected {
                name: format!("n{i}"),
                reason: "no".into(),
            })
            .collect();
        let text = nack_text(&rejected);
        assert!(
            text.len() < NACK_BYTES_MAX + 64 && text.ends_with(" more"),
            "{}",
            text.len()
        );
    }
}
