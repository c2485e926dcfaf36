//! One ADS stream: from the first request to its end.

use super::{
    Ads,
    demand::{ByName, Demand},
    node::{self, Client},
    subscribers::{Row, SubscriberState},
    watch::{Heard, Watch},
};
use crate::{caller::Caller, fleet::Report, listener::Link};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tombolo_proto::{
    type_url,
    xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
};
use tombolo_registry::{Resources, Subscriber, World};
use tombolo_runtime::Reader;
use tombolo_types::{Code, DeviceId};
use tonic::{Status, Streaming};

/// Types on one stream at most: what a client names is remembered.
const TYPES_MAX: usize = 32;
/// Names on one stream at most: as many resources as a client may hold of a large mesh.
const NAMES_MAX: usize = 200_000;
/// Characters of a client's refusal or report that are kept.
const MESSAGE_MAX: usize = 1024;

/// Serves a stream until the client leaves (`Ok`) or must go (`Err`).
pub(super) async fn run(
    ads: Ads,
    caller: Caller,
    link: Link,
    mut requests: Streaming<DeltaDiscoveryRequest>,
    answers_tx: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
) -> Result<(), Status> {
    let mut revoked = ads.fleet.revoked();
    let Some(first) = requests.next().await else {
        return Ok(());
    };
    let first = first?;
    if first.type_url == type_url::HEALTH {
        return Err(Status::invalid_argument(
            "the first request must carry a node and subscribe to a type",
        ));
    }
    let node = first.node.clone().unwrap_or_default();
    let client = match node::admit(&node, &caller, &ads.fleet.view()) {
        Ok(client) => client,
        Err(refusal) => {
            tracing::info!(%caller, from = link.from_where(), %refusal, "ADS stream refused");
            return Err(refusal.into());
        }
    };
    let _stream = match client.device {
        Some(device) => match ads.fleet.connected(device).await {
            Some(stream) => Some(stream),
            None => return Err(Status::resource_exhausted("too many control streams")),
        },
        None => None,
    };
    if let (Some(device), Some(_)) = (client.device, link.remote) {
        let network = ads
            .fleet
            .view()
            .members
            .get(&device)
            .map(|member| member.device.spec.network.clone());
        let source = link.source_of_node(&network.unwrap_or_default(), &client.addresses);
        ads.addresses.seen(device, source, client.addresses.clone());
    }
    let row = ads.subscribers.add(SubscriberState {
        identity: client.id.to_string(),
        device: client.device.map(|device| device.to_string()),
        node: client.node_id.clone(),
        version: client.version.clone(),
        from: link.from_where(),
        connected_unix_ms: jiff::Timestamp::now().as_millisecond(),
        types: BTreeMap::new(),
    });
    tracing::debug!(identity = %client.id, node = client.node_id, "ADS stream up");
    let mut session = Session {
        world: ads.fleet.world(),
        ads,
        client,
        row,
        watches: BTreeMap::new(),
        answers_tx,
        remote: link.remote.map(|remote| remote.ip().to_canonical()),
        untold: None,
    };
    session.hear(&first).await?;
    loop {
        tokio::select! {
            biased;
            set = revoked.changed() => session.check_revoked(set.as_deref())?,
            answered = session.push() => answered?,
            request = requests.next() => match request {
                Some(Ok(request)) => session.hear(&request).await?,
                Some(Err(status)) => {
                    tracing::debug!(%status, "ADS stream lost");
                    return Ok(());
                }
                None => return Ok(()),
            },
        }
    }
}

struct Session {
    ads: Ads,
    client: Client,
    row: Row,
    world: Reader<World>,
    watches: BTreeMap<String, Watch>,
    answers_tx: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    remote: Option<IpAddr>,
    /// A report that does not count yet.
    untold: Option<Report>,
}

impl Session {
    /// Reports count only from where the device is: a copy of it elsewhere says nothing about its application. Of a
    /// device that moves the report waits until its address is settled. Cancel-safe.
    async fn tell(&mut self) {
        let (Some(device), Some(report)) = (self.client.device, &self.untold) else {
            return;
        };
        let view = self.ads.fleet.view();
        let address = view.members.get(&device).and_then(|member| member.address);
        let here = |address: IpAddr| {
            self.remote.is_none_or(|remote| remote == address) || self.client.addresses.contains(&address)
        };
        if address.is_none_or(here) {
            self.ads.fleet.report(device, report.clone()).await;
            self.untold = None;
        }
    }

