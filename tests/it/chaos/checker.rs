//! Judges a history. Pure: it knows the history and nothing else.

use crate::chaos::history::{
    Began, CallId, Called, Ended, Event, Failure, Fault, FaultKind, Micros, Outcome, Party, Retry,
};
use std::collections::{BTreeMap, HashMap};
use std::fmt;

const SECOND: Micros = 1_000_000;

/// How late the machine may be: it is shared, and nothing here is a question of speed. It is also
/// what a message may be on its way for when no fault holds it up.
pub const NOISE: Micros = 2 * SECOND;

/// How long after its deadline a call may end. It is a matter of waking a thread.
const END_GRACE: Micros = 5 * SECOND;

/// A call whose timeout is longer by this than the faults that strike it outlasts them. If it is
/// also sent again when it may have been lost, it must be answered.
const OUTLASTS: Micros = 15 * SECOND;

/// What holds on all calls and executions of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// A call ends once, and by its deadline; if its client is away then, when it is back.
    Ends,
    /// An answer comes by the deadline, or is none.
    InTime,
    /// An answer is the answer to its question.
    Right,
    /// What is answered, a server has executed to its end.
    Executed,
    /// What is executed, a client has sent, before that, and to a queue of that server.
    Sent,
    /// An execution does not begin after its caller's deadline, and the slack: see [`Case::slack`].
    NotTooLate,
    /// A request is executed once, unless a fault strikes it or its client sends it again.
    Once,
    /// A call that is not answered was struck by a fault that explains it: see [`Case::explains`].
    Explained,
}

pub const RULES: [Rule; 8] = [
    Rule::Ends,
    Rule::InTime,
    Rule::Right,
    Rule::Executed,
    Rule::Sent,
    Rule::NotTooLate,
    Rule::Once,
    Rule::Explained,
];

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::Ends => "every call ends once, by its deadline",
            Rule::InTime => "no answer comes after the deadline",
            Rule::Right => "every answer is the answer to its question",
            Rule::Executed => "nothing is answered that no server executed",
            Rule::Sent => "nothing is executed that no client sent",
            Rule::NotTooLate => "nothing begins after its caller's deadline and the slack",
            Rule::Once => "nothing is executed twice without a fault or a client that sends again",
            Rule::Explained => "every call without an answer is explained by a fault",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub rule: Rule,
    /// `None` if it is an execution that belongs to no call.
    pub call: Option<CallId>,
    pub what: String,
}

/// Everything that is known of one call.
#[derive(Debug, Clone, Default)]
pub struct Story {
    pub called: Option<Called>,
    pub ended: Vec<Ended>,
    pub executions: Vec<Began>,
    /// By which server, and when.
    pub finished: Vec<(Party, Micros)>,
}

/// A history, by calls.
#[derive(Debug, Clone, Default)]
pub struct Case {
    pub seed: u64,
    pub began: Micros,
    body_max: u64,
    /// Their names, and the queues that they call or serve.
    pub parties: BTreeMap<Party, (String, String)>,
    pub calls: HashMap<CallId, Story>,
    pub faults: Vec<Fault>,
    /// Which client left, and when.
    left: Vec<(Party, Micros)>,
    /// Executions of what does not say which call it is.
    strangers: Vec<Began>,
}

/// A call, from when it was made until a certain time.
#[derive(Clone, Copy)]
struct Span<'c> {
    called: &'c Called,
    until: Micros,
}

impl Case {
    pub fn of(events: impl IntoIterator<Item = Event>) -> Case {
        let mut case = Case::default();
        for event in events {
            case.learn(event);
        }
        case
    }

