//! TLS with rustls: the handshake, and a stream that two threads can use at once.
//!
//! Verification cannot be turned off. A broker with a certificate of its own making is trusted by
//! naming that certificate ([`TlsOptions::ca_file`]).

use crate::amqp::pem;
use crate::amqp::wait::Wait;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct,
    InvalidMessage, OtherError, RootCertStore, SignatureScheme,
};
use std::env;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use url::Host;

/// How much ciphertext is read at a time, in bytes. What comes of it, with an earlier record's
/// rest, must fit the buffer that it is read into.
const READ_LEN: usize = 32 << 10;

/// How much is encrypted at a time, in bytes: four records.
const WRITE_LEN: usize = 64 << 10;

/// How a broker at `amqps://` is trusted, and how it is to trust us. For
/// [`Endpoints::with_tls`](crate::Endpoints::with_tls); with the feature `tls`.
///
/// The broker's certificate must be valid for the host in the URL; there is no way to turn that
/// off.
///
/// The files are read with every connection, so that a renewed certificate needs no restart. One
/// that cannot be read is found out then, as [`Error::Unreachable`](crate::Error::Unreachable).
/// Source: <https://www.rabbitmq.com/docs/ssl>.
///
/// ```
/// use fibrpc::{Endpoints, TlsOptions};
///
/// let brokers: Endpoints = "amqps://broker.example?auth_mechanism=external".parse()?;
/// let brokers = brokers.with_tls(
///     TlsOptions::new()
///         .ca_file("/etc/app/broker-ca.pem")
///         .client_certificate("/etc/app/app.pem", "/etc/app/app.key"),
/// );
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsOptions {
    ca_file: Option<PathBuf>,
    client_certificate: Option<(PathBuf, PathBuf)>,
}

impl TlsOptions {
    /// The certificates that the system trusts are trusted, and we show none of our own.
    pub fn new() -> TlsOptions {
        TlsOptions::default()
    }

    /// A PEM file of the certificates that may have signed the broker's, at least one; no others
    /// are trusted then. A broker that shows one of them as its own is trusted, too. Default: those
    /// that the system trusts, or that `SSL_CERT_FILE` and `SSL_CERT_DIR` name.
    pub fn ca_file(mut self, file: impl Into<PathBuf>) -> TlsOptions {
        self.ca_file = Some(file.into());
        self
    }

    /// PEM files of our own certificate, with those between it and the broker's authority behind
    /// it, and of its private key, not encrypted; one file may hold both. It is shown to a broker
    /// that asks for one; the user is still that of the URL, unless that says
    /// `?auth_mechanism=external`. Default: none.
    /// Source: <https://www.rabbitmq.com/docs/access-control>.
    pub fn client_certificate(
        mut self,
        certificate: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> TlsOptions {
        self.client_certificate = Some((certificate.into(), key.into()));
        self
    }

    /// What these options say, and where they say nothing, the others.
    pub(super) fn or(&self, other: &TlsOptions) -> TlsOptions {
        TlsOptions {
            ca_file: self.ca_file.clone().or_else(|| other.ca_file.clone()),
            client_certificate: self
                .client_certificate
                .clone()
                .or_else(|| other.client_certificate.clone()),
        }
    }

    fn config(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = match &self.ca_file {
            None => builder.with_root_certificates(system_roots()?),
            Some(file) => {
                let named = pem::certificates(file)?;
                let roots = Arc::new(roots(file, &named)?);
                let usual = WebPkiServerVerifier::builder_with_provider(roots, provider)
                    .build()
                    .map_err(|error| error.to_string())?;
                // What rustls calls dangerous is another verifier than its own; ours asks it.
                builder
                    .dangerous()
                    .with_custom_certificate_verifier(Arc::new(Verifier { usual, named }))
            }
        };
        match &self.client_certificate {
            None => Ok(builder.with_no_client_auth()),
            Some((certificate, key)) => {
                let chain = pem::certificates(certificate)?;
                let secret = pem::private_key(key)?;
                builder
                    .with_client_auth_cert(chain, secret)
                    .map_err(|error| wrong_pair(certificate, key, &error))
            }
        }
    }
}

/// What the system trusts, or `SSL_CERT_FILE` and `SSL_CERT_DIR` say.
fn system_roots() -> Result<RootCertStore, String> {
    for name in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
        // What the system trusts would be taken in its place.
        if let Some(value) = env::var_os(name).filter(|value| !value.is_empty())
            && !env::split_paths(&value).any(|path| path.exists())
        {
            return Err(format!(
                "the variable {name} names {}, which is not there; set it right, or unset it to \
                 trust what the system does",
                value.display()
            ));
        }
    }
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if !roots.is_empty() {
        return Ok(roots);
    }
    let mut why = String::new();
    for error in found.errors {
        let _ = write!(why, " ({error})");
    }
    Err(format!(
        "the system trusts no certificate{why}; is the package ca-certificates there? --tls-ca \
         names a file with one, and so does the variable SSL_CERT_FILE"
    ))
}

