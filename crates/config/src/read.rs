use crate::{Diagnostic, Kind, Metadata, Object, Resource, nearest, typed, yaml};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Reads a YAML stream or JSON: one object per document, or a `List` of them. Strict: unknown fields and bad values are
/// refused. Warnings about what was accepted come from [`Resource::validate`].
///
/// ```
/// let text = "
/// apiVersion: networking.istio.io/v1
/// kind: ServiceEntry
/// metadata: {name: catalog, namespace: shop}
/// spec:
///   hosts: [catalog.shop.svc.mesh.internal]
///   prots: [{number: 80, name: http, protocol: HTTP}]
/// ";
/// let findings = tombolo_config::read_documents(text).unwrap_err();
/// assert_eq!(
///     findings[0].to_string(),
///     "ServiceEntry shop/catalog: spec.prots: unknown field; did you mean ports?"
/// );
/// ```
///
/// # Errors
/// With every finding of every document.
pub fn read_documents(text: &str) -> Result<Vec<Resource>, Vec<Diagnostic>> {
    let (mut resources, mut refused) = (Vec::new(), Vec::new());
    for (number, document) in yaml::documents(text)?.into_iter().enumerate() {
        for (prefix, object) in items(document) {
            let title = title(&object);
            match object_of(object).and_then(validated) {
                Ok(resource) => resources.push(resource),
                Err(findings) => refused.extend(findings.into_iter().map(|mut finding| {
                    finding.path = typed::join(&prefix, &finding.path);
                    finding.of(number, &title)
                })),
            }
        }
    }
    if refused.is_empty() {
        Ok(resources)
    } else {
        Err(refused)
    }
}

pub(crate) fn from_json(json: &Value) -> Result<Resource, Vec<Diagnostic>> {
    let found = object_of(json.clone()).and_then(validated);
    found.map_err(|findings| {
        findings
            .into_iter()
            .map(|finding| finding.of(0, &title(json)))
            .collect()
    })
}

pub(crate) fn from_stored(json: &Value) -> Result<Resource, Vec<Diagnostic>> {
    object_of(json.clone()).map_err(|findings| {
        findings
            .into_iter()
            .map(|finding| finding.of(0, &title(json)))
            .collect()
    })
}

/// Refuses what validation refuses; warnings pass.
fn validated(resource: Resource) -> Result<Resource, Vec<Diagnostic>> {
    let refused: Vec<Diagnostic> = resource
        .validate()
        .into_iter()
        .filter(|finding| !finding.warning)
        .collect();
    if refused.is_empty() {
        Ok(resource)
    } else {
        Err(refused)
    }
}

/// The objects of a document with the path of each: itself, or the items of a `List`.
fn items(document: Value) -> Vec<(String, Value)> {
    let is_list = document
        .get("kind")
        .and_then(Value::as_str)
        .is_some_and(|kind| kind.ends_with("List"));
    let mut document = document;
    let list = document
        .get_mut("items")
        .filter(|items| is_list && items.is_array())
        .map(Value::take);
    match list {
        Some(Value::Array(items)) => {
            let numbered = items.into_iter().enumerate();
            numbered
                .map(|(index, item)| (format!("items[{index}]"), item))
                .collect()
        }
        Some(_) | None => vec![(String::new(), document)],
    }
}

/// `Kind namespace/name`, as far as it can be read.
fn title(object: &Value) -> String {
    let text = |path: &str| {
        object
            .pointer(path)
            .and_then(Value::as_str)
            .map(|text| text.chars().take(64).collect())
    };
    let kind: String = text("/kind").unwrap_or_default();
    let name: String = text("/metadata/name").unwrap_or_default();
    let namespace: String = text("/metadata/namespace").unwrap_or_else(|| "default".to_owned());
    match (kind.is_empty(), name.is_empty()) {
        (false, false) if kind == Kind::Namespace.name() => format!("{kind} {name}"),
        (true, true) => String::new(),
        (true, false) => format!("{namespace}/{name}"),
        (false, true) => kind,
        (false, false) => format!("{kind} {namespace}/{name}"),
    }
}

fn object_of(json: Value) -> Result<Resource, Vec<Diagnostic>> {
    let Value::Object(fields) = json else {
        return Err(vec![Diagnostic::error(
            "",
            "must be a mapping with apiVersion, kind, metadata and spec",
        )]);
    };
    let kind = kind_of(&fields).map_err(|finding| vec![finding])?;
    let shape = Shape::of(kind, fields)?;
    Ok(match kind {
        Kind::WorkloadGroup => Resource::WorkloadGroup(shape.object()?),
        Kind::WorkloadEntry => Resource::WorkloadEntry(shape.object()?),
        Kind::ServiceEntry => Resource::ServiceEntry(shape.object()?),
        Kind::AuthorizationPolicy => Resource::AuthorizationPolicy(shape.object()?),
        Kind::PeerAuthentication => Resource::PeerAuthentication(shape.object()?),
        Kind::ServiceExport => Resource::ServiceExport(shape.object()?),
        Kind::Namespace => Resource::Namespace(shape.object()?),
        Kind::JoinToken => Resource::JoinToken(shape.object()?),
        Kind::Device => Resource::Device(shape.object()?),
    })
}