    fn learn(&mut self, event: Event) {
        match event {
            Event::Run { seed, at, body_max } => {
                (self.seed, self.began, self.body_max) = (seed, at, body_max);
            }
            Event::Party { party, name, queue } => {
                self.parties.insert(party, (name, queue));
            }
            Event::Called(called) => {
                let story = self.calls.entry(called.call).or_default();
                story.called = Some(called);
            }
            Event::Ended(ended) => self.calls.entry(ended.call).or_default().ended.push(ended),
            Event::Began(began) => match began.call {
                Some(call) => self.calls.entry(call).or_default().executions.push(began),
                None => self.strangers.push(began),
            },
            Event::Finished { call, server, at } => {
                if let Some(call) = call {
                    let story = self.calls.entry(call).or_default();
                    story.finished.push((server, at));
                }
            }
            Event::Left { client, at } => self.left.push((client, at)),
            Event::Fault(fault) => self.faults.push(fault),
        }
    }

    /// What is wrong with it.
    pub fn violations(&self) -> Vec<Violation> {
        let stranger = |began: &Began| Violation {
            rule: Rule::Sent,
            call: None,
            what: format!("{} executed what says no call", self.name(began.server)),
        };
        let mut violations: Vec<_> = self.strangers.iter().map(stranger).collect();
        for (&call, story) in &self.calls {
            let mut blame = |rule, what| {
                let call = Some(call);
                violations.push(Violation { rule, call, what });
            };
            match &story.called {
                Some(called) => self.judge(called, story, &mut blame),
                None => blame(Rule::Sent, "no client has made this call".to_owned()),
            }
        }
        violations.sort_by_key(|violation| (violation.rule, violation.call));
        violations
    }

    fn judge(&self, called: &Called, story: &Story, blame: &mut impl FnMut(Rule, String)) {
        for began in &story.executions {
            self.judge_execution(called, began, blame);
        }
        if let Some(what) = self.twice(called, story) {
            blame(Rule::Once, what);
        }
        match &story.ended[..] {
            [ended] => self.judge_end(called, ended, story, blame),
            [] => blame(Rule::Ends, "it has not ended".to_owned()),
            several => blame(Rule::Ends, format!("it has ended {} times", several.len())),
        }
    }

    fn judge_end(
        &self,
        called: &Called,
        ended: &Ended,
        story: &Story,
        blame: &mut impl FnMut(Rule, String),
    ) {
        let due = called.deadline().max(ended.back);
        if ended.at > due + END_GRACE {
            let late = seconds(ended.at - due);
            blame(Rule::Ends, format!("it ended {late} after its deadline"));
        }
        match &ended.outcome {
            Outcome::Answered { answer, to } => {
                if ended.latency > called.timeout {
                    let latency = seconds(ended.latency);
                    blame(Rule::InTime, format!("its answer took {latency}"));
                }
                if *answer != called.answer || *to != Some(called.call) {
                    blame(Rule::Right, format!("it got the answer to call {to:?}"));
                }
                if !story.finished.iter().any(|&(_, at)| at <= ended.at) {
                    blame(
                        Rule::Executed,
                        "nobody had executed it to its end".to_owned(),
                    );
                }
            }
            Outcome::Failed { kind, message } => {
                if !self.is_explained(called, ended.at, *kind) {
                    blame(Rule::Explained, message.clone());
                }
            }
            Outcome::Abandoned => {
                if !self.left_during(called, ended.at) {
                    blame(Rule::Explained, "its client has not left".to_owned());
                }
            }
        }
    }

    fn judge_execution(
        &self,
        called: &Called,
        began: &Began,
        blame: &mut impl FnMut(Rule, String),
    ) {
        if began.question != called.question {
            blame(
                Rule::Sent,
                "what was executed is another question".to_owned(),
            );
        }
        if began.at < called.at {
            blame(Rule::Sent, "it was executed before it was sent".to_owned());
        }
        if self.queue(began.server) != self.queue(called.client) {
            let server = self.name(began.server);
            blame(Rule::Sent, format!("{server} does not serve its queue"));
        }
        let Some(left) = began.left else {
            return blame(
                Rule::NotTooLate,
                "the server knew of no deadline".to_owned(),
            );
        };
        let late = began.at.saturating_sub(called.deadline());
        if late > 0 && late > self.slack(called, began, left) {
            let (late, server) = (seconds(late), self.name(began.server));
            blame(Rule::NotTooLate, format!("{server} began {late} too late"));
        }
    }

