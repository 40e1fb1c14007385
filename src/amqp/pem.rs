//! Certificates and keys in PEM files, and what is wrong with a file that has none: every message
//! names the file, and the command that makes of it what is wanted.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fs;
use std::path::Path;

/// The certificates in a file, at least one.
pub(crate) fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wanted = Wanted::Certificate;
    let pem = Pem::read(file, wanted)?;
    // It may limit what the certificate is good for, which nobody here could read.
    if pem.has("TRUSTED CERTIFICATE") {
        return Err(pem.not(
            "it is in OpenSSL's own form, a TRUSTED CERTIFICATE",
            "openssl x509 -in FILE -out NEW",
        ));
    }
    match CertificateDer::pem_slice_iter(pem.text.as_bytes()).collect::<Result<Vec<_>, _>>() {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) => Err(pem.missing(wanted)),
        Err(error) => Err(pem.damaged(&error, "openssl x509 -in FILE -noout -text")),
    }
}

/// The first private key in a file.
pub(crate) fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let wanted = Wanted::Key;
    let pem = Pem::read(file, wanted)?;
    if pem.has("ENCRYPTED PRIVATE KEY") || pem.text.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(pem.not(
            "it is encrypted, and nobody is asked for a passphrase here",
            "openssl pkey -in FILE -out NEW",
        ));
    }
    match PrivateKeyDer::from_pem_slice(pem.text.as_bytes()) {
        Ok(key) => Ok(key),
        Err(rustls::pki_types::pem::Error::NoItemsFound) => Err(pem.missing(wanted)),
        Err(error) => Err(pem.damaged(&error, "openssl pkey -in FILE -noout -check")),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Certificate,
    Key,
}

/// A file that holds PEM.
struct Pem<'f> {
    file: &'f Path,
    text: String,
    /// What its parts are called: what stands behind `-----BEGIN`.
    labels: Vec<String>,
}

impl Pem<'_> {
    fn read(file: &Path, wanted: Wanted) -> Result<Pem<'_>, String> {
        let name = file.display();
        if file.is_dir() {
            return Err(format!(
                "{name} is a directory; name a file (`cat {name}/*.pem >NEW` puts several into one)"
            ));
        }
        let bytes = fs::read(file).map_err(|error| format!("the file {name}: {error}"))?;
        if bytes.trim_ascii().is_empty() {
            return Err(format!("the file {name} is empty"));
        }
        // What stands around the PEM may be in any encoding; the label is an old one.
        let text = String::from_utf8_lossy(&bytes)
            .trim_start_matches('\u{feff}')
            .replace("X509 CERTIFICATE-----", "CERTIFICATE-----");
        let labels: Vec<_> = text
            .lines()
            .filter_map(|line| line.trim_end().strip_prefix("-----BEGIN "))
            .filter_map(|label| label.strip_suffix("-----"))
            .map(str::to_owned)
            .collect();
        let pem = Pem { file, text, labels };
        match pem.labels.is_empty() {
            true => Err(pem.no_pem(&bytes, wanted)),
            false => Ok(pem),
        }
    }

    fn has(&self, label: &str) -> bool {
        self.labels.iter().any(|is| is == label)
    }

    /// Cannot be used as it is, and how it can.
    fn not(&self, is: &str, command: &str) -> String {
        let name = self.file.display();
        let command = command.replace("FILE", &name.to_string());
        format!("the file {name} cannot be used: {is}; `{command}` makes one that can")
    }

    fn damaged(&self, error: &dyn std::fmt::Display, command: &str) -> String {
        let name = self.file.display();
        let command = command.replace("FILE", &name.to_string());
        format!("the PEM in {name} is damaged: {error}; `{command}` must be able to read it")
    }

    /// There is PEM, but not what is wanted.
    fn missing(&self, wanted: Wanted) -> String {
        let name = self.file.display();
        let what = match wanted {
            Wanted::Certificate => "certificate",
            Wanted::Key => "private key",
        };
        let is_key = self
            .labels
            .iter()
            .any(|label| label.ends_with("PRIVATE KEY"));
        let is = |label: &str| self.labels.iter().all(|is| is == label);
        let advice = match wanted {
            Wanted::Key if is("CERTIFICATE") => {
                "; are the files of the certificate and the key swapped?".to_owned()
            }
            Wanted::Certificate if is_key => {
                "; are the files of the certificate and the key swapped?".to_owned()
            }
            Wanted::Certificate if self.has("PKCS7") => {
                format!("; `openssl pkcs7 -in {name} -print_certs -out NEW` makes one with")
            }
            Wanted::Certificate if is("CERTIFICATE REQUEST") => {
                ", which is still to be signed by an authority".to_owned()
            }
            Wanted::Key if self.has("OPENSSH PRIVATE KEY") => format!(
                "; `ssh-keygen -p -m pem -f {name}` turns it into one (it changes the file itself)"
            ),
            _ => String::new(),
        };
        let labels = self.labels.join(", ");
        format!("no {what} in {name}: it holds {labels}{advice}")
    }

    fn no_pem(&self, bytes: &[u8], wanted: Wanted) -> String {
        // ASN.1 object identifiers and numbers, as they stand at the beginning of such files.
        const PKCS7: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02";
        const PKCS12: &[u8] = b"\x02\x01\x03\x30";
        let begins_with = |pattern: &[u8]| {
            let head = &bytes[..bytes.len().min(24)];
            head.windows(pattern.len()).any(|part| part == pattern)
        };
        let part = match wanted {
            Wanted::Certificate => "-nokeys",
            Wanted::Key => "-nocerts -nodes",
        };
        let (is, command) = match bytes {
            [0x30, ..] if begins_with(PKCS7) => (
                "it is PKCS#7, not PEM",
                "openssl pkcs7 -inform der -in FILE -print_certs -out NEW".to_owned(),
            ),
            [0x30, ..] if begins_with(PKCS12) => (
                "it is PKCS#12, not PEM",
                format!("openssl pkcs12 -in FILE {part} -out NEW"),
            ),
            [0x30, ..] if wanted == Wanted::Key => (
                "it is DER, not PEM",
                "openssl pkey -inform der -in FILE -out NEW".to_owned(),
            ),
            [0x30, ..] => (
                "it is DER, not PEM",
                "openssl x509 -inform der -in FILE -out NEW".to_owned(),
            ),
            [0xfe, 0xed, 0xfe, 0xed, ..] => (
                "it is a Java key store, not PEM; once it is PKCS#12 (`keytool -importkeystore \
                 -srckeystore FILE -destkeystore NEW.p12 -deststoretype pkcs12`)",
                format!("openssl pkcs12 -in NEW.p12 {part} -out NEW"),
            ),
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => (
                "it is UTF-16",
                "iconv -f utf-16 -t utf-8 FILE >NEW".to_owned(),
            ),
            _ => {
                let label = match wanted {
                    Wanted::Certificate => "CERTIFICATE",
                    Wanted::Key => "PRIVATE KEY",
                };
                return format!(
                    "the file {} is not PEM: no line in it begins with -----BEGIN {label}-----",
                    self.file.display()
                );
            }
        };
        let name = self.file.display().to_string();
        self.not(&is.replace("FILE", &name), &command)
    }
}
