//! Configurations for the unmodified Envoy as an HBONE peer.

/// Envoy as HBONE client: `127.0.0.1:19080` is tunnelled with `CONNECT target` to `hbone`, with the certificate files
/// of an agent's state folder, and the server must have exactly the SPIFFE id `peer`.
pub fn envoy_client(state: &str, hbone: &str, target: &str, peer: &str) -> String {
    let (address, port) = hbone.rsplit_once(':').unwrap_or((hbone, "15008"));
    let address = address.trim_matches(['[', ']']);
    format!(
        r#"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 19000}}}}}}
static_resources:
  listeners:
  - name: out
    address: {{socket_address: {{address: 127.0.0.1, port_value: 19080}}}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: out
          cluster: peer
          tunneling_config: {{hostname: "{target}"}}
  clusters:
  - name: peer
    type: STATIC
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment: {{cluster_name: peer, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: "{address}", port_value: {port}}}}}}}}}]}}]}}
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
{tls}
"#,
        tls = tls(10, state, peer)
    )
}

/// Envoy as HBONE server on port 15008 of every address: CONNECT to any authority is forwarded to that address.
pub fn envoy_server(state: &str, peer: &str) -> String {
    format!(
        r#"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 19000}}}}}}
static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: 0.0.0.0, port_value: 15008}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: HTTP2
          http2_protocol_options: {{allow_connect: true}}
          upgrade_configs: [{{upgrade_type: CONNECT}}]
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{connect_matcher: {{}}}}
                route: {{cluster: app, timeout: 0s, upgrade_configs: [{{upgrade_type: CONNECT, connect_config: {{}}}}]}}
          http_filters: [{{name: router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]
      transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
{tls}
  clusters:
  - name: app
    type: ORIGINAL_DST
    lb_policy: CLUSTER_PROVIDED
    connect_timeout: 5s
    original_dst_lb_config: {{use_http_header: true, http_header_name: ":authority"}}
"#,
        tls = tls(12, state, peer)
    )
}

/// The common TLS context, each line `indent` spaces in.
fn tls(indent: usize, state: &str, peer: &str) -> String {
    let lines = [
        "alpn_protocols: [h2]".to_owned(),
        "tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}"
            .to_owned(),
        format!(
            "tls_certificates: [{{certificate_chain: {{filename: {state}/identity.pem}}, private_key: {{filename: {state}/identity.pem}}}}]"
        ),
        "validation_context:".to_owned(),
        format!("  trusted_ca: {{filename: {state}/roots.pem}}"),
        format!("  match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: \"{peer}\"}}}}]"),
    ];
    lines.map(|line| format!("{:indent$}{line}", "")).join("\n")
}
