//! A cluster of three nodes under load, of which one after the other is killed and comes back.
//! `make cluster` kills each; `make test` kills one.

use crate::chaos::{Tally, from_environment, load};
use crate::support::{Caller, PATIENCE, fibrpc, root, run, server, unique};
use fibrpc::{ClientStats, Retry};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const NODES: usize = 3;

/// How long the load runs undisturbed before a node is killed and after it is back.
const CALM: Duration = Duration::from_secs(2);

/// Each call's deadline: longer than it takes to find out that a node is dead, to connect to
/// another, and to elect a new leader of the queue, on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(90);

/// A request that was on its way into the queue when a node died, or that the queue gave to a
/// consumer on that node, is lost where no client can see it: this is when it is sent again.
const RESEND_AFTER: Duration = Duration::from_secs(2);

/// Three nodes on this machine, gone when dropped.
struct Cluster {
    folder: tempfile::TempDir,
    urls: Vec<String>,
}

impl Cluster {
    fn start() -> Cluster {
        let mut cluster = Cluster {
            folder: tempfile::tempdir().unwrap(),
            urls: Vec::new(),
        };
        let mut settings = "cluster_formation.peer_discovery_backend = classic_config\n".to_owned();
        for node in 1..=NODES {
            settings +=
                &format!("cluster_formation.classic_config.nodes.{node} = node{node}@localhost\n");
        }
        fs::write(cluster.folder.path().join("settings"), settings).unwrap();
        for node in 1..=NODES {
            let url = cluster.script(node, &["start"]);
            cluster.urls.push(url.trim().to_owned());
        }
        let members = cluster.script(1, &["ctl", "cluster_status"]);
        assert!(members.contains("node3@localhost"), "{members}");
        cluster
    }

    /// All URLs, that of `first` in front, so that not everyone connects to the same node.
    fn url(&self, first: usize) -> String {
        let mut urls = self.urls.clone();
        urls.rotate_left(first % NODES);
        urls.join(",")
    }

    fn command(&self, node: usize, arguments: &[&str]) -> Command {
        let folder = self.folder.path();
        let mut command = Command::new(root().join("scripts/broker"));
        command
            .args(arguments)
            .env("BROKER_CLUSTER", folder)
            .env("BROKER_DIR", self.node_folder(node))
            .env("BROKER_SETTINGS", folder.join("settings"));
        command
    }

    fn node_folder(&self, node: usize) -> PathBuf {
        self.folder.path().join(format!("node{node}"))
    }

