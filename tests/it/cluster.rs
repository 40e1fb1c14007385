//! A cluster of three nodes under load. The node that leads the request queue is killed and comes
//! back, again and again. Servers and clients are told nothing but the three URLs. `make cluster`
//! kills ten times, `make test` once.

use crate::chaos::{
    Event, FIRST_SERVER, History, Kind, Load, Manner, Party, Role, assert_right, from_environment,
    history_of_server, history_path, node_killed, now, under_load,
};
use crate::support::{NodeFolder, PATIENCE, fibrpc, root, run, unique};
use fibrpc::Endpoints;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const NODE_NAMES: [&str; 3] = ["node1", "node2", "node3"];
const NODES: usize = NODE_NAMES.len();

/// No request is longer than the broker takes: that is not what this is about.
const BODY_MAX: u64 = 16 << 20;

/// How long the load runs undisturbed before a node is killed and after it is back.
const CALM: Duration = Duration::from_secs(2);

/// Three nodes on this machine, gone when dropped.
struct Cluster {
    folder: NodeFolder,
    urls: Vec<String>,
}

impl Cluster {
    fn start() -> Cluster {
        let mut cluster = Cluster {
            folder: NodeFolder::new(&NODE_NAMES),
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
        self.folder.path().join(NODE_NAMES[node - 1])
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

    /// The node that leads the queue, as `ask` says.
    fn leader(&self, ask: usize, queue: &str) -> usize {
        let all = self.script(ask, &["ctl", "-q", "list_queues", "name", "leader"]);
        let line = all.lines().find(|line| line.starts_with(queue));
        let leader = line.and_then(|line| line.split('\t').nth(1));
        (1..=NODES)
            .find(|node| leader == Some(&format!("node{node}@localhost")))
            .unwrap_or_else(|| panic!("no node leads the queue: {all}"))
    }
}

/// When the latest answer came, the longest time without one, and the longest that one took.
struct Pulse(Mutex<(Instant, Duration, Duration)>);

impl Pulse {
    fn start() -> Pulse {
        Pulse(Mutex::new((Instant::now(), Duration::ZERO, Duration::ZERO)))
    }

    fn beat(&self, latency: Duration) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.1 = state.1.max(state.0.elapsed());
        state.2 = state.2.max(latency);
        state.0 = Instant::now();
    }

    /// The longest time without an answer, and the slowest answer, since it was asked last.
    fn longest(&self) -> (Duration, Duration) {
        self.beat(Duration::ZERO);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut state.1), std::mem::take(&mut state.2))
    }
}

/// What one death and return of the leader looked like.
struct Failover {
    node: usize,
    gap: Duration,
    slowest: Duration,
    back_after: Duration,
}

fn kill_and_revive(cluster: &Cluster, queue: &str, pulse: &Pulse, history: &History) -> Failover {
    thread::sleep(CALM);
    let node = cluster.leader(1, queue);
    pulse.longest();
    let back_after = node_killed(history, node, || {
        cluster.script(node, &["kill"]);
        thread::sleep(CALM);
        let killed = Instant::now();
        cluster.script(node, &["start"]);
        killed.elapsed()
    });
    thread::sleep(CALM);
    let (gap, slowest) = pulse.longest();
    Failover {
        node,
        gap,
        slowest,
        back_after,
    }
}

#[test]
fn a_cluster_that_loses_any_node_loses_no_call() {
    let kills = from_environment("CLUSTER_KILLS", 1);
    let cluster = Cluster::start();
    let queue = unique("cluster");
    let path = history_path("cluster");
    let history = History::create(&path);
    history.write(&Event::Run {
        seed: 0,
        at: now(),
        body_max: BODY_MAX,
    });
    let introduce = |party, name: String| {
        let queue = queue.clone();
        history.write(&Event::Party { party, name, queue });
    };
    let roles = [0, 1].map(|first: u8| {
        let party = FIRST_SERVER + first;
        introduce(party, format!("server {}", first + 1));
        let url_file = cluster.folder.path().join(format!("url-{first}"));
        fs::write(&url_file, cluster.url(first.into())).unwrap();
        Role {
            party,
            queue: queue.clone(),
            queue_type: Kind::Quorum,
            workers: 2,
            prefetch: 1,
            url_file,
            history: history_of_server(&path, party),
        }
    });
    let servers = roles.each_ref().map(Role::spawn);
    for server in &servers {
        server.wait_until_ready();
    }
    let load = |index: Party| {
        let party = index + 1;
        introduce(party, format!("client {party}"));
        let urls = cluster.url(index.into());
        Load {
            history: &history,
            party,
            manner: Manner::Relying,
            endpoints: Endpoints::try_from(urls).unwrap(),
            confirms: true,
            queue: queue.clone(),
            body_max: BODY_MAX,
            seed: index.into(),
        }
    };
    let loads = (0..3).map(load).collect();
    let pulse = Pulse::start();
    let (failovers, stats): (Vec<Failover>, _) = under_load(
        &history,
        loads,
        |latency| pulse.beat(latency),
        || {
            (0..kills)
                .map(|_| kill_and_revive(&cluster, &queue, &pulse, &history))
                .collect()
        },
    );
    println!("\n| leader killed | longest time without an answer | slowest call | restarted in |");
    println!("|---|---|---|---|");
    for Failover {
        node,
        gap,
        slowest,
        back_after,
    } in &failovers
    {
        println!("| node{node} | {gap:.1?} | {slowest:.1?} | {back_after:.1?} |");
    }

    let others = roles.map(|role| role.history);
    let title = format!("a cluster of three, its leader killed {kills} times");
    assert_right(history, &path, &others, &stats, &title);

    // The command fails over as well: its first URL is a node that is dead, and led the queue. What
    // is published before there is a new leader is lost, and what follows on the same channel, too.
    let leader = cluster.leader(1, &queue);
    cluster.script(leader, &["kill"]);
    let request = run(fibrpc(&cluster.url(leader - 1), &queue).args(["request", "hello"]));
    assert_eq!(request.stdout, "llohe\n", "{}", request.stderr);
    let status = run(fibrpc(&cluster.url(0), &queue).arg("status"));
    assert_eq!(status.code(), Some(0), "{}", status.stderr);
    for server in servers {
        server.stop(PATIENCE);
    }
}
