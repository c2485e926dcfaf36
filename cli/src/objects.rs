use crate::{failure::Failure, output::Table, text};
use serde_json::Value;
use tombolo_config::{Kind, Resource};
use tombolo_control_client::host;
use tombolo_proto::tombolo::admin::v1::{
    Applied, ApplyRequest, GetRequest, ListRequest, Object, admin_client::AdminClient,
};
use tonic::transport::Channel;

/// Objects of one page.
const PAGE: u32 = 500;

pub(crate) type Admin = AdminClient<Channel>;

/// What is addressed on a command line: a kind, and a name or all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) kind: Kind,
    pub(crate) name: Option<String>,
}

/// Reads `KIND`, `KIND,KIND`, `KIND NAME...`, `KIND/NAME...`.
pub(crate) fn targets(words: &[String]) -> Result<Vec<Target>, Failure> {
    let kind = |text: &str| Kind::find(text).map_err(|error| Failure::usage(error.to_string()));
    let Some(first) = words.first() else {
        return Err(Failure::usage("a kind is missing, for example se"));
    };
    if words.iter().any(|word| word.contains('/')) {
        return words
            .iter()
            .map(|word| match word.split_once('/') {
                Some((of, name)) if !name.is_empty() && !name.contains('/') => Ok(Target {
                    kind: kind(of)?,
                    name: Some(name.to_owned()),
                }),
                _ => Err(Failure::usage(format!(
                    "{word:?} is not KIND/NAME; do not mix it with KIND NAME"
                ))),
            })
            .collect();
    }
    let kinds: Result<Vec<_>, _> = first.split(',').map(kind).collect();
    let (kinds, names) = (kinds?, &words[1..]);
    if names.is_empty() {
        return Ok(kinds
            .into_iter()
            .map(|kind| Target { kind, name: None })
            .collect());
    }
    let [kind] = kinds.as_slice() else {
        return Err(Failure::usage("names need one kind, or KIND/NAME for each"));
    };
    Ok(names
        .iter()
        .map(|name| Target {
            kind: *kind,
            name: Some(name.clone()),
        })
        .collect())
}

/// `serviceentry.networking.istio.io/catalog`.
pub(crate) fn title(kind: Kind, name: &str) -> String {
    if kind.group().is_empty() {
        return format!("{}/{name}", kind.name().to_ascii_lowercase());
    }
    format!("{}.{}/{name}", kind.name().to_ascii_lowercase(), kind.group())
}

/// The JSON of an object.
pub(crate) fn json(object: &Object) -> Result<Value, Failure> {
    serde_json::from_str(&object.json)
        .map_err(|error| Failure::plain(format!("discovery sent a broken object: {error}")))
}