    fn script(&self, node: usize, arguments: &[&str]) -> String {
        let output = self.command(node, arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "node {node}, {arguments:?}: {said}"
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// The node that leads the queue.
    fn leader(&self, ask: usize, queue: &str) -> String {
        let all = self.script(ask, &["ctl", "-q", "list_queues", "name", "leader"]);
        let line = all.lines().find(|line| line.starts_with(queue));
        line.and_then(|line| line.split('\t').nth(1))
            .unwrap_or("?")
            .to_owned()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in 1..=NODES {
            let _ = self.command(node, &["stop"]).output();
        }
    }
}

/// When the latest answer came, and the longest time without one.
struct Pulse(Mutex<(Instant, Duration)>);

impl Pulse {
    fn start() -> Pulse {
        Pulse(Mutex::new((Instant::now(), Duration::ZERO)))
    }

    fn beat(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.1 = state.1.max(state.0.elapsed());
        state.0 = Instant::now();
    }

    /// The longest time without an answer since it was asked last.
    fn longest_gap(&self) -> Duration {
        self.beat();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut state.1)
    }
}

/// What one node's death and return looked like.
struct Failover {
    node: usize,
    led: bool,
    gap: Duration,
    back_after: Duration,
}

fn kill_and_revive(cluster: &Cluster, node: usize, queue: &str, pulse: &Pulse) -> Failover {
    thread::sleep(CALM);
    let led = cluster.leader(node, queue) == format!("node{node}@localhost");
    pulse.longest_gap();
    cluster.script(node, &["kill"]);
    thread::sleep(CALM);
    let killed = Instant::now();
    cluster.script(node, &["start"]);
    let back_after = killed.elapsed();
    thread::sleep(CALM);
    Failover {
        node,
        led,
        gap: pulse.longest_gap(),
        back_after,
    }
}

#[test]
fn a_cluster_that_loses_any_node_loses_no_call() {
    let kills = from_environment("CLUSTER_KILLS", 1).min(NODES as u64) as usize;
    let cluster = Cluster::start();
    let queue = unique("cluster");
    let arguments = [
        "--workers",
        "2",
        "--quiet",
        "--algorithm",
        "fast",
        "--queue-type",
        "quorum",
    ];
    let mut servers: Vec<_> = (0..2)
        .map(|first| server(&cluster.url(first), &queue, &arguments))
        .collect();
    let (over, pulse) = (AtomicBool::new(false), Pulse::start());
    let (failovers, tallies, stats): (Vec<Failover>, Vec<Tally>, Vec<ClientStats>) =
        thread::scope(|scope| {
            let loads: Vec<_> = (0..NODES)
                .map(|index| {
                    let (url, queue, over, pulse) = (cluster.url(index), &queue, &over, &pulse);
                    scope.spawn(move || {
                        let client = Caller::new(&url, queue, |client| {
                            client
                                .timeout(TIMEOUT)
                                .retry(Retry::Unanswered(RESEND_AFTER))
                                .wait_for_server(true)
                        });
                        let tally = load(&client, index as u64, over, || pulse.beat());
                        (tally, client.stats())
                    })
                })
                .collect();
            // Whatever happens to the nodes, the clients must come to an end.
            let failovers = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                (1..=kills)
                    .map(|node| kill_and_revive(&cluster, node, &queue, &pulse))
                    .collect()
            }));
            over.store(true, Ordering::Relaxed);
            let (tallies, stats) = loads.into_iter().map(|load| load.join().unwrap()).unzip();
            let failovers = failovers.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (failovers, tallies, stats)
        });
    println!("\n| node killed | led the queue | longest time without an answer | restarted in |");
    println!("|---|---|---|---|");
    for Failover {
        node,
        led,
        gap,
        back_after,
    } in &failovers
    {
        let led = if *led { "yes" } else { "no" };
        println!("| node{node} | {led} | {gap:.1?} | {back_after:.1?} |");
    }
    let sum = |count: fn(&Tally) -> u64| tallies.iter().map(count).sum::<u64>();
    let connections = stats.iter().map(|stats| stats.connections).sum::<u64>();
    let again = stats.iter().map(|stats| stats.republished).sum::<u64>();
    println!(
        "\n{} calls, {} answered right; {NODES} clients made {connections} connections and sent \
         {again} requests again.\n",
        sum(|tally| tally.made),
        sum(|tally| tally.right)
    );
    let failed: Vec<_> = tallies.iter().flat_map(|tally| &tally.failed).collect();
    assert_eq!(failed, Vec::<(&String, &u64)>::new());
    assert_eq!(sum(|tally| tally.wrong), 0);
    assert_eq!(sum(|tally| tally.right), sum(|tally| tally.made));
    assert!(sum(|tally| tally.right) > 100, "it was a load");
    assert!(connections > NODES as u64, "somebody had to change nodes");

    // The command fails over as well: its first URL is a node that is dead, and led the queue. What
    // is published before there is a new leader is lost, and what follows on the same channel, too.
    let leader = cluster.leader(1, &queue);
    let dead = (1..=NODES)
        .find(|node| leader == format!("node{node}@localhost"))
        .unwrap_or_else(|| panic!("no node leads the queue: {leader}"));
    cluster.script(dead, &["kill"]);
    let call = ["call", "30", "--timeout", "30s", "--resend-after", "1s"];
    let call = run(fibrpc(&cluster.url(dead - 1), &queue).args(call));
    assert!(call.stdout.contains("832040"), "{}", call.stderr);
    let status = run(fibrpc(&cluster.url(0), &queue).arg("status"));
    assert_eq!(status.code(), Some(0), "{}", status.stderr);
    for server in &mut servers {
        server.signal("TERM");
        assert!(server.wait(PATIENCE).success());
    }
}
