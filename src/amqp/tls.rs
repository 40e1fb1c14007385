//! TLS with rustls: the handshake, and a stream that two threads can use at once.
//!
//! Verification cannot be turned off. A broker with a certificate of its own making is trusted by
//! naming that certificate ([`TlsOptions::ca_file`]).

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::io::{self, ErrorKind, Read, Write};
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
    /// are trusted then. Default: those that the system trusts.
    pub fn ca_file(mut self, file: impl Into<PathBuf>) -> TlsOptions {
        self.ca_file = Some(file.into());
        self
    }

    /// PEM files of our own certificate, with those between it and the broker's authority, and of
    /// its private key. It is shown to a broker that asks for one; the user is still that of the
    /// URL, unless that says `?auth_mechanism=external`. Default: none.
    /// Source: <https://www.rabbitmq.com/docs/access-control>.
    pub fn client_certificate(
        mut self,
        certificate: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> TlsOptions {
        self.client_certificate = Some((certificate.into(), key.into()));
        self
    }

    fn config(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(self.roots()?);
        match &self.client_certificate {
            None => Ok(builder.with_no_client_auth()),
            Some((certificate, key)) => {
                let chain = certificates(certificate)?;
                let secret = PrivateKeyDer::from_pem_file(key)
                    .map_err(|error| format!("the key {}: {error}", key.display()))?;
                builder
                    .with_client_auth_cert(chain, secret)
                    .map_err(|error| {
                        let (certificate, key) = (certificate.display(), key.display());
                        format!("the certificate {certificate} with the key {key}: {error}")
                    })
            }
        }
    }

    fn roots(&self) -> Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        match &self.ca_file {
            Some(file) => {
                for certificate in certificates(file)? {
                    roots
                        .add(certificate)
                        .map_err(|error| format!("the file {}: {error}", file.display()))?;
                }
            }
            None => {
                let found = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(found.certs);
                if roots.is_empty() {
                    return Err("the system trusts no certificate (is the package \
                                ca-certificates there?); name one with --tls-ca"
                        .to_owned());
                }
            }
        }
        Ok(roots)
    }
}

/// The certificates in a PEM file, at least one.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(file).and_then(|certificates| certificates.collect());
    match all {
        Ok(all) if all.is_empty() => Err(format!("no certificate in {}", file.display())),
        Ok(all) => Ok(all),
        Err(error) => Err(format!("the file {}: {error}", file.display())),
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
            Host::Domain(name) => {
                ServerName::try_from(name.clone()).map_err(|error| error.to_string())?
            }
            Host::Ipv4(ip) => ServerName::IpAddress((*ip).into()),
            Host::Ipv6(ip) => ServerName::IpAddress((*ip).into()),
        };
        let config = Arc::new(options.config()?);
        let mut session = ClientConnection::new(config, name).map_err(|error| error.to_string())?;
        shake_hands(&mut session, &socket, deadline).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "no answer in time".to_owned(),
            ErrorKind::UnexpectedEof => {
                "the broker closed the connection (is this its TLS port?)".to_owned()
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

    /// Reads as of [`io::Read::read`]; [`ErrorKind::WouldBlock`] also when only a part of a
    /// record has arrived. `out` has room for more than [`READ_LEN`].
    pub fn read(&self, out: &mut [u8]) -> io::Result<usize> {
        let len = take(&mut self.session(), out)?;
        if len != Some(0) {
            return Ok(len.unwrap_or(0));
        }
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        // Blocks, without the session, so that others can write meanwhile.
        let read = (&self.socket).read(&mut incoming)?;
        if read == 0 {
            return Ok(0);
        }
        let mut ciphertext = &incoming[..read];
        let mut len = 0;
        let mut session = self.session();
        while !ciphertext.is_empty() {
            session.read_tls(&mut ciphertext)?;
            session.process_new_packets().map_err(invalid)?;
            match take(&mut session, &mut out[len..])? {
                Some(taken) => len += taken,
                None => return Ok(len), // closed in good order; if this is 0, that is how it is told
            }
        }
        match len {
            0 => Err(ErrorKind::WouldBlock.into()),
            len => Ok(len),
        }
    }

    /// Writes as of [`io::Write::write`]; [`ErrorKind::WouldBlock`] also when only a part of the
    /// ciphertext has left. After an error that is no end, the same bytes must be given again: they
    /// are encrypted already.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let outgoing = &mut *outgoing;
        if outgoing.ciphertext.is_empty() {
            let mut session = self.session();
            let len = bytes.len().min(WRITE_LEN);
            outgoing.accepted = session.writer().write(&bytes[..len])?;
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

/// Takes what is decrypted; `None` once the broker has closed the connection in good order.
fn take(session: &mut ClientConnection, out: &mut [u8]) -> io::Result<Option<usize>> {
    let mut len = 0;
    loop {
        match session.reader().read(&mut out[len..]) {
            Ok(0) if len < out.len() => return Ok((len > 0).then_some(len)),
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
    io::Error::new(ErrorKind::InvalidData, error)
}
