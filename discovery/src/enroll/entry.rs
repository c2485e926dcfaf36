//! The WorkloadEntry that a device becomes: pure.

use std::collections::{BTreeMap, BTreeSet};
use tombolo_config::{
    Metadata, Object, OwnerReference, Resource, WorkloadEntrySpec, WorkloadGroupSpec, annotation,
};
use tombolo_types::{Code, DeviceId};

/// Longest name of an object; what is over it is cut in front, where the group's name stands.
const NAME_MAX: usize = 253;
/// Labels of one node at most.
const NODE_LABELS_MAX: usize = 64;

/// Source: istiod names the controller of an auto-registered entry; ours is discovery.
const CONTROLLER: &str = "istio.io/workloadController";
const CONNECTED_AT: &str = "istio.io/connectedAt";

/// `<group>-<device id>[-<network>]`.
pub(super) fn name(group: &str, device: DeviceId, network: &str) -> String {
    let name = if network.is_empty() {
        format!("{group}-{device}")
    } else {
        format!("{group}-{device}-{network}")
    };
    let cut = name.len().saturating_sub(NAME_MAX);
    name[cut..].trim_start_matches(['-', '.']).to_owned()
}

/// Copies the group's template. A node adds labels only for keys that the group lists; the others are refused with a
/// coded message each.
pub(super) fn make(
    group: &Object<WorkloadGroupSpec>,
    device: DeviceId,
    node_labels: &std::collections::HashMap<String, String>,
    now: &str,
) -> (Object<WorkloadEntrySpec>, Vec<String>) {
    let mut spec = group.spec.template.clone();
    spec.address.clear();
    let mut warnings = Vec::new();
    let mut labels = labels_of(group);
    let listed = listed(group);
    let ordered: BTreeMap<&String, &String> = node_labels.iter().take(NODE_LABELS_MAX).collect();
    for (key, value) in ordered {
        let well_formed = value.len() <= 63
            && value
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if listed.contains(key) && well_formed {
            labels.insert(key.clone(), value.clone());
        } else {
            let shown: String = key.chars().take(100).collect();
            let group = &group.metadata.name;
            warnings.push(Code::LabelRefused.message(format_args!(
                "{shown:?} is not listed by {group}, or its value is no label"
            )));
        }
    }
    labels.insert(annotation::TUNNEL.into(), "http".into());
    spec.labels.clone_from(&labels);
    if spec.service_account.is_empty() {
        spec.service_account = "default".into();
    }
    let name = name(&group.metadata.name, device, &spec.network);
    let mut metadata = Metadata::named(&group.metadata.namespace, name);
    metadata.labels = labels;
    metadata.annotations = group.spec.metadata.annotations.clone();
    metadata.annotations.extend([
        (
            annotation::AUTO_REGISTRATION_GROUP.to_owned(),
            group.metadata.name.clone(),
        ),
        (CONTROLLER.to_owned(), "tombolo-discovery".to_owned()),
        (CONNECTED_AT.to_owned(), now.to_owned()),
    ]);
    if group.spec.probe.is_some() {
        metadata
            .annotations
            .insert(annotation::HEALTH_CHECKS_ENABLED.into(), "true".into());
    }
    metadata.owner_references = vec![OwnerReference {
        api_version: group.api_version.clone(),
        kind: group.kind.clone(),
        name: group.metadata.name.clone(),
        uid: group.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: None,
    }];
    (Object::<WorkloadEntrySpec>::new(metadata, spec), warnings)
}

/// The entry of a member after its group changed: labels, ports, weight and locality follow; what the node added and
/// still may add stays; identity, network and address are settled by enrolment.
pub(crate) fn follow(
    before: &Object<WorkloadGroupSpec>,
    after: &Object<WorkloadGroupSpec>,
    entry: &Object<WorkloadEntrySpec>,
) -> Object<WorkloadEntrySpec> {
    let mut followed = entry.clone();
    let (old, new) = (labels_of(before), labels_of(after));
    let listed = listed(after);
    let (old_listed, tunnel) = (self::listed(before), annotation::TUNNEL);
    let edit = |labels: &mut BTreeMap<String, String>| {
        // A label that neither version of the group knows was written by an operator, or by the node where it may.
        labels.retain(|key, _| {
            key == tunnel || listed.contains(key) || !(old.contains_key(key) || old_listed.contains(key))
        });
        for (key, value) in &new {
            if !listed.contains(key) || !labels.contains_key(key) {
                labels.insert(key.clone(), value.clone());
            }
        }
    };
    edit(&mut followed.spec.labels);
    edit(&mut followed.metadata.labels);
    let (spec, template) = (&mut followed.spec, &after.spec.template);
    spec.ports.clone_from(&template.ports);
    spec.locality.clone_from(&template.locality);
    spec.weight = template.weight;
    let checks = annotation::HEALTH_CHECKS_ENABLED;
    match &after.spec.probe {
        Some(_) => drop(followed.metadata.annotations.insert(checks.into(), "true".into())),
        None => drop(followed.metadata.annotations.remove(checks)),
    }
    followed
}

