//! TLS against a real broker, with certificates made here: the right ones, and every wrong kind.

use crate::support::{Line, PATIENCE, PrivateBroker, fibrpc, run, server, unique};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

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

/// Runs a script with openssl in a folder.
fn openssl(folder: &Path, script: &str) {
    let script = format!("set -e\n{script}");
    let done = Command::new("bash")
        .args(["-c", &script])
        .current_dir(folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{script}: {said}");
}

/// What `openssl`, Kubernetes and text editors make of certificates and keys; `client.pem` and
/// `client.key` are there, `ca.pem` is the authority's.
const FORMS: &str = r#"
openssl x509 -in ca.pem -text > ca-text.pem
(echo 'our authority'; sed 's/$/\r/' ca.pem) > ca-crlf.pem
(printf '\xef\xbb\xbf'; cat ca.pem) > ca-bom.pem
sed 's/ CERTIFICATE/ X509 CERTIFICATE/' ca.pem > ca-x509.pem
openssl x509 -in ca.pem -outform der -out ca.der
openssl x509 -in ca.pem -trustout -out ca-trusted.pem
openssl crl2pkcs7 -nocrl -certfile ca.pem -out ca.p7b
openssl crl2pkcs7 -nocrl -certfile ca.pem -outform der -out ca.p7b.der
iconv -t utf-16 ca.pem > ca-utf16.pem
cut -c 1-40 ca.pem > ca-damaged.pem
sed '/END/d' ca.pem > ca-torn.pem
: > empty.pem
echo hello > text.pem
mkdir k8s k8s/..2026 && cp ca.pem k8s/..2026/ca.crt && cp client.pem k8s/..2026/tls.crt && cp client.key k8s/..2026/tls.key
ln -s ..2026 k8s/..data && ln -s ..data/ca.crt ..data/tls.crt ..data/tls.key k8s/
openssl req -x509 -newkey rsa:2048 -nodes -keyout other.key -out other.pem -subj /CN=other
cat other.pem ca.pem > bundle.pem
cat client.key client.pem > both.pem
cat ca.pem client.pem > wrong-order.pem
openssl pkey -in client.key -traditional -out client-sec1.key
(openssl ecparam -name prime256v1; cat client-sec1.key) > client-params.key
openssl pkey -in client.key -outform der -out client.der
openssl pkey -in client.key -aes256 -passout pass:hunter2 -out client-encrypted.key
openssl ec -in client.key -aes256 -passout pass:hunter2 -out client-encrypted-sec1.key
openssl pkcs12 -export -in client.pem -inkey client.key -passout pass:hunter2 -out client.p12
openssl req -new -key client.key -subj /CN=worker -out client.csr
openssl pkey -in client.key -pubout -out client.pub
openssl req -newkey rsa:2048 -nodes -keyout rsa.key -subj /CN=rsa -out rsa.csr
openssl req -x509 -key rsa.key -subj /CN=rsa -out rsa.pem
openssl pkey -in rsa.key -traditional -out rsa-pkcs1.key
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:secp521r1 -nodes -keyout p521.key -out p521.pem -subj /CN=p521
"#;

#[test]
fn certificates_and_keys_are_taken_as_openssl_makes_them_or_the_message_has_the_way_out() {
    // It asks for a certificate, and does without.
    let broker = TlsBroker::start(&["localhost"], false, "ssl_options.verify = verify_peer\n");
    let folder = broker.folder.path();
    broker.authority.sign(folder, "worker", &["worker"], false);
    openssl(folder, "mv worker.pem client.pem; mv worker.key client.key");
    openssl(folder, FORMS);
    let (queue, url) = (unique("tls-forms"), broker.url("localhost"));
    let _server = server(&url, &queue, &["--workers", "1", "--tls-ca", &broker.ca()]);
    let call = |ca: &str, pair: Option<(&str, &str)>| {
        let mut command = fibrpc(&url, &queue);
        command.args(["call", "10", "--tls-ca", &broker.file(ca)]);
        if let Some((certificate, key)) = pair {
            command.args(["--tls-cert", &broker.file(certificate)]);
            command.args(["--tls-key", &broker.file(key)]);
        }
        run(&mut command)
    };
    for ca in [
        "ca.pem",
        "ca-text.pem",
        "ca-crlf.pem",
        "ca-bom.pem",
        "ca-x509.pem",
        "bundle.pem",
        "k8s/ca.crt",
    ] {
        let call = call(ca, None);
        assert_eq!(call.code(), Some(0), "{ca}: {}", call.stderr);
    }
    for (certificate, key) in [
        ("client.pem", "client.key"),
        ("client.pem", "client-sec1.key"),
        ("client.pem", "client-params.key"),
        ("both.pem", "both.pem"),
        ("k8s/tls.crt", "k8s/tls.key"),
    ] {
        let call = call("ca.pem", Some((certificate, key)));
        assert_eq!(call.code(), Some(0), "{certificate} {key}: {}", call.stderr);
    }

    // The file to blame is named, whole.
    let refused = |ca: &str, pair: Option<(&str, &str)>, blamed: &str, words: [&str; 2]| {
        let call = call(ca, pair);
        assert_eq!(call.code(), Some(6), "{blamed}: {}", call.stderr);
        for words in [&*broker.file(blamed), words[0], words[1]] {
            assert!(call.stderr.contains(words), "{blamed}: {}", call.stderr);
        }
    };
    for (ca, words, way_out) in [
        ("no-such.pem", "No such file", ""),
        ("empty.pem", "is empty", ""),
        (".", "is a directory", "cat "),
        ("text.pem", "not PEM", "-----BEGIN CERTIFICATE-----"),
        ("ca.der", "it is DER", "openssl x509 -inform der -in "),
        ("ca-trusted.pem", "TRUSTED CERTIFICATE", "openssl x509 -in "),
        ("ca.p7b", "it holds PKCS7", "openssl pkcs7 -in "),
        (
            "ca.p7b.der",
            "it is PKCS#7",
            "openssl pkcs7 -inform der -in ",
        ),
        ("client.p12", "it is PKCS#12", "openssl pkcs12 -in "),
        ("ca-utf16.pem", "it is UTF-16", "iconv "),
        ("ca-damaged.pem", "is damaged", "openssl x509 -in "),
        ("ca-torn.pem", "is damaged", "openssl x509 -in "),
        ("client.key", "no certificate in", "swapped?"),
        ("client.csr", "CERTIFICATE REQUEST", "to be signed"),
        ("client.pub", "it holds PUBLIC KEY", ""),
    ] {
        refused(ca, None, ca, [words, way_out]);
    }
    for (key, words, way_out) in [
        ("no-such.key", "No such file", ""),
        ("client.der", "it is DER", "openssl pkey -inform der -in "),
        ("client.p12", "it is PKCS#12", "-nocerts"),
        (
            "client-encrypted.key",
            "it is encrypted",
            "openssl pkey -in ",
        ),
        (
            "client-encrypted-sec1.key",
            "it is encrypted",
            "openssl pkey -in ",
        ),
        ("client.pem", "no private key in", "swapped?"),
        ("client.pub", "no private key in", "it holds PUBLIC KEY"),
        (
            "other.key",
            "is not that of the certificate",
            "openssl pkey -in ",
        ),
    ] {
        refused("ca.pem", Some(("client.pem", key)), key, [words, way_out]);
    }
    for (certificate, key, words) in [
        ("wrong-order.pem", "client.key", "must be the first"),
        ("client.key", "client.pem", "swapped?"),
        ("p521.pem", "p521.key", "can be used"),
        // Of the right form, and signed by somebody else.
        ("rsa.pem", "rsa.key", "does not accept our certificate"),
        (
            "rsa.pem",
            "rsa-pkcs1.key",
            "does not accept our certificate",
        ),
    ] {
        let call = call("ca.pem", Some((certificate, key)));
        assert_eq!(call.code(), Some(6), "{certificate}: {}", call.stderr);
        assert!(
            call.stderr.contains(words),
            "{certificate}: {}",
            call.stderr
        );
    }

    // Kubernetes renews a secret by turning one link.
    openssl(
        folder,
        "mkdir k8s/..2027 && cp other.pem k8s/..2027/ca.crt && ln -sfn ..2027 k8s/..data",
    );
    let renewed = call("k8s/ca.crt", None);
    assert!(
        renewed.stderr.contains("UnknownIssuer"),
        "{}",
        renewed.stderr
    );
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
    let began = Instant::now();
    calls.submit((), request.timeout(Duration::from_secs(2)));
    let submitted = began.elapsed();
    assert!(submitted < Duration::from_secs(2), "{submitted:?}");
    let answer = calls.next().unwrap();
    assert!(matches!(answer.result, Err(fibrpc::Error::Timeout { .. })));
    let ended = began.elapsed();
    assert!(ended < Duration::from_secs(6), "{ended:?}");
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

/// What a broker may be given: a certificate `NAME.pem`, its key, and who has signed it, `ca.pem`
/// unless there is a `NAME-ca.pem`.
const BROKERS: &str = r#"
self() { openssl req -x509 -newkey rsa:2048 -nodes -keyout $1.key -out $1.pem -subj /CN=localhost "${@:2}"; cp $1.pem $1-ca.pem; }
self self -addext subjectAltName=DNS:localhost
self self-ip -addext subjectAltName=IP:127.0.0.1
self self-end -addext subjectAltName=DNS:localhost -addext basicConstraints=CA:FALSE
self self-cn
openssl req -x509 -newkey rsa:2048 -nodes -keyout new-ca.key -out new-ca.pem -subj /CN=authority
signed() {
    openssl req -newkey rsa:2048 -nodes -keyout $1.key -out $1.csr -subj /CN=localhost
    openssl x509 -req -in $1.csr -CA new-ca.pem -CAkey new-ca.key -CAcreateserial -out $1.pem "${@:2}"
    cp new-ca.pem $1-ca.pem
}
signed v1
echo basicConstraints=CA:FALSE > cn.ext; signed cn -extfile cn.ext
printf 'subjectAltName=DNS:localhost\nextendedKeyUsage=clientAuth\n' > client.ext; signed for-clients -extfile client.ext
# A chain in the wrong order, behind an authority between the two.
printf 'basicConstraints=critical,CA:TRUE\n' > between.ext; signed between -extfile between.ext
signed chain; echo subjectAltName=DNS:localhost > chain.ext
openssl x509 -req -in chain.csr -CA between.pem -CAkey between.key -CAcreateserial -out leaf.pem -extfile chain.ext
cat leaf.pem new-ca.pem between.pem > chain.pem
"#;

#[test]
fn a_brokers_certificate_is_trusted_as_openssl_makes_it_or_the_message_has_the_way_out() {
    let broker = TlsBroker::start(&["localhost"], false, "");
    let folder = broker.folder.path();
    openssl(folder, BROKERS);
    // openssl makes none that has expired.
    let mut expired = CertificateParams::new(["localhost".to_owned()]).unwrap();
    expired.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    expired.not_before = date_time_ymd(2020, 1, 1);
    expired.not_after = date_time_ymd(2021, 1, 1);
    let key = KeyPair::generate().unwrap();
    let certificate = expired.self_signed(&key).unwrap();
    fs::write(broker.file("self-old.pem"), certificate.pem()).unwrap();
    fs::write(broker.file("self-old.key"), key.serialize_pem()).unwrap();
    let show = |name: &str| {
        openssl(
            folder,
            &format!("cp {name}.pem broker.pem; cp {name}.key broker.key"),
        );
        broker._broker.ctl(&["eval", "ssl:clear_pem_cache()."]);
    };
    // Exit 5, no server: the broker is trusted and asked.
    for (name, host) in [
        ("self", "localhost"),
        ("self-ip", "127.0.0.1"),
        ("self-end", "localhost"),
        ("chain", "localhost"),
    ] {
        show(name);
        let ca = broker.file(&format!("{name}-ca.pem"));
        let call = run(fibrpc(&broker.url(host), "q").args(["call", "1", "--tls-ca", &ca]));
        assert_eq!(call.code(), Some(5), "{name}: {}", call.stderr);
    }
    for (name, host, ca, words) in [
        (
            "self",
            "127.0.0.1",
            "self-ca.pem",
            "not valid for name '127.0.0.1'",
        ),
        // Another authority's certificate, of the same name.
        ("self", "localhost", "self-cn.pem", "refused"),
        (
            "self-cn",
            "localhost",
            "self-cn.pem",
            "CN alone does not count",
        ),
        ("self-old", "localhost", "self-old.pem", "expired"),
        ("v1", "localhost", "v1-ca.pem", "X.509 version 1"),
        ("cn", "localhost", "cn-ca.pem", "subjectAltName=DNS:"),
        (
            "for-clients",
            "localhost",
            "for-clients-ca.pem",
            "serverAuth",
        ),
        // An authority's own, which another has signed.
        (
            "between",
            "localhost",
            "new-ca.pem",
            "exactly this certificate",
        ),
    ] {
        show(name);
        refused(&broker.url(host), &["--tls-ca", &broker.file(ca)], words);
    }
    // In place of what the system trusts.
    show("self-end");
    let call = run(fibrpc(&broker.url("localhost"), "q")
        .env("SSL_CERT_FILE", broker.file("self-end-ca.pem"))
        .args(["call", "1"]));
    assert_eq!(call.code(), Some(5), "{}", call.stderr);
    let call = run(fibrpc(&broker.url("localhost"), "q")
        .env("SSL_CERT_FILE", "/no/such/file")
        .args(["call", "1"]));
    assert!(call.stderr.contains("SSL_CERT_FILE"), "{}", call.stderr);
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
    broker._broker.ctl(&["add_user", "worker", "never used"]);
    broker
        ._broker
        .ctl(&["set_permissions", "worker", ".*", ".*", ".*"]);
    let call = run(fibrpc(&external, &queue).args(["call", "30"]).args(ours));
    assert!(call.stdout.contains("832040"), "{}", call.stderr);
}
