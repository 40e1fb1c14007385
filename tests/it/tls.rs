//! TLS against a real broker, with certificates made here: the right ones, and every wrong kind.

mod files;

use crate::support::{Line, PATIENCE, PrivateBroker, fibrpc, order, run, server, unique};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// An authority, and what it signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Authority { issuer, pem }
    }

    /// A certificate for these names, and its key, as files.
    fn sign(&self, folder: &Path, file: &str, names: &[&str], expired: bool) -> (PathBuf, PathBuf) {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, file);
        if expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let paths = (
            folder.join(format!("{file}.pem")),
            folder.join(format!("{file}.key")),
        );
        fs::write(&paths.0, certificate.pem()).unwrap();
        fs::write(&paths.1, key.serialize_pem()).unwrap();
        paths
    }
}

/// A broker that listens with TLS, and everything that its clients may need.
struct TlsBroker {
    _broker: PrivateBroker,
    port: u16,
    folder: tempfile::TempDir,
    authority: Authority,
}

impl TlsBroker {
    /// With a certificate for these names, and further settings.
    fn start(names: &[&str], expired: bool, settings: &str) -> TlsBroker {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new("the test's authority");
        let ca = folder.path().join("ca.pem");
        fs::write(&ca, &authority.pem).unwrap();
        let (certificate, key) = authority.sign(folder.path(), "broker", names, expired);
        // Free now; taken by whoever is quicker, which shows.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let config = format!(
            "listeners.ssl.1 = 127.0.0.1:{port}\n\
             ssl_options.cacertfile = {}\n\
             ssl_options.certfile = {}\n\
             ssl_options.keyfile = {}\n\
             ssl_options.verify = verify_none\n\
             ssl_options.fail_if_no_peer_cert = false\n\
             auth_mechanisms.1 = PLAIN\n\
             auth_mechanisms.2 = AMQPLAIN\n\
             ssl_cert_login_from = distinguished_name\n\
             {settings}",
            ca.display(),
            certificate.display(),
            key.display(),
        );
        let broker = PrivateBroker::configured(&config, &["rabbitmq_auth_mechanism_ssl"]);
        TlsBroker {
            _broker: broker,
            port,
            folder,
            authority,
        }
    }

    fn url(&self, host: &str) -> String {
        format!("amqps://{host}:{}", self.port)
    }

    fn ca(&self) -> String {
        self.file("ca.pem")
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }
}

/// A call that must be refused, with these words.
fn refused(url: &str, options: &[&str], words: &str) {
    let call = run(fibrpc(url, "q")
        .args(["call", "30", "--timeout", "10s"])
        .args(options));
    assert_eq!(call.code(), Some(6), "{url} {options:?}: {}", call.stderr);
    assert!(
        call.stderr.contains(words),
        "{url} {options:?}: {}",
        call.stderr
    );
}

#[test]
fn a_broker_with_the_right_certificate_is_used_by_name_and_by_address_and_others_are_refused() {
    let broker = TlsBroker::start(&["localhost", "127.0.0.1"], false, "");
    let (queue, ca) = (unique("tls"), broker.ca());
    let url = broker.url("localhost");
    let _server = server(&url, &queue, &["--workers", "2", "--tls-ca", &ca]);
    for host in ["localhost", "127.0.0.1"] {
        let call = run(fibrpc(&broker.url(host), &queue).args(["call", "30", "--tls-ca", &ca]));
        assert!(call.stdout.contains("832040"), "{host}: {}", call.stderr);
    }
    let bench = run(fibrpc(&url, &queue).args(["bench", "--requests", "5000", "--tls-ca", &ca]));
    assert_eq!(bench.code(), Some(0), "{}", bench.stderr);

    // Verification cannot be turned off: nothing here is trusted by the system.
    refused(&url, &[], "TLS handshake");
    let other = Authority::new("somebody else");
    let wrong = broker.folder.path().join("wrong.pem");
    fs::write(&wrong, other.pem).unwrap();
    refused(
        &url,
        &["--tls-ca", wrong.to_str().unwrap()],
        "UnknownIssuer",
    );
    // The ports mixed up.
    let plain = broker._broker.url.replace("amqp://", "amqps://");
    refused(&plain, &["--tls-ca", &ca], "it does not speak TLS there");
    refused(&url.replace("amqps://", "amqp://"), &[], "to 5671 it is");
}

#[test]
fn a_large_request_by_a_slow_line_holds_neither_its_sender_nor_its_deadline() {
    let broker = TlsBroker::start(&["127.0.0.1"], false, "");
    // It would take 12 s, in a write of seconds if TLS took it as a whole.
    let line = Line::slow(&broker.url("127.0.0.1"), 10 << 20, Duration::ZERO);
    let brokers: fibrpc::Endpoints = line.url.parse().unwrap();
    let brokers = brokers.with_tls(fibrpc::TlsOptions::new().ca_file(broker.ca()));
    let client = fibrpc::Client::new(brokers).unwrap();
    let queue = unique("tls-slow");
    let _server = server(
        &broker.url("127.0.0.1"),
        &queue,
        &["--tls-ca", &broker.ca()],
    );
    client.call(&queue, "1").unwrap();
    let request = client.request(&queue).body(vec![b'1'; 120 << 20]);
    let mut calls = client.calls();
    calls.submit((), request.timeout(Duration::from_secs(2)));
    assert!(line.passed() < 30 << 20, "of 120, when that returns");
    let answer = calls.next().unwrap();
    assert!(matches!(answer.result, Err(fibrpc::Error::Timeout { .. })));
    assert!(line.passed() < 60 << 20, "of 120, when the call ends");
}