/// One object.
pub(crate) async fn get(
    admin: &mut Admin,
    kind: Kind,
    namespace: &str,
    name: &str,
) -> Result<Value, Failure> {
    let request = GetRequest {
        kind: kind.name().to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    json(&admin.get(request).await?.into_inner())
}

/// All objects of a kind; an empty namespace is all of them.
pub(crate) async fn list(admin: &mut Admin, kind: Kind, namespace: &str) -> Result<Vec<Value>, Failure> {
    let mut request = ListRequest {
        kind: kind.name().to_owned(),
        namespace: if kind.is_cluster_scoped() { "" } else { namespace }.to_owned(),
        limit: PAGE,
        ..Default::default()
    };
    let mut found = Vec::new();
    loop {
        let page = admin.list(request.clone()).await?.into_inner();
        for item in &page.items {
            found.push(json(item)?);
        }
        if page.continue_token.is_empty() {
            return Ok(found);
        }
        request.continue_token = page.continue_token;
    }
}

/// Writes a batch: all or none.
pub(crate) async fn apply(
    admin: &mut Admin,
    resources: &[Resource],
    dry_run: bool,
    create_only: bool,
) -> Result<Vec<Applied>, Failure> {
    let objects = resources
        .iter()
        .map(|resource| Object {
            json: resource.to_json().to_string(),
        })
        .collect();
    Ok(admin
        .apply(ApplyRequest {
            objects,
            dry_run,
            create_only,
        })
        .await?
        .into_inner()
        .applied)
}

/// Text at a JSON pointer, empty if there is none.
pub(crate) fn at<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

fn list_at(object: &Value, pointer: &str) -> String {
    let items = object
        .pointer(pointer)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    items
        .iter()
        .filter_map(Value::as_str)
        .collect::<Vec<_>>()
        .join(",")
}

fn map_at(object: &Value, pointer: &str) -> String {
    let Some(map) = object.pointer(pointer).and_then(Value::as_object) else {
        return String::new();
    };
    let shown = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    map.iter()
        .map(|(key, value)| format!("{key}={}", shown(value)))
        .collect::<Vec<_>>()
        .join(",")
}

/// The status of a condition, empty if there is none of that type.
fn condition(object: &Value, kind: &str) -> String {
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
    let found = conditions
        .into_iter()
        .flatten()
        .find(|condition| at(condition, "/type") == kind);
    found.map_or_else(String::new, |condition| at(condition, "/status").to_owned())
}

fn service_ports(object: &Value) -> String {
    let ports = object
        .pointer("/spec/ports")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    let shown = |port: &Value| {
        let number = |key| port.get(key).and_then(Value::as_u64).filter(|n| *n > 0);
        let target = number("targetPort").map_or_else(String::new, |target| format!(":{target}"));
        format!("{}={}{target}", at(port, "/name"), number("number").unwrap_or(0))
    };
    ports.iter().map(shown).collect::<Vec<_>>().join(",")
}

fn virtual_addresses(object: &Value) -> String {
    let addresses = object
        .pointer("/status/addresses")
        .and_then(Value::as_array)
        .map(Vec::as_slice);
    addresses
        .unwrap_or_default()
        .iter()
        .map(|address| at(address, "/value"))
        .collect::<Vec<_>>()
        .join(",")
}

type Column = (&'static str, fn(&Value) -> String);

/// Columns between NAME and AGE, and those that -o wide adds.
fn columns(kind: Kind) -> (&'static [Column], &'static [Column]) {
    match kind {
        Kind::WorkloadGroup => (
            &[
                ("SERVICE-ACCOUNT", |o| {
                    at(o, "/spec/template/serviceAccount").to_owned()
                }),
                ("PORTS", |o| map_at(o, "/spec/template/ports")),
            ],
            &[
                ("NETWORK", |o| at(o, "/spec/template/network").to_owned()),
                ("LABELS", |o| map_at(o, "/spec/metadata/labels")),
            ],
        ),
        Kind::WorkloadEntry => (
            &[
                ("ADDRESS", |o| at(o, "/spec/address").to_owned()),
                ("HEALTHY", |o| condition(o, "Healthy")),
            ],
            &[
                ("SERVICE-ACCOUNT", |o| at(o, "/spec/serviceAccount").to_owned()),
                ("NETWORK", |o| at(o, "/spec/network").to_owned()),
                ("LABELS", |o| map_at(o, "/spec/labels")),
            ],
        ),
        Kind::ServiceEntry => (
            &[
                ("HOSTS", |o| list_at(o, "/spec/hosts")),
                ("PORTS", service_ports),
                ("VIPS", virtual_addresses),
            ],
            &[
                ("LOCATION", |o| at(o, "/spec/location").to_owned()),
                ("RESOLUTION", |o| at(o, "/spec/resolution").to_owned()),
                ("SELECTOR", |o| map_at(o, "/spec/workloadSelector/labels")),
                ("EXPORTED", |o| condition(o, "Exported")),
            ],
        ),
        Kind::ServiceExport => (
            &[
                ("VALID", |o| condition(o, "Valid")),
                ("READY", |o| condition(o, "Ready")),
                ("CONFLICT", |o| condition(o, "Conflict")),
            ],
            &[],
        ),
        Kind::Namespace => (
            &[("GLOBAL", |o| {
                let labels = o.pointer("/metadata/labels");
                let label = labels.and_then(|labels| labels.get(tombolo_config::annotation::GLOBAL));
                label.and_then(Value::as_str).unwrap_or_default().to_owned()
            })],
            &[("LABELS", |o| map_at(o, "/metadata/labels"))],
        ),
        Kind::AuthorizationPolicy => (
            &[("ACTION", |o| match at(o, "/spec/action") {
                "" => "ALLOW".to_owned(),
                action => action.to_owned(),
            })],
            &[("SELECTOR", |o| map_at(o, "/spec/selector/matchLabels"))],
        ),
        Kind::PeerAuthentication => (
            &[("MODE", |o| at(o, "/spec/mtls/mode").to_owned())],
            &[("SELECTOR", |o| map_at(o, "/spec/selector/matchLabels"))],
        ),
        Kind::JoinToken => (
            &[
                ("GROUP", |o| at(o, "/spec/workloadGroup").to_owned()),
                ("USED", |o| {
                    let used = o
                        .pointer("/status/used")
                        .and_then(Value::as_array)
                        .map_or(0, Vec::len);
                    format!(
                        "{used}/{}",
                        o.pointer("/spec/uses").and_then(Value::as_u64).unwrap_or(0)
                    )
                }),
                ("EXPIRES", |o| {
                    match tombolo_config::unix_ms(at(o, "/spec/expires")) {
                        Some(expires) => text::relative(expires, host::now_unix_ms()),
                        None => String::new(),
                    }
                }),
            ],
            &[("CIDR", |o| list_at(o, "/spec/cidr"))],
        ),
        Kind::Device => (&[], &[]),
    }
}

/// A table of objects of one kind. `prefix` writes the kind before each name, as kubectl does for several kinds.
pub(crate) fn table(kind: Kind, objects: &[Value], namespaces: bool, wide: bool, prefix: bool) -> Table {
    let (narrow, more) = columns(kind);
    let columns = || narrow.iter().chain(if wide { more } else { &[] });
    let mut header = if namespaces {
        vec!["NAMESPACE", "NAME"]
    } else {
        vec!["NAME"]
    };
    header.extend(columns().map(|column| column.0));
    header.push("AGE");
    let mut table = Table::new(&header);
    for object in objects {
        let name = at(object, "/metadata/name");
        let mut cells = if namespaces {
            vec![at(object, "/metadata/namespace").to_owned()]
        } else {
            vec![]
        };
        cells.push(if prefix {
            title(kind, name)
        } else {
            name.to_owned()
        });
        cells.extend(columns().map(|column| column.1(object)));
        let created = tombolo_config::unix_ms(at(object, "/metadata/creationTimestamp"));
        cells.push(created.map_or_else(
            || "<unknown>".to_owned(),
            |at| text::age(host::now_unix_ms() - at),
        ));
        table.row(cells);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn kubectls_ways_to_name_things() {
        let found = |text: &str| {
            let targets = targets(&words(text)).map_err(|failure| failure.exit());
            targets.map(|all| {
                all.iter()
                    .map(|t| format!("{} {}", t.kind, t.name.as_deref().unwrap_or("*")))
                    .collect::<Vec<_>>()
            })
        };
        for (text, expected) in [
            ("se", &["ServiceEntry *"][..]),
            ("se,workloadgroups", &["ServiceEntry *", "WorkloadGroup *"]),
            ("ap a b", &["AuthorizationPolicy a", "AuthorizationPolicy b"]),
            ("we/a wg/b", &["WorkloadEntry a", "WorkloadGroup b"]),
            ("serviceentries.networking.istio.io x", &["ServiceEntry x"]),
        ] {
            assert_eq!(
                found(text).as_deref(),
                Ok(expected
                    .iter()
                    .map(|s| (*s).to_owned())
                    .collect::<Vec<_>>()
                    .as_slice())
            );
        }
        for bad in [
            "",
            "nosuchkind",
            "se,we name",
            "se/a name",
            "se/",
            "se/a/b",
            "device",
        ] {
            assert_eq!(found(bad), Err(2), "{bad}");
        }
    }

    #[test]
    fn tables_of_kinds() {
        let entry = serde_json::json!({
            "kind": "WorkloadEntry",
            "metadata": {"name": "catalog-1", "namespace": "shop", "creationTimestamp": tombolo_config::rfc3339(host::now_unix_ms() - 3_600_000)},
            "spec": {"address": "10.0.0.1", "labels": {"app": "catalog"}},
            "status": {"conditions": [{"type": "Healthy", "status": "True"}]}
        });
        let lines = |wide, namespaces, prefix| {
            let text = table(
                Kind::WorkloadEntry,
                std::slice::from_ref(&entry),
                namespaces,
                wide,
                prefix,
            )
            .render();
            text.lines()
                .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            lines(false, false, false),
            ["NAME ADDRESS HEALTHY AGE", "catalog-1 10.0.0.1 True 60m"]
        );
        assert_eq!(
            lines(true, true, true),
            [
                "NAMESPACE NAME ADDRESS HEALTHY SERVICE-ACCOUNT NETWORK LABELS AGE",
                "shop workloadentry.networking.istio.io/catalog-1 10.0.0.1 True <none> <none> app=catalog 60m"
            ]
        );
        let service = serde_json::json!({"metadata": {"name": "catalog"}, "spec": {
            "hosts": ["catalog.shop.svc.mesh.internal"],
            "ports": [{"name": "http", "number": 80, "targetPort": 8080}, {"name": "x", "number": 1}]
        }, "status": {"addresses": [{"value": "240.240.0.1"}, {"value": "2001:2::1"}]}});
        let text = table(Kind::ServiceEntry, &[service], false, false, false).render();
        for cell in ["http=80:8080,x=1", "240.240.0.1,2001:2::1", "<unknown>"] {
            assert!(text.contains(cell), "{text}");
        }
        let token = serde_json::json!({"metadata": {"name": "00"}, "spec": {"workloadGroup": "catalog", "uses": 2,
            "expires": tombolo_config::rfc3339(host::now_unix_ms() - 60_500)}, "status": {"used": ["x"]}});
        let text = table(Kind::JoinToken, &[token], false, true, false).render();
        assert!(text.contains("1/2") && text.contains("60s ago"), "{text}");
    }
}