    /// How long after its caller's deadline an execution may begin.
    ///
    /// A request carries what is left of the deadline when it leaves, as a span of time and not as a
    /// time of day, and whoever holds it counts it anew: the broker from when it has the whole
    /// request, for as long as that waits in the queue, and the server from when it arrives there.
    ///
    /// - So the broker lets go of a request no later than at the deadline and the time that it was
    ///   on its way from the client; and it arrives here no later than that and the time on the way
    ///   to the server. Both ways take as long as faults hold it up on them, and [`NOISE`].
    /// - It may then have been in the server for as long as the server counts down: from what it
    ///   carried, which is at most the timeout, to what was left when it began.
    fn slack(&self, called: &Called, began: &Began, left: Micros) -> Micros {
        let in_server = called.timeout.saturating_sub(left);
        let span = Span {
            called,
            until: began.at,
        };
        NOISE + in_server + self.held_up(span)
    }

    /// For how long of a span faults were there that can hold a message up.
    fn held_up(&self, span: Span<'_>) -> Micros {
        let mut times: Vec<_> = self
            .faults
            .iter()
            .filter(|fault| self.strikes(fault, span.called))
            .map(|fault| (fault.from.max(span.called.at), fault.until.min(span.until)))
            .filter(|(from, until)| from < until)
            .collect();
        times.sort_unstable();
        let mut counted_to = 0;
        let mut sum = 0;
        for (from, until) in times {
            sum += until.saturating_sub(from.max(counted_to));
            counted_to = counted_to.max(until);
        }
        sum
    }

    /// Why it was executed more than once, if there is no reason for that.
    fn twice(&self, called: &Called, story: &Story) -> Option<String> {
        if story.executions.len() < 2 {
            return None;
        }
        let last = story.executions.iter().map(|began| began.at).max()?;
        let open_for = last.saturating_sub(called.at);
        let sends_again = match called.retry {
            Retry::Never => false,
            Retry::LostConnection => called.confirms,
            // Neither clock is ours.
            Retry::Unanswered(time) => called.confirms || open_for >= time - time / 10,
        };
        let span = Span {
            called,
            until: last,
        };
        let struck = self.striking(span).next().is_some();
        (!sends_again && !struck).then(|| format!("it began {} times", story.executions.len()))
    }

    /// The faults that strike a call while it is open, what follows them included.
    fn striking<'c>(&'c self, span: Span<'c>) -> impl Iterator<Item = &'c Fault> {
        self.faults.iter().filter(move |fault| {
            let over = fault.until + aftermath(fault.kind);
            fault.from <= span.until && span.called.at <= over && self.strikes(fault, span.called)
        })
    }

    /// The same, for a report.
    pub fn faults_around<'c>(&'c self, story: &'c Story) -> Vec<&'c Fault> {
        let Some(called) = &story.called else {
            return Vec::new();
        };
        let ends = story.ended.iter().map(|ended| ended.at);
        let begins = story.executions.iter().map(|began| began.at);
        let until = ends.chain(begins).max().unwrap_or(called.deadline());
        self.striking(Span { called, until }).collect()
    }

    /// Whether a fault is one of the call's client, of its queue, of a server of it, or of all.
    fn strikes(&self, fault: &Fault, called: &Called) -> bool {
        let queue = self.queue(called.client);
        match (fault.party, &fault.queue) {
            (Some(party), _) if party == called.client => true,
            (Some(party), _) => is_server(party) && self.queue(party) == queue,
            (None, Some(struck)) => queue == Some(struck),
            (None, None) => true,
        }
    }

