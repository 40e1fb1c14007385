//! Bare AMQP peers: one that has a library, and one that writes bytes.

use crate::support::PATIENCE;
use amiquip::{
    AmqpProperties, Channel, ConsumerMessage, ConsumerOptions, Publish, QueueDeclareOptions,
};
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

/// A bare AMQP peer, for messages that our client would not send.
pub struct Peer {
    // Before the connection, which closes it.
    pub channel: Channel,
    _connection: amiquip::Connection,
}

/// A message as a peer receives it.
#[derive(Debug)]
pub struct Message {
    pub body: Vec<u8>,
    pub properties: AmqpProperties,
    pub redelivered: bool,
}

impl Peer {
    pub fn connect(url: &str) -> Peer {
        let mut connection = amiquip::Connection::insecure_open(url).unwrap();
        let channel = connection.open_channel(None).unwrap();
        Peer {
            channel,
            _connection: connection,
        }
    }

    /// A new queue of our own; returns its name.
    pub fn callback_queue(&self) -> String {
        let options = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        self.channel
            .queue_declare("", options)
            .unwrap()
            .name()
            .to_owned()
    }

    pub fn publish(&self, queue: &str, body: &[u8], properties: AmqpProperties) {
        self.channel
            .basic_publish("", Publish::with_properties(body, queue, properties))
            .unwrap();
    }

    /// Takes the next message of a queue, waiting for it.
    pub fn receive(&self, queue: &str) -> Message {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(got) = self.channel.basic_get(queue, true).unwrap() {
                let delivery = got.delivery;
                return Message {
                    redelivered: delivery.redelivered,
                    body: delivery.body,
                    properties: delivery.properties,
                };
            }
            assert!(Instant::now() < deadline, "no message in '{queue}'");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether a queue has nothing to give.
    pub fn is_empty(&self, queue: &str) -> bool {
        self.channel.basic_get(queue, true).unwrap().is_none()
    }

    /// How many messages wait in a queue, and how many consumers it has.
    pub fn count(&self, queue: &str) -> (u32, u32) {
        let queue = self.channel.queue_declare_passive(queue).unwrap();
        (
            queue.declared_message_count().unwrap(),
            queue.declared_consumer_count().unwrap(),
        )
    }

    /// One request in the manner of the tutorial, and the message that answers it.
    pub fn ask(&self, queue: &str, body: &[u8], properties: AmqpProperties) -> Message {
        let callback = self.callback_queue();
        self.publish(queue, body, properties.with_reply_to(callback.clone()));
        self.receive(&callback)
    }
}

/// A peer that writes bytes, for messages that no AMQP library would make: properties that are
/// not UTF-8, tables nested without end.
pub struct RawPeer {
    socket: std::net::TcpStream,
}

impl RawPeer {
    /// Opens a connection and its channel 1.
    pub fn connect(url: &str) -> RawPeer {
        let url = url::Url::parse(url).unwrap();
        let host = url
            .host_str()
            .filter(|host| !host.is_empty())
            .unwrap_or("localhost");
        let socket = std::net::TcpStream::connect((host, url.port().unwrap_or(5672))).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_nodelay(true).unwrap();
        let mut peer = RawPeer { socket };
        peer.socket.write_all(b"AMQP\0\0\x09\x01").unwrap();
        peer.expect_method(10, 10); // start
        let user = if url.username().is_empty() {
            "guest"
        } else {
            url.username()
        };
        let response = format!("\0{user}\0{}", url.password().unwrap_or("guest"));
        let mut start_ok = long_string(b""); // no client properties
        start_ok.extend(short_string(b"PLAIN"));
        start_ok.extend(long_string(response.as_bytes()));
        start_ok.extend(short_string(b"en_US"));
        peer.send_method(0, 10, 11, &start_ok);
        let tune = peer.expect_method(10, 30);
        peer.send_method(0, 10, 31, &[&tune[..6], &[0, 0]].concat()); // no heartbeats
        peer.send_method(0, 10, 40, b"\x01/\0\0"); // open the virtual host /
        peer.expect_method(10, 41);
        peer.send_method(1, 20, 10, b"\0"); // open channel 1
        peer.expect_method(20, 11);
        peer
    }

