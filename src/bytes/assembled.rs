//! What becomes of a stream of bytes.

use crate::amqp::incoming::{Assembler, Incoming, Malformed, Taken};
use crate::bytes::bounds::in_memory;

/// What the assembler has made of a stream.
#[derive(Debug, Default, PartialEq)]
pub struct Assembled {
    pub incoming: Vec<Incoming>,
    /// The frames that are amiquip's.
    pub passed_on: Vec<u8>,
    /// Whether it was malformed from there on.
    pub malformed: bool,
    /// How many bytes are left of a frame that is not whole.
    pub left: usize,
    /// Whether a message has begun that is not whole.
    pub has_begun: bool,
}

/// Assembles a stream that arrives in these pieces, as the inbox does: what has its place goes there,
/// and the rest through a buffer.
pub fn assemble<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Assembled {
    let (mut assembler, mut buffer) = (Assembler::default(), Vec::new());
    let mut assembled = Assembled::default();
    let mut arrived = 0;
    for mut piece in pieces {
        arrived += piece.len();
        if buffer.is_empty()
            && let Some(place) = assembler.place()
        {
            let (here, behind) = piece.split_at(piece.len().min(place.len()));
            place[..here.len()].copy_from_slice(here);
            assembler.put(here.len());
            piece = behind;
        }
        buffer.extend_from_slice(piece);
        let taken = take_all(&mut assembler, &buffer, &mut assembled);
        in_memory(arrived, assembler.memory());
        match taken {
            Ok(len) => drop(buffer.drain(..len)),
            Err(Malformed) => {
                assembled.malformed = true;
                return assembled;
            }
        }
    }
    assembled.left = buffer.len();
    assembled.has_begun = assembler.has_begun();
    assembled
}

/// Takes what there is; says how much that was.
fn take_all(
    assembler: &mut Assembler,
    bytes: &[u8],
    assembled: &mut Assembled,
) -> Result<usize, Malformed> {
    let mut at = 0;
    while let Some(Taken { len, parsed }) = assembler.take(&bytes[at..])? {
        if parsed.pass_on {
            assembled.passed_on.extend_from_slice(&bytes[at..at + len]);
        }
        assembled.incoming.extend(parsed.incoming);
        at += len;
    }
    Ok(at)
}

/// How many octets at the beginning of an input say where its stream is cut.
const CUTS: usize = 8;

/// An input as a stream, and as what says where that is cut.
pub fn split(input: &[u8]) -> (&[u8], &[u8]) {
    input.split_at(input.len().min(CUTS))
}

/// The pieces of a stream: their lengths follow from the octets of `cuts`, from 1 byte to 16 KiB, over
/// and over.
pub fn pieces<'a>(cuts: &[u8], mut stream: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let mut cuts = cuts.iter().cycle();
    std::iter::from_fn(move || {
        let len = match usize::from(*cuts.next().unwrap_or(&0)) {
            octet @ ..128 => octet + 1,
            octet => (octet - 127) * 128,
        };
        let (piece, rest) = stream.split_at(stream.len().min(len));
        stream = rest;
        (!piece.is_empty()).then_some(piece)
    })
}
