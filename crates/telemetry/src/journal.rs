use crate::messages;
use log::kv;
use std::{collections::BTreeMap, fmt::Write as _, sync::OnceLock};
use systemd_journal_logger::JournalLog;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_log::NormalizeEvent as _;
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

/// Hands each event to the journal with its fields and those of the spans around it.
pub(crate) struct JournalLayer {
    log: JournalLog,
}

impl JournalLayer {
    pub(crate) fn new(log: JournalLog) -> Self {
        Self { log }
    }
}

/// Fields by name; ordered, so that a line is the same each time.
#[derive(Default, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fields(BTreeMap<String, String>);

impl kv::Source for Fields {
    fn visit<'kvs>(&'kvs self, visitor: &mut dyn kv::VisitSource<'kvs>) -> Result<(), kv::Error> {
        self.0.iter().try_for_each(|(key, value)| {
            visitor.visit_pair(kv::Key::from_str(key), kv::Value::from(value.as_str()))
        })
    }
}

/// Identity of this process in the mesh: the field IDENTITY of every line from then on.
static IDENTITY: OnceLock<String> = OnceLock::new();

/// Says who this process is. The first word counts: a process is one identity for as long as it lives.
pub(crate) fn identify(identity: String) {
    let _ = IDENTITY.set(identity);
}

impl Fields {
    /// Adds what people filter by: MESSAGE_ID and CODE, and for a connection PEER, SERVICE and FLOW.
    fn complete(&mut self, target: &str, message: &str) {
        let code = messages::code_of(message).or_else(|| messages::code_of(self.0.get("code")?));
        let id = code
            .map(messages::code_message_id)
            .or_else(|| messages::event_message_id(message));
        let mut add = |key: &str, value: Option<String>| {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                self.0.entry(key.to_owned()).or_insert(value);
            }
        };
        add("message_id", id);
        add("code", code.map(|code| code.to_string()));
        if target == "access" {
            let of = |key: &str| self.0.get(key).cloned();
            let (own, peer) = if of("direction").as_deref() == Some("inbound") {
                ("dst_identity", "src_identity")
            } else {
                ("src_identity", "dst_identity")
            };
            let flow = of("src_address").zip(of("dst_address"));
            let new = [
                ("identity", of(own)),
                ("peer", of(peer)),
                ("service", of("dst_service")),
                (
                    "flow",
                    flow.map(|(source, destination)| format!("{source}>{destination}")),
                ),
            ];
            for (key, value) in new {
                if let Some(value) = value {
                    self.0.entry(key.to_owned()).or_insert(value);
                }
            }
        }
        if let Some(identity) = IDENTITY.get() {
            self.0
                .entry("identity".to_owned())
                .or_insert_with(|| identity.clone());
        }
    }
}

/// The line that `journalctl -u` shows: the message and what it is about. Everything else is in the fields.
fn line(target: &str, event: &Collect, all: &Fields) -> String {
    const CONNECTION: [&str; 8] = [
        "direction",
        "flow",
        "peer",
        "service",
        "response_flags",
        "reason",
        "detail",
        "policy",
    ];
    let mut line = event.message.clone();
    let mut add = |key: &str, value: &str| {
        let _ = write!(line, " {key}={value}"); // writing to a String does not fail
    };
    if target == "access" {
        for key in CONNECTION {
            if let Some(value) = all.0.get(key).filter(|value| *value != "-") {
                add(key, value);
            }
        }
    } else {
        event.fields.0.iter().for_each(|(key, value)| add(key, value));
    }
    line
}

#[derive(Default)]
struct Collect {
    message: String,
    fields: Fields,
}

