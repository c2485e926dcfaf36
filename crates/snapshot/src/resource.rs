use std::sync::Arc;
use tombolo_proto::xds;

/// A resource that was not taken, and why: the two parts of a line of the NACK.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Resource name.
    pub name: String,
    /// Reason for people.
    pub reason: String,
}

/// A record with what is needed to name it to the server and to write it to disk.
#[derive(Debug)]
pub(crate) struct Held<T> {
    pub(crate) item: Arc<T>,
    /// Opaque, the server's.
    pub(crate) version: Box<str>,
    /// The payload as it came: fields that this program does not know survive a restart.
    pub(crate) raw: Vec<u8>,
}

impl<T> Held<T> {
    pub(crate) fn new(item: T, payload: Payload) -> Arc<Self> {
        Arc::new(Self {
            item: Arc::new(item),
            version: payload.version,
            raw: payload.raw,
        })
    }
}

/// The parts of a resource that are kept beside its record.
pub(crate) struct Payload {
    version: Box<str>,
    raw: Vec<u8>,
}

/// Checks the envelope of a resource, decodes it and gives its name, message and payload.
pub(crate) fn open<M>(type_url: &str, resource: xds::Resource) -> Result<(String, M, Payload), Rejected>
where
    M: prost::Message + Default,
{
    let name = resource.name;
    let reject = |name, reason: String| Err(Rejected { name, reason });
    let Some(any) = resource.resource else {
        return reject(name, "has no content".to_owned());
    };
    if any.type_url != type_url {
        return reject(name, format!("is of type {:?}", any.type_url));
    }
    match M::decode(any.value.as_slice()) {
        Ok(message) => Ok((
            name,
            message,
            Payload {
                version: resource.version.into(),
                raw: any.value,
            },
        )),
        Err(error) => reject(name, format!("cannot be decoded: {error}")),
    }
}

/// Refuses a resource whose name is not that of its content: it could never be removed by its name.
pub(crate) fn check_name(name: &str, content: impl std::fmt::Display) -> Result<(), String> {
    let content = content.to_string();
    if name == content {
        Ok(())
    } else {
        Err(format!("is named so, but its content is {content}"))
    }
}