/// The certificates in a file as those that may have signed a broker's. A bundle may hold some
/// that cannot be used.
fn roots(file: &Path, named: &[CertificateDer<'static>]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let mut unusable = String::new();
    for (index, certificate) in named.iter().enumerate() {
        if let Err(error) = roots.add(certificate.clone()) {
            let (number, file) = (index + 1, file.display());
            unusable = format!(
                "certificate {number} in {file} is damaged: {error}; `openssl x509 -in {file} \
                 -noout -text` must be able to read it"
            );
            log::debug!("{unusable}");
        }
    }
    match roots.is_empty() {
        true => Err(unusable),
        false => Ok(roots),
    }
}

/// Why a certificate and a key cannot be used together.
fn wrong_pair(certificate: &Path, key: &Path, error: &rustls::Error) -> String {
    let (certificate, key) = (certificate.display(), key.display());
    match error {
        rustls::Error::InconsistentKeys(_) => format!(
            "the key {key} is not that of the certificate {certificate}, which must be the first \
             in its file: `openssl x509 -in {certificate} -noout -pubkey` and `openssl pkey -in \
             {key} -pubout` print the same if it is"
        ),
        error => format!(
            "the certificate {certificate} with the key {key}: {error} (RSA from 2048 bits, EC \
             P-256 and P-384 and Ed25519 can be used: `openssl req -x509 -newkey rsa:2048`)"
        ),
    }
}

/// Trusts what rustls' own verifier trusts, and a broker that shows the very certificate that
/// [`TlsOptions::ca_file`] names: `openssl req -x509` makes certificates that are authorities, and
/// people use one for both, but an authority's is refused as a broker's (RFC 5280, and rustls).
#[derive(Debug)]
struct Verifier {
    usual: Arc<WebPkiServerVerifier>,
    /// The certificates in the file.
    named: Vec<CertificateDer<'static>>,
}

impl Verifier {
    /// Whether it was refused because it is an authority's. That it is valid today was checked
    /// before, and that the broker has its key is checked in every handshake.
    fn is_authority(error: &rustls::Error) -> bool {
        matches!(
            error,
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(reason)))
                if reason.to_string() == "CaUsedAsEndEntity"
        )
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let usual = self.usual.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match usual {
            Err(error) if Verifier::is_authority(&error) && self.named.contains(end_entity) => {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            usual => usual,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

/// A TLS connection. One thread at a time reads, one writes; neither waits for the other's socket.
pub(crate) struct TlsStream {
    socket: TcpStream,
    session: Mutex<ClientConnection>,
    /// The reader's ciphertext.
    incoming: Mutex<Vec<u8>>,
    outgoing: Mutex<Outgoing>,
}

/// What is encrypted, and not yet written.
#[derive(Default)]
struct Outgoing {
    ciphertext: Vec<u8>,
    written: usize,
    /// How much plaintext that is.
    accepted: usize,
}

impl TlsStream {
    /// Shakes hands over a connected socket.
    ///
    /// # Errors
    ///
    /// Why not, in words: a file that cannot be used, a certificate that is not trusted, no answer
    /// before the deadline.
    pub fn connect(
        socket: TcpStream,
        host: &Host<String>,
        options: &TlsOptions,
        deadline: Instant,
    ) -> Result<TlsStream, String> {
        let name = match host {
            Host::Domain(name) => ServerName::try_from(name.clone())
                .map_err(|_| format!("no certificate can be for a host with the name '{name}'"))?,
            Host::Ipv4(ip) => ServerName::IpAddress((*ip).into()),
            Host::Ipv6(ip) => ServerName::IpAddress((*ip).into()),
        };
        let config = Arc::new(options.config()?);
        let mut session = ClientConnection::new(config, name).map_err(|error| error.to_string())?;
        session.set_buffer_limit(Some(WRITE_LEN));
        shake_hands(&mut session, &socket, deadline).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "no answer in time".to_owned(),
            ErrorKind::UnexpectedEof => {
                format!("it closed the connection ({OTHER_PORT})")
            }
            _ => error.to_string(),
        })?;
        Ok(TlsStream {
            socket,
            session: Mutex::new(session),
            incoming: Mutex::new(vec![0; READ_LEN]),
            outgoing: Mutex::default(),
        })
    }

    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Reads as of [`io::Read::read`] into one buffer, then the other; [`ErrorKind::WouldBlock`]
    /// also when only a part of a record has arrived. Together they have room for more than
    /// [`READ_LEN`].
    pub fn read(&self, out: &mut [&mut [u8]; 2], wait: Wait) -> io::Result<usize> {
        let len = take(&mut self.session(), out, 0)?;
        if len != Some(0) {
            return Ok(len.unwrap_or(0));
        }
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        // May block, without the session, so that others can write meanwhile.
        let read = wait.read(&self.socket, &mut incoming)?;
        if read == 0 {
            return Ok(0);
        }
        let mut ciphertext = &incoming[..read];
        let mut len = 0;
        let mut session = self.session();
        while !ciphertext.is_empty() {
            session.read_tls(&mut ciphertext)?;
            session.process_new_packets().map_err(invalid)?;
            match take(&mut session, out, len)? {
                Some(taken) => len += taken,
                None => return Ok(len), // closed in good order; if this is 0, that is how it is told
            }
        }
        match len {
            0 => Err(ErrorKind::WouldBlock.into()),
            len => Ok(len),
        }
    }

    /// Writes as of [`io::Write::write_vectored`]; [`ErrorKind::WouldBlock`] also when only a part
    /// of the ciphertext has left. After an error that is no end, the same bytes must be given again: they
    /// are encrypted already.
    pub fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let outgoing = &mut *outgoing;
        if outgoing.ciphertext.is_empty() {
            let mut session = self.session();
            outgoing.accepted = session.writer().write_vectored(parts)?;
            while session.wants_write() {
                session.write_tls(&mut outgoing.ciphertext)?;
            }
        }
        match (&self.socket).write(&outgoing.ciphertext[outgoing.written..])? {
            0 => return Err(ErrorKind::WriteZero.into()),
            len => outgoing.written += len,
        }
        if outgoing.written < outgoing.ciphertext.len() {
            return Err(ErrorKind::WouldBlock.into());
        }
        outgoing.ciphertext.clear();
        outgoing.written = 0;
        Ok(outgoing.accepted)
    }

    fn session(&self) -> MutexGuard<'_, ClientConnection> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes what is decrypted, behind what was put into the buffers before; `None` once the broker has
/// closed the connection in good order.
fn take(
    session: &mut ClientConnection,
    out: &mut [&mut [u8]; 2],
    before: usize,
) -> io::Result<Option<usize>> {
    let mut len = 0;
    let [first, second] = out;
    loop {
        let at = before + len;
        let room = match first.get_mut(at..) {
            Some(room) if !room.is_empty() => room,
            _ => &mut second[at - first.len()..],
        };
        match session.reader().read(room) {
            Ok(0) if !room.is_empty() => return Ok((len > 0).then_some(len)),
            Ok(0) => return Ok(Some(len)),
            Ok(more) => len += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Some(len)),
            Err(error) => return Err(error),
        }
    }
}

