//! Brokers of the tests' own.

use crate::support::{eventually, root, signal};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::thread;

/// What each test finds in `rabbitmq.conf`, before its own settings: the defaults of those that a
/// test has changed, because a broker that is lent again keeps what its settings do not name.
const DEFAULTS: &str = "\
    channel_max = 2047\n\
    consumer_timeout = 1800000\n\
    frame_max = 131072\n\
    heartbeat = 60\n\
    max_message_size = 134217728\n";

/// The name of a node's folder, where it is the only one.
const NODE: &str = "broker";

/// Brokers that run and that no test has. A boot costs two cores three seconds, and emptying one
/// that runs a tenth of that.
static IDLE: Mutex<Vec<Node>> = Mutex::new(Vec::new());

/// A broker of the test's own, to be killed, stopped and blocked: no other test uses it at the same
/// time, and it is as empty as a new one. When dropped, it is lent to the next test, except by a
/// test that has failed.
pub struct PrivateBroker {
    node: Option<Node>,
    pub url: String,
}

/// A node of `scripts/broker`.
struct Node {
    folder: NodeFolder,
    plugins: String,
}

/// A folder in which nodes of `scripts/broker` have theirs. When it is dropped, or left behind by a
/// process that ends in whatever way, they are stopped, and it is deleted.
pub struct NodeFolder {
    path: PathBuf,
    guard: Child,
}

impl NodeFolder {
    /// `nodes` are their folders' names. Several nodes are a cluster.
    pub fn new(nodes: &[&str]) -> NodeFolder {
        let path = tempfile::tempdir().unwrap().keep();
        // It stops them when its stdin ends, which is when we drop it or do not exist any more.
        let stop = r#"cat
            for node; do BROKER_DIR=$FOLDER/$node "$0" stop; done
            rm -rf "$FOLDER""#;
        // In a session of its own, because what ends this process can be a signal to the session.
        let mut guard = Command::new("setsid");
        guard
            .args(["sh", "-c", stop])
            .arg(script())
            .args(nodes)
            .env("FOLDER", &path);
        if nodes.len() > 1 {
            guard.env("BROKER_CLUSTER", &path);
        }
        let guard = guard
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        NodeFolder { path, guard }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for NodeFolder {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

impl PrivateBroker {
    pub fn start() -> PrivateBroker {
        PrivateBroker::configured("", &[])
    }

    /// With settings of `rabbitmq.conf`, and plugins. One that has plugins has more defaults than
    /// those above; who names some gives all the settings that others who name them give.
    pub fn configured(settings: &str, plugins: &[&str]) -> PrivateBroker {
        let plugins = plugins.join(",");
        let settings = format!("{DEFAULTS}{settings}");
        while let Some(node) = Node::idle(&plugins) {
            node.write_settings(&settings);
            // One that a test has killed cannot be emptied, and is not needed any more.
            if node.run_script(&["reset"]).status.success() {
                let url = node.script(&["url"]).trim().to_owned();
                return PrivateBroker {
                    node: Some(node),
                    url,
                };
            }
        }
        let node = Node::new(plugins);
        node.write_settings(&settings);
        let mut broker = PrivateBroker {
            node: Some(node),
            url: String::new(),
        };
        broker.boot();
        broker
    }

    fn node(&self) -> &Node {
        self.node.as_ref().expect("only drop takes it")
    }

    /// Boots it, the first time or again, on the same port and with the same data.
    pub fn boot(&mut self) {
        self.url = self.script(&["start"]).trim().to_owned();
    }

    /// Crashes it.
    pub fn kill(&self) {
        self.script(&["kill"]);
    }

    /// Stops it, as a machine that hangs would; back when it really has.
    pub fn freeze(&self) {
        let pid = self.pid();
        signal(pid, "STOP");
        eventually("the broker is stopped", || {
            let state = Command::new("ps")
                .args(["-o", "stat=", "-p", &pid.to_string()])
                .output();
            state.unwrap().stdout.starts_with(b"T")
        });
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        signal(self.pid(), "CONT");
    }

    /// The Erlang VM's process.
    fn pid(&self) -> u32 {
        self.script(&["pid"]).trim().parse().unwrap()
    }

    /// Evaluates an Erlang expression in the broker ([`order`](super::order)); its value.
    pub fn eval(&self, expression: &str) -> String {
        self.script(&["eval", expression])
    }

    /// Has the broker evaluate an Erlang expression, which it may not be able to; then, why.
    pub fn try_eval(&self, expression: &str) -> Result<String, String> {
        let output = self.node().run_script(&["eval", expression]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stderr)),
        }
    }

    fn script(&self, arguments: &[&str]) -> String {
        self.node().script(arguments)
    }
}

impl Drop for PrivateBroker {
    fn drop(&mut self) {
        let node = self.node.take();
        if !thread::panicking() {
            IDLE.lock().unwrap().extend(node);
        }
    }
}

impl Node {
    /// One that runs with these plugins, and that no test has any more.
    fn idle(plugins: &str) -> Option<Node> {
        let mut idle = IDLE.lock().unwrap();
        let found = idle.iter().rposition(|node| node.plugins == plugins)?;
        Some(idle.swap_remove(found))
    }

    /// One that is not booted yet.
    fn new(plugins: String) -> Node {
        Node {
            folder: NodeFolder::new(&[NODE]),
            plugins,
        }
    }

    fn write_settings(&self, settings: &str) {
        fs::write(self.folder.path().join("settings"), settings).unwrap();
    }

    fn script(&self, arguments: &[&str]) -> String {
        let output = self.run_script(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "scripts/broker {arguments:?}: {said}"
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn run_script(&self, arguments: &[&str]) -> Output {
        Command::new(script())
            .args(arguments)
            .env("BROKER_DIR", self.folder.path().join(NODE))
            .env("BROKER_SETTINGS", self.folder.path().join("settings"))
            .env("BROKER_PLUGINS", &self.plugins)
            .output()
            .unwrap()
    }
}

fn script() -> PathBuf {
    root().join("scripts/broker")
}
