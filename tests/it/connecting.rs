//! Which broker is connected to, and when.

use crate::support::{Caller, PATIENCE, PrivateBroker, fibrpc, order, run, unique, url};
use fibrpc::{Endpoints, Error, Request, Server};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Listens, does that with each connection, and counts them.
fn listener(
    address: &str,
    treat: impl Fn(TcpStream) + Send + Sync + 'static,
) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(address).unwrap();
    let url = format!("amqp://{}", listener.local_addr().unwrap());
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let treat = Arc::new(treat);
    // Ends with the process.
    thread::spawn(move || {
        for socket in listener.incoming() {
            counted.fetch_add(1, Ordering::SeqCst);
            let treat = Arc::clone(&treat);
            thread::spawn(move || treat(socket.unwrap()));
        }
    });
    (url, count)
}

/// A broker that accepts and never speaks.
fn mute() -> String {
    let keep = |socket| {
        thread::sleep(Duration::from_secs(600));
        drop(socket);
    };
    listener("127.0.0.1:0", keep).0
}

#[test]
fn a_broker_that_hangs_hides_no_other() {
    let queue = unique("mute");
    let urls = format!("{},{},{}", mute(), url(), mute());
    let echo = |request: &Request| Ok(request.body().to_vec());
    // Whichever is the first.
    for _ in 0..4 {
        let server = Server::new(&urls).unwrap().queue(&queue);
        let serving = server
            .connect_timeout(Duration::from_secs(9))
            .start(echo)
            .unwrap();
        let client = Caller::new(&urls, &queue, |client| {
            client.timeout(Duration::from_secs(9))
        });
        assert_eq!(client.call("1").unwrap(), b"1");
        serving.stop().unwrap();
    }
}

#[test]
fn a_url_may_come_by_a_pipe() {
    let queue = unique("pipe");
    let server = Server::new(url()).unwrap().queue(&queue);
    let serving = server.start(|_: &Request| Ok("832040")).unwrap();
    let command = format!(
        "{} call 30 --output raw --queue {queue} --url-file <(echo '{}')",
        env!("CARGO_BIN_EXE_fibrpc"),
        url()
    );
    let call = run(Command::new("bash").args(["-c", &command]));
    assert_eq!(call.stdout, "832040\n", "{}", call.stderr);
    drop(serving);
}

#[test]
fn a_client_goes_back_to_the_broker_that_worked_last() {
    let broker = PrivateBroker::start();
    let queue = unique("last");
    let (dead, attempts) = listener("127.0.0.1:0", drop);
    let urls = format!("{dead},{}", broker.url);
    let server = Server::new(&broker.url).unwrap().queue(&queue);
    let serving = server.start(|request: &Request| Ok(request.body().to_vec()));
    let client = Caller::new(&urls, &queue, |client| client.timeout(2 * PATIENCE));
    assert_eq!(client.call("1").unwrap(), b"1");
    let before = attempts.load(Ordering::SeqCst);
    for _ in 0..3 {
        broker.eval(&order::close_connections("test"));
        assert_eq!(client.call("1").unwrap(), b"1");
    }
    assert!(client.stats().connections >= 4);
    assert_eq!(attempts.load(Ordering::SeqCst), before);
    drop(serving);
}

#[test]
fn a_first_start_uses_the_time_that_it_has() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://{}", closed.local_addr().unwrap());
    drop(closed);
    let began = Instant::now();
    let server = run(fibrpc(&url, "q").args(["server", "--connect-timeout", "4s"]));
    assert_eq!(server.code(), Some(6), "{}", server.stderr);
    assert!(began.elapsed() > Duration::from_millis(3_900));
}

#[test]
fn a_broker_that_closes_after_a_while_is_not_asked_again_and_again() {
    // It takes longer than the first waits do.
    let (url, attempts) = listener("127.0.0.1:0", |mut socket| {
        let _ = socket.read(&mut [0; 8]);
        thread::sleep(Duration::from_millis(300));
        let _ = socket.write_all(b"");
    });
    let client = Caller::new(&url, "q", |client| {
        client.wait_for_server(true).timeout(Duration::from_secs(8))
    });
    let error = client.call("1").unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    // 0.1 s, 0.2 s, 0.4 s, ... at least half of each, and 0.3 s for each attempt.
    let attempts = attempts.load(Ordering::SeqCst);
    assert!((3..=9).contains(&attempts), "{attempts} attempts");
}

#[test]
fn a_url_in_a_file_is_read_again_when_the_broker_is_lost() {
    let broker = PrivateBroker::start();
    broker.eval(&order::add_user("app", "before"));
    broker.eval(&order::permit("app", order::ALL));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("url");
    let write = |password: &str| {
        let url = broker
            .url
            .replace("guest:guest", &format!("app:{password}"));
        fs::write(&file, url + "\n").unwrap();
    };
    write("before");
    let queue = unique("url-file");
    let endpoints = Endpoints::from_file(&file).unwrap();
    let server = Server::new(&endpoints).unwrap().queue(&queue);
    let serving = server.start(|request: &Request| Ok(request.body().to_vec()));
    let serving = serving.unwrap();
    let client = fibrpc::Client::builder(&endpoints)
        .unwrap()
        .timeout(2 * PATIENCE)
        .build()
        .unwrap();
    assert_eq!(client.call(&queue, "1").unwrap().body, b"1");
    broker.eval(&order::change_password("app", "after"));
    broker.eval(&order::close_connections("test"));
    // The file is late, as secrets are.
    let late = thread::spawn(move || client.call(&queue, "2"));
    thread::sleep(Duration::from_secs(1));
    write("after");
    assert_eq!(late.join().unwrap().unwrap().body, b"2");
    assert_eq!(serving.stop().unwrap().connections, 2);
}