fn shake_hands(
    session: &mut ClientConnection,
    mut socket: &TcpStream,
    deadline: Instant,
) -> io::Result<()> {
    while session.is_handshaking() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        socket.set_write_timeout(Some(left.max(Duration::from_millis(1))))?;
        if session.wants_write() {
            session.write_tls(&mut socket)?;
        } else {
            if session.read_tls(&mut socket)? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            session.process_new_packets().map_err(|error| {
                // The broker is to know, too.
                let _ = session.write_tls(&mut socket);
                invalid(error)
            })?;
        }
    }
    // The end of the handshake leaves with the first data, if it has not left yet.
    Ok(())
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, explain(&error))
}

/// What to say of a peer that does not speak TLS.
const OTHER_PORT: &str = "is this its TLS port? 5671 is the usual one for amqps://; to 5672 it is \
                          amqp://, without TLS";

/// What is wrong, in words that say what to do about it.
fn explain(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(reason) => {
            format!("the broker's certificate is refused: {}", refused(reason))
        }
        // RabbitMQ answers what it does not understand with `AMQP`, a web server with `HTTP`.
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            format!("it does not speak TLS there ({OTHER_PORT})")
        }
        rustls::Error::AlertReceived(alert) => {
            let meaning = match alert {
                AlertDescription::CertificateRequired => {
                    "it wants a certificate of ours (--tls-cert and --tls-key name one)"
                }
                AlertDescription::UnknownCA => {
                    "the authority that signed our certificate is none of those that it trusts \
                     (its `cacertfile`)"
                }
                AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateRevoked => {
                    "it does not accept our certificate (its log says why)"
                }
                AlertDescription::CertificateExpired => "our certificate has expired",
                AlertDescription::HandshakeFailure => {
                    "no way to encrypt in common, or it wants a certificate of ours (--tls-cert \
                     and --tls-key name one)"
                }
                AlertDescription::ProtocolVersion => {
                    "no TLS version in common; 1.2 and 1.3 are spoken here"
                }
                _ => "its log says why",
            };
            format!("the broker ended it with the alert {alert:?}: {meaning}")
        }
        other => other.to_string(),
    }
}

