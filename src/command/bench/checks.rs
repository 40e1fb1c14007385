//! Conditions on what was measured: `--fail-if 'p99>20ms'`, `--find-rate 'p99<20ms'`.

use crate::command::bench::tally::Measured;
use std::fmt;
use std::time::Duration;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    Min,
    Mean,
    P50,
    P90,
    P99,
    P99_9,
    Max,
    Rate,
    Errors,
}

const METRICS: [(&str, Metric); 9] = [
    ("min", Metric::Min),
    ("mean", Metric::Mean),
    ("p50", Metric::P50),
    ("p90", Metric::P90),
    ("p99", Metric::P99),
    ("p99.9", Metric::P99_9),
    ("max", Metric::Max),
    ("rate", Metric::Rate),
    ("errors", Metric::Errors),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    Less,
    AtMost,
    Greater,
    AtLeast,
}

/// The longer ones first: a text that begins with `<=` begins with `<`, too.
const OPERATORS: [(&str, Operator); 4] = [
    ("<=", Operator::AtMost),
    (">=", Operator::AtLeast),
    ("<", Operator::Less),
    (">", Operator::Greater),
];

/// What may be said.
pub const SYNTAX: &str = "expected a metric, one of < > <= >= and a value, such as p99>20ms, \
                          rate<1000 or errors>0; metrics are min, mean, p50, p90, p99, p99.9 and \
                          max, with a duration, and rate and errors, with a number";

/// Something that holds of what was measured, or does not. Printed, it is as it was typed.
#[derive(Debug, Clone)]
pub struct Condition {
    text: String,
    pub metric: Metric,
    pub operator: Operator,
    /// In ms, requests a second, or requests.
    limit: f64,
}

impl Condition {
    /// Reads what was typed.
    ///
    /// # Errors
    ///
    /// A sentence that says what is wrong, and what may be said.
    pub fn parse(text: &str) -> Result<Condition, String> {
        let wrong = |what: &str| format!("{what}; {SYNTAX}");
        let Some(at) = text.find(['<', '>']) else {
            return Err(wrong("no < or > (a shell needs quotes around it)"));
        };
        let (name, rest) = (text[..at].trim(), &text[at..]);
        let metric = METRICS.iter().find(|(known, _)| *known == name);
        let (_, metric) = metric.ok_or_else(|| wrong(&format!("'{name}' is no metric")))?;
        let (operator, value) = OPERATORS
            .iter()
            .find_map(|(known, operator)| Some((*operator, rest.strip_prefix(known)?)))
            .ok_or_else(|| wrong("no operator"))?;
        let value = value.trim();
        let limit = match metric {
            Metric::Rate | Metric::Errors => number(value),
            _ => humantime::parse_duration(value)
                .map(milliseconds)
                .map_err(|error| error.to_string()),
        };
        Ok(Condition {
            text: text.trim().to_owned(),
            metric: *metric,
            operator,
            limit: limit.map_err(|error| wrong(&format!("'{value}': {error}")))?,
        })
    }

    /// Whether it holds; `None` if there is nothing to say it of.
    pub fn holds(&self, measured: &Measured) -> Option<bool> {
        let value = self.metric.of(measured)?;
        Some(match self.operator {
            Operator::Less => value < self.limit,
            Operator::AtMost => value <= self.limit,
            Operator::Greater => value > self.limit,
            Operator::AtLeast => value >= self.limit,
        })
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn number(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.0..f64::INFINITY).contains(&number) => Ok(number),
        _ => Err("expected a number from 0".to_owned()),
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Metric {
    pub fn name(self) -> &'static str {
        let found = METRICS.iter().find(|(_, metric)| *metric == self);
        found.expect("every metric has a name").0
    }

    /// Its value, in ms, requests a second, or requests. There are no latencies if nothing was
    /// answered right.
    pub fn of(self, measured: &Measured) -> Option<f64> {
        let tally = &measured.tally;
        match self {
            Metric::Min => tally.min(),
            Metric::Mean => tally.mean(),
            Metric::P50 => tally.quantile(0.5),
            Metric::P90 => tally.quantile(0.9),
            Metric::P99 => tally.quantile(0.99),
            Metric::P99_9 => tally.quantile(0.999),
            Metric::Max => tally.max(),
            Metric::Rate => Some(measured.right_rate()),
            Metric::Errors => Some(tally.errors() as f64),
        }
    }

    /// A value, for people.
    pub fn show(self, value: f64) -> String {
        match self {
            Metric::Rate => format!("{value:.1} requests/s"),
            Metric::Errors => format!("{value:.0}"),
            _ => format!("{value:.3} ms"),
        }
    }
}

/// A condition that was to fail the command if it held, and what was measured.
pub struct Check<'a> {
    pub condition: &'a Condition,
    pub value: Option<f64>,
    /// A latency that there is none of fails, too.
    pub failed: bool,
}

