//! How much memory a large body takes. Alone in a process of its own, whose peak it measures.

use fibrpc::{Client, Request, Server};
use std::fs;

const MIB: usize = 1 << 20;
const BODY: usize = 100 * MIB;

/// What a caller, a server and the machine need beside the bodies.
const REST: usize = 30 * MIB;

fn url() -> String {
    std::env::var("FIBRPC_TEST_URL")
        .expect("these tests need a broker: run them with `make test`, or set FIBRPC_TEST_URL")
}

/// How much memory the process had in use at most since the last time, in bytes.
fn peak_since_last_time() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    fs::write("/proc/self/clear_refs", "5").unwrap();
    kib.unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn a_large_body_is_in_memory_once_at_each_side() {
    let queue = format!("fibrpc.memory.{}", std::process::id());
    let answer = |request: &Request| -> Result<Vec<u8>, fibrpc::HandlerError> {
        Ok(match request.body().len() {
            BODY => b"large".to_vec(),
            _ => vec![1; BODY],
        })
    };
    let server = Server::new(url()).unwrap().queue(&queue).workers(1);
    let serving = server.start(answer).unwrap();
    let client = Client::new(url()).unwrap();
    // Caller and server are in this process, so each of these bodies is here twice.
    peak_since_last_time();
    let reply = client.call(&queue, vec![0; BODY]).unwrap();
    assert_eq!(reply.body, b"large");
    let request = peak_since_last_time();
    assert!(request < 2 * BODY + REST, "{} MiB", request / MIB);

    peak_since_last_time();
    let reply = client.call(&queue, "").unwrap();
    assert_eq!(reply.body.len(), BODY);
    let reply = peak_since_last_time();
    assert!(reply < 2 * BODY + REST, "{} MiB", reply / MIB);
    serving.stop().unwrap();
}
