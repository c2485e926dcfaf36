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

/// Envoy as Istio sets it up for the east-west gateway of an ambient mesh: HBONE at port 443 of every address from
/// callers of `trust_domain`, an outer CONNECT to exactly `authority` goes through an internal listener to `endpoint`
/// as raw bytes, every other is not found.
///
/// Source: Istio pilot/pkg/networking/core (connect_terminate, forward_inner_connect).
pub fn envoy_east_west(state: &str, trust_domain: &str, authority: &str, endpoint: &str) -> String {
    let peer = format!("{{prefix: \"spiffe://{trust_domain}/\"}}");
    format!(
        r#"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 19000}}}}}}
{INTERNAL}
static_resources:
  listeners:
  - name: connect_terminate
    address: {{socket_address: {{address: 0.0.0.0, port_value: 443}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: connect_terminate
          codec_type: HTTP2
          http2_protocol_options: {{allow_connect: true, max_concurrent_streams: 100}}
          upgrade_configs: [{{upgrade_type: CONNECT}}]
          route_config:
            virtual_hosts:
            - name: inner
              domains: ["{authority}"]
              routes:
              - match: {{connect_matcher: {{}}}}
                route: {{cluster: inner, timeout: 0s, upgrade_configs: [{{upgrade_type: CONNECT, connect_config: {{}}}}]}}
          http_filters: [{{name: router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]
      transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
{tls}
  - name: forward_inner_connect
    internal_listener: {{}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: forward_inner_connect
          cluster: endpoint
  clusters:
{inner}
{endpoint}
"#,
        tls = tls_for(12, state, &peer),
        inner = cluster("inner", &internal("forward_inner_connect"), ""),
        endpoint = cluster("endpoint", &socket(endpoint), ""),
    )
}

/// Envoy as Istio sets it up to call into another network: `127.0.0.1:19080` is tunnelled to `authority` twice, the
/// outer tunnel ends at `gateway`, the inner one at whoever has the SPIFFE id `endpoint`.
///
/// Source: Istio pilot/pkg/networking/core (inner_connect_originate, outer_connect_originate).
pub fn envoy_double_client(
    state: &str,
    (gateway, gateway_id): (&str, &str),
    authority: &str,
    endpoint: &str,
    network: &str,
) -> String {
    let exact = |id: &str| format!("{{exact: \"{id}\"}}");
    let tunnel = |name: &str, header: &str, value: &str| {
        format!(
            r#"      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: {name}
          cluster: {name}
          tunneling_config: {{hostname: "{authority}", headers_to_add: [{{header: {{key: {header}, value: "{value}"}}}}]}}"#
        )
    };
    let secure = |peer: &str| {
        format!(
            r#"    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
        common_http_protocol_options: {{max_requests_per_connection: 1}}
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
{}"#,
            tls_for(10, state, &exact(peer))
        )
    };
    format!(
        r#"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 19000}}}}}}
{INTERNAL}
static_resources:
  listeners:
  - name: out
    address: {{socket_address: {{address: 127.0.0.1, port_value: 19080}}}}
    filter_chains:
    - filters:
{inner_tunnel}
  - name: outer_tunnel
    internal_listener: {{}}
    filter_chains:
    - filters:
{outer_tunnel}
  clusters:
{inner}
{outer}
"#,
        inner_tunnel = tunnel("inner_connect_originate", "x-forwarded-network", network),
        outer_tunnel = tunnel("outer_connect_originate", "x-istio-source", "sidecar"),
        inner = cluster(
            "inner_connect_originate",
            &internal("outer_tunnel"),
            &secure(endpoint)
        ),
        outer = cluster("outer_connect_originate", &socket(gateway), &secure(gateway_id)),
    )
}

/// Envoy as a sidecar of Istio calls into another network: `127.0.0.1:19080` goes to `gateway` in TLS with this server
/// name, to a server with exactly the SPIFFE id `peer`.
///
/// Source: Istio pilot/pkg/networking/core (ISTIO_MUTUAL with SNI `outbound_.<port>_._.<host>`).
pub fn envoy_sidecar_client(state: &str, gateway: &str, server_name: &str, peer: &str) -> String {
    let secure = format!(
        r#"    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: {server_name}
        common_tls_context:
{}"#,
        sidecar(tls(10, state, peer))
    );
    sidecar_listener(
        "127.0.0.1",
        19080,
        "",
        &cluster("peer", &socket(gateway), &secure),
    )
}

/// Envoy as the sidecar that is called: TLS at `port` of every address from callers of `trust_domain`, on to `application`.
pub fn envoy_sidecar_server(state: &str, trust_domain: &str, port: u16, application: &str) -> String {
    let peer = format!("{{prefix: \"spiffe://{trust_domain}/\"}}");
    let secure = format!(
        r#"
      transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
{}"#,
        sidecar(tls_for(12, state, &peer))
    );
    sidecar_listener(
        "0.0.0.0",
        port,
        &secure,
        &cluster("peer", &socket(application), ""),
    )
}

fn sidecar(tls: String) -> String {
    tls.replace("[h2]", "[istio-peer-exchange, istio]")
}

fn sidecar_listener(address: &str, port: u16, secure: &str, cluster: &str) -> String {
    format!(
        r#"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 19000}}}}}}
static_resources:
  listeners:
  - name: sidecar
    address: {{socket_address: {{address: {address}, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: sidecar
          cluster: peer{secure}
  clusters:
{cluster}
"#
    )
}

const INTERNAL: &str = r#"bootstrap_extensions:
- name: envoy.bootstrap.internal_listener
  typed_config: {"@type": type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener}"#;

fn internal(listener: &str) -> String {
    format!("{{envoy_internal_address: {{server_listener_name: {listener}}}}}")
}

fn socket(at: &str) -> String {
    let (address, port) = at.rsplit_once(':').unwrap_or((at, "15008"));
    let address = address.trim_matches(['[', ']']);
    format!("{{socket_address: {{address: \"{address}\", port_value: {port}}}}}")
}

fn cluster(name: &str, address: &str, more: &str) -> String {
    format!(
        "  - name: {name}\n    type: STATIC\n    connect_timeout: 5s\n    load_assignment: {{cluster_name: {name}, endpoints: \
         [{{lb_endpoints: [{{endpoint: {{address: {address}}}}}]}}]}}\n{more}"
    )
}

/// The common TLS context for a peer of exactly this SPIFFE id, each line `indent` spaces in.
fn tls(indent: usize, state: &str, peer: &str) -> String {
    tls_for(indent, state, &format!("{{exact: \"{peer}\"}}"))
}

/// The same for a peer that fits a string matcher.
fn tls_for(indent: usize, state: &str, matcher: &str) -> String {
    let lines = [
        "alpn_protocols: [h2]".to_owned(),
        "tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}"
            .to_owned(),
        format!(
            "tls_certificates: [{{certificate_chain: {{filename: {state}/identity.pem}}, private_key: {{filename: {state}/identity.pem}}}}]"
        ),
        "validation_context:".to_owned(),
        format!("  trusted_ca: {{filename: {state}/roots.pem}}"),
        format!("  match_typed_subject_alt_names: [{{san_type: URI, matcher: {matcher}}}]"),
    ];
    lines.map(|line| format!("{:indent$}{line}", "")).join("\n")
}