    fn check_revoked(&self, revoked: Option<&BTreeSet<DeviceId>>) -> Result<(), Status> {
        match (revoked, self.client.device) {
            (None, _) => Err(Status::unavailable("discovery is stopping")),
            (Some(set), Some(device)) if set.contains(&device) => {
                Err(crate::refusal::Refusal::new(Code::DeviceRevoked, format_args!("device {device}")).into())
            }
            _ => Ok(()),
        }
    }

    /// Takes a request: health, a subscription, an acknowledgement.
    async fn hear(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        let url = request.type_url.as_str();
        if url == type_url::HEALTH {
            let message = request
                .error_detail
                .as_ref()
                .map(|e| e.message.chars().take(MESSAGE_MAX).collect());
            self.untold = Some(Report {
                healthy: message.is_none(),
                message: message.unwrap_or_default(),
            });
            self.tell().await;
            return Ok(());
        }
        let first = !self.watches.contains_key(url);
        if first && self.watches.len() >= TYPES_MAX {
            return Err(Status::resource_exhausted("too many types on one stream"));
        }
        let watch = self.watches.entry(url.to_owned()).or_default();
        let heard = watch.handle(request, first);
        if heard == Heard::Ack && url == type_url::TRUST_BUNDLE {
            let own = watch.version_of(self.ads.trust_domain.as_str());
            self.row
                .update(url, |state| state.own = own.map(|version| version.to_string()));
        }
        if self.watches.values().map(Watch::remembered).sum::<usize>() > NAMES_MAX {
            return Err(Status::resource_exhausted("too many names on one stream"));
        }
        if let Heard::Nack(message) = &heard {
            let message: String = message.chars().take(MESSAGE_MAX).collect();
            self.ads.metrics.nacks.inc();
            tracing::warn!(identity = %self.client.id, node = self.client.node_id, type_url = url, message, "resources refused");
            self.row.update(url, |state| state.last_nack = Some(message));
        }
        self.show(url);
        Ok(())
    }

    fn show(&self, url: &str) {
        if let Some(watch) = self.watches.get(url) {
            self.row.update(url, |state| {
                (state.wildcard, state.names) = (watch.is_wildcard(), watch.names());
                (state.held, state.pending) = (watch.len(), watch.is_pending());
            });
        }
    }

    /// Sends one response if one is due, else waits for a newer world. Cancel-safe: a response is made only when
    /// there is a place for it.
    async fn push(&mut self) -> Result<(), Status> {
        loop {
            self.tell().await;
            // First the place, then the content: what a slow client gets is the latest.
            let place = self
                .answers_tx
                .reserve()
                .await
                .map_err(|_| Status::cancelled("the client is gone"))?;
            let world = self.world.load();
            let mut due = None;
            for (url, watch) in &mut self.watches {
                let resources = visible(&world, url, &self.client);
                let made = if url == type_url::ADDRESS {
                    watch.push(&resources, &mut self.ads.demand as &mut dyn Demand)
                } else {
                    watch.push(&resources, &mut ByName)
                };
                if let Some((push, nonce)) = made {
                    due = Some((url.clone(), push, nonce));
                    break;
                }
            }
            if let Some((url, push, nonce)) = due {
                self.ads.metrics.pushes.inc();
                self.ads
                    .metrics
                    .pushed_resources
                    .inc_by(push.resources.len() as u64);
                place.send(Ok(DeltaDiscoveryResponse {
                    system_version_info: world.version.to_string(),
                    resources: push.resources,
                    type_url: url.clone(),
                    nonce,
                    removed_resources: push.removed,
                }));
                self.row.update(&url, |state| state.pushes += 1);
                self.show(&url);
                return Ok(());
            }
            drop(place);
            if self.world.changed().await.is_none() {
                return Err(Status::unavailable("discovery is stopping"));
            }
        }
    }
}

/// What this client may see of a type. Only EXPOSURE differs between clients: each is served its own workload's.
fn visible(world: &World, url: &str, client: &Client) -> Resources {
    let Some(all) = world.resources(url) else {
        return Resources::new();
    };
    if url != type_url::EXPOSURE {
        return all.clone();
    }
    let Some(workload) = client.workload.as_deref().filter(|_| client.device.is_some()) else {
        return Resources::new();
    };
    let name: Arc<str> = Subscriber {
        namespace: &client.id.namespace,
        workload,
    }
    .exposure_name()
    .into();
    all.get(&name)
        .map(|own| (name, Arc::clone(own)))
        .into_iter()
        .collect()
}