    /// Publishes to a queue. `properties` are the bytes that `flags` announces, as they are.
    pub fn publish(&mut self, queue: &str, flags: u16, properties: &[u8], body: &[u8]) {
        let mut arguments = vec![0, 0, 0]; // reserved, the default exchange
        arguments.extend(short_string(queue.as_bytes()));
        arguments.push(0);
        self.send_method(1, 60, 40, &arguments);
        let mut header = vec![0, 60, 0, 0];
        header.extend((body.len() as u64).to_be_bytes());
        header.extend(flags.to_be_bytes());
        header.extend(properties);
        self.send(2, 1, &header);
        for chunk in body.chunks(100_000) {
            self.send(3, 1, chunk);
        }
    }

    /// Takes a message from a queue; returns its content header's payload, as it is.
    pub fn get_header(&mut self, queue: &str) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let arguments = [&[0, 0], &short_string(queue.as_bytes())[..], &[1]].concat();
            self.send_method(1, 60, 70, &arguments);
            let method = self.read_frame();
            if method[..4] == [0, 60, 0, 71] {
                return self.read_frame();
            }
            assert!(Instant::now() < deadline, "no message in {queue}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Declares a queue of our own that keeps its ten newest messages; returns its name.
    pub fn declare_bounded_queue(&mut self) -> String {
        let mut arguments = vec![0, 0];
        arguments.extend(short_string(b""));
        arguments.push(1 << 2); // exclusive
        let limit = [
            &short_string(b"x-max-length")[..],
            b"I",
            &10_u32.to_be_bytes(),
        ]
        .concat();
        arguments.extend(long_string(&limit));
        self.send_method(1, 50, 10, &arguments);
        let declared = self.expect_method(50, 11);
        let len = usize::from(declared[0]);
        String::from_utf8(declared[1..=len].to_vec()).unwrap()
    }

    /// Waits until the broker has taken all that was sent; panics if it has closed the channel.
    pub fn flush(&mut self) {
        self.send_method(1, 60, 10, &[0, 0, 0, 0, 0, 1, 0]); // qos, a round trip
        self.expect_method(60, 11);
    }

    fn send_method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) {
        let payload = [&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat();
        self.send(1, channel, &payload);
    }

    fn send(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let mut frame = vec![kind];
        frame.extend(channel.to_be_bytes());
        frame.extend(long_string(payload));
        frame.push(0xCE);
        self.socket.write_all(&frame).unwrap();
    }

    /// Reads the next frame: its payload, and the octet that ends it.
    fn read_frame(&mut self) -> Vec<u8> {
        let mut prefix = [0; 7];
        self.socket.read_exact(&mut prefix).unwrap();
        let len = u32::from_be_bytes(*prefix.last_chunk().unwrap());
        let mut payload = vec![0; len as usize + 1];
        self.socket.read_exact(&mut payload).unwrap();
        payload
    }

    /// Reads the next frame, which must be this method; returns its arguments.
    fn expect_method(&mut self, class: u16, method: u16) -> Vec<u8> {
        let mut payload = self.read_frame();
        let expected = [class.to_be_bytes(), method.to_be_bytes()].concat();
        let text = String::from_utf8_lossy(&payload).into_owned();
        assert_eq!(
            payload[..4],
            expected,
            "expected method {class}.{method}, got {text:?}"
        );
        payload.drain(..4);
        payload
    }
}

/// Bytes behind their length as one octet, as in a property or a queue's name.
pub fn short_string(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

/// Bytes behind their length as four octets, as in a table.
pub fn long_string(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

/// Takes deliveries from a queue with acknowledgement, as a consumer that never acks: a stand-in
/// for a server that takes requests and dies.
pub fn swallow(peer: &Peer, queue: &str, count: usize) {
    let consumer = peer
        .channel
        .basic_consume(queue, ConsumerOptions::default())
        .unwrap();
    for _ in 0..count {
        match consumer.receiver().recv_timeout(PATIENCE) {
            Ok(ConsumerMessage::Delivery(_)) => {}
            other => panic!("expected a delivery, got {other:?}"),
        }
    }
    // amiquip's trap: never drop a live consumer.
    consumer.cancel().unwrap();
    while let Ok(ConsumerMessage::Delivery(_)) = consumer.receiver().recv() {}
}