impl<'a> Check<'a> {
    pub fn of(condition: &'a Condition, measured: &Measured) -> Check<'a> {
        Check {
            condition,
            value: condition.metric.of(measured),
            failed: condition.holds(measured).unwrap_or(true),
        }
    }

    /// Why it failed.
    pub fn complaint(&self) -> String {
        let Check { condition, .. } = self;
        let (metric, name) = (condition.metric, condition.metric.name());
        match self.value {
            Some(value) => {
                let value = metric.show(value);
                format!("failed check '{condition}': {name} was {value}")
            }
            None => format!(
                "failed check '{condition}': nothing was answered right, so there is no {name}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::bench::tally::Tally;

    fn measured(latencies_ms: &[u64], errors: u64) -> Measured {
        let mut tally = Tally::new();
        for &latency in latencies_ms {
            tally.answered(Duration::from_millis(latency));
        }
        for _ in 0..errors {
            tally.failed(("timeout", 4));
        }
        Measured {
            tally,
            elapsed: Duration::from_secs(2),
            trend: None,
        }
    }

    #[test]
    fn a_condition_holds_or_does_not() {
        // 1, 2, ... 100 ms and no error, 50 a second.
        let hundred = measured(&(1..=100).collect::<Vec<_>>(), 0);
        for (text, holds) in [
            ("min<2ms", true),
            ("min >= 1.5ms", false),
            ("mean>50ms", true),
            ("mean>51ms", false),
            ("p50<60ms", true),
            (" p90 > 80ms ", true),
            ("p99<98ms", false),
            ("p99.9>99ms", true),
            ("max<=1s", true),
            ("rate>=50", true),
            ("rate<50.5", true),
            ("rate > 5e1", false),
            ("errors>0", false),
            ("errors>=0", true),
        ] {
            let condition = Condition::parse(text).unwrap();
            assert_eq!(condition.holds(&hundred), Some(holds), "{text}");
        }
        let errors = Condition::parse("errors>2").unwrap();
        assert_eq!(errors.holds(&measured(&[1], 2)), Some(false));
        assert_eq!(errors.holds(&measured(&[1], 3)), Some(true));
    }

    #[test]
    fn without_a_right_answer_no_latency_holds_and_every_check_of_one_fails() {
        let none = measured(&[], 3);
        for text in ["max>1s", "min<0s", "p99<1h"] {
            let condition = Condition::parse(text).unwrap();
            assert_eq!(condition.holds(&none), None);
            let check = Check::of(&condition, &none);
            assert!(check.failed && check.complaint().contains("nothing was answered right"));
        }
        let rate = Condition::parse("rate<1").unwrap();
        assert_eq!(rate.holds(&none), Some(true));
    }

    #[test]
    fn what_cannot_be_read_is_told_with_what_can_be_said() {
        for (text, told) in [
            ("", "no < or >"),
            ("p99", "quotes"),
            ("p98>20ms", "'p98' is no metric"),
            (">20ms", "'' is no metric"),
            ("p99>20", "time unit needed"),
            ("p99>", "''"),
            ("p99=>20ms", "'p99=' is no metric"),
            ("p99>>20ms", "'>20ms'"),
            ("rate<20ms", "'20ms': expected a number"),
            ("rate<-1", "number from 0"),
            ("rate<nan", "number from 0"),
            ("errors>inf", "number from 0"),
        ] {
            let error = Condition::parse(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
            assert!(error.contains("such as p99>20ms"), "{text}: {error}");
        }
    }
}
