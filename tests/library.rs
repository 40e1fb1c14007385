//! The library alone, as a program without our command uses it: this file builds and passes with
//! any set of features.

use crossbeam_channel::{Sender, bounded};
use fibrpc::{
    Client, ClientConfig, Error, RemoteError, RemoteErrorKind, Request, Server, ServerConfig,
    Status, WaitingFor,
};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);

fn url() -> String {
    std::env::var("FIBRPC_TEST_URL")
        .expect("these tests need a broker: run them with `make test`, or set FIBRPC_TEST_URL")
}

fn unique(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("fibrpc.library.{name}.{}.{count}", std::process::id())
}

struct Running {
    stop: Sender<()>,
    serving: JoinHandle<Result<fibrpc::ServerStats, Error>>,
}

fn serve(
    queue: &str,
    workers: usize,
    handler: impl Fn(Request) -> Result<Vec<u8>, RemoteError> + Send + Sync + 'static,
) -> Running {
    let mut config = ServerConfig::default();
    config.endpoints = url().parse().unwrap();
    config.queue = queue.to_owned();
    config.workers = workers;
    let server = Server::new(config).unwrap();
    let (stop, stopped) = bounded(0);
    let (ready, is_ready) = bounded(1);
    let serving = thread::spawn(move || server.run(handler, || _ = ready.try_send(()), stopped));
    is_ready
        .recv_timeout(PATIENCE)
        .expect("the server is ready");
    Running { stop, serving }
}

fn client(queue: &str, timeout: Duration) -> Client {
    let mut config = ClientConfig::default();
    config.endpoints = url().parse().unwrap();
    config.queue = queue.to_owned();
    config.timeout = timeout;
    Client::new(config).unwrap()
}

#[test]
fn a_function_of_ones_own_is_called_from_many_threads() {
    let queue = unique("echo");
    let running = serve(&queue, 4, |request| Ok(request.body.to_ascii_uppercase()));
    let client = client(&queue, PATIENCE);
    thread::scope(|scope| {
        for thread in 0..8 {
            let client = client.clone();
            scope.spawn(move || {
                for call in 0..100 {
                    let answer = client.call(format!("t{thread}c{call}").as_bytes()).unwrap();
                    assert_eq!(answer, format!("T{thread}C{call}").into_bytes());
                }
            });
        }
    });
    let many: Vec<_> = client
        .call_many(["a", "b", "c"], 2)
        .map(|answer| answer.result.unwrap())
        .collect();
    assert_eq!(many, [b"A", b"B", b"C"]);
    assert_eq!(client.stats().connections, 1);
    drop(running.stop);
    assert_eq!(running.serving.join().unwrap().unwrap().answered, 803);
}

#[test]
fn a_handlers_error_and_its_panic_are_the_callers_error() {
    let queue = unique("errors");
    let running = serve(&queue, 1, |request| match &request.body[..] {
        b"panic" => panic!("on purpose"),
        _ => Err(RemoteError::out_of_range("too much")),
    });
    let client = client(&queue, PATIENCE);
    let kind_of = |request: &[u8]| match client.call(request) {
        Err(Error::Remote(error)) => (error.kind, error.message),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        kind_of(b"1"),
        (RemoteErrorKind::OutOfRange, "too much".to_owned())
    );
    let (kind, message) = kind_of(b"panic");
    assert_eq!(kind, RemoteErrorKind::Internal);
    assert!(message.contains("on purpose"), "{message}");
    drop(running.stop);
    assert_eq!(running.serving.join().unwrap().unwrap().refused, 2);
}

#[test]
fn a_deadline_says_what_was_waited_for() {
    let queue = unique("deadline");
    let (release, held) = bounded::<()>(0);
    let running = serve(&queue, 1, move |request| {
        let _ = held.recv();
        Ok(request.body)
    });
    match client(&queue, Duration::from_secs(1)).call(b"1") {
        Err(Error::Timeout {
            waiting_for:
                WaitingFor::Answer {
                    status: Some(status),
                    ..
                },
            ..
        }) => assert_eq!(status.consumers, 1),
        other => panic!("{other:?}"),
    }
    drop((release, running.stop));
    running.serving.join().unwrap().unwrap();
}

#[test]
fn a_status_tells_whether_somebody_serves() {
    let queue = unique("status");
    let endpoints = url().parse().unwrap();
    let before = Status::of(&endpoints, &queue, PATIENCE).unwrap();
    assert_eq!(before.queue, None);
    assert!(before.broker.starts_with("RabbitMQ "), "{}", before.broker);
    let running = serve(&queue, 3, |request| Ok(request.body));
    let with_server = Status::of(&endpoints, &queue, PATIENCE)
        .unwrap()
        .queue
        .unwrap();
    assert_eq!((with_server.consumers, with_server.ready), (3, 0));
    drop(running.stop);
    running.serving.join().unwrap().unwrap();
}