    fn is_explained(&self, called: &Called, until: Micros, kind: Failure) -> bool {
        let too_long = called.bytes > self.body_max;
        match kind {
            Failure::Rejected if too_long => return true,
            Failure::Closed => return self.left_during(called, until),
            // The machine alone can make it wait for so long.
            Failure::Timeout if called.timeout < NOISE => return true,
            _ => {}
        }
        let sent_again = match called.retry {
            Retry::Never => false,
            Retry::LostConnection => called.confirms,
            Retry::Unanswered(_) => true,
        };
        // What the broker refuses to take is told at once.
        let is_refusal = matches!(kind, Failure::Refused | Failure::Rejected);
        let span = Span { called, until };
        let outlasts = called.timeout >= self.held_up(span) + OUTLASTS;
        if outlasts && sent_again && !is_refusal {
            return false;
        }
        self.striking(span)
            .any(|fault| self.explains(fault, called, kind))
    }

    /// Whether a fault that has struck a call can be why it ended so.
    fn explains(&self, fault: &Fault, called: &Called, kind: Failure) -> bool {
        use FaultKind as F;
        let loses_connection = !matches!(
            fault.kind,
            F::ServerKilled
                | F::ServerStopped
                | F::QueueDeleted
                | F::QueuePurged
                | F::MaxLengthPolicy
                | F::TtlPolicy
        );
        // Of a server's connection a client does not know.
        let is_ours = fault.party.is_none_or(|party| party == called.client);
        match kind {
            Failure::Timeout => true,
            Failure::ConnectionLost | Failure::Unreachable => loses_connection && is_ours,
            Failure::NoServer => matches!(
                fault.kind,
                F::BrokerKilled | F::NodeKilled | F::QueueDeleted
            ),
            Failure::Rejected => {
                called.confirms
                    && matches!(
                        fault.kind,
                        F::MaxLengthPolicy | F::QueueDeleted | F::NodeKilled
                    )
            }
            Failure::Refused => fault.kind == F::PermissionsTaken,
            Failure::Remote | Failure::Closed | Failure::Other => false,
        }
    }

    fn left_during(&self, called: &Called, until: Micros) -> bool {
        let open = called.at..=until;
        self.left
            .iter()
            .any(|(client, at)| *client == called.client && open.contains(at))
    }

    pub fn name(&self, party: Party) -> &str {
        self.parties.get(&party).map_or("?", |(name, _)| name)
    }

    fn queue(&self, party: Party) -> Option<&String> {
        self.parties.get(&party).map(|(_, queue)| queue)
    }
}

/// Servers have the numbers from here.
pub const FIRST_SERVER: Party = 100;

fn is_server(party: Party) -> bool {
    party >= FIRST_SERVER
}

/// For how long a fault that is over has consequences.
fn aftermath(kind: FaultKind) -> Micros {
    use FaultKind as F;
    match kind {
        // Everyone connects again, up to 5 s after the last attempt; servers, and then clients that
        // wait for their queue.
        F::BrokerKilled
        | F::BrokerStopped
        | F::NodeKilled
        | F::ConnectionsClosed
        | F::ConnectionClosed
        | F::PermissionsTaken
        | F::PasswordRotated
        | F::LineDelayed
        | F::LineDribbling
        | F::LineCut
        | F::LineSilentToBroker
        | F::LineSilentFromBroker
        | F::LineThin
        | F::MemoryAlarm => 12 * SECOND,
        // A server looks for the queue and declares it, a client looks after it again.
        F::QueueDeleted | F::ServerKilled | F::ServerStopped => 5 * SECOND,
        F::QueuePurged | F::MaxLengthPolicy | F::TtlPolicy | F::MachineStalled => NOISE,
    }
}