/// Labels that a group gives its members.
fn labels_of(group: &Object<WorkloadGroupSpec>) -> BTreeMap<String, String> {
    let mut labels = group.spec.template.labels.clone();
    labels.extend(group.spec.metadata.labels.clone());
    labels
}

/// Label keys that a node may set itself.
fn listed(group: &Object<WorkloadGroupSpec>) -> BTreeSet<String> {
    let text = group.metadata.annotations.get(annotation::NODE_LABELS);
    text.map(|text| text.split(',').map(|key| key.trim().to_owned()).collect())
        .unwrap_or_default()
}

/// Host names of the services of the same namespace that select the entry.
pub(super) fn hostnames(entry: &Object<WorkloadEntrySpec>, services: &[Resource]) -> Vec<String> {
    let mut hosts = Vec::new();
    for resource in services {
        let Resource::ServiceEntry(service) = resource else {
            continue;
        };
        let Some(selector) = &service.spec.workload_selector else {
            continue;
        };
        let selects = |(key, value)| entry.spec.labels.get(key) == Some(value);
        if !selector.labels.is_empty() && selector.labels.iter().all(selects) {
            hosts.extend(service.spec.hosts.iter().cloned());
        }
    }
    hosts.sort();
    hosts.dedup();
    hosts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group() -> Object<WorkloadGroupSpec> {
        let mut spec = WorkloadGroupSpec::default();
        spec.template.labels = [("app", "catalog"), ("tier", "x")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        spec.template.service_account = "catalog".into();
        spec.template.ports = [("http".to_owned(), 8080)].into();
        spec.metadata.labels = [("tier".to_owned(), "back".to_owned())].into();
        let mut metadata = Metadata::named("shop", "catalog");
        metadata.annotations = [(annotation::NODE_LABELS.to_owned(), "zone, rack".to_owned())].into();
        Object::<WorkloadGroupSpec>::new(metadata, spec)
    }

    #[test]
    fn a_node_cannot_become_an_endpoint_of_something_else() {
        let labels = [
            ("rack", "r1"),
            ("app", "payments"),
            ("zone", "no good!"),
            ("tier", "front"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into();
        let (entry, warnings) = make(&group(), DeviceId(0xab), &labels, "2026-01-01T00:00:00Z");
        assert_eq!(entry.metadata.name, "catalog-00000000000000ab");
        let want = [
            ("app", "catalog"),
            ("tier", "back"),
            ("rack", "r1"),
            ("networking.istio.io/tunnel", "http"),
        ];
        assert_eq!(
            entry.spec.labels,
            want.map(|(k, v)| (k.to_owned(), v.to_owned())).into()
        );
        assert_eq!(entry.metadata.labels, entry.spec.labels);
        assert_eq!(
            (entry.spec.service_account.as_str(), entry.spec.ports["http"]),
            ("catalog", 8080)
        );
        assert_eq!(warnings.len(), 3);
        assert!(warnings.iter().all(|w| w.starts_with("TMB0132")), "{warnings:?}");
        assert_eq!(
            entry.metadata.annotations[annotation::AUTO_REGISTRATION_GROUP],
            "catalog"
        );
    }

    #[test]
    fn members_follow_their_group() {
        let labels = [("rack", "r1"), ("zone", "z1")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        let (mut entry, _) = make(&group(), DeviceId(1), &labels, "2026-01-01T00:00:00Z");
        entry.spec.address = "10.0.0.1".into();
        entry.spec.labels.insert("mine".into(), "x".into());
        let mut after = group();
        after
            .metadata
            .annotations
            .insert(annotation::NODE_LABELS.into(), "rack".into());
        after.spec.template.labels = [("app", "catalog"), ("new", "n")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        after.spec.metadata.labels.clear();
        after.spec.template.ports = [("http".to_owned(), 9090)].into();
        after.spec.template.service_account = "other".into();
        let followed = follow(&group(), &after, &entry);
        let want = [
            ("app", "catalog"),
            ("new", "n"),
            ("rack", "r1"),
            ("mine", "x"),
            (annotation::TUNNEL, "http"),
        ];
        assert_eq!(
            followed.spec.labels,
            want.map(|(k, v)| (k.to_owned(), v.to_owned())).into()
        );
        assert_eq!(followed.spec.ports["http"], 9090);
        assert_eq!(
            (
                followed.spec.address.as_str(),
                followed.spec.service_account.as_str()
            ),
            ("10.0.0.1", "catalog")
        );
        assert_eq!(
            follow(&group(), &group(), &make(&group(), DeviceId(1), &labels, "x").0)
                .spec
                .labels["zone"],
            "z1"
        );
    }

    #[test]
    fn names_stay_within_the_limit_and_keep_the_device() {
        assert_eq!(
            name("catalog", DeviceId(1), "net-2"),
            "catalog-0000000000000001-net-2"
        );
        let long = name(&"g".repeat(253), DeviceId(1), "");
        assert!(long.len() <= NAME_MAX && long.ends_with("-0000000000000001"));
    }
}