/// Why a broker's certificate is refused, and what helps.
fn refused(reason: &CertificateError) -> String {
    const NAME: &str = "openssl takes it as `-addext subjectAltName=DNS:HOST,IP:ADDRESS`, and \
                        `openssl x509 -req` from `-extfile`";
    let days = |from: &UnixTime, to: &UnixTime| to.as_secs().saturating_sub(from.as_secs()) / 86400;
    match reason {
        CertificateError::UnknownIssuer => "UnknownIssuer, none of those trusted has signed it; \
             --tls-ca names a file with the one that has, or with the certificate itself if it \
             signed itself"
            .to_owned(),
        CertificateError::ExpiredContext { time, not_after } => format!(
            "it expired {} days ago; renew it (or is this machine's clock wrong?)",
            days(not_after, time)
        ),
        CertificateError::NotValidYetContext { time, not_before } => format!(
            "it is valid only in {} days (is this machine's clock wrong?)",
            days(time, not_before)
        ),
        CertificateError::NotValidForNameContext {
            expected,
            presented,
        } => {
            let expected = expected.to_str();
            match &presented[..] {
                [] => format!(
                    "it is not valid for name '{expected}', since it has no subjectAltName; a \
                     name in CN alone does not count; {NAME}"
                ),
                names => format!(
                    "it is not valid for name '{expected}', only for {}; use such a name in the \
                     URL, or have it made anew: {NAME}",
                    names.join(", ")
                ),
            }
        }
        CertificateError::InvalidPurposeContext { .. } => {
            format!("{reason}; have it made anew with extendedKeyUsage=serverAuth")
        }
        CertificateError::Other(OtherError(other)) => match other.to_string().as_str() {
            "CaUsedAsEndEntity" => "it is an authority's own (CA:TRUE, as `openssl req -x509` \
                makes it); give --tls-ca exactly this certificate, or have one made with \
                `-addext basicConstraints=CA:FALSE`"
                .to_owned(),
            "UnsupportedCertVersion" => format!(
                "it is of X.509 version 1, without subjectAltName, as `openssl x509 -req` makes \
                 it without `-extfile`; {NAME}"
            ),
            other => other.to_owned(),
        },
        CertificateError::UnsupportedSignatureAlgorithmContext { .. } => {
            "it is signed in a way that is not accepted, such as with SHA-1; have it made anew \
             with `-sha256`"
                .to_owned()
        }
        other => other.to_string(),
    }
}
