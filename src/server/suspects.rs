//! Requests whose replies the broker does not take: it closes the channel, or the connection, and
//! delivers the request again, which would go on for ever. Pure; no I/O.
//!
//! Whatever the cause, a reply was sent, and then the channel was closed. If it was the only one
//! that the broker may not have seen yet, its request is *guilty*: it is not executed again when it
//! comes back. If there were several, all of them are *suspects*: they are executed again, but
//! one at a time, and the next begins when the broker has taken the reply to the last.

use crate::amqp::incoming::{CloseReason, Message};
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, Hash, Hasher, RandomState};

/// How many requests are remembered at most. Those that come back do so at once.
const KNOWN_MAX: usize = 1_000;

/// How much of a body's beginning, and of its end, tells it from others, in bytes.
const HASHED_MAX: usize = 4 << 10;

/// What tells a request from others when it comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key(u64);

impl Key {
    /// Of a message as it was delivered. The rest of its properties may differ when it comes back:
    /// a quorum queue counts deliveries in a header.
    pub fn of(message: &Message, hashing: &RandomState) -> Key {
        let properties = message.head.properties();
        let mut hasher = hashing.build_hasher();
        let ids = (properties.correlation_id, properties.message_id);
        let body = &message.body[..];
        (properties.reply_to, ids, body.len()).hash(&mut hasher);
        // Ids may not differ: some clients send one request at a time. All of a long body would
        // take long, and others are as good as sure to differ in its beginning or its end.
        let some = body.len().min(HASHED_MAX);
        // No byte twice: this is done for every request.
        let rest = some.max(body.len() - some);
        (&body[..some], &body[rest..]).hash(&mut hasher);
        Key(hasher.finish())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Known {
    /// It has come back before we were told that the channel of that number, on which it was
    /// answered, is closed. Why it was will be known in a moment.
    ToBeTold(u16),
    /// And whether it was on trial once when the same happened: it may have been another's fault.
    Suspect(bool),
    Guilty(CloseReason),
}

/// The suspect that has been begun, and the channel that its reply was sent on, once it was.
#[derive(Debug)]
struct Trial {
    key: Key,
    channel: Option<u16>,
}

/// The requests whose replies have cost a channel, or may have.
#[derive(Debug, Default)]
pub(crate) struct Suspects {
    /// The requests that were answered last on each channel, and whose replies the broker may not
    /// have seen yet: as many as it delivers without an acknowledgement.
    sent: HashMap<u16, VecDeque<Key>>,
    known: HashMap<Key, Known>,
    trial: Option<Trial>,
}

impl Suspects {
    /// A request has come back. If it was answered on a channel that we take for open, then that
    /// one has died, and we have not been told yet: its number is returned, and is to be asked for
    /// a sign of life ([`Suspects::acquit`]).
    pub fn has_come_back(&mut self, key: Key) -> Option<u16> {
        let (&channel, _) = self.sent.iter().find(|(_, sent)| sent.contains(&key))?;
        self.known.entry(key).or_insert(Known::ToBeTold(channel));
        Some(channel)
    }

    /// Whether a request may be begun now.
    pub fn may_begin(&self, key: Key) -> bool {
        match self.known.get(&key) {
            Some(Known::ToBeTold(_)) => false,
            Some(Known::Suspect(_)) => self.trial.is_none(),
            Some(Known::Guilty(_)) | None => true,
        }
    }

    /// Begins a request that has come back; why its reply cannot be sent, if that is known.
    pub fn begin(&mut self, key: Key) -> Option<CloseReason> {
        match self.known.remove(&key)? {
            Known::Guilty(reason) => Some(reason),
            known => {
                self.trial = Some(Trial { key, channel: None });
                self.known.insert(key, known);
                None
            }
        }
    }

    /// Whether the broker is to say when it has taken the reply to this request.
    pub fn is_on_trial(&self, key: Key) -> bool {
        self.trial.as_ref().is_some_and(|trial| trial.key == key)
    }

    /// A reply is sent on a channel, on which the broker delivers up to `prefetch` requests.
    pub fn sent(&mut self, channel: u16, key: Key, prefetch: u16) {
        let sent = self.sent.entry(channel).or_default();
        if sent.len() >= usize::from(prefetch) {
            sent.pop_front();
        }
        sent.push_back(key);
        if let Some(trial) = self.trial.as_mut().filter(|trial| trial.key == key) {
            trial.channel = Some(channel);
        }
    }

    /// The broker has taken whatever was sent on a channel.
    pub fn clear(&mut self, channel: u16) {
        if let Some(sent) = self.sent.get_mut(&channel) {
            sent.clear();
        }
    }

    /// As [`Suspects::clear`], after it was asked to say so.
    pub fn acquit(&mut self, channel: u16) {
        self.clear(channel);
        self.known
            .retain(|_, known| *known != Known::ToBeTold(channel));
        if let Some(trial) = self.trial.take_if(|trial| trial.channel == Some(channel)) {
            self.known.remove(&trial.key);
        }
    }

    /// The worker is done with a request, answered or not.
    pub fn has_ended(&mut self, key: Key) {
        self.trial
            .take_if(|trial| trial.key == key && trial.channel.is_none());
    }

    /// The broker has closed a channel.
    pub fn channel_closed(&mut self, channel: u16, reason: &CloseReason) {
        let sent = self.sent.remove(&channel).unwrap_or_default();
        self.accuse(sent, reason);
        self.known
            .retain(|_, known| *known != Known::ToBeTold(channel));
        self.trial.take_if(|trial| trial.channel == Some(channel));
    }

    /// The connection is gone, with all channels; the broker has closed it, if there is a reason.
    pub fn connection_closed(&mut self, reason: Option<&CloseReason>) {
        let sent = std::mem::take(&mut self.sent);
        if let Some(reason) = reason {
            self.accuse(sent.into_values().flatten(), reason);
        }
        self.known
            .retain(|_, known| !matches!(known, Known::ToBeTold(_)));
        self.trial.take_if(|trial| trial.channel.is_some());
    }

    fn accuse(&mut self, sent: impl IntoIterator<Item = Key>, reason: &CloseReason) {
        if !reason.blames_a_message() {
            return;
        }
        // It may have come back on one channel after the other already.
        let mut sent: HashSet<_> = sent.into_iter().collect();
        // What is on trial was accused before, and not alone.
        if let Some(trial) = &self.trial
            && sent.contains(&trial.key)
        {
            if self.known.get(&trial.key) == Some(&Known::Suspect(true)) {
                sent = HashSet::from([trial.key]);
            } else if sent.len() > 1 {
                self.known.insert(trial.key, Known::Suspect(true));
            }
        }
        if self.known.len() + sent.len() > KNOWN_MAX {
            self.known.clear();
        }
        let alone = sent.len() == 1;
        for key in sent {
            if alone {
                self.known.insert(key, Known::Guilty(reason.clone()));
            } else if !matches!(
                self.known.get(&key),
                Some(Known::Guilty(_) | Known::Suspect(_))
            ) {
                self.known.insert(key, Known::Suspect(false));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault() -> CloseReason {
        CloseReason {
            code: 541,
            text: "INTERNAL_ERROR".to_owned(),
        }
    }

    #[test]
    fn the_only_reply_that_the_broker_may_not_have_seen_is_guilty() {
        let mut suspects = Suspects::default();
        suspects.sent(1, Key(1), 1);
        suspects.clear(1); // the next was delivered
        suspects.sent(1, Key(2), 1);
        suspects.sent(2, Key(3), 1);
        suspects.channel_closed(1, &fault());
        assert_eq!(suspects.begin(Key(1)), None);
        assert_eq!(suspects.begin(Key(2)), Some(fault()));
        assert_eq!(suspects.begin(Key(3)), None);
        assert!(suspects.trial.is_none());
    }

    #[test]
    fn suspects_are_tried_one_at_a_time_until_one_is_guilty() {
        let mut suspects = Suspects::default();
        suspects.sent(1, Key(1), 1);
        suspects.sent(2, Key(2), 1);
        suspects.connection_closed(Some(&fault()));
        assert_eq!(suspects.begin(Key(1)), None);
        assert!(!suspects.may_begin(Key(2)));
        assert!(suspects.may_begin(Key(4)), "no suspect");
        assert!(suspects.is_on_trial(Key(1)));
        suspects.sent(7, Key(1), 1);
        suspects.has_ended(Key(1));
        assert!(!suspects.may_begin(Key(2)), "not seen yet");
        suspects.acquit(7);
        assert!(suspects.may_begin(Key(2)));
        assert_eq!(suspects.begin(Key(2)), None);
        suspects.sent(8, Key(2), 1);
        suspects.sent(9, Key(5), 1);
        suspects.connection_closed(Some(&fault()));
        // It may have been the other one, so once more.
        assert_eq!(suspects.begin(Key(2)), None);
        suspects.sent(8, Key(2), 1);
        suspects.sent(9, Key(6), 1);
        suspects.connection_closed(Some(&fault()));
        assert_eq!(suspects.begin(Key(2)), Some(fault()));
        assert_eq!(suspects.begin(Key(6)), None);
        assert!(suspects.trial.is_none(), "it was not the cause");
    }

    #[test]
    fn one_that_comes_back_before_its_channel_is_known_to_be_dead_waits_until_it_is() {
        let mut suspects = Suspects::default();
        suspects.sent(1, Key(1), 1);
        assert_eq!(suspects.has_come_back(Key(2)), None);
        assert_eq!(suspects.has_come_back(Key(1)), Some(1));
        assert!(suspects.may_begin(Key(2)));
        assert!(!suspects.may_begin(Key(1)));
        suspects.channel_closed(1, &fault());
        assert!(suspects.may_begin(Key(1)));
        assert_eq!(suspects.begin(Key(1)), Some(fault()));
        // Or the channel is alive, or was closed for another reason.
        let timeout = CloseReason {
            code: 406,
            text: "PRECONDITION_FAILED - delivery acknowledgement on channel 3 timed out".into(),
        };
        suspects.sent(2, Key(3), 1);
        assert_eq!(suspects.has_come_back(Key(3)), Some(2));
        suspects.acquit(2);
        assert!(suspects.may_begin(Key(3)));
        suspects.sent(3, Key(4), 1);
        assert_eq!(suspects.has_come_back(Key(4)), Some(3));
        suspects.channel_closed(3, &timeout);
        assert!(suspects.may_begin(Key(4)));
        suspects.sent(4, Key(5), 1);
        assert_eq!(suspects.has_come_back(Key(5)), Some(4));
        suspects.connection_closed(None);
        assert!(suspects.may_begin(Key(5)));
        assert_eq!(suspects.begin(Key(5)), None);
    }

    #[test]
    fn a_connection_that_is_lost_accuses_nobody() {
        let mut suspects = Suspects::default();
        suspects.sent(1, Key(1), 1);
        suspects.connection_closed(None);
        assert_eq!(suspects.begin(Key(1)), None);
        assert!(suspects.known.is_empty());
    }
}