fn kind_of(fields: &Map<String, Value>) -> Result<Kind, Diagnostic> {
    let text = |field: &str| match fields.get(field) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text.as_str()),
        Some(Value::String(_) | Value::Null) | None => Err(Diagnostic::error(field, "is required")),
        Some(_) => Err(Diagnostic::error(field, "must be a string")),
    };
    let (api_version, name) = (text("apiVersion")?, text("kind")?);
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let Some(kind) = Kind::of(group, name) else {
        let by_name = Kind::ALL.into_iter().find(|kind| kind.name() == name);
        return Err(match by_name {
            Some(kind) => {
                let reason = format!(
                    "{name} is not in {api_version:.100}; write {}",
                    kind.api_version()
                );
                Diagnostic::error("apiVersion", reason)
            }
            None => {
                let known = Kind::ALL
                    .into_iter()
                    .filter(|kind| !kind.is_internal())
                    .map(Kind::name);
                let nearest = nearest(name, known.clone());
                let known: Vec<&str> = known.collect();
                let reason = format!(
                    "{name:.100} is not a kind of this mesh; known are {}",
                    known.join(", ")
                );
                Diagnostic::error("kind", reason).with_nearest(nearest)
            }
        });
    };
    if !kind.versions().contains(&version) {
        let nearest = nearest(version, kind.versions().iter().copied());
        let reason = format!(
            "{name} has no version {version:.100}; known are {}",
            kind.versions().join(", ")
        );
        return Err(Diagnostic::error("apiVersion", reason).with_nearest(nearest));
    }
    Ok(kind)
}

/// An object whose frame is read and whose spec is not.
struct Shape {
    api_version: String,
    kind: Kind,
    metadata: Result<Metadata, Vec<Diagnostic>>,
    spec: Value,
    status: Option<Value>,
    findings: Vec<Diagnostic>,
}

impl Shape {
    fn of(kind: Kind, mut fields: Map<String, Value>) -> Result<Self, Vec<Diagnostic>> {
        let mut findings = Vec::new();
        let api_version = fields
            .remove("apiVersion")
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_default();
        fields.remove("kind");
        let mut metadata = fields.remove("metadata").unwrap_or(Value::Null);
        let spec = fields.remove("spec");
        let mut status = fields.remove("status").filter(|status| !status.is_null());
        for field in fields.keys() {
            let known = ["apiVersion", "kind", "metadata", "spec", "status"];
            let mut path = String::new();
            typed::push_key(&mut path, field);
            findings.push(Diagnostic::error(path, "unknown field").with_nearest(nearest(field, known)));
        }
        if kind.is_cluster_scoped()
            && let Some(fields) = metadata.as_object_mut()
        {
            let name = fields.get("name").cloned().unwrap_or_default();
            match fields.insert("namespace".to_owned(), name.clone()) {
                Some(given) if !given.is_null() && given != name => {
                    let reason = format!("a {kind} is in no namespace: leave it out");
                    findings.push(Diagnostic::error("metadata.namespace", reason));
                }
                Some(_) | None => {}
            }
        }
        // Exporters write `creationTimestamp: null`; within a spec null would be a guess about what was meant.
        drop_nulls(&mut metadata);
        if let Some(status) = &mut status {
            drop_nulls(status);
        }
        let metadata = if metadata.is_null() {
            Err(vec![Diagnostic::error("metadata.name", "is required")])
        } else {
            typed::typed::<Metadata>(metadata)
                .map(Metadata::without_ignored)
                .map_err(|findings| under("metadata", findings))
        };
        let spec = match spec {
            Some(spec) => spec,
            None if matches!(
                kind,
                Kind::AuthorizationPolicy | Kind::PeerAuthentication | Kind::ServiceExport | Kind::Namespace
            ) =>
            {
                Value::Object(Map::new())
            }
            None => {
                findings.push(Diagnostic::error("spec", "is required"));
                Value::Null
            }
        };
        Ok(Self {
            api_version,
            kind,
            metadata,
            spec,
            status,
            findings,
        })
    }

    fn object<S: DeserializeOwned>(self) -> Result<Object<S>, Vec<Diagnostic>> {
        let mut findings = self.findings;
        let metadata = self.metadata.map_err(|found| findings.extend(found));
        let mut nulls = Vec::new();
        if findings.iter().all(|finding| finding.path != "spec") {
            find_nulls(&self.spec, "spec", &mut nulls);
        }
        let spec = if nulls.is_empty() && findings.iter().all(|finding| finding.path != "spec") {
            typed::typed::<S>(self.spec).map_err(|found| findings.extend(under("spec", found)))
        } else {
            findings.extend(nulls);
            Err(())
        };
        match (metadata, spec) {
            (Ok(metadata), Ok(spec)) if findings.is_empty() => Ok(Object {
                api_version: self.api_version,
                kind: self.kind.name().to_owned(),
                metadata,
                spec,
                status: self.status,
            }),
            _ => Err(findings),
        }
    }
}

fn under(parent: &str, findings: Vec<Diagnostic>) -> Vec<Diagnostic> {
    let placed = findings.into_iter().map(|mut finding| {
        finding.path = typed::join(parent, &finding.path);
        finding
    });
    placed.collect()
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn find_nulls(value: &Value, path: &str, found: &mut Vec<Diagnostic>) {
    match value {
        Value::Null => found.push(Diagnostic::error(
            path,
            "must not be null: write a value, {}, or leave the field out",
        )),
        Value::Object(fields) => {
            for (key, value) in fields {
                let mut path = path.to_owned();
                typed::push_key(&mut path, key);
                find_nulls(value, &path, found);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                find_nulls(item, &format!("{path}[{index}]"), found);
            }
        }
        Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
