//! Certificates and keys as `openssl`, Kubernetes and text editors make them.

use super::{TlsBroker, refused};
use crate::support::{fibrpc, run, server, unique};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, date_time_ymd};
use std::fs;
use std::path::Path;
use std::process::Command;

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
        broker._broker.eval("ssl:clear_pem_cache()");
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
