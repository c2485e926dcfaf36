use super::*;
use crate::route::Reach;
use tombolo_destination::Workload;

fn endpoints(capacities: &[u32]) -> Vec<Endpoint> {
    let one = |(n, &capacity): (usize, &u32)| {
        let uid = format!("e{n}");
        let mut workload = Workload::new(uid.as_str(), "mesh.example".parse().unwrap(), "shop", "catalog");
        workload.capacity = capacity;
        Endpoint {
            workload: Arc::new(workload),
            reach: Reach::Dial("10.0.0.1:15008".parse().unwrap()),
        }
    };
    capacities.iter().enumerate().map(one).collect()
}

fn first(balance: &Balance, all: &[Endpoint], now: Instant) -> String {
    balance.order(all.to_vec(), now)[0]
        .endpoint
        .workload
        .uid
        .to_string()
}

/// How many of `count` calls that stay open each endpoint gets.
fn held(balance: &Arc<Balance>, all: &[Endpoint], count: usize, now: Instant) -> (Vec<usize>, Vec<Open>) {
    let mut got = vec![0; all.len()];
    let open = (0..count)
        .map(|_| {
            let uid = first(balance, all, now);
            got[uid[1..].parse::<usize>().unwrap()] += 1;
            balance.open(&uid.as_str().into())
        })
        .collect();
    (got, open)
}

#[tokio::test]
async fn calls_are_shared_by_capacity() {
    let balance = Arc::new(Balance::default());
    let now = Instant::now();
    let (got, open) = held(&balance, &endpoints(&[1, 1, 1]), 30, now);
    assert_eq!(got, [10, 10, 10]);
    drop(open);
    let (got, open) = held(&balance, &endpoints(&[1, 3]), 40, now);
    assert_eq!(got, [10, 30]);
    drop(open);
    assert!(balance.seen().is_empty(), "nothing is left of it");
    // Calls that end at once go round.
    let all = endpoints(&[1, 1]);
    let round: Vec<_> = (0..4).map(|_| first(&balance, &all, now)).collect();
    assert!(round[0] != round[1] && round[0] == round[2], "{round:?}");
}

#[tokio::test]
async fn one_that_fails_rests_longer_each_time_and_the_others_serve() {
    let balance = Arc::new(Balance::default());
    let all = endpoints(&[1, 1]);
    let bad: Arc<str> = "e0".into();
    let mut now = Instant::now();
    for rest in [1, 2, 4, 8, 16, 30, 30] {
        balance.failed(&bad, now);
        balance.failed(&bad, now); // at the same time: counts once
        let almost = now + Duration::from_secs(rest) - Duration::from_millis(1);
        for _ in 0..4 {
            assert_eq!(first(&balance, &all, almost), "e1", "{rest}");
        }
        assert_eq!(balance.resting(almost), 1);
        // It is tried last, not never.
        assert_eq!(balance.order(all.clone(), almost).len(), 2);
        now += Duration::from_secs(rest);
        let order = balance.order(all.clone(), now);
        assert!(order[0].trial && order[0].endpoint.workload.uid == bad, "{rest}");
    }
    balance.forget(now + MEMORY - Duration::from_millis(1));
    assert_eq!(balance.seen().len(), 1);
    balance.forget(now + MEMORY);
    assert!(balance.seen().is_empty());
}

#[tokio::test]
async fn a_return_begins_with_one_call_and_is_no_flood() {
    let balance = Arc::new(Balance::default());
    let all = endpoints(&[1, 1]);
    let (bad, good): (Arc<str>, Arc<str>) = ("e0".into(), "e1".into());
    let start = Instant::now();
    balance.failed(&bad, start);
    let carried: Vec<_> = (0..100).map(|_| balance.open(&good)).collect();
    let now = start + REST_MIN;
    // Of many calls at once a single one finds out.
    let (got, trial) = held(&balance, &all, 50, now);
    assert_eq!(got, [1, 49]);
    balance.succeeded(&bad, now);
    drop(trial);
    // The other carries 100: without care the next 100 would all come here.
    let (got, open) = held(&balance, &all, 50, now);
    assert!((10..=15).contains(&got[0]), "{got:?}");
    drop(open);
    let (got, open) = held(&balance, &all, 50, now + RETURN / 2);
    assert_eq!(got, [50, 0], "half of its capacity and far fewer calls");
    drop(open);
    let (got, _open) = held(&balance, &all, 150, now + RETURN);
    assert_eq!(got, [125, 25], "as the others");
    drop(carried);
}

#[tokio::test]
async fn when_most_seem_to_fail_rests_are_not_believed() {
    let balance = Arc::new(Balance::default());
    let now = Instant::now();
    let four = endpoints(&[1; 4]);
    for uid in ["e0", "e1"] {
        balance.failed(&uid.into(), now);
    }
    let (got, open) = held(&balance, &four, 8, now);
    assert_eq!(got, [0, 0, 4, 4], "half of them serve");
    drop(open);
    balance.failed(&"e2".into(), now);
    let (got, open) = held(&balance, &four, 8, now);
    assert_eq!(got, [2, 2, 2, 2], "one alone would be flooded");
    drop(open);
    // Few endpoints are no crowd.
    let three = endpoints(&[1; 3]);
    for uid in ["e0", "e1"] {
        balance.failed(&uid.into(), now);
    }
    balance.succeeded(&"e2".into(), now);
    let (got, _open) = held(&balance, &three, 3, now + RETURN);
    assert_eq!(got[2], 1, "two rests are over: each is tried by one call");
}
