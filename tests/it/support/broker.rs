//! Brokers of the tests' own.

use crate::support::{eventually, root, signal};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

/// A broker of the test's own, to be killed, stopped and blocked. Gone when dropped.
pub struct PrivateBroker {
    folder: PathBuf,
    plugins: String,
    pub url: String,
    _parent: tempfile::TempDir,
}

impl PrivateBroker {
    pub fn start() -> PrivateBroker {
        PrivateBroker::configured("", &[])
    }

    /// With settings of `rabbitmq.conf`, and plugins.
    pub fn configured(settings: &str, plugins: &[&str]) -> PrivateBroker {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("broker");
        fs::write(parent.path().join("settings"), settings).unwrap();
        let mut broker = PrivateBroker {
            folder,
            plugins: plugins.join(","),
            url: String::new(),
            _parent: parent,
        };
        broker.boot();
        broker
    }

    /// Boots it, the first time or again, on the same port and with the same data.
    pub fn boot(&mut self) {
        let output = self.script(&["start"]);
        self.url = String::from_utf8(output.stdout).unwrap().trim().to_owned();
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
        String::from_utf8(self.script(&["pid"]).stdout)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }

    /// Runs rabbitmqctl; returns what it prints.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        String::from_utf8(self.script(&[&["ctl"], arguments].concat()).stdout).unwrap()
    }

    /// Runs rabbitmqctl, which may fail.
    pub fn try_ctl(&self, arguments: &[&str]) -> Output {
        self.run_script(&[&["ctl"], arguments].concat())
    }

    /// Has the broker evaluate an Erlang expression; whether it could.
    pub fn try_eval(&self, expression: &str) -> bool {
        self.run_script(&["eval", expression]).status.success()
    }

    /// Deletes every callback queue, as no operator could: they are exclusive.
    pub fn delete_callback_queues(&self) {
        self.ctl(&["eval", &format!("{DELETE_CALLBACK_QUEUES}.")]);
    }

    /// Does so several times a second, in the broker itself: rabbitmqctl takes a second to start.
    pub fn delete_callback_queues_over_and_over(&self) {
        let forever = format!(
            "register(deleter, spawn(fun() -> \
             [begin {DELETE_CALLBACK_QUEUES}, timer:sleep(300) end || _ <- lists:seq(1, 10000)] end))."
        );
        self.ctl(&["eval", &forever]);
    }

    /// Ends that.
    pub fn leave_callback_queues_alone(&self) {
        self.ctl(&["eval", "exit(whereis(deleter), kill)."]);
    }

    fn script(&self, arguments: &[&str]) -> Output {
        let output = self.run_script(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "scripts/broker {arguments:?}: {said}"
        );
        output
    }

    fn run_script(&self, arguments: &[&str]) -> Output {
        Command::new(root().join("scripts/broker"))
            .args(arguments)
            .env("BROKER_DIR", &self.folder)
            .env("BROKER_SETTINGS", self.folder.with_file_name("settings"))
            .env("BROKER_PLUGINS", &self.plugins)
            .output()
            .unwrap()
    }
}

/// An Erlang expression for the broker to evaluate.
const DELETE_CALLBACK_QUEUES: &str = "[rabbit_amqqueue:delete(Q, false, false, <<\"test\">>) || \
    Q <- rabbit_amqqueue:list(<<\"/\">>), \
    binary:match(element(4, element(2, Q)), <<\"amq.gen-\">>) =/= nomatch]";

impl Drop for PrivateBroker {
    fn drop(&mut self) {
        let _ = Command::new(root().join("scripts/broker"))
            .arg("stop")
            .env("BROKER_DIR", &self.folder)
            .env("BROKER_SETTINGS", self.folder.with_file_name("settings"))
            .env("BROKER_PLUGINS", &self.plugins)
            .output();
    }
}
