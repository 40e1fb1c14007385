//! The way in, from a socket on which the bytes arrive in pieces: to us, whoever reads, and to
//! amiquip.

use crate::amqp::incoming::{CloseReason, Incoming, Tune, frame_len};
use crate::amqp::stream::{Opened, Stream, share};
use crate::amqp::transport::Transport;
use crate::bytes::assembled::{assemble, pieces, split};
use crate::bytes::bounds::{in_memory, in_time};
use crossbeam_channel::unbounded;
use rustix::net::sockopt::set_socket_linger;
use std::io::{ErrorKind, Read, Write};
use std::iter::once;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long anything may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is read as a sign of life is no frame of the broker's.
const HEARTBEAT: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 0xCE];

/// Whoever reads it, in whatever pieces it arrives, a stream comes out as it went in: what is ours to
/// us, the rest to amiquip. What is no frame ends the connection, and all before it counts.
pub fn socket(input: &[u8]) {
    let (cuts, stream) = split(input);
    let count = pieces(cuts, stream).count();
    in_time(stream.len(), count, || arrive(cuts, stream));
}

fn arrive(cuts: &[u8], stream: &[u8]) {
    let expected = assemble(once(stream));
    let (near, mut far) = pair();
    let (sink, incoming) = unbounded::<Incoming>();
    let Opened {
        stream: mut amiquips,
        inbox,
        ..
    } = share(Transport::Plain(near), None, Box::new(sink.clone())).unwrap();
    let mut passed_on = Vec::new();
    let mut arrived = 0;
    for (piece, octet) in pieces(cuts, stream).zip(cuts.iter().cycle()) {
        if far.write_all(piece).is_err() {
            break; // it has been ended
        }
        arrived += piece.len();
        let may_go_on = match octet & 1 == 0 {
            true => read_as_amiquip(&mut amiquips, &mut passed_on).is_none(),
            false => inbox.try_lead().is_some_and(|mut lead| {
                let accept = |incoming| sink.send(incoming).unwrap();
                lead.read(Duration::from_millis(1), Duration::ZERO, accept)
                    .is_ok()
            }),
        };
        in_memory(arrived, inbox.memory());
        if !may_go_on {
            break;
        }
    }
    let _ = far.shutdown(Shutdown::Write);
    let began = Instant::now();
    let end = loop {
        if let Some(end) = read_as_amiquip(&mut amiquips, &mut passed_on) {
            break end;
        }
        assert!(began.elapsed() < PATIENCE, "the end does not come out");
    };
    assert_eq!(end == ErrorKind::InvalidData, expected.malformed);
    let frames = for_amiquip(&expected.passed_on);
    assert_eq!(for_amiquip(&passed_on), frames);
    let reasons = frames
        .iter()
        .find_map(|frame| CloseReason::from_frame(frame));
    assert_eq!(inbox.close_reason(), reasons.as_ref());
    assert_eq!(incoming.try_iter().collect::<Vec<_>>(), expected.incoming);
    // Reset, so that the ports are free again at once.
    set_socket_linger(&far, Some(Duration::ZERO)).unwrap();
    drop(far);
}

/// Both ends of a connection.
fn pair() -> (Arc<TcpStream>, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    far.set_write_timeout(Some(PATIENCE)).unwrap();
    (Arc::new(near), far)
}

/// Reads as amiquip does, until there is nothing more to read for now; or how it has ended.
fn read_as_amiquip(stream: &mut Stream, passed_on: &mut Vec<u8>) -> Option<ErrorKind> {
    let mut buffer = [0; 512];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Some(ErrorKind::UnexpectedEof),
            Ok(len) => passed_on.extend_from_slice(&buffer[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) => return Some(error.kind()),
        }
    }
}

/// The frames as amiquip is to have them: no heartbeat of 0 seconds is agreed on, and signs of life
/// may come at any time.
fn for_amiquip(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while let Some(len) = frame_len(bytes).unwrap() {
        let (frame, rest) = bytes.split_at(len);
        let mut frame = frame.to_vec();
        if Tune::from_frame(&frame).is_some_and(|tune| tune.heartbeat == 0) {
            Tune::set_heartbeat(&mut frame, u16::MAX);
        }
        if frame != HEARTBEAT {
            frames.push(frame);
        }
        bytes = rest;
    }
    assert!(bytes.is_empty(), "a part of a frame");
    frames
}
