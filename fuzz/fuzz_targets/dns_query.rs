//! Bytes that claim to be a DNS query never panic, and a reply is one that the asker takes for its own.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::net::IpAddr;
use tombolo_dns::{Addresses, Answer, Client, Names, answer, servfail};

struct Mesh;

impl Names for Mesh {
    fn find(&self, host: &str, _: &str) -> Option<Addresses> {
        let v4 = |count: u8| (0..count).map(|n| [240, 240, 0, n].into()).collect();
        match host {
            "catalog.shop.svc.mesh.internal" => Some(Addresses { v4: v4(1), ..Addresses::default() }),
            "many.shop.svc.mesh.internal" => Some(Addresses { v4: v4(200), headless: true, ..Addresses::default() }),
            _ => None,
        }
    }
    fn is_mesh_name(&self, host: &str) -> bool {
        host.ends_with("mesh.internal")
    }
    fn mesh_domain(&self) -> &str {
        "mesh.internal"
    }
    fn is_mesh_address(&self, address: IpAddr) -> bool {
        matches!(address, IpAddr::V4(v4) if v4.octets()[0] == 240)
    }
    fn host_of(&self, _: IpAddr) -> Option<String> {
        Some("catalog.shop.svc.mesh.internal".to_owned())
    }
}

fuzz_target!(|bytes: &[u8]| {
    let search = ["shop.svc.mesh.internal".to_owned(), "corp.example".to_owned()];
    for udp in [true, false] {
        let client = Client { namespace: "shop", search: &search, udp };
        if let Answer::Reply(reply) = answer(bytes, &Mesh, &client, 1) {
            assert!(reply.len() >= 12 && reply[..2] == bytes[..2] && reply[2] & 0x80 != 0);
            assert!(!udp || reply.len() <= 1232);
        }
    }
    let _ = servfail(bytes);
});