pub fn seconds(time: Micros) -> String {
    format!("{:.3} s", time as f64 / SECOND as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: Party = 1;
    const OTHER: Party = 2;
    const SERVER: Party = FIRST_SERVER;
    const CALL: CallId = 7;

    fn called() -> Called {
        Called {
            call: CALL,
            client: CLIENT,
            at: 10 * SECOND,
            sent: 10 * SECOND,
            timeout: 4 * SECOND,
            retry: Retry::Never,
            confirms: false,
            bytes: 100,
            question: 1,
            answer: 2,
            work: 0,
        }
    }

    fn began(at: Micros) -> Began {
        Began {
            call: Some(CALL),
            server: SERVER,
            at,
            question: 1,
            left: Some(4 * SECOND),
            redelivered: false,
        }
    }

    /// Its handler takes half a second.
    fn finished(began: &Began) -> Event {
        Event::Finished {
            call: began.call,
            server: began.server,
            at: began.at + SECOND / 2,
        }
    }

    fn ended(at: Micros, outcome: Outcome) -> Ended {
        Ended {
            call: CALL,
            at,
            back: 0,
            latency: at - 10 * SECOND,
            outcome,
        }
    }

    fn answered(at: Micros) -> Ended {
        let (answer, to) = (2, Some(CALL));
        ended(at, Outcome::Answered { answer, to })
    }

    fn failed(at: Micros, kind: Failure) -> Ended {
        let message = String::new();
        ended(at, Outcome::Failed { kind, message })
    }

    fn fault(kind: FaultKind, from: Micros, until: Micros) -> Fault {
        Fault {
            kind,
            from: from * SECOND,
            until: until * SECOND,
            party: None,
            queue: None,
            detail: String::new(),
        }
    }

    /// Which rules are broken by a call, its executions, its ends, and what else there is.
    fn broken(called: Called, began: &[Began], ended: &[Ended], more: &[Event]) -> Vec<Rule> {
        let party = |party, name: &str, queue: &str| Event::Party {
            party,
            name: name.to_owned(),
            queue: queue.to_owned(),
        };
        let run = Event::Run {
            seed: 0,
            at: 0,
            body_max: 1000,
        };
        let parties = [
            run,
            party(CLIENT, "client", "queue"),
            party(OTHER, "other", "another"),
            party(SERVER, "server", "queue"),
            party(SERVER + 1, "other server", "another"),
        ];
        let events = parties
            .into_iter()
            .chain([Event::Called(called)])
            .chain(began.iter().cloned().map(Event::Began))
            .chain(began.iter().map(finished))
            .chain(ended.iter().cloned().map(Event::Ended))
            .chain(more.iter().cloned());
        let violations = Case::of(events).violations();
        violations.iter().map(|violation| violation.rule).collect()
    }

    fn broken_by_failure(called: Called, kind: Failure, faults: &[Fault]) -> Vec<Rule> {
        let faults: Vec<_> = faults.iter().cloned().map(Event::Fault).collect();
        let at = called.at + called.timeout.min(4 * SECOND);
        broken(called, &[], &[failed(at, kind)], &faults)
    }

    #[test]
    fn a_call_that_is_answered_in_time_breaks_no_rule() {
        let (began, ended) = (began(11 * SECOND), answered(12 * SECOND));
        assert_eq!(broken(called(), &[began], &[ended], &[]), []);
    }

    #[test]
    fn a_call_that_does_not_end_is_found() {
        assert_eq!(broken(called(), &[], &[], &[]), [Rule::Ends]);
    }

    #[test]
    fn a_call_that_ends_twice_is_found() {
        let (began, ended) = (began(11 * SECOND), answered(12 * SECOND));
        let ends = [ended.clone(), ended];
        assert_eq!(broken(called(), &[began], &ends, &[]), [Rule::Ends]);
    }

    #[test]
    fn a_call_that_ends_long_after_its_deadline_is_found_unless_its_client_was_away() {
        let outage = [Event::Fault(fault(FaultKind::BrokerStopped, 10, 20))];
        let mut end = failed(20 * SECOND, Failure::Timeout);
        assert_eq!(broken(called(), &[], &[end.clone()], &outage), [Rule::Ends]);
        end.back = 19 * SECOND;
        assert_eq!(broken(called(), &[], &[end], &outage), []);
    }

    #[test]
    fn an_answer_after_the_deadline_is_found() {
        let (began, end) = (began(11 * SECOND), answered(15 * SECOND));
        assert_eq!(broken(called(), &[began], &[end], &[]), [Rule::InTime]);
    }

    #[test]
    fn the_answer_to_another_question_is_found() {
        for (answer, to) in [(3, Some(CALL)), (2, Some(CALL + 1)), (2, None)] {
            let end = ended(12 * SECOND, Outcome::Answered { answer, to });
            let began = began(11 * SECOND);
            assert_eq!(broken(called(), &[began], &[end], &[]), [Rule::Right]);
        }
    }

    #[test]
    fn an_answer_that_nobody_has_worked_out_is_found() {
        let end = answered(12 * SECOND);
        let ends = std::slice::from_ref(&end);
        assert_eq!(broken(called(), &[], ends, &[]), [Rule::Executed]);
        // One began later, the other had not finished.
        for at in [13 * SECOND, 12 * SECOND - SECOND / 4] {
            let found = broken(called(), &[began(at)], ends, &[]);
            assert_eq!(found, [Rule::Executed], "{at}");
        }
    }

    #[test]
    fn an_execution_of_what_no_client_has_sent_is_found() {
        let mut unknown = began(11 * SECOND);
        unknown.call = Some(CALL + 1);
        let mut unnamed = began(11 * SECOND);
        unnamed.call = None;
        let mut altered = began(11 * SECOND);
        altered.question = 3;
        let mut elsewhere = began(11 * SECOND);
        elsewhere.server = SERVER + 1;
        for wrong in [unknown, unnamed, altered, elsewhere, began(9 * SECOND)] {
            let right = began(11 * SECOND);
            let all = [right, wrong];
            let mut repeated = called();
            repeated.retry = Retry::Unanswered(1);
            let found = broken(repeated, &all, &[answered(12 * SECOND)], &[]);
            assert_eq!(found, [Rule::Sent], "{:?}", all[1]);
        }
    }

    #[test]
    fn an_execution_that_begins_too_late_is_found() {
        let late = |left, faults: &[Event]| {
            let mut late = began(17 * SECOND); // 3 s after the deadline
            late.left = Some(left);
            let end = failed(14 * SECOND, Failure::Timeout);
            let alarm = Event::Fault(Fault {
                party: Some(CLIENT),
                ..fault(FaultKind::LineDelayed, 9, 10)
            });
            broken(called(), &[late], &[end], &[&[alarm], faults].concat())
        };
        // The server had it for no time, or for 2 s.
        assert_eq!(late(4 * SECOND, &[]), [Rule::NotTooLate]);
        assert_eq!(late(2 * SECOND, &[]), []);
        // Somebody held it up, or something that has nothing to do with it.
        let stopped = fault(FaultKind::ServerStopped, 12, 14);
        let party = |party| {
            let party = Some(party);
            [Event::Fault(Fault {
                party,
                ..stopped.clone()
            })]
        };
        assert_eq!(late(4 * SECOND, &party(SERVER)), []);
        assert_eq!(late(4 * SECOND, &party(SERVER + 1)), [Rule::NotTooLate]);
    }

    #[test]
    fn an_execution_without_a_deadline_is_found() {
        let mut endless = began(11 * SECOND);
        endless.left = None;
        let end = answered(12 * SECOND);
        assert_eq!(
            broken(called(), &[endless], &[end], &[]),
            [Rule::NotTooLate]
        );
    }

    #[test]
    fn a_second_execution_without_a_reason_is_found() {
        let twice = [began(11 * SECOND), began(11 * SECOND + SECOND / 2)];
        let end = [answered(12 * SECOND)];
        assert_eq!(broken(called(), &twice, &end, &[]), [Rule::Once]);
        let killed = Event::Fault(fault(FaultKind::ServerKilled, 11, 12));
        assert_eq!(broken(called(), &twice, &end, &[killed]), []);
        for (after, found) in [(SECOND, &[][..]), (2 * SECOND, &[Rule::Once])] {
            let mut repeated = called();
            repeated.retry = Retry::Unanswered(after);
            assert_eq!(broken(repeated, &twice, &end, &[]), found);
        }
    }

    #[test]
    fn a_call_that_fails_without_a_fault_is_found() {
        for kind in [
            Failure::Timeout,
            Failure::ConnectionLost,
            Failure::NoServer,
            Failure::Rejected,
            Failure::Refused,
            Failure::Unreachable,
            Failure::Remote,
            Failure::Closed,
            Failure::Other,
        ] {
            assert_eq!(broken_by_failure(called(), kind, &[]), [Rule::Explained]);
        }
        let end = ended(12 * SECOND, Outcome::Abandoned);
        assert_eq!(broken(called(), &[], &[end], &[]), [Rule::Explained]);
    }

    #[test]
    fn a_fault_explains_what_overlaps_it_and_can_follow_from_it() {
        let explained = |kind, fault| broken_by_failure(called(), kind, &[fault]).is_empty();
        let purged = |at| fault(FaultKind::QueuePurged, at, at);
        assert!(explained(Failure::Timeout, purged(12)));
        assert!(!explained(Failure::Timeout, purged(5)));
        assert!(!explained(Failure::Timeout, purged(15)));
        assert!(!explained(Failure::ConnectionLost, purged(12)));
        assert!(!explained(Failure::Refused, purged(12)));
        let taken = fault(FaultKind::PermissionsTaken, 12, 13);
        assert!(explained(Failure::Refused, taken.clone()));
        assert!(!explained(Failure::Remote, taken));
    }

    #[test]
    fn what_strikes_others_explains_nothing() {
        let explained = |kind, party| {
            let cut = Fault {
                party: Some(party),
                ..fault(FaultKind::LineCut, 12, 12)
            };
            broken_by_failure(called(), kind, &[cut]).is_empty()
        };
        assert!(explained(Failure::Timeout, CLIENT));
        assert!(explained(Failure::Timeout, SERVER));
        assert!(!explained(Failure::Timeout, OTHER));
        assert!(!explained(Failure::Timeout, SERVER + 1));
        assert!(explained(Failure::ConnectionLost, CLIENT));
        assert!(!explained(Failure::ConnectionLost, SERVER));
        let purged = |queue: &str| Fault {
            queue: Some(queue.to_owned()),
            ..fault(FaultKind::QueuePurged, 12, 12)
        };
        let timeout = |fault| broken_by_failure(called(), Failure::Timeout, &[fault]);
        assert_eq!(timeout(purged("queue")), []);
        assert_eq!(timeout(purged("another")), [Rule::Explained]);
    }

    #[test]
    fn a_call_that_outlasts_every_outage_has_no_excuse() {
        let mut patient = called();
        (patient.timeout, patient.retry) = (90 * SECOND, Retry::Unanswered(2 * SECOND));
        let killed = |until| {
            let killed = fault(FaultKind::BrokerKilled, 12, until);
            let end = failed(100 * SECOND, Failure::Timeout);
            broken(patient.clone(), &[], &[end], &[Event::Fault(killed)])
        };
        assert_eq!(killed(20), [Rule::Explained]);
        assert_eq!(killed(90), []);
        let taken = fault(FaultKind::PermissionsTaken, 12, 13);
        assert_eq!(broken_by_failure(patient, Failure::Refused, &[taken]), []);
    }

    #[test]
    fn some_calls_need_no_fault() {
        let mut hasty = called();
        hasty.timeout = SECOND / 10;
        assert_eq!(broken_by_failure(hasty, Failure::Timeout, &[]), []);
        let mut long = called();
        long.bytes = 1001;
        assert_eq!(broken_by_failure(long, Failure::Rejected, &[]), []);
        let left = [Event::Left {
            client: CLIENT,
            at: 12 * SECOND,
        }];
        let closed = failed(13 * SECOND, Failure::Closed);
        assert_eq!(broken(called(), &[], &[closed], &left), []);
        let dropped = ended(13 * SECOND, Outcome::Abandoned);
        assert_eq!(broken(called(), &[], &[dropped], &left), []);
    }
}
