use crate::{
    Compiled, Registry, World, authorization,
    content::{self, ObjectKey, Output, key},
    imports::imported_host,
    peer_authentication,
    registry::Producer,
    trust_names,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tombolo_config::Kind;
use tombolo_proto::{
    tombolo::v1::{Revocations, TrustBundle},
    type_url,
};
use tombolo_types::TrustDomain;

/// Name of the one REVOCATIONS resource.
const REVOCATIONS_NAME: &str = "devices";

impl Registry {
    /// Compiles what has changed. The same `Arc` again if nothing has.
    pub fn publish(&mut self) -> Arc<World> {
        // Names move between producers (an older object takes a host over): all that goes is taken out before anything
        // is put in.
        let mut gone: BTreeSet<(&'static str, Arc<str>)> = BTreeSet::new();
        let mut made: BTreeMap<(&'static str, Arc<str>), Compiled> = BTreeMap::new();
        for producer in std::mem::take(&mut self.dirty) {
            let outputs = self.outputs(&producer);
            gone.extend(self.produced.remove(&producer).into_iter().flatten());
            if outputs.is_empty() {
                continue;
            }
            let names = outputs
                .iter()
                .map(|(type_url, compiled)| (*type_url, compiled.name.clone()))
                .collect();
            self.produced.insert(producer, names);
            made.extend(
                outputs
                    .into_iter()
                    .map(|(type_url, compiled)| ((type_url, compiled.name.clone()), compiled)),
            );
        }
        let mut types = self.world.types.clone();
        let mut changed: BTreeMap<&'static str, Vec<Arc<str>>> = BTreeMap::new();
        for (type_url, name) in gone.into_iter().filter(|name| !made.contains_key(name)) {
            if types
                .get_mut(type_url)
                .and_then(|resources| resources.remove(&name))
                .is_some()
            {
                changed.entry(type_url).or_default().push(name);
            }
        }
        for ((type_url, name), compiled) in made {
            let resources = types.entry(type_url).or_default();
            if resources.get(&name).is_none_or(|present| **present != compiled) {
                resources.insert(name.clone(), Arc::new(compiled));
                changed.entry(type_url).or_default().push(name);
            }
        }
        if !changed.is_empty() {
            self.world = Arc::new(World {
                version: self.world.version + 1,
                types,
                changed,
            });
        }
        self.world.clone()
    }

    fn outputs(&self, producer: &Producer) -> Vec<Output> {
        let object = match producer {
            Producer::Mesh => return self.mesh_outputs(),
            Producer::Network(network) => return self.network_outputs(network),
            Producer::Object(object) if imported_host(object).is_some() => {
                return self.imported_outputs(object);
            }
            Producer::Object(object) => object,
        };
        match object.kind {
            Kind::WorkloadEntry => self.entry_outputs(object),
            Kind::ServiceEntry => {
                let mut outputs = self.service_outputs(object);
                outputs.extend(self.export_outputs(object));
                outputs
            }
            Kind::AuthorizationPolicy => self.policy_outputs(object),
            Kind::PeerAuthentication => self.peer_policy_outputs(object),
            // What these say is in the resources of the services that they are about.
            Kind::ServiceExport | Kind::Namespace => Vec::new(),
            Kind::WorkloadGroup | Kind::JoinToken | Kind::Device => Vec::new(),
        }
    }

    fn mesh_outputs(&self) -> Vec<Output> {
        let root = self.settings.root_namespace.as_str();
        let mut policies = vec![peer_authentication::static_strict(root)];
        if self.settings.default_deny {
            policies.push(peer_authentication::default_deny(root));
        }
        let policies = policies.iter().map(|policy| {
            content::resource(
                type_url::AUTHORIZATION,
                key(&policy.namespace, &policy.name),
                policy,
            )
        });
        let revoked = Revocations {
            device_ids: self.revoked.iter().map(|device| device.0).collect(),
        };
        let revoked = content::resource(type_url::REVOCATIONS, REVOCATIONS_NAME.to_owned(), &revoked);
        let bundles = self
            .trust_bundles()
            .into_iter()
            .map(|bundle| content::resource(type_url::TRUST_BUNDLE, bundle.trust_domain.clone(), &bundle));
        policies.chain([revoked]).chain(bundles).collect()
    }

    /// One bundle for each trust domain, and one of the same roots for each other name of the own one.
    fn trust_bundles(&self) -> Vec<TrustBundle> {
        let texts = |names: &[TrustDomain]| names.iter().map(ToString::to_string).collect();
        let mut merged = self.merged_bundles();
        let settings = &self.settings;
        if let Some(own) = merged.get(&settings.trust_domain).cloned() {
            for name in &settings.also {
                merged.insert(name.clone(), own.clone());
            }
        }
        let mut imported = self.imported_names();
        let has_bundle: BTreeSet<TrustDomain> = merged.keys().cloned().collect();
        let bundle = |(trust_domain, roots_pem): (TrustDomain, String)| {
            let (also, former) = if trust_domain == settings.trust_domain {
                (texts(&settings.also), texts(&settings.former))
            } else {
                let names = imported.remove(&trust_domain).unwrap_or_default();
                let also = names.also.iter().map(ToString::to_string).collect();
                let former = names.former.difference(&has_bundle).map(ToString::to_string);
                (also, former.collect())
            };
            TrustBundle {
                trust_domain: trust_domain.to_string(),
                roots_pem,
                also,
                former,
            }
        };
        merged.into_iter().map(bundle).collect()
    }

    fn policy_outputs(&self, object: &ObjectKey) -> Vec<Output> {
        let Some(policy) = self.policies.get(object) else {
            return Vec::new();
        };
        let policy = trust_names::widened(policy, &self.settings);
        let converted = authorization::convert(&policy, &self.settings.root_namespace);
        let name = || key(&object.namespace, &object.name);
        converted
            .authorization
            .map(|policy| content::resource(type_url::AUTHORIZATION, name(), &policy))
            .into_iter()
            .collect()
    }

    fn peer_policy_outputs(&self, object: &ObjectKey) -> Vec<Output> {
        let Some(policy) = self.peer_policies.get(object) else {
            return Vec::new();
        };
        if *object.namespace == *self.settings.root_namespace
            || peer_authentication::selector(&policy.spec).is_none()
        {
            return Vec::new();
        }
        let effect = peer_authentication::effect(&policy.spec, self.is_strict(&object.namespace));
        peer_authentication::convert(&object.namespace, &object.name, &effect)
            .map(|policy| {
                content::resource(
                    type_url::AUTHORIZATION,
                    key(&policy.namespace, &policy.name),
                    &policy,
                )
            })
            .into_iter()
            .collect()
    }
}
