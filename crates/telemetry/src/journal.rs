use log::kv;
use std::{collections::BTreeMap, fmt::Write as _};
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
        all.0.extend(collect.fields.0);
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
                .args(format_args!("{}", collect.message))
                .build(),
        );
    }
}