#[test]
fn bodies_of_16_mib_pass_both_ways_through_tls() {
    let broker = TlsBroker::start(&["localhost"], false, "");
    let queue = unique("tls-large");
    let tls = fibrpc::TlsOptions::new().ca_file(broker.ca());
    let endpoints: fibrpc::Endpoints = broker.url("localhost").parse().unwrap();
    let endpoints = endpoints.with_tls(tls);
    let echo = fibrpc::Server::new(&endpoints)
        .unwrap()
        .queue(&queue)
        .start(|request: &fibrpc::Request| Ok(request.body().to_vec()))
        .unwrap();
    let client = fibrpc::Client::builder(&endpoints).unwrap();
    let client = client.timeout(2 * PATIENCE).build().unwrap();
    let bodies: Vec<Vec<u8>> = (0..4_u8)
        .map(|salt| {
            (0..16 << 20)
                .map(|i: u32| (i as u8) ^ (i >> 11) as u8 ^ salt)
                .collect()
        })
        .collect();
    let requests = bodies
        .iter()
        .map(|body| client.request(&queue).body(&**body));
    for (answer, body) in client.call_many(requests, 2).zip(&bodies) {
        assert!(answer.result.unwrap().body == *body);
    }
    drop(client);
    echo.stop().unwrap();
}

#[test]
fn a_certificate_for_another_name_and_one_that_has_expired_are_refused() {
    let other_name = TlsBroker::start(&["broker.example"], false, "");
    refused(
        &other_name.url("localhost"),
        &["--tls-ca", &other_name.ca()],
        "not valid for name",
    );
    drop(other_name);
    let expired = TlsBroker::start(&["localhost"], true, "");
    refused(
        &expired.url("localhost"),
        &["--tls-ca", &expired.ca()],
        "expired",
    );
}

#[test]
fn a_client_certificate_is_shown_when_asked_for_and_can_stand_for_the_user() {
    let broker = TlsBroker::start(
        &["localhost"],
        false,
        "ssl_options.verify = verify_peer\n\
         ssl_options.fail_if_no_peer_cert = true\n\
         auth_mechanisms.1 = PLAIN\n\
         auth_mechanisms.2 = EXTERNAL\n\
         ssl_cert_login_from = common_name\n",
    );
    let (queue, ca, url) = (unique("tls-client"), broker.ca(), broker.url("localhost"));
    let (certificate, key) =
        broker
            .authority
            .sign(broker.folder.path(), "worker", &["worker"], false);
    let (certificate, key) = (certificate.to_str().unwrap(), key.to_str().unwrap());
    let ours = ["--tls-ca", &ca, "--tls-cert", certificate, "--tls-key", key];
    let _server = server(&url, &queue, &[&["--workers", "1"], &ours[..]].concat());
    let call = run(fibrpc(&url, &queue).args(["call", "30"]).args(ours));
    assert!(call.stdout.contains("832040"), "{}", call.stderr);

    refused(&url, &["--tls-ca", &ca], "ertificate");
    let usage = run(fibrpc(&url, &queue).args(["call", "30", "--tls-cert", certificate]));
    assert_eq!(usage.code(), Some(2), "{}", usage.stderr);
    assert!(usage.stderr.contains("--tls-key"), "{}", usage.stderr);
    // The files in the URL, as Erlang's clients have them.
    let in_url = format!("{url}?cacertfile={ca}&certfile={certificate}&keyfile={key}");
    let call = run(fibrpc(&in_url, &queue).args(["call", "30"]));
    assert!(call.stdout.contains("832040"), "{}", call.stderr);
    // Options that would not be used; among several brokers, one is enough that uses them.
    let plain = broker._broker.url.as_str();
    for option in ["--tls-ca", "--tls-cert"] {
        let mut unused = fibrpc(plain, &queue);
        unused.args(["call", "30", option, &ca]);
        if option == "--tls-cert" {
            unused.args(["--tls-key", key]);
        }
        let unused = run(&mut unused);
        assert_eq!(unused.code(), Some(2), "{option}: {}", unused.stderr);
        assert!(unused.stderr.contains(option), "{}", unused.stderr);
        assert!(unused.stderr.contains("amqps://"), "{}", unused.stderr);
    }
    let mixed = format!("{url},{plain}");
    let call = run(fibrpc(&mixed, &queue).args(["call", "30"]).args(ours));
    assert!(call.stdout.contains("832040"), "{}", call.stderr);

    // The user that the certificate names does not exist, and then it does.
    let external = format!("{url}?auth_mechanism=external");
    refused(&external, &ours, "certificate as a user");
    let orders = [
        order::add_user("worker", "never used"),
        order::permit("worker", order::ALL),
    ];
    for order in orders {
        broker._broker.eval(&order);
    }
    let call = run(fibrpc(&external, &queue).args(["call", "30"]).args(ours));
    assert!(call.stdout.contains("832040"), "{}", call.stderr);
}