impl Visit for Collect {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}"); // writing to a String does not fail
        } else {
            self.fields
                .0
                .insert(field.name().to_owned(), format!("{value:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            self.fields.0.insert(field.name().to_owned(), value.to_owned());
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for JournalLayer {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        let mut collect = Collect::default();
        attributes.record(&mut collect);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(collect.fields);
        }
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, context: Context<'_, S>) {
        let mut collect = Collect::default();
        values.record(&mut collect);
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            fields.0.extend(collect.fields.0);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut all = Fields::default();
        if let Some(scope) = context.event_scope(event) {
            for span in scope.from_root() {
                if let Some(fields) = span.extensions().get::<Fields>() {
                    all.0.extend(fields.0.clone());
                }
            }
        }
        let mut collect = Collect::default();
        event.record(&mut collect);
        // An event that came through the `log` bridge carries its place as fields.
        let normalized = event.normalized_metadata();
        let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
        collect.fields.0.retain(|key, _| !key.starts_with("log."));
        all.0.extend(collect.fields.0.clone());
        all.complete(metadata.target(), &collect.message);
        let line = line(metadata.target(), &collect, &all);
        let level = match *metadata.level() {
            Level::ERROR => log::Level::Error,
            Level::WARN => log::Level::Warn,
            Level::INFO => log::Level::Info,
            Level::DEBUG => log::Level::Debug,
            Level::TRACE => log::Level::Trace,
        };
        // A full or vanished journal must not stop traffic.
        let _ = self.log.journal_send(
            &log::Record::builder()
                .level(level)
                .target(metadata.target())
                .module_path(metadata.module_path())
                .file(metadata.file())
                .line(metadata.line())
                .key_values(&all)
                .args(format_args!("{line}"))
                .build(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(target: &str, message: &str, fields: &[(&str, &str)]) -> BTreeMap<String, String> {
        let fields = fields
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let mut fields = Fields(fields.collect());
        fields.complete(target, message);
        fields.0
    }

    #[test]
    fn lines_can_be_read() {
        let event = |message: &str, fields: &[(&str, &str)]| Collect {
            message: message.to_owned(),
            fields: Fields(
                fields
                    .iter()
                    .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                    .collect(),
            ),
        };
        let away = event("no control stream", &[("code", "TMB0302"), ("cause", "refused")]);
        assert_eq!(
            line("x", &away, &away.fields),
            "no control stream cause=refused code=TMB0302"
        );
        let failed = event(
            "connection failed",
            &[
                ("reason", "policy_denied"),
                ("bytes_sent", "7"),
                ("response_flags", "-"),
            ],
        );
        assert_eq!(
            line("access", &failed, &failed.fields),
            "connection failed reason=policy_denied"
        );
    }

    #[test]
    fn lines_can_be_found_by_what_they_are_about() {
        let own = [
            ("src_identity", "spiffe://m/ns/a/sa/web"),
            ("dst_identity", "spiffe://m/ns/a/sa/db"),
            ("dst_service", "db.a.svc.mesh.internal"),
            ("src_address", "10.0.0.2:4000"),
            ("dst_address", "240.240.0.1:80"),
        ];
        for (direction, peer) in [("inbound", "web"), ("outbound", "db")] {
            let line = [&own[..], &[("direction", direction)]].concat();
            let line = completed("access", "connection failed", &line);
            assert!(
                line["peer"].ends_with(peer) && !line["identity"].ends_with(peer),
                "{line:?}"
            );
            assert_eq!(line["service"], "db.a.svc.mesh.internal");
            assert_eq!(line["flow"], "10.0.0.2:4000>240.240.0.1:80");
            assert!(line["message_id"].ends_with("0e0e0002"));
        }
        let coded = completed("tombolo_agent", "TMB0307 tombolo-netd does not answer", &[]);
        assert!(coded["message_id"].ends_with("0c0d0307") && coded["code"] == "TMB0307");
        let field = completed("x", "no control stream", &[("code", "TMB0302")]);
        assert!(field["message_id"].ends_with("0c0d0302"));
        assert!(!completed("x", "anything else", &[]).contains_key("message_id"));
    }
}
