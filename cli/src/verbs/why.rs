use super::status;
use crate::{
    failure::{self, Failure},
    output::{self, Format, Output},
    sockets::{self, Sockets},
    text,
};
use serde_json::json;
use std::process::ExitCode;
use tombolo_proto::tombolo::agent::v1::{WhyRequest, WhyResponse};

/// Walk a connection that an application on this host would make: name, address, policy, endpoint, TLS, application.
/// Exits with 0 if it would be made, with 1 if a hop is broken.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// NAME:PORT or ADDRESS:PORT; IPv6 addresses in brackets.
    #[arg(value_name = "NAME:PORT")]
    target: String,
    /// The port, if it is not part of the name.
    #[arg(value_name = "PORT")]
    port: Option<u16>,
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn run(args: &Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let (host, port) = target(&args.target, args.port)?;
    let request = WhyRequest {
        host: host.clone(),
        port: u32::from(port),
    };
    let answer = sockets
        .agent()
        .await?
        .why(request)
        .await
        .map_err(sockets::agent_failure)?
        .into_inner();
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            let hops = answer.hops.iter().map(|hop| {
                let finding = hop
                    .finding
                    .as_ref()
                    .map(|finding| status::findings(std::slice::from_ref(finding)).remove(0));
                json!({"name": hop.name, "result": hop.result, "detail": hop.detail, "finding": finding})
            });
            let hops: Vec<_> = hops.collect();
            output::value(
                format,
                &json!({"host": host, "port": port, "reachable": answer.reachable, "hops": hops}),
            )?;
        }
        Format::Table | Format::Wide | Format::Name => output::print(&shown(&host, port, &answer)),
    }
    Ok(ExitCode::from(if answer.reachable {
        failure::OK
    } else {
        failure::ERROR
    }))
}

fn target(text: &str, port: Option<u16>) -> Result<(String, u16), Failure> {
    let usage = || {
        Failure::usage(format!(
            "{text:?}: write NAME:PORT, for example catalog.shop.svc.mesh.internal:80"
        ))
    };
    let text = text.rsplit("://").next().unwrap_or(text).trim_end_matches('/');
    let (host, port) = match port {
        Some(port) => (text, port),
        None => {
            let (host, port) = text.rsplit_once(':').ok_or_else(usage)?;
            (host, port.parse().map_err(|_| usage())?)
        }
    };
    let host = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(host);
    let bare_v6 = host.contains(':') && host.parse::<std::net::IpAddr>().is_err();
    if host.is_empty() || port == 0 || bare_v6 {
        Err(usage())
    } else {
        Ok((host.to_owned(), port))
    }
}

fn shown(host: &str, port: u16, answer: &WhyResponse) -> String {
    let mut shown = String::new();
    for hop in &answer.hops {
        let mark = match hop.result.as_str() {
            "ok" => "ok    ",
            "broken" => "BROKEN",
            _ => "-     ",
        };
        shown.push_str(&format!("  {mark}  {:<12} {}\n", hop.name, hop.detail));
        if let Some(finding) = &hop.finding {
            shown.push_str(&text::indented(&status::finding(finding), 23));
        }
    }
    let verdict = if answer.reachable {
        "can be reached from here"
    } else {
        "cannot be reached from here"
    };
    shown.push_str(&format!("{host}:{port} {verdict}\n"));
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use tombolo_proto::tombolo::agent::v1::{Finding, Hop};

    #[test]
    fn targets() {
        for (text, port, expected) in [
            ("a.b:80", None, Some(("a.b", 80))),
            ("http://a.b:80/", None, Some(("a.b", 80))),
            ("a.b", Some(80), Some(("a.b", 80))),
            ("[2001:2::1]:80", None, Some(("2001:2::1", 80))),
            ("2001:2::1", Some(80), Some(("2001:2::1", 80))),
            ("240.240.0.1:443", None, Some(("240.240.0.1", 443))),
            ("a.b", None, None),
            ("a.b:x", None, None),
            ("a.b:0", None, None),
            (":80", None, None),
            ("a:b:80", None, None),
        ] {
            let found = target(text, port).ok();
            assert_eq!(
                found.as_ref().map(|(host, port)| (host.as_str(), *port)),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn the_broken_hop_stands_out() {
        let hop = |name: &str, result: &str, finding: Option<Finding>| Hop {
            name: name.into(),
            result: result.into(),
            detail: "d".into(),
            finding,
        };
        let finding = Finding {
            code: "TMB0404".into(),
            severity: "error".into(),
            cause: "shop/no".into(),
            next: "n".into(),
        };
        let answer = WhyResponse {
            hops: vec![
                hop("name", "ok", None),
                hop("policy", "broken", Some(finding)),
                hop("tls", "skipped", None),
            ],
            reachable: false,
        };
        let text = shown("a.b", 80, &answer);
        assert!(
            text.contains("  ok      name")
                && text.contains("  BROKEN  policy")
                && text.contains("  -       tls"),
            "{text}"
        );
        assert!(
            text.contains("TMB0404 error: shop/no") && text.ends_with("a.b:80 cannot be reached from here\n"),
            "{text}"
        );
    }
}
