//! The test bed itself: what the other modules take for granted.

use anyhow::Result;
use tombolo_testkit::{Lab, Nginx, Redis, require_root};

#[test]
fn hosts_reach_each_other_and_leave_nothing() -> Result<()> {
    if !require_root("netns") {
        return Ok(());
    }
    let namespace;
    {
        let mut lab = Lab::new("lab")?;
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        namespace = a.namespace().to_owned();
        let before = a.fingerprint()?;
        let _nginx = Nginx::start(&b, 8080, "hello")?;
        let _redis = Redis::start(&b, 6379)?;
        for at in [b.ipv4().to_string(), format!("[{}]", b.ipv6())] {
            assert_eq!(
                a.sh(&format!("curl -sS -m 5 http://{at}:8080/"))?
                    .checked()?
                    .stdout,
                "hello\n"
            );
        }
        let pong = a
            .sh(&format!("redis-cli -h {} ping", b.ipv4()))?
            .checked()?
            .stdout;
        assert_eq!(pong, "PONG\n");
        b.power_off()?;
        assert_ne!(
            a.sh(&format!("curl -sS -m 1 http://{}:8080/", b.at(8080)))?.code,
            0
        );
        assert_eq!(a.fingerprint()?, before);
    }
    let left = std::process::Command::new("ip")
        .args(["netns", "list"])
        .output()?;
    assert!(!String::from_utf8_lossy(&left.stdout).contains(&namespace));
    Ok(())
}
